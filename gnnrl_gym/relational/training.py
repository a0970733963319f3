"""Networks to mask, and how they are trained: the same seeds and the same recipe for every mask."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnnrl_gym.evaluation.determinism import deterministic
from gnnrl_gym.evaluation.training import main_output, undisturbed
from gnnrl_gym.relational.masks import Masking
from gnnrl_gym.zoo import DataSplits, Split, load_model
from gnnrl_gym.zoo.data import augment
from gnnrl_gym.zoo.split import training_batches

BATCH = 128
_MLP = re.compile(r"mlp(-\d+)+")


def make_network(name: str, data: DataSplits, seed: int) -> nn.Module:
    """A network with random weights: `mlp-H1-H2-...` (ReLU between linear layers), or a name for `load_model`.

    Raises:
        ValueError: unknown name, or a layer without units.
    """
    if not _MLP.fullmatch(name):
        return load_model(name, "random", data.num_classes, seed=seed)
    sizes = [math.prod(data.input_shape), *map(int, name.split("-")[1:]), data.num_classes]
    if 0 in sizes:
        raise ValueError(f"{name!r} has a layer of 0 units: every number in mlp-H1-H2-... is at least 1.")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # a GPU's stays as it is
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum 0.9, batches of 128, a cosine from `learning_rate` to 0.

    Attributes:
        learning_rate, weight_decay: of SGD.
        shift: pixels, each way, by which training images are shifted at random; 0 for none.
    """

    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    shift: int = 0

    def shifted(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The images [n, C, H, W] of a batch, shifted."""
        return augment(images, generator, self.shift, flip=False) if self.shift else images


class Trainer:
    """Trains masked networks on the train split. Everything but the mask is the same for equal seeds.

    Args:
        data: its train and search splits are kept in memory, normalised.
        network: a name for `make_network`, or a module, which is trained from its present weights.
        masking: the layers that graphs mask; None to train dense networks only.
        device: where to train.
    """

    def __init__(
        self, data: DataSplits, network: str | nn.Module, masking: Masking | None, device: torch.device
    ) -> None:
        self.data, self.network, self.masking, self.device = data, network, masking, device
        self._train, self._search = self._placed(data.train), self._placed(data.search)

    def train(self, graph: nx.Graph | None, epochs: int, seed: int, recipe: Recipe | None = None) -> nn.Module:
        """A trained network with the masks of `graph` (None: dense), in eval mode, after the last epoch.

        Args:
            graph: its nodes own the channels, its edges are the connections that stay.
            epochs: passes over the train split.
            seed: of the initial weights, of the order of the images and of their shifts.
            recipe: learning rate, weight decay and shifts. None: `Recipe()`.
        """
        recipe, (images, labels) = recipe or Recipe(), self._train
        with undisturbed(seed, self.device), deterministic(self.device, attention=True):
            model = self.fresh(graph, seed).to(self.device).train()
            steps = epochs * self.data.train.shuffled_batches(BATCH)
            optimizer = torch.optim.SGD(
                model.parameters(), recipe.learning_rate, momentum=0.9, weight_decay=recipe.weight_decay, nesterov=True
            )
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
            generator = torch.Generator().manual_seed(seed)
            for _ in range(epochs):
                order = torch.randperm(len(labels), generator=generator).to(self.device)
                for part in training_batches(order, BATCH):
                    outputs = main_output(model(recipe.shifted(images[part], generator)))
                    loss = F.cross_entropy(outputs, labels[part])
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    optimizer.step()
                    schedule.step()
        return model.eval()

    def search_accuracy(self, model: nn.Module) -> float:
        """Top-1 accuracy in [0, 1] on the search split."""
        return _accuracy(model, *self._search)

    def test_accuracy(self, model: nn.Module) -> float:
        """Top-1 accuracy in [0, 1] on the test split: once for a network, at the end, to choose nothing."""
        return _accuracy(model, *self._placed(self.data.test))

    def fresh(self, graph: nx.Graph | None, seed: int) -> nn.Module:
        """An untrained network with the masks of `graph` (None: dense) and the initial weights of `seed`."""
        model = make_network(self.network, self.data, seed) if isinstance(self.network, str) else self.network
        # a graph of one node masks nothing: dense networks take the same way
        return (self.masking or Masking((), (), 0)).apply(model, graph or nx.empty_graph(1))

    def _placed(self, split: Split) -> tuple[Tensor, Tensor]:
        images, labels = split.tensors()
        return images.to(self.device), labels.to(self.device)


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.inference_mode(), torch.autocast(images.device.type, enabled=False):  # as it was trained
        # copies: a forward may change its input in place
        predicted = torch.cat([model(part.clone()).argmax(1) for part in images.split(1024)])
    return int((predicted == labels).sum()) / len(labels)
