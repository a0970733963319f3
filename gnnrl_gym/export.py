"""Pruned networks as files: weights and plan for the dense class, a `torch.export` program, ONNX."""

from __future__ import annotations

import inspect
import io
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from gnnrl_gym.backends import gpus_of, without_cudnn
from gnnrl_gym.copies import copy_of, mode
from gnnrl_gym.errors import MissingExtra, UnsupportedOperation
from gnnrl_gym.files import write_atomic
from gnnrl_gym.graph.arguments import cloned
from gnnrl_gym.graph.groups import Kept
from gnnrl_gym.pruning.draws import seeded
from gnnrl_gym.pruning.granularity import CHANNELS
from gnnrl_gym.pruning.masks import widths_of
from gnnrl_gym.pruning.network import Plans, PrunableNetwork
from gnnrl_gym.pruning.sparsity import make_network
from gnnrl_gym.zoo.state_dicts import load_into, why_unreadable

Example = Tensor | tuple[Any, ...]

CHECKED_BATCH = 3  # another one than a program is traced with
TOLERANCE = 1e-4  # of the largest output: rounding of another order of summation
SAME_ANSWERS = 0.5  # of outputs that are integers or truth values


# ---- weights and plan: rebuilt from the dense class ----------------------------------------------------------------


def save_slim(path: str | os.PathLike[str], network: PrunableNetwork, widths: Plans, module: nn.Module) -> None:
    """Write the pruned `module` of a plan so that `load_slim` can rebuild it from the dense class.

    The file holds tensors and a string, and is read with ``weights_only=True``: ``kept`` (bool [U], the units that
    stay), ``widths`` (int64 [A]), ``granularity``, ``state_dict`` (on the CPU), ``finetuning`` (how it was). It is
    written at once or not at all.

    Args:
        network: the dense network that the plan refers to.
        widths: the plan [A].
        module: ``network.slim(widths)``, recalibrated or fine-tuned since, as may be.

    Raises:
        ValueError: `module` is not the pruned network of `widths`.
    """
    save_kept(path, network, network.kept(widths), module)


def save_kept(path: str | os.PathLike[str], network: PrunableNetwork, kept: Kept, module: nn.Module) -> None:
    """As `save_slim`, of any units that are `kept`, bool [U]: also those of a mask that no plan gives."""
    load_into(network.slimmer.slim(kept), module.state_dict(), "the module")  # names and shapes are those of the plan
    content = {
        "kept": torch.from_numpy(kept),
        "widths": torch.from_numpy(widths_of(kept, network.widths)),
        "granularity": getattr(network, "granularity", CHANNELS),
        "state_dict": state_on_cpu(module),
    }
    write_atomic(Path(path), lambda file: torch.save(content, file))


def load_slim(path: str | os.PathLike[str], dense_model: nn.Module, example_input: Example) -> nn.Module:
    """The pruned network that `save_slim` wrote, in eval mode, on the device of `dense_model`.

    Args:
        dense_model: the dense network, with any weights: its structure counts. It is not changed.
        example_input: as for `PrunableNetwork`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or of another network.
    """
    saved = read_slim(path)
    network = make_network(dense_model, example_input, saved["granularity"])
    return rebuild_slim(network, saved, repr(os.fspath(path)))


