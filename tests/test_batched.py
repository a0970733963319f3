"""Candidates in one batch score as they do one by one, and as their own slim networks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, images, random_plans, randomise
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from strategies import Sample, deterministic, networks
from torch import Tensor, nn

from benchmarks import gpu_evaluation as benchmark
from benchmarks.registry import Options, benchmarks
from gnnrl_gym import PrunableNetwork, UnsupportedOperation
from gnnrl_gym.evaluation import batched, gates
from gnnrl_gym.evaluation.accuracy import PlanEvaluator
from gnnrl_gym.evaluation.batched import BatchedCandidates, CandidateNorm, obstacle
from gnnrl_gym.pruning.recalibration import recalibrate
from gnnrl_gym.pruning.sparsity import SparseNetwork
from gnnrl_gym.zoo import load_model
from gnnrl_gym.zoo.random_layers import Concat, Gate, Halves, Shuffle, Sum
from gnnrl_gym.zoo.random_networks import seeded_network

Make = Callable[[], nn.Module]


def prunable(model: nn.Module, x: Tensor) -> PrunableNetwork:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is frozen is said; here it has to be right
        return PrunableNetwork(model, x)


@torch.no_grad()
def assert_as_one_by_one(network: PrunableNetwork, x: Tensor, plans: Any, tolerance: float = 1e-4) -> None:
    """Statistics of the kept channels and logits, of every candidate, on images `x` that are calibrated on too."""
    assert obstacle(network) is None
    candidates = BatchedCandidates(network)
    candidates.calibrate(plans, x)
    logits = candidates.logits(x)
    for k, plan in enumerate(plans):
        slim = recalibrate(network.slim(plan), x)
        for path, norm in candidates.norms.items():
            own: Any = slim.get_submodule(path)
            found = [statistic[k][norm.keep[k]] for statistic in (norm.mean, norm.var)]
            assert_close(found, [own.running_mean, own.running_var], tolerance)
        assert_close([logits[k]], [slim(x)], tolerance)


# ---- any network -----------------------------------------------------------------------------------------------


@settings(deterministic, max_examples=4)
@given(sample=networks(), count=st.integers(1, 5), seed=st.integers(0, 1000))
def test_random_networks(sample: Sample, count: int, seed: int) -> None:
    """In float64: BatchNorm over next to no variance blows float32's rounding up, in one network of a hundred."""
    assume(len(sample.network.heads) == 1)
    try:
        network = prunable(sample.network.double(), sample.x.double())
    except UnsupportedOperation:
        reject()
    assert_as_one_by_one(network, images(20, *sample.x.shape[1:]).double(), random_plans(network, count, seed), 1e-8)


@pytest.mark.parametrize("seed", [2, 3])
def test_seeded_networks_in_float32(seed: int) -> None:
    model, x = seeded_network(seed)
    network = prunable(model, x)
    assert_as_one_by_one(network, images(70, *x.shape[1:]), random_plans(network, 3, seed))


