"""What a mask computes in a removed channel: 0/0 there is NaN, and spoils every reader in spite of its zero weights;
zero adds nothing to a sum over channels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from gnnrl_gym.backends import gpus_of
from gnnrl_gym.graph.channels import RULES, Channels, Weight, operator_name, varying

# zero in removed channels, since their weights are
_MAKERS = {
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "addmm",
    "batch_norm", "instance_norm", "scaled_dot_product_attention", "matmul", "mm", "bmm", "baddbmm", "einsum",
    "layer_norm", "rms_norm", "index", "embedding",
}  # fmt: skip


# operations with a pole where this operand is zero
_POLES = {
    "rsqrt": 0, "reciprocal": 0, "log": 0, "log2": 0, "log10": 0, "log1p": 0, "div": 1, "pow": 1, "fmod": 1,
    "remainder": 1, "floor_divide": 1, "addcdiv": 2,
}  # fmt: skip


def has_pole(c: Channels, node: fx.Node, operands: tuple[Any, ...]) -> bool:
    """Whether an elementwise `node` has a pole where its channels are removed, as 1/x and log have one at zero. With
    an epsilon, or past a sigmoid, there is no pole."""
    name = operator_name(node)
    if name not in _POLES:
        return False
    divisor = operands[_POLES[name]]
    if name == "pow" and isinstance(divisor, (int, float)) and divisor < 0:
        divisor = operands[0]
    if not isinstance(divisor, Weight) and not (isinstance(divisor, Tensor) and varying(divisor)):
        return False
    with torch.no_grad(), _draws_undone(node):
        return not bool(torch.isfinite(_when_removed(c, node, _start)).all())


def vanishes(c: Channels, *nodes: fx.Node) -> bool:
    """Whether the product of some `nodes` is zero where their channels are removed, whatever else they hold."""
    with torch.no_grad(), _draws_undone(*nodes):
        values = [_when_removed(c, node, _surely) for node in nodes]
    return all(bool(torch.isfinite(x).all()) for x in values) and not all(bool(x.any()) for x in values)


def _draws_undone(*nodes: fx.Node) -> AbstractContextManager[None]:
    """Dropout draws."""
    return torch.random.fork_rng(gpus_of(node.meta["val"] for node in nodes))


def _when_removed(c: Channels, node: fx.Node, start: Callable[[Channels, fx.Node], Any]) -> Tensor:
    """The value of `node` where all channels are removed. `start`: what the nodes give that it is computed from."""
    needed, ahead = set(), [node]
    while ahead:
        if (here := ahead.pop()) not in needed:
            needed.add(here)
            ahead += here.all_input_nodes if _passes(here) else []
    values: dict[fx.Node, Any] = {}
    for here in (n for n in node.graph.nodes if n in needed):
        if _passes(here):
            target: Any = here.target
            args, kwargs = fx.map_arg((here.args, here.kwargs), lambda n: values[n])
            values[here] = target(*args, **kwargs)
        else:
            values[here] = start(c, here)
    return values[node]


def _passes(node: fx.Node) -> bool:
    return node.op == "call_function" and operator_name(node) in RULES.keys() - _MAKERS


def _start(c: Channels, node: fx.Node) -> Any:
    """Zeros, or ones for a weight that is never zeroed, of the shape of what `node` gives."""
    return _filled(node, torch.ones if isinstance(c.values[node], Weight) and not _zeroed(c, node) else torch.zeros)


def _surely(c: Channels, node: fx.Node) -> Any:
    """Zeros where a mask has nothing else in a removed channel: for its parameters, and what layers make by them."""
    weights = [n for n in node.all_input_nodes if isinstance(c.values[n], Weight)]
    if operator_name(node) in ("batch_norm", "instance_norm"):  # whose statistics don't matter then
        weights = [n for n in weights if n in node.args[1:3]]
    ids = c.values[node]
    made = isinstance(ids, Tensor) and varying(ids) and weights and all(_zeroed(c, n) for n in weights)
    return _filled(node, torch.zeros if made or _zeroed(c, node) else torch.rand)


def _zeroed(c: Channels, node: fx.Node) -> bool:
    """Whether a mask zeroes a parameter: it leaves buffers ("b_" for torch.export) as they are, and parameters that
    follow no channels."""
    weight = c.values[node]
    follows = isinstance(weight, Weight) and any(weight.name == name for name, _ in c.bound)
    return follows and node.name.startswith("p_")


def _filled(node: fx.Node, make: Callable[..., Tensor]) -> Any:
    def filled(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        made = make(value.shape) if make is not torch.rand or value.is_floating_point() else torch.zeros(value.shape)
        return made.to(value.device, value.dtype)

    return tree_map(filled, node.meta["val"])
