"""Fine-tuning: train the pruned network; the last epoch counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from gnnrl_gym.backends import gpus_of
from gnnrl_gym.checks import check_choice, check_number, check_seed, check_whole
from gnnrl_gym.evaluation.determinism import deterministic
from gnnrl_gym.evaluation.layout import put_on
from gnnrl_gym.evaluation.training import main_output
from gnnrl_gym.files import digest_of, write_atomic
from gnnrl_gym.pruning.draws import seeded
from gnnrl_gym.zoo import DataSplits
from gnnrl_gym.zoo.data import augment

BATCH = 128
SCHEDULES = ("cosine", "one-cycle")
TEMPERATURE = 4.0


def finetune(
    model: nn.Module,
    data: DataSplits,
    epochs: int,
    learning_rate: float = 0.02,
    seed: int = 0,
    device: torch.device | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
    schedule: str = "cosine",
    teacher: nn.Module | None = None,
    temperature: float = TEMPERATURE,
    distill: float = 0.5,
    dtype: torch.dtype = torch.float32,
    checkpoint: Path | None = None,
) -> nn.Module:
    """Train `model` in place on the train split: SGD with Nesterov momentum 0.9, weight decay 5e-4, crops (and flips
    where they make sense). Of several outputs the first is trained (`main_output`). Equal seeds give equal networks,
    interrupted or not; on a GPU where it has deterministic algorithms for all that the network does.

    Args:
        model: a classifier; images [N, C, H, W] in, scores [N, classes] out.
        data: its train split is used, its normalisation, and whether images may be mirrored (`flip`).
        epochs: passes over the train split; 0 leaves the model as it is.
        learning_rate: the peak of the schedule.
        seed: of the order of the images, their crops, and what the network draws (dropout); in [0, 2**32).
        device: where to train; the network is moved there. None: where its parameters are.
        on_epoch: called with (epoch from 1, mean training loss) after each.
        schedule: "cosine": from the peak to 0. "one-cycle": up to the peak in three tenths of the steps, then down to
            0, and the momentum from 0.95 to 0.85 and back (Smith and Topin 2017).
        teacher: a network, the dense one say, whose outputs are learned besides the labels; it is put on the device, in
            eval mode. temperature, distill: see `distillation_loss`.
        dtype: bfloat16 computes in mixed precision (`gnnrl_gym.evaluation.precision`); the weights stay float32.
        checkpoint: file that is written after each epoch. Where it holds an interrupted training of this network with
            these settings and data (labels and normalisation are compared), that goes on; any other is replaced. It is
            the caller's to remove.

    Returns:
        `model`, in eval mode, after the last epoch. No split chooses an epoch.

    Raises:
        ValueError: `schedule` is unknown, `distill` is outside [0, 1], `learning_rate` or `temperature` is not above 0,
            `epochs` is not a whole number of at least 0, or `seed` is not one in [0, 2**32). Also after an epoch whose
            loss or weights are not finite; no checkpoint is written then.
    """
    check_whole(0, epochs=epochs)
    check_seed(seed=seed)
    check_number("above 0", learning_rate=learning_rate, temperature=temperature)
    _check(schedule, distill)
    device = device or next(model.parameters()).device
    layout = put_on(device, data, model, teacher)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * data.train.shuffled_batches(BATCH)
    scheduler = _scheduler(schedule, optimizer, learning_rate, max(steps, 1))
    training = _Training(model, optimizer, scheduler, generator, layout)
    settings: dict[str, Any] = {"epochs": epochs, "learning_rate": learning_rate, "seed": seed, "schedule": schedule}
    settings |= {"temperature": temperature, "distill": distill, "dtype": str(dtype)}
    settings |= _material(data, model, teacher) if checkpoint else {}
    step = _step(model, teacher, device, dtype, temperature, distill)
    done = training.load(checkpoint, settings) if checkpoint else 0
    with deterministic(device, attention=True):
        for epoch in range(done + 1, epochs + 1):
            with seeded(gpus_of([device]), 1000 * seed + epoch):  # dropout draws from the global generator
                loss = training.epoch(data, device, step)
            if not (math.isfinite(loss) and all(weight.isfinite().all() for weight in model.parameters())):
                raise ValueError(f"The training diverged in epoch {epoch}, its loss is {loss}: lower {learning_rate=}.")
            if checkpoint:
                training.save(checkpoint, settings, epoch)
            if on_epoch:
                on_epoch(epoch, loss)
    return model.eval()


def _step(
    model: nn.Module, teacher: nn.Module | None, device: torch.device, dtype: torch.dtype, temperature: float,
    distill: float,
) -> Callable[[Tensor, Tensor], Tensor]:  # fmt: skip
    """The loss of a batch of images [N, C, H, W] and labels [N], a scalar with a gradient."""

    def step(images: Tensor, labels: Tensor) -> Tensor:
        # no cache: under an autocast of the caller's it would keep the weights as they were in the first step
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False):
            with torch.no_grad():
                taught = None if teacher is None else teacher(images.clone())  # it may change its input in place
            outputs = main_output(model(images))
        return distillation_loss(outputs, labels, taught, temperature, distill)

    return step


def _material(data: DataSplits, model: nn.Module, teacher: nn.Module | None) -> dict[str, Any]:
    """What a training is made from, in few numbers: the images by their labels, shape and normalisation."""
    given = {"labels": {"labels": data.train.labels}, "model": model.state_dict()}
    given["teacher"] = {} if teacher is None else teacher.state_dict()
    about = {"images": len(data.train), "shape": data.input_shape, "flip": data.flip}
    about |= {"mean": data.mean, "std": data.std}
    return about | {name: digest_of(tensors) for name, tensors in given.items()}


def distillation_loss(
    outputs: Tensor, labels: Tensor, taught: Tensor | None, temperature: float = TEMPERATURE, weight: float = 0.5
) -> Tensor:
    """Cross-entropy, and with `weight` the divergence from the teacher's outputs instead, a scalar in nats.

    ``(1 - weight) * CE + weight * T**2 * KL(teacher at T || student at T)``: Hinton, Vinyals, Dean, "Distilling the
    knowledge in a neural network" (2015), section 2; T**2 keeps the gradients' size whatever the temperature T is.

    Args:
        outputs, taught: of the student and the teacher, [N, classes]; without `taught` cross-entropy alone.
        labels: int64 [N].
    """
    loss = F.cross_entropy(outputs.float(), labels)
    if taught is None:
        return loss
    student, target = ((logits.float() / temperature).log_softmax(1) for logits in (outputs, taught))
    divergence = F.kl_div(student, target, reduction="batchmean", log_target=True)
    return (1 - weight) * loss + weight * temperature**2 * divergence


@dataclass
class _Training:
    """What changes while a network trains."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    generator: torch.Generator
    layout: torch.memory_format

    def epoch(self, data: DataSplits, device: torch.device, loss: Callable[[Tensor, Tensor], Tensor]) -> float:
        """One pass over the train split: the mean loss."""
        self.model.train()
        total = torch.zeros((), dtype=torch.float64, device=device)  # read once, at the end
        eighth = (data.input_shape[1] // 8, data.input_shape[2] // 8)  # as 4 pixels of CIFAR's 32
        for images, labels in data.train.batches(BATCH, self.generator):
            images = augment(images.to(device), self.generator, eighth, flip=data.flip)
            value = loss(images.contiguous(memory_format=self.layout), labels.to(device))
            self.optimizer.zero_grad(set_to_none=True)
            value.backward()
            self.optimizer.step()
            self.scheduler.step()
            total += value.detach() * len(labels)
        return float(total) / len(data.train)

    def save(self, path: Path, settings: dict[str, Any], epoch: int) -> None:
        """Write everything, at once or not at all."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        state = {**parts, "generator": self.generator.get_state(), "settings": settings, "epoch": epoch}
        write_atomic(path, lambda file: torch.save(state, file))

    def load(self, path: Path, settings: dict[str, Any]) -> int:
        """Go on from a file, if it is there and of a training with the same settings: the epochs that are done."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else {}
        except Exception:  # a damaged file, which holds no training to go on with
            return 0
        if not isinstance(state, dict) or state.get("settings") != settings:
            return 0
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        return int(state["epoch"])

    def _parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}


def _scheduler(name: str, optimizer: torch.optim.Optimizer, peak: float, steps: int) -> LRScheduler:
    if name == "cosine":
        return CosineAnnealingLR(optimizer, steps)
    return OneCycleLR(optimizer, peak, steps)


def _check(schedule: str, distill: float) -> None:
    check_choice("schedule", schedule, SCHEDULES)
    if not isinstance(distill, Real) or not 0 <= distill <= 1:
        raise ValueError(f"distill is a weight in [0, 1], got {distill!r}.")
