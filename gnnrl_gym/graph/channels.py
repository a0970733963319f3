"""Integer channel ids pushed through the ATen graph, merged where an operation forces it.

Every tensor of the network is shadowed by a tensor of ids of the same shape: the element's channel. Dimensions along
which the id does not change have stride 0 (`expand`), so a shadow is as small as its channels are many. A convolution
makes new ids, a shape operation is simply executed on the ids, an addition merges the ids that it adds. What is left
is a partition of all channels; each class of it is one removable unit. Zero-padded shortcuts, concatenations,
flattening and channel shuffles need no special case: they move the ids as they move the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from gnnrl_gym.backends import without_cudnn
from gnnrl_gym.errors import UnsupportedOperation
from gnnrl_gym.graph.trace import Trace, module_path, shape_of, source_line

FROZEN = 0  # the id of everything that can't be removed: the network's inputs, outputs and constants

Key = tuple[str, int]  # a dimension of a named parameter or buffer


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer as an operand: it has no ids of its own, its dimensions are bound to those of others.

    Attributes:
        order: dimension d of the operand is dimension ``order[d]`` of what `name` names, as of a transposed matrix;
            empty where it is dimension d.
    """

    name: str
    shape: tuple[int, ...]
    order: tuple[int, ...] = ()

    def key(self, dim: int) -> Key:
        return self.name, self.order[dim] if self.order else dim


@dataclass(frozen=True)
class Product:
    """Multiply-accumulates of one operation: `constant` times the channels kept along each of `factors`, those that it
    writes first."""

    node: fx.Node
    constant: int
    factors: tuple[Key, ...]


@dataclass
class Channels:
    """What the propagation found.

    Attributes:
        bound: ids along a dimension of a parameter or buffer.
        values: ids of every node's output.
        merges: pairs of id tensors whose elements are the same channel.
        frozen: ids that must stay.
        whole: weights that can't be resized.
        products: the operations that cost multiply-accumulates.
        literals: nodes that may hold a number of channels in their arguments (pad, slice, view, split).
        parts: pairs of equal parts of a split, which have to stay equal where one number stands for both.
        grouped: weights of convolutions that lose whole groups -> entries of their first dimension per group.
        across: weights of those that lose channels of every group.
        by_group: weights of those that are to lose whole groups in any case.
        unsupported: "operation at module, line" of everything without a rule that touches channels.
        made: the same of operations without a rule that read no channels, but whose result may meet some later
            (`torch.zeros`): by the id of that result.
        spent: the same of what takes parameters and no channels (a `softmax` of one): by the name of each.
        lifted: ids that were made for a parameter or buffer (`gnnrl_gym.graph.parameters`): by its name.
    """

    bound: dict[Key, Tensor] = field(default_factory=dict)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    merges: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    frozen: list[Tensor] = field(default_factory=list)
    whole: set[str] = field(default_factory=set)
    products: list[Product] = field(default_factory=list)
    literals: list[fx.Node] = field(default_factory=list)
    parts: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    grouped: dict[str, int] = field(default_factory=dict)
    across: set[str] = field(default_factory=set)
    by_group: frozenset[str] = frozenset()
    unsupported: list[str] = field(default_factory=list)
    made: dict[int, str] = field(default_factory=dict)
    spent: dict[str, str] = field(default_factory=dict)
    lifted: dict[str, Tensor] = field(default_factory=dict)
    count: int = FROZEN + 1

    def fresh(self, size: int) -> Tensor:
        """`size` new ids."""
        self.count += size
        return torch.arange(self.count - size, self.count)

    def make(self, place: str) -> int:
        """A frozen id for what an operation at `place` makes of no channels."""
        (id_,) = self.fresh(1).tolist()
        self.frozen.append(torch.tensor([id_]))
        self.made[id_] = place
        return int(id_)

    def merge(self, a: Tensor, b: Tensor) -> None:
        """Elements of `a` and `b` (equal shapes) are the same channels from now on."""
        same = [d for d in constant(a) if d in constant(b)]
        self.merges.append((first(a, same).flatten(), first(b, same).flatten()))

    def freeze(self, *values: Any) -> None:
        """The channels of these id tensors stay; weights among them are left whole."""
        for value in values:
            if isinstance(value, (list, tuple)):
                self.freeze(*value)
            elif isinstance(value, Tensor):
                self.frozen.append(first(value, constant(value)).flatten())
            elif isinstance(value, Weight):
                self.whole.add(value.name)

    def bind(self, weight: Weight | Tensor | None, dim: int, ids: Tensor) -> None:
        """Dimension `dim` of `weight` holds the channels `ids` [size], or one number for all of them. A weight used
        twice merges both uses; one that was computed from parameters has ids already."""
        if weight is None:
            return
        if weight.shape[dim] != len(ids):
            self.freeze(weight)
            return
        known = weight if isinstance(weight, Tensor) else self.bound.setdefault(weight.key(dim), ids)
        if known is not ids:
            self.merge(known, ids)

    def new_outputs(self, weight: Any, dim: int = 0) -> Tensor:
        """Ids [size] of the channels that `weight` writes: new ones, or its known ones where it is used again."""
        if not isinstance(weight, Weight):  # a computed weight can't be resized
            return torch.full((weight.shape[dim],), FROZEN)
        key = weight.key(dim)
        if key not in self.bound:
            self.bound[key] = self.fresh(weight.shape[dim])
        return self.bound[key]


