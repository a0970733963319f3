"""How plans are scored: on the network that is built, with statistics of its own, the same whoever asks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import assert_close, images, random_plans, randomise
from torch import Tensor, nn

from agents import finetune_run, search
from gnnrl_gym import PrunableNetwork
from gnnrl_gym.envs.prune import PruneEnv
from gnnrl_gym.evaluation.accuracy import PlanEvaluator, logits
from gnnrl_gym.evaluation.folding import fold, foldable_pairs
from gnnrl_gym.pruning.recalibration import batch_norms, recalibrate
from gnnrl_gym.zoo import load_data, load_model

Env = gym.Env[Any, Any]


@pytest.fixture
def env(digits_env: Env) -> Env:
    digits_env.reset(seed=0)
    return digits_env


def prune(env: Env) -> Any:
    assert isinstance(env.unwrapped, PruneEnv)
    return env.unwrapped


@pytest.mark.parametrize("layer", ["0", "1"])
def test_a_layer_that_does_more_is_not_folded(layer: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())).eval()
    model.get_submodule(layer).register_forward_hook(lambda module, given, found: found * 2)
    x = images(2, 3, 8, 8)
    expected = model(x)
    folded = fold(model, [("0", "1")])
    assert isinstance(folded[1], nn.BatchNorm2d)
    torch.testing.assert_close(folded(x), expected)


class Filled(nn.Module):
    """Fills a tensor of the input's kind, which autocast leaves as it is, with what a convolution gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        found = self.conv(self.first(x).relu())
        filled = x.new_zeros(found.shape)
        filled[:, [1, 0, 3, 2, 5, 4]] = found
        return self.head(filled.mean((2, 3)))


@pytest.mark.filterwarnings("ignore:No channel rule")
def test_a_network_that_bfloat16_breaks_is_scored_in_float32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("gnnrl_gym.evaluation.precision.SMALL", 0)
    monkeypatch.setattr("gnnrl_gym.evaluation.precision._has_bfloat16", lambda device: True)
    make = partial(gym.make, "GNNRL-Prune-v0", model=Filled(), search_images=20, device="cpu")
    with pytest.warns(UserWarning, match="does not run in bfloat16 .*: it is scored in float32"):
        env = make()
    assert prune(env).evaluator.dtype == torch.float32
    with pytest.raises(ValueError, match=r"does not run in bfloat16 .*use precision='float32'"):
        make(precision="bfloat16")
    search(make(precision="float32"), "uniform", out=tmp_path / "run")
    with warnings.catch_warnings():  # it is trained in the precision that it was searched in
        warnings.filterwarnings("error", message="The network does not run")
        finetune_run(tmp_path / "run", 1, model=Filled())


def test_folded_network_is_the_same_function(env: Env) -> None:
    inner = prune(env)
    x, pairs = inner.data.search.take(50).tensors()[0], foldable_pairs(inner.network)
    assert pairs
    for plan in random_plans(inner.network, 3):
        built = inner.evaluator.build(plan)
        plain = logits(built, x).clone()
        norms = len(batch_norms(built))
        folded = fold(built, pairs)
        assert len(batch_norms(folded)) == norms - len(pairs) < norms
        assert_close([logits(folded, x)], [plain])


