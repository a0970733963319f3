"""Whether a slim network computes what the masked one does, seen on noise: weights or an example of zeros, say, would
hide a channel in the wrong place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from gnnrl_gym.backends import full_precision, gpus_of
from gnnrl_gym.copies import activations, copy_of
from gnnrl_gym.graph.arguments import cloned
from gnnrl_gym.pruning.draws import Still, seeded
from gnnrl_gym.pruning.slimming import Slimmer

Inputs = tuple[Any, ...]
CALMER = (0.5, 0.25, 0.1)  # sizes of noisy weights that are tried where the usual one magnifies rounding ...
MAGNIFIED = 1e5  # ... by more than this: float64's would come near to what a mistake makes
EXPLODED = 1e6  # outputs of noise above it: gates that are open or closed by such numbers turn with a few channels
SEEDS = 4  # draws of noise until no output is all zeros, as a last ReLU may give


class Probe:
    """Compares the slim and the masked network that are made of `dense`.

    Args:
        model: never changed.
        example_input: positional arguments, never changed.

    Attributes:
        dense: a copy of `model` with noise for weights, so that the verdict does not depend on those; `model` itself
            where noise leads to NaN or infinity.
        inputs: noise like the example, or the example times noise where its forward can't take others (a logarithm).
            Bytes are noise, too, or those of the example.
    """

    def __init__(self, model: nn.Module, example_input: Inputs) -> None:
        copies: tuple[Callable[[nn.Module, int], nn.Module], ...] = (_noisy, _plain)
        for make, noise in product(copies, (_noise, _scaled)):
            for seed in range(SEEDS):
                self._calmer = partial(_noisy, model, seed) if make is _noisy else None
                self.dense = make(model, seed).eval()
                self.inputs = tree_map_only(Tensor, partial(noise, seed=seed), example_input)
                outputs = self._finite_outputs()
                if outputs is None:
                    break
                if all(value.any() for value in outputs if value.is_floating_point()):
                    return
            else:
                return

    @torch.no_grad()
    def in_float64(self) -> Probe:
        """This probe, from now on in float64 if `dense` can run in it; otherwise unchanged.

        In float64 the rounding error stays far below a real mistake, even behind a normalisation of tiny values, so
        that small outputs can be checked as strictly as large ones.
        """
        own = self.dense, self.inputs
        self.dense = copy_of(self.dense).double().eval()
        self.inputs = tree_map_only(Tensor, _double, self.inputs)
        if self._finite_outputs() is None:
            self.dense, self.inputs = own
            return self
        del own  # each of these is as large as the network, or twice as large
        for size in CALMER:
            if self._calmer and self._magnifies_rounding():
                del self.dense
                self.dense = self._calmer(size).double().eval()
        return self

    def _magnifies_rounding(self) -> bool:
        """Whether a very deep network makes so much of little, or such large numbers, that slim and masked ones would
        differ by rounding."""
        little = 2.0**-40
        moved = tree_map_only(Tensor, lambda x: x * (1 + little) if _is_float(x) else x, self.inputs)
        outputs = (_run(self.dense, inputs) for inputs in (self.inputs, moved))
        pairs = [(x, y) for x, y in zip(*map(_tensors, outputs), strict=True) if _is_float(x) and x.numel()]
        most = [(float(x.abs().max()), float((x - y).abs().max())) for x, y in pairs]
        return any(change > MAGNIFIED * little * size or size > EXPLODED for size, change in most)

    @torch.no_grad()
    def agrees(self, slimmer: Slimmer, kept: Any) -> bool:
        """Whether slim equals mask, both made of `dense` by `slimmer`, where the units `kept` (bool [U]) are left."""
        try:
            with _Coarsest() as coarsest:
                expected = _run(slimmer.mask(kept).eval(), self.inputs)
            return _close(_run(slimmer.slim(kept).eval(), self.inputs), expected, coarsest.eps)
        except Exception:  # whatever a forward raises on the wrong number of channels
            return False

    @torch.no_grad()
    def training_error(self, slimmer: Slimmer, kept: Any) -> str:
        """What the slim network raises in training mode, where the dense one raises nothing; else "".

        `dense` is left in training mode.
        """
        # two samples: BatchNorm can't train on one
        inputs = tree_map_only(Tensor, lambda x: torch.cat([x, x]) if x.dim() else x, self.inputs)
        try:
            slim = slimmer.slim(kept).train()
            _run(self.dense.train(), inputs)
        except Exception:  # training needs something else, targets say
            return ""
        try:
            _run(slim, inputs)
        except Exception as error:  # whatever a forward raises on the wrong number of channels
            return str(error) or type(error).__name__
        return ""

    @torch.no_grad()
    def outputs(self, model: nn.Module) -> Any:
        """Outputs of `model` for the noise, with equal random draws for every model."""
        return _run(model, self.inputs)

    @torch.no_grad()
    def is_random(self) -> bool:
        """Whether the forward draws numbers that are not torch's, other ones each time."""
        return not _close(*(_run(self.dense, self.inputs, seed) for seed in (0, 1)))

    @torch.no_grad()
    def _finite_outputs(self) -> list[Tensor] | None:
        try:
            outputs = _tensors(_run(self.dense, self.inputs))
            return outputs if all(bool(value.isfinite().all()) for value in outputs) else None
        except Exception:  # whatever a forward raises on values that it does not expect
            return None


