"""Building the pruned module: `slim` cuts the channels out, `mask` zeroes them in place."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, fx, nn

from gnnrl_gym.copies import activations, copy_of, refreshed
from gnnrl_gym.graph.channels import Channels, operator_name
from gnnrl_gym.graph.groups import ChannelGroups, Ints
from gnnrl_gym.graph.trace import Trace, module_path, shape_of
from gnnrl_gym.pruning.attention import drop_heads, holds_heads
from gnnrl_gym.pruning.attributes import Attributes, set_attributes
from gnnrl_gym.pruning.foreign import Foreign


@runtime_checkable
class HoldsChannelPadding(Protocol):
    """A module whose forward pads channels by amounts that it keeps as attributes; `slim` updates them."""

    def set_channel_padding(self, front: int, back: int) -> None: ...


@runtime_checkable
class HoldsSplitSizes(Protocol):
    """A module whose forward splits channels by sizes that it keeps as an attribute; `slim` updates them."""

    def set_split_sizes(self, sizes: Sequence[int]) -> None: ...


class Slimmer:
    """Cuts a network down to the units that are kept.

    Args:
        model: the dense network; never changed.
        trace, channels, groups: what the graph side found in it.
        attributes: integer attributes of its modules that hold a number of channels.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: Trace,
        channels: Channels,
        groups: ChannelGroups,
        attributes: Attributes | None = None,
    ) -> None:
        self.model, self.trace, self.channels, self.groups = model, trace, channels, groups
        self.attributes = attributes or {}
        self._dims: dict[str, list[tuple[int, Ints]]] = defaultdict(list)
        for (name, dim), owner in groups.owner.items():
            if (owner >= 0).any():
                self._dims[name].append((dim, owner))
        self._replaced: dict[str, bool] = {}
        self._reading = {product.factors[1] for product in channels.products if len(product.factors) > 1}

    def mask(self, kept: np.ndarray) -> nn.Module:
        """Full-size copy in which every parameter entry of a unit that is not `kept` (bool [U]) is zero, and so is
        every entry of a buffer that reads it as a weight: no reader gets anything from it."""
        model = copy_of(self.model)
        tensors, parameters = _named_tensors(model), dict(model.named_parameters())
        with torch.no_grad():
            for name, dims in self._dims.items():
                for dim, owner in dims:
                    if name in parameters or (name, dim) in self._reading:  # no variance of a norm: it divides
                        tensors[name].index_fill_(dim, _indices(~_stays(owner, kept), tensors[name]), 0)
        return refreshed(model)

    def slim(self, kept: np.ndarray) -> nn.Module:
        """Physically smaller copy of the same class with only the `kept` units (bool [U])."""
        # deepcopy takes what its memo already holds, so the big tensors are never copied whole
        memo = activations(self.model)
        # looked up now: a network that was moved, or trained on, may hold other buffers than before
        for name, tensor in _named_tensors(self.model).items():
            memo[id(tensor)] = self._cut(name, tensor, kept)
        model = copy.deepcopy(self.model, memo)
        self._resize_modules(model)
        self._edit_literals(model, kept)
        set_attributes(model, self.attributes, self.channels, self.groups, kept)
        return refreshed(model)

    def _cut(self, name: str, tensor: Tensor, kept: np.ndarray) -> Tensor:
        data = tensor.detach()
        for dim, owner in self._dims.get(name, ()):
            data = data.index_select(dim, _indices(_stays(owner, kept), data))
        data = data.clone() if data.data_ptr() == tensor.data_ptr() else _formatted(data, tensor)
        return nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data

    def _edit_literals(self, model: nn.Module, kept: np.ndarray) -> None:
        """Bring the channel literals of `model` (already slim) in line with the `kept` units."""
        for path, nodes in literal_sites(self.channels, self.groups).items():
            home = literal_home(model, path)
            if home == "traced":
                if self._replaces(path, nodes):
                    model.set_submodule(path, _traced_module(self.trace, path, nodes, self.groups, kept))
            elif home == "heads":
                drop_heads(model.get_submodule(path))
            else:
                _update_attributes(model.get_submodule(path), nodes[0], self.groups, kept)

    def _replaces(self, path: str, nodes: list[fx.Node]) -> bool:
        """Whether its traced graph replaces the module `path`, whose literals are `nodes`; the answer is kept."""
        if path in self.attributes:  # which are the module's own
            return False
        if path not in self._replaced:
            inside = _inside(self.trace, path)
            foreign = Foreign(self.model.get_submodule(path), _sources(inside), inside[-1], self.groups)
            self._replaced[path] = foreign.may_be(
                lambda kept: _traced_module(self.trace, path, nodes, self.groups, kept)
            )
        return self._replaced[path]

    def _resize_modules(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        for path in {name.rpartition(".")[0] for name in self._dims}:
            weight = f"{path}.weight" if path else "weight"
            _resize(modules[path], self.channels.grouped.get(weight))


def _stays(owner: Ints, kept: np.ndarray) -> np.ndarray:
    return np.append(kept, True)[owner]  # owner -1, nobody's, is the last: it stays


def _formatted(data: Tensor, like: Tensor) -> Tensor:
    """`data` with its channels last in memory, if those of `like` are."""
    form = torch.channels_last_3d if like.dim() == 5 else torch.channels_last
    last = like.dim() in (4, 5) and not like.is_contiguous() and like.is_contiguous(memory_format=form)
    return data.contiguous(memory_format=form) if last else data


def _indices(choice: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.flatnonzero(choice)).to(like.device)


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by canonical name (the first of a shared tensor)."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _resize(module: nn.Module, per_group: int | None) -> None:
    """Bring the size attributes of a torch.nn layer in line with its tensors; `per_group` entries of a grouped
    convolution's first dimension are one convolution group."""
    if isinstance(module, nn.modules.conv._ConvNd):
        first, second = module.weight.shape[:2]
        if per_group is not None:
            module.groups = first // per_group
        sizes = (first, second * module.groups)
        module.out_channels, module.in_channels = sizes[::-1] if module.transposed else sizes
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        tensor = module.weight if module.weight is not None else module.running_mean
        module.num_features = len(tensor) if tensor is not None else module.num_features
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)


