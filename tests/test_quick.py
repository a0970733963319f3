"""Scoring in bfloat16 on a CPU: what makes it quick changes no bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import images, random_plans, randomise
from torch import Tensor, nn

from gnnrl_gym import PrunableNetwork
from gnnrl_gym.evaluation.accuracy import PlanEvaluator
from gnnrl_gym.evaluation.quick import IntegerReLU, can_be_quick, cast_weights, replace_relus
from gnnrl_gym.zoo import load_data, load_model


def small(*middle: nn.Module) -> nn.Sequential:
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    return randomise(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), *middle, *pool))


class LeavesAutocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x = self.conv(x).relu()
        return self.head(x.mean((2, 3)))


class ReadsBias(nn.Module):
    """Computes with the linear layer's bias in float32, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3))) + self.head.bias.exp()


def test_integer_relu_is_relu_for_every_number() -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    every = every[~every.isnan()]
    given = every.clone()
    found = IntegerReLU(inplace=True)(given)
    assert found is given
    assert torch.equal(found, F.relu(every))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_integer_relu_takes_every_type_and_layout(dtype: torch.dtype) -> None:
    x = images(2, 3, 5, 7).to(dtype)
    for given in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3), x[:, :, ::2, 1:]):
        assert torch.equal(IntegerReLU(inplace=True)(given.clone()), given.relu())


@pytest.mark.parametrize(
    "make",
    [lambda: load_model("digits-resnet"), lambda: small(nn.ReLU(inplace=True)), lambda: small(nn.ReLU()),
     LeavesAutocast, ReadsBias],
    ids=["resnet", "in place", "not in place", "leaves autocast", "reads a bias"],
)  # fmt: skip
def test_quick_outputs_are_the_same_to_the_bit(make: Callable[[], nn.Module]) -> None:
    data, network = load_data("digits"), PrunableNetwork(make(), torch.zeros(1, 1, 8, 8))
    before = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
    evaluator = PlanEvaluator(network, data.train, data.search.take(100), 64, precision="bfloat16")
    quick = evaluator._quick
    for plan in random_plans(network, 4):
        evaluator._quick = quick
        found = evaluator._outputs(plan, evaluator._search)
        evaluator._quick = False
        assert torch.equal(found, evaluator._outputs(plan, evaluator._search))
    after = network.model.state_dict()
    assert all(after[name].dtype == old.dtype and torch.equal(after[name], old) for name, old in before.items())


def test_only_torchs_own_layers_are_replaced() -> None:
    class Doubled(nn.ReLU):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = small(nn.ReLU(inplace=True), Doubled(inplace=True), nn.ReLU())
    kinds = [type(layer) for layer in replace_relus(model)]
    assert kinds[2:5] == [IntegerReLU, Doubled, nn.ReLU]
    cast_weights(model)
    assert [model[at].weight.dtype for at in (0, 1, -1)] == [torch.bfloat16, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("make", [LeavesAutocast, ReadsBias])
def test_networks_that_would_differ_are_left_alone(make: Callable[[], nn.Module]) -> None:
    example = torch.zeros(1, 1, 8, 8)
    assert not can_be_quick(PrunableNetwork(make(), example))
    assert can_be_quick(PrunableNetwork(small(nn.ReLU(inplace=True)), example))


def test_float32_is_scored_as_it_is() -> None:
    data, network = load_data("digits"), PrunableNetwork(load_model("digits-resnet"), torch.zeros(1, 1, 8, 8))
    assert not PlanEvaluator(network, data.train, data.search.take(10), 64, precision="float32")._quick
    assert PlanEvaluator(network, data.train, data.search.take(10), 64, precision="bfloat16")._quick
