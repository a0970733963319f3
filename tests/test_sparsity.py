"""SparseNetwork: what goes is the smallest, costs are those of what is built, zeros stay zero while training."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from conftest import count_params, images, outputs, random_plans, randomise
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

from gnnrl_gym import PrunableNetwork, UnsupportedOperation
from gnnrl_gym.envs.prune import PruneEnv
from gnnrl_gym.graph.features import EDGE_FEATURES, NODE_FEATURES
from gnnrl_gym.pruning.sparsity import SparseNetwork, make_network
from gnnrl_gym.zoo import load_model

GRANULARITIES = ["unstructured", "block4x1", "block2x3", "2:4", "1:3"]


class Small(nn.Module):
    """Odd sizes, a depthwise convolution, a linear layer used twice, none of which 2:4 divides evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 9, 3)
        self.depthwise = nn.Conv2d(9, 9, 3, groups=9)
        self.twice, self.head = nn.Linear(9, 9), nn.Linear(9, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.conv(x).relu()).amax((2, 3))
        return self.head(self.twice(self.twice(x).relu()))


def example(name: str) -> Tensor:
    return images(1, 3, 32, 32) if name == "resnet20" else images(1, 3, 8, 8)


def model_of(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = randomise(load_model(name) if name == "resnet20" else Small())
        for parameter in model.parameters():  # biases that start at zero would be counted as removed
            parameter.data += (parameter.data == 0) * 0.1
    return model


@pytest.fixture(scope="module", params=itertools.product(["resnet20", "small"], GRANULARITIES), ids="-".join)
def network(request: pytest.FixtureRequest) -> SparseNetwork:
    name, granularity = request.param
    return SparseNetwork(model_of(name), example(name), granularity)


class InPlace(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2))


def test_the_example_stays_as_it_is() -> None:
    example = images(1, 4)
    SparseNetwork(InPlace(4, 4), given := example.clone(), "unstructured")
    assert torch.equal(given, example)


def plans_of(network: SparseNetwork, count: int = 6) -> np.ndarray:
    plans = random_plans(network, count)
    plans[2] = network.least
    return plans


def layers_of(network: SparseNetwork, module: nn.Module) -> list[Tensor]:
    return [module.get_parameter(f"{name}.weight").detach() for name in network.group_names]


def non_zero(module: nn.Module) -> int:
    return sum(int(torch.count_nonzero(p)) for p in module.parameters())


def tiles_by_hand(weight: Tensor, granularity: str) -> list[Tensor]:
    """The tiles, found by counting them out."""
    rows, columns = {"unstructured": (1, 1), "block4x1": (4, 1), "block2x3": (2, 3), "2:4": (1, 4), "1:3": (1, 3)}[
        granularity
    ]
    flat = weight.flatten(2) if weight.dim() > 2 else weight[..., None]
    starts = itertools.product(
        range(0, flat.shape[0] - rows + 1, rows), range(0, flat.shape[1] - columns + 1, columns), range(flat.shape[2])
    )
    return [flat[o : o + rows, i : i + columns, k].flatten() for o, i, k in starts]


# ---- costs and masks -------------------------------------------------------------------------------------------


def test_params_are_the_non_zero_entries_and_macs_are_dense(network: SparseNetwork) -> None:
    assert network.params(network.widths) == non_zero(network.model) == count_params(network.model)
    dense = PrunableNetwork(network.model, network.example_input)
    plans = plans_of(network)
    assert network.params(plans).tolist() == [non_zero(network.mask(plan)) for plan in plans]
    assert network.params(plans).dtype == np.int64
    for cost in ("macs", "memory"):  # dense kernels run whatever is zero
        assert set(getattr(network, cost)(plans).tolist()) == {getattr(dense, cost)(dense.widths)}
    assert type(network.params(plans[0])) is type(network.macs(plans[0])) is int