# ---- literals: numbers of channels that stand in a forward ------------------------------------------------------


SPLITS = ("split", "split_with_sizes")
_CUTS = ("slice", *SPLITS)  # their literals count the channels of what they cut


def literal_home(model: nn.Module, path: str) -> str:
    """Who keeps a literal that stands in module `path`:

    * "attribute": the module updates it.
    * "resized": a torch.nn convolution, whose groups are, or a norm; of a subclass only where the forward is torch's.
    * "heads": an attention module of torch or torchvision, which becomes one of fewer heads.
    * "traced": a foreign module without parameters, replaced by its traced graph where that does the same.
    * "code": nobody for sure. It must be computed from shapes, or from an attribute that is found by its value
      (`gnnrl_gym.pruning.attributes`); a probe checks that.
    """
    module = model.get_submodule(path)
    if path and holds_heads(module):
        return "heads"
    if isinstance(module, (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase)) and _as_torch_has_it(module):
        return "resized"
    if isinstance(module, (HoldsChannelPadding, HoldsSplitSizes)):
        return "attribute"
    own_tensors = next(iter(_named_tensors(module)), None)
    return "traced" if path and own_tensors is None and not _adapts(module) else "code"


def _as_torch_has_it(module: nn.Module) -> bool:
    """Whether nothing but torch's own code computes what the module gives."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return not hooks and all(_of_torch(getattr(module, name, None)) for name in ("forward", "_conv_forward"))


def _of_torch(method: Any) -> bool:
    return method is None or method.__module__.startswith("torch.nn.")


def _adapts(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def literal_sites(channels: Channels, groups: ChannelGroups) -> dict[str, list[fx.Node]]:
    """Path of a module -> its literals of channels that can go."""
    sites: dict[str, list[fx.Node]] = defaultdict(list)
    for node in channels.literals:
        counted = node.all_input_nodes[0] if operator_name(node) in _CUTS else node
        if counted in groups.values and (groups.values[counted][1] >= 0).any():
            sites[module_path(node)].append(node)
    return sites


def _update_attributes(module: nn.Module, node: fx.Node, groups: ChannelGroups, kept: np.ndarray) -> None:
    if isinstance(module, HoldsChannelPadding):
        module.set_channel_padding(*_padding(node, groups, kept))
    elif isinstance(module, HoldsSplitSizes):
        module.set_split_sizes(_split_sizes(node, groups, kept))
    elif isinstance(module, nn.modules.batchnorm._NormBase):  # one without tensors, see _resize
        module.num_features = int(_stays(groups.values[node][1], kept).sum())


def _split_sizes(node: fx.Node, groups: ChannelGroups, kept: np.ndarray) -> list[int]:
    """Kept channels in each part of a split."""
    dim, owner = groups.values[node.all_input_nodes[0]]
    ends = np.cumsum([part.shape[dim] for part in node.meta["val"]])
    return [int(part.sum()) for part in np.split(_stays(owner, kept), ends[:-1])]


def _padding(node: fx.Node, groups: ChannelGroups, kept: np.ndarray) -> tuple[int, int]:
    """Kept channels that a pad adds in front and behind."""
    dim, owner = groups.values[node]
    amounts: Any = node.args[1]
    front, back = (int(a) for a in amounts[2 * (len(shape_of(node)) - 1 - dim) :][:2])
    stays = _stays(owner, kept)
    return int(stays[:front].sum()), int(stays[len(stays) - back :].sum())


def _inside(trace: Trace, path: str) -> list[fx.Node]:
    """What runs in a module, without `torch.export`'s checks that types and devices are those of the trace."""
    inside = [node for node in trace.operations() if f"{module_path(node)}.".startswith(f"{path}.")]
    return [node for node in inside if operator_name(node) != "_assert_tensor_metadata"]


