"""Fine-tuning: its schedules, its loss, its precision, and that an interrupted one goes on."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from agents import SearchResult, search
from agents.refine import finetune_run
from gnnrl_gym.evaluation.accuracy import accuracy, logits
from gnnrl_gym.evaluation.determinism import deterministic
from gnnrl_gym.evaluation.finetuning import SCHEDULES, distillation_loss, finetune
from gnnrl_gym.evaluation.training import Recipe, train
from gnnrl_gym.zoo import DataSplits, load_data, load_model

Env = gym.Env[Any, Any]


@pytest.fixture(scope="module")
def digits() -> DataSplits:
    data = load_data("digits")
    return replace(data, train=data.train.take(400))


class Steep(nn.Module):
    """Large gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return 1e4 * self.layer(x.flatten(1))


class Dropped(nn.Module):
    """A network that draws while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.dropout = load_model("digits-resnet", "random", seed=0), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.network(x))


def vector(model: nn.Module) -> Tensor:
    return torch.cat([tensor.flatten().float() for tensor in model.state_dict().values()])


def rates(
    data: DataSplits, schedule: str, patch: pytest.MonkeyPatch, epochs: int = 10, images: int = 256
) -> list[float]:
    """The learning rate of every step."""
    found: list[float] = []
    step = torch.optim.SGD.step

    def watched(self: torch.optim.SGD, *args: Any) -> Any:
        found.append(self.param_groups[0]["lr"])
        return step(self, *args)

    patch.setattr(torch.optim.SGD, "step", watched)
    small = replace(data, train=data.train.take(images))
    finetune(load_model("digits-resnet"), small, epochs, 0.1, schedule=schedule)
    return found


def test_cosine_falls_from_the_peak(digits: DataSplits, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rates(digits, "cosine", monkeypatch)
    assert len(found) == 20 and found[0] == 0.1
    assert found[10] == pytest.approx(0.05)
    assert found == sorted(found, reverse=True) and found[-1] < 0.001


def test_an_image_left_alone_makes_no_step(digits: DataSplits, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rates(digits, "cosine", monkeypatch, images=129)  # batches of 128; the last image joins the one before
    assert len(found) == 10 and found[-1] == pytest.approx(0.1 * (1 - math.cos(math.pi / 10)) / 2)
    epochs, steps = [], []
    data, model = replace(digits, train=digits.train.take(129)), load_model("digits-resnet")
    model.register_forward_hook(lambda layer, given, found: steps.append(len(found)))
    train(model, data, Recipe(epochs=3), on_epoch=lambda epoch, loss: epochs.append(epoch))
    assert epochs == [1, 2, 3] and [size for size in steps if size > 2] == [129] * 3  # two images try the layout


def test_one_cycle_rises_and_falls(digits: DataSplits, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rates(digits, "one-cycle", monkeypatch)
    top = found.index(max(found))
    assert 4 <= top <= 6 and found[top] == pytest.approx(0.1, rel=1e-3)
    assert found[0] < 0.01 and found[-1] < 0.001
    assert found[:top] == sorted(found[:top]) and found[top:] == sorted(found[top:], reverse=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_schedule_and_precision_learns(digits: DataSplits, schedule: str, dtype: torch.dtype) -> None:
    model = load_model("digits-resnet", "random", seed=0)
    before, losses = accuracy(model, digits.test), []
    finetune(model, digits, 6, 0.1, schedule=schedule, dtype=dtype, on_epoch=lambda _, loss: losses.append(loss))
    assert len(losses) == 6 and losses[-1] < 0.6 * losses[0]
    assert accuracy(model, digits.test) > before + 0.4
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}


def test_precision_is_really_lower(digits: DataSplits) -> None:
    results = [finetune(load_model("digits-resnet"), digits, 1, dtype=d) for d in (torch.float32, torch.bfloat16)]
    full, half = (vector(model) for model in results)
    assert not torch.equal(full, half)
    torch.testing.assert_close(full, half, rtol=0.1, atol=0.1)


def test_no_epochs_change_nothing(digits: DataSplits) -> None:
    assert torch.equal(vector(finetune(load_model("digits-resnet"), digits, 0)), vector(load_model("digits-resnet")))


# ---- distillation ----------------------------------------------------------------------------------------------


def test_distillation_loss_by_hand() -> None:
    outputs, taught, labels = torch.randn(5, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    p, q = ((logits / 2.0).softmax(1) for logits in (taught, outputs))
    divergence = (p * (p / q).log()).sum(1).mean()
    hard = -outputs.log_softmax(1)[torch.arange(5), labels].mean()
    found = distillation_loss(outputs, labels, taught, temperature=2.0, weight=0.3)
    torch.testing.assert_close(found, 0.7 * hard + 0.3 * 4.0 * divergence)
    torch.testing.assert_close(distillation_loss(outputs, labels, None, weight=0.3), hard)
    assert distillation_loss(taught, labels, taught, weight=1.0) == pytest.approx(0, abs=1e-6)


class Scaled(nn.Module):
    """The digits network on images that its forward scales, in place or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.network, self.in_place = load_model("digits-resnet", "random", seed=0), in_place

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.mul_(2) if self.in_place else x * 2)


