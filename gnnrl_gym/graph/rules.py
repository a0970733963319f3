"""What each ATen operation does to channel ids. A rule that meets a case it can't do exactly returns NotImplemented:
then everything the operation touches is frozen."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from gnnrl_gym.errors import UnsupportedOperation
from gnnrl_gym.graph.channels import (
    RULES,
    Channels,
    Product,
    Rule,
    Weight,
    along,
    frozen_like,
    operator_name,
    spread,
    varying,
)
from gnnrl_gym.graph.parameters import scaled, with_ids
from gnnrl_gym.graph.quotients import has_pole
from gnnrl_gym.graph.trace import shape_of


def rule(*names: str, of_weights: bool = False) -> Callable[[Rule], Rule]:
    """Register `f(channels, node, *args, **kwargs) -> ids` for the ATen operations `names` (without overloads), and for
    ATen alone: a custom operation may bear one of its names and do something else. Without
    `of_weights`, what is done to a parameter itself (its mean, say) has no rule: it has no ids to push on."""

    def register(function: Rule) -> Rule:
        @functools.wraps(function)
        def guarded(c: Channels, node: fx.Node, *args: Any, **kwargs: Any) -> Any:
            foreign = getattr(node.target, "namespace", "aten") != "aten"
            if foreign or (not of_weights and args and isinstance(args[0], Weight)):
                return NotImplemented
            return function(c, node, *args, **kwargs)

        RULES.update(dict.fromkeys(names, guarded))
        return guarded

    return register


@rule("conv1d", "conv2d", "conv3d")
def convolution(
    c: Channels, node: fx.Node, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Any:  # fmt: skip
    """New ids. In a grouped convolution a unit is a whole convolution group, so depthwise is the case of size 1; where
    the groups are few and large, it is one channel of each, and all groups stay."""
    inputs = along(x, 1) if _batched(node, x) else None
    if inputs is None or not isinstance(weight, Weight) or (groups > 1 and weight.order):
        return NotImplemented
    outputs = c.new_outputs(weight)
    c.bind(bias, 0, outputs)
    shape = shape_of(node)
    cost = math.prod(weight.shape[2:]) * math.prod(shape[2:]) * shape[0]
    across = 1 < groups < min(weight.shape[1], len(outputs) // groups) and weight.name not in c.by_group
    if across:
        c.across.add(weight.name)
        tie_across(c, inputs, groups)
        tie_across(c, outputs, groups)
    if groups == 1 or across:
        c.bind(weight, 1, inputs[: weight.shape[1]])
        c.products.append(Product(node, cost, (weight.key(0), weight.key(1))))
    else:
        _tie_groups(c, inputs, outputs, groups)
        c.literals.append(node)
        c.grouped[weight.name] = len(outputs) // groups
        c.products.append(Product(node, cost * weight.shape[1], (weight.key(0),)))
    return spread(outputs, 1, shape)


def _batched(node: fx.Node, x: Tensor) -> bool:
    """Whether the channels of `x` lie along dimension 1: torch takes one sample alone, too, and pools 3-d as images."""
    name = operator_name(node)
    batched = x.dim() == next(int(letter) for letter in name if letter.isdigit()) + 2
    if not batched and "conv" in name and node.all_input_nodes[0].op == "placeholder":
        raise UnsupportedOperation(
            f"The example input of shape {list(x.shape)} has no batch dimension: {name} takes it as one sample, and "
            "no rule follows the channels of that. Give a batch of one: x[None]."
        )
    return batched


@rule("linear", of_weights=True)
def linear(c: Channels, node: fx.Node, x: Any, weight: Any, bias: Any = None) -> Any:
    """New ids on the last dimension. A table of numbers is an input like any other."""
    if isinstance(x, Weight):
        c.freeze(x)
        x = frozen_like(node.all_input_nodes[0])
    inputs = along(x, -1) if isinstance(x, Tensor) else None
    if inputs is None or not isinstance(weight, Weight):
        return NotImplemented
    outputs = c.new_outputs(weight)
    c.bind(bias, 0, outputs)
    c.bind(weight, 1, inputs)
    shape = shape_of(node)
    c.products.append(Product(node, math.prod(shape[:-1]), (weight.key(0), weight.key(1))))
    return spread(outputs, -1, shape)


@rule("embedding", of_weights=True)
def embedding(c: Channels, node: fx.Node, weight: Any, indices: Any, *_: Any, **__: Any) -> Any:
    """Rows of a table [rows, channels]."""
    if not isinstance(weight, Weight):  # a computed one
        return NotImplemented
    c.freeze(indices)
    return spread(c.new_outputs(weight, 1), -1, shape_of(node))


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(
    c: Channels, node: fx.Node, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Any:  # fmt: skip
    """Like a convolution whose weight lies [inputs, outputs per group, ...] and meets every position of the input."""
    inputs = along(x, 1) if _batched(node, x) else None
    if inputs is None or not isinstance(weight, Weight) or (groups > 1 and weight.order):
        return NotImplemented
    # the outputs of one convolution group are one unit: no dimension of the weight tells them apart
    outputs = c.new_outputs(weight, 1) if groups == 1 else c.fresh(weight.shape[1] * groups)
    c.bind(bias, 0, outputs)
    c.bind(weight, 0, inputs)
    cost = math.prod(weight.shape[2:]) * math.prod(x.shape[2:]) * x.shape[0]
    if groups == 1:
        c.products.append(Product(node, cost, (weight.key(1), weight.key(0))))
    else:
        _tie_groups(c, inputs, outputs, groups)
        c.literals.append(node)
        c.grouped[weight.name] = len(inputs) // groups
        c.products.append(Product(node, cost * weight.shape[1], (weight.key(0),)))
    return spread(outputs, 1, shape_of(node))


def _tie_groups(c: Channels, inputs: Tensor, outputs: Tensor, groups: int) -> None:
    """The inputs and outputs of each convolution group are one unit."""
    members = torch.cat([inputs.view(groups, -1), outputs.view(groups, -1)], dim=1)
    c.merge(members, members[:, :1].expand(members.shape).clone())


def tie_across(c: Channels, ids: Tensor, groups: int) -> None:
    """The channels at one place in each convolution group are one unit."""
    members = ids.view(groups, -1)
    c.merge(members, members[:1].expand(members.shape).clone())


@rule("batch_norm", "instance_norm")
def batch_norm(c: Channels, node: fx.Node, x: Any, *weights: Any, **_: Any) -> Any:
    """Normalises each channel alone: its vectors follow the channels."""
    ids = along(x, 1)
    if ids is None:
        return NotImplemented
    for weight in weights[:4]:
        c.bind(weight, 0, ids)
    if not any(isinstance(weight, (Weight, Tensor)) for weight in weights[:4]):
        c.literals.append(node)  # no tensor tells its module how many channels there are
    return x


@rule("prelu")
def prelu(c: Channels, node: fx.Node, x: Any, weight: Any) -> Any:
    """One slope for all channels, or one for each."""
    ids = along(x, 1)
    if ids is None or not isinstance(weight, Weight):
        return NotImplemented
    if weight.shape[0] == len(ids):
        c.bind(weight, 0, ids)
    return x


@rule(
    "add", "sub", "rsub", "mul", "div", "maximum", "minimum", "relu", "relu6", "hardtanh", "leaky_relu", "elu", "selu",
    "sigmoid", "hardsigmoid", "hardswish", "silu", "gelu", "mish", "softplus", "tanh", "clamp", "pow", "sqrt", "exp",
    "abs", "neg", "dropout", "feature_dropout", "clone", "contiguous", "detach", "alias", "to", "_to_copy",
    "zeros_like", "ones_like", "masked_fill", "clamp_min", "square", "sign", "round", "celu", "log_sigmoid",
    "softshrink", "hardshrink", "rrelu", "threshold", "lerp", "addcmul", "addcdiv", "rsqrt", "reciprocal", "where",
    "gt", "ge", "lt", "le", "eq", "ne", "isnan", "isinf", "isfinite", "nan_to_num", "logical_and", "logical_or",
    "logical_xor", "logical_not", "__and", "__or", "__xor", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not",
    "sin", "cos", "tan", "sinh", "cosh", "asinh", "atan", "atan2", "erf", "special_erf", "exp2", "expm1",
    "special_expm1", "special_expit", "log", "log2", "log10", "log1p", "floor", "ceil", "trunc", "frac", "clamp_max",
    "clip", "fmod", "remainder", "floor_divide", "alpha_dropout", "zero", of_weights=True,
)  # fmt: skip
def elementwise(c: Channels, node: fx.Node, *args: Any, **_: Any) -> Any:
    """Operands of one shape share their channels; one that is broadcast over the channels keeps its own, whole."""
    shape = shape_of(node)
    if not any(isinstance(a, Tensor) for a in args):
        if (weight := scaled(node, args)) is not None:
            return weight
        args = tuple(with_ids(c, node, a) for a in args)
    tensors = [a for a in args if isinstance(a, Tensor)]
    dims = {d + len(shape) - t.dim() for t in tensors for d in varying(t)}
    carriers = [t for t in tensors if _fills(t, dims, shape)]
    if not carriers:
        return NotImplemented
    c.freeze([t for t in tensors if not _fills(t, dims, shape)])
    wide = [t.expand(shape) for t in carriers]
    for other in wide[1:]:
        c.merge(wide[0], other)
    # the operand that varies names the channels (the other may be one constant id, for example the input's)
    result = max(wide, key=lambda t: len(varying(t)))
    for weight in (a for a in args if isinstance(a, Weight)):
        if not bind_broadcast(c, weight, result):
            return NotImplemented
    return NotImplemented if has_pole(c, node, args) else result


@rule("glu")
def glu(c: Channels, node: fx.Node, x: Tensor, dim: int = -1) -> Any:
    """The first half times the sigmoid of the second, as by `chunk`."""
    return elementwise(c, node, *x.chunk(2, dim))


@rule("max", "min", "median", of_weights=True)
def extremum(c: Channels, node: fx.Node, x: Any, *args: Any) -> Any:
    """Of two tensors, or of one along a dimension, with the positions. Over all entries there is no rule."""
    target: Any = node.target
    if target._overloadname == "other":
        return elementwise(c, node, x, *args)
    along_one = target._overloadname == "dim" and isinstance(x, Tensor)
    return pair(node, reduction(c, node, x, *args)) if along_one else NotImplemented


@rule("type_as")
def type_as(c: Channels, node: fx.Node, x: Any, other: Any) -> Any:
    """Only the type of `other` is read."""
    return elementwise(c, node, x)


@rule("_assert_tensor_metadata", of_weights=True)
def check(c: Channels, node: fx.Node, *_: Any, **__: Any) -> None:
    """torch.export's own, before a change of type, as in `x.float()`: it reads no channels."""