def read_slim(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file of `save_slim` holds, its form checked, without running code that it may hold. Files that hold
    ``kept`` and ``state_dict`` alone are those of channels.

    Raises:
        FileNotFoundError, ValueError: as `load_slim`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No pruned network at {os.fspath(path)!r}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the bytes are, an unpickler may raise anything on them
        raise _damaged(path, why_unreadable(error)) from error
    if not isinstance(content, dict):
        raise _damaged(path, f"it holds a {type(content).__name__}")
    if missing := [key for key in ("kept", "state_dict") if key not in content]:
        raise _damaged(path, f"it has no {missing[0]!r}")
    content = {"granularity": CHANNELS, "widths": None, "finetuning": []} | content
    _check_form(path, content)
    return content


def rebuild_slim(network: PrunableNetwork, saved: dict[str, Any], source: str = "the file") -> nn.Module:
    """The pruned network that `saved` (from `read_slim`) describes, in eval mode; `source` names it in messages.

    Raises:
        ValueError: `saved` is of another network than `network`.
    """
    kept = saved["kept"].numpy()
    if len(kept) != int(network.widths.sum()):
        raise ValueError(
            f"The plan in {source} is of another network: it has {len(kept)} units, {type(network.model).__name__} "
            f"has {int(network.widths.sum())}."
        )
    widths = widths_of(kept, network.widths)
    network.params(widths)  # raises on an empty layer
    if saved["widths"] is not None and saved["widths"].tolist() != widths.tolist():
        raise ValueError(f"The widths in {source} are not those of its plan: another network, or a damaged file.")
    slim = network.slimmer.slim(kept)
    load_into(slim, saved["state_dict"], source)
    return slim.eval()


def update_slim(path: str | os.PathLike[str], module: nn.Module, finetuning: Sequence[Mapping[str, Any]] = ()) -> None:
    """Replace the weights in a file of `save_slim` by those of the same pruned network, `finetuning` says how since.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or `module` is another network.
    """
    saved, state = read_slim(path), state_on_cpu(module)
    if {k: v.shape for k, v in saved["state_dict"].items()} != {k: v.shape for k, v in state.items()}:
        raise ValueError(f"The weights are of another network than those in {os.fspath(path)!r}.")
    changes = {"state_dict": state, "finetuning": list(map(dict, finetuning))}
    content = {key: value for key, value in saved.items() if value is not None} | changes
    write_atomic(Path(path), lambda file: torch.save(content, file))


def state_on_cpu(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of its state. What else a module may keep there (`get_extra_state`) is the dense module's to say."""
    return {key: value.detach().cpu() for key, value in module.state_dict().items() if isinstance(value, Tensor)}


def _check_form(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    kept, widths, state = content["kept"], content["widths"], content["state_dict"]
    if not isinstance(kept, Tensor) or kept.dtype != torch.bool or kept.dim() != 1:
        raise _damaged(path, "'kept' is no bool tensor [U]")
    if widths is not None and not (isinstance(widths, Tensor) and widths.dtype == torch.int64 and widths.dim() == 1):
        raise _damaged(path, "'widths' is no int64 tensor [A]")
    if not isinstance(content["granularity"], str):
        raise _damaged(path, "'granularity' is no string")
    if not (isinstance(how := content["finetuning"], list) and all(isinstance(each, dict) for each in how)):
        raise _damaged(path, "'finetuning' is no list of dictionaries")
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise _damaged(path, "'state_dict' is no state dict")


def _damaged(path: str | os.PathLike[str], reason: str) -> ValueError:
    return ValueError(f"{os.fspath(path)!r} is not a pruned network that save_slim wrote, or it is damaged: {reason}.")


# ---- programs: run without the class -------------------------------------------------------------------------------


def export_program(module: nn.Module, example_input: Example, path: str | os.PathLike[str]) -> None:
    """Write `module` in eval mode as a `torch.export` program (``torch.export.load(path).module()``) for any batch.

    Before it is put at `path`, it is reloaded and compared with `module` on random inputs of another batch size.

    Args:
        example_input: a tensor or a tuple of positional arguments; the first dimension of every tensor is the batch.

    Raises:
        UnsupportedOperation: `torch.export` can't trace it for any batch size or can't write what it returns, or the
            program computes something else.
    """
    exported, buffer = _exported(module, _arguments(example_input)), io.BytesIO()
    try:
        torch.export.save(exported, buffer)
        buffer.seek(0)
        program = torch.export.load(buffer).module()
    except Exception as error:  # of a kind of its own for whatever it has no form for
        raise UnsupportedOperation(
            f"torch.export can't write {type(module).__name__}, usually for the type of what goes in or out (tensors, "
            f"tuples, lists and dictionaries can be written): {str(error).strip()[:2000]}"
        ) from error
    _check_same(module, program, _arguments(example_input, CHECKED_BATCH))
    write_atomic(Path(path), lambda file: file.write(buffer.getbuffer()))


def export_onnx(module: nn.Module, example_input: Example, path: str | os.PathLike[str]) -> bool:
    """Write `module` in eval mode as ONNX (below 2 GB) for any batch, by PyTorch's own exporter.

    Where onnxruntime is installed, the model runs in it and is compared with `module`, on random inputs of another
    batch size, before it is put at `path`.

    Args:
        example_input: as for `export_program`.

    Returns:
        Whether it was checked so; what draws random numbers never is.

    Raises:
        MissingExtra: onnx or onnxscript is missing.
        UnsupportedOperation: as `export_program`, or the exporter or onnxruntime can't take it.
    """
    if missing := [package for package in ("onnx", "onnxscript") if find_spec(package) is None]:
        raise MissingExtra(f"ONNX export needs {' and '.join(missing)}: pip install gnnrl_gym[onnx]")
    module = copy_of(module).cpu()  # ONNX knows no devices, and a GPU rounds otherwise
    example_input = tree_map_only(Tensor, Tensor.cpu, example_input)
    args = _arguments(example_input)
    exported = _exported(module, args)
    checked = find_spec("onnxruntime") is not None and not _draws(module, args)  # which draws in its own way
    try:
        # the shapes again: the exporter names the batch dimension by them
        program = torch.onnx.export(exported, dynamo=True, dynamic_shapes=_any_batch(module, args), verbose=False)
        assert program is not None
        content = program.model_proto.SerializeToString()
        runner = _onnx_runner(content) if checked else None
    except Exception as error:  # of kinds that the exporter and the runtime define, or Protobuf
        raise UnsupportedOperation(
            f"{type(module).__name__} can't be written as ONNX, or not run in onnxruntime: {str(error).strip()[:2000]}"
        ) from error
    if runner is not None:
        _check_same(module, runner, _arguments(example_input, CHECKED_BATCH))
    write_atomic(Path(path), lambda file: file.write(content))
    return checked


def _onnx_runner(content: bytes) -> Callable[..., Any]:
    import onnxruntime  # optional

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*args: Any) -> Any:
        tensors = [value.numpy() for value in tree_leaves(args) if isinstance(value, Tensor)]
        return [torch.from_numpy(found) for found in session.run(None, dict(zip(names, tensors, strict=True)))]

    return run


def _exported(module: nn.Module, args: tuple[Any, ...]) -> torch.export.ExportedProgram:
    try:
        # as in `gnnrl_gym.graph.trace`
        with mode(module, False), torch.compiler.set_stance("force_eager"), without_cudnn(module):
            return torch.export.export(module, args, dynamic_shapes=_any_batch(module, args), strict=False)
    except Exception as error:
        why = str(error).strip()[:2000]
        mend = " Where the forward takes the batch for a number, write x.shape[0] for len(x) and int(...)."
        raise UnsupportedOperation(
            f"torch.export can't trace {type(module).__name__} for any batch size: {why}"
            f"{mend if 'specialized' in why else ''}"
        ) from error


def _any_batch(module: nn.Module, args: tuple[Any, ...]) -> Any:
    """The dimensions that are the batch, nested as the forward takes its arguments: those of `*args` are one tuple."""
    batch = torch.export.Dim("batch", min=1)
    shapes = tree_map(lambda value: {0: batch} if isinstance(value, Tensor) and value.dim() else None, args)
    return tuple(inspect.signature(module.forward).bind(*shapes).arguments.values())


def _arguments(example_input: Example, batch: int = 2) -> tuple[Any, ...]:
    """The example with `batch` samples, floats replaced by seeded noise: zeros would look alike anywhere. (A batch of
    one can't be exported as any: torch.export takes sizes of one for constants.)"""
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    return tuple(tree_map_only(Tensor, partial(_samples, batch=batch), args))


def _samples(value: Tensor, batch: int) -> Tensor:
    if not value.dim():
        return value
    shape = (batch, *value.shape[1:])
    if not value.is_floating_point():
        return value[:1].expand(shape).contiguous()
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(value)


def _check_same(module: nn.Module, program: Callable[..., Any], args: tuple[Any, ...]) -> None:
    with mode(module, False):
        expected = _answer(module, args)
    if not _alike(_answer(program, args), expected):
        raise UnsupportedOperation(f"The exported {type(module).__name__} computes something else: it was not written.")


def _draws(module: nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether it gives something else each time, in eval mode."""
    with mode(module, False):
        return not _alike(*(_answer(module, args, seed) for seed in (0, 1)))


@torch.no_grad()
def _answer(module: Callable[..., Any], args: tuple[Any, ...], seed: int = 0) -> list[Tensor]:
    """The tensors that it returns, whatever it draws by this seed."""
    with seeded(gpus_of(args), seed):
        return [value for value in tree_leaves(module(*cloned(args))) if isinstance(value, Tensor)]


def _alike(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(_close, found, expected))


def _close(found: Tensor, expected: Tensor) -> bool:
    found = found.to(expected)
    if found.shape != expected.shape or not expected.numel():
        return found.shape == expected.shape
    if not (expected.is_floating_point() or expected.is_complex()):  # rounding decides where an argmax all but ties
        return bool((found == expected).double().mean() >= SAME_ANSWERS)
    tolerance = max(TOLERANCE, 10 * torch.finfo(expected.dtype).eps)  # half precision rounds more
    largest = expected[expected.isfinite()].abs().amax().item() if expected.isfinite().any() else 0.0
    return bool(torch.isclose(found, expected, 0, tolerance * largest).all())  # infinities are equal: masked logits
