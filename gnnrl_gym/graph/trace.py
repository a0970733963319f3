"""nn.Module -> ATen graph with shapes, module paths and source lines (`torch.export`)."""

from __future__ import annotations

import ast
import contextlib
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from gnnrl_gym.backends import gpus_of, without_cudnn
from gnnrl_gym.copies import mode
from gnnrl_gym.errors import UnsupportedOperation
from gnnrl_gym.graph.arguments import check_copies, check_example, check_model, check_outputs, failed_forward


@dataclass(frozen=True)
class Trace:
    """The traced network.

    Attributes:
        graph: the ATen graph in topological order; every node carries its tensor in ``meta["val"]``.
        tensors: placeholder name -> canonical name of the parameter or buffer it stands for. Tensors that are
            shared under several names have one canonical name.
        constants: the same of tensors that are neither: plain attributes, and constants lifted out of the code. Nothing
            can resize those.
    """

    graph: fx.Graph
    tensors: dict[str, str]
    constants: dict[str, str]

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
        UnsupportedOperation: the forward fails on the example, or `torch.export` can't follow it, for example because
            it branches on data.
        TypeError, ValueError: no network or example at all (`gnnrl_gym.graph.arguments`).
    """
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    if not training:
        check_model(model)
        check_example(example_input)
    gpus = gpus_of([args, *model.parameters()])
    if not training:
        with mode(model, training), torch.random.fork_rng(gpus):
            _run(model, args)  # a plain mistake (a wrong input shape) shows its own error, not export's
    with mode(model, training), torch.random.fork_rng(gpus), without_cudnn(model):
        exported = _export(model, args)
    _inline_contexts(model, exported.graph_module)
    _check_shapes(model, exported.graph)
    _name_modules(model, exported.graph)
    return Trace(exported.graph, *_inputs(model, exported))


def _run(model: nn.Module, args: tuple[Any, ...]) -> None:
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # no compiling for one answer
            outputs = model(*args)
    except Exception as error:  # whatever a forward raises
        raise failed_forward(model, args, error) from error
    check_outputs(model, outputs)
    check_copies(model, args)


def _check_shapes(model: nn.Module, graph: fx.Graph) -> None:
    for node in graph.nodes:
        for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, Tensor) and not all(isinstance(size, int) for size in value.shape):
                raise UnsupportedOperation(
                    f"{type(model).__name__} makes a tensor whose shape depends on the data: {node.target} in "
                    f"{named_module(model, node)} ({source_line(node)}). Replace the selection by a mask or "
                    "torch.where."
                )


@contextlib.contextmanager
def _as_written() -> Iterator[None]:
    """Operations as the forward names them, whatever the process has switched on: of a fused attention layer no rule
    sees the parts, and a deterministic resize or padding on a GPU is many small operations."""
    fused = torch.backends.mha.get_fastpath_enabled()
    strict, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        torch.use_deterministic_algorithms(strict, warn_only=warn)


def _export(model: nn.Module, args: tuple[Any, ...]) -> torch.export.ExportedProgram:
    try:
        # what torch.compile has made is traced as it is written: torch 2.9 can't trace it otherwise
        with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"), _as_written():
            warnings.simplefilter("ignore")
            return torch.export.export(model, args, strict=False)
    except Exception as error:
        raise UnsupportedOperation(
            f"torch.export can't trace {type(model).__name__}: {str(error).strip()[:2000]}\n"
            "Usual mend: replace control flow that depends on tensor values (an `if` on a tensor, `.item()`) by "
            "torch.where or a module attribute."
        ) from error


_CONTEXTS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")  # of torch.no_grad and torch.autocast


def _inline_contexts(model: nn.Module, module: fx.GraphModule) -> None:
    """Put what runs under a `with torch.no_grad()` back into the graph, which export keeps in one of its own. The
    pruned networks run the forward itself, so there it stays under it."""
    for node in list(module.graph.nodes):
        part = next((n for n in node.all_input_nodes if n.op == "get_attr"), None)
        inner = getattr(module, str(part.target)) if part else None
        if part is None or not isinstance(inner, fx.GraphModule):
            continue
        if str(node.target) not in _CONTEXTS:
            raise UnsupportedOperation(
                f"{type(model).__name__} calls torch's higher-order operation '{node.target}' in "
                f"{named_module(model, node)}, whose functions no rule sees into. Write both branches and choose by "
                "torch.where, or a plain loop."
            )
        _inline_contexts(model, inner)
        _inline(node, part, inner.graph)


def _inline(node: fx.Node, part: fx.Node, inner: fx.Graph) -> None:
    """Put the nodes of `inner`, which `part` stands for, into the place of the call `node`."""
    given: Any = node.args[node.args.index(part) + 1 :]
    places = [n for n in inner.nodes if n.op == "placeholder"]
    with node.graph.inserting_before(node):
        found: Any = node.graph.graph_copy(inner, dict(zip(places, given, strict=True)))
    for user in list(node.users):  # each takes one of the results
        user.replace_all_uses_with(found[user.args[1]])
        node.graph.erase_node(user)
    node.graph.erase_node(node)
    if not part.users:
        node.graph.erase_node(part)


def _name_modules(model: nn.Module, graph: fx.Graph) -> None:
    """In networks that share modules, torch.export names what it reached through a slice of a list after the slice,
    "layers.slice(1, None, None).0": such names become real ones, "layers.1"."""
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack", {})
        for key, (path, kind) in stack.items():
            if "slice(" in path:
                stack[key] = (_without_slices(model, path), kind)


def _without_slices(model: nn.Module, path: str) -> str:
    names: list[str] = []
    sliced: list[str] | None = None  # names of what a slice of the last module holds
    for part in path.split("."):
        here = model.get_submodule(re.sub(r"@\d+", "", ".".join(names)))
        if part.startswith("slice("):
            sliced = (sliced or list(here._modules))[slice(*ast.literal_eval(part.removeprefix("slice")))]
            continue
        # a slice of a ModuleList counts from 0 again, one of a Sequential keeps its names
        names.append(sliced[int(part)] if sliced and isinstance(here, nn.ModuleList) else part)
        sliced = None
    return ".".join(names)


def _inputs(model: nn.Module, exported: torch.export.ExportedProgram) -> tuple[dict[str, str], dict[str, str]]:
    canonical: dict[int, str] = {}
    names: dict[str, str] = {}
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)  # a module under two names has its buffers twice, too
    for name, tensor in [*parameters, *buffers]:
        names[name] = canonical.setdefault(id(tensor), name)
    tensors: dict[str, str] = {}
    constants: dict[str, str] = {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target in names:
            tensors[spec.arg.name] = names[spec.target]
        elif spec.kind != InputKind.USER_INPUT:
            constants[spec.arg.name] = str(spec.target)
    return tensors, constants


def module_path(node: fx.Node) -> str:
    """Qualified name of the innermost module that `node` belongs to; "" is the network itself."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    # a module that is called again has "@1", "@2" behind its name
    return re.sub(r"@\d+", "", stack[-1][0]) if stack else ""


def named_module(model: nn.Module, node: fx.Node) -> str:
    """The innermost module that `node` belongs to, for messages: its quoted name; the network itself by its class."""
    path = module_path(node)
    return f"'{path}'" if path else type(model).__name__


def source_line(node: fx.Node) -> str:
    """The last `file:line` of the user's code that made `node`, for messages."""
    places = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{places[-1][0]}:{places[-1][1]}" if places else "unknown line"


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of the tensor that `node` returns (the first one where it returns several)."""
    value = node.meta["val"]
    value = value[0] if isinstance(value, (tuple, list)) else value
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else ()
