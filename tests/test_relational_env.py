"""GNNRL-Relational-v0: Gymnasium's rules, the lookup behind an action, and what a reward is."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env, data_equivalence
from torch import nn

from gnnrl_gym.envs.relational import RelationalEnv
from gnnrl_gym.relational import Masking
from gnnrl_gym.relational.training import BATCH, make_network
from gnnrl_gym.wrappers import PadGraph
from gnnrl_gym.zoo import load_data

ID = "GNNRL-Relational-v0"
SMALL: dict[str, Any] = {"model": "mlp-16-16", "density": 0.5, "nodes": 8, "pool_size": 12, "epochs": 2,
                         "device": "cpu"}  # fmt: skip
INFO = {"graph", "descriptors", "weights_ratio", "search_accuracy", "is_success", "evaluations"}


def make(**settings: Any) -> gym.Env[Any, Any]:
    return gym.make(ID, **{**SMALL, **settings})


def relational(env: gym.Env[Any, Any]) -> RelationalEnv:
    assert isinstance(env.unwrapped, RelationalEnv)
    return env.unwrapped


@pytest.fixture(scope="module")
def shared() -> RelationalEnv:
    return relational(make())


@pytest.fixture
def env(shared: RelationalEnv) -> RelationalEnv:
    shared.reset(seed=0)
    return shared


def rollout(env: Any, seed: int, episodes: int = 4) -> list[Any]:
    env.action_space.seed(seed)
    trace: list[Any] = []
    for episode in range(episodes):
        trace += [env.reset(seed=seed if episode == 0 else None), env.step(env.action_space.sample())]
    return trace


@pytest.mark.parametrize("action", ["descriptors", "index"])
def test_gymnasium_check(action: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(action=action, render_mode="ansi").unwrapped)


def test_defaults_need_no_arguments() -> None:
    env = gym.make(ID)
    env.reset(seed=0)
    _, reward, terminated, truncated, info = env.step(env.action_space.sample())
    assert terminated and not truncated
    assert reward == info["search_accuracy"] - 1 and info["search_accuracy"] > 0.5  # ten classes


def test_equal_seeds_give_equal_rollouts_also_from_a_pickle_and_from_json(env: RelationalEnv) -> None:
    again = pickle.loads(pickle.dumps(env))
    first = rollout(env, 3)
    assert data_equivalence(first, rollout(again, 3))
    assert data_equivalence(first, rollout(env, 3))  # a seed forgets what was seen
    assert not data_equivalence(first, rollout(env, 4))
    spec = make(nodes=9).spec
    assert spec is not None
    assert relational(gym.make(EnvSpec.from_json(spec.to_json()))).pool.graphs[0].number_of_nodes() == 9


def test_global_randomness_is_left_alone(env: RelationalEnv) -> None:
    env._scores.clear()
    torch.manual_seed(5)
    np.random.seed(5)
    rollout(env, 0, 1)
    drawn = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    assert torch.equal(drawn[0], torch.rand(3))
    np.testing.assert_array_equal(drawn[1], np.random.rand(3))


def test_info_has_the_same_keys_always(env: RelationalEnv) -> None:
    _, before = env.reset()
    *_, after = env.step(env.action_for(3))
    assert set(before) == set(after) == INFO
    assert (before["graph"], before["is_success"], before["evaluations"]) == (-1, False, 0)
    assert (after["graph"], after["is_success"], after["evaluations"]) == (3, True, 1)
    assert after["descriptors"] == env.pool.descriptors[3]


def test_every_graph_has_an_action_and_no_graph_answers_twice(env: RelationalEnv) -> None:
    assert [env.choose(env.action_for(index)) for index in range(12)] == list(range(12))
    action, answers = env.action_for(5), []
    for _ in range(12):
        env.reset()
        answers.append(env.step(action)[4]["graph"])
    assert answers[0] == 5 and sorted(answers) == list(range(12))
    env.reset()
    assert env.step(action)[4]["graph"] == 5  # all are seen: the lookup starts over


def test_index_actions_mean_the_graph_itself() -> None:
    env = relational(make(action="index"))
    for _ in range(2):
        env.reset()
        assert env.step(7)[4]["graph"] == 7
    assert env.evaluations == 2
    assert [env.choose(index) for index in (np.int64(7), np.array(7), np.uint8(7))] == [7] * 3


@pytest.mark.parametrize("action", [12, -1, 2.7, "3", True, None, np.array([3]), np.float32(3)])
def test_other_index_actions_are_refused(action: Any) -> None:
    env = relational(make(action="index"))
    with pytest.raises(ValueError, match="whole number from 0 to 11, got"):
        env.choose(action)


def test_observation_shows_what_was_seen(env: RelationalEnv) -> None:
    before, _ = env.reset()
    after, *_ = env.step(env.action_for(4))
    assert before.nodes.shape == (12, 11) and not before.nodes[:, -2:].any()
    assert after.nodes[4, -2] == 1 and after.nodes[4, -1] == np.float32(env.seen[4])
    assert not np.delete(after.nodes[:, -2:], 4, 0).any()
    np.testing.assert_array_equal(before.nodes[:, :-2], after.nodes[:, :-2])
    assert PadGraph(env).reset(seed=0)[0]["nodes"].shape == (12, 11)


def test_reward_is_the_accuracy_of_the_masked_network_on_the_search_split(env: RelationalEnv) -> None:
    accuracy = env.measure(2)
    model = env.trainer.train(env.pool.graphs[2], 2, 0)
    images, labels = load_data("digits").search.tensors()
    with torch.no_grad():
        assert accuracy == int((model(images).argmax(1) == labels).sum()) / len(labels)
    assert accuracy != env.measure(3)


class Scaling(nn.Module):
    """Scales its input, perhaps in place; gives a second answer in training."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.in_place = in_place
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)
        )

    def forward(self, x: torch.Tensor) -> Any:
        x = x.mul_(0.5).add_(1) if self.in_place else x * 0.5 + 1
        return (self.body(x), x) if self.training else self.body(x)


