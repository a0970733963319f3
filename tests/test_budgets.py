"""Budgets besides MACs and parameters: latency, several at once, and widths in multiples. Memory is in
`test_memory.py`."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import Network, images, random_plans
from gymnasium.envs.registration import EnvSpec
from test_memory import Residual
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from agents import SearchResult, search
from agents.search_cli import _budget
from benchmarks import search_comparison
from benchmarks.registry import Options
from gnnrl_gym import PrunableNetwork
from gnnrl_gym.envs.prune import PruneEnv
from gnnrl_gym.pruning.latency import LatencyTable
from gnnrl_gym.pruning.operation_grids import measured_at, rounded
from gnnrl_gym.pruning.timing import Operation, operations, take_turns
from gnnrl_gym.zoo import load_model
from gnnrl_gym.zoo.resnet import CifarResNet

SMALL: dict[str, Any] = {"search_images": 50, "recalibration_images": 40, "device": "cpu"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Measurements go to a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def make(**settings: Any) -> Any:
    return PruneEnv(**{**SMALL, **settings})


@pytest.fixture(scope="module")
def wide() -> nn.Module:
    """A network for the digits whose latency lies in its convolutions, not in the calls."""
    return CifarResNet(1, in_channels=1, widths=(96, 192, 256))


def full_action(env: PruneEnv, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.7, 1, env.action_space.shape)  # type: ignore[arg-type]


# ---- latency ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def clock() -> Iterator[None]:
    """A clock that counts operations instead of seconds: other programs run beside the tests. How good predictions are
    on a real clock is measured by the benchmark latency-prediction."""

    def counted(calls: Any, repeats: int, device: torch.device, inputs: Any = ()) -> list[float]:
        return [1e-6 + 1e-10 * flops_of(call, inputs) for call in calls]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gnnrl_gym.pruning.latency.take_turns", counted)
        yield


def flops_of(call: Any, inputs: Any) -> int:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        call(*inputs)
    return int(counter.get_total_flops())


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> LatencyTable:
    return LatencyTable(large_network(), 5, tmp_path_factory.mktemp("latency"))


def large_network() -> Network:
    return PrunableNetwork(load_model("resnet20", "random"), images(4, 3, 32, 32))


def test_an_eighth_of_the_widths_is_predicted_to_be_clearly_faster(table: LatencyTable) -> None:
    full = table.network.widths
    predicted = table.predict(np.stack([full, np.maximum(full // 8, 1)]))
    assert 0 < predicted[1] < 0.8 * predicted[0]


@pytest.mark.parametrize("part", [1, 2, 4])
def test_the_operations_of_a_plan_cost_together_what_the_clock_counts(table: LatencyTable, part: int) -> None:
    """Operations are bilinear in their channels, and these widths need no rounding."""
    plan = table.network.widths // part
    counted = 1e-6 * len(table._operations) + 1e-10 * 2 * table.network.macs(plan)
    assert table._alone.seconds(plan) == pytest.approx(counted, rel=1e-6)


@pytest.mark.parametrize("blocky", [False, True])
def test_counts_are_rounded_up_where_the_kernels_do(
    blocky: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With kernels that work on blocks, and with such that take what a straight line says, the operations of any plan
    cost together what the clock counts."""
    call = Operation.call

    def blockwise(op: Operation, counts: Any, *given: Any) -> Any:
        blocks = rounded(np.array(counts, float), np.array(16.0)) if blocky and op.weighted else counts
        return call(op, tuple(int(min(pair)) for pair in zip(blocks, op.sizes, strict=True)), *given)

    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(Operation, "call", blockwise)
    table = LatencyTable(large_network(), 1, tmp_path)
    full = table.network.widths
    for plan in np.maximum(random_plans(table.network, 5), full // 4):  # in the range that is measured
        kept = [[round(float(plan @ row[:-1] + row[-1])) for row in op.rows] for op in table._operations]
        calls = [op.call(counts, {}, table.device) for op, counts in zip(table._operations, kept, strict=True)]
        counted = sum(1e-6 + 1e-10 * flops_of(each, ()) for each in calls)
        assert table._alone.seconds(plan) == pytest.approx(counted, rel=1e-6)


def test_whole_networks_scale_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant, and a factor for what operations cost when they stand together."""
    monkeypatch.setattr(LatencyTable, "measure", lambda self, plans: 3 * self._alone.seconds(plans) + 1e-3)
    table = LatencyTable(large_network(), 2, tmp_path)
    plans = random_plans(table.network, 5)
    np.testing.assert_allclose(table.predict(plans), 3 * table._alone.seconds(plans) + 1e-3, rtol=1e-6)


@pytest.mark.parametrize(("share", "counted"), [(0.9, 0.9), (0.2, 0.8), (5, 1)])
def test_the_dense_network_may_be_faster_than_the_others_say_and_no_plan_is_above_it(
    share: float, counted: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its channel counts are not odd. What is far off is noise, which would let any plan meet a budget, or none."""
    monkeypatch.setattr(LatencyTable, "measure", lambda self, plans: 3 * self._alone.seconds(plans) * [share, *[1] * 5])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        table = LatencyTable(large_network(), 2, tmp_path)
    assert any("is the machine busy?" in str(each.message) for each in said) == (share != 0.9)
    full = table.network.widths
    dense, almost, half = table.predict(np.stack([full, full - 1, full // 2]))
    assert dense == table.predict(full) == pytest.approx(3 * counted * table._alone.seconds(full))
    assert almost == pytest.approx(min(3 * table._alone.seconds(full - 1), dense))
    assert half == pytest.approx(3 * table._alone.seconds(full // 2))


def test_a_network_whose_time_seems_constant_is_predicted_by_its_operations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LatencyTable, "measure", lambda self, plans: [3e-3] * len(plans))
    table = LatencyTable(large_network(), 2, tmp_path)
    full = table.network.widths
    assert table.predict(full) == pytest.approx(3e-3) and table.predict(full // 4) < 2e-3


def test_predictions_never_rise_when_a_width_falls(table: LatencyTable) -> None:
    for plan in random_plans(table.network, 20):
        less = np.maximum(plan - np.eye(len(plan), dtype=np.int64), 1)
        assert (table.predict(less) <= table.predict(plan) * (1 + 1e-12)).all()


def test_many_plans_are_predicted_as_one_by_one(table: LatencyTable) -> None:
    plans = random_plans(table.network, 10)
    many = table.predict(plans)
    np.testing.assert_allclose(many, [table.predict(plan) for plan in plans])
    assert many.shape == (10,) and isinstance(table.predict(plans[0]), float)


def test_prediction_is_fast_enough_to_land_on(table: LatencyTable) -> None:
    plan, seconds = table.network.widths // 2, []
    for _ in range(30):
        start = time.perf_counter()
        table.predict(plan)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.002  # 0.06 ms, with room for a busy machine


def test_cache_is_used_and_damage_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = PrunableNetwork(Residual(), images(1, 3, 16, 16))
    first = LatencyTable(network, 2, tmp_path)
    plans = random_plans(network, 5)
    with monkeypatch.context() as patch:
        patch.setattr(LatencyTable, "_measure", lambda *_: pytest.fail("measured again"))
        patch.setattr(LatencyTable, "measure", lambda *_: pytest.fail("measured again"))
        np.testing.assert_array_equal(LatencyTable(network, 2, tmp_path).predict(plans), first.predict(plans))
        with pytest.raises(pytest.fail.Exception):
            LatencyTable(network, 2, tmp_path, refresh=True)
    (file,) = tmp_path.glob("*.json")
    for damage in (file.read_text()[:100], "[]", '{"seconds": null}'):
        file.write_text(damage)
        assert (LatencyTable(network, 2, tmp_path).predict(plans) > 0).all()
        assert json.loads(file.read_text())["seconds"]


def test_a_cache_that_can_not_be_written_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # where the folder would be
    with pytest.warns(UserWarning, match="can't be kept in") as said:
        found = LatencyTable(large_network(), 5, tmp_path / "file" / "latency")
    assert len(said) == 1
    assert found.predict(found.network.widths) > 0


class InPlace(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(0.1))


def test_the_cache_may_be_a_string_and_repeats_are_whole(tmp_path: Path) -> None:
    network = PrunableNetwork(Residual(), images(1, 3, 16, 16))
    LatencyTable(network, 1, str(tmp_path / "latency"))
    assert list((tmp_path / "latency").iterdir())
    for repeats in (0, 1.5):
        with pytest.raises(ValueError, match="repeats must be a whole number and at least 1"):
            LatencyTable(network, repeats, tmp_path)  # type: ignore[arg-type]


def test_measuring_changes_no_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gnnrl_gym.pruning.latency.take_turns", take_turns)  # which counts no operations
    example = images(1, 3, 16, 16)
    network = PrunableNetwork(InPlace(), example.clone())
    LatencyTable(network, 2, tmp_path).check(network.widths // 2)
    assert torch.equal(network.example_input[0], example)
    take_turns([network.model], 2, torch.device("cpu"), (given := example.clone(),))
    assert torch.equal(given, example)


def test_alike_layers_are_measured_once(table: LatencyTable) -> None:
    keys = [op.key for op in table._operations]
    assert len(set(keys)) < len(keys) / 2  # ResNet-20 repeats its blocks


def test_counts_are_rounded_up_to_blocks_and_below_one_to_powers_of_two() -> None:
    counts = np.arange(1.0, 65.0)
    found = rounded(counts, np.array(16.0))
    assert (found >= counts).all() and sorted(set(found.tolist())) == [1, 2, 4, 8, 16, 32, 48, 64]
    assert (rounded(counts, np.array(1.0)) == counts).all()  # what works on channels one by one


def test_operations_are_measured_at_the_counts_they_say() -> None:
    network = PrunableNetwork(load_model("mobilenet_v2", "random"), images(1, 3, 32, 32))
    found = operations(network.trace, network.channels, network.groups)
    assert {op.node for op in found if op.weighted} == {product.node for product in network.channels.products}
    for op in found:
        counts = measured_at(op, 16)[0]
        dense, small = (op.call(c, {}, torch.device("cpu"))() for c in (op.sizes, counts))
        assert dense.shape == op.node.meta["val"].shape
        if op.outputs_per_group:
            assert small.shape[1] == counts[0]
        elif op.weighted:
            assert small.shape[1] == counts[1]


# ---- the environment -------------------------------------------------------------------------------------------


BUDGETS: dict[str, dict[str, Any]] = {
    "memory": {"metric": "memory", "budget": 0.6},
    "latency": {"metric": "latency", "budget": 0.8},
    "one in a dictionary": {"budget": {"params": 0.4}},
    "two": {"budget": {"macs": 0.5, "memory": 0.45}},
    "three": {"budget": {"macs": 0.6, "latency": 0.9, "params": 0.3}},
}


@pytest.mark.parametrize("case", BUDGETS)
def test_lands_within_all_budgets_and_next_to_one(case: str, wide: nn.Module) -> None:
    env = make(model=wide, **BUDGETS[case])
    for seed in range(3):
        env.reset(seed=seed)
        _, _, terminated, _, info = env.step(full_action(env, seed))
        ratios = {metric: info[f"{metric}_ratio"] for metric in env.budgets}
        assert terminated and info["is_success"]
        assert all(ratios[metric] <= budget for metric, budget in env.budgets.items())
        # a unit more of any group that gave some is too much
        for group in np.flatnonzero(info["widths"] < env.network.widths):
            assert not env.within_budget(info["widths"] + (np.arange(len(env.widths)) == group))


def test_no_budget_of_several_is_met_by_the_others_alone() -> None:
    env = make(budget={"params": 0.95, "macs": 0.5})
    env.reset()
    assert env.step(full_action(env))[4]["params_ratio"] < 0.95
    env.reset(options={"budget": {"params": 0.3, "macs": 0.95}})
    info = env.step(full_action(env))[4]
    assert 0.25 < info["params_ratio"] <= 0.3
    assert env.cost_ratio() == info["params_ratio"] != info["macs_ratio"]


@pytest.mark.parametrize("budget", [np.float32(0.5), {"macs": np.float64(0.5)}])
def test_a_budget_of_numpy_is_a_number(budget: Any) -> None:
    env = gym.make("GNNRL-Prune-v0", budget=budget, search_images=20, recalibration_images=16)
    env.reset(seed=0)
    _, _, terminated, _, info = env.step(np.full(env.action_space.shape or (), 0.7))
    assert terminated is True and info["is_success"] is True


def test_one_metric_in_a_dictionary_is_the_number() -> None:
    plans = []
    for settings in ({"metric": "params", "budget": 0.4}, {"budget": {"params": 0.4}}):
        env = make(**settings)
        assert (env.metric, env.budget) == ("params", 0.4)
        env.reset(seed=0)
        plans.append(env.step(full_action(env))[4]["widths"])
    np.testing.assert_array_equal(*plans)


def test_spec_and_info_of_several() -> None:
    made = gym.make("GNNRL-Prune-v0", budget={"macs": 0.5, "memory": 0.7}, round_to=2, **SMALL)
    assert made.spec is not None
    again: Any = gym.make(EnvSpec.from_json(made.spec.to_json())).unwrapped
    assert again.budgets == {"macs": 0.5, "memory": 0.7} and again.round_to == 2
    assert again.budget == 0.5
    _, info = again.reset()
    assert {"macs_ratio", "params_ratio", "memory_ratio"} <= set(info) and "latency_ratio" not in info
    again.render_mode = "ansi"
    assert "0.5 of macs and 0.7 of memory" in again.render()


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown metric": ({"budget": {"speed": 0.5}}, "'speed'.*macs, params, memory, latency"),
    "empty": ({"budget": {}}, "macs"),
    "above one": ({"budget": {"macs": 0.5, "params": 1.2}}, "1.2 for params"),
    "no number": ({"budget": {"macs": "half"}}, "'half' for macs"),
    "out of reach": ({"budget": {"macs": 0.9, "memory": 0.01}}, "memory share.*floor"),
    "round_to 0": ({"round_to": 0}, "round_to"),
    "round_to 1.5": ({"round_to": 1.5}, "round_to"),
    "out of reach in steps": ({"round_to": 4096}, "round_to"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake: str) -> None:
    settings, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_budget_of_an_episode_counts_the_same_metrics() -> None:
    env = make(budget={"macs": 0.5, "params": 0.5})
    for budget, message in ((0.4, "dictionary"), ({"macs": 0.4}, "macs,params"), ({"memory": 0.5}, "memory")):
        with pytest.raises(ValueError, match=message):
            env.reset(options={"budget": budget})
    env.reset(options={"budget": {"params": 0.4, "macs": 0.4}})
    assert env.budgets == {"params": 0.4, "macs": 0.4}
    env.reset()
    assert env.budgets == {"macs": 0.5, "params": 0.5}


@pytest.mark.parametrize("landing", ["exact", "free"])
@pytest.mark.parametrize("round_to", [2, 4, 5])
def test_widths_are_multiples(round_to: int, landing: str) -> None:
    env = make(round_to=round_to, landing=landing)
    full, rng = env.network.widths, np.random.default_rng(0)
    for _ in range(3):
        env.reset()
        over = False
        while not over:
            action = rng.uniform(0, 1, env.action_space.shape) ** 0.5
            _, _, terminated, truncated, info = env.step(action)
            over, widths = terminated or truncated, info["widths"]
            assert ((widths % round_to == 0) | (widths == full)).all()
            assert (widths >= env.floors).all() and (widths < full).any()
        assert terminated and info["macs_ratio"] <= 0.5


def test_groups_smaller_than_a_multiple_stay_whole() -> None:
    env = make(round_to=12, budget=0.8)
    small = env.network.widths <= 12
    assert small.any() and not small.all()
    env.reset()
    widths = env.step(np.ones(env.action_space.shape))[4]["widths"]
    np.testing.assert_array_equal(widths[small], env.network.widths[small])


# ---- searches --------------------------------------------------------------------------------------------------


def test_result_says_how_good_the_prediction_was(tmp_path: Path, wide: nn.Module) -> None:
    env = gym.make("GNNRL-Prune-v0", model=wide, budget={"macs": 0.6, "latency": 0.9}, **SMALL)
    result = search(env, "uniform", 1, out=tmp_path / "run")
    again = SearchResult.load(tmp_path / "run")
    assert again == result and again.budget == {"macs": 0.6, "latency": 0.9} and again.metric == "macs,latency"
    latency, network = again.latency, env.unwrapped.network  # type: ignore[attr-defined]
    assert latency is not None and min(latency["measured"], latency["dense_measured"]) > 0
    assert latency["relative_error"] == pytest.approx(latency["predicted"] / latency["measured"] - 1)
    assert latency["predicted"] <= 0.9 * latency["dense_predicted"]
    assert again.memory_ratio == network.memory(result.widths) / network.memory(network.widths)


def test_without_latency_nothing_is_measured(cache: Path) -> None:
    env = gym.make("GNNRL-Prune-v0", **SMALL)
    assert search(env, "uniform", 1, out=cache / "run").latency is None
    assert list(cache.iterdir()) == [cache / "run"] and not (cache / "run" / "latency.json").exists()


def test_budgets_on_the_command_line() -> None:
    assert _budget(["0.5"]) == 0.5
    assert _budget(["macs=0.5,latency=0.6"]) == _budget(["macs=0.5", "latency=0.6"]) == {"macs": 0.5, "latency": 0.6}
    for wrong in (["half"], ["macs:0.5"], ["macs=0.5", "0.3"], ["macs=a"], ["macs=0.5", "macs=0.4"], [""]):
        with pytest.raises(ValueError, match="--budget"):
            _budget(wrong)


@pytest.mark.parametrize("settings", [{}, {"floor": 0.31}, {"metric": "params"}, {"metric": "memory", "floor": 0.7}])
def test_the_least_budget_that_is_said_is_enough(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"can't be met: .* at least 0\.\d+") as said:
        gym.make("GNNRL-Prune-v0", **SMALL, **settings, budget=1e-6)
    least = float(str(said.value).split("at least ")[1].split(",")[0])
    gym.make("GNNRL-Prune-v0", **SMALL, **settings, budget=least)
    with pytest.raises(ValueError, match="can't be met"):
        gym.make("GNNRL-Prune-v0", **SMALL, **settings, budget=least - 1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"metric": "memory", "budget": 0.4},
        {"budget": {"macs": 0.5, "memory": 0.6}},
        {"budget": 0.4, "max_steps": 20},
        {"budget": 0.5, "round_to": 2, "max_steps": 20},
    ],
)
def test_after_several_steps_no_unit_fits_back(settings: dict[str, Any]) -> None:
    """Memory hangs on a few groups: an early step may take from others for nothing."""
    env, rng, several = make(**settings), np.random.default_rng(0), 0
    env.evaluator._measure = lambda plan: 0.5
    for _ in range(10):
        env.reset()
        steps = 0
        while env.running:
            env.step(rng.uniform(0, 0.4, env.action_space.shape))
            steps += 1
        several += steps > 1
        assert env.within_budget() or steps == env.max_steps
        for group in np.flatnonzero(env.widths < env.network.widths) if env.within_budget() else ():
            wider = env.widths.copy()
            wider[group] = min(wider[group] + env.round_to, env.network.widths[group])
            assert not env.within_budget(wider)
    assert several > 4


# ---- benchmarks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "shown"), [("params", "parameters"), ("latency", "predicted latency | measured latency")]
)
def test_a_comparison_within_another_budget_has_a_record_of_its_own(
    metric: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_comparison, "ENVIRONMENTS", {"uniform": SMALL})
    options = Options(evaluations=2, metric=metric, budget=0.9, methods=("uniform",), runs=tmp_path)
    search_comparison._search(options, "uniform", 0, tmp_path / f"digits-resnet-{metric}-0.9-2")
    record = search_comparison.run(options)
    row = record["rows"][0]
    assert 0.5 < (row["params_ratio"] if metric == "params" else row["predicted_latency_ratio"]) <= 0.9
    assert f"| real MACs | {shown} |" in search_comparison.table(record)
    assert search_comparison.BENCHMARK.variant(options) == f"digits-resnet-{metric}-0.9-2"
