"""GNNRL-Mask-v0: Gymnasium's rules, exact masks, and what each objective scores."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import assert_close, images, outputs, randomise
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env, data_equivalence
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gnnrl_gym.envs.mask import MaskEnv
from gnnrl_gym.evaluation.accuracy import accuracy, logits
from gnnrl_gym.evaluation.linear_chain import LinearChain
from gnnrl_gym.evaluation.objectives import ObjectiveEvaluator
from gnnrl_gym.evaluation.training import DEFAULT, Recipe, train
from gnnrl_gym.pruning.masks import digest, group_of, kept_units, same_counts, top_mask, widths_of
from gnnrl_gym.pruning.recalibration import recalibrate
from gnnrl_gym.pruning.sparsity import make_network
from gnnrl_gym.zoo import load_data, load_model

ID = "GNNRL-Mask-v0"
SMALL: dict[str, Any] = {"search_images": 100, "recalibration_images": 64, "device": "cpu"}


def make(**changes: Any) -> Any:
    return gym.make(ID, **{**SMALL, **changes})


def chain(*sizes: int, seed: int = 0) -> nn.Sequential:
    """A small network of linear layers for the digits."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@pytest.fixture(scope="module")
def env() -> Any:
    made = make()
    yield made
    made.close()


# ---- masks -----------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.data())
def test_masks_are_exact_and_leave_no_layer_empty(sizes: list[int], data: Any) -> None:
    widths = np.array(sizes)
    keep = data.draw(st.integers(len(sizes), int(widths.sum())))
    few = st.lists(st.integers(-2, 2), min_size=int(widths.sum()), max_size=int(widths.sum()))  # many ties
    scores = np.array(data.draw(few), np.float64)
    kept = top_mask(scores, keep, widths)
    assert kept.dtype == bool and kept.sum() == keep
    assert (widths_of(kept, widths) >= 1).all() and widths_of(kept, widths).sum() == keep
    # whoever stays without being its layer's best is no worse than anyone who goes
    of = group_of(widths)
    best = np.array([scores[of == group].max() for group in range(len(widths))])[of]
    if (kept & (scores < best)).any() and not kept.all():
        assert scores[kept & (scores < best)].min() >= scores[~kept].max()


def test_plain_top_k_where_no_layer_would_be_empty() -> None:
    scores = np.random.default_rng(0).random(960)
    widths = np.array([64, 128, 256, 512])
    assert set(np.flatnonzero(top_mask(scores, 480, widths))) == set(np.argsort(scores)[-480:])


def test_a_mask_is_its_own_choice() -> None:
    mask = np.random.default_rng(0).permutation(20) < 7
    np.testing.assert_array_equal(top_mask(mask.astype(np.float32), 7, np.array([20])), mask)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 0.99])
def test_impossible_sparsity(sparsity: float) -> None:
    with pytest.raises(ValueError, match="sparsity"):
        kept_units(np.array([10, 10, 10]), sparsity)


def test_one_unit_of_each_layer_is_the_least_that_can_stay() -> None:
    assert kept_units(np.array([5, 3, 2]), 0.7) == 3
    with pytest.raises(ValueError, match=r"leaves 2 of 10 units, but each of the 3 layers keeps one: give 0\.7"):
        kept_units(np.array([5, 3, 2]), 0.8)


