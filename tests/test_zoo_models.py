"""Models by name: what loads, what it gives, and what is said when something doesn't fit."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from gnnrl_gym.zoo import load_data, load_model
from gnnrl_gym.zoo.models import DIGITS_WEIGHTS, input_shape_for, model_names
from gnnrl_gym.zoo.resnet import CifarResNet, ZeroPadShortcut
from gnnrl_gym.zoo.train_digits import accuracy, describe, train

SHARED = Path(__file__).parents[2] / "shared" / "data"
LAYERS = {"resnet20": 20, "resnet32": 32, "resnet44": 44, "resnet56": 56, "resnet110": 110}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A file with a digits network's random weights."""
    path = tmp_path / "weights.pt"
    torch.save(load_model("digits-resnet", weights="random", seed=3).state_dict(), path)
    return path


def _head(model: nn.Module) -> Tensor:
    """The weight of the last layer."""
    return [p for key, p in model.named_parameters() if key.endswith(".weight")][-1]


# --- the networks ------------------------------------------------------------------------------------------


def test_shipped_weights_are_small_and_accurate() -> None:
    data = load_data("digits")
    model = load_model("digits-resnet")
    assert not model.training
    assert DIGITS_WEIGHTS.stat().st_size < 300_000
    assert accuracy(model, data.test) >= 0.97
    # The same data scores at chance without the weights, so the line above measures them.
    assert accuracy(load_model("digits-resnet", weights="random"), data.test) < 0.5


def test_record_beside_the_shipped_weights_is_true() -> None:
    record = json.loads(DIGITS_WEIGHTS.with_suffix(".json").read_text())
    data, model = load_data("digits"), load_model("digits-resnet")
    measured = describe(model, data, record["epochs"], record["seed"])
    for key in ("train_accuracy", "search_accuracy", "test_accuracy"):
        # Rounding differs between machines, and may turn an image that is on the edge.
        assert measured[key] == pytest.approx(record[key], abs=0.006)
    for key in ("parameters", "widths", "depth_per_stage"):
        assert measured[key] == record[key]


