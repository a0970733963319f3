"""Hostile files, one case each: a message that names the thing and the mend; never code that a file holds."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import images
from torch import Tensor

from agents.results import SearchResult
from gnnrl_gym import PrunableNetwork, UnsupportedOperation
from gnnrl_gym.export import load_slim, save_slim
from gnnrl_gym.zoo import load_data, load_model

X = images(1, 3, 8, 8)
CLEAR = (TypeError, ValueError, FileNotFoundError, UnsupportedOperation)  # what the package raises by itself


# ---- files: code in them never runs ------------------------------------------------------------------------------


class Hostile:
    """Would make a folder, were it unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


State = dict[str, Tensor]
FIRST = "conv1.weight"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


# name: (what the file holds, or what is done to its path; what the message has to say, None where it loads)
WEIGHTS: dict[str, tuple[Callable[[State], Any], str | None]] = {
    "DataParallel": (lambda s: prefixed(s, "module."), None),
    "compiled": (lambda s: prefixed(s, "_orig_mod."), None),
    "compiled in DataParallel": (lambda s: prefixed(s, "module._orig_mod."), None),
    "nested": (lambda s: {"state_dict": s, "epoch": 3}, None),
    "nested and DataParallel": (lambda s: {"state_dict": prefixed(s, "module.")}, None),
    "half precision": (lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()}, None),
    "under another key": (lambda s: {"weights": s, "epoch": 3}, "keys weights, epoch"),
    "code": (lambda s: s | {"more": Hostile()}, "holds posix.mkdir, which is no tensor and was not run"),
    "whole module": (lambda s: load_model("digits-resnet"), "holds .*CifarResNet, which is no tensor"),
    "list": (lambda s: list(s.values()), "holds a list"),
    "empty dictionary": (lambda s: {}, "holds an empty dict"),
    "numbers as keys": (lambda s: dict(enumerate(s.values())), "keys 0, 1, 2"),
    "missing key": (lambda s: {k: v for k, v in s.items() if k != FIRST}, "1 missing: conv1.weight"),
    "extra key": (lambda s: s | {"more": torch.zeros(2)}, "1 unexpected: more"),
    "other shape": (lambda s: s | {FIRST: s[FIRST][:3]}, r"conv1\.weight \[3, 1, 3, 3\] instead of \[8, 1, 3, 3\]"),
    "NaN": (lambda s: s | {FIRST: s[FIRST] * float("nan")}, "hold NaN or infinity: conv1.weight"),
    "infinite": (lambda s: s | {FIRST: s[FIRST] / 0}, "hold NaN or infinity: conv1.weight"),
    "NaN statistics": (lambda s: s | {"bn1.running_var": s["bn1.running_var"] * float("nan")}, "bn1.running_var"),
    "complex": (lambda s: s | {FIRST: s[FIRST].to(torch.complex64)}, r"conv1\.weight \(torch\.complex64"),
    "integers": (lambda s: s | {FIRST: s[FIRST].to(torch.int8)}, r"conv1\.weight \(torch\.int8"),
    "sparse": (lambda s: s | {FIRST: s[FIRST].to_sparse()}, "torch.sparse_coo"),
    "no data": (lambda s: s | {FIRST: s[FIRST].to("meta")}, "meta device"),
}  # fmt: skip