def test_slim_is_mask_and_the_original_stays(network: SparseNetwork) -> None:
    before = copy.deepcopy(network.model.state_dict())
    for plan in plans_of(network, 3):
        slim, mask = network.slim(plan), network.mask(plan)
        assert type(slim) is type(network.model)
        assert all(torch.equal(a, b) for a, b in zip(slim.parameters(), mask.parameters(), strict=True))
        found, dense = (outputs(m, *network.example_input)[0] for m in (slim, network.model))
        assert not torch.equal(found, dense)
    full = network.mask(network.widths)
    for key, tensor in network.model.state_dict().items():
        assert torch.equal(tensor, before[key]) and torch.equal(tensor, full.state_dict()[key])


def test_one_decision_per_layer_and_the_output_layer_is_one() -> None:
    sparse = SparseNetwork(model_of("small"), example("small"), "unstructured")
    assert sparse.group_names == ["conv", "depthwise", "twice", "head"]
    assert sparse.widths.tolist() == [9 * 3 * 9, 9 * 9, 81, 63]
    # 2:4 in inputs: none in three or in one; two whole blocks in nine, for each output
    assert SparseNetwork(model_of("small"), example("small"), "2:4").widths.tolist() == [18, 14]


def test_networks_without_channel_groups() -> None:
    with pytest.raises(UnsupportedOperation):
        PrunableNetwork(nn.Linear(8, 4), images(1, 8))
    assert non_zero(SparseNetwork(nn.Linear(8, 4), images(1, 8), "2:4").mask([0])) == 16 + 4


# ---- what goes ---------------------------------------------------------------------------------------------------


def test_the_smallest_go_first(network: SparseNetwork) -> None:
    stay = {"2:4": 2, "1:3": 1}.get(network.granularity, 0)
    plan = plans_of(network)[3]
    dense, pruned = layers_of(network, network.model), layers_of(network, network.mask(plan))
    for before, after, width, full in zip(dense, pruned, plan, network.widths, strict=True):
        if before.numel() > 5000:  # counted out in Python
            continue
        pairs = list(zip(*(tiles_by_hand(w, network.granularity) for w in (before, after)), strict=True))
        gone = [(b, a) for b, a in pairs if not torch.equal(a, b)]
        kept = [b for b, a in pairs if torch.equal(a, b)]
        assert (len(kept), len(pairs)) == (width, full)
        for b, a in gone:  # N of M stay, the largest of them, as they are
            assert torch.count_nonzero(a) == stay
            assert torch.equal(a, b * (b.abs() >= b.abs().sort(descending=True)[0][stay - 1] if stay else 0))
        loss = [b.abs().sort()[0][: len(b) - stay].norm() for b in (*kept, *(b for b, _ in gone))]
        assert min(loss[:width]) >= max(loss[width:], default=torch.tensor(0.0)) - 1e-6


def test_plans_are_nested(network: SparseNetwork) -> None:
    plan = plans_of(network)[4]
    more = np.minimum(plan + 3, network.widths)
    assert not (network.kept(plan) & ~network.kept(more)).any()
    assert network.kept(plan).sum() == plan.sum()


def test_a_whole_layer_can_be_two_of_four() -> None:
    network = SparseNetwork(model_of("resnet20"), example("resnet20"), "2:4")
    assert "conv1" not in network.group_names and network.least == 0
    for weight in layers_of(network, network.mask(np.zeros_like(network.widths))):
        blocks = weight.movedim(1, -1).reshape(-1, 4)
        assert (torch.count_nonzero(blocks, dim=1) == 2).all()


# ---- training ----------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-2),
}


