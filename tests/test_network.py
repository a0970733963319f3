"""PrunableNetwork on real networks: slim equals mask, costs are those of what is built, the original stays as it is."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    Network,
    assert_close,
    count_params,
    counted_macs,
    images,
    outputs,
    random_plans,
    randomise,
)
from torch import Tensor, nn

from gnnrl_gym import PrunableNetwork
from gnnrl_gym.pruning.importance import IMPORTANCES
from gnnrl_gym.zoo import load_model

# name: (image size, random plans). Fewer plans where one costs much: VGG's slim network copies up to 129 million
# parameters, ResNet-50's forward takes longest.
NETWORKS = {
    "resnet20": (32, 20),
    "resnet56": (32, 20),
    "vgg11_bn": (32, 5),
    "mobilenet_v2": (64, 20),
    "resnet18": (64, 20),
    "resnet50": (64, 8),
    "shufflenet_v2_x1_0": (64, 20),
}


@pytest.fixture(scope="module", params=NETWORKS)
def case(request: pytest.FixtureRequest) -> tuple[Network, Tensor, np.ndarray]:
    """A network, an image for it, and random plans."""
    size, plans = NETWORKS[request.param]
    x = images(1, 3, size, size)
    network = PrunableNetwork(randomise(load_model(request.param, num_classes=10)), x)
    return network, x, random_plans(network, plans)


@pytest.fixture(scope="module")
def resnet20() -> Network:
    return PrunableNetwork(randomise(load_model("resnet20")), images(1, 3, 32, 32))


def test_slim_is_exact_and_costs_what_was_said(case: tuple[Network, Tensor, np.ndarray]) -> None:
    network, x, plans = case
    dense = outputs(network.model, x)[0]
    for plan in plans:
        slim, mask = network.slim(plan), outputs(network.mask(plan), x)
        assert_close(outputs(slim, x), mask)
        assert (mask[0] - dense).abs().max() > 1e-3 * dense.abs().max()  # or the line above would say nothing
        assert network.macs(plan) == counted_macs(slim, x)
        assert network.params(plan) == count_params(slim)
        assert type(slim) is type(network.model)


def test_full_widths_give_the_original(case: tuple[Network, Tensor, np.ndarray]) -> None:
    network, x, _ = case
    dense = outputs(network.model, x)[0]
    assert torch.equal(outputs(network.slim(network.widths), x)[0], dense)
    assert torch.equal(outputs(network.mask(network.widths), x)[0], dense)
    assert network.macs(network.widths) == counted_macs(network.model, x)
    assert network.params(network.widths) == count_params(network.model)


def test_batches_of_plans_cost_as_one_by_one(case: tuple[Network, Tensor, np.ndarray]) -> None:
    network, _, plans = case
    for cost in (network.macs, network.params):
        batched = cost(plans)
        assert batched.dtype == np.int64
        assert batched.tolist() == [cost(plan) for plan in plans]
        assert type(cost(plans[0])) is int


def test_every_unit_costs_something(case: tuple[Network, Tensor, np.ndarray]) -> None:
    network, _, plans = case
    less = plans[:, None, :] - np.eye(len(network.widths), dtype=np.int64)
    possible = (less >= 1).all(-1)
    for cost in (network.macs, network.params):
        more = np.broadcast_to(cost(plans)[:, None], possible.shape)[possible]
        assert (cost(less[possible]) < more).all()


@pytest.mark.parametrize("training", [True, False])
def test_original_is_untouched(training: bool) -> None:
    model, x = randomise(load_model("resnet20")).train(training), images(4, 3, 32, 32)
    model.bn1.eval()  # a frozen BatchNorm stays frozen
    flags, before = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    network = PrunableNetwork(model, x[:1])
    slim, mask = network.slim(network.widths // 2), network.mask(network.widths // 2)
    for made in (slim, mask):
        made.train()(x).sum().backward()
        with torch.no_grad():
            for tensor in made.state_dict().values():
                tensor.zero_()  # nothing is shared
    assert [m.training for m in model.modules()] == flags
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])


@pytest.mark.parametrize("kind", ["l2", "taylor", "bn-scale"])
def test_importance_keeps_training_flags(kind: str) -> None:
    model: Any = load_model("resnet20").train()
    model.layer1.eval()
    flags = [m.training for m in model.modules()]
    batch = (images(40, 3, 32, 32), torch.arange(40) % 10)
    PrunableNetwork(model, images(1, 3, 32, 32), kind, batch)
    assert [m.training for m in model.modules()] == flags


def test_slim_can_be_trained(case: tuple[Network, Tensor, np.ndarray]) -> None:
    network, x, plans = case
    slim = network.slim(plans[1]).train()
    two = torch.cat([x, -x])
    optimizer = torch.optim.SGD(slim.parameters(), 1e-3)
    before = [p.detach().clone() for p in slim.parameters()]
    nn.functional.cross_entropy(slim(two), torch.tensor([0, 1])).backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in slim.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(before, slim.parameters(), strict=True))


def test_example_of_two_images_costs_twice_as_much(resnet20: Network) -> None:
    x = images(2, 3, 32, 32)
    two, plan = PrunableNetwork(resnet20.model, x), resnet20.widths // 3
    assert two.macs(plan) == 2 * resnet20.macs(plan) == counted_macs(two.slim(plan), x)
    assert_close(outputs(two.slim(plan), x), outputs(two.mask(plan), x))


def _wrong(network: Network) -> dict[str, Any]:
    full = network.widths
    return {
        "a width too few": full[:-1],
        "a width too many": np.append(full, 1),
        "three dimensions": full[None, None],
        "a number": int(full[0]),
        "floats": full.astype(float),
        "bools": np.ones(len(full), bool),
        "zero": full * (np.arange(len(full)) != 3),
        "negative": -full,
        "above full": full + (np.arange(len(full)) == 2),
    }


WRONG = ["a width too few", "a width too many", "three dimensions", "a number", "floats", "bools", "zero", "negative",
         "above full"]  # fmt: skip


@pytest.mark.parametrize("method", ["macs", "params", "graph", "slim", "mask"])
@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_plans_raise(resnet20: Network, mistake: str, method: str) -> None:
    with pytest.raises(ValueError, match=r"plan|[Ww]idth"):
        getattr(resnet20, method)(_wrong(resnet20)[mistake])


def test_a_wrong_width_is_named_among_the_smallest_and_largest(resnet20: Network) -> None:
    full = resnet20.widths
    for plan, place in ((np.ones_like(full), 7), (full.copy(), 4)):
        for wrong in (0, full[place] + 1):
            plan[place] = wrong
            with pytest.raises(ValueError, match=rf" {place} must be between 1 and {full[place]}: no layer"):
                resnet20.macs(plan)


@pytest.mark.parametrize("method", ["slim", "mask", "graph"])
def test_one_plan_at_a_time_is_built(resnet20: Network, method: str) -> None:
    with pytest.raises(ValueError, match=r"[Pp]lan"):
        getattr(resnet20, method)(np.stack([resnet20.widths] * 2))


@pytest.mark.parametrize("plan", [list, tuple, np.int32, np.uint8])
def test_plans_of_other_integer_kinds(resnet20: Network, plan: Any) -> None:
    half = resnet20.widths // 2
    given = plan(half.tolist()) if plan in (list, tuple) else half.astype(plan)
    assert resnet20.macs(given) == resnet20.macs(half)
    assert resnet20.params(given) == resnet20.params(half)


@pytest.mark.parametrize("kind", ["l2", "random", "taylor"])
def test_pickled_network_is_equal(kind: str) -> None:
    model, x = randomise(load_model("resnet20")), images(1, 3, 32, 32)
    network = PrunableNetwork(model, x, kind, (images(40, 3, 32, 32), torch.arange(40) % 10))
    network.graph_builder.set_sensitivity(np.linspace(0, 1, len(network.widths)))
    again = pickle.loads(pickle.dumps(network))
    np.testing.assert_array_equal(again.widths, network.widths)
    np.testing.assert_array_equal(again.importance, network.importance)
    for plan in random_plans(network, 4):
        np.testing.assert_array_equal(again.kept(plan), network.kept(plan))
        assert again.macs(plan) == network.macs(plan)
        assert torch.equal(outputs(again.slim(plan), x)[0], outputs(network.slim(plan), x)[0])
        for a, b in zip(again.graph(plan), network.graph(plan), strict=True):
            np.testing.assert_array_equal(a, b)


# ---- importance ------------------------------------------------------------------------------------------------

PLANTED = [1, 4, 6]  # units that hardly do anything


def planted() -> Any:
    """Convolution, BatchNorm, ReLU, convolution, head; a few units of the first convolution are tiny everywhere."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    with torch.no_grad():
        randomise(model)
        for tensor in (model[0].weight, model[0].bias, model[1].weight, model[1].bias):
            tensor[PLANTED] *= 1e-3
        model[3].weight[:, PLANTED] *= 1e-3
    return model