def varying(ids: Tensor) -> list[int]:
    """Dimensions along which the id changes."""
    return [d for d in range(ids.dim()) if ids.stride(d) != 0 and ids.size(d) > 1]


def constant(ids: Tensor) -> list[int]:
    """Dimensions along which it doesn't."""
    return [d for d in range(ids.dim()) if ids.stride(d) == 0 or ids.size(d) == 1]


def first(ids: Tensor, dims: list[int]) -> Tensor:
    """The ids at the first position along `dims` (kept, with size 1)."""
    for d in dims:
        ids = ids.narrow(d, 0, min(1, ids.size(d)))  # some tensors are empty
    return ids


def compress(ids: Tensor) -> Tensor:
    """The same ids with stride 0 along every dimension where they don't change."""
    shape = ids.shape
    for d in varying(ids):
        head = ids.narrow(d, 0, 1)
        if bool((ids == head).all()):
            ids = head
    return ids.expand(shape)


def along(ids: Tensor, dim: int) -> Tensor | None:
    """Ids [size] along `dim`, or None where they change along another dimension too."""
    dim %= ids.dim()
    if any(d != dim for d in varying(ids)):
        return None
    return first(ids, [d for d in range(ids.dim()) if d != dim]).reshape(-1)


def spread(ids: Tensor, dim: int, shape: tuple[int, ...]) -> Tensor:
    """Ids [size] as the shadow of a tensor of `shape` whose channels lie along `dim`."""
    view = [1] * len(shape)
    view[dim % len(shape)] = -1
    return ids.view(view).expand(shape)


