"""Channel rules of products that are no layer: `matmul`, `einsum`, attention. Of two activations, the units lie along
one batch dimension, as the heads of attention do; or along one that the product keeps, or sums over. With a parameter
it is a layer after all. Letters name dimensions: each operand has a term of them, and so has the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from gnnrl_gym.graph.channels import (
    FROZEN,
    Channels,
    Key,
    Product,
    Weight,
    along,
    constant,
    first,
    frozen_like,
    macs_of,
    operator_name,
    spread,
    varying,
)
from gnnrl_gym.graph.quotients import vanishes
from gnnrl_gym.graph.rules import bind_broadcast, rule
from gnnrl_gym.graph.trace import shape_of

_SPARE = "0123456789"  # letters that no equation has


@rule("scaled_dot_product_attention")
def attention(
    c: Channels, node: fx.Node, query: Any, key: Any, value: Any, mask: Any = None, *_: Any, **settings: Any
) -> Any:
    """Head h of the result is made of head h of all three; a mask of its own for every head belongs to it too."""
    operands = [x for x in (query, key, value, settings.get("attn_mask", mask)) if x is not None]
    result = _per_head(c, node, [x for x in operands if not isinstance(x, Weight)])
    if result is NotImplemented:
        return _of_values(c, node, *operands)
    return result if all(bind_broadcast(c, x, result) for x in operands if isinstance(x, Weight)) else NotImplemented


def _of_values(c: Channels, node: fx.Node, query: Any, key: Any, value: Any, *mask: Any) -> Any:
    """A single head: the result has the channels of the values. Those of queries and keys stay, since their number
    scales the product."""
    ids = along(value, -1) if isinstance(value, Tensor) and varying(value) else None
    if ids is None:
        return NotImplemented
    c.freeze(query, key, mask)
    everything, scores = len(ids) + query.shape[-1], query.shape[-1]
    cost = macs_of(node) // everything
    c.products.append(Product(node, cost * scores, ()))
    c.products.append(Product(node, cost, (_counter(c, node, ids),)))
    return spread(ids, -1, shape_of(node))


@rule("addmm", of_weights=True)
def addmm(c: Channels, node: fx.Node, bias: Any, x: Any, weight: Any, **_: Any) -> Any:
    """A linear layer whose weight lies [inputs, outputs]."""
    layer = len(bias.shape) == 1 and isinstance(weight, Weight)
    result = _of_two(c, node, ("mk", "kn"), "mn", (x, weight)) if layer else NotImplemented
    if isinstance(result, Tensor):
        c.bind(bias, 0, c.new_outputs(weight, 1))
    return result


@rule("matmul", "mm", "bmm", "baddbmm", of_weights=True)
def matmul(c: Channels, node: fx.Node, *operands: Any, **_: Any) -> Any:
    """A batched product, whose batch dimension is the heads; or one of two matrices."""
    result = _per_head(c, node, operands)
    if result is not NotImplemented or len(operands) != 2:
        return result
    batch = _SPARE[: len(shape_of(node)) - 2]
    terms = [batch[len(batch) + 2 - len(x.shape) :] + ends for x, ends in zip(operands, ("mk", "kn"), strict=True)]
    return _of_two(c, node, terms, f"{batch}mn", operands)


@rule("einsum")
def einsum(c: Channels, node: fx.Node, equation: str, operands: Any, **_: Any) -> Any:
    """The same, where letters say which dimensions are the batch."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    hidden = [len(x.shape) - len(term.replace("...", "")) for term, x in zip(terms, operands, strict=True)]
    spare = _SPARE[: max(hidden)]
    terms = [term.replace("...", spare[len(spare) - own :]) for term, own in zip(terms, hidden, strict=True)]
    output = output.replace("...", spare)
    if not arrow or len(terms) != 2 or any(len(set(term)) < len(term) for term in terms):  # a diagonal
        return NotImplemented
    batch = [letter for letter in output if all(letter in term for term in terms)]
    orders = [[own.index(x) for x in (*batch, *(y for y in own if y not in batch))] for own in terms]
    result = NotImplemented
    if all(len(order) <= len(batch) + 2 for order in orders) and all(isinstance(x, Tensor) for x in operands):
        moved = [x.permute(order) for x, order in zip(operands, orders, strict=True)]
        moved = [x[(..., *[None] * (len(batch) + 2 - x.dim()))] for x in moved]
        result = _per_head(c, node, moved, [output.index(x) for x in batch])
    return _of_two(c, node, terms, output, operands) if result is NotImplemented else result


