"""nn.Module -> ATen graph with shapes, module paths and source lines (`torch.export`)."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from gnnrl_gym.errors import UnsupportedOperation


@dataclass(frozen=True)
class Trace:
    """The traced network.

    Attributes:
        graph: the ATen graph in topological order; every node carries its tensor in ``meta["val"]``.
        tensors: placeholder name -> canonical name of the parameter or buffer it stands for. Tensors that are
            shared under several names have one canonical name.
        constants: placeholders that hold constants lifted out of the code; nothing can resize those.
    """

    graph: fx.Graph
    tensors: dict[str, str]
    constants: frozenset[str]

    def operations(self) -> Iterator[fx.Node]:
        """The nodes that compute something, in order."""
        return (node for node in self.graph.nodes if node.op == "call_function")

    def used(self) -> set[str]:
        """Names of the parameters and buffers that some operation reads."""
        places = (node for node in self.graph.nodes if node.op == "placeholder" and node.users)
        return {self.tensors[node.name] for node in places if node.name in self.tensors}


def trace(model: nn.Module, example_input: Tensor | tuple[Any, ...], training: bool = False) -> Trace:
    """Trace `model` on `example_input` (a tensor, or the tuple of positional arguments), in eval or training mode.

    Raises:
        UnsupportedOperation: `torch.export` can't follow the forward, for example because it branches on data.
    """
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    with _mode(model, training), torch.random.fork_rng(devices=[]):
        if not training:
            with torch.no_grad():
                model(*args)  # a plain mistake (a wrong input shape) shows its own error, not export's
        exported = _export(model, args)
    return Trace(exported.graph, *_inputs(model, exported))


@contextlib.contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Eval or training mode for a while; every module gets back what it had."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def _export(model: nn.Module, args: tuple[Any, ...]) -> torch.export.ExportedProgram:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(model, args, strict=False)
    except Exception as error:
        raise UnsupportedOperation(
            f"torch.export can't trace {type(model).__name__}: {str(error).strip()[:2000]}\n"
            "Usual mend: replace control flow that depends on tensor values (an `if` on a tensor, `.item()`) by "
            "torch.where, torch.cond or a module attribute."
        ) from error


def _inputs(model: nn.Module, exported: torch.export.ExportedProgram) -> tuple[dict[str, str], frozenset[str]]:
    canonical: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        names[name] = canonical.setdefault(id(tensor), name)
    tensors, constants = {}, set()
    for spec in exported.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target in names:
            tensors[spec.arg.name] = names[spec.target]
        elif spec.kind != InputKind.USER_INPUT:
            constants.add(spec.arg.name)
    return tensors, frozenset(constants)


def module_path(node: fx.Node) -> str:
    """Qualified name of the innermost module that `node` belongs to; "" is the network itself."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    # a module that is called again has "@1", "@2" behind its name
    return re.sub(r"@\d+", "", stack[-1][0]) if stack else ""


def source_line(node: fx.Node) -> str:
    """The last `file:line` of the user's code that made `node`, for messages."""
    places = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{places[-1][0]}:{places[-1][1]}" if places else "unknown line"


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of the tensor that `node` returns (the first one where it returns several)."""
    value = node.meta["val"]
    value = value[0] if isinstance(value, (tuple, list)) else value
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else ()
