"""Unknown operations and wrong inputs, one case each: a message that names the thing and the mend, or an exact network;
never a broken one. Files are in test_hostile_files."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_close, count_params, counted_macs, images, old_export, outputs, random_plans, randomise
from test_hostile_files import CLEAR, DATA, DATA_FILES, PRUNED, RECORDS, SPOILED, WEIGHTS
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from gnnrl_gym import PrunableNetwork, UnsupportedOperation
from gnnrl_gym.envs.mask import MaskEnv
from gnnrl_gym.envs.prune import PruneEnv
from gnnrl_gym.zoo import load_data, load_model

X = images(1, 3, 8, 8)


@torch.library.custom_op("hostile::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return x * 2


@torch.library.custom_op("hostile::add", mutates_args=())
def mirrored_add(x: Tensor, y: Tensor) -> Tensor:
    """Bears the name of an ATen operation, and does something else."""
    return x.flip(1) + y


@torch.library.custom_op("hostile::shapeless", mutates_args=())
def shapeless(x: Tensor) -> Tensor:
    return x * 2


double.register_fake(torch.empty_like)
mirrored_add.register_fake(lambda x, y: torch.empty_like(x))


class Mixer(nn.Module):
    """A function as a submodule, as other people's code has them."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Small(nn.Module):
    """Two convolutions, `between` them what is tried, and a head."""

    def __init__(
        self, between: Callable[..., Any] = nn.functional.relu, after: Callable[..., Any] = lambda y: y
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.mixer, self.after, self.head = Mixer(between), after, nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Any:
        return self.after(self.head(self.second(self.mixer(self.first(x))).relu().mean((2, 3))))


def changed(change: Callable[[Any], Any]) -> nn.Module:
    model = Small()
    change(model)
    return model


@torch.no_grad()
def without_gradient(x: Tensor) -> Tensor:
    """Two contexts, one in the other, and two results."""
    with torch.autocast("cpu", enabled=False):
        a, b = x.float().relu(), x * torch.tensor(2.0)
    return a + b


@dataclass
class Scores:
    logits: Tensor


class Capturing(Small):
    """Goes on from what its first convolution gave, or what `arrange` puts there."""

    def __init__(self, arrange: Callable[[Any], Any]) -> None:
        super().__init__()
        self.kept: dict[str, Tensor] = {}
        self.block: Callable[[Tensor], Tensor] | None = None
        arrange(self)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept.update(last=output)

    def forward(self, x: Tensor) -> Any:
        y = (self.block or self.first)(x)
        return self.head(self.second(self.kept.get("last", y)).relu().mean((2, 3)))


class Cosine(Small):
    """A head of directions, as ArcFace has it: it takes the size of its own weight."""

    def forward(self, x: Tensor) -> Any:
        y = self.second(self.mixer(self.first(x))).relu().mean((2, 3))
        return nn.functional.linear(nn.functional.normalize(y), nn.functional.normalize(self.head.weight))


class PlainScale(Small):
    """A tensor that is neither parameter nor buffer, and as long as channels that it meets."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.rand(1, 8, 1, 1)
        self.mixer = Mixer(lambda x: x * self.scale)


class Quantisable(Small):
    """Adds by a module, which a quantised network replaces: until then it is plain arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.sums = torch.ao.nn.quantized.FloatFunctional()
        self.mixer = Mixer(lambda x: self.sums.add_relu(x, x.tanh()))


class ConstantPart(Small):
    """A parameter that is averaged, pooled, normalised and convolved: nothing of it can be resized, but it meets no
    channels."""

    def __init__(self) -> None:
        super().__init__()
        self.constant, self.norm = nn.Parameter(torch.ones(1, 3, 8, 8)), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Any:
        c = self.constant
        pooled = nn.functional.avg_pool2d(c, 2).sum() + nn.functional.interpolate(c, size=4).sum()
        return super().forward(x) * (c.mean() + pooled + self.norm(c).sum())


def poisoned(value: float) -> nn.Module:
    return changed(lambda m: m.second.weight.data[2, 0, 0].fill_(value))


class TrainingHead(Small):
    """Training mode is traced too, for a head that only it uses, and meets the same operation again."""

    def __init__(self) -> None:
        super().__init__(lambda x: x.cumsum(1))
        self.extra = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return (y, self.extra(y)) if self.training else y


def shared() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8)), nn.Flatten(), nn.Linear(512, 4))
    model[2].weight = model[1].weight
    return model