def test_training_is_seeded_and_learns() -> None:
    data = load_data("digits")
    first, again, other = (_head(train(data, epochs=1, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert accuracy(train(data, epochs=4, seed=0), data.search) > 0.8


@pytest.mark.parametrize("name", LAYERS)
def test_cifar_resnets_have_the_published_depth(name: str) -> None:
    layers = [m for m in load_model(name).modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == LAYERS[name]


def test_cifar_resnet_runs_at_any_resolution() -> None:
    model = CifarResNet(1, num_classes=7, widths=(4, 6, 9), in_channels=2).eval()
    for height, width in ((8, 8), (17, 5), (32, 40)):
        assert model(torch.randn(2, 2, height, width)).shape == (2, 7)


def test_shortcut_slices_and_pads() -> None:
    shortcut = ZeroPadShortcut(stride=2, front=1, back=2)
    x = torch.randn(2, 3, 5, 5)
    out = shortcut(x)
    assert out.shape == (2, 6, 3, 3)
    assert torch.equal(out[:, 1:4], x[:, :, ::2, ::2])
    assert out[:, :1].abs().sum() == out[:, 4:].abs().sum() == 0
    shortcut.set_channel_padding(0, 1)
    assert shortcut(x).shape == (2, 4, 3, 3)
    with pytest.raises(ValueError, match="negative"):
        shortcut.set_channel_padding(-1, 0)


def test_shortcuts_pad_a_quarter_on_each_side_or_do_nothing() -> None:
    model = load_model("resnet20")
    pads = {k: m for k, m in model.named_modules() if isinstance(m, ZeroPadShortcut)}
    assert {k: (m.stride, m.front, m.back) for k, m in pads.items()} == {
        "layer2.0.shortcut": (2, 8, 8),
        "layer3.0.shortcut": (2, 16, 16),
    }
    assert sum(isinstance(m, nn.Identity) for m in model.modules()) == 7


@pytest.mark.parametrize("sizes", [{"widths": (8, 4, 8)}, {"widths": (8, 8)}, {"num_classes": 0}])
def test_impossible_sizes_are_refused(sizes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be"):
        CifarResNet(1, **sizes)  # type: ignore[arg-type]


def test_every_name_is_unique_and_has_an_input_shape() -> None:
    names = model_names()
    assert len(set(names)) == len(names)
    assert set(torchvision.models.list_models(module=torchvision.models)) < set(names)
    assert {name: input_shape_for(name) for name in ("digits-resnet", "resnet56", "resnet18")} == {
        "digits-resnet": (1, 8, 8),
        "resnet56": (3, 32, 32),
        "resnet18": (3, 224, 224),
    }
    assert input_shape_for("inception_v3") == (3, 299, 299)


@pytest.mark.parametrize("name", ["squeezenet1_1", "shufflenet_v2_x0_5", "googlenet"])
def test_torchvision_models_take_a_number_of_classes(name: str) -> None:
    model = load_model(name, num_classes=5)
    assert not model.training
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)
    assert not any("aux" in key for key in model.state_dict())


def test_random_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again, other = (_head(load_model("resnet20", seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


# --- weights from files ------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the public checkpoints in {SHARED}")
@pytest.mark.parametrize("name", ["resnet20", "resnet56"])
def test_public_checkpoints_load_strictly(name: str) -> None:
    path = SHARED / f"{name}_cifar10.pt"
    state = torch.load(path, weights_only=True)
    CifarResNet({"resnet20": 3, "resnet56": 9}[name]).load_state_dict(state, strict=True)
    model = load_model(name, weights=path)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert not model.training


@pytest.mark.parametrize(
    "wrap", ["plain", "state_dict", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_state_dicts_load_as_they_are_usually_saved(saved: Path, wrap: str) -> None:
    state = torch.load(saved, weights_only=True)
    if wrap.endswith("."):
        torch.save({f"{wrap}{key}": value for key, value in state.items()}, saved)
    elif wrap == "state_dict":
        torch.save({"state_dict": state, "epoch": 3}, saved)
    loaded = load_model("digits-resnet", weights=str(saved)).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_auxiliary_heads_in_a_file_are_left_out(tmp_path: Path) -> None:
    full = torchvision.models.googlenet(init_weights=False, num_classes=4)
    path = tmp_path / "googlenet.pt"
    torch.save(full.state_dict(), path)
    model = load_model("googlenet", weights=path, num_classes=4)
    assert torch.equal(_head(model), full.fc.weight)
    assert model.aux1 is None


def test_number_of_classes_that_does_not_fit_is_named(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"10 classes, the network for 3; pass num_classes=10 to load_model; an env"):
        load_model("digits-resnet", weights=saved, num_classes=3)
    with pytest.raises(ValueError, match=r"for 10 classes, the network for 3"):
        load_model("digits-resnet", num_classes=3)


def test_tensors_that_do_not_fit_are_named(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"30 missing: layer1\.2.*another shape: conv1\.weight \[8, 1, 3, 3\]"):
        load_model("resnet20", weights=saved)
    state = torch.load(saved, weights_only=True)
    torch.save(state | {"extra.weight": torch.zeros(1)}, saved)
    with pytest.raises(ValueError, match=r"1 unexpected: extra\.weight"):
        load_model("digits-resnet", weights=saved)


@pytest.mark.parametrize(
    "content",
    [b"", b"no weights at all", pickle.dumps(Path("x"), protocol=2)],
    ids=["empty", "text", "pickle"],
)
def test_files_that_hold_something_else_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.pt' is not a state dict that can be read safely"):
        load_model("resnet20", weights=path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3}, torch.zeros(2)])
def test_other_objects_are_no_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="not a state dict that can be read safely"):
        load_model("resnet20", weights=tmp_path / "weights.pt")


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("open('evil', 'w')",)


def test_unsafe_pickles_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": _Evil()}, "weights.pt")
    with pytest.raises(ValueError, match="read safely"):
        load_model("resnet20", weights="weights.pt")
    assert not Path("evil").exists()


def test_absent_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/weights\.pt"):
        load_model("resnet20", weights="nowhere/weights.pt")


# --- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "near"), [("resnet-20", "resnet20"), ("ResNet18", "resnet18"), ("?", "digits")])
def test_unknown_model_lists_near_ones(name: str, near: str) -> None:
    for function in (load_model, input_shape_for):
        with pytest.raises(ValueError, match=f"no model is named .*{near}"):
            function(name)


def test_unknown_weights_entry_lists_the_entries() -> None:
    with pytest.raises(ValueError, match=r"no weights entry 'IMAGENET'.*IMAGENET1K_V1, DEFAULT"):
        load_model("resnet18", weights="IMAGENET")
    with pytest.raises(ValueError, match=r"resnet20 has no weights entry 'DEFAULT'"):
        load_model("resnet20", weights="DEFAULT")


def test_weights_entry_with_other_classes_is_refused_before_any_download() -> None:
    with pytest.raises(ValueError, match=r"IMAGENET1K_V1 of resnet18 are for 1000 classes, not 10"):
        load_model("resnet18", weights="DEFAULT", num_classes=10)


def test_weights_entry_loads_what_torchvision_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network: the file is put where torchvision would have downloaded it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    entry = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    file = tmp_path / "hub" / "checkpoints" / Path(entry.url).name
    file.parent.mkdir(parents=True)
    source = load_model("squeezenet1_1", seed=5)
    torch.save(source.state_dict(), file)
    model = load_model("squeezenet1_1", weights="DEFAULT")
    assert torch.equal(_head(model), _head(source))


def test_a_failed_download_says_where_to_put_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, and not as a path: with torchvision's own keys that would not load, or silently compute something else."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def fail(*args: object, **settings: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", fail)
    with pytest.raises(FileNotFoundError, match="put it into") as raised:
        load_model("squeezenet1_1", weights="DEFAULT")
    place = re.search("put it into '(.*)'", str(raised.value))
    assert place and Path(place[1]) == tmp_path / "hub" / "checkpoints"  # see the test above


def test_seed_must_be_one() -> None:
    with pytest.raises(ValueError, match="seed must be a whole number from 0"):
        load_model("resnet20", seed=1.5)  # type: ignore[arg-type]


def test_number_of_classes_must_be_positive() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        load_model("resnet20", num_classes=0)