def _fills(ids: Tensor, dims: set[int], shape: tuple[int, ...]) -> bool:
    """Whether the operand has its real size along all channel dimensions `dims` of the result."""
    offset = len(shape) - ids.dim()
    return all(d >= offset and ids.size(d - offset) == shape[d] for d in dims)


def bind_broadcast(c: Channels, weight: Weight, ids: Tensor) -> bool:
    """A parameter that is added or multiplied (LayerScale, for example) follows the channels it meets."""
    offset = ids.dim() - len(weight.shape)
    for d in varying(ids):
        vector = along(ids, d)
        if vector is None:
            return False
        if d >= offset and weight.shape[d - offset] == ids.size(d):
            c.bind(weight, d - offset, vector)
    return True


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
      "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
      "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
      "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
      "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
      "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
      "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
      "max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices")  # fmt: skip
def spatial(c: Channels, node: fx.Node, x: Tensor, *_: Any, **__: Any) -> Any:
    """Mixes positions, never channels."""
    return _positions(node, x) if _batched(node, x) else NotImplemented


def _positions(node: fx.Node, x: Tensor) -> Any:
    """`x` [N, channels, ...] at other positions."""
    moved = list(range(2, x.dim()))
    if set(moved) & set(varying(x)):
        return NotImplemented
    return pair(node, resize(x, moved, shape_of(node)))  # maxima come with their places, channel by channel too