def train(module: nn.Module, optimizer: str, steps: int = 3) -> None:
    made = OPTIMIZERS[optimizer](module.parameters())
    x = images(8, 3, 8, 8).to(next(module.parameters()).dtype)
    for _ in range(steps):
        made.zero_grad()
        nn.functional.cross_entropy(module.train()(x), torch.arange(8) % 7).backward()
        made.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_zeros_stay_zero_and_the_rest_learns(granularity: str, optimizer: str) -> None:
    network = SparseNetwork(model_of("small"), example("small"), granularity)
    plan = network.widths // 2
    pruned = network.slim(plan)
    before = copy.deepcopy(dict(pruned.named_parameters()))
    with network.zeros_held(pruned, network.kept(plan)):
        pruned.double()  # as a move to another device: the tensors behind the parameters change
        train(pruned, optimizer)
    for name, parameter in pruned.named_parameters():
        assert torch.equal(parameter == 0, before[name] == 0)
        assert ((parameter != before[name]) | (before[name] == 0)).float().mean() > 0.9
    assert non_zero(pruned) == network.params(plan)
    train(pruned, optimizer, 1)  # the hooks are gone
    assert non_zero(pruned) > network.params(plan)


def test_overflowing_gradients_leave_zeros() -> None:
    network = SparseNetwork(nn.Linear(4, 4), images(1, 4), "unstructured")
    pruned = network.slim([8])
    with network.zeros_held(pruned, network.kept([8])):
        (pruned(images(1, 4)).sum() * float("inf")).backward()
    assert torch.equal(pruned.weight.grad == 0, pruned.weight == 0)


def test_zeros_that_were_not_pruned_may_grow() -> None:
    layer = nn.Linear(8, 7)
    nn.init.zeros_(layer.weight)  # as heads of vision transformers start
    network = SparseNetwork(layer, images(1, 8), "unstructured")
    pruned = network.slim([28])
    with network.zeros_held(pruned, network.kept([28])):
        nn.functional.cross_entropy(pruned(images(8, 8)), torch.arange(8) % 7).backward()
    assert torch.count_nonzero(pruned.weight.grad) == 28


