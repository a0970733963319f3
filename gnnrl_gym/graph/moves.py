"""What operations that move elements, and compute nothing, do to channel ids: they are executed on the ids."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from gnnrl_gym.graph.attention import feeds_attention, view_of_constants, view_of_heads
from gnnrl_gym.graph.channels import Channels, Weight, along, compress, constant, first, operator_name, spread, varying
from gnnrl_gym.graph.parameters import TURNS, turned, with_ids
from gnnrl_gym.graph.rules import pair, resize, rule, spatial, tie_across
from gnnrl_gym.graph.trace import shape_of


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", of_weights=True)
def view(c: Channels, node: fx.Node, x: Any, *_: Any, **__: Any) -> Any:
    """Executed on the ids. Where one dimension becomes two, what is kept must stay a rectangle: the ids are tied
    across the first (a channel shuffle's groups), so only the last of them shrinks; or across the positions of images
    that features become."""
    x = with_ids(c, node, x)
    if not isinstance(x, Tensor):
        return view_of_constants(c, node, x)
    result = compress(x.reshape(shape_of(node)))
    if varying(x) and operator_name(node) not in ("flatten", "reshape_as", "view_as"):  # which hold no sizes
        c.literals.append(node)
    if len(varying(result)) > 1 and feeds_attention(node, past_views=True):
        return view_of_heads(c, node, result)
    if x.dim() == 2 and result.dim() > 3 and varying(result) == [*range(1, result.dim())]:
        return _images(c, result)
    for d in varying(result)[:-1]:
        one = result.narrow(d, 0, 1).expand(result.shape)
        c.merge(result, one.clone())
        result = one
    return result


def _images(c: Channels, result: Tensor) -> Tensor:
    """Features [N, C * H * W] that become images [N, C, H, W]: all positions of a channel are one unit."""
    whole = first(result, [*range(2, result.dim())]).expand(result.shape)
    c.merge(result, whole.clone())
    return whole


@rule("reshape_as", "view_as")
def view_as(c: Channels, node: fx.Node, x: Any, other: Any) -> Any:
    """`view`, of as many channels as `other` has."""
    if not isinstance(other, Tensor):
        return NotImplemented
    result = view(c, node, x)
    c.merge(result, other)
    return result


@rule("repeat", of_weights=True)
def repeat(c: Channels, node: fx.Node, x: Any, times: Any) -> Any:
    """All of `x` again and again, its channels too."""
    x = with_ids(c, node, x)
    if not isinstance(x, Tensor):
        return NotImplemented
    x = x[(None,) * (len(times) - x.dim())]
    again = [count if d in varying(x) else 1 for d, count in enumerate(times)]
    return first(x, constant(x)).repeat(again).expand(shape_of(node))


@rule("repeat_interleave")
def repeat_each(c: Channels, node: fx.Node, x: Any, times: Any, dim: Any = None, **_: Any) -> Any:
    """Every channel `times` in a row, as heads of keys that several queries share."""
    if not isinstance(times, int) or dim is None:
        return NotImplemented
    small = first(x, [d for d in constant(x) if d != dim % x.dim()])
    return compress(small.repeat_interleave(times, dim)).expand(shape_of(node))


@rule("transpose", "permute", "t", "unsqueeze", "squeeze", "expand", "expand_as", "roll", "flip", "getitem", "select",
      "numpy_T", "mT", "swapaxes", "swapdims", "movedim", "moveaxis", of_weights=True)  # fmt: skip
def move(c: Channels, node: fx.Node, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Executed on the ids as it is."""
    x = with_ids(c, node, x)
    if isinstance(x, Weight) and operator_name(node) in TURNS:
        return turned(node, x, *args, **kwargs)
    if any(isinstance(a, Weight) for a in (x, *args)):  # in expand_as one gives a size, but has no ids to execute on
        return NotImplemented
    target: Any = node.target
    result = target(x, *args, **kwargs)
    if operator_name(node) in ("select", "roll", "expand") and varying(x):
        c.literals.append(node)  # an index, a shift or a size may be one of channels
    if operator_name(node) == "squeeze":
        _keep_two(c, x, args[0] if args else range(x.dim()))
    return compress(result) if isinstance(result, Tensor) else result


def _keep_two(c: Channels, x: Tensor, dims: Any) -> None:
    """`squeeze` would take the dimension of the last channel away: the first of them stays, beside the one that every
    group keeps."""
    for d in {d % x.dim() for d in ([dims] if isinstance(dims, int) else dims)} & set(varying(x)):
        c.freeze(x.narrow(d, 0, 1))


@rule("slice")
def slice_(c: Channels, node: fx.Node, x: Any, dim: int = 0, *args: Any, **kwargs: Any) -> Any:
    """Executed on the ids; bounds on the channels are literals."""
    if not isinstance(x, Tensor):
        return NotImplemented
    if dim % x.dim() in varying(x) and shape_of(node)[dim] != x.size(dim):
        c.literals.append(node)
    return move(c, node, x, dim, *args, **kwargs)


@rule("cat")
def cat(c: Channels, node: fx.Node, tensors: Any, dim: int = 0) -> Any:
    """Along the channels the ids follow each other; along anything else all parts share their channels."""
    tensors = [with_ids(c, node, t) for t in tensors]
    if any(isinstance(t, Weight) for t in tensors):
        return NotImplemented
    dim %= tensors[0].dim()
    if any(set(varying(t)) - {dim} for t in tensors):
        if any(dim in varying(t) for t in tensors):
            return NotImplemented
        parts = [t.narrow(dim, 0, 1) for t in tensors if t.size(dim)]
        for other in parts[1:]:
            c.merge(parts[0], other)
        carrier = max(parts, key=lambda t: len(varying(t)))
        return carrier.expand(shape_of(node))
    vectors = [along(t, dim) for t in tensors]
    return spread(torch.cat([v for v in vectors if v is not None]), dim, shape_of(node))


@rule("stack")
def stack(c: Channels, node: fx.Node, tensors: Any, dim: int = 0) -> Any:
    """`cat` of all, each with one dimension more."""
    if any(isinstance(t, Weight) for t in tensors):
        return NotImplemented
    dim %= tensors[0].dim() + 1
    return cat(c, node, [t.unsqueeze(dim) for t in tensors], dim)


@rule("chunk", "split", "split_with_sizes")
def split(c: Channels, node: fx.Node, x: Any, sizes: Any = 0, dim: int = 0) -> Any:
    """Executed on the ids. `chunk` cuts what is left into equal parts, so its parts are tied; sizes are literals, and
    whether equal ones have to stay equal depends on where the forward takes them from."""
    if not isinstance(x, Tensor):
        return NotImplemented
    target: Any = node.target
    parts = target(x, sizes, dim)
    if dim % x.dim() in varying(x):
        chunks = operator_name(node) == "chunk"
        if chunks and any(p.shape != parts[0].shape for p in parts):
            return NotImplemented
        c.literals.append(node)
        for part in parts:
            alike = next(other for other in parts if other.shape == part.shape)
            if alike is not part:
                c.merge(alike, part) if chunks else c.parts.append((alike, part))
    return [compress(part) for part in parts]


@rule("pixel_shuffle")
def pixel_shuffle(c: Channels, node: fx.Node, x: Tensor, factor: int) -> Any:
    """Channels that become the pixels of one are one unit."""
    ids = along(x, -3)
    if ids is None:
        return NotImplemented
    members = ids.view(-1, factor**2)
    c.merge(members, members[:, :1].expand(members.shape).clone())
    return spread(members[:, 0].clone(), -3, shape_of(node))


@rule("pixel_unshuffle")
def pixel_unshuffle(c: Channels, node: fx.Node, x: Tensor, factor: int) -> Any:
    """Likewise the other way round."""
    ids = along(x, -3)
    return NotImplemented if ids is None else spread(ids.repeat_interleave(factor**2), -3, shape_of(node))


@rule("channel_shuffle")
def channel_shuffle(c: Channels, node: fx.Node, x: Tensor, groups: int) -> Any:
    """Viewed as groups, these turned with what is in them, and viewed as it was."""
    ids = along(x, 1)
    if ids is None:
        return NotImplemented
    tie_across(c, ids, groups)
    return spread(ids.view(groups, -1).mT.flatten(), 1, shape_of(node))


@rule("im2col")
def im2col(c: Channels, node: fx.Node, x: Any, kernel: Any, *_: Any) -> Any:
    """`F.unfold`: each channel once for every place in the kernel, one after the other."""
    ids = along(x, -3)
    return NotImplemented if ids is None else spread(ids.repeat_interleave(math.prod(kernel)), -2, shape_of(node))


@rule("col2im")
def col2im(c: Channels, node: fx.Node, x: Any, _: Any, kernel: Any, *__: Any) -> Any:
    """`F.fold`, the same the other way round: what becomes one channel is one unit."""
    ids = along(x, -2)
    if ids is None:
        return NotImplemented
    members = ids.view(-1, math.prod(kernel))
    c.merge(members, members[:, :1].expand(members.shape).clone())
    return spread(members[:, 0].clone(), -3, shape_of(node))


@rule("unfold")
def windows(c: Channels, node: fx.Node, x: Any, dim: int, *_: Any) -> Any:
    """Windows along one dimension of positions, as a dimension more."""
    dim %= x.dim()
    return NotImplemented if dim in varying(x) else x.narrow(dim, 0, 1)[..., None].expand(shape_of(node))


@rule("unbind")
def unbind(c: Channels, node: fx.Node, x: Any, dim: int = 0) -> Any:
    """Executed on the ids; which of the channels is read is a literal."""
    if not isinstance(x, Tensor):
        return NotImplemented
    if dim % x.dim() in varying(x):
        c.literals.append(node)
    return [compress(part) for part in x.unbind(dim)]


@rule("pad", "constant_pad_nd")
def pad(c: Channels, node: fx.Node, x: Any, amounts: Any, mode: Any = "constant", value: Any = None) -> Any:
    """Positions repeat their channel; new channels are new ids, and how many there are is a literal."""
    if not isinstance(x, Tensor) or any(a < 0 for a in amounts):
        return NotImplemented
    shape = shape_of(node)
    for i in range(0, len(amounts), 2):
        dim = x.dim() - 1 - i // 2
        if dim not in varying(x) or not any(amounts[i : i + 2]):
            continue
        ids = along(x, dim)
        if ids is None or (isinstance(mode, str) and mode != "constant"):
            return NotImplemented
        c.literals.append(node)
        return spread(torch.cat([c.fresh(amounts[i]), ids, c.fresh(amounts[i + 1])]), dim, shape)
    still = [d for d in range(x.dim()) if d not in varying(x)]
    return resize(x, still, shape)


@rule("index", of_weights=True)
def index(c: Channels, node: fx.Node, x: Any, indices: Any) -> Any:
    """Entries along dimensions that hold no channels: rows of a table [rows, channels] or [heads, rows], a parameter or
    computed, such as a bias for every head by relative position; or positions of activations."""
    at = [d for d, chosen in enumerate(indices) if chosen is not None]
    others = [d for d in range(len(x.shape)) if d not in at]
    carriers = others if isinstance(x, Weight) and len(x.shape) == 2 else varying(x) if isinstance(x, Tensor) else []
    side_by_side = at == [*range(at[0], at[-1] + 1)]  # else their dimensions come first
    by_channels = any(isinstance(chosen, Tensor) and varying(chosen) for chosen in indices)  # as `argmax` gives them
    if len(carriers) != 1 or carriers[0] in at or not side_by_side or by_channels:
        return NotImplemented
    (dim,) = carriers
    ids = c.new_outputs(x, dim) if isinstance(x, Weight) else first(x, constant(x)).flatten()
    wide = len(shape_of(node)) - len(others)  # dimensions that the indices, broadcast, make of theirs
    return spread(ids, dim if dim < at[0] else dim - len(at) + wide, shape_of(node))


@rule("max_unpool2d", "max_unpool3d")
def unpool(c: Channels, node: fx.Node, x: Tensor, places: Tensor, *_: Any, **__: Any) -> Any:
    """Back to where the maxima of the same channel were."""
    c.merge(x, places)
    return spatial(c, node, x)


@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "sort", "argsort", "topk")
def in_order(c: Channels, node: fx.Node, x: Tensor, *_: Any, **__: Any) -> Any:
    """Positions by their values, or added up so far: channel by channel."""
    dim = _argument(node, "dim")
    if not x.dim() or dim % x.dim() in varying(x):
        return NotImplemented
    return pair(node, resize(x, [dim], shape_of(node)))


def _argument(node: fx.Node, name: str) -> Any:
    """What `node` takes by `name`, wherever that stands among its arguments."""
    target: Any = node.target
    at, known = next((i, a) for i, a in enumerate(target._schema.arguments) if a.name == name)
    return node.args[at] if at < len(node.args) else node.kwargs.get(name, known.default_value)
