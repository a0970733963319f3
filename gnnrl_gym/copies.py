"""Copies of modules, whatever they keep of their last forward."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
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
    held = (x for module in model.modules() for value in vars(module).values() for x in _leaves(value))
    return {id(x): x.detach().clone() for x in held if isinstance(x, Tensor) and not x.is_leaf}


def _leaves(value: Any) -> list[Any]:
    """`tree_leaves`, soon done with what nearly all attributes of modules are: numbers, names, empty dictionaries."""
    plain = value is None or isinstance(value, (int, float, str)) or (isinstance(value, dict) and not value)
    return [] if plain else tree_leaves(value)


@contextlib.contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Eval or training mode for a while; every module gets back what it had. Before and after, modules that keep what
    they compute of their parameters drop it (LeViT's biases, for one, in their `train`)."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        model.train(training)
        for module, own in before:
            module.training = own


def refreshed(model: Module) -> Module:
    """`model` itself, whose modules have dropped what they computed of the weights they had before."""
    with mode(model, model.training):
        return model