@pytest.mark.parametrize("sizes", [(235200, 30000, 1000), (16,) * 9, (64, 128, 256, 512), (50000, 50000), (1, 1)])
def test_the_sparsity_that_is_named_leaves_one_unit_of_each_layer(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at most") as refused:
        kept_units(np.array(sizes), 0.999999)
    named = float(str(refused.value).split("give ")[1].split()[0])
    assert kept_units(np.array(sizes), named) == len(sizes)


def test_control_has_the_same_counts_and_other_units() -> None:
    widths = np.array([64, 128, 256])
    kept = top_mask(np.random.default_rng(0).random(448), 200, widths)
    control = same_counts(kept, widths, np.random.default_rng(1))
    np.testing.assert_array_equal(widths_of(control, widths), widths_of(kept, widths))
    assert (control != kept).any()


@pytest.mark.parametrize("model", ["digits-resnet", "cnn-4", "mlp-300-100"])
def test_mask_equals_slim_for_any_units(model: str) -> None:
    module = randomise(load_model(model, "random"))
    x = images(2, *{"digits-resnet": (1, 8, 8), "cnn-4": (3, 32, 32), "mlp-300-100": (1, 28, 28)}[model])
    network = make_network(module, x[:1], "unstructured" if model == "mlp-300-100" else "channels")
    units = int(network.widths.sum())
    kept = top_mask(np.random.default_rng(0).random(units), units // 2, network.widths)
    masked, slim = network.slimmer.mask(kept), network.slimmer.slim(kept)
    assert_close(outputs(slim, x), outputs(masked, x))
    assert sum(p.numel() for p in slim.parameters()) == network.params(widths_of(kept, network.widths)) or (
        model == "mlp-300-100" and all((w == 0).any() for n, w in slim.named_parameters() if n.endswith("weight"))
    )


def test_networks_are_as_described() -> None:
    network = make_network(load_model("cnn-4"), images(1, 3, 32, 32))
    assert network.widths.tolist() == [64, 128, 256, 512]
    weights = make_network(load_model("mlp-300-100"), images(1, 1, 28, 28), "unstructured")
    assert weights.widths.tolist() == [235_200, 30_000, 1000]
    order = [type(m).__name__ for m in load_model("cnn-4").children()][:4]  # type: ignore[attr-defined]
    assert order == ["Conv2d", "ReLU", "Dropout", "BatchNorm2d"]
    assert all(m.p == 0.3 for m in load_model("cnn-4").modules() if isinstance(m, nn.Dropout))


# ---- Gymnasium's rules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"render_mode": "ansi"}, {"render_mode": "rgb_array"}], ids=str)
def test_gymnasium_check(changes: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="matplotlib|torch")
        check_env(make(**changes).unwrapped)


def rollout(env: Any, seed: int) -> list[Any]:
    env.action_space.seed(seed)
    return [env.reset(seed=seed), env.step(env.action_space.sample())]


def test_equal_seeds_give_equal_rollouts_also_from_a_pickle_and_a_spec(env: Any) -> None:
    first = rollout(env.unwrapped, 3)
    assert data_equivalence(first, rollout(pickle.loads(pickle.dumps(env.unwrapped)), 3))
    assert data_equivalence(first, rollout(gym.make(EnvSpec.from_json(env.spec.to_json())).unwrapped, 3))
    assert not data_equivalence(first, rollout(env.unwrapped, 4))


def test_one_step_with_the_exact_mask_and_a_count(env: Any) -> None:
    env.reset(seed=0)
    before = env.unwrapped.evaluations
    scores = np.random.default_rng(0).random(env.action_space.shape).astype(np.float32)
    observation, reward, terminated, truncated, info = env.step(scores)
    assert terminated and not truncated and env.unwrapped.evaluations == before + 1
    assert info["mask"].sum() == env.unwrapped.keep == kept_units(env.unwrapped.network.widths, 0.5)
    assert reward == info["search_accuracy"] - 1 and info["is_success"]
    np.testing.assert_array_equal(widths_of(info["mask"], env.unwrapped.network.widths), info["widths"])
    assert observation in env.observation_space
    np.testing.assert_array_equal(env.unwrapped.mask_of(info["mask"].astype(np.float32)), info["mask"])
    with pytest.raises((RuntimeError, gym.error.ResetNeeded)):
        env.unwrapped.step(scores)


def test_masks_of_zeros_and_ones_are_masks_and_others_are_not_counted(env: Any) -> None:
    env.reset(seed=0)
    inner = env.unwrapped
    mask = inner.mask_of(np.random.default_rng(0).random(env.action_space.shape))
    assert inner.evaluate(mask.astype(int).tolist()) == inner.evaluate(mask)
    before = inner.evaluations
    for wrong in (mask[:-1], mask * 2, np.where(mask, 0.5, 0), inner.network.widths):
        with pytest.raises(ValueError, match="A mask says of each of"):
            inner.evaluate(wrong)
        with pytest.raises(ValueError, match="A mask says of each of"):
            inner.rewound(wrong)
    assert inner.evaluations == before


def test_bad_actions_and_arguments(env: Any) -> None:
    env.reset(seed=0)
    with pytest.raises(ValueError, match="shape"):
        env.unwrapped.step(np.zeros(3))
    with pytest.raises(ValueError, match="NaN"):
        env.unwrapped.step(np.full(env.action_space.shape, np.nan))
    for changes, word in (
        ({"objective": "oracle"}, "objective"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"weights": "file.pt"}, "pretrained"),
        ({"proxy_steps": 0}, "proxy_steps"),
        ({"proxy_steps": 2.5}, "proxy_steps"),
        ({"sparsity": "a"}, "sparsity"),
        ({"init_seed": -1}, "init_seed"),
        ({"granularity": "2:4"}, "channels, unstructured"),
        ({"model": "cnn-4"}, "images of 'digits'"),
        ({"model": chain(64, 9)}, "10 classes"),
        ({"render_mode": "human"}, "render_mode"),
        ({"recalibration_images": 1}, "recalibration_images"),
        ({"search_images": 0}, "search_images"),
    ):
        with pytest.raises(ValueError, match=word):
            MaskEnv(**{**SMALL, **changes})


def test_only_a_seed_begins_a_new_search(env: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[bool] = []
    monkeypatch.setattr(env.unwrapped.evaluator, "begin", lambda: begun.append(True))
    env.reset()
    assert not begun
    env.reset(seed=3)
    assert begun == [True]


def test_nothing_is_trained_before_all_arguments_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: Any) -> None:
        raise AssertionError("trained before the arguments were checked")

    monkeypatch.setattr("gnnrl_gym.evaluation.objectives.train", work)
    for changes, word in (({"sparsity": 0.99}, "at most"), ({"model": "cnn-4"}, "images of 'digits'")):
        with pytest.raises(ValueError, match=word):
            MaskEnv(objective="pretrained", **{**SMALL, **changes})


# ---- objectives ------------------------------------------------------------------------------------------------


def scored(env: Any, seed: int = 0) -> tuple[float, np.ndarray]:
    env.reset(seed=0)
    info = env.step(np.random.default_rng(seed).random(env.action_space.shape).astype(np.float32))[4]
    return info["search_accuracy"], info["mask"]


def test_untrained_scores_the_initial_weights(env: Any) -> None:
    value, mask = scored(env)
    data, inner = load_data("digits"), env.unwrapped
    network = make_network(load_model("digits-resnet", "random", 10, seed=0), images(1, 1, 8, 8))
    slim = recalibrate(network.slimmer.slim(mask), data.train.take(64, seed=1).tensors()[0])
    assert value == pytest.approx(accuracy(slim, data.search.take(100)), abs=0.021)  # folding rounds
    for name, parameter in inner.rewound(mask).named_parameters():
        torch.testing.assert_close(parameter, dict(network.slimmer.slim(mask).named_parameters())[name])


def test_pretrained_scores_trained_weights_but_rewinds_to_initial_ones() -> None:
    trained, initial = make(objective="pretrained", pretrain_epochs=4, sparsity=0.1), make(sparsity=0.1)
    value, mask = scored(trained)
    assert value > scored(initial)[0] + 0.2
    before, after = (dict(e.unwrapped.rewound(mask).named_parameters()) for e in (initial, trained))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_proxy_trains_a_little_and_is_deterministic() -> None:
    few, many = make(objective="proxy", proxy_steps=1), make(objective="proxy", proxy_steps=25)
    first, mask = scored(many)
    assert first > scored(few)[0] + 0.1
    many.unwrapped.evaluator._scores.clear()
    assert many.unwrapped.evaluate(mask) == first


@pytest.mark.parametrize("bfloat16", [False, True])
def test_what_is_scored_was_trained_as_it_is_built(bfloat16: bool) -> None:
    """Scoring computes in bfloat16: training must not be under that autocast, whose cached weights would be stale."""
    data, recipe = load_data("digits"), Recipe(epochs=1, bfloat16=bfloat16)
    network = make_network(load_model("digits-resnet", "random", 10, seed=0), images(1, 1, 8, 8))
    cpu = torch.device("cpu")
    evaluator = ObjectiveEvaluator(network, data, data.search, 64, cpu, "bfloat16", proxy=(40, recipe, 0))
    plan = network.widths * 3 // 4
    built = accuracy(evaluator.build(plan), data.search)
    assert built > 0.6 and evaluator.score(plan) == pytest.approx(built, abs=0.03)  # bfloat16 rounds


def test_training_leaves_global_randomness_alone_and_is_seeded() -> None:
    data = load_data("digits")
    ends = []
    for before, seed in ((7, 0), (8, 0), (9, 1)):
        start = nn.Sequential(chain(64, 20), nn.Dropout(0.5), nn.Linear(20, 10))
        torch.manual_seed(before)
        model = train(copy.deepcopy(start), data, DEFAULT, seed, steps=5)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        drawn = torch.rand(1)
        torch.manual_seed(before)
        assert drawn == torch.rand(1)
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_training_switches_gradients_on(context: Any) -> None:
    data, ends = load_data("digits"), []
    start = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
    for around in (torch.enable_grad, context):
        model = copy.deepcopy(start)
        with around():
            ends.append(train(model, data, DEFAULT, steps=3).state_dict())
    assert all(torch.equal(ends[0][name], tensor) for name, tensor in ends[1].items())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_short_training_scores_the_same_wherever_it_is_asked_for(context: Any) -> None:
    scores = []
    for around in (torch.enable_grad, context):
        env: Any = gym.make("GNNRL-Mask-v0", model="digits-resnet", objective="proxy", proxy_steps=2, search_images=50)
        env.reset(seed=0)
        with around():
            scores.append(env.step(env.unwrapped.action_space.low)[1])
    assert scores[0] == scores[1]


# ---- scores of a chain from the last one's -----------------------------------------------------------------------


def test_linear_chain_equals_the_masked_network_along_a_search() -> None:
    model, x = chain(64, 40, 20, 10), images(50, 1, 8, 8)
    network = make_network(model, x[:1], "unstructured")
    assert LinearChain.fits(model, network.slimmer.units)  # type: ignore[attr-defined]
    scorer, rng = LinearChain(model, x), np.random.default_rng(0)
    mask = rng.permutation(int(network.widths.sum())) < 700
    for step in range(60):
        size = 200 if step % 20 == 19 else 5
        proposal = mask.copy()
        proposal[rng.choice(np.flatnonzero(mask), size, False)] = False
        proposal[rng.choice(np.flatnonzero(~mask), size, False)] = True
        torch.testing.assert_close(scorer.outputs(proposal), logits(network.slimmer.mask(proposal), x))
        mask = proposal if rng.random() < 0.5 else mask


def test_linear_chain_without_biases_and_with_rounding_put_right(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = chain(64, 30, 10), images(20, 1, 8, 8)
    model[1].bias = None
    mask = np.random.default_rng(0).permutation(64 * 30 + 300) < 1000
    expected = logits(make_network(model, x[:1], "unstructured").slimmer.mask(mask), x)
    scorer = LinearChain(model, x)
    torch.testing.assert_close(scorer.outputs(mask), expected)
    monkeypatch.setattr("gnnrl_gym.evaluation.linear_chain.REFRESH", 5)
    ((kept, sums),) = scorer._states
    scorer._states = [(kept, sums + 1.0)]  # an error that differences carry along
    errors = [float((scorer.outputs(mask) - expected).abs().max()) for _ in range(6)]
    assert min(errors[:3]) > 0.01 and max(errors[3:]) < 1e-4  # the fifth call computes the sums anew


def test_masks_of_a_chain_have_the_scores_of_their_networks() -> None:
    weights: dict[str, Any] = {"model": chain(64, 20, 10), "granularity": "unstructured"}
    env, rng = make(**weights).unwrapped, np.random.default_rng(0)
    assert env.evaluator._chain is not None
    assert make(**weights, objective="proxy").unwrapped.evaluator._chain is None
    for _ in range(5):
        mask = env.mask_of(rng.random(env.action_space.shape))
        assert env.evaluate(mask) == accuracy(env.network.slimmer.mask(mask).eval(), env.data.search.take(100))


def test_a_new_search_measures_a_chain_anew() -> None:
    """How sums are rounded depends on the masks before: with the old scores a replayed search would be another one."""
    env = make(model=chain(64, 20, 10), granularity="unstructured").unwrapped
    mask = env.mask_of(np.random.default_rng(0).random(env.action_space.shape))
    env.evaluator._scores[digest(mask).encode()] = 2.0
    assert env.evaluate(mask) == 2.0
    env.reset(seed=0)
    assert env.evaluate(mask) <= 1.0


class Inverted(nn.Sequential):
    """A chain that does something of its own with the images."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(-x)


def test_other_networks_are_no_chain() -> None:
    tanh = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))
    twice, hooked = nn.Linear(64, 64), chain(64, 10)
    shared = nn.Sequential(nn.Flatten(), twice, nn.ReLU(), twice, nn.ReLU(), nn.Linear(64, 10))
    hooked[1].register_forward_hook(lambda *call: -call[2])
    for model in (tanh, load_model("digits-resnet"), shared, Inverted(*chain(64, 10)), hooked):
        network = make_network(model, images(1, 1, 8, 8), "unstructured")
        assert not LinearChain.fits(model, network.slimmer.units)  # type: ignore[attr-defined]


# ---- the same objectives for ratios --------------------------------------------------------------------------------


def test_ratios_take_the_same_objectives() -> None:
    found = {}
    for objective in (None, "untrained", "pretrained", "proxy"):
        steps: dict[str, Any] = {"pretrain_epochs": 4, "proxy_steps": 25}
        env: Any = gym.make("GNNRL-Prune-v0", objective=objective, **steps, **SMALL).unwrapped
        found[objective] = env.evaluate(env.network.widths * 9 // 10)
    assert found[None] > 0.5 and found["untrained"] < 0.3
    assert min(found["pretrained"], found["proxy"]) > found["untrained"] + 0.1
    plan = env.network.widths - 1
    first = env.evaluate(plan)
    env.evaluator._scores.clear()
    env.evaluator.prefetch([plan])
    assert not env.evaluator._scores and env.evaluate(plan) == first
    with pytest.raises(ValueError, match="objective"):
        gym.make("GNNRL-Prune-v0", objective="oracle")
