"""Checks of a network and its example: a mistake is named with its mend before it is met deep inside torch."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from gnnrl_gym.copies import copy_of
from gnnrl_gym.errors import UnsupportedOperation


def check_model(model: nn.Module) -> None:
    """Check that a network can be traced, as far as its modules and parameters tell.

    Raises:
        TypeError: `model` is not an `nn.Module`.
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
    """Check that the example input is a tensor, or a tuple of positional arguments with a tensor among them.

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
    """Check that what a forward returned, `outputs`, holds a tensor.

    Raises:
        UnsupportedOperation: it holds none.
    """
    if not any(isinstance(value, Tensor) for value in tree_leaves(outputs)):
        mend = f"torch.export.register_dataclass({type(outputs).__name__})"
        raise UnsupportedOperation(
            f"The forward of {type(model).__name__} returns no tensor, but {_described(outputs)}."
            + (f" Call {mend} first." if is_dataclass(outputs) else "")
        )


def check_copies(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Slim networks are made by `copy.deepcopy`. It copies no function: a lambda or a hook that captures the network
    still leads to the network itself, also from the copy.

    Args:
        args: what the forward takes, and has just been given.

    Raises:
        UnsupportedOperation: the copy fails, or does not compute what the network does with weights of its own.
    """
    try:
        twin = copy_of(model)
    except Exception as error:  # whatever the module's attributes raise
        raise UnsupportedOperation(
            f"{type(model).__name__} can't be copied by copy.deepcopy, as a pruned network has to be: {error}. Remove "
            "locks, open files and tensors with a gradient from its attributes, or give it a __deepcopy__."
        ) from error
    other = tree_map_only(Tensor, _halved, args)  # what a network keeps of its last input is of another one now
    expected, foreign = _answer(model, other), _Reads(model)
    if isinstance(expected, Exception):  # it takes the numbers of its example alone
        return
    with foreign:
        found = _answer(twin, other)
    if (foreign.found or not _equal(found, expected)) and _equal(_answer(model, other), expected):
        how = f"fails ({found})" if isinstance(found, Exception) else "computes with what the network itself holds"
        raise UnsupportedOperation(
            f"A copy of {type(model).__name__} by copy.deepcopy, as a pruned network is, {how}. A lambda, a hook or "
            "another function that it holds captures the network: make that a method, or a module of its own."
        )


class _Reads(TorchFunctionMode):
    """Whether an operation meanwhile reads a parameter or buffer of `model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= any(id(value) in self.own for value in tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _answer(model: nn.Module, args: tuple[Any, ...]) -> Any:
    """Outputs, or what the forward raises; always with the same draws of the CPU's generator."""
    torch.default_generator.manual_seed(0)
    try:
        with torch.compiler.set_stance("force_eager"):  # no compiling for one answer
            return model(*cloned(args))
    except Exception as error:
        return error


def _halved(value: Tensor) -> Tensor:
    return value.detach() / 2 if value.is_floating_point() or value.is_complex() else value.detach()


def _equal(found: Any, expected: Any) -> bool:
    one, other = ([x for x in tree_leaves(value) if isinstance(x, Tensor)] for value in (found, expected))
    return len(one) == len(other) and all(map(_close, one, other))


def _close(x: Tensor, y: Tensor) -> bool:
    """But for rounding, which the same kernels on the same numbers hardly do. Integers may hang on it."""
    if x.shape != y.shape or not y.numel() or not (y.is_floating_point() or y.is_complex()):
        return x.shape == y.shape
    largest = y.abs().nan_to_num(0.0, posinf=0.0).amax()
    return torch.allclose(x, y, rtol=1e-2, atol=1e-2 * float(largest), equal_nan=True)


def cloned(value: Any) -> Any:
    """`value` with its tensors copied: a forward may change its input in place."""
    return tree_map_only(Tensor, lambda x: x.detach().clone(), value)


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


_FLOATING = ("FloatFunctional", "FXFloatFunctional")  # sums of quantised networks that compute with floats until then


def _check_kind(path: str, module: nn.Module) -> None:
    kind = f"{type(module).__name__} '{path}'"
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedOperation(f"{kind} is a ScriptModule: pass the nn.Module that it was made from.")
    if isinstance(module, fx.GraphModule) and "train" in vars(module):  # which torch.export lets raise
        raise UnsupportedOperation(f"{kind} is an exported program: pass the nn.Module that it was made from.")
    place, name = type(module).__module__, type(module).__name__
    if place.startswith("torch.") and ".quantized" in place and name not in _FLOATING:
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
