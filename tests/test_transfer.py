"""One environment over several networks, and policies that move between them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from torch import nn
from typer.testing import CliRunner

from agents import search
from agents.cli import app
from agents.ppo import LAST_LOG_STD, make_ppo, ppo
from agents.recorder import LOG, PlanRecorder
from agents.sb3 import PruneVecEnv
from agents.train_cli import read_networks
from agents.transfer import read_policy, save_policy, train_policy, train_to_file
from gnnrl_gym.envs.prune import PruneEnv
from gnnrl_gym.evaluation.accuracy import PlanEvaluator
from gnnrl_gym.wrappers import PadGraph
from gnnrl_gym.zoo import load_data, load_model

FEW: dict[str, Any] = {"max_steps": 1, "search_images": 40, "recalibration_images": 32, "device": "cpu"}


class Small(nn.Sequential):
    """Two groups, unlike the digits network's nine."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(96, 10),
        )  # fmt: skip


@pytest.fixture(scope="module")
def many() -> Any:
    data = load_data("digits")
    return gym.make("GNNRL-PruneMany-v0", networks=[PruneEnv(**FEW), PruneEnv(Small(), data, **FEW)])


@pytest.fixture(scope="module")
def policy(many: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "policy.pt"
    save_policy(train_policy(many, 40, seed=0), path, {"networks": ["digits-resnet", "small"]})
    return path


def test_seeds_of_numpy_are_seeds(many: Any, tmp_path: Path) -> None:
    train_to_file(many, tmp_path / "policy.pt", np.int64(2), np.int64(1))  # type: ignore[arg-type]
    record = json.loads((tmp_path / "policy.pt.training" / "result.json").read_text())
    assert (record["evaluations"], record["seed"]) == (2, 1)


def test_training_leaves_global_randomness_alone(many: Any) -> None:
    expected = random.Random(5).random(), np.random.RandomState(5).rand(), torch.Generator().manual_seed(5)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    train_policy(many, 2, seed=1)
    assert (random.random(), np.random.rand()) == expected[:2]
    assert torch.equal(torch.rand(3), torch.rand(3, generator=expected[2]))


def test_gymnasium_takes_it() -> None:
    check_env(gym.make("GNNRL-PruneMany-v0", networks=[FEW, {**FEW, "floor": 0.3}]).unwrapped, skip_render_check=True)


def test_rebuilt_from_its_spec() -> None:
    env = gym.make("GNNRL-PruneMany-v0", networks=[FEW], budgets=(0.4, 0.5))
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))  # type: ignore[union-attr]
    np.testing.assert_array_equal(env.reset(seed=3)[0].nodes, again.reset(seed=3)[0].nodes)


def test_every_network_and_many_budgets_come_up(many: Any) -> None:
    seen, shapes = set(), set()
    many.reset(seed=0)
    for _ in range(20):
        observation, info = many.reset()
        seen.add(info["network"])
        shapes.add((many.unwrapped.action_space.shape, len(observation.nodes)))
        assert 0.3 <= many.unwrapped.inner.budget <= 0.7
    assert seen == {0, 1} and len(shapes) == 2


def test_gymnasium_stacks_networks_of_different_sizes(many: Any) -> None:
    env = gym.vector.SyncVectorEnv([lambda: PadGraph(many.unwrapped.slots(1)[0])] * 2)
    _, infos = env.reset(options={"network": 1})
    np.testing.assert_array_equal(infos["widths"], [[8, 6, *[0] * 7]] * 2)


def test_made_environments_come_wrapped_render_and_count_once() -> None:
    made = gym.make("GNNRL-Prune-v0", **FEW)
    env: Any = gym.make("GNNRL-PruneMany-v0", networks=[made, made], render_mode="ansi")
    env.reset(seed=0)
    env.step(np.ones(env.unwrapped.action_space.shape, np.float32))
    assert env.unwrapped.evaluations == 1 and "conv" in env.render()
    assert made.unwrapped.render_mode is None
    with pytest.raises(TypeError, match="networks holds arguments of GNNRL-Prune-v0"):
        gym.make("GNNRL-PruneMany-v0", networks=["resnet20"])


def test_options_decide(many: Any) -> None:
    _, info = many.reset(options={"network": 1, "budget": 0.45})
    assert info["network"] == 1 and many.unwrapped.inner.budget == 0.45
    with pytest.raises(ValueError, match="2 networks"):
        many.reset(options={"network": 2})
    with pytest.raises(ValueError, match="'nets'"):
        many.reset(options={"nets": 2})


def test_a_budget_that_some_network_can_not_meet_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"networks\[1\], with the lowest of the budgets: .*0\.3"):
        gym.make("GNNRL-PruneMany-v0", networks=[FEW, {**FEW, "floor": 0.6}], budgets=(0.3, 0.7))
    several = {**FEW, "budget": {"macs": 0.5, "params": 0.5}}
    with pytest.raises(ValueError, match=r"networks\[0\].*macs,params"):
        gym.make("GNNRL-PruneMany-v0", networks=[several])


