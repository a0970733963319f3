"""Random networks, all that must hold of any plan of them, and whether the generator makes what it is there for."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_close, outputs
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from strategies import Sample, deterministic, networks
from torch import Tensor, nn

from benchmarks import random_networks as benchmark
from benchmarks.random_networks import Checks, random_plans
from benchmarks.registry import Options
from gnnrl_gym import PrunableNetwork, UnsupportedOperation
from gnnrl_gym.zoo.random_ingredients import INGREDIENTS, ingredients
from gnnrl_gym.zoo.random_networks import seeded_network


def prunable(model: nn.Module, x: Tensor) -> PrunableNetwork:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is frozen is said; whether it is right is what is tested
        return PrunableNetwork(model, x)


def mismatches(network: PrunableNetwork, x: Tensor, plans: int, seed: int = 0) -> list[str]:
    checks = Checks(network, x)
    for plan in random_plans(network, plans, seed):
        checks.run(plan)
    return checks.mismatches


@settings(deterministic, max_examples=20)
@given(sample=networks(), seed=st.integers(0, 1000))
def test_any_plan_of_any_network_is_exact(sample: Sample, seed: int) -> None:
    try:
        network = prunable(sample.network, sample.x)
    except UnsupportedOperation:  # every channel reaches an output, or something that normalises over channels
        reject()
    assert mismatches(network, sample.x, 4, seed) == []


@pytest.mark.parametrize("seed", range(4))
def test_seeded_networks_are_exact(seed: int) -> None:
    model, x = seeded_network(seed)
    assert mismatches(prunable(model, x), x, 4) == []


def test_most_of_the_cost_is_in_reach() -> None:
    shares = []
    for seed in range(12):
        network = prunable(*seeded_network(seed))
        least = np.ones_like(network.widths)
        shares.append(1 - network.macs(least) / network.macs(network.widths))
    assert np.mean(shares) > 0.7  # 0.84 over 600 networks
    assert np.median(shares) > 0.8


# ---- the generator ---------------------------------------------------------------------------------------------


def test_every_ingredient_is_made() -> None:
    found: Counter[str] = Counter()
    for seed in range(300):
        found.update(ingredients(seeded_network(seed)[0]).keys())
    assert set(found) == set(INGREDIENTS)
    rare = {name: count for name, count in found.items() if count < 3}
    assert not rare


def test_ingredients_are_read_off_the_modules() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 8, 1, groups=2), nn.ConvTranspose2d(8, 2, 2))
    assert ingredients(model) == {
        "depthwise convolution": 1, "depth multiplier": 1, "grouped convolution": 1, "transposed convolution": 1,
        "1x1 convolution": 1, "3x3 convolution": 1,
    }  # fmt: skip


def test_equal_seeds_give_equal_networks_and_leave_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    (first, x), (second, y), (other, _) = (seeded_network(seed) for seed in (5, 5, 6))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(x, y)
    assert repr(first) == repr(second) != repr(other)
    assert_close(outputs(first, x), outputs(second, x), tolerance=0)


@pytest.mark.parametrize("seed", range(5))
def test_networks_can_be_copied_and_pickled(seed: int) -> None:
    model, x = seeded_network(seed)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again) is type(model)
        assert_close(outputs(again, x), outputs(model, x), tolerance=0)


# ---- shrinking -------------------------------------------------------------------------------------------------


def test_a_counterexample_shrinks_to_a_small_network_that_can_be_read() -> None:
    @settings(deterministic, print_blob=False)
    @given(sample=networks())
    def every_network_fails(sample: Sample) -> None:
        assert not sample.network.parts

    with pytest.raises(AssertionError) as raised:
        every_network_fails()
    said = "\n".join(raised.value.__notes__)
    assert "sample=RandomNetwork(" in said
    assert "Conv2d(3, 4, kernel_size=(1, 1), stride=(1, 1)" in said
    assert "on an input of shape (1, 3, 6, 6)" in said
    assert said.count("Conv2d(") <= 3  # stem and two parts: no network has less


# ---- the checks themselves -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checked() -> tuple[PrunableNetwork, Tensor]:
    model, x = seeded_network(2)
    return prunable(model, x), x


def found_by(network: PrunableNetwork, x: Tensor, monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any) -> str:
    with monkeypatch.context() as patch:
        patch.setattr(network, name, wrong)
        return "\n".join(mismatches(network, x, 4))


def test_wrong_weights_are_found(checked: tuple[PrunableNetwork, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = checked
    slim = network.slim

    def other_weights(plan: Any) -> nn.Module:
        model = slim(plan)
        first = next(p for p in model.parameters() if p.dim() > 1)
        first.data *= 1.01
        return model

    said = found_by(network, x, monkeypatch, "slim", other_weights)
    assert "slim differs from mask" in said
    assert "full widths are not the dense network" in said


@pytest.mark.parametrize(("name", "message"), [("macs", "MACs"), ("params", "parameters")])
def test_wrong_costs_are_found(
    checked: tuple[PrunableNetwork, Tensor], monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    network, x = checked
    right = getattr(network, name)
    assert message in found_by(network, x, monkeypatch, name, lambda plan: right(plan) + 1)


def test_crashes_and_missing_gradients_are_found(
    checked: tuple[PrunableNetwork, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, x = checked
    slim = network.slim

    def frozen(plan: Any) -> nn.Module:
        model = slim(plan)
        next(model.parameters()).requires_grad_(False)
        return model

    assert "no gradient" in found_by(network, x, monkeypatch, "slim", frozen)
    assert "NotImplementedError" in found_by(network, x, monkeypatch, "slim", lambda plan: nn.Module())


def test_benchmark_counts_networks_and_renders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "NETWORKS", 3)
    record = benchmark.run(Options(seed=1, workers=1))
    assert record["networks"] == 3
    assert record["pruned"] + len(record["refused"]) == 3
    assert record["mismatches"] == []
    assert 0 < record["largest_relative_error"] < 1e-4
    assert "| mismatches | 0 |" in benchmark.table(record)