def test_teacher_and_student_see_the_same_images(digits: DataSplits) -> None:
    small = replace(digits, train=digits.train.take(128))
    tuned = [finetune(Scaled(way), small, 1, teacher=Scaled(way), distill=0.5) for way in (True, False)]
    assert torch.equal(*(vector(model) for model in tuned))


def test_a_compiled_teacher(digits: DataSplits) -> None:
    small = replace(digits, train=digits.train.take(128))
    for teacher in (torch.compile(load_model("digits-resnet"), backend="eager"), load_model("digits-resnet")):
        finetune(load_model("digits-resnet", "random"), small, 1, teacher=teacher, distill=0.5)


def test_a_checkpoint_that_can_not_be_read_is_replaced(digits: DataSplits, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    small = replace(digits, train=digits.train.take(128))
    epochs: list[int] = []
    finetune(load_model("digits-resnet"), small, 1, on_epoch=lambda epoch, _: epochs.append(epoch),
             checkpoint=tmp_path / "checkpoint.pt")  # fmt: skip
    assert epochs == [1] and torch.load(tmp_path / "checkpoint.pt")["epoch"] == 1


def test_the_student_comes_nearer_to_its_teacher_whatever_the_labels_say(digits: DataSplits) -> None:
    images, _ = digits.test.tensors()
    wrong = replace(digits.train, labels=(digits.train.labels + 1) % 10)
    teacher = load_model("digits-resnet")
    before = vector(teacher)
    taught = logits(teacher, images).argmax(1)
    agreement = []
    for distill in (0.0, 1.0):
        student = load_model("digits-resnet", "random", seed=0)
        finetune(student, replace(digits, train=wrong), 10, 0.1, teacher=teacher, distill=distill)
        agreement.append(float((logits(student, images).argmax(1) == taught).float().mean()))
    assert agreement[0] < 0.2 and agreement[1] > 0.6
    assert torch.equal(vector(teacher), before)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"schedule": "linear"}, "cosine, one-cycle"),
        ({"distill": 1.5}, "weight"),
        ({"distill": -0.1}, "weight"),
        ({"distill": "a"}, "weight"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"learning_rate": math.nan}, "learning_rate must be a number above 0, got nan"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"epochs": 1.5}, "epochs must be a whole number"),
        ({"epochs": -1}, "epochs must be a whole number"),
    ],
)
def test_wrong_settings_are_refused(digits: DataSplits, wrong: dict[str, Any], said: str) -> None:
    model = load_model("digits-resnet")
    with pytest.raises(ValueError, match=said):
        finetune(model, digits, **{"epochs": 1, **wrong})
    assert torch.equal(vector(model), vector(load_model("digits-resnet")))


# ---- interruption ----------------------------------------------------------------------------------------------


def stop_after(epochs: int) -> Any:
    def on_epoch(epoch: int, loss: float) -> None:
        if epoch == epochs:
            raise KeyboardInterrupt

    return on_epoch


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_resumed_equals_uninterrupted(digits: DataSplits, tmp_path: Path, schedule: str) -> None:
    whole = finetune(Dropped(), digits, 3, schedule=schedule, seed=2)
    torch.rand(7)  # what the caller draws has no part in it
    with pytest.raises(KeyboardInterrupt):
        finetune(Dropped(), digits, 3, schedule=schedule, seed=2, checkpoint=tmp_path / "c", on_epoch=stop_after(2))
    done: list[int] = []
    resumed = finetune(
        Dropped(), digits, 3, schedule=schedule, seed=2, checkpoint=tmp_path / "c", on_epoch=lambda e, _: done.append(e)
    )
    assert done == [3]
    assert torch.equal(vector(resumed), vector(whole))


