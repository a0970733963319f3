"""GNNRL-Prune-v0: Gymnasium's rules, the contract of the design, what is refused, and how plans are scored."""

from __future__ import annotations

import copy
import pickle
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env, data_equivalence
from stable_baselines3.common.env_checker import check_env as check_sb3_env
from torch import nn

from agents import make_sb3_env
from gnnrl_gym.envs.prune import PruneEnv
from gnnrl_gym.evaluation.accuracy import PlanEvaluator, logits
from gnnrl_gym.zoo import load_data, load_model

ID = "GNNRL-Prune-v0"
SMALL: dict[str, Any] = {"search_images": 100, "recalibration_images": 64, "device": "cpu"}
INFO = {"widths", "macs_ratio", "params_ratio", "search_accuracy", "is_success", "evaluations"}

Env = Any  # a pruning environment, wrapped by gym.make


def make(**settings: Any) -> Env:
    return gym.make(ID, **{**SMALL, **settings})


@pytest.fixture
def env(digits_env: Env) -> Env:
    """The small default environment, at the start of an episode."""
    digits_env.reset(seed=0)
    return digits_env


@pytest.fixture(scope="module")
def free() -> Iterator[Env]:
    """Free landing, three steps, budget of parameters."""
    made = make(landing="free", max_steps=3, metric="params")
    yield made
    made.close()


def prune(env: Env) -> Any:
    assert isinstance(env.unwrapped, PruneEnv)
    return env.unwrapped


def ratios(env: Env, value: float) -> np.ndarray:
    return np.full(env.action_space.shape, value, np.float32)


def rollout(env: Env, seed: int, episodes: int = 2) -> list[Any]:
    env.action_space.seed(seed)
    trace: Any = []
    for episode in range(episodes):
        trace.append(env.reset(seed=seed if episode == 0 else None))
        over = False
        while not over:
            trace.append(env.step(env.action_space.sample() / 3))
            over = trace[-1][2] or trace[-1][3]
    return trace


# ---- Gymnasium's rules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"render_mode": "ansi"}, {"render_mode": "rgb_array"}, {"landing": "free"}], ids=str
)
def test_gymnasium_check(settings: dict[str, Any]) -> None:
    made = make(**settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # matplotlib and torch may warn of what they do among themselves
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="matplotlib|torch")
        check_env(made.unwrapped, skip_render_check=not settings.get("render_mode"))


def test_sb3_check(env: Env) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # advice for policies of SB3's own: a graph has rows
        warnings.filterwarnings("ignore", message=r"Your observation \w+ has an unconventional shape")
        check_sb3_env(make_sb3_env(env))


def test_equal_seeds_give_equal_rollouts_also_from_a_pickle(env: Env) -> None:
    again = pickle.loads(pickle.dumps(env.unwrapped))
    first, second = rollout(env.unwrapped, 3), rollout(again, 3)
    assert len(first) == len(second) > 3
    assert data_equivalence(first, second)
    assert not data_equivalence(first, rollout(env.unwrapped, 4))


def test_spec_round_trip() -> None:
    made = make(budget=0.4, metric="params", importance="l1", floor=0.2)
    spec = EnvSpec.from_json(made.spec.to_json())
    again = prune(gym.make(spec))
    assert (again.budget, again.metric, again.arguments["importance"]) == (0.4, "params", "l1")
    np.testing.assert_array_equal(again.floors, prune(made).floors)
    assert data_equivalence(rollout(made.unwrapped, 1, 1), rollout(again, 1, 1))


def test_global_randomness_is_left_alone(env: Env) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    rollout(env, 0, 1)
    drawn = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    assert torch.equal(drawn[0], torch.rand(3))
    np.testing.assert_array_equal(drawn[1], np.random.rand(3))


# ---- the contract ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(4))
def test_exact_landing_is_just_within_the_budget(env: Env, budget: float, seed: int) -> None:
    env.reset(options={"budget": budget})
    action = np.random.default_rng(seed).uniform(0.6, 1, env.action_space.shape).astype(np.float32)
    observation, reward, terminated, truncated, info = env.step(action)
    assert terminated and not truncated and info["is_success"]
    assert budget - 0.03 < info["macs_ratio"] <= budget
    assert reward == info["search_accuracy"] - 1
    assert env.observation_space.contains(observation)
    network = prune(env).network
    assert info["macs_ratio"] == network.macs(info["widths"]) / network.macs(network.widths)
    assert info["params_ratio"] == network.params(info["widths"]) / network.params(network.widths)


