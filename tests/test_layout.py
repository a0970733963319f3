"""Networks that can't be channels last are scored and trained as they are."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import old_export
from torch import Tensor, nn

from agents import search
from gnnrl_gym.copies import copy_of
from gnnrl_gym.evaluation.accuracy import PlanEvaluator, accuracy
from gnnrl_gym.evaluation.batched import BatchedCandidates, obstacle
from gnnrl_gym.evaluation.finetuning import finetune
from gnnrl_gym.evaluation.layout import fitting_layout
from gnnrl_gym.evaluation.training import Recipe, train
from gnnrl_gym.pruning.network import PrunableNetwork
from gnnrl_gym.zoo import DataSplits, load_data

IMAGES = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Flat(nn.Module):
    """Reads an image's pixels after a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8 * 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flat(self.norm(self.conv(x)).relu()))

    def flat(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class Viewed(Flat):
    def flat(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), -1)


class Deep(nn.Module):
    """A convolution in three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv3d(1, 4, 3, padding=1), nn.Linear(4 * 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x[:, :, None]).relu().flatten(1))


class OnlyInTraining(Flat):
    """As networks whose second head is for training alone."""

    def flat(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1) if self.training else x.flatten(1)


@pytest.fixture(scope="module")
def digits() -> DataSplits:
    return load_data("digits")


def seeded(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


@pytest.mark.parametrize("kind, fits", [(Flat, True), (Viewed, False), (Deep, False), (OnlyInTraining, False)])
def test_the_layout_is_one_that_the_network_takes(kind: type[nn.Module], fits: bool) -> None:
    teacher, network = seeded(Flat), seeded(kind)
    state = torch.random.get_rng_state()
    before = copy_of(network)
    assert fitting_layout(IMAGES, network) == (torch.channels_last if fits else torch.contiguous_format)
    assert fitting_layout(IMAGES, teacher, None, network) == fitting_layout(IMAGES, network)  # a teacher, say
    assert torch.equal(torch.random.get_rng_state(), state)
    assert network.training and all(map(torch.equal, network.state_dict().values(), before.state_dict().values()))
    assert fitting_layout(torch.zeros(4, 16), nn.Linear(16, 2)) == torch.contiguous_format  # no images


def test_what_views_is_worth_what_flattens_is(digits: DataSplits) -> None:
    """Scores of plans, one by one and in one batch, and trainings, agree but for rounding."""
    flat, viewed = (PrunableNetwork(seeded(kind), IMAGES[:1]) for kind in (Flat, Viewed))
    plans = [np.array([3]), np.array([8])]
    scores = []
    for network in (flat, viewed):
        evaluator = PlanEvaluator(network, digits.train, digits.search, precision="float32")
        assert evaluator.layout == (torch.channels_last if network is flat else torch.contiguous_format)
        scores.append([evaluator.score(plan) for plan in plans])
    assert scores[1] == pytest.approx(scores[0], abs=0.02)
    assert obstacle(viewed) is None
    candidates = BatchedCandidates(viewed)
    candidates.calibrate(plans, IMAGES)
    assert candidates.logits(IMAGES).shape == (2, 4, 10)

    few = {"flat": flat.model, "viewed": viewed.model}
    for name, model in few.items():
        few[name] = finetune(copy_of(model), digits, 1, teacher=seeded(Viewed))
        train(few[name], digits, Recipe(epochs=1), steps=3)
    found = [accuracy(model, digits.test) for model in few.values()]
    assert found[0] > 0.4 and found[1] == pytest.approx(found[0], abs=0.02)


@pytest.mark.parametrize("kind", [Viewed, Deep, OnlyInTraining])
@pytest.mark.parametrize("task", ["GNNRL-Prune-v0", "GNNRL-Mask-v0"])
def test_environments_take_such_networks(task: str, kind: type[nn.Module], digits: DataSplits) -> None:
    more: dict[str, Any] = {"search_images": 20, "recalibration_images": 20}
    env = gym.make(task, model=seeded(kind), data=digits, **more)
    env.reset(seed=0)
    assert -1 <= float(env.step(env.action_space.sample())[1]) <= 0


@old_export
def test_a_network_that_keeps_its_activations_is_searched(digits: DataSplits, tmp_path: Any) -> None:
    """Just trained by the caller, it holds a tensor with gradients, which `copy.deepcopy` refuses."""

    class Keeps(Flat):
        def flat(self, x: Tensor) -> Tensor:
            self.kept = x
            return x.flatten(1)

    model = seeded(Keeps)
    model(IMAGES)
    for task in ("GNNRL-Prune-v0", "GNNRL-Mask-v0"):
        env = gym.make(task, model=model, data=digits, search_images=20)
        assert env.reset(seed=0)[0].nodes.size
    result = search(
        gym.make("GNNRL-Prune-v0", model=model, data=digits, search_images=20), "uniform", out=tmp_path / "run"
    )
    assert result.pruned(model)(IMAGES).shape == (4, 10)