@pytest.mark.parametrize("other", [{"seed": 3}, {"learning_rate": 0.1}, {"epochs": 4}, {"dtype": torch.bfloat16}])
def test_a_checkpoint_of_other_settings_has_no_part(digits: DataSplits, tmp_path: Path, other: dict[str, Any]) -> None:
    settings = {"epochs": 2, "seed": 2, **other}
    whole = finetune(load_model("digits-resnet"), digits, **settings)
    with pytest.raises(KeyboardInterrupt):
        finetune(load_model("digits-resnet"), digits, 2, seed=2, checkpoint=tmp_path / "c", on_epoch=stop_after(1))
    again = finetune(load_model("digits-resnet"), digits, **settings, checkpoint=tmp_path / "c")
    assert torch.equal(vector(again), vector(whole))


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04"])
def test_a_damaged_checkpoint_is_replaced(digits: DataSplits, tmp_path: Path, content: bytes) -> None:
    file, small = tmp_path / "checkpoint.pt", replace(digits, train=digits.train.take(100))
    file.write_bytes(content)
    found = finetune(load_model("digits-resnet"), small, 1, checkpoint=file)
    assert torch.equal(vector(found), vector(finetune(load_model("digits-resnet"), small, 1)))
    assert torch.load(file, weights_only=True)["epoch"] == 1