@pytest.mark.parametrize("metrics", [["macs"], ["macs", "params"]])
def test_a_budget_of_exactly_a_plan_is_landed_on(metrics: list[str]) -> None:
    """Products and quotients of the same floats are rounded to either side of each other."""
    env = make(budget=dict.fromkeys(metrics, 0.5))
    inner, rng = prune(env), np.random.default_rng(0)
    for _ in range(60):
        action = rng.uniform(0.2, 1, env.action_space.shape)
        env.reset(options={"budget": dict.fromkeys(metrics, rng.uniform(0.3, 0.9))})
        plan = inner._shrink(action)[1]
        env.reset(options={"budget": {metric: inner.meter.ratio(metric, plan) for metric in metrics}})
        np.testing.assert_array_equal(inner.peek(action), plan)


def test_a_removed_share_as_a_budget_is_landed_on(env: Env) -> None:
    env.reset(options={"budget": 1 - 308608 / 410432})  # a quarter of the MACs, a rounding below that plan's own share
    assert env.step(ratios(env, 1.0))[2]


def test_small_steps_end_on_the_budget_too(env: Env) -> None:
    rewards, over = [], False
    while not over:
        _, reward, terminated, truncated, info = env.step(ratios(env, 0.12))
        rewards.append(reward)
        over = terminated or truncated
    assert terminated and len(rewards) > 1
    assert rewards[:-1] == [0] * (len(rewards) - 1)
    assert -1 <= rewards[-1] < 0
    assert 0.47 < info["macs_ratio"] <= 0.5


def test_reward_is_the_accuracy_of_the_network_that_slim_builds(env: Env) -> None:
    info = env.step(ratios(env, 0.8))[4]
    inner = prune(env)
    x, y = inner.data.search.take(100).tensors()
    assert info["search_accuracy"] == pytest.approx((logits(inner.slim(), x).argmax(1) == y).double().mean().item())


def test_steps_run_out(env: Env) -> None:
    steps = [env.step(ratios(env, 0.0)) for _ in range(5)]
    assert [s[1] for s in steps] == [0, 0, 0, 0, -1]
    assert [s[3] for s in steps] == [False] * 4 + [True]
    assert not any(s[2] or s[4]["is_success"] for s in steps)
    np.testing.assert_array_equal(steps[-1][4]["widths"], prune(env).network.widths)


def test_free_landing_crosses(free: Env) -> None:
    free.reset(seed=0)
    _, reward, terminated, _, info = free.step(ratios(free, 0.7))
    full = prune(free).network.widths
    np.testing.assert_allclose(info["widths"], 0.3 * full, atol=0.51)
    assert terminated and info["params_ratio"] < 0.2
    assert reward == info["search_accuracy"] - 1


def test_free_landing_never_goes_below_the_floors(free: Env) -> None:
    free.reset(seed=0)
    info = free.step(ratios(free, 1.0))[4]
    np.testing.assert_array_equal(info["widths"], prune(free).floors)
    assert (info["widths"] >= 1).all()


def test_kept_share_is_multiplied_step_by_step(free: Env) -> None:
    free.reset(seed=0)
    first, second = (free.step(ratios(free, 0.1))[4]["widths"] for _ in range(2))
    full = prune(free).network.widths
    np.testing.assert_array_equal(first, np.floor(0.9 * full + 0.5))
    np.testing.assert_allclose(second, 0.81 * full, atol=0.51)


def test_info_has_the_same_keys_always(env: Env) -> None:
    infos = [entry[-1] for entry in rollout(env, 0)]
    assert all(set(info) == INFO for info in infos)
    assert all(type(info["widths"]) is np.ndarray and info["widths"].dtype == np.int64 for info in infos)


def test_widths_of_an_info_are_the_callers_own(env: Env) -> None:
    info = env.step(ratios(env, 0.05))[4]
    before = info["widths"].copy()
    info["widths"][:] = 1
    np.testing.assert_array_equal(prune(env).widths, before)


def test_every_scored_plan_is_counted(env: Env) -> None:
    inner = prune(env)
    start = inner.evaluations
    env.step(ratios(env, 0.0))
    assert inner.evaluations == start
    assert env.step(ratios(env, 0.9))[4]["search_accuracy"] >= 0
    assert inner.evaluations == start + 1
    inner.evaluate(inner.widths)  # known already, and asked for all the same
    assert inner.evaluations == start + 2


def test_reset_gives_the_dense_network_back(env: Env) -> None:
    env.step(ratios(env, 0.9))
    observation, info = env.reset()
    np.testing.assert_array_equal(info["widths"], prune(env).network.widths)
    assert info["macs_ratio"] == info["params_ratio"] == 1
    assert not info["is_success"]
    dense = prune(env).network.graph(info["widths"], prune(env).budget)
    np.testing.assert_array_equal(observation.nodes, dense.nodes)


