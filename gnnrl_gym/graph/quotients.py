"""What a mask computes in a removed channel: 0/0 there is NaN, and spoils every reader in spite of its zero weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from gnnrl_gym.graph.channels import RULES, Channels, Weight, operator_name, varying

# zero in removed channels, since their weights are
_MAKERS = {
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "batch_norm",
    "instance_norm", "scaled_dot_product_attention", "matmul", "bmm", "baddbmm", "einsum", "layer_norm", "rms_norm",
    "index",
}  # fmt: skip


def has_pole(c: Channels, node: fx.Node, operands: tuple[Any, ...]) -> bool:
    """Whether an elementwise `node` has a pole where its channels are removed, as 1/x and log have one at zero. With
    an epsilon, or past a sigmoid, it has none."""
    name = operator_name(node)
    first, second = (*operands, None)[:2]
    reciprocal = name == "pow" and isinstance(second, (int, float)) and second < 0
    divisor = first if reciprocal or name in ("rsqrt", "log1p") else second if name in ("div", "pow") else None
    if not isinstance(divisor, Weight) and not (isinstance(divisor, Tensor) and varying(divisor)):
        return False
    with torch.no_grad(), torch.random.fork_rng(devices=[]):  # dropout draws
        return not bool(torch.isfinite(_when_removed(c, node)).all())


def _when_removed(c: Channels, node: fx.Node) -> Tensor:
    """The value of `node` where all channels are removed."""
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
            values[here] = _start(c, here)
    return values[node]


def _passes(node: fx.Node) -> bool:
    return node.op == "call_function" and operator_name(node) in RULES.keys() - _MAKERS


def _start(c: Channels, node: fx.Node) -> Any:
    """Zeros, or ones for a weight that is never zeroed, of the shape of what `node` gives."""
    weight = c.values[node]
    # a mask leaves buffers ("b_" for torch.export) as they are, and parameters that follow no channels
    follows = isinstance(weight, Weight) and any(weight.name == name for name, _ in c.bound)
    fill = int(isinstance(weight, Weight) and not (follows and node.name.startswith("p_")))
    return tree_map(
        lambda v: torch.full(v.shape, fill, dtype=v.dtype, device=v.device) if isinstance(v, Tensor) else v,
        node.meta["val"],
    )
