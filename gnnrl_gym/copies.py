"""Copies of modules, whatever they keep of their last forward."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Module = TypeVar("Module", bound=nn.Module)


def copy_of(model: Module) -> Module:
    """A deep copy. What `model` keeps of a forward with gradients is copied without them."""
    return copy.deepcopy(model, activations(model))


def activations(model: nn.Module) -> dict[int, Any]:
    """What modules keep of their last forward with gradients, or compute for the next, as deepcopy's memo: it refuses
    tensors of a graph, so here they are copied without theirs."""
    held = (value for module in model.modules() for value in tree_leaves(list(vars(module).values())))
    return {id(x): x.detach().clone() for x in held if isinstance(x, Tensor) and not x.is_leaf}