@pytest.mark.parametrize("wrong", [{"networks": []}, {"budgets": (0.6, 0.5)}, {"budgets": (0.0, 0.5)}])
def test_nonsense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"networks|budgets"):
        gym.make("GNNRL-PruneMany-v0", **{"networks": [FEW], **wrong})


def test_slots_of_a_batch_draw_the_same(many: Any) -> None:
    env = PruneVecEnv(many, 4)
    env.seed(7)
    env.reset()
    drawn = []
    for _ in range(6):
        slots = [each.unwrapped for each in env.envs]
        drawn.append({(slot.network_index, round(slot.inner.budget, 6)) for slot in slots})  # type: ignore[attr-defined]
        env.step(np.ones((4, *(env.action_space.shape or ())), np.float32))
    assert all(len(batch) == 1 for batch in drawn)
    assert len(set().union(*drawn)) == 6


def test_other_layers_leave_no_offsets_by_position(many: Any) -> None:
    kwargs = {"features_extractor_kwargs": {"hidden": 16}}
    agent = train_policy(many, 10, policy_kwargs=kwargs)
    assert agent.policy.node_bias is None and agent.policy.features_extractor.hidden == 16  # type: ignore[union-attr]


def test_long_episodes_are_refused() -> None:
    with pytest.raises(ValueError, match="max_steps=1"):
        train_policy(gym.make("GNNRL-PruneMany-v0", networks=[{**FEW, "max_steps": 2}]), 4)


def test_the_first_plan_is_the_policys(policy: Path, digits_env: gym.Env[Any, Any]) -> None:
    plans = [search(digits_env, "ppo", 1, seed=seed, policy=policy).widths for seed in (0, 1)]
    assert plans[0] == plans[1]
    fresh = search(digits_env, "ppo", 1, seed=0).widths
    assert plans[0] != fresh


def test_the_search_goes_on_from_there(policy: Path, digits_env: gym.Env[Any, Any], tmp_path: Path) -> None:
    first = search(digits_env, "ppo", 1, seed=0, policy=policy).widths
    search(digits_env, "ppo", 12, 0, tmp_path / "run", policy=policy)
    plans = [json.loads(line)["widths"] for line in (tmp_path / "run" / LOG).read_text().splitlines()]
    assert plans[0] == first and len(plans) == 12
    assert len({tuple(plan) for plan in plans}) > 6