def test_budget_option_holds_for_one_episode(env: Env) -> None:
    observation, _ = env.reset(options={"budget": 0.3})
    np.testing.assert_allclose(observation.nodes[:, -1], 0.3)
    assert env.step(ratios(env, 0.9))[4]["macs_ratio"] <= 0.3
    env.reset()
    assert prune(env).budget == 0.5


@pytest.mark.parametrize(
    "options", [{"budget": 0}, {"budget": 1.0}, {"budget": float("nan")}, {"budget": 1e-6}, {"speed": 3}], ids=str
)
def test_wrong_reset_options_raise(env: Env, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        env.reset(options=options)


def wrong_actions(size: int) -> dict[str, Any]:
    ones = np.full(size, 0.5)
    at = np.arange(size) == size - 1
    return {
        "nan": np.where(at, np.nan, ones), "inf": np.where(at, np.inf, ones), "minus inf": np.where(at, -np.inf, ones),
        "too short": ones[:-1], "too long": np.append(ones, 0.5), "a row": ones[None], "a number": 0.5,
        "negative": np.where(at, -0.1, ones), "above one": np.where(at, 1.1, ones), "None": None,
    }  # fmt: skip


@pytest.mark.parametrize("mistake", wrong_actions(3))
def test_wrong_actions_raise_and_change_nothing(env: Env, mistake: str) -> None:
    inner = prune(env)
    env.step(ratios(env, 0.05))
    widths, evaluations = inner.widths.copy(), inner.evaluations
    with pytest.raises(ValueError, match=r"[Aa]ction|ratio"):
        inner.step(wrong_actions(len(widths))[mistake])
    np.testing.assert_array_equal(inner.widths, widths)
    assert inner.evaluations == evaluations
    for steps_left in (3, 2, 1, 0):  # the step was not counted either
        assert inner.step(ratios(env, 0.0))[3] == (steps_left == 0)


def test_step_without_an_episode_raises(env: Env) -> None:
    env.step(ratios(env, 0.9))
    with pytest.raises(RuntimeError, match="reset"):
        env.unwrapped.step(ratios(env, 0.1))
    with pytest.raises(RuntimeError, match="reset"):
        pickle.loads(pickle.dumps(env.unwrapped)).step(ratios(env, 0.1))


def test_ansi_render_names_every_group() -> None:
    made = make(render_mode="ansi")
    made.reset(seed=0)
    made.step(ratios(made, 0.9))
    lines = made.render().splitlines()
    network = prune(made).network
    assert len(lines) == len(network.widths) + 1
    for name, kept, line in zip(network.group_names, prune(made).widths, lines, strict=False):
        assert name in line and f"{kept} /" in line
    assert "search accuracy" in lines[-1]


def test_rgb_render_is_an_image_that_follows_the_plan() -> None:
    made = make(render_mode="rgb_array")
    made.reset(seed=0)
    first = made.render()
    made.step(ratios(made, 0.9))
    second = made.render()
    assert first.dtype == np.uint8 and first.ndim == 3 and first.shape[2] == 3
    assert first.shape == second.shape and (first != second).any()


def test_render_without_a_mode_raises(env: Env) -> None:
    with pytest.raises(ValueError, match="render_mode"):
        prune(env).render()


# ---- the constructor -------------------------------------------------------------------------------------------


class Answering(nn.Module):
    """A network with a forward of the caller's."""

    def __init__(self, answer: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.answer = nn.Linear(64, 10), answer

    def forward(self, x: torch.Tensor) -> Any:
        return self.answer(self.linear(x.flatten(1)))


def refuse(x: torch.Tensor) -> None:
    raise AssertionError("only 224 x 224")  # what torchvision's transformers raise


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "several outputs": ({"model": Answering(lambda x: (x, x))}, "answers with a tuple.*returns that alone"),
    "images that a forward refuses": ({"model": Answering(refuse)}, "images of 'digits'.*only 224 x 224"),
    "budget 0": ({"budget": 0}, "budget"),
    "budget 1.5": ({"budget": 1.5}, "budget"),
    "budget nan": ({"budget": float("nan")}, "budget"),
    "unreachable budget": ({"budget": 0.1, "floor": 0.9}, "budget.*floor"),
    "unreachable after training": ({"budget": 0.1, "floor": 0.9, "objective": "pretrained"}, "budget.*floor"),
    "metric": ({"metric": "flops"}, "metric.*macs, params"),
    "landing": ({"landing": "soft"}, "landing.*exact, free"),
    "importance": ({"importance": "best"}, "importance.*l1"),
    "floor 1": ({"floor": 1.0}, "floor"),
    "floor negative": ({"floor": -0.1}, "floor"),
    "floor of letters": ({"floor": "a"}, "floor is a share of units.*'a'"),
    "no steps": ({"max_steps": 0}, "max_steps"),
    "steps of letters": ({"max_steps": "a"}, "max_steps must be a whole number.*'a'"),
    "half a step": ({"max_steps": 1.5}, "max_steps"),
    "objective": ({"objective": "oracle"}, "objective.*untrained, pretrained"),
    "granularity": ({"granularity": "foo"}, "granularity.*unstructured"),
    "no search images": ({"search_images": 0}, "search_images"),
    "one recalibration image": ({"recalibration_images": 1}, "recalibration_images"),
    "model name": ({"model": "resnet21", "data": "digits"}, "resnet20"),
    "data name": ({"data": "digit"}, "digits"),
    "data mismatch": ({"model": "resnet20"}, r"resnet20|images of 'digits'"),
    "wrong number of classes": ({"model": load_model("digits-resnet", "random", 7)}, "10 classes"),
    "device": ({"device": "tpu9"}, "device"),
    "render mode": ({"render_mode": "human"}, "render_mode"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_arguments_raise_before_work(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: Any) -> None:
        raise AssertionError("plans were scored, or weights trained, before the arguments were checked")

    monkeypatch.setattr("gnnrl_gym.evaluation.objectives.train", work)
    monkeypatch.setattr(PlanEvaluator, "score", work)
    monkeypatch.setattr(PlanEvaluator, "sensitivity", work)
    settings, message = WRONG[mistake]
    with pytest.raises(ValueError, match=message):
        PruneEnv(**{**SMALL, **settings})


def test_missing_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="GPU"):
        PruneEnv(device="cuda")
    assert PruneEnv(search_images=10, recalibration_images=10, device="auto").device.type == "cpu"


def test_module_and_data_objects_are_accepted_and_left_alone(env: Env) -> None:
    model, data = load_model("digits-resnet").train(), load_data("digits")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made = make(model=model, data=data)
    made.reset(seed=0)
    env.reset(seed=0)
    given, named = made.step(ratios(made, 0.8)), env.step(ratios(env, 0.8))
    assert data_equivalence(given, named)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize("name", ["Prune", "Mask", "Relational"])
def test_what_the_caller_does_with_the_module_later_is_not_seen_by_copies(name: str) -> None:
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(64, 64) for _ in range(3)), nn.Linear(64, 10))
    few: dict[str, Any] = {"pool_size": 4} if name == "Relational" else {"search_images": 50}
    env = gym.make(f"GNNRL-{name}-v0", model=model, **few).unwrapped
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for twin in (copy.deepcopy(env), pickle.loads(pickle.dumps(env))):
        assert any(parameter.any() for parameter in twin.arguments["model"].parameters())


