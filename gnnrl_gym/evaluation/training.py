"""Training from scratch, dense or pruned: the last epoch counts."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnnrl_gym.backends import gpus_of
from gnnrl_gym.checks import check_choice, check_number, check_whole
from gnnrl_gym.evaluation.determinism import deterministic
from gnnrl_gym.evaluation.layout import put_on
from gnnrl_gym.pruning.draws import seeded
from gnnrl_gym.zoo.data import DataSplits, augment

WARM_UP = 0.2  # share of the steps in which the learning rate rises
OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: the learning rate rises linearly for the first fifth of the steps and falls linearly
    to 0 in the rest.

    Attributes:
        epochs: passes over the train split. learning_rate: the highest. batch: images per step.
        optimizer: "sgd", with Nesterov momentum 0.9, or "adamw".
        weight_decay: of all parameters.
        shift: largest random shift of an image, in pixels, with mirror images where the data allows them; None for
            images as they are.
        bfloat16: whether matrix products are computed in it (autocast; weights stay float32).

    Raises:
        ValueError: a number out of range.
    """

    epochs: int
    learning_rate: float = 0.05
    batch: int = 128
    weight_decay: float = 5e-4
    shift: int | None = None
    bfloat16: bool = False
    optimizer: str = "sgd"

    def __post_init__(self) -> None:
        check_whole(1, epochs=self.epochs, batch=self.batch)
        check_whole(0, shift=self.shift or 0)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_number("above 0", learning_rate=self.learning_rate)
        check_number("at least 0", weight_decay=self.weight_decay)

    def of(self, **changes: Any) -> Recipe:
        """A copy with `changes` applied; a change whose value is None is ignored."""
        return replace(self, **{key: value for key, value in changes.items() if value is not None})

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


RECIPES = {
    "mlp-300-100": Recipe(epochs=15, learning_rate=0.1, weight_decay=1e-4, shift=1),
    # its linear layer reads 32,768 features: SGD at rates that suit the convolutions, or little decay, make it noisy
    "cnn-4": Recipe(epochs=6, learning_rate=1e-3, weight_decay=1.0, shift=0, bfloat16=True, optimizer="adamw"),
}
DEFAULT = Recipe(epochs=10)


def recipe_for(model: object) -> Recipe:
    """The recipe of a network by name, else the general one."""
    return RECIPES.get(model, DEFAULT) if isinstance(model, str) else DEFAULT


def train(
    model: nn.Module,
    data: DataSplits,
    recipe: Recipe,
    seed: int = 0,
    device: torch.device | None = None,
    steps: int | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> nn.Module:
    """Train `model` in place on the train split.

    Equal seeds give equal runs (on the CPU, with equal threads), and the global random state stays as it is.

    Args:
        model: a classifier; images [N, C, H, W] in, scores [N, classes] out. Of several outputs the first is trained.
        data: its train split is used, its normalisation, and whether images may be mirrored (`flip`).
        recipe: epochs, learning rate, batch size, and so on.
        seed: of the order of the images, their shifts, and what the network draws (dropout).
        device: where to train; the network is moved there. None: where its parameters are.
        steps: stop after so many batches, with the schedule drawn together to them, instead of after the epochs.
        on_epoch: called with (epoch from 1, mean training loss) after each whole epoch.

    Returns:
        `model`, in eval mode, after the last step. No split chooses one.
    """
    device = device or next(model.parameters()).device
    per_epoch = data.train.shuffled_batches(recipe.batch)
    total = steps or recipe.epochs * per_epoch
    losses = []
    with undisturbed(seed, device), deterministic(device, attention=True):
        layout = put_on(device, data, model)
        model.train()
        optimizer = _optimizer(model, recipe)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _triangle(step, total))
        for step, batch in enumerate(itertools.islice(_batches(data, recipe, seed, device, layout), total), 1):
            losses.append(_step(model, optimizer, *batch, recipe.bfloat16))
            schedule.step()
            if step % per_epoch == 0 and on_epoch:
                on_epoch(step // per_epoch, float(torch.stack(losses[-per_epoch:]).mean()))
    return model.eval()


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    decay = recipe.weight_decay
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), recipe.learning_rate, betas=(0.9, 0.99), weight_decay=decay)
    return torch.optim.SGD(model.parameters(), recipe.learning_rate, momentum=0.9, weight_decay=decay, nesterov=True)


def _triangle(step: int, total: int) -> float:
    rising = max(WARM_UP * total, 1)
    return min((step + 1) / rising, (total - step) / max(total - rising, 1), 1.0)


@contextlib.contextmanager
def undisturbed(seed: int, device: torch.device) -> Iterator[None]:
    """Gradients inside are the same wherever they are computed. What a network draws itself, such as dropout, comes
    from `seed`, and the global generators are put back afterwards. Gradients are on, and a caller's autocast is off:
    its cache would keep the weights as they were in the first step."""
    off = torch.autocast(device.type, enabled=False)
    with seeded(gpus_of([device]), seed), torch.inference_mode(False), torch.enable_grad(), off:
        yield


def _batches(
    data: DataSplits, recipe: Recipe, seed: int, device: torch.device, layout: torch.memory_format
) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for images, labels in data.train.batches(recipe.batch, generator):
            images = images.to(device)
            if recipe.shift is not None:
                images = augment(images, generator, recipe.shift, flip=data.flip)
            yield images.contiguous(memory_format=layout), labels.to(device)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, bfloat16: bool) -> Tensor:
    # no cache: inside the autocast of `undisturbed` it would keep the weights as they were in the first step
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16, cache_enabled=False):
        outputs = main_output(model(images))
    loss = F.cross_entropy(outputs.float(), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()  # still on the device: waiting for it would stop what prepares the next batch


def main_output(outputs: Any) -> Tensor:
    """The first tensor of what a forward gives. In training mode some give more, as GoogLeNet does its auxiliary heads'
    answers: those have no part in the loss."""
    while not isinstance(outputs, Tensor):
        outputs = next(iter(outputs.values() if isinstance(outputs, Mapping) else outputs))
    return outputs