def _per_head(c: Channels, node: fx.Node, operands: Sequence[Any], places: Sequence[int] | None = None) -> Any:
    """Of operands [*batch, rows, columns] whose channels lie along one batch dimension: tied inside a head. `places`:
    where the result has the batch dimensions, if not as the operands."""
    count = len(shape_of(node)) if places is None else len(places) + 2
    if not all(isinstance(x, Tensor) and x.dim() <= count for x in operands):
        return NotImplemented
    aligned = [x[(None,) * (count - x.dim())] for x in operands]
    heads = [x[..., :1, :1] for x in aligned]
    named = max(heads, key=lambda x: len(varying(x)))
    ids = along(named, varying(named)[0]) if len(varying(named)) == 1 else None
    dim = varying(named)[0] if ids is not None else 0
    if ids is None or any(head.size(dim) not in (1, len(ids)) for head in heads):  # or some heads share others
        return NotImplemented
    for whole, head in zip(aligned, heads, strict=True):
        c.merge(whole, head.expand(whole.shape))
        if head.size(dim) != len(ids):  # shared by all heads
            c.freeze(head)
        else:
            c.merge(spread(ids, dim, tuple(head.shape)), head)
    _count(c, node, ids)
    return spread(ids, dim if places is None else places[dim], shape_of(node))


def _of_two(c: Channels, node: fx.Node, terms: Sequence[str], output: str, operands: Sequence[Any]) -> Any:
    """Channels of activations along one letter: the result has them too, or is a sum over them."""
    if any(len(term) != len(x.shape) for term, x in zip(terms, operands, strict=True)):  # a vector in `matmul`
        return NotImplemented
    if weights := [x for x in operands if isinstance(x, Weight)]:
        nodes = _mixes_nodes(c, node, operands)
        result = NotImplemented if nodes else _layer(c, node, terms, output, operands)
        if result is not NotImplemented:
            return result
        c.freeze(weights)  # it may mix what is no channel, as the adjacency matrix of a graph does its nodes
        if nodes:
            c.products.append(Product(node, macs_of(node), ()))
            return frozen_like(node)
        operands = [torch.tensor(FROZEN).expand(x.shape) if isinstance(x, Weight) else x for x in operands]
    letters = {term[d] for term, x in zip(terms, operands, strict=True) for d in varying(x)}
    if len(letters) != 1:
        return NotImplemented
    (letter,) = letters
    ids, *others = [first(x, constant(x)).flatten() for x in operands if varying(x)]
    kept = letter in output and sum(letter in term for term in terms) == 1
    summed = letter not in output and len(others) == 1 and vanishes(c, *node.all_input_nodes)
    if not kept and not summed:
        return NotImplemented
    for other in others:
        c.merge(ids, other)
    c.freeze([x for x in operands if not varying(x)])
    if summed:
        _keep_two(c, node, ids)
    _count(c, node, ids)
    return spread(ids, output.index(letter), shape_of(node)) if kept else frozen_like(node)


def _mixes_nodes(c: Channels, node: fx.Node, operands: Sequence[Any]) -> bool:
    """Whether a square buffer meets the network's input, whose ids don't tell channels from nodes: what a layer takes
    there is learned, or has another shape."""
    fixed = [c.values[n] for n in node.all_input_nodes if n.name.startswith("b_")]  # torch.export's name of a buffer
    square = any(isinstance(x, Weight) and len(x.shape) == 2 and x.shape[0] == x.shape[1] for x in fixed)
    return square and not any(isinstance(x, Tensor) and varying(x) for x in operands)


def _layer(c: Channels, node: fx.Node, terms: Sequence[str], output: str, operands: Sequence[Any]) -> Any:
    """New ids along the dimension of the parameter that the activation has not."""
    at = next(i for i, x in enumerate(operands) if isinstance(x, Weight))
    own, weight, other, x = terms[at], operands[at], terms[1 - at], operands[1 - at]
    read = [letter for letter in own if letter in other and letter not in output]
    made = [letter for letter in own if letter not in other]
    if not isinstance(x, Tensor) or len(read) != 1 or len(made) != 1 or len(own) != 2:
        return NotImplemented
    inputs = along(x, other.index(read[0]))
    rows, columns = own.index(made[0]), own.index(read[0])
    if inputs is None or len(inputs) != weight.shape[columns] or sorted(output) != sorted({*other, *made} - {*read}):
        return NotImplemented
    outputs = c.new_outputs(weight, rows)
    c.bind(weight, columns, inputs)
    _keep_two(c, node, inputs)
    c.products.append(Product(node, x.numel() // len(inputs), (weight.key(rows), weight.key(columns))))
    return spread(outputs, output.index(made[0]), shape_of(node))


def _keep_two(c: Channels, node: fx.Node, ids: Tensor) -> None:
    """`einsum` sums over a single channel by a plain multiplication, which torch's counter takes for nothing: the first
    channel stays, beside the one that every group keeps."""
    if operator_name(node) == "einsum":
        c.freeze(ids[:1])


def _count(c: Channels, node: fx.Node, ids: Tensor) -> None:
    """Costs of a product that is as much as there are `ids`."""
    c.products.append(Product(node, macs_of(node) // len(ids), (_counter(c, node, ids),)))


def _counter(c: Channels, node: fx.Node, ids: Tensor) -> Key:
    """A dimension of no weight that holds `ids`, to count them."""
    count = (f"{node.name}()", 0)  # no weight has just those as a dimension
    c.bound.setdefault(count, ids)  # a second trace, of training mode, has names of its own and no costs
    return count