def test_step_without_evaluation_is_quick() -> None:
    # the data's images are 8x8 and grey: a network of the size of ResNet-56 for them
    from gnnrl_gym.zoo.resnet import CifarResNet

    inner: Any = PruneEnv(model=CifarResNet(9, in_channels=1), max_steps=50, search_images=10, recalibration_images=10)
    inner.reset(seed=0)
    action, seconds = np.full(inner.action_space.shape, 0.001, np.float32), []
    for _ in range(30):
        start = time.perf_counter()
        inner.step(action)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.02  # 2 ms, with room for a busy machine


def test_plans_may_be_lists(digits_env: gym.Env[Any, Any]) -> None:
    env: Any = digits_env.unwrapped
    plan = env.network.widths // 2
    assert env.evaluate(plan.tolist()) == env.evaluate(plan)
    assert env.cost_ratio(plan.tolist()) == env.cost_ratio(plan)
    assert env.within_budget(plan.tolist()) == env.within_budget(plan)
    assert [p.shape for p in env.slim(plan.tolist()).parameters()] == [p.shape for p in env.slim(plan).parameters()]


@pytest.mark.parametrize("wrong", [[1, 2], [0.5] * 9, [[4] * 9] * 2, [0] * 9, "half"])
def test_what_is_no_plan_is_refused_and_not_counted(digits_env: gym.Env[Any, Any], wrong: Any) -> None:
    env: Any = digits_env.unwrapped
    before = env.evaluations
    for ask in (env.evaluate, env.slim, env.cost_ratio, env.within_budget):
        with pytest.raises(ValueError, match=r"plan|Width"):
            ask(wrong)
    assert env.evaluations == before


def test_what_is_evaluated_aside_is_no_score_of_the_episode() -> None:
    env: Any = gym.make("GNNRL-Prune-v0", landing="free", search_images=40, device="cpu").unwrapped
    env.reset()
    env.evaluate(env.floors)
    *_, info = env.step(np.zeros(env.action_space.shape))
    assert info["search_accuracy"] == -1 and not info["is_success"]
