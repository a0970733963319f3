"""Data by name or path: splits that don't overlap, batches that are normalised, messages that help."""

from __future__ import annotations

import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from agents import search
from gnnrl_gym.zoo import DataSplits, Split, load_data
from gnnrl_gym.zoo.data import augment
from gnnrl_gym.zoo.datasplits import RGB_MEAN, RGB_STD
from gnnrl_gym.zoo.images import MemoryImages
from gnnrl_gym.zoo.readers import TORCHVISION

SHARED = Path(__file__).parents[2] / "shared" / "data"
Arrays = dict[str, NDArray[Any]]


def _arrays(n: int = 50, shape: tuple[int, ...] = (6, 5)) -> Arrays:
    """Random images, each with a number of its own in the first two pixels."""
    rng = np.random.default_rng(0)

    def images(count: int) -> NDArray[Any]:
        x = rng.integers(0, 256, (count, *shape)).astype(np.uint8)
        x.reshape(count, -1)[:, 0] = np.arange(count)
        return x

    y = np.arange(n) % 5
    return {"x_train": images(n), "y_train": y, "x_test": images(20), "y_test": y[:20]}


def _save(path: Path, arrays: Arrays) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    return _save(tmp_path / "data.npz", _arrays())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of images that are not square, each of one colour."""
    for part, count in (("train", 6), ("val", 2)):
        for label in range(2):
            home = tmp_path / "images" / part / f"class{label}"
            home.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 30), (100 * label, 10 * i, 0)).save(home / f"{i}.png")
    return tmp_path / "images"


def _raw(split: Split) -> Tensor:
    return split.images.read(torch.arange(len(split)))


def _rows(split: Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in _raw(split)}


# --- splits ------------------------------------------------------------------------------------------------


def test_digits_is_split_evenly_and_without_overlap() -> None:
    data = load_data("digits")
    assert (len(data.train), len(data.search), len(data.test)) == (1000, 397, 400)
    assert (data.num_classes, data.input_shape, data.flip) == (10, (1, 8, 8), False)
    parts = (data.train, data.search, data.test)
    rows = [_rows(part) for part in parts]
    # Each image is different, so counting them shows that no image is in two parts.
    assert len(set.union(*rows)) == sum(len(part) for part in parts) == 1797
    for part in parts:
        counts = torch.bincount(part.labels, minlength=10)
        assert counts.min() > 0.08 * len(part)
    assert _raw(data.train).max() == 255


def test_digits_splits_are_fixed_for_all_seeds() -> None:
    first, other = load_data("digits"), load_data("digits", seed=1)
    assert torch.equal(_raw(first.test), _raw(other.test))
    assert torch.equal(_raw(first.train), _raw(other.train))


def test_digits_is_normalised_by_its_train_split() -> None:
    x, y = load_data("digits").train.tensors()
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert x.mean().item() == pytest.approx(0, abs=1e-5)
    assert x.std().item() == pytest.approx(1, abs=1e-3)


def test_npz_sets_a_tenth_of_training_apart(npz: Path) -> None:
    data = load_data(npz)
    assert (len(data.train), len(data.search), len(data.test)) == (45, 5, 20)
    numbers = [_raw(part)[:, 0, 0, 0].tolist() for part in (data.train, data.search)]
    assert sorted(numbers[0] + numbers[1]) == list(range(50))
    assert torch.equal(data.search.labels, torch.tensor(numbers[1]) % 5)
    assert (data.name, data.num_classes, data.input_shape) == (str(npz), 5, (1, 6, 5))
    assert not data.flip


def test_search_split_depends_on_the_seed_alone(npz: Path) -> None:
    first, again, other = (_raw(load_data(npz, seed=seed).search) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_two_training_images_are_enough(tmp_path: Path) -> None:
    data = load_data(_save(tmp_path / "x.npz", _arrays(n=2) | {"y_test": np.zeros(20, dtype=int)}))
    assert (len(data.train), len(data.search)) == (1, 1)


def test_colour_is_channels_first_and_normalised_by_the_constants(tmp_path: Path) -> None:
    arrays = _arrays(shape=(6, 5, 3))
    data = load_data(_save(tmp_path / "x.npz", arrays))
    assert data.input_shape == (3, 6, 5)
    assert data.flip
    expected = (arrays["x_test"] / 255.0 - np.array(RGB_MEAN)) / np.array(RGB_STD)
    x, y = data.test.tensors()
    np.testing.assert_allclose(x.numpy(), expected.transpose(0, 3, 1, 2), rtol=0, atol=1e-5)
    assert torch.equal(y, torch.from_numpy(arrays["y_test"]))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs MNIST in {SHARED}")
def test_mnist_file() -> None:
    data = load_data(SHARED / "mnist.npz")
    assert (len(data.train), len(data.search), len(data.test)) == (54_000, 6_000, 3_000)
    assert data.input_shape == (1, 28, 28)
    # The constants that everyone uses for MNIST's training images.
    assert data.train.mean == pytest.approx((0.1307,), abs=5e-4)
    assert data.train.std == pytest.approx((0.3081,), abs=5e-4)


def test_folder_of_class_folders(folder: Path) -> None:
    data = load_data(folder, image_size=16)
    assert (len(data.train), len(data.search), len(data.test)) == (11, 1, 4)
    assert (data.num_classes, data.input_shape, data.flip) == (2, (3, 16, 16), True)
    x, y = data.test.tensors()
    assert x.shape == (4, 3, 16, 16)
    red = x[:, 0, 0, 0] * RGB_STD[0] + RGB_MEAN[0]
    assert torch.allclose(red, y * 100 / 255, atol=1e-5)
    assert data.train.batch(torch.tensor([], dtype=torch.int64))[0].shape == (0, 3, 16, 16)


def test_a_folder_with_three_parts_searches_with_val(folder: Path) -> None:
    shutil.copytree(folder / "val", folder / "test")
    (folder / "test" / "class1" / "0.png").unlink()
    data = load_data(folder, image_size=16)
    assert (len(data.train), len(data.search), len(data.test)) == (12, 4, 3)
    (folder / "val" / "class1").rename(folder / "val" / "other")
    with pytest.raises(ValueError, match="train/ and val/ differ in classes: class1, other"):
        load_data(folder)


def test_hidden_files_and_folders_are_passed_over(folder: Path) -> None:
    """Which systems and notebooks leave."""
    before = load_data(folder, image_size=16)
    for part in ("train", "val"):
        (folder / part / ".ipynb_checkpoints").mkdir()
        (folder / part / "class1" / "._0.png").write_bytes(b"no image")
    after = load_data(folder, image_size=16)
    assert [len(part) for part in (after.train, after.search, after.test)] == [
        len(part) for part in (before.train, before.search, before.test)
    ]
    assert torch.equal(after.train.tensors()[0], before.train.tensors()[0])


def test_folder_is_read_when_asked_for(folder: Path) -> None:
    data = load_data(folder, image_size=16)
    (folder / "val" / "class1" / "0.png").write_bytes(b"broken")
    data.train.tensors()
    with pytest.raises(ValueError, match=r"class1/0\.png' is not an image"):
        data.test.tensors()


def test_files_are_read_alike_by_one_thread_and_by_several(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, found = load_data(folder, image_size=16).train, []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(_raw(train))
    assert len(found[0]) == len(found[0].unique(dim=0)) == len(train)  # all differ, so an order would show
    assert torch.equal(*found)


@pytest.mark.parametrize("size", [(120, 80), (80, 120), (30, 30)])
def test_files_are_cropped_around_their_middle(tmp_path: Path, size: tuple[int, int]) -> None:
    for part in ("train", "val"):
        for label in range(2):
            home = tmp_path / part / str(label)
            home.mkdir(parents=True)
            x, y = np.meshgrid(*(np.abs(np.linspace(-1, 1, side)) for side in size))
            image = Image.fromarray(
                np.uint8(255 * (1 - np.maximum(x, y)))
            )  # falls off from the middle, alike on all sides
            for i in range(4):
                image.convert("RGB").save(home / f"{i}.png")
    image = _raw(load_data(str(tmp_path), image_size=28).test)[0].double()
    assert image.shape == (3, 28, 28)
    for mirrored in (image.flip(1), image.flip(2)):
        assert (image - mirrored).abs().max() <= 4  # rounding
    assert image[:, 13:15, 13:15].min() > 225 and image.mean() > 60


def test_images_of_the_right_size_stay_as_they_are(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "val" / "class0" / "0.png")
    found = _raw(load_data(folder, image_size=16).test.select(torch.tensor([0])))[0]
    assert torch.equal(found.round().byte(), torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("name", ["broken.jpg", "broken.png"])
def test_a_search_first_opens_all_test_images(folder: Path, name: str) -> None:
    file = folder / "val" / "class1" / name
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file)
    env = gym.make("GNNRL-Prune-v0", model="resnet20", data=str(folder), search_images=2, recalibration_images=4)
    assert search(env, "uniform", 1).test_accuracy is not None
    file.write_bytes(file.read_bytes()[:-500])  # a download that was cut off
    evaluations = env.unwrapped.evaluations  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=rf"class1/{name}' is not an image that can be read"):
        search(env, "uniform", 1)
    assert env.unwrapped.evaluations == evaluations  # type: ignore[attr-defined]


def test_images_that_would_come_out_wrong_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, file = load_data(folder, image_size=16), folder / "val" / "class1" / "0.png"
    levels = np.arange(40 * 30).reshape(30, 40)
    for pixels in (levels.astype(np.uint16), (levels / 1200).astype(np.float32)):  # all white, and all black
        Image.fromarray(pixels).save(file, "PNG" if pixels.dtype == np.uint16 else "TIFF")
        with pytest.raises(ValueError, match=r"class1/0\.png' has pixels of more than 8 bits"):
            data.test.tensors()
    file.write_bytes(b"P6 20 2x 255 ")
    with pytest.raises(ValueError, match=r"class1/0\.png' is not an image"):
        data.test.tensors()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match=r"class0/0\.png' is not an image that can be read \(Image size"):
        data.test.tensors()


# --- batches -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> DataSplits:
    return load_data("digits")


def test_no_image_is_alone_in_training(digits: DataSplits) -> None:
    split = digits.search.take(101)
    sizes = [[len(labels) for _, labels in split.batches(50, generator)] for generator in (_generator(), None)]
    assert sizes == [[50, 51], [50, 50, 1]]
    for size in (1, 2, 50, 100, 101, 200):
        assert split.shuffled_batches(size) == len(list(split.batches(size, _generator())))
    assert split.take(1).shuffled_batches(1) == 1


def test_batches_cover_the_split_once(digits: DataSplits) -> None:
    x, y = digits.search.tensors()
    plain = list(digits.search.batches(100))
    assert [len(labels) for _, labels in plain] == [100, 100, 100, 97]
    assert torch.equal(torch.cat([images for images, _ in plain]), x)
    shuffled = [torch.cat(part) for part in zip(*digits.search.batches(100, _generator()), strict=True)]
    assert not torch.equal(shuffled[1], y)
    assert torch.equal(shuffled[1].sort().values, y.sort().values)
    order = torch.randperm(len(y), generator=_generator())
    assert torch.equal(shuffled[0], x[order])
    with pytest.raises(ValueError, match="batch_size"):
        digits.search.batches(0)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_take_is_seeded_and_nested(digits: DataSplits) -> None:
    ten, twenty, other = digits.train.take(10), digits.train.take(20), digits.train.take(10, seed=1)
    assert len(ten) == 10
    assert torch.equal(_raw(ten), _raw(twenty)[:10])
    assert not torch.equal(_raw(ten), _raw(other))
    assert _rows(ten) < _rows(digits.train)
    assert len(digits.train.take(10_000)) == 1000


@pytest.mark.parametrize("name", ["digits", "folder"])
def test_splits_pickle(name: str, folder: Path) -> None:
    data = load_data("digits" if name == "digits" else folder, image_size=16)
    copy = pickle.loads(pickle.dumps(data))
    assert all(torch.equal(a, b) for a, b in zip(copy.test.tensors(), data.test.tensors(), strict=True))
    assert (copy.name, copy.num_classes, copy.input_shape) == (data.name, data.num_classes, data.input_shape)


@pytest.mark.parametrize("name", ["digits", "folder"])
def test_joined_is_one_after_the_other(name: str, folder: Path) -> None:
    data = load_data("digits" if name == "digits" else folder, image_size=16)
    images, labels = data.train.joined(data.search).tensors()
    parts = [split.tensors() for split in (data.train, data.search)]
    assert torch.equal(images, torch.cat([part[0] for part in parts]))
    assert torch.equal(labels, torch.cat([part[1] for part in parts]))


def test_split_refuses_what_cannot_be_one() -> None:
    images = MemoryImages(torch.zeros(2, 1, 3, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="2 images but 1 labels"):
        Split(images, torch.zeros(1, dtype=torch.int64), (0.0,), (1.0,))
    with pytest.raises(ValueError, match="at least one image"):
        Split(images, torch.zeros(2, dtype=torch.int64), (0.0,), (1.0,)).select(torch.arange(0))


# --- augmentation ------------------------------------------------------------------------------------------


def test_augment_shifts_within_the_padding() -> None:
    x = torch.zeros(200, 2, 7, 9)
    x[:, :, 3, 4] = 1
    out = augment(x, _generator(), padding=2, flip=False)
    assert out.shape == x.shape
    places = {(int(r), int(c)) for r, c in out[:, 0].nonzero()[:, 1:]}
    assert places == {(r, c) for r in range(1, 6) for c in range(2, 7)}
    assert torch.equal(out[:, 0], out[:, 1])
    assert torch.equal(out, augment(x, _generator(), padding=2, flip=False))


def test_augment_shifts_by_what_is_said_of_each_side() -> None:
    x = torch.zeros(300, 1, 7, 9)
    x[:, :, 3, 4] = 1
    out = augment(x, _generator(), padding=(1, 3), flip=False)
    places = {(int(r), int(c)) for r, c in out[:, 0].nonzero()[:, 1:]}
    assert places == {(r, c) for r in range(2, 5) for c in range(1, 8)}


def test_augment_mirrors_about_half() -> None:
    x = torch.arange(4.0).expand(400, 1, 3, 4)
    out = augment(x, _generator(), padding=0)
    mirrored = (out == x.flip(3)).all(dim=3).all(dim=2).squeeze(1)
    assert torch.equal(out[~mirrored], x[~mirrored])
    assert 150 < mirrored.sum() < 250
    assert torch.equal(augment(x, _generator(), padding=0, flip=False), x)


def test_augment_fills_with_zeros() -> None:
    out = augment(torch.ones(100, 1, 4, 4), _generator(), padding=1)
    assert set(out.unique().tolist()) == {0.0, 1.0}


# --- what is said when it does not fit ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": np.zeros((50, 6, 5))}, "x_train must be uint8, got float64"),
        ({"x_test": np.zeros((20, 3, 6, 5), np.uint8)}, "x_test must be"),
        ({"x_test": np.zeros((20, 5), np.uint8)}, "C at most 4; got"),
        ({"x_test": np.zeros((20, 5, 5), np.uint8)}, "differ in shape"),
        ({"x_test": np.zeros((0, 6, 5), np.uint8)}, "x_test is empty"),
        ({"y_train": np.zeros(49, int)}, "x_train has 50 images, but y_train has 49 labels"),
        ({"y_train": np.zeros(50)}, "y_train must be integers"),
        ({"y_train": np.full(50, -1)}, "negative label: -1"),
        ({"y_test": np.full(20, 9)}, "y_test has the label 9, y_train none above 4"),
        ({"x_train": np.zeros((1, 6, 5), np.uint8), "y_train": np.array([9])}, "at least 2 training images"),
    ],
)
def test_bad_arrays_are_named(tmp_path: Path, change: Arrays, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_data(_save(tmp_path / "x.npz", _arrays() | change))


def test_images_for_a_validation_under_another_name_are_not_missed_in_silence(tmp_path: Path, folder: Path) -> None:
    arrays = _arrays()
    more = {"x_val": arrays["x_test"], "y_val": arrays["y_test"], "names": np.arange(5)}
    with pytest.warns(UserWarning, match=r"x_val, y_val are not read. .* called x_search and y_search"):
        load_data(str(_save(tmp_path / "more.npz", arrays | more)))
    (folder / "validation").mkdir()
    with pytest.warns(UserWarning, match=r"validation/ is not read. .* called val/"):
        load_data(str(folder))


def test_bad_npz_files_are_named(tmp_path: Path) -> None:
    arrays = _arrays()
    del arrays["y_test"]
    with pytest.raises(ValueError, match=r"lacks\.npz' has no y_test"):
        load_data(_save(tmp_path / "lacks.npz", arrays))
    (tmp_path / "broken.npz").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"broken\.npz' is not a \.npz file that can be read"):
        load_data(tmp_path / "broken.npz")
    (tmp_path / "text.npz").write_text("x_train,y_train")
    with pytest.raises(ValueError, match=r"text\.npz' is not .*\(it is no archive") as caught:
        load_data(tmp_path / "text.npz")
    assert "objects" not in str(caught.value)
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"data\.csv' is neither"):
        load_data(tmp_path / "data.csv")


def test_bad_folders_are_named(folder: Path) -> None:
    (folder / "val" / "class1").rename(folder / "val" / "other")
    with pytest.raises(ValueError, match="differ in classes: class1, other"):
        load_data(folder)
    (folder / "val").rename(folder / "held_out")
    with pytest.raises(FileNotFoundError, match="neither a folder test/ nor val/"):
        load_data(folder)
    with pytest.raises(FileNotFoundError, match="no folder train/"):
        load_data(folder / "train")
    (folder / "test").mkdir()
    with pytest.raises(ValueError, match="must have a folder of images for each class"):
        load_data(folder)


@pytest.mark.parametrize("n", [-1, 0, 2.5])
def test_only_whole_numbers_of_images_are_taken(digits: DataSplits, n: Any) -> None:
    with pytest.raises(ValueError, match="n must be a whole number and at least 1"):
        digits.search.take(n)


@pytest.mark.parametrize("name", ["digits", "file"])
def test_seeds_that_are_none_are_named(name: str, npz: Path) -> None:
    with pytest.raises(ValueError, match="seed must be a whole number from 0"):
        load_data(npz if name == "file" else name, seed=None)  # type: ignore[arg-type]


def test_absent_paths_and_unknown_names() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz"):
        load_data("nowhere.npz")
    with pytest.raises(ValueError, match=r"no data set is named 'cifar-10'.*cifar10"):
        load_data("cifar-10")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion-mnist", "svhn"])
@pytest.mark.parametrize("elsewhere", [True, False])
def test_torchvision_data_that_is_not_there(
    name: str, elsewhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message holds a command that downloads the data to where it was looked for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = {"root": tmp_path / "my data"} if elsewhere else {}
    with pytest.raises(FileNotFoundError, match=rf"'{name}' is not in ") as caught:
        load_data(name, **root)
    command = re.search(r'python -c "(.*?)"', str(caught.value))
    assert command
    asked = []
    fake = SimpleNamespace(data=np.zeros((2, 3, 6, 5), np.uint8), labels=[0, 1], targets=[0, 1])

    def dataset(place: Path, download: bool, **_: Any) -> SimpleNamespace:
        asked.append((place, download))
        return SimpleNamespace(**vars(fake) | {"data": fake.data if name == "svhn" else fake.data[:, 0]})

    monkeypatch.setitem(TORCHVISION, name, dataset)
    exec(command[1])
    assert set(asked) == {(root.get("root", tmp_path / "cache" / "gnnrl_gym" / "data"), True)}


@pytest.mark.parametrize(
    ("name", "layout", "shape", "flip"),
    [
        ("cifar10", (6, 5, 3), (3, 6, 5), True),
        ("svhn", (3, 6, 5), (3, 6, 5), False),
        ("mnist", (6, 5), (1, 6, 5), False),
    ],
)
def test_torchvision_arrays_come_out_channels_first(
    name: str,
    layout: tuple[int, ...],
    shape: tuple[int, int, int],
    flip: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stand-ins with the layouts that torchvision's classes have; image i has the label and the value i."""
    numbers = np.arange(30, dtype=np.uint8)
    images = np.broadcast_to(numbers.reshape(30, *(1 for _ in layout)), (30, *layout))
    fake = SimpleNamespace(data=images, labels=numbers, targets=numbers.tolist())
    monkeypatch.setitem(TORCHVISION, name, lambda *_, **__: fake)
    data = load_data(name)
    assert (data.input_shape, data.flip) == (shape, flip)
    assert torch.equal(_raw(data.test)[:, 0, 0, 0].long(), data.test.labels)