def _sources(inside: list[fx.Node]) -> list[fx.Node]:
    """What the nodes `inside` a module take from outside, as it comes."""
    own = set(inside)
    return list(dict.fromkeys(source for node in inside for source in node.all_input_nodes if source not in own))


def _traced_module(
    trace: Trace, path: str, literals: list[fx.Node], groups: ChannelGroups, kept: np.ndarray
) -> fx.GraphModule:
    """The nodes of the parameter-free module `path` as a module of their own, with its channel literals edited."""
    graph, inside = fx.Graph(), _inside(trace, path)
    copies = {source: graph.placeholder(source.name) for source in _sources(inside)}
    for node in inside:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        if node in literals:
            copies[node].args = _edited(node, copies[node].args, groups, kept)
            if operator_name(node) == "split":  # parts of one size, which they are no more
                copies[node].target = torch.ops.aten.split_with_sizes.default
    graph.output(copies[inside[-1]])
    return fx.GraphModule({}, graph)


def _edited(node: fx.Node, args: Any, groups: ChannelGroups, kept: np.ndarray) -> tuple[Any, ...]:
    """`args` of the copied `node` with the numbers that the `kept` units make true."""
    args = list(args)
    if operator_name(node) in SPLITS:
        return args[0], _split_sizes(node, groups, kept), *args[2:]
    if operator_name(node) == "slice":
        before = _stays(groups.values[node.all_input_nodes[0]][1], kept)
        start, stop, _ = slice(*args[2:4]).indices(len(before))
        return *args[:2], int(before[:start].sum()), int(before[:stop].sum()), *args[4:]
    dim, owner = groups.values[node]
    stays = int(_stays(owner, kept).sum())
    if operator_name(node) in ("pad", "constant_pad_nd"):
        at = 2 * (len(shape_of(node)) - 1 - dim)
        args[1] = [*args[1][:at], *_padding(node, groups, kept), *args[1][at + 2 :]]
    elif operator_name(node) in ("view", "reshape", "_unsafe_view"):
        args[1] = [-1, *shape_of(node)[1:]]  # the batch is free
        args[1][dim] = stays
    elif operator_name(node) == "unflatten":
        first = args[1] % (len(shape_of(node)) - len(args[2]) + 1)
        args[2] = [*args[2][: dim - first], stays, *args[2][dim - first + 1 :]]
    return tuple(args)