def _run(module: nn.Module, inputs: Inputs, seed: int = 0) -> Any:
    gpus = gpus_of(inputs)
    eager = torch.compiler.set_stance("force_eager")  # in torch.compile's networks every width would be compiled anew
    with seeded(gpus, seed), eager, full_precision(gpus), Still(gpus):
        return module(*cloned(inputs))


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _close(a: Any, b: Any, eps: float = 0.0) -> bool:
    return all(_same(x, y, eps) for x, y in zip(_tensors(a), _tensors(b), strict=True))


def _same(x: Tensor, y: Tensor, eps: float) -> bool:
    """Equal but for rounding, that of `eps` at least, which may turn one in a hundred labels or truth values; where it
    is coarse, any of them."""
    if x.shape != y.shape:
        return False
    if not (_is_float(x) or x.is_complex()):
        return eps > 1e-6 or int((x != y).sum()) <= x.numel() // 100
    if not x.numel():
        return True
    return bool((x - y).abs().max() <= _rounding(max(eps, torch.finfo(x.dtype).eps)) * y.abs().max())


def _rounding(eps: float) -> float:
    """More than rounding adds up to in a deep network, less than any channel in the wrong place makes."""
    return min(max(1000 * eps, 1e-7), 0.1)


class _Coarsest(TorchDispatchMode):
    """The coarsest type of numbers that operations give meanwhile: a forward may convert to one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = [x.dtype for x in _tensors(result) if x.is_floating_point() or x.is_complex()]
        self.eps = max([self.eps, *(torch.finfo(dtype).eps for dtype in found)])
        return result


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


# ---- noise ------------------------------------------------------------------------------------------------------


def _noise(value: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if value.dtype == torch.uint8:  # an image; other integers are indices
        return torch.randint(256, value.shape, generator=generator).to(value)
    return torch.randn(value.shape, generator=generator).to(value) if _is_float(value) else value


def _scaled(value: Tensor, seed: int) -> Tensor:
    noise = torch.rand(value.shape, generator=torch.Generator().manual_seed(seed)) + 0.5
    return value.detach() * noise.to(value) if _is_float(value) else value


def _plain(model: nn.Module, seed: int) -> nn.Module:
    return copy_of(model)


def _noisy(model: nn.Module, seed: int, size: float = 1.0) -> nn.Module:
    """A copy of `model` with seeded noise for parameters, of that `size`, and for the statistics of its norms."""
    generator = torch.Generator().manual_seed(seed)
    memo = activations(model)  # deepcopy takes what is in it, so the weights are never copied
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() or tensor.is_complex():
            memo[id(tensor)] = nn.Parameter(_weights(name, tensor, generator, size), tensor.requires_grad)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and isinstance(module.running_var, Tensor):
            memo[id(module.running_mean)] = _uniform(module.running_var, -0.5, 0.5, generator)
            memo[id(module.running_var)] = _uniform(module.running_var, 0.5, 1.5, generator)
    return copy.deepcopy(model, memo)


def _weights(name: str, like: Tensor, generator: torch.Generator, size: float) -> Tensor:
    """Of a size that activations neither vanish nor explode; few ReLUs give nothing, even where channels are few."""
    if like.dim() > 1:
        bound = size * (6 * len(like) / max(like.numel(), 1)) ** 0.5
        return _uniform(like, -bound, bound, generator)
    return _uniform(like, 0.0, 0.5, generator) if "bias" in name else _uniform(like, 0.5, 1.5, generator)


def _uniform(like: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.empty(like.shape).uniform_(low, high, generator=generator).to(like)