def frozen_like(node: fx.Node, id_: int = FROZEN) -> Any:
    """A shadow of ids that are frozen for whatever `node` returns."""
    value = node.meta["val"]
    if isinstance(value, (list, tuple)):
        return [torch.tensor(id_).expand(tuple(v.shape)) if isinstance(v, Tensor) else None for v in value]
    return torch.tensor(id_).expand(tuple(value.shape)) if isinstance(value, Tensor) else None


Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def operator_name(node: fx.Node) -> str:
    """The ATen name without namespace, overload and in-place underscore: "conv2d", "add", "getitem"."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return str(getattr(target, "__name__", target))
    return target.name().split("::")[-1].split(".")[0].rstrip("_")


def propagate(
    trace: Trace, strict: bool = False, into: Channels | None = None, by_group: frozenset[str] = frozenset()
) -> Channels:
    """Push ids through the whole graph.

    Args:
        strict: raise on an operation without a rule; otherwise what it touches is frozen.
        into: what another trace of the same network gave: weights that both use have the same channels in both. The
            costs stay those of the first trace.
        by_group: grouped convolutions, by their weights, that are to lose whole groups.

    Raises:
        UnsupportedOperation: with `strict`.
    """
    from gnnrl_gym.graph import attention, moves, parameters, products, rules  # noqa: F401  (fill RULES)

    channels = into or Channels(by_group=by_group)
    counted = len(channels.products) if into else None
    for node in trace.graph.nodes:
        if node.op == "placeholder":
            channels.values[node] = _operand(channels, trace, node)
        elif node.op == "call_function":
            channels.values[node] = _apply(channels, node, strict)
        elif node.op == "output":
            fx.map_arg(node.args, lambda n: channels.freeze(channels.values[n]))
    del channels.products[len(channels.products) if counted is None else counted :]
    for place in parameters.settle(channels):
        if place not in channels.unsupported:  # a second trace meets those of the first again
            _unsupported(channels, place, strict)
    return channels


def _operand(channels: Channels, trace: Trace, node: fx.Node) -> Any:
    if node.name in trace.tensors:
        return Weight(trace.tensors[node.name], shape_of(node))
    if node.name in trace.constants and max(shape_of(node), default=1) > 1:  # it may meet as many channels
        return frozen_like(node, channels.make(f"the tensor '{trace.constants[node.name]}' (make it a buffer)"))
    return frozen_like(node)


def _apply(channels: Channels, node: fx.Node, strict: bool) -> Any:
    def lookup(n: fx.Node) -> Any:
        return channels.values[n]

    args, kwargs = fx.map_arg(node.args, lookup), fx.map_arg(node.kwargs, lookup)
    handler = RULES.get(operator_name(node))
    result = handler(channels, node, *args, **kwargs) if handler else NotImplemented
    if result is not NotImplemented:
        return result
    operands = [v for v in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(v, (Tensor, Weight))]
    if macs := macs_of(node):
        channels.products.append(Product(node, macs, ()))
    channels.freeze(operands)
    return frozen_like(node, _stopped(channels, node, operands, bool(macs), strict))


def _stopped(channels: Channels, node: fx.Node, operands: list[Any], layer: bool, strict: bool) -> int:
    """Name an operation without a rule that touches channels, or that is a `layer` of computed weights, whose channels
    are never made; the id of what it gives. Of parameters alone it may give what meets no channels, as a gate."""
    from gnnrl_gym.graph.parameters import names_of

    place, weights = _place(node), [v.name for v in operands if isinstance(v, Weight) and v.shape]
    computed = _computed(channels, operands)
    owners = [names_of(channels, v) for v in operands if isinstance(v, Tensor) and varying(v)]
    touched = not all(owners)
    weights += [name for names in owners for name in names]
    if (touched and not _ends(node)) or (layer and (weights or computed)):
        for named in (*computed, place):
            _unsupported(channels, named, strict)
    if touched:
        return FROZEN
    channels.spent |= dict.fromkeys(weights, place)
    return channels.make(place)


def _computed(channels: Channels, operands: list[Any]) -> list[str]:
    """Places that made some of `operands` of parameters."""
    ids = [
        int(first(v, constant(v)).flatten()[0])
        for v in operands
        if isinstance(v, Tensor) and v.numel() and not varying(v)
    ]
    places = [channels.made[id_] for id_ in ids if id_ in channels.made]
    return [place for place in places if place in channels.spent.values()]


def _place(node: fx.Node) -> str:
    """Where the code has `node`, for messages."""
    path = module_path(node)
    module = f"'{path}'" if path else "the network's own forward"
    return f"{operator_name(node)} in {module} ({source_line(node)})"


def _unsupported(channels: Channels, place: str, strict: bool) -> None:
    if strict:
        raise UnsupportedOperation(f"No channel rule for {place}. Leave strict=False to freeze what it touches.")
    channels.unsupported.append(place)


def _ends(node: fx.Node) -> bool:
    """Whether the network's output is what `node` makes of values of the same shape, as by a softmax: their channels
    stay in any case."""
    shapes = {shape_of(n) for n in (node, *node.all_input_nodes)}
    # what is written in place, into a slice, has no user, but is read all the same
    return len(shapes) == 1 and bool(node.users) and all(user.op == "output" for user in node.users)


def _recurrent(x: Any, one: Any, other: Any) -> int:
    """Floating-point operations of a recurrent layer, from the shapes of its input [..., size] and of both matrices."""
    return int(2 * math.prod(x[:-1]) * (math.prod(one) + math.prod(other)))


def _attention(query: Any, key: Any, value: Any) -> int:
    """Likewise of attention, from shapes [B, heads, length, size]; several queries may share a key."""
    return int(2 * math.prod(query[:3]) * key[2] * (query[3] + value[3]))


# What libraries compute at once, torch's counter does not know: a recurrent layer's direction on a CPU, and up to torch
# 2.11 attention on a CPU.
_AT_ONCE = {
    torch.ops.aten.mkldnn_rnn_layer: lambda x, one, other, *_, **__: _recurrent(x, one, other),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: _attention(q, k, v),
}


def macs_of(node: fx.Node) -> int:
    """Multiply-accumulates of an operation that stays as it is."""

    def fake(n: fx.Node) -> Any:
        return n.meta["val"]

    target: Any = node.target
    if not any(isinstance(fake(n), Tensor) for n in node.all_input_nodes):  # it would really be computed, numbers drawn
        return 0
    counter = FlopCounterMode(display=False, custom_mapping=_AT_ONCE)
    with torch.no_grad(), without_cudnn(), counter:  # a forward may change a parameter in place
        target(*fx.map_arg(node.args, fake), **fx.map_arg(node.kwargs, fake))
    return counter.get_total_flops() // 2