def test_a_forward_may_change_its_input_and_give_a_second_answer_in_training() -> None:
    scores = []
    for in_place in (False, True):
        env = relational(make(model=Scaling(in_place)))
        scores.append([env.measure(index) for index in (0, 1, 0)])
    assert scores[0] == scores[1]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, partial(torch.autocast, "cpu")])
def test_scores_are_the_same_whatever_the_caller_has_switched(env: RelationalEnv, context: Any) -> None:
    def scored() -> list[torch.Tensor]:
        model, outputs = env.trainer.train(env.pool.graphs[1], 2, 0), list[torch.Tensor]()
        model.register_forward_hook(lambda *given: outputs.append(given[-1]))
        env.trainer.search_accuracy(model)
        return outputs

    expected = scored()
    with context():
        found = scored()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_all_graphs_start_from_the_same_weights_and_seeds_differ(env: RelationalEnv) -> None:
    first, second = (env.trainer.fresh(env.pool.graphs[index], 0) for index in (0, 1))
    assert torch.equal(first[1].weight, second[1].weight)  # type: ignore[index]  # the stem is not masked
    assert not torch.equal(first[3].weight, second[3].weight)  # type: ignore[index]
    assert not torch.equal(first[1].weight, env.trainer.fresh(env.pool.graphs[0], 1)[1].weight)  # type: ignore[index]


def test_mean_over_training_seeds(env: RelationalEnv) -> None:
    one, two = (relational(make(train_seeds=count)).measure(0) for count in (1, 2))
    second = env.trainer.search_accuracy(env.trainer.train(env.pool.graphs[0], 2, 1))
    assert two == pytest.approx((one + second) / 2)


@pytest.mark.parametrize("scope", ["hidden", "network"])
def test_every_graph_is_within_the_density(scope: str) -> None:
    env = relational(make(model="mlp-19-17", scope=scope))
    masking = Masking.of(make_network("mlp-19-17", env.data, 0), scope)
    ratios = [env.facts(index)["weights_ratio"] for index in range(12)]
    assert max(ratios) <= 0.5 and min(ratios) > 0.4
    assert ratios == [masking.kept(graph) / masking.total for graph in env.pool.graphs]