def test_plans_that_score_alike_teach_nothing(
    policy: Path, digits_env: gym.Env[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Normalised, the rounding of their advantages would be as large as any difference."""
    monkeypatch.setattr(PlanEvaluator, "score", lambda self, widths: 0.5)
    monkeypatch.setattr(PlanEvaluator, "prefetch", lambda self, plans: None)
    digits_env.reset(seed=0)
    agent = ppo(PlanRecorder(digits_env, 61), seed=0, policy=policy)
    assert not agent.policy.state_dict()["node_bias"].any()


def test_what_the_policy_knows_stays(policy: Path, digits_env: gym.Env[Any, Any]) -> None:
    """Only the offsets of the groups are learned, and the value of the state."""
    digits_env.reset(seed=0)
    agent = ppo(PlanRecorder(digits_env, 13), seed=0, policy=policy)
    learned, known = agent.policy.state_dict(), read_policy(policy)[0]
    assert learned["node_bias"].any()
    kept = [name for name in known if "value_net" not in name and name != "log_std"]
    assert len(kept) > 20 and all(torch.equal(learned[name].cpu(), known[name]) for name in kept)


@pytest.mark.parametrize("first", [-0.2, -1.0])
def test_exploration_narrows_from_where_it_is_asked_to(first: float, policy: Path, digits_env: Any) -> None:
    kwargs = {"log_std_init": first}
    agent = ppo(PlanRecorder(digits_env, 12), 0, policy=policy, batch_size=6, policy_kwargs=kwargs)
    expected = first + 7 / 12 * (LAST_LOG_STD - first)  # the second six begin after the mean plan and the first six
    np.testing.assert_allclose(agent.policy.log_std.detach().numpy(), expected, rtol=1e-5)  # type: ignore[union-attr]


def test_a_policy_file_is_small_and_safe(policy: Path) -> None:
    assert policy.stat().st_size < 1_000_000
    state, about = read_policy(policy)
    assert "node_bias" not in state and about["networks"] == ["digits-resnet", "small"]
    assert torch.load(policy, weights_only=True)


def test_offsets_by_position_stay_with_their_network(digits_env: gym.Env[Any, Any], tmp_path: Path) -> None:
    agent = make_ppo(PruneVecEnv(digits_env, 2), device="cpu", batch_size=2)
    assert agent.policy.node_bias is not None  # type: ignore[union-attr]
    save_policy(agent, tmp_path / "policy.pt")
    assert "node_bias" not in read_policy(tmp_path / "policy.pt")[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"about": "[[]]"}, "no policy file"), ({"state": {"x": torch.tensor(torch.nan)}}, "holds NaN or infinity")],
)
def test_damaged_policies_are_refused(policy: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    torch.save(torch.load(policy, weights_only=True) | changes, tmp_path / "policy.pt")
    with pytest.raises(ValueError, match=message):
        read_policy(tmp_path / "policy.pt")


def test_other_files_are_refused(policy: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gnnrl train"):
        read_policy(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no policy")
    with pytest.raises(
        ValueError, match=r"no policy file of `gnnrl train`: it is no file of tensors, or damaged: \w+$"
    ):
        read_policy(tmp_path / "text.pt")
    content = torch.load(policy, weights_only=True)
    about = json.loads(content["about"]) | {"features": ["one"]}
    torch.save({**content, "about": json.dumps(about)}, tmp_path / "old.pt")
    with pytest.raises(ValueError, match="other graph features"):
        read_policy(tmp_path / "old.pt")


def test_other_layers_are_refused(policy: Path, tmp_path: Path, digits_env: gym.Env[Any, Any]) -> None:
    content = torch.load(policy, weights_only=True)
    content["state"].pop("log_std")
    torch.save(content, tmp_path / "part.pt")
    with pytest.raises(ValueError, match="other layers"):
        search(digits_env, "ppo", 1, policy=tmp_path / "part.pt")


def test_command_line(tmp_path: Path) -> None:
    networks, out = tmp_path / "networks.json", tmp_path / "policy.pt"
    networks.write_text(json.dumps([{key: value for key, value in FEW.items() if key != "max_steps"}]))
    ran = CliRunner().invoke(app, ["train", str(networks), "--out", str(out), "--evaluations", "10"])
    assert ran.exit_code == 0, ran.output
    run = ["search", "--policy", str(out), "--evaluations", "1", "--finetune", "0", "--search-images", "40"]
    ran = CliRunner().invoke(app, [*run, "--out", str(tmp_path / "run")])
    assert ran.exit_code == 0, ran.output
    assert json.loads((tmp_path / "run" / "result.json").read_text())["evaluations"] == 1


def test_an_interrupted_training_goes_on(
    many: Any, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(27, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train_policy(many, 40, seed=0, out=tmp_path)
    assert {json.loads(line)["network"] for line in (tmp_path / LOG).read_text().splitlines()} == {0, 1}
    measured: list[Any] = []
    measure = PlanEvaluator._measure
    monkeypatch.setattr(PlanEvaluator, "_measure", lambda self, plan: measured.append(plan) or measure(self, plan))
    agent = train_policy(many, 40, seed=0, out=tmp_path, resume=True)
    assert 0 < len(measured) <= 40 - 27
    whole = torch.load(policy, weights_only=True)["state"]
    for name, value in agent.policy.state_dict().items():
        torch.testing.assert_close(value, whole[name], rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"seed=0, not 1: go on"):
        train_policy(many, 40, seed=1, out=tmp_path, resume=True)


def interrupt_at(evaluations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C once, after so many evaluations of a recorder, in a process that remembers nothing of others."""
    step_in, pressed = PlanRecorder.step_in, []

    def step(self: PlanRecorder, slot: Any, action: Any) -> Any:
        if self.spent == evaluations and not pressed:
            pressed.append(True)
            for each in self.unwrapped.envs:  # type: ignore[attr-defined]
                each.evaluator._scores.clear()
            raise KeyboardInterrupt
        return step_in(self, slot, action)

    monkeypatch.setattr(PlanRecorder, "step_in", step)


def test_the_same_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    networks, out = tmp_path / "networks.json", tmp_path / "policy.pt"
    networks.write_text(json.dumps([{key: value for key, value in FEW.items() if key != "max_steps"}]))
    train = ["train", str(networks), "--out", str(out), "--evaluations", "20"]
    interrupt_at(12, monkeypatch)
    ran = CliRunner().invoke(app, train)
    assert ran.exit_code == 130 and "the same command goes on" in ran.output and not out.exists()
    ran = CliRunner().invoke(app, train)
    assert ran.exit_code == 0 and out.is_file(), ran.output
    assert len((tmp_path / "policy.pt.training" / LOG).read_text().splitlines()) == 20
    out.unlink()  # a finished training is not gone through again: its data may be others by now
    ran = CliRunner().invoke(app, train)
    assert isinstance(ran.exception, FileExistsError) and "policy.pt.training' is there already" in str(ran.exception)


@pytest.mark.parametrize(("key", "mend"), [("budget", "--budgets"), ("max_steps", "one step")])
def test_what_the_training_decides_is_refused_in_the_file(tmp_path: Path, key: str, mend: str) -> None:
    (tmp_path / "networks.json").write_text(json.dumps([{"model": "digits-resnet", key: 2}]))
    with pytest.raises(ValueError, match=f"network 1 has '{key}', but .*{mend}"):
        read_networks(tmp_path / "networks.json")


def test_a_training_on_other_weights_is_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def many(seed: int) -> Any:
        model = load_model("digits-resnet", "random", seed=seed)
        return gym.make("GNNRL-PruneMany-v0", networks=[PruneEnv(model, **FEW)])

    interrupt_at(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train_policy(many(0), 40, out=tmp_path)
    with pytest.raises(ValueError, match="other weights of the network") as raised:
        train_policy(many(1), 40, out=tmp_path, resume=True)
    assert len(str(raised.value)) < 400
