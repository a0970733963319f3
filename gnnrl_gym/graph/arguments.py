"""Checks of a network and its example: a mistake is named with its mend before it is met deep inside torch."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils._pytree import tree_leaves

from gnnrl_gym.errors import UnsupportedOperation


def check_model(model: nn.Module) -> None:
    """
    Raises:
        TypeError: `model` is no `nn.Module`.
        ValueError: a parameter is not finite, or holds no data.
        UnsupportedOperation: a kind of module that can't be traced.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"The network must be an nn.Module, got {_described(model)}.")
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        raise UnsupportedOperation(f"{type(model).__name__} only spreads a network over devices: pass its .module.")
    for path, module in model.named_modules():
        _check_kind(path, module)
    for name, parameter in model.named_parameters():
        _check_parameter(name, parameter)


def check_example(example_input: Any) -> None:
    """
    Raises:
        TypeError: it is neither a tensor nor a tuple.
        ValueError: it holds no tensor, or an empty one.
    """
    if not isinstance(example_input, (Tensor, tuple)):
        raise TypeError(
            "The example input must be a tensor, or a tuple of the forward's positional arguments, got "
            f"{_described(example_input)}."
        )
    tensors = [value for value in tree_leaves(example_input) if isinstance(value, Tensor)]
    if not tensors:
        raise ValueError("The example input holds no tensor: give a tensor, or a tuple of positional arguments.")
    if empty := [value for value in tensors if not value.numel()]:
        raise ValueError(f"The example input of shape {list(empty[0].shape)} is empty: give at least one sample.")


def check_outputs(model: nn.Module, outputs: Any) -> None:
    """
    Raises:
        UnsupportedOperation: the network returns no tensor.
    """
    if not any(isinstance(value, Tensor) for value in tree_leaves(outputs)):
        raise UnsupportedOperation(
            f"The forward of {type(model).__name__} returns no tensor, but {_described(outputs)}."
        )


def check_copies(model: nn.Module) -> None:
    """Slim networks are made by `copy.deepcopy`; here without its tensors, so that it costs nothing.

    Raises:
        UnsupportedOperation: it fails.
    """
    tensors = [*model.parameters(), *model.buffers()]
    try:
        copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    except Exception as error:  # whatever the module's attributes raise
        raise UnsupportedOperation(
            f"{type(model).__name__} can't be copied by copy.deepcopy, as a pruned network has to be: {error}. Remove "
            "locks, open files and tensors with a gradient from its attributes, or give it a __deepcopy__."
        ) from error


def failed_forward(model: nn.Module, args: tuple[Any, ...], error: Exception) -> UnsupportedOperation:
    """The error of a forward that fails on its example, with what was given beside what the network holds."""
    given = ", ".join(_described(value) for value in args)
    parameter = next(model.parameters(), None)
    held = "no parameters" if parameter is None else f"parameters {parameter.dtype} on {parameter.device}"
    return UnsupportedOperation(
        f"{type(model).__name__} ({held}) fails on its example input ({given}): {type(error).__name__}: "
        f"{str(error).strip()[:1000]}"
    )


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def _check_kind(path: str, module: nn.Module) -> None:
    kind = f"{type(module).__name__} '{path}'"
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedOperation(f"{kind} is a ScriptModule: pass the nn.Module that it was made from.")
    if ".quantized" in type(module).__module__ and type(module).__module__.startswith("torch."):
        raise UnsupportedOperation(
            f"{kind} is quantised: prune the floating-point network, and quantise it afterwards."
        )
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        raise UnsupportedOperation(f"{kind} has no weights yet: run the network once on an example first.")


def _check_parameter(name: str, parameter: nn.Parameter) -> None:
    if parameter.is_meta:
        raise ValueError(f"The parameter '{name}' is on the meta device and holds no data: load weights first.")
    if parameter.is_inference():
        raise UnsupportedOperation(
            f"The parameter '{name}' was made inside torch.inference_mode: build the network outside of it."
        )
    comparable = (parameter.is_floating_point() and parameter.element_size() > 1) or parameter.is_complex()
    if comparable and not bool(torch.isfinite(parameter.detach()).all()):
        raise ValueError(f"The parameter '{name}' holds NaN or infinity: load finite weights.")