def quantised() -> nn.Module:
    layers = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    return torch.ao.quantization.quantize_dynamic(layers, {nn.Linear})


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return Small()


# ---- networks and examples that are refused ----------------------------------------------------------------------

# name: (network, example, what the message has to say)
REFUSED: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "branches on data": (lambda: Small(lambda x: x if x.sum() > 0 else -x), X, r"(?s)can't trace Small.*torch\.where"),
    "shape depends on data": (
        lambda: Small(after=lambda y: y[(y.sum(1) > -1e9).nonzero()[:, 0]]),
        X,
        r"shape depends on the data: aten\.nonzero.* in Small \(.*test_hostile\.py:\d+\).*mask",
    ),
    "torch.cond": (
        lambda: Small(lambda x: torch.cond(x.sum() > 0, torch.relu, torch.sin, (x,))), X,
        r"Small calls torch's higher-order operation 'cond' in 'mixer', .*torch\.where"
    ),
    "custom operation without shapes": (lambda: Small(lambda x: shapeless(x)), X, r"can't trace Small.*register_fake"),
    "forward raises": (lambda: Small(lambda x: x / {}["no"]), X, r"Small .*fails on its example input.*KeyError"),
    "too few dimensions": (Small, images(8, 8), r"example input \(torch\.float32 \[8, 8\] on cpu\).*3D"),
    "other channels": (Small, images(1, 5, 8, 8), r"example input \(torch\.float32 \[1, 5, 8, 8\].*3 channels"),
    "other type of numbers": (Small, X.double(), r"parameters torch\.float32 on cpu.*torch\.float64"),
    "bytes": (Small, torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"parameters torch\.float32 on cpu.*torch\.uint8"),
    "other device": (Small, X.to("meta"), r"parameters torch\.float32 on cpu.*on meta\)"),
    "empty batch": (Small, X[:0], r"shape \[0, 3, 8, 8\] is empty: give at least one sample"),
    "too many arguments": (Small, (X, X), r"fails on its example input.*positional arguments"),
    "no arguments": (Small, (), "holds no tensor"),
    "list": (Small, [X], "tensor, or a tuple .* got a list"),
    "dictionary": (Small, {"x": X}, "tensor, or a tuple .* got a dict"),
    "numpy": (Small, X.numpy(), "tensor, or a tuple .* got a ndarray"),
    "no example": (Small, None, "tensor, or a tuple .* got a NoneType"),
    "function": (lambda: lambda x: x, X, r"nn\.Module, got a function"),
    "class": (lambda: Small, X, r"nn\.Module, got the class Small"),
    "state dict": (lambda: Small().state_dict(), X, r"nn\.Module, got a OrderedDict"),
    "nothing prunable": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), X, "no channel group that can be"),
    "no parameters": (lambda: nn.Sequential(nn.ReLU(), nn.Flatten()), X, "no channel group that can be pruned"),
    "a lambda over the network": (
        lambda: Capturing(lambda net: setattr(net, "block", lambda x: net.first(x))), X,
        r"A copy of Capturing .*computes with what the network itself holds\. A lambda, a hook .*make that a method",
    ),
    "a hook over the network": (
        lambda: Capturing(lambda net: net.first.register_forward_hook(lambda m, x, y: net.kept.update(last=y))), X,
        r"A copy of Capturing .*computes with what the network itself holds\. A lambda, a hook .*make that a method",
    ),
    "a dataclass": (
        lambda: Small(after=Scores), X, r"no tensor, but a Scores\. Call torch\.export\.register_dataclass\(Scores\)"
    ),
    "no output": (lambda: Small(after=lambda y: None), X, "returns no tensor, but a NoneType"),
    "lazy layers": (lambda: nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyConv2d(4, 3)), X, "'0' .*run the network once"),
    "no data": (lambda: Small().to("meta"), X, r"'first\.weight' is on the meta device.*load weights"),
    "weights are NaN": (lambda: poisoned(float("nan")), X, r"'second\.weight' holds NaN or infinity: load finite"),
    "weights are infinite": (lambda: poisoned(-float("inf")), X, r"'second\.weight' holds NaN or infinity: load"),
    "weights of inference mode": (made_in_inference_mode, X, r"'first\.weight' .*inference_mode: build .* outside"),
    "ScriptModule": (lambda: torch.jit.trace(nn.Conv2d(3, 4, 3), X), X, "ScriptModule: pass the nn.Module"),
    "exported program": (
        lambda: torch.export.export(Small(), (X,)).module(), X, "GraphModule '' is an exported program: pass the nn.M"
    ),
    "DataParallel": (lambda: nn.DataParallel(Small()), X, r"DataParallel .* pass its \.module"),
    "quantised": (quantised, images(2, 8), "Linear '0' is quantised: prune the floating-point network"),
    "holds a lock": (lambda: changed(lambda m: setattr(m, "lock", threading.Lock())), X, "can't be copied.*locks"),
    "holds a tensor of a graph": (
        lambda: changed(lambda m: setattr(m, "cache", SimpleNamespace(inside=m.first.weight * 2))), X,
        "can't be copied.*Remove",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of TorchScript and quantisation
@pytest.mark.parametrize("name", REFUSED)
def test_networks_and_examples_are_refused_with_the_mend(name: str) -> None:
    make, example, message = REFUSED[name]
    model = make()
    with pytest.raises(CLEAR, match=message):
        PrunableNetwork(model, example)


# ---- odd networks that work, exactly -----------------------------------------------------------------------------

# name: (network, example, widths, what its one warning per line has to match)
ODD: dict[str, tuple[Callable[[], Any], Any, list[int], list[str]]] = {
    "custom operation": (lambda: Small(lambda x: double(x)), X, [6], [r"double in 'mixer' \(.*hostile\.py:\d+\):"]),
    "custom operation named like another": (
        lambda: Small(lambda x: mirrored_add(x, 2 * x)), X, [6], [r"add in 'mixer' \(.*hostile\.py:\d+\):"]
    ),
    "no rule": (lambda: Small(lambda x: x.cumsum(1)), X, [6], [r"cumsum in 'mixer' \(.*test_hostile\.py:\d+\)"]),
    "no rule, traced twice": (TrainingHead, X, [6], [r"cumsum in 'mixer' \(.*test_hostile\.py:\d+\)"]),
    "half precision": (lambda: Small().half(), X.half(), [8, 6], []),
    "bfloat16": (lambda: Small().bfloat16(), X.bfloat16(), [8, 6], []),
    "double precision": (lambda: Small().double(), X.double(), [8, 6], []),
    "complex": (
        lambda: nn.Sequential(*(nn.Linear(8 - i, 7 - i, dtype=torch.complex64) for i in range(3))),
        torch.complex(images(2, 8), images(2, 8, seed=1)),
        [7, 6],
        [],
    ),
    "shared weights": (shared, X, [8], []),
    "compiled": (lambda: torch.compile(Small(), backend="eager"), X, [8, 6], []),
    "hook": (
        lambda: changed(lambda m: m.first.register_forward_hook(lambda module, given, found: found * 2)), X, [8, 6], []
    ),
    "hook that is a method": (lambda: Capturing(lambda m: m.first.register_forward_hook(m.keep)), X, [8, 6], []),
    "hook that turns channels round": (
        lambda: changed(lambda m: m.second.register_forward_pre_hook(lambda module, given: (given[0].flip(1),))),
        X, [8, 6], [],
    ),
    "hook with a number of channels": (
        lambda: changed(lambda m: m.first.register_forward_hook(lambda m, x, y: y * torch.ones(8).view(1, 8, 1, 1))),
        X, [6], ["ones in 'first'"],
    ),
    "no_grad and autocast": (lambda: Small(without_gradient), X, [8, 6], []),
    "a parameter as an operand": (ConstantPart, X, [8, 6], []),
    "cosine head": (Cosine, X, [8], [r"linalg_vector_norm in", r"expand_as in the network's own", r"linear in"]),
    "quantisable": (Quantisable, X, [8, 6], []),
    "weight_norm": (
        lambda: changed(lambda m: parametrizations.weight_norm(m.first)),
        X, [6], [r"_weight_norm in 'first\.parametrizations\.weight\.0'", r"conv2d in 'first'"],
    ),
    "frozen weights": (lambda: Small().requires_grad_(False), X, [8, 6], []),
    "a plain tensor": (PlainScale, X, [6], [r"the tensor 'scale' \(make it a buffer\)"]),
    "unused parameter": (lambda: changed(lambda m: setattr(m, "idle", nn.Parameter(torch.zeros(3)))), X, [8, 6], []),
    "output of a dictionary": (lambda: Small(after=lambda y: {"scores": y, "name": "odd"}), X, [8, 6], []),
    "a number of channels": (
        lambda: Small(lambda x: x.view(1, 2, 4, 8, 8).transpose(1, 2).flatten(1, 2)), X, [4, 6], []
    ),
}  # fmt: skip


def tensors(module: nn.Module, x: Tensor) -> list[Tensor]:
    return [value for value in outputs(module, x) if isinstance(value, Tensor)]


KEEPING = "hook that is a method"


@pytest.mark.parametrize("name", [pytest.param(name, marks=[old_export] if name == KEEPING else []) for name in ODD])
def test_odd_networks_are_exact(name: str) -> None:
    make, x, widths, expected = ODD[name]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        network = PrunableNetwork(randomise(make()), x)
    ours = [str(w.message) for w in said if "frozen" in str(w.message) or "Parameters" in str(w.message)]
    assert network.widths.tolist() == widths
    assert len(ours) == len(expected), ours
    for message, pattern in zip(ours, expected, strict=True):
        assert re.search(pattern, message), message
    for plan in random_plans(network, 4):
        slim = network.slim(plan)
        assert_close(tensors(slim, x), tensors(network.mask(plan), x), 1e-2 if x.element_size() == 2 else 1e-4)
        assert network.macs(plan) == counted_macs(slim, x) and network.params(plan) == count_params(slim)


@pytest.mark.parametrize("name", ["custom operation", "no rule", "weight_norm"])
def test_strict_raises_where_it_would_warn(name: str) -> None:
    make, x, _, expected = ODD[name]
    with pytest.raises(UnsupportedOperation, match=expected[0].partition(":")[0]):
        PrunableNetwork(make(), x, strict=True)


# ---- plans -------------------------------------------------------------------------------------------------------

PLANS: dict[str, tuple[Any, str]] = {
    "too short": ([8], r"shape \[A=2\]"),
    "too long": ([8, 6, 1], r"shape \[A=2\]"),
    "ragged": ([[8, 6], [8]], r"shape \[A=2\]"),
    "nothing": (None, r"shape \[A=2\]"),
    "zero": ([8, 0], "group 1 must be between 1 and 6"),
    "negative": ([-1, 6], "group 0 must be between 1 and 8"),
    "above the full width": ([8, 7], "group 1 must be between 1 and 6"),
    "above all integers": (np.array([2**64 - 1, 6], np.uint64), "group 0 must be between 1 and 8"),
    "beyond any type": ([10**30, 6], "Widths are integers, got object"),
    "NaN": ([float("nan"), 6], "Widths are integers, got float64"),
    "floats": ([8.0, 6.0], "Widths are integers, got float64"),
    "text": (["8", "6"], "Widths are integers, got <U1"),
    "truth values": ([True, True], "Widths are integers, got bool"),
}


@pytest.fixture(scope="module")
def small() -> PrunableNetwork:
    return PrunableNetwork(Small(), X)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("method", ["slim", "mask", "macs", "params", "checked"])
def test_plans_are_refused(small: PrunableNetwork, name: str, method: str) -> None:
    plan, message = PLANS[name]
    with pytest.raises(ValueError, match=message):
        getattr(small, method)(plan)


# ---- budgets and names -------------------------------------------------------------------------------------------

BUDGETS: list[Any] = [0, 1, -0.5, 1.5, float("nan"), float("inf"), True, "0.5", None, [0.5], {"macs": "half"}, {}]


@pytest.mark.parametrize("budget", BUDGETS, ids=repr)
def test_budgets_are_refused(budget: Any) -> None:
    with pytest.raises(ValueError, match="share"):
        PruneEnv(budget=budget)


# what is asked for, and what the message has to offer
NAMES: dict[str, tuple[Callable[[], Any], str]] = {
    "model": (lambda: load_model("resnet21"), "no model is named 'resnet21'; near it: .*resnet20"),
    "model that is no name": (lambda: load_model(3), "no model is named 3; near it"),  # type: ignore[arg-type]
    "weights": (lambda: load_model("resnet18", "IMAGENET"), "'IMAGENET'.*IMAGENET1K_V1"),
    "weights that are no name": (lambda: load_model("resnet20", 3), "weights is a file.* got a int"),  # type: ignore[arg-type]
    "classes": (lambda: load_model("resnet20", num_classes=2.5), "num_classes .* got 2.5"),  # type: ignore[arg-type]
    "data": (lambda: load_data("cifar-10"), "no data set is named 'cifar-10'.*cifar10"),
    "importance": (lambda: PrunableNetwork(Small(), X, "l3"), "Unknown importance 'l3': choose one of l1, l2"),
    "metric": (lambda: PruneEnv(metric="flops"), "Unknown metric 'flops': choose one of macs"),
    "landing": (lambda: PruneEnv(landing="soft"), "Unknown landing 'soft': choose one of exact"),
    "granularity": (lambda: PruneEnv(metric="params", granularity="3:2"), "Unknown granularity '3:2': choose"),
    "no granularity": (
        lambda: PruneEnv(metric="params", granularity=None),  # type: ignore[arg-type]
        "Unknown granularity 'None': choose",
    ),
    "device": (lambda: PruneEnv(device="gpu"), "Unknown device 'gpu': use auto, cpu or cuda"),
    "device of another kind": (lambda: PruneEnv(device="mps"), "Unknown device 'mps': use auto, cpu or cuda"),
    "device out of range": (lambda: PruneEnv(device="cuda:99"), "device='cuda:99' but torch sees"),
}


@pytest.mark.parametrize("name", NAMES)
def test_unknown_names_are_answered_with_known_ones(name: str) -> None:
    ask, message = NAMES[name]
    with pytest.raises(ValueError, match=message):
        ask()


class Answers(nn.Module):
    """Digits, answered with what `make` makes of them."""

    def __init__(self, make: Callable[..., Any]) -> None:
        super().__init__()
        self.body, self.make = nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten(), nn.Linear(4, 10)), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.body(x))