def ordered(kind: str) -> Network:
    x = images(64, 3, 8, 8)
    return PrunableNetwork(planted(), x[:1], kind, (x, torch.arange(64) % 4))


@pytest.mark.parametrize("kind", [k for k in IMPORTANCES if k != "random"])
def test_the_least_important_go_first(kind: str) -> None:
    network = ordered(kind)
    assert network.widths.tolist() == [8, 6]
    stay = [i for i in range(8) if i not in PLANTED]
    slim: Any = network.slim([5, 6])
    model: Any = network.model
    assert torch.equal(slim[0].weight, model[0].weight[stay])
    assert torch.equal(slim[3].weight, model[3].weight[:, stay])


@pytest.mark.parametrize("kind", IMPORTANCES)
def test_every_importance_is_exact_and_nested(kind: str) -> None:
    network, x = ordered(kind), images(2, 3, 8, 8)
    assert network.importance.shape == (14,)
    assert np.isfinite(network.importance).all()
    kept = [network.kept([width, 6]) for width in range(1, 9)]
    for width, (now, more) in enumerate(zip(kept, [*kept[1:], kept[-1]], strict=True), start=1):
        assert now[:8].sum() == width
        assert not (now & ~more).any()  # what a narrow plan keeps, a wider one keeps too
        lowest, highest = network.importance[:8][now[:8]].min(), network.importance[:8][~now[:8]].max(initial=-1)
        assert lowest >= highest
    assert_close(outputs(network.slim([3, 2]), x), outputs(network.mask([3, 2]), x))


