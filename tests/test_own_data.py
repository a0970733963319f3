"""Data of one's own: arrays, what images are normalised by, how large a folder's images come out, what runs keep."""

from __future__ import annotations

import copy
import json
import pickle
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from strategies import deterministic
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from agents import search
from agents.refine import evaluate_run, finetune_run
from agents.results import SearchResult
from gnnrl_gym.envs.mask import MaskEnv
from gnnrl_gym.envs.prune import PruneEnv
from gnnrl_gym.envs.relational import RelationalEnv
from gnnrl_gym.evaluation.finetuning import finetune
from gnnrl_gym.zoo import DataSplits, Split, load_data, load_model
from gnnrl_gym.zoo.images import MemoryImages

CIFAR = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
SMALL: dict[str, Any] = {"search_images": 20, "recalibration_images": 8, "device": "cpu"}


def arrays(n: int = 40, shape: tuple[int, ...] = (8, 8, 3), classes: int = 4, seed: int = 0) -> dict[str, Any]:
    """Random images, and labels in which every class occurs."""
    rng = np.random.default_rng(seed)
    train, test = (rng.integers(0, 256, (count, *shape)).astype(np.uint8) for count in (n, n // 2))
    y = np.arange(n) % classes
    return {"x_train": train, "y_train": y, "x_test": test, "y_test": y[: n // 2]}


def same(one: DataSplits, other: DataSplits) -> bool:
    pairs = [(one.train, other.train), (one.search, other.search), (one.test, other.test)]
    equal = all(torch.equal(a, b) for x, y in pairs for a, b in zip(x.tensors(), y.tensors(), strict=True))
    facts = [(d.num_classes, d.input_shape, d.flip, d.mean, d.std) for d in (one, other)]
    return equal and facts[0] == facts[1]


def conv_net(classes: int = 4, channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(channels, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6, classes)).eval()


# ---- arrays -------------------------------------------------------------------------------------------------------


@deterministic
@given(
    n=st.integers(4, 30), height=st.integers(1, 6), channels=st.sampled_from([None, 1, 2, 3, 4]),
    seed=st.integers(0, 5), own=st.booleans(), tensors=st.booleans(),
)  # fmt: skip
def test_arrays_are_what_the_npz_file_of_them_is(
    n: int, height: int, channels: int | None, seed: int, own: bool, tensors: bool
) -> None:
    given = arrays(n, (height, 5) if channels is None else (height, 5, channels), classes=2, seed=seed)
    values = {"mean": [0.3] * (channels or 1), "std": [0.2] * (channels or 1)} if own else {}
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "data.npz", **given, **values)  # type: ignore[arg-type]
        file = load_data(Path(folder) / "data.npz", seed=seed)
    made = {key: torch.from_numpy(value) for key, value in given.items()} if tensors else given
    assert same(DataSplits.of(**made, **values, seed=seed), file)  # type: ignore[arg-type]


def test_arrays_are_copied() -> None:
    given = arrays(shape=(8, 8))
    data = DataSplits.of(**given)
    before = [split.tensors()[0] for split in (data.train, data.search, data.test)]
    for value in given.values():
        value[:] = 0
    assert all(
        torch.equal(split.tensors()[0], images)
        for split, images in zip((data.train, data.search, data.test), before, strict=True)
    )
    assert data.test.labels.max() == 3


@pytest.mark.parametrize(("share", "size"), [(0.25, 10), (0.9, 36), (0.0001, 1), (0.9999, 39)])
def test_the_share_that_is_set_apart_for_the_search(share: float, size: int) -> None:
    data = DataSplits.of(**arrays(), search=share)
    assert (len(data.search), len(data.train)) == (size, 40 - size)


def test_images_of_ones_own_for_the_search(tmp_path: Path) -> None:
    held_out = {f"{key[0]}_search": value[:10] for key, value in arrays(seed=1).items() if key.endswith("train")}
    data = DataSplits.of(**arrays(), **held_out)
    assert (len(data.train), len(data.search), len(data.test)) == (40, 10, 20)
    pixels = (data.search.tensors()[0].permute(0, 2, 3, 1) * torch.tensor(data.std) + torch.tensor(data.mean)) * 255
    assert np.array_equal(pixels.round().numpy(), held_out["x_search"])
    assert np.array_equal(data.search.labels.numpy(), held_out["y_search"])
    np.savez(tmp_path / "three.npz", **arrays(), **held_out)
    assert same(data, load_data(tmp_path / "three.npz", seed=5))


def test_images_for_the_search_have_no_part_in_the_normalisation() -> None:
    grey = arrays(shape=(8, 8))
    white = {"x_search": np.full((5, 8, 8), 255, np.uint8), "y_search": np.zeros(5, int)}
    mean = float(grey["x_train"].mean() / 255)
    assert DataSplits.of(**grey, **white).mean == pytest.approx((mean,), abs=1e-6)


X, Y = torch.zeros(8, 5, 5, 3, dtype=torch.uint8), torch.arange(8) % 2
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "floats": ({"x_train": X / 255}, "x_train must be uint8, got float32"),
    "NaN": ({"x_test": X * float("nan")}, "x_test must be uint8, got float32"),
    "bfloat16": ({"x_train": X.bfloat16()}, r"x_train is a tensor of torch\.bfloat16"),
    "channels first": ({"x_train": X.permute(0, 3, 1, 2)}, r"C at most 4; got \(8, 3, 5, 5\); move the channels"),
    "no array": ({"x_train": TensorDataset(X, Y)}, "x_train must be an array or a tensor, got a TensorDataset"),
    "nothing": ({"y_test": None}, "y_test must be an array or a tensor, got a NoneType"),
    "empty": ({"x_train": X[:0], "y_train": Y[:0]}, "x_train is empty"),
    "too few labels": ({"y_train": Y[:7]}, "x_train has 8 images, but y_train has 7 labels"),
    "float labels": ({"y_train": Y.float()}, "y_train must be integers of shape .* got float32"),
    "one-hot labels": ({"y_train": torch.eye(2)[Y].long()}, r"y_train must be integers .* got int64 \(8, 2\)"),
    "negative labels": ({"y_train": Y - 1}, "y_train has a negative label: -1"),
    "labels of test alone": ({"y_test": Y + 5}, "y_test has the label 6, y_train none above 1"),
    "another shape": ({"x_test": X[:, :3]}, "differ in shape"),
    "another shape for the search": ({"x_search": X[:, :3], "y_search": Y}, "x_train and x_search differ in shape"),
    "labels of the search alone": ({"x_search": X, "y_search": Y + 5}, "y_search has the label 6, y_train none above"),
    "images for the search without labels": ({"x_search": X}, "x_search alone: give both, x_search and y_search"),
    "labels for the search without images": ({"y_search": Y}, "y_search alone"),
    "lists of labels": ({"y_train": [1, [2, 3]]}, "y_train must be integers of shape"),
    "a seed of letters": ({"seed": "a"}, "seed must be a whole number from 0 .* got 'a'"),
    "half a seed": ({"seed": 1.5}, "seed must be a whole number"),
    "a share of all": ({"search": 1.0}, r"share of the training images in \(0, 1\), got 1.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arrays_that_are_no_data_are_named(name: str) -> None:
    change, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        DataSplits.of(**{"x_train": X, "y_train": Y, "x_test": X, "y_test": Y} | change)


def test_a_class_that_is_never_trained_is_named(tmp_path: Path) -> None:
    given = arrays()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DataSplits.of(**given)
    with pytest.warns(UserWarning, match="the label 0, of 0 to 4: .* take 1 off"):
        data = DataSplits.of(**given | {"y_train": given["y_train"] + 1})
    assert data.num_classes == 5
    given["y_train"][given["y_train"] == 2] = 1
    np.savez(tmp_path / "data.npz", **given)
    with pytest.warns(UserWarning, match=r"data\.npz' has no training image with the label 2, of 0 to 3.*trained\."):
        load_data(tmp_path / "data.npz")


def test_a_class_whose_images_are_all_set_apart_is_named() -> None:
    given = arrays(classes=3)
    apart = DataSplits.of(**given | {"y_train": np.arange(40)}).search.labels[0]  # a class for each image
    given["y_train"][apart] = 3
    with pytest.warns(UserWarning, match="the label 3, of 0 to 3: .*; what there was is set apart for the search"):
        data = DataSplits.of(**given)
    assert 3 in data.search.labels and data.num_classes == 4


NO_DATA: dict[str, Callable[[], Any]] = {
    "tuple": lambda: (X, Y),
    "dict": lambda: {"x_train": X},
    "TensorDataset": lambda: TensorDataset(X, Y),
    "DataLoader": lambda: DataLoader(TensorDataset(X, Y)),
    "NoneType": lambda: None,
}


@pytest.mark.parametrize("name", NO_DATA)
@pytest.mark.parametrize("environment", ["GNNRL-Prune-v0", "GNNRL-Mask-v0", "GNNRL-Relational-v0"])
def test_what_is_no_data_is_answered_with_what_is(name: str, environment: str) -> None:
    with pytest.raises(ValueError, match=rf"got a {name}\. .*DataSplits\.of") as caught:
        gym.make(environment, data=NO_DATA[name]())
    assert "tensor(" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_split_says_what_it_is_made_of() -> None:
    images = MemoryImages(X.permute(0, 3, 1, 2))
    for parts, message in (
        ((X, Y, 0, 1), r"got torch\.uint8 \[8, 5, 5, 3\]; DataSplits\.of"),
        ((X.numpy(), Y, 0, 1), r"got uint8 \[8, 5, 5, 3\]; DataSplits\.of"),
        ((images, Y.tolist(), 0, 1), "labels must be an int64 tensor .* got a list"),
        ((images, Y, (0, 0), 1), "mean has 2 numbers, but the images have 3 channels"),
        ((images, Y, None, 1), "mean must hold finite numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            Split(*parts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="images must be a uint8 tensor"):
        MemoryImages(X.float())


# ---- normalisation ------------------------------------------------------------------------------------------------


def folder_of(path: Path, size: tuple[int, int] = (32, 32)) -> Path:
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in range(4):
            home = path / part / f"class{label}"
            home.mkdir(parents=True)
            for i in range(6):
                pixels = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(home / f"{i}.png")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "images")


@pytest.mark.parametrize("kind", ["digits", "npz", "folder"])
def test_given_values_are_what_normalises(kind: str, tmp_path: Path, folder: Path) -> None:
    np.savez(tmp_path / "x.npz", **arrays())
    source = {"digits": "digits", "npz": tmp_path / "x.npz", "folder": folder}[kind]
    plain = load_data(source, mean=0, std=1)
    pixels = plain.test.images.read(torch.arange(len(plain.test)))
    assert torch.equal(plain.test.tensors()[0], pixels.float() / 255)
    assert (plain.mean, plain.std) == ((0.0,) * pixels.shape[1], (1.0,) * pixels.shape[1])
    given = {"mean": [0.4] * pixels.shape[1], "std": np.full(pixels.shape[1], 0.3)}
    for split in ("train", "search", "test"):
        one, other = (getattr(data, split).tensors()[0] for data in (plain, load_data(source, **given)))  # type: ignore[arg-type]
        assert torch.allclose(other, (one - 0.4) / 0.3, atol=1e-6)


def test_values_of_a_file_are_used_and_those_of_the_caller_go_before(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **arrays(), **CIFAR)  # type: ignore[arg-type]
    found = load_data(tmp_path / "x.npz")
    assert (found.mean, found.std) == (CIFAR["mean"], CIFAR["std"])
    assert load_data(tmp_path / "x.npz", mean=0, std=1).std == (1.0, 1.0, 1.0)
    for change, message in (({"mean": CIFAR["mean"]}, "mean is given without std"), (CIFAR | {"std": 0}, "above 0")):
        np.savez(tmp_path / "bad.npz", **arrays(), **change)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=rf"bad\.npz': .*{message}"):
            load_data(tmp_path / "bad.npz")


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (0.5, None, "mean is given without std"),
        (0, 255, "scale from 0 to 1, got std=255: divide both by 255"),
        ((123.7, 116.3, 103.5), (58.4, 57.1, 57.4), "scale from 0 to 1, got .*: divide both by 255"),
        (None, 0.5, "std is given without mean"),
        (0.5, 0.0, "std must hold finite numbers above 0"),
        ((0.5,) * 3, (0.1, -0.1, 0.1), "std must hold finite numbers above 0"),
        (float("nan"), 1, "mean must hold finite numbers"),
        (0, (1, float("inf"), 1), "std must hold finite numbers above 0"),
        ((0.5, 0.5), 1, "mean has 2 numbers, but the images have 3 channels"),
        ((0.5,), (0.5,), "mean has 1 numbers, but the images have 3 channels"),
        (np.zeros((3, 1)), 1, r"mean must be a number, or one for each channel, got shape \(3, 1\)"),
        ("imagenet", 1, "mean must be a number, or one for each channel, got 'imagenet'"),
        ((), 1, "mean must be a number"),
    ],
)
def test_values_that_normalise_nothing_are_named(mean: Any, std: Any, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **arrays())
    for load in (lambda **v: load_data(tmp_path / "x.npz", **v), lambda **v: DataSplits.of(**arrays(), **v)):
        with pytest.raises(ValueError, match=message):
            load(mean=mean, std=std)


def test_printing_shows_what_is_in_it_and_no_pixels() -> None:
    data = DataSplits.of(**arrays(), **CIFAR, name="mine")
    shown = repr(data)
    for part in ("'mine'", "36 train, 4 search, 20 test", "(3, 8, 8)", "4 classes", "0.4914, 0.4822, 0.4465", "0.2023"):
        assert part in shown
    assert "tensor" not in shown + repr(data.train.images) and len(shown) < 250
    assert repr(pickle.loads(pickle.dumps(data))) == shown


def test_the_environment_scores_the_network_with_what_it_was_trained_with() -> None:
    """The network is right on x / 255, and so it is in the environment, also in one that is made anew."""
    torch.manual_seed(0)
    net, given = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), arrays(200)
    pixels = [torch.from_numpy(given[f"x_{part}"]).permute(0, 3, 1, 2).float() / 255 for part in ("train", "test")]
    net[3].bias.data -= net(pixels[0]).mean(0)  # so that every class occurs
    given["y_train"], given["y_test"] = (net(x).argmax(1).numpy() for x in pixels)
    plain, usual = (DataSplits.of(**given, **values) for values in ({"mean": 0, "std": 1}, {}))  # type: ignore[arg-type]
    env: Any = gym.make("GNNRL-Prune-v0", model=net, data=plain, **SMALL)
    for made in (env, gym.make(env.spec), pickle.loads(pickle.dumps(env.unwrapped))):
        assert made.unwrapped.evaluate(made.unwrapped.network.widths) == 1
    assert PruneEnv(net, usual, **SMALL).evaluate(env.unwrapped.network.widths) < 0.9


# ---- folders ------------------------------------------------------------------------------------------------------


def test_a_folder_comes_in_the_size_of_the_named_network(folder: Path) -> None:
    env = PruneEnv("resnet20", str(folder), **SMALL)
    assert env.data.input_shape == (3, 32, 32)
    given = PruneEnv("resnet20", load_data(folder, image_size=64), **SMALL)
    assert given.data.input_shape == (3, 64, 64)
    assert given.network.macs(given.network.widths) > 3.9 * env.network.macs(env.network.widths)
    assert MaskEnv("cnn-4", folder, **SMALL).data.input_shape == (3, 32, 32)
    assert RelationalEnv("resnet20", folder, pool_size=2, device="cpu").data.input_shape == (3, 32, 32)
    assert PruneEnv(conv_net(), folder, **SMALL).data.input_shape == (3, 224, 224)


@pytest.mark.parametrize("size", [0, -1, 2.5, "large"])
def test_sizes_that_are_none_are_named(size: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match="image_size must be a whole number and at least 1"):
        load_data(folder, image_size=size)


# ---- runs ---------------------------------------------------------------------------------------------------------


def test_a_run_is_measured_again_on_images_of_the_same_size_and_normalisation(folder: Path, tmp_path: Path) -> None:
    data = load_data(folder, image_size=16, **CIFAR)  # type: ignore[arg-type]
    net, out = conv_net(), tmp_path / "run"
    result = search(gym.make("GNNRL-Prune-v0", model=net, data=data, **SMALL), "uniform", evaluations=2, out=out)
    again = SearchResult.load(out).splits()
    assert same(again, data)
    assert evaluate_run(out, "cpu", model=net).accuracy == result.test_accuracy
    record = json.loads((out / "result.json").read_text())
    del record["settings"]["mean"], record["settings"]["std"]  # a run of before
    (out / "result.json").write_text(json.dumps(record))
    assert SearchResult.load(out).splits().mean == (0.485, 0.456, 0.406)


def test_a_run_is_fine_tuned_on_the_images_that_chose_nothing(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", **arrays())
    data, out = load_data(tmp_path / "own.npz", seed=3), tmp_path / "run"
    search(gym.make("GNNRL-Prune-v0", model=conv_net(), data=data, **SMALL), "uniform", evaluations=1, out=out)
    assert same(SearchResult.load(out).splits(), data)
    assert not same(load_data(tmp_path / "own.npz"), data)


def test_a_run_on_arrays_says_that_it_needs_them_again(tmp_path: Path) -> None:
    net, data, out = conv_net(), DataSplits.of(**arrays()), tmp_path / "run"
    result = search(gym.make("GNNRL-Prune-v0", model=net, data=data, **SMALL), "uniform", evaluations=2, out=out)
    for again in (lambda: evaluate_run(out, "cpu", model=net), lambda: finetune_run(out, epochs=1, model=net)):
        with pytest.raises(ValueError, match=r"no data set is named 'arrays'.*pass data="):
            again()
    assert evaluate_run(out, "cpu", model=net, data=data).accuracy == result.test_accuracy


def test_a_run_goes_on_with_its_own_network_and_data_alone(tmp_path: Path) -> None:
    net, data, out = conv_net(), DataSplits.of(**arrays()), tmp_path / "run"
    result = search(gym.make("GNNRL-Prune-v0", model=net, data=data, **SMALL), "uniform", evaluations=2, out=out)
    other, split = copy.deepcopy(net), DataSplits.of(**arrays(), seed=1)
    nn.init.normal_(other[0].weight)  # type: ignore[index, arg-type]
    for again in (lambda: evaluate_run(out, "cpu", model=net, data=split), lambda: tuned(out, net, split)):
        with pytest.raises(ValueError, match=r"run' was run with other labels.* than 'arrays' has here: give"):
            again()
    with pytest.raises(ValueError, match=r"distill=0\.5 learns from the network that .*run' pruned.*model="):
        tuned(out, other, data, distill=0.5)
    measured = evaluate_run(out, "cpu", model=other, data=data)
    assert (measured.accuracy, measured.dense_accuracy) == (result.test_accuracy, result.dense_test_accuracy)
    assert tuned(out, net, data, distill=0.5).finetune_epochs == 1
    (out / "search.json").unlink()  # a run of before there were digests
    assert tuned(out, other, split, distill=0.5).finetune_epochs == 2


def tuned(run: Path, model: nn.Module, data: DataSplits, **settings: Any) -> SearchResult:
    return finetune_run(run, 1, device="cpu", model=model, data=data, **settings)


def test_files_that_were_replaced_under_their_names_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = arrays(shape=(8, 8))
    np.savez("own.npz", **given)
    torch.save(load_model("digits-resnet", "random", 4, seed=1).state_dict(), "own.pt")
    env = gym.make("GNNRL-Prune-v0", model="digits-resnet", weights="own.pt", data="own.npz", **SMALL)
    result = search(env, "uniform", evaluations=1, out="run")
    assert finetune_run("run", 1, device="cpu", distill=0.5).finetune_epochs == 1
    torch.save(load_model("digits-resnet", "random", 4, seed=2).state_dict(), "own.pt")
    assert evaluate_run("run", "cpu").dense_accuracy == result.dense_test_accuracy
    with pytest.raises(ValueError, match="digits-resnet has other weights here"):
        finetune_run("run", 1, device="cpu", distill=0.5)
    np.savez("own.npz", **given | {"y_train": given["y_train"][::-1]})
    for again in (lambda: evaluate_run("run", "cpu"), lambda: finetune_run("run", 1, device="cpu")):
        with pytest.raises(ValueError, match=r"other labels.* than 'own\.npz' has here"):
            again()


@pytest.mark.parametrize("key", ["y_train", "y_test"])
def test_other_labels_are_noticed_in_every_split(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the search split has images of its own, which stay as they are."""
    monkeypatch.chdir(tmp_path)
    given = arrays()
    given |= {"x_search": given["x_test"] // 2, "y_search": given["y_test"].copy()}
    np.savez("own.npz", **given)
    net = conv_net()
    search(gym.make("GNNRL-Prune-v0", model=net, data="own.npz", **SMALL), "uniform", evaluations=1, out="run")
    evaluate_run("run", "cpu", model=net)
    np.savez("own.npz", **given | {key: given[key][::-1]})
    with pytest.raises(ValueError, match="other labels"):
        evaluate_run("run", "cpu", model=net)


@pytest.mark.parametrize("flip", [False, True])
def test_a_run_remembers_whether_images_may_be_mirrored(flip: bool, tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", **arrays(), flip=flip)
    data, out = load_data(tmp_path / "own.npz"), tmp_path / "run"
    assert data.flip is flip
    other = load_data(tmp_path / "own.npz", flip=not flip)
    assert other.flip is not flip
    search(gym.make("GNNRL-Prune-v0", model=conv_net(), data=other, **SMALL), "uniform", evaluations=1, out=out)
    assert SearchResult.load(out).splits().flip is not flip
    np.savez(tmp_path / "own.npz", **arrays(), flip=3)
    with pytest.raises(ValueError, match=r"own\.npz.*flip is True or False"):
        load_data(tmp_path / "own.npz")


def test_images_that_are_not_square_are_shifted_by_an_eighth_of_each_side() -> None:
    seen = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(1, 4)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach()[:, 0])
            return self.head(x.mean((1, 2, 3))[:, None])

    white = arrays(n=200, shape=(8, 64))
    white["x_train"][:] = 255
    finetune(Net(), DataSplits.of(**white, mean=0, std=1), 1)
    lit = torch.cat([batch for batch in seen if len(batch) > 2])  # not the trial of the layout
    rows, columns = lit.amax(2).sum(1), lit.amax(1).sum(1)
    assert (rows.min(), rows.max()) == (7, 8) and columns.min() == 64 - 8 and columns.max() == 64


# ---- weights beside a module --------------------------------------------------------------------------------------


def test_weights_beside_a_module_are_refused_alike() -> None:
    said = set()
    for make in (lambda **k: PruneEnv(**k), lambda **k: MaskEnv(**k, objective="pretrained")):
        with pytest.raises(ValueError, match="weights go with a model by name") as caught:
            make(model=conv_net(), weights="nonexistent.pt")
        said.add(str(caught.value))
    assert len(said) == 1