def colours(x: Tensor) -> Tensor:
    raise AssertionError("colour images alone")


OWN: dict[str, tuple[Any, str]] = {
    "a tuple": (Answers(lambda x: (x,)), "answers with a tuple, but plans are scored by one tensor"),
    "a dictionary": (Answers(lambda x: {"logits": x}), "answers with a dict, but plans are scored by one tensor"),
    "a map": (Answers(lambda x: x[..., None]), r"a Tensor of shape \(2, 10, 1\), but plans are scored by one tensor"),
    "two inputs": (Answers(lambda x, y: x), "does not take the images of 'digits'.*missing 1 required"),
    "an assertion": (Answers(colours), "does not take the images of 'digits'.*colour images alone"),
    "a class": (Small, "model is a name for load_model, or a network .* got the class Small"),
    "a function": (lambda x: x, "model is a name for load_model, or a network .* got a function"),
    "nothing": (None, "model is a name for load_model, or a network .* got a NoneType"),
    "a function of a file": ("own:make", "no model is named 'own:make'.*own goes in Python: gym.make"),
}


@pytest.mark.parametrize("name", OWN)
def test_networks_of_ones_own_are_refused_in_a_sentence(name: str) -> None:
    model, message = OWN[name]
    for env in (PruneEnv, MaskEnv):
        with pytest.raises(ValueError, match=message):
            env(model, load_data("digits"), search_images=20, device="cpu")


def test_there_are_enough_cases() -> None:
    tables = (REFUSED, ODD, PLANS, WEIGHTS, SPOILED, PRUNED, RECORDS, DATA, DATA_FILES, BUDGETS, NAMES)
    assert sum(len(table) for table in tables) >= 120


def test_a_network_with_no_answer_for_smaller_inputs_is_followed() -> None:
    """Copies are compared on half of the example, where this one gives NaN."""

    class Edge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu()) + (x[:, :1] - 0.75).sqrt()

    assert PrunableNetwork(Edge(), torch.ones(2, 4)).widths.tolist() == [8]