def test_random_importance_is_seeded_and_has_its_own_order() -> None:
    first, second, other = ordered("random"), ordered("random"), ordered("l2")
    np.testing.assert_array_equal(first.importance, second.importance)
    assert np.argsort(first.importance).tolist() != np.argsort(other.importance).tolist()


@pytest.mark.parametrize(("kind", "power"), [("l1", 1), ("l2", 2)])
def test_norms_by_hand(kind: str, power: int) -> None:
    """A filter's own weights and what reads it, each against the mean of its layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    network: Any = PrunableNetwork(model, images(1, 3, 8, 8), importance=kind)
    written = model[0].weight.detach().double().abs().pow(power).sum((1, 2, 3))
    read = model[2].weight.detach().double().abs().pow(power).sum((0, 2, 3))
    expected = (written / written.mean() + read / read.mean()) ** (1 / power)
    np.testing.assert_allclose(network.importance, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize(("kind", "message"), [("best", "l1, l2, bn-scale, taylor, random"), ("taylor", "batch=")])
def test_wrong_importance_raises(kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrunableNetwork(planted(), images(1, 3, 8, 8), kind)


@pytest.mark.parametrize(
    "batch",
    [images(4, 3, 8, 8), (images(4, 3, 8, 8), torch.arange(3)), (images(0, 3, 8, 8), torch.arange(0)),
     (images(4, 3, 8, 8).numpy(), np.arange(4))],
    ids=["no pair", "other lengths", "empty", "arrays"],
)  # fmt: skip
def test_wrong_batches_of_taylor_raise(batch: Any) -> None:
    with pytest.raises(ValueError, match=r"batch is .*inputs .* and labels"):
        PrunableNetwork(planted(), images(1, 3, 8, 8), "taylor", batch)


class _Flat(nn.Module):
    """A number of channels stands in the forward; `how` flattens, an image of 4x4 pixels and 6 channels."""

    def __init__(self, how: Any) -> None:
        super().__init__()
        self.conv, self.next, self.head = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 1), nn.Linear(96, 3)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.how(self.next(self.conv(x))))


def test_a_number_in_the_forward_names_the_network_and_the_mend() -> None:
    x = images(2, 1, 4, 4)
    with pytest.warns(UserWarning, match=r"The forward of _Flat \(.*x\.flatten\(1\)"):
        held = PrunableNetwork(_Flat(lambda x: x.view(-1, 96)), x)
    mended = PrunableNetwork(_Flat(lambda x: x.flatten(1)), x)
    assert len(mended.widths) == len(held.widths) + 1


class _Reading(nn.Module):
    """Reads columns of a small image as words, by a recurrent layer."""

    def __init__(self, kind: Any, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.hidden = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 5, 1)
        self.words, self.head = kind(5, 7, batch_first=True, **settings), nn.Linear(7 * (1 + len(settings) // 2), 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden(self.conv(x).relu()).mean(2).transpose(1, 2)
        return self.head(self.words(x)[0][:, -1])


@pytest.mark.filterwarnings("ignore:No channel rule:UserWarning")
@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize("both", [False, True])
def test_recurrent_layers_cost_their_matrices(kind: Any, gates: int, both: bool) -> None:
    """Torch's counter passes over what a library computes at once."""
    settings = {"bidirectional": True, "num_layers": 2} if both else {}
    x = images(2, 1, 8, 4)
    network = PrunableNetwork(_Reading(kind, **settings), x)
    first = gates * 7 * (5 + 7)
    recurrent = 2 * first + 2 * gates * 7 * (2 * 7 + 7) if both else first
    for width in (6, 3):
        layers = 8 * 4 * width * (9 + 5)
        assert network.macs([width]) == 2 * (layers + 4 * recurrent + 7 * (1 + both) * 3)