@pytest.mark.parametrize("granularity", ["unstructured", "2:4"])
def test_holding_zeros_of_another_plan_raises(granularity: str) -> None:
    network = SparseNetwork(model_of("small"), example("small"), granularity)
    with (
        pytest.raises(ValueError, match="build it with this plan"),
        network.zeros_held(network.slim(network.widths), network.kept(network.widths // 2)),
    ):
        pass
    with pytest.raises(ValueError, match="one bool per unit"), network.zeros_held(network.model, np.ones(3, bool)):
        pass


# ---- observation, environment ------------------------------------------------------------------------------------


def test_graph_has_a_decision_node_per_layer(network: SparseNetwork) -> None:
    space = spaces.Graph(spaces.Box(-4, 4, (len(NODE_FEATURES),)), spaces.Box(-4, 4, (len(EDGE_FEATURES),)))
    plan = plans_of(network)[3]
    network.graph_builder.set_sensitivity(np.linspace(-0.1, 1, len(plan)))
    graph, count = network.graph(plan, 0.4), len(network.widths)
    assert space.contains(graph)
    column = {name: graph.nodes[:, NODE_FEATURES.index(name)] for name in NODE_FEATURES}
    assert np.flatnonzero(column["level: decision"]).tolist() == list(range(count))
    np.testing.assert_allclose(column["share kept out"][:count], plan / network.widths, rtol=1e-6)
    dense = network.params(network.widths)
    np.testing.assert_allclose(column["parameters of the network"], network.params(plan) / dense, rtol=1e-6)
    np.testing.assert_allclose(column["share of parameters"][-1] ** 2, network.params(plan) / dense, rtol=1e-6)
    assert (column["MACs of the network"] == 1).all() and (column["budget"] == np.float32(0.4)).all()
    assert (np.ptp(graph.nodes[:count, : len(NODE_FEATURES)], axis=0) > 0).sum() > 8  # layers can be told apart
    parents = graph.edge_links[graph.edges[:, EDGE_FEATURES.index("writes")] == 1, 1]
    assert set(parents.tolist()) == set(range(count))
    assert (column["level: layer"][graph.edge_links[np.isin(graph.edge_links[:, 1], range(count)), 0]] == 1).all()


class SparseEnv(PruneEnv):
    """The environment over another network class, whatever else it does."""

    def _prunable(self, module: nn.Module, *_: Any) -> PrunableNetwork:
        return SparseNetwork(module, self.data.train.take(1, seed=1).tensors()[0].to(self.device), "unstructured")


def test_environment_lands_on_the_budget() -> None:
    env = SparseEnv(metric="params", budget=0.3, search_images=50, recalibration_images=32, device="cpu")
    env.reset(seed=0)
    env.action_space.seed(0)
    graph, reward, terminated, _, info = env.step(env.action_space.sample() * 0 + 0.9)
    assert terminated and info["is_success"] and env.observation_space.contains(graph)
    # a unit is one weight: nothing is left below the budget
    assert 0 <= 0.3 - info["params_ratio"] < 1.01 / env.network.params(env.network.widths)
    assert info["macs_ratio"] == 1 and reward == info["search_accuracy"] - 1
    assert non_zero(env.slim()) <= 0.3 * env.network.params(env.network.widths)


# ---- the rest ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["unstructured", "2:4"])
def test_pickled_network_is_equal(granularity: str) -> None:
    network = SparseNetwork(model_of("small"), example("small"), granularity)
    network.graph_builder.set_sensitivity(np.linspace(0, 1, len(network.widths)))
    again, plan = pickle.loads(pickle.dumps(network)), network.widths // 3
    np.testing.assert_array_equal(again.kept(plan), network.kept(plan))
    for a, b in zip(again.graph(plan), network.graph(plan), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("text", ["", "channel", "block4", "block0x4", "block1x1", "4:4", "0:4", "4:2", "2:4:8"])
def test_unknown_granularities_raise(text: str) -> None:
    with pytest.raises(ValueError, match="granularity"):
        SparseNetwork(nn.Linear(8, 8), images(1, 8), text)


def test_weights_that_are_computed_are_named() -> None:
    network = nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(12, 8)), nn.ReLU(), nn.Linear(8, 4))
    with pytest.warns(UserWarning, match=r"unstructured pruning leaves 1 dense.*remove_parametrizations"):
        assert SparseNetwork(network, torch.randn(1, 3, 2, 2), "unstructured").group_names == ["3"]
    remove_parametrizations(network[1], "weight")
    assert SparseNetwork(network, torch.randn(1, 3, 2, 2), "unstructured").group_names == ["1", "3"]


def test_layers_without_a_whole_unit_raise() -> None:
    with pytest.raises(UnsupportedOperation, match=r"2:4"):
        SparseNetwork(nn.Linear(3, 8), images(1, 3), "2:4")
    with pytest.raises(UnsupportedOperation, match="no convolution"):
        SparseNetwork(nn.ReLU(), images(1, 3), "unstructured")


@pytest.mark.parametrize("plan", [[1], [1, 1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 64], [1.0, 1, 1, 1], [-1, 1, 1, 1]])
@pytest.mark.parametrize("method", ["params", "macs", "graph", "mask", "slim", "kept"])
def test_wrong_plans_raise(method: str, plan: list[float]) -> None:
    network = SparseNetwork(model_of("small"), example("small"), "unstructured")
    with pytest.raises(ValueError, match=r"plan|[Ww]idth"):
        getattr(network, method)(plan)


def test_make_network_chooses_the_class() -> None:
    model, x = model_of("small"), example("small")
    assert type(make_network(model, x)) is PrunableNetwork
    assert type(make_network(model, x, "2:4")) is SparseNetwork
    with pytest.raises(ValueError, match="magnitude"):
        make_network(model, x, "2:4", "taylor")
    with pytest.raises(ValueError, match="choose channels"):
        make_network(model, x, "channel")