def test_weights_that_are_lost_leave_the_run_as_it_was(digits_env: Env, tmp_path: Path) -> None:
    search(digits_env, method="uniform", evaluations=1, out=tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    with pytest.raises(ValueError, match=r"diverged in epoch 1, its loss is (nan|inf): lower learning_rate"):
        finetune_run(tmp_path / "run", 2, learning_rate=1e30)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.*")} == before


def test_weights_that_the_last_step_loses_are_noticed(digits: DataSplits) -> None:
    one_step = replace(digits, train=digits.train.take(100))
    with pytest.raises(ValueError, match="diverged in epoch 1"):
        finetune(Steep(), one_step, 1, learning_rate=3e38)


class Auxiliary(nn.Module):
    """A network with a second head that only training sees."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.form, self.network, self.other = form, load_model("digits-resnet", "random", seed=0), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Any:
        y = self.network(x)
        return self.form(y, self.other(x.flatten(1))) if self.training else y


@pytest.mark.parametrize("form", [lambda y, z: (y, z), lambda y, z: {"out": y, "aux": z}, lambda y, z: [[y], z]])
def test_of_several_outputs_the_first_is_trained(digits: DataSplits, form: Any) -> None:
    torch.manual_seed(0)
    several = Auxiliary(form)
    finetune(several, digits, 1, 0.05)
    alone = finetune(load_model("digits-resnet", "random", seed=0), digits, 1, 0.05)
    torch.testing.assert_close(vector(several.network), vector(alone))
    train(several, digits, Recipe(1), 0, torch.device("cpu"), 2)


def test_it_trains_as_it_says(digits: DataSplits, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Nesterov momentum, weight decay, and images that are shifted by up to an eighth of a side."""
    import gnnrl_gym.evaluation.finetuning as module

    made, shifts = list[Any](), list[Any]()
    sgd, augment = torch.optim.SGD, module.augment

    def kept(*given: Any, **settings: Any) -> Any:
        made.append(sgd(*given, **settings))
        return made[-1]

    def seen(images: Tensor, generator: Any, most: Any, flip: bool) -> Tensor:
        shifts.append((most, flip, len(images)))
        return augment(images, generator, most, flip=flip)

    monkeypatch.setattr(torch.optim, "SGD", kept)
    monkeypatch.setattr(module, "augment", seen)
    finetune(load_model("digits-resnet"), digits, 1, 0.03)
    (optimizer,) = made
    defaults = {"lr": 0.03, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
    assert defaults.items() <= optimizer.defaults.items()
    assert sum(count for _, _, count in shifts) == len(digits.train)
    assert {each[:2] for each in shifts} == {((1, 1), False)}  # of 8 by 8 pixels; digits are not mirrored


def test_the_callers_generator_is_left_alone(digits: DataSplits) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    finetune(Dropped(), digits, 1)
    assert torch.equal(torch.rand(3), expected)


def test_an_interrupted_run_goes_on(digits_env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("whole", "killed"):
        search(digits_env, "uniform", 1, out=tmp_path / name)
    whole = finetune_run(tmp_path / "whole", 2, device="cpu", distill=0.5, schedule="one-cycle")
    before = SearchResult.load(tmp_path / "killed")

    def dies(model: nn.Module, *args: Any, **settings: Any) -> nn.Module:
        return finetune(model, *args, **settings | {"on_epoch": stop_after(1)})

    monkeypatch.setattr("agents.refine.finetune", dies)
    with pytest.raises(KeyboardInterrupt):
        finetune_run(tmp_path / "killed", 2, device="cpu", distill=0.5, schedule="one-cycle")
    assert SearchResult.load(tmp_path / "killed") == before
    assert len(list((tmp_path / "killed").glob("finetuning-*"))) == 1

    epochs: list[int] = []
    monkeypatch.setattr("agents.refine.finetune", counted(epochs))
    resumed = finetune_run(tmp_path / "killed", 2, device="cpu", distill=0.5, schedule="one-cycle")
    assert epochs == [2]
    assert resumed.finetuned_accuracy == whole.finetuned_accuracy and resumed.finetune_epochs == 2
    assert torch.equal(vector(resumed.pruned()), vector(whole.pruned()))
    assert not list((tmp_path / "killed").glob("finetuning-*"))


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_run_that_was_cut_between_its_two_files_is_not_trained_twice(
    digits_env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    for name in ("whole", "killed"):
        search(digits_env, "uniform", 1, out=tmp_path / name)
        finetune_run(tmp_path / name, 1, device="cpu")
    whole = finetune_run(tmp_path / "whole", 1, device="cpu")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SearchResult, "save", lambda *_: stop_after(1)(1, 0.0))
        finetune_run(tmp_path / "killed", 1, device="cpu")
    if epochs == 2:  # asked for something else then: once more
        whole = finetune_run(tmp_path / "whole", 2, device="cpu")
    resumed = finetune_run(tmp_path / "killed", epochs, device="cpu")
    assert torch.equal(vector(resumed.pruned()), vector(whole.pruned()))
    assert (resumed.finetuned_accuracy, resumed.finetune_epochs) == (whole.finetuned_accuracy, whole.finetune_epochs)
    assert resumed.settings == whole.settings and SearchResult.load(tmp_path / "killed") == resumed
    assert not list((tmp_path / "killed").glob("finetuning-*"))


@pytest.mark.parametrize("images", ["train", "all"])
def test_the_images_it_trains_on(digits_env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: str) -> None:
    search(digits_env, "uniform", 1, out=tmp_path / "run")
    seen: list[DataSplits] = []

    def remembers(model: nn.Module, data: DataSplits, *args: Any, **settings: Any) -> nn.Module:
        seen.append(data)
        return model

    monkeypatch.setattr("agents.refine.finetune", remembers)
    finetune_run(tmp_path / "run", 1, device="cpu", images=images)
    data = digits_env.unwrapped.data  # type: ignore[attr-defined]
    expected = [*data.train.labels.tolist(), *(data.search.labels.tolist() if images == "all" else [])]
    assert seen[0].train.labels.tolist() == expected
    assert torch.equal(seen[0].test.labels, data.test.labels)


@pytest.mark.parametrize("number", [np.float64, np.float32])
def test_numbers_of_numpy_go_on_too(
    digits_env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: Any
) -> None:
    search(digits_env, "uniform", 1, out=tmp_path / "run")
    asked: dict[str, Any] = {"learning_rate": number(0.01), "seed": np.int64(3), "device": "cpu"}
    with monkeypatch.context() as patch:
        patch.setattr("agents.refine.Progress.at", lambda _, done, text: stop_after(1)(done, 0.0))
        with pytest.raises(KeyboardInterrupt):
            finetune_run(tmp_path / "run", np.int64(2), **asked)  # type: ignore[arg-type]
    assert finetune_run(tmp_path / "run", np.int64(2), **asked).finetune_epochs == 2  # type: ignore[arg-type]
    SearchResult.load(tmp_path / "run")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"epochs": 1.5}, "epochs must be a whole number"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number"),
        ({"distill": "much"}, "distill must be a number"),
    ],
)
def test_wrong_numbers_are_refused(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        finetune_run(tmp_path, **{"epochs": 1} | wrong)


def test_other_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'test'"):
        finetune_run(tmp_path, 1, images="test")


def counted(epochs: list[int]) -> Any:
    def finetunes(model: nn.Module, *args: Any, **settings: Any) -> nn.Module:
        return finetune(model, *args, **settings | {"on_epoch": lambda epoch, _: epochs.append(epoch)})

    return finetunes


def test_a_recipe_is_what_trains(digits: DataSplits) -> None:
    plain = Recipe(1, 0.01, weight_decay=0.1)
    recipes = [
        plain,
        replace(plain, bfloat16=True),
        replace(plain, optimizer="adamw"),
        replace(plain, weight_decay=0.0),
    ]

    def step(recipe: Recipe) -> Tensor:
        model = train(load_model("digits-resnet", "random"), digits, recipe, steps=1)
        return torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), start.parameters(), strict=True)])

    start = load_model("digits-resnet", "random")
    first, *others = map(step, recipes)
    assert torch.equal(first, step(plain))
    rounding, adam, decay = ((other - first).norm() / first.norm() for other in others)  # processors round differently
    assert 0 < rounding < 0.3 < decay < 1 < 3 < adam


