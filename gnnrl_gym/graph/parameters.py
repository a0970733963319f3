"""Parameters and buffers that a forward reshapes or computes with: ``gamma.view(1, -1, 1, 1)``, or the scale of a
BatchNorm that is written by hand. One whose entries lie along one dimension has ids then, as if a layer wrote them; the
operations that follow treat them like those of activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from gnnrl_gym.graph.channels import FROZEN, Channels, Weight, first, operator_name, spread, varying
from gnnrl_gym.graph.groups import connected
from gnnrl_gym.graph.trace import shape_of


def with_ids(c: Channels, node: fx.Node, x: Any) -> Any:
    """The ids of `x`, if that is a parameter or buffer whose entries lie along one dimension; else `x`."""
    if not isinstance(x, Weight) or not node.meta["val"].is_floating_point():  # integers are indices
        return x
    long = [d for d, size in enumerate(x.shape) if size > 1]
    if len(long) != 1:
        return x
    known = x.key(long[0]) in c.bound
    ids = c.new_outputs(x, long[0])
    if not known:
        c.lifted[x.name] = ids
    return spread(ids, long[0], x.shape)


_ONES = {"unsqueeze", "squeeze"}
TURNS = _ONES | {"transpose", "permute", "t", "numpy_T", "mT", "swapaxes", "swapdims", "movedim", "moveaxis"}
_KEEP_ZEROS = {"mul", "div", "neg", "to", "_to_copy", "clone", "contiguous", "detach", "alias"}


def turned(node: fx.Node, x: Weight, *args: Any, **kwargs: Any) -> Any:
    """`x` with its dimensions in the order that `node` brings them into, or with more or fewer of size 1: those, which
    no channels lie along, are no dimension (-1) of the parameter then."""
    if operator_name(node) in _ONES:
        if len(shape_of(node)) < len(x.shape) and not args:  # what is pruned down to one entry would go, too
            return NotImplemented
        long = iter([d for d, size in enumerate(x.shape) if size > 1])
        shape = shape_of(node)
        return Weight(x.name, shape, tuple(x.key(next(long))[1] if size > 1 else -1 for size in shape))
    target: Any = node.target
    order = [size - 1 for size in target(torch.empty(tuple(range(1, len(x.shape) + 1))), *args, **kwargs).shape]
    return Weight(x.name, tuple(x.shape[d] for d in order), tuple(x.key(d)[1] for d in order))


def scaled(node: fx.Node, operands: tuple[Any, ...]) -> Weight | None:
    """The parameter among `operands` that a layer may take after `node` as before: its entries are cast, or multiplied
    by one number, and what a mask zeroes stays zero."""
    weights, name = [x for x in operands if isinstance(x, Weight) and x.shape], operator_name(node)
    if len(weights) != 1 or name not in _KEEP_ZEROS or (name == "div" and operands[0] is not weights[0]):
        return None
    (x,) = weights
    return x if sum(size > 1 for size in x.shape) > 1 and x.shape == shape_of(node) else None


def names_of(c: Channels, ids: Tensor) -> list[str]:
    """Names of the parameters that all of `ids` were made for; empty if some of the ids were made by a layer."""
    some = first(ids, [d for d in range(ids.dim()) if d not in varying(ids)])
    owners = {name: torch.isin(some, own) for name, own in c.lifted.items()}
    whose = {name: found for name, found in owners.items() if found.any()}
    return list(whose) if whose and bool(torch.stack([*whose.values()]).any(0).all()) else []


def settle(c: Channels) -> list[str]:
    """Freeze what no layer writes or reads: it would make groups of parameters alone.

    Returns:
        Places that made something of parameters or constants without a rule which is one with channels, and so freezes
        them.
    """
    alone = _alone(c)
    for ids in c.lifted.values():
        c.freeze(ids[alone[ids]])
    taken = [(name, ids) for (name, _), ids in c.bound.items() if name in c.spent]
    # a parameter that was taken without a rule is left whole, and so are the channels that it has as well
    found = {c.spent[name]: None for name, ids in taken if ids.unique().numel() > 1 and not alone[ids].all()}
    made = torch.tensor(sorted(c.made))
    for pair in c.merges if len(made) else ():
        for one, other in (pair, pair[::-1]):
            at = torch.isin(one, made)
            if other[at][~alone[other[at]]].unique().numel() > 1:
                found |= dict.fromkeys(c.made[int(id_)] for id_ in one[at].unique())
    return list(found)


def _alone(c: Channels) -> Tensor:
    """For every id whether only parameters have it, bool [count]."""
    alone = torch.zeros(c.count, dtype=torch.bool)
    if not c.lifted:
        return alone
    alone[torch.cat([*c.lifted.values(), torch.tensor([*c.made], dtype=torch.int64)])] = True
    read = [c.bound[key] for product in c.products for key in product.factors]
    alone[torch.cat([*read, torch.tensor([FROZEN])])] = False
    apart = [(a > FROZEN) & (b > FROZEN) for a, b in c.merges]  # all that stays is one class, and says nothing
    pairs = [(a[both].numpy(), b[both].numpy()) for (a, b), both in zip(c.merges, apart, strict=True)]
    label = torch.from_numpy(connected(pairs, c.count))
    return ~torch.isin(label, label[~alone])