@rule("grid_sampler")
def sampled(c: Channels, node: fx.Node, x: Tensor, grid: Any, *_: Any) -> Any:
    """All channels at the places that `grid` says."""
    c.freeze(grid)
    return _positions(node, x)


@rule("affine_grid_generator", of_weights=True)
def places(c: Channels, node: fx.Node, transform: Any, *_: Any) -> Any:
    """Of the sizes it is given, the number of channels is not read."""
    c.freeze(transform)
    return frozen_like(node)


@rule("mean", "sum", "prod", "amax", "amin", "argmax", "argmin", "any", "all", "logsumexp")
def reduction(c: Channels, node: fx.Node, x: Tensor, dims: Any = None, keepdim: bool = False, **_: Any) -> Any:
    """A mean over positions keeps the channels; one over channels mixes them."""
    dims = range(x.dim()) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    dims = sorted(d % x.dim() for d in dims)
    if set(dims) & set(varying(x)):
        # what nobody reads ties nothing: the weights of attention, averaged over the heads
        return NotImplemented if node.users else frozen_like(node)
    for d in reversed(dims):
        x = x.narrow(d, 0, 1) if keepdim else x.select(d, 0)
    return x.expand(shape_of(node))


@rule("var", "std", "var_mean", "std_mean")
def deviation(c: Channels, node: fx.Node, x: Tensor, dims: Any = None, *_: Any, **__: Any) -> Any:
    """Like `reduction`; some operations return two tensors of one shape."""
    dims = None if isinstance(dims, bool) else dims  # x.var(False) has `unbiased` in this place
    return pair(node, reduction(c, node, x, dims, keepdim=len(shape_of(node)) == x.dim()))


def pair(node: fx.Node, ids: Any) -> Any:
    """Twice the `ids` of a reduction that gives two tensors."""
    return ids if isinstance(node.meta["val"], Tensor) or not isinstance(ids, Tensor) else [ids, ids]


def resize(ids: Tensor, dims: list[int], shape: tuple[int, ...]) -> Tensor:
    """The ids, of another size along `dims`, where they don't change."""
    for d in dims:
        ids = ids.narrow(d, 0, 1)
    return ids.expand(shape)