def test_the_recipe_changes_the_training(env: RelationalEnv) -> None:
    settings: list[dict[str, Any]] = [{}, {"learning_rate": 0.05}, {"weight_decay": 0.01}, {"shift": 1}]
    scores = [[relational(make(**each)).measure(index) for index in range(3)] for each in settings]
    assert len({tuple(row) for row in scores}) == 4


def test_a_module_is_accepted_and_left_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(8, 10))  # fmt: skip
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    env = make(model=model, nodes=6, density=0.7, pool_size=4, epochs=1)
    env.reset()
    env.step(env.action_space.sample())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_an_image_that_is_left_over_is_trained_on_with_batch_norm() -> None:
    data = load_data("digits")
    few = replace(data, train=data.train.take(BATCH + 1))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.Linear(16, 10))
    seen: list[int] = []
    model[0].register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    env = relational(make(model=model, data=few, nodes=6, density=0.7, pool_size=4, epochs=2))
    seen.clear()
    env.trainer.train(env.pool.graphs[0], 2, 0)
    assert seen == [BATCH + 1] * 2


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "density": ({"density": 0.0}, "density"), "too sparse": ({"density": 0.2}, "more nodes"),
    "scope": ({"scope": "all"}, "hidden, network"), "nodes": ({"nodes": 20}, "too few for 20 nodes"),
    "pool": ({"pool_size": 1}, "pool_size"), "epochs": ({"epochs": 0}, "epochs"),
    "shift": ({"shift": -1}, "shift must"), "shift out of sight": ({"shift": 8}, "out of sight"),
    "not a density": ({"density": "a"}, "density must"),
    "no number": ({"learning_rate": float("nan")}, "learning_rate"),
    "no decay": ({"weight_decay": -1.0}, "weight_decay"), "no graph": ({"nodes": 1}, "nodes must"),
    "empty layer": ({"model": "mlp-0-5"}, "0 units"), "pool seed": ({"pool_seed": -1}, "pool_seed"),
    "half a node": ({"nodes": 8.5}, "nodes must"), "one hidden layer": ({"model": "mlp-16"}, "scope='network'"),
    "action": ({"action": "guess"}, "descriptors, index"), "model": ({"model": "mlp-"}, "no model is named"),
    "images": ({"model": "resnet20"}, "does not take the images of 'digits'"),
    "classes": ({"model": nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 3))},
                "10 classes"),
    "device": ({"device": "tpu9"}, "tpu9"), "render_mode": ({"render_mode": "human"}, "ansi"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_arguments_raise(mistake: str) -> None:
    settings, said = MISTAKES[mistake]
    with warnings.catch_warnings(), pytest.raises(ValueError, match=said):
        warnings.simplefilter("ignore")  # Gymnasium also warns of an unknown render mode
        make(**settings)


@pytest.mark.parametrize("action", [np.zeros(3), np.full(9, 1.2), np.full(9, np.nan)])
def test_wrong_actions_raise_and_change_nothing(env: RelationalEnv, action: np.ndarray) -> None:
    before = env.evaluations
    with pytest.raises(ValueError, match="action"):
        env.step(action)
    assert env.evaluations == before and not env.seen


def test_step_without_an_episode_raises(env: RelationalEnv) -> None:
    env.step(env.action_for(0))
    with pytest.raises(RuntimeError, match="reset"):
        env.step(env.action_for(0))
    with pytest.raises(ValueError, match="reset option"):
        env.reset(options={"budget": 0.5})


def test_render_names_the_descriptors(env: RelationalEnv) -> None:
    drawn = relational(make(render_mode="ansi"))
    drawn.reset(seed=0)
    drawn.step(drawn.action_for(1))
    assert "graph 1" in drawn.render() and "clustering_coefficient" in drawn.render()
    with pytest.raises(ValueError, match="render_mode"):
        env.render()