class _Optional(nn.Module):
    """Layers that the example leads past: an auxiliary output, a branch on the size, a method beside the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 4)
        self.aux, self.more, self.scale = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, 3), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor, aux: bool = False) -> Any:
        x = self.a(x).relu()
        y = (self.b(x) if x.shape[-1] < 8 else self.more(x)).relu()
        y = self.head(y.mean((2, 3)))
        return (y, self.aux(x)) if aux else y


@pytest.mark.parametrize(
    ("example", "named"),
    [
        ((images(1, 3, 8, 8),), "'aux.weight' and 1 more"),
        ((images(1, 3, 8, 8), True), "'more.weight'"),
        ((images(1, 3, 12, 12), True), "'b.weight'"),
    ],
)
def test_layers_that_the_example_does_not_reach_are_named(example: Any, named: str) -> None:
    with pytest.warns(
        UserWarning, match=f"_Optional does not reach {named} on the example input: it stays as it is"
    ) as said:
        network = PrunableNetwork(_Optional(), example)
    assert len(said) == 1
    network.slim(network.widths // 2)(*example)


def test_parts_of_the_package_come_when_they_are_asked_for() -> None:
    code = (
        "import sys, gnnrl_gym; assert 'gnnrl_gym.export' not in sys.modules; gnnrl_gym.export.export_onnx; "
        "gnnrl_gym.wrappers.PadGraph; gnnrl_gym.zoo.load_data; assert not hasattr(gnnrl_gym, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