# what is done to a file that was fine
SPOILED: dict[str, Callable[[Path], Any]] = {
    "truncated": cut,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("import os"),
    "pickle with code": lambda path: path.write_bytes(pickle.dumps(Hostile())),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, in which code from a file would leave its mark."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_load_or_say_why_not(folder: Path, name: str) -> None:
    change, message = WEIGHTS[name]
    state = load_model("digits-resnet", "random", seed=3).state_dict()
    torch.save(change(state), "weights.pt")
    if message is None:
        loaded = load_model("digits-resnet", "weights.pt").state_dict()
        assert loaded.keys() == state.keys()
        for key, value in loaded.items():
            torch.testing.assert_close(value, state[key], rtol=1e-3, atol=1e-3)
    else:
        with pytest.raises(ValueError, match=f"weights.pt.*{message}") as caught:
            load_model("digits-resnet", "weights.pt")
        assert "weights_only" not in str(caught.value)  # torch advises to load hostile files another way
    assert os.listdir() == ["weights.pt"]


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_files_are_named(folder: Path, name: str) -> None:
    path, network = folder / "file.pt", PrunableNetwork(load_model("digits-resnet"), images(1, 1, 8, 8))
    torch.save(network.model.state_dict(), path)
    SPOILED[name](path)
    with pytest.raises(ValueError, match=r"file\.pt.*not a state dict that can be read safely"):
        load_model("digits-resnet", path)
    save_slim(path, network, network.widths, network.model)
    SPOILED[name](path)
    with pytest.raises(ValueError, match=r"file\.pt.*not a pruned network that save_slim wrote"):
        load_slim(path, network.model, images(1, 1, 8, 8))
    assert os.listdir() == ["file.pt"]


def test_folders_are_no_weights(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load_model("digits-resnet", folder)


# name: (change of a file of save_slim, what the message has to say); more of them in test_export.py
PRUNED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "code": (lambda c: c | {"more": Hostile()}, "holds posix.mkdir, which is no tensor and was not run"),
    "of another network": (lambda c: c | {"kept": c["kept"][:-1]}, "another network"),
    "NaN": (lambda c: c | {"state_dict": c["state_dict"] | {FIRST: c["state_dict"][FIRST] * float("nan")}}, "NaN"),
    "weights swapped": (lambda c: c | {"state_dict": dict.fromkeys(c["state_dict"], torch.zeros(1))}, "another shape"),
    "an empty layer": (lambda c: c | {"kept": torch.zeros_like(c["kept"])}, "no layer may be empty"),
}


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_networks_are_refused(folder: Path, name: str) -> None:
    change, message = PRUNED[name]
    network = PrunableNetwork(load_model("digits-resnet"), images(1, 1, 8, 8))
    save_slim("pruned.pt", network, network.widths // 2, network.slim(network.widths // 2))
    torch.save(change(torch.load("pruned.pt", weights_only=True)), "pruned.pt")
    with pytest.raises(ValueError, match=message):
        load_slim("pruned.pt", network.model, images(1, 1, 8, 8))
    assert os.listdir() == ["pruned.pt"]


RECORDS = {
    "not JSON": "{'model': 1",
    "empty": "",
    "list": "[1, 2]",
    "number": "3",
    "no text": "\udcff",
    "lacks entries": json.dumps({"model": "digits-resnet"}),
    "unknown entries": json.dumps({"modell": "digits-resnet"}),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_are_refused(folder: Path, name: str) -> None:
    (folder / "result.json").write_text(RECORDS[name], errors="surrogateescape")
    with pytest.raises(ValueError, match=r"result\.json'? is (damaged|not the record)"):
        SearchResult.load(folder)


# ---- data --------------------------------------------------------------------------------------------------------


def arrays(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    x = {part: rng.integers(0, 256, (count, 8, 8), np.uint8) for part, count in (("x_train", 30), ("x_test", 20))}
    return x | {"y_train": np.arange(30) % 5, "y_test": np.arange(20) % 5} | changes


OBJECTS = np.array([Hostile()] * 30, dtype=object)
DATA: dict[str, tuple[dict[str, Any], str]] = {
    "objects": ({"x_train": OBJECTS}, "Python objects, which were not loaded"),
    "objects as labels": ({"y_train": OBJECTS}, "Python objects, which were not loaded"),
    "floats": ({"x_train": np.zeros((30, 8, 8))}, "x_train must be uint8, got float64"),
    "no images": ({"x_train": np.zeros((0, 8, 8), np.uint8), "y_train": np.zeros(0, int)}, "x_train is empty"),
    "five dimensions": ({"x_test": np.zeros((20, 1, 1, 8, 8), np.uint8)}, r"x_test must be \[N, H, W\]"),
    "labels as text": ({"y_train": np.array(["cat"] * 30)}, "y_train must be integers"),
    "labels are NaN": ({"y_train": np.full(30, np.nan)}, "y_train must be integers"),
    "labels too few": ({"y_train": np.arange(29) % 5}, "30 images, but y_train has 29 labels"),
    "negative label": ({"y_train": np.arange(30) - 1}, "negative label: -1"),
    "label beyond memory": ({"y_train": np.arange(30) + 10**12}, "y_train has the label 1000000000029"),
    "label beyond 63 bits": ({"y_train": np.full(30, 2**63, np.uint64)}, "y_train has the label 9223372036854775808"),
    "label that training lacks": ({"y_test": np.arange(20)}, "y_test has the label 19, y_train none above 4"),
}
DATA_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no arrays": (lambda path: np.savez(path, np.zeros(3)), "has no x_train, y_train"),
    "empty": (lambda path: path.write_bytes(b""), "not a .npz file"),
    "pickle with code": (
        lambda path: path.write_bytes(pickle.dumps(Hostile())),
        "Python objects, which were not loaded",
    ),
    "truncated": (cut, "not a .npz file"),
    "single array": (lambda path: np.save(path.open("wb"), np.zeros(3)), "a single array"),
}


@pytest.mark.parametrize("name", DATA)
def test_data_is_refused(folder: Path, name: str) -> None:
    change, message = DATA[name]
    np.savez("data.npz", **arrays(**change))
    with pytest.raises(ValueError, match=rf"data\.npz.*{message}"):
        load_data("data.npz")
    assert os.listdir() == ["data.npz"]


@pytest.mark.parametrize("name", DATA_FILES)
def test_files_of_data_are_refused(folder: Path, name: str) -> None:
    spoil, message = DATA_FILES[name]
    np.savez("data.npz", **arrays())
    assert load_data("data.npz").num_classes == 5
    spoil(folder / "data.npz")
    with pytest.raises(ValueError, match=rf"data\.npz.*{message}"):
        load_data("data.npz")
    assert os.listdir() == ["data.npz"]