class Attention(nn.Module):
    """Two heads of four on the positions of an image, behind an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out, self.head = nn.Conv2d(3, 6, 3), nn.Linear(8, 6), nn.Linear(6, 4)
        self.q, self.k, self.v = (nn.Linear(6, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        q, k, v = (layer(x).unflatten(2, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x.mean(1))


def norm(*layers: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.BatchNorm2d(channels))


def net(*body: nn.Module, channels: int) -> nn.Sequential:
    """Body, global average, a hidden layer."""
    return nn.Sequential(
        *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 7), nn.Sigmoid(), nn.Linear(7, 4)
    )


def conv(inputs: int, outputs: int, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **settings)


def twice() -> nn.Sequential:
    """One block, BatchNorm included, that runs two times under two names."""
    block = nn.Sequential(conv(8, 8), nn.BatchNorm2d(8), nn.Softplus())
    return net(conv(3, 8), block, nn.ReLU(), block, channels=8)


NETWORKS: dict[str, tuple[Make, int]] = {
    "resnet20": (lambda: load_model("resnet20"), 16),
    "mobilenet_v3_small": (lambda: load_model("mobilenet_v3_small", "random", 10), 32),
    "halves": (lambda: net(norm(conv(3, 8), channels=8), nn.Tanh(), Halves(conv(4, 6)), channels=10), 8),
    "squeezenet: concatenations, no BatchNorm": (lambda: load_model("squeezenet1_1", "random", 10), 32),
    "grouped": (
        lambda: net(
            norm(conv(3, 12), channels=12),
            norm(conv(12, 24, groups=4), channels=24),
            Shuffle(4),
            conv(24, 8, groups=2),
            channels=8,
        ),
        8,
    ),
    "few large groups": (
        lambda: net(norm(conv(3, 12), channels=12), nn.Sigmoid(), conv(12, 16, groups=2), nn.ReLU(), channels=16),
        8,
    ),
    "residual, no BatchNorm": (lambda: net(conv(3, 8), Sum([conv(8, 8), nn.Identity()]), nn.ReLU(), channels=8), 8),
    "concatenation that not all of is zero": (
        lambda: net(norm(conv(3, 8), channels=8), Concat([nn.ReLU(), nn.Sigmoid(), conv(8, 4)]), channels=20),
        8,
    ),
    "sum that is zero in part": (
        lambda: net(conv(3, 8), Sum([norm(conv(8, 8), channels=8), conv(8, 8)]), conv(8, 6), channels=6),
        8,
    ),
    "a normalised map with one channel": (
        lambda: net(conv(3, 8), Gate(conv(8, 8), norm(conv(8, 1), channels=1)), conv(8, 6), channels=6),
        8,
    ),
    "sigmoid behind BatchNorm": (lambda: net(norm(conv(3, 8), channels=8), nn.Sigmoid(), conv(8, 6), channels=6), 8),
    "affine-free BatchNorm": (lambda: net(conv(3, 8), nn.BatchNorm2d(8, affine=False), conv(8, 6), channels=6), 8),
    "GroupNorm freezes": (lambda: net(conv(3, 8), nn.GroupNorm(2, 8), conv(8, 6), nn.ReLU(), channels=6), 8),
    "transposed": (lambda: net(conv(3, 8), nn.ConvTranspose2d(8, 6, 2, 2), nn.BatchNorm2d(6), channels=6), 8),
    "one block twice": (twice, 8),
    "attention": (Attention, 6),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    network = prunable(randomise(make()).eval(), images(1, 3, size, size))
    # more than one batch of recalibration for the small ones
    x = images(130 if size < 10 else 24, 3, size, size)
    assert_as_one_by_one(network, x, random_plans(network, 3))


@pytest.mark.parametrize("count", range(1, 6))
def test_any_number_of_candidates(count: int) -> None:
    network = prunable(randomise(load_model("digits-resnet")), images(1, 1, 8, 8))
    assert_as_one_by_one(network, images(130, 1, 8, 8), random_plans(network, count, seed=count))


def test_the_dense_network_is_left_alone() -> None:
    model = randomise(load_model("digits-resnet"))
    before = copy.deepcopy(model.state_dict())
    network = prunable(model, images(1, 1, 8, 8))
    BatchedCandidates(network).calibrate(random_plans(network, 2), images(8, 1, 8, 8))
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


# ---- networks that need one by one --------------------------------------------------------------------------------


class Odd(nn.Module):
    """Two convolutions with something in between that has a say about the batch, or about the second one's weights."""

    def __init__(self, between: Callable[[Odd, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head, self.between = conv(3, 8), conv(8, 6), nn.Linear(6, 4), between
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self, self.first(x)).mean((2, 3)))


class Rows(nn.Module):
    """Linear layers on [length, batch, channels]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(9, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.flatten(2).transpose(0, 1)).relu()).mean(0)


ROWS = "batch in second place"
ODD: dict[str, tuple[Make, str]] = {
    "functional convolution": (lambda: Odd(lambda n, x: F.conv2d(x, n.second.weight)), "conv2d in '' "),
    "statistics of the batch": (lambda: Odd(lambda n, x: n.second(n.norm(x))), "batch_norm in 'norm' "),
    "mean over the batch": (lambda: Odd(lambda n, x: n.second(x - x.mean(0, keepdim=True))), "trial"),
    ROWS: (Rows, "trial"),
    "a batch of one in the code": (lambda: Odd(lambda n, x: n.second(x.view(1, -1, 8, 8))), "trial"),
}


@pytest.mark.parametrize("name", ODD)
def test_obstacles_are_named(name: str) -> None:
    make, reason = ODD[name]
    x = images(1, 5, 3, 3) if name == ROWS else images(1, 3, 8, 8)
    assert reason in str(obstacle(prunable(make(), x)))


def test_single_weights_are_an_obstacle() -> None:
    network = SparseNetwork(load_model("digits-resnet"), images(1, 1, 8, 8), "unstructured")
    assert "single weights" in str(obstacle(network))


@pytest.mark.parametrize("everything", [True, False])
def test_the_trial_finds_missing_gates(everything: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the analysis of zeros is wrong, or a norm's zeros are not written, a network is not batched."""
    torch.manual_seed(0)
    network = prunable(NETWORKS["sigmoid behind BatchNorm"][0](), images(1, 3, 8, 8))
    if everything:
        monkeypatch.setattr(gates, "_zeroed", lambda network: set(network.trace.operations()))
    else:
        monkeypatch.setattr(batched.CandidateNorm, "_scale_and_shift", lambda self, mean, var: (1 / var, -mean / var))
    assert "trial" in str(obstacle(network))


# ---- the evaluator ---------------------------------------------------------------------------------------------


def evaluators(env: Any, *options: Any) -> tuple[PlanEvaluator, PlanEvaluator]:
    """One that puts candidates into a batch, one that does not."""
    inner = env.unwrapped
    data = inner.network, inner.data.train, inner.data.search.take(100), 100, None, *options
    return PlanEvaluator(*data, batched=True), PlanEvaluator(*data, batched=False)


def test_no_tensor_has_more_elements_than_kernels_count(digits_env: gym.Env[Any, Any], monkeypatch: Any) -> None:
    network = digits_env.unwrapped.network  # type: ignore[attr-defined]
    largest = max(layer.numel() for layer in layer_outputs(network))
    for most, chunk in ((batched.MOST, 32), (256 * largest * 7 + 1, 7), (1, 1)):
        monkeypatch.setattr(batched, "MOST", most)
        assert BatchedCandidates(network).chunk == chunk


@pytest.mark.parametrize(("count", "images"), [(1, [34, 33, 33]), (3, [13] * 4 + [12] * 4), (4, [10] * 10)])
def test_few_plans_fill_a_batch_with_more_images(
    count: int, images: list[int], digits_env: gym.Env[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batched, "IMAGES", 10)
    together, alone = evaluators(digits_env)
    candidates: Any = together._candidates
    candidates.chunk, sizes, forward = 4, [], candidates.logits

    def logits(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return forward(images)

    monkeypatch.setattr(candidates, "logits", logits)
    plans = list(random_plans(together.network, count))
    together.prefetch(plans)
    assert [together.score(plan) for plan in plans] == [alone.score(plan) for plan in plans]
    assert sizes == images


def layer_outputs(network: PrunableNetwork) -> list[Tensor]:
    """Of one image."""
    found: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda m, x, y: found.append(y)) for m in network.model.modules()]
    network.model(network.example_input[0][:1])
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("count", range(2, 6))
def test_scores_equal_those_of_one_by_one(digits_env: gym.Env[Any, Any], count: int) -> None:
    together, alone = evaluators(digits_env)
    plans = list(random_plans(together.network, count, seed=count))
    together.prefetch(plans)
    assert len(together._scores) == count and together.evaluations == 0
    assert [together.score(plan) for plan in plans] == [alone.score(plan) for plan in plans]


def test_bfloat16_scores_are_close(digits_env: gym.Env[Any, Any]) -> None:
    together, alone = evaluators(digits_env, "bfloat16")
    plans = [together.network.widths * 3 // 4, together.network.widths * 2 // 3]
    together.prefetch(plans)
    np.testing.assert_allclose(*([e.score(plan) for plan in plans] for e in (together, alone)), atol=0.05)


def test_falls_back_with_a_reason(digits_env: gym.Env[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    together, alone = evaluators(digits_env)
    plans = list(random_plans(together.network, 2))
    monkeypatch.setattr("gnnrl_gym.evaluation.accuracy.obstacle", lambda network: "of a test")
    with pytest.warns(UserWarning, match="one by one, not in one batch: of a test"):
        together.prefetch(plans)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        together.prefetch(plans)
    assert [together.score(plan) for plan in plans] == [alone.score(plan) for plan in plans]


def test_a_batch_is_the_same_whatever_a_resumed_search_knows(
    digits_env: gym.Env[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    together, _ = evaluators(digits_env)
    plans, sizes = list(random_plans(together.network, 4)), list[int]()
    candidates = together._candidates
    assert candidates is not None
    measure = candidates.accuracies

    def counted(part: Any, *data: Any) -> list[float]:
        sizes.append(len(part))
        return measure(part, *data)

    monkeypatch.setattr(candidates, "accuracies", counted)
    together.remember(plans[0], 0.125)
    together.prefetch([*plans, plans[1]])
    together.prefetch(plans)
    assert sizes == [4]
    assert together.score(plans[0]) == 0.125  # what is known stays


def test_chunks_fit_the_memory(digits_env: gym.Env[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    together, alone = evaluators(digits_env)
    plans = list(random_plans(together.network, 7))
    candidates, sizes, most = together._candidates, [], 2
    assert candidates is not None
    measure = candidates._accuracies

    def limited(part: Any, *data: Any) -> list[float]:
        sizes.append(len(part))
        if len(part) > most:
            raise torch.OutOfMemoryError
        return measure(part, *data)

    monkeypatch.setattr(candidates, "_accuracies", limited)
    together.prefetch(plans)
    assert [together.score(plan) for plan in plans] == [alone.score(plan) for plan in plans]
    assert sizes == [7, 7, 7, 4, 2, 2, 2, 1]  # as chunks of 32, 16, 8, 4 and 2
    most, full = 0, together.network.widths
    with pytest.warns(UserWarning, match="one by one, not in one batch: the GPU's memory"):
        together.prefetch([full, full - 2])
    assert not together.batched
    assert [together.score(plan) for plan in (full, full - 2)] == [alone.score(plan) for plan in (full, full - 2)]


def test_a_cpu_does_not_batch_by_itself(digits_env: Any) -> None:
    assert not digits_env.unwrapped.evaluator.batched


def test_benchmark_sees_a_wrong_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = benchmark._evaluator("digits-resnet", "float32", benchmark.ON_CPU, torch.device("cpu"))
    plans = [evaluator.network.widths - 3, evaluator.network.widths // 2]
    assert benchmark._difference(evaluator, plans) < 1e-4
    start = CandidateNorm.start
    monkeypatch.setattr(CandidateNorm, "start", lambda self, keep: start(self, torch.ones_like(keep)))
    assert benchmark._difference(evaluator, plans) > 0.01


def test_benchmark_says_where_it_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "COPIED", 1 << 20)
    monkeypatch.setattr(benchmark, "REPEATS", 1)
    assert benchmarks()["gpu-evaluation"] is benchmark.BENCHMARK
    record = benchmark.run(Options(model="digits-resnet"))
    rows = {row["precision"]: row for row in record["rows"]}
    assert rows["float32"]["relative_difference"] < (1e-2 if record["gpu"] else 1e-4)  # TF32
    assert 1e-4 < rows["bfloat16"]["relative_difference"] < 0.1
    # scores move half the bytes in bfloat16, recalibration as many
    assert 1 < rows["float32"]["activation_bytes"] / rows["bfloat16"]["activation_bytes"] < 2
    assert ("No GPU" in benchmark.table(record)) == (record["gpu"] is None)