class Activated(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Renamed(nn.Module):
    """The convolution has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3)
        self.body = nn.Sequential(self.first, nn.BatchNorm2d(8), nn.ReLU(), *last())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class InPlace(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.5).mul_(2.0))


def last() -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), *last())
    model[1].register_forward_hook(lambda module, x, y: y.relu())
    return model


class Unfoldable(nn.Module):
    """A convolution and a BatchNorm that something else holds or reads; `way` says what."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.conv, self.norm = way, nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.last = nn.Sequential(*last())
        self.layers = [(self.conv, self.norm)]
        self.bound = self.norm.forward

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self.layers[0] if self.way == "held in a list" else (self.conv, self.norm)
        x = nn.functional.conv2d(x, conv.weight) if self.way == "weight alone" else conv(x)
        x = self.bound(x) if self.way == "bound forward" else norm(x)
        if self.way == "asks for the bias":
            x = x + (0 if conv.bias is None else 1)
        if self.way == "reads an attribute":
            x = x * norm.eps**0
        return self.last(x)


UNFOLDABLE = ("held in a list", "weight alone", "asks for the bias", "reads an attribute", "bound forward")


@pytest.mark.parametrize(
    "make",
    [lambda: nn.Sequential(nn.Conv2d(1, 8, 3), Activated(8), *last()), Renamed, hooked,
     lambda: InPlace(nn.Conv2d(1, 8, 3), nn.ReLU(), *last()), *(partial(Unfoldable, way) for way in UNFOLDABLE)],
    ids=["activated norm", "two names", "hook", "in place", *UNFOLDABLE],
)  # fmt: skip
def test_what_is_scored_is_what_is_built(make: Callable[[], nn.Module]) -> None:
    data, model = load_data("digits"), randomise(make())
    network = PrunableNetwork(model, torch.zeros(1, 1, 8, 8))
    evaluator = PlanEvaluator(network, data.train, data.search.take(100), 64)
    x, plan = data.search.take(100).tensors()[0], network.widths
    for _ in range(2):  # the second one on images that the first has seen
        assert_close([evaluator._outputs(plan, evaluator._search)], [evaluator.build(plan)(x.clone())])


def test_same_plan_same_score_whoever_asks(env: Env) -> None:
    inner = prune(env)
    plan = inner.network.widths // 2
    first = inner.evaluator.score(plan)
    assert inner.evaluator.score(plan) == first
    fresh = PlanEvaluator(inner.network, inner.data.train, inner.data.search.take(100), 64)
    assert fresh.score(plan.astype(np.int32)) == first


def test_sensitivity_has_a_number_per_group_and_is_in_the_observation(env: Env) -> None:
    inner = prune(env)
    rise = inner.evaluator.sensitivity()
    assert rise.shape == inner.network.widths.shape
    assert np.isfinite(rise).all() and (rise > 0).any()
    builder = inner.network.graph_builder
    before = builder.static.copy()
    builder.set_sensitivity(rise)
    np.testing.assert_array_equal(builder.static, before)


def test_recalibration_replaces_statistics_and_nothing_else() -> None:
    model, x = randomise(load_model("resnet20")).train(), images(96, 3, 32, 32)
    norms = batch_norms(model)
    norms[0].momentum = 0.3
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert recalibrate(model, x) is model
    assert not any(module.training for module in model.modules())
    assert [norm.momentum for norm in norms] == [0.3] + [0.1] * (len(norms) - 1)
    for key, value in model.state_dict().items():
        statistic = "running" in key or "num_batches" in key
        assert torch.equal(value, before[key]) != statistic, key


def test_recalibrated_statistics_are_those_of_the_images() -> None:
    model, x = randomise(load_model("resnet20")), images(64, 3, 32, 32)
    first = model.conv1(x).transpose(0, 1).flatten(1)
    recalibrate(model, x)
    torch.testing.assert_close(model.bn1.running_mean, first.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.bn1.running_var, first.var(1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_recalibration_takes_the_plain_average_as_pytorch_does() -> None:
    norm = nn.BatchNorm2d(6)
    model, x = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Conv2d(6, 6, 3), norm), images(192, 3, 8, 8)  # it runs twice
    expected = copy.deepcopy(model).train()
    expected[1].reset_running_stats()
    expected[1].momentum = None
    for part in x.split(64):
        expected(part)
    recalibrate(model, x)
    assert all(torch.equal(one, other) for one, other in zip(model.buffers(), expected.buffers(), strict=True))
    assert not norm._forward_pre_hooks


def test_a_compiled_network_is_not_compiled_for_every_plan() -> None:
    compiled_anew: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        compiled_anew.append(graph)
        return graph

    few: dict[str, Any] = {"data": "digits", "search_images": 50, "recalibration_images": 130, "device": "cpu"}
    model = load_model("digits-resnet")
    plain = PruneEnv(model=model, **few).evaluator
    evaluator = PruneEnv(model=torch.compile(model, backend=backend, fullgraph=True), **few).evaluator
    for less in (1, 2):
        plan = evaluator.network.widths - less
        assert evaluator.score(plan) == plain.score(plan)
    assert not compiled_anew


def test_a_batch_that_does_not_fit_is_divided() -> None:
    class Small(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 5:
                raise torch.OutOfMemoryError
            return x.flatten(1)

    x = torch.randn(70, 1, 2, 2)
    assert torch.equal(logits(Small(), x), x.flatten(1))
    with pytest.raises(torch.OutOfMemoryError):
        logits(_Never(), x)


class _Never(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError
