"""Channel rules of attention: a unit is a whole head, since the scale and the softmax belong to all of its channels.

A projection's channels [heads * head size] become a dimension of heads by a view, and heads are what the batched
products of queries, keys and values (`gnnrl_gym.graph.products`) keep apart. `feeds_attention` tells such a view from
a channel shuffle's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from gnnrl_gym.graph.channels import Channels, Weight, frozen_like, operator_name, varying
from gnnrl_gym.graph.parameters import TURNS
from gnnrl_gym.graph.rules import reduction, rule
from gnnrl_gym.graph.trace import shape_of


@rule("softmax", "_softmax", "log_softmax")
def softmax(c: Channels, node: fx.Node, x: Any, dim: int, *_: Any, **__: Any) -> Any:
    """Over positions it leaves the channels alone; over channels it mixes them."""
    return NotImplemented if not isinstance(x, Tensor) or dim % x.dim() in varying(x) else x


@rule("layer_norm", "rms_norm")
def norm_inside_heads(c: Channels, node: fx.Node, x: Any, sizes: Any, *weights: Any, **_: Any) -> Any:
    """Over what is the same channel, as inside a head, it leaves the channels alone; else it mixes them."""
    if not isinstance(x, Tensor) or set(varying(x)) & set(range(x.dim() - len(sizes), x.dim())):
        return NotImplemented
    c.freeze([weight for weight in weights if isinstance(weight, (Weight, Tensor))])
    return x


@rule("linalg_vector_norm")
def length(c: Channels, node: fx.Node, x: Any, order: Any = 2, dims: Any = None, keepdim: bool = False) -> Any:
    """Like `norm_inside_heads`: inside a head it leaves the channels alone, else it mixes them."""
    return reduction(c, node, x, dims, keepdim) if isinstance(x, Tensor) else NotImplemented


# ---- which views are of heads --------------------------------------------------------------------------------------

_PRODUCTS = {"scaled_dot_product_attention", "matmul", "bmm", "baddbmm", "einsum"}
_VIEWS = {"view", "reshape", "_unsafe_view", "unflatten"}
_MOVES = TURNS | {
    "select", "getitem", "unbind", "chunk", "contiguous", "clone", "unsqueeze", "squeeze", "expand", "expand_as",
    "slice", "cat", "neg", "mul", "div", "add", "sub", "linalg_vector_norm", "clamp_min", "layer_norm", "rms_norm",
    "to", "_to_copy", "alias", "dropout", "stack", "flatten", "softmax", "repeat", "repeat_interleave", "relu", "elu",
    "pad", "split", "split_with_sizes",
}  # fmt: skip


def feeds_attention(node: fx.Node, past_views: bool) -> bool:
    """Whether what `node` gives is moved, and no more, into a batched product; `past_views`: also viewed anew. A view
    that leaves the last two dimensions as they are moves heads (those that queries share, once repeated)."""
    ahead, seen = list(node.users), {node}
    while ahead:
        user = ahead.pop()
        if operator_name(user) in _PRODUCTS:
            return True
        name = operator_name(user)
        if user not in seen and (name in _MOVES or (name in _VIEWS and (past_views or _moves_heads(user)))):
            ahead += user.users
        seen.add(user)
    return False


def _moves_heads(view: fx.Node) -> bool:
    return shape_of(view)[-2:] == shape_of(view.all_input_nodes[0])[-2:]


def view_of_heads(c: Channels, node: fx.Node, result: Tensor) -> Tensor:
    """The ids of a view on the way into a product of heads. The last such view makes [..., heads, head size] or
    [..., heads, head size, positions]: the ids of a head are tied, and shown as one."""
    last = varying(result)[-1]
    if feeds_attention(node, past_views=False):
        first = result.narrow(last, 0, 1).expand(result.shape)
        c.merge(result, first.clone())
        return first
    return result


def view_of_constants(c: Channels, node: fx.Node, x: Weight) -> Any:
    """A buffer of integers holds no channels."""
    if node.meta["val"].is_floating_point():
        return NotImplemented
    c.freeze(x)
    return frozen_like(node)