def test_training_under_an_autocast_of_the_callers_learns_the_same() -> None:
    data, found = load_data("digits"), []
    for enabled in (False, True):
        model = load_model("digits-resnet", "random", 10, seed=0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            finetune(model, data, 4, 0.05, dtype=torch.bfloat16)
        found.append(accuracy(model, data.search))
    assert min(found) > 0.7 and abs(found[0] - found[1]) < 0.1


# ---- the same numbers on a GPU -----------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [False, True])
def test_a_gpu_computes_deterministically_inside_and_as_before_outside(before: bool) -> None:
    torch.use_deterministic_algorithms(before)
    try:
        with deterministic(torch.device("cpu")):
            assert torch.are_deterministic_algorithms_enabled() == before
        with pytest.raises(KeyError), deterministic(torch.device("cuda:0")):
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.is_deterministic_algorithms_warn_only_enabled()
            raise KeyError
        assert torch.are_deterministic_algorithms_enabled() == before
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_checkpoint_of_another_network_has_no_part(digits: DataSplits, tmp_path: Path) -> None:
    file, models = tmp_path / "checkpoint.pt", [load_model("digits-resnet", "random", seed=seed) for seed in (0, 1, 1)]
    with pytest.raises(KeyboardInterrupt):
        finetune(models[0], digits, 2, on_epoch=stop_after(1), checkpoint=file)
    resumed, alone = finetune(models[1], digits, 2, checkpoint=file), finetune(models[2], digits, 2)
    assert torch.equal(vector(resumed), vector(alone))


@pytest.mark.parametrize("other", ["normalisation", "labels", "teacher"])
def test_a_checkpoint_of_other_data_has_no_part(digits: DataSplits, tmp_path: Path, other: str) -> None:
    file, network = tmp_path / "checkpoint.pt", load_model("digits-resnet", "random", seed=0)
    first = replace(digits, train=digits.train.take(100))
    changes = {"normalisation": {"mean": (0.1,)}, "labels": {"labels": first.train.labels.flip(0)}, "teacher": {}}
    then = replace(first, train=replace(first.train, **changes[other]))
    teachers = [load_model("digits-resnet", "random", seed=seed) for seed in (1, 2 if other == "teacher" else 1)]
    with pytest.raises(KeyboardInterrupt):
        finetune(copy.deepcopy(network), first, 2, on_epoch=stop_after(1), checkpoint=file, teacher=teachers[0])
    resumed = finetune(copy.deepcopy(network), then, 2, checkpoint=file, teacher=teachers[1])
    assert torch.equal(vector(resumed), vector(finetune(network, then, 2, teacher=teachers[1])))
