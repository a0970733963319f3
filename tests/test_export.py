"""Files of pruned networks: what is read back answers as what was written; damaged and foreign files say so."""

from __future__ import annotations

import builtins
import importlib.util
import os
import pickle
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import assert_close, images, old_export, outputs, random_plans, randomise
from torch import Tensor, nn

import gnnrl_gym.export as export
from gnnrl_gym import PrunableNetwork, UnsupportedOperation
from gnnrl_gym.export import export_onnx, export_program, load_slim, read_slim, save_slim, update_slim
from gnnrl_gym.pruning.sparsity import SparseNetwork, make_network
from gnnrl_gym.zoo import load_model
from gnnrl_gym.zoo.state_dicts import load_into

NETWORKS = {"digits-resnet": (1, 8, 8), "mobilenet_v2": (3, 32, 32)}


def example(name: str) -> Tensor:
    return images(1, *NETWORKS[name])


@pytest.fixture(scope="module", params=NETWORKS)
def case(request: pytest.FixtureRequest) -> tuple[str, PrunableNetwork, np.ndarray, nn.Module]:
    """A network, a plan and its slim network, with weights that the plan alone does not give."""
    network = PrunableNetwork(randomise(load_model(request.param, num_classes=10)), example(request.param))
    plan = random_plans(network, 3)[2]
    return request.param, network, plan, randomise(network.slim(plan), seed=1)


@pytest.fixture
def digits() -> PrunableNetwork:
    return PrunableNetwork(load_model("digits-resnet"), example("digits-resnet"))


# ---- weights and plan --------------------------------------------------------------------------------------------


def test_slim_is_rebuilt_from_the_dense_class(case: Any, tmp_path: Path) -> None:
    name, network, plan, slim = case
    save_slim(tmp_path / "a" / "slim.pt", network, plan, slim)
    dense = load_model(name, "random", 10, seed=7)  # of which the structure counts
    again, x = load_slim(tmp_path / "a" / "slim.pt", dense, example(name)), images(5, *NETWORKS[name], seed=3)
    assert type(again) is type(slim) and not again.training
    assert torch.equal(outputs(again, x)[0], outputs(slim, x)[0])
    assert os.listdir(tmp_path / "a") == ["slim.pt"]
    content = torch.load(tmp_path / "a" / "slim.pt", weights_only=True)
    assert content["widths"].tolist() == plan.tolist() and content["granularity"] == "channels"


@pytest.mark.parametrize("granularity", ["unstructured", "2:4"])
def test_sparse_networks_too(granularity: str, tmp_path: Path) -> None:
    x = example("digits-resnet")
    network = SparseNetwork(load_model("digits-resnet"), x, granularity)
    plan = network.widths // 3
    pruned = randomise(network.slim(plan))
    save_slim(tmp_path / "pruned.pt", network, plan, pruned)
    again = load_slim(tmp_path / "pruned.pt", load_model("digits-resnet", "random"), x)
    assert torch.equal(outputs(again, x)[0], outputs(pruned, x)[0])
    with network.zeros_held(again, network.kept(plan)):
        assert sum(int(torch.count_nonzero(p == 0)) for p in again.parameters()) > 0


def test_files_with_kept_and_weights_alone(digits: PrunableNetwork, tmp_path: Path) -> None:
    plan = digits.widths // 2
    slim, kept = digits.slim(plan), torch.from_numpy(digits.kept(plan))
    torch.save({"kept": kept, "state_dict": slim.state_dict()}, tmp_path / "pruned.pt")
    again = load_slim(tmp_path / "pruned.pt", digits.model, example("digits-resnet"))
    assert torch.equal(outputs(again, images(3, 1, 8, 8))[0], outputs(slim, images(3, 1, 8, 8))[0])


class Stateful(nn.Sequential):
    """Keeps something else than tensors in its state."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 1}


def test_what_a_module_keeps_besides_tensors_stays_its_own(tmp_path: Path) -> None:
    dense, x = Stateful(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), images(1, 4)
    network = PrunableNetwork(dense, x)
    slim = network.slim([3])
    save_slim(tmp_path / "slim.pt", network, [3], slim)
    update_slim(tmp_path / "slim.pt", slim)
    assert_close(outputs(load_slim(tmp_path / "slim.pt", dense, x), x), outputs(slim, x))


class Written(nn.Module):
    """Layers as functions of parameters that are named as one likes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.first).relu(), self.last)


def test_parameters_may_have_any_name(tmp_path: Path) -> None:
    dense, x = Written(), images(3, 4)
    network = PrunableNetwork(dense, x)
    slim = network.slim([3])
    save_slim(tmp_path / "slim.pt", network, [3], slim)
    assert_close(outputs(load_slim(tmp_path / "slim.pt", dense, x), x), outputs(slim, x))
    with pytest.raises(ValueError, match=r"of another network; tensors 2 of another shape: first \[3, 4\] instead"):
        load_into(dense, slim.state_dict(), "a file")


def test_updated_weights_keep_the_plan(digits: PrunableNetwork, tmp_path: Path) -> None:
    path, plan = tmp_path / "pruned.pt", digits.widths // 2
    tuned = randomise(digits.slim(plan))
    for old in (False, True):
        save_slim(path, digits, plan, digits.slim(plan))
        if old:
            torch.save({key: read_slim(path)[key] for key in ("kept", "state_dict")}, path)
        update_slim(path, tuned)
        again = load_slim(path, digits.model, example("digits-resnet"))
        assert torch.equal(outputs(again, images(3, 1, 8, 8))[0], outputs(tuned, images(3, 1, 8, 8))[0])
    with pytest.raises(ValueError, match="another network"):
        update_slim(path, digits.model)


def test_saving_another_module_than_the_plans_raises(digits: PrunableNetwork, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another network"):
        save_slim(tmp_path / "pruned.pt", digits, digits.widths // 2, digits.slim(digits.widths))
    with pytest.raises(ValueError, match="plan"):
        save_slim(tmp_path / "pruned.pt", digits, digits.widths[1:], digits.slim(digits.widths))
    assert not list(tmp_path.iterdir())


def test_interrupted_writing_leaves_the_old_file(
    digits: PrunableNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, plan = tmp_path / "pruned.pt", digits.widths // 2
    save_slim(path, digits, plan, digits.slim(plan))
    before = path.read_bytes()

    def breaks(content: Any, file: Any) -> None:
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", breaks)
    with pytest.raises(KeyboardInterrupt):
        save_slim(path, digits, plan, digits.slim(plan))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["pruned.pt"]


class Hostile:
    """Would make a file, were it unpickled."""

    def __reduce__(self) -> Any:
        return (builtins.open, ("owned", "w"))


def changed(content: dict[str, Any], **entries: Any) -> dict[str, Any]:
    return {key: value for key, value in (content | entries).items() if value is not None}


DAMAGE = {
    "a list": (lambda c: [1, 2], "holds a list"),
    "a state dict": (lambda c: c["state_dict"], "has no 'kept'"),
    "no plan": (lambda c: changed(c, kept=None), "has no 'kept'"),
    "no weights": (lambda c: changed(c, state_dict=None), "has no 'state_dict'"),
    "plan of numbers": (lambda c: changed(c, kept=c["kept"].long()), "bool tensor"),
    "plan of two dimensions": (lambda c: changed(c, kept=c["kept"][None]), "bool tensor"),
    "plan as a list": (lambda c: changed(c, kept=c["kept"].tolist()), "bool tensor"),
    "plan too short": (lambda c: changed(c, kept=c["kept"][1:]), "another network"),
    "a layer emptied": (lambda c: changed(c, kept=torch.zeros_like(c["kept"]), widths=None), "no layer may be empty"),
    "other widths": (lambda c: changed(c, widths=c["widths"] + 1), "widths"),
    "widths of floats": (lambda c: changed(c, widths=c["widths"].float()), "int64"),
    "unknown granularity": (lambda c: changed(c, granularity="atoms"), "granularity"),
    "another granularity": (lambda c: changed(c, granularity="2:4"), "another network"),
    "granularity a number": (lambda c: changed(c, granularity=4), "no string"),
    "weights a list": (lambda c: changed(c, state_dict=[1]), "no state dict"),
    "weights no tensors": (lambda c: changed(c, state_dict={"conv1.weight": 1.0}), "no state dict"),
    "weights missing": (lambda c: changed(c, state_dict=dict(list(c["state_dict"].items())[1:])), "1 missing"),
    "weights of another plan": (
        lambda c: changed(c, state_dict={k: torch.cat([v, v]) for k, v in c["state_dict"].items() if v.dim()}),
        "another shape",
    ),
    "fine-tunings a number": (lambda c: changed(c, finetuning=3), "'finetuning' is no list"),
    "fine-tunings as numbers": (lambda c: changed(c, finetuning=[3]), "'finetuning' is no list"),
    "code": (lambda c: changed(c, more=Hostile()), "damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_raise(
    digits: PrunableNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.chdir(tmp_path)
    change, message = DAMAGE[damage]
    save_slim("pruned.pt", digits, digits.widths // 2, digits.slim(digits.widths // 2))
    torch.save(change(torch.load("pruned.pt", weights_only=True)), "pruned.pt")
    with pytest.raises(ValueError, match=message):
        load_slim("pruned.pt", digits.model, example("digits-resnet"))
    assert os.listdir() == ["pruned.pt"]


def test_files_that_are_none(digits: PrunableNetwork, tmp_path: Path) -> None:
    path = tmp_path / "pruned.pt"
    for missing in (path, tmp_path):
        with pytest.raises(FileNotFoundError, match="pruned network"):
            load_slim(missing, digits.model, example("digits-resnet"))
    save_slim(path, digits, digits.widths, digits.slim(digits.widths))
    content = path.read_bytes()
    for damaged in (b"", b"not a file of torch", content[: len(content) // 2], pickle.dumps({"kept": 1}, 2)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"save_slim wrote|has no"):
            load_slim(path, digits.model, example("digits-resnet"))


def test_a_folder_is_no_file_to_write(digits: PrunableNetwork, tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder: give the name of a file"):
        save_slim(tmp_path, digits, digits.widths, digits.slim(digits.widths))
    assert not list(tmp_path.iterdir())


def test_another_dense_network_raises(digits: PrunableNetwork, tmp_path: Path) -> None:
    save_slim(tmp_path / "pruned.pt", digits, digits.widths // 2, digits.slim(digits.widths // 2))
    with pytest.raises(ValueError, match="another network"):
        load_slim(tmp_path / "pruned.pt", load_model("resnet20"), images(1, 3, 32, 32))
    with pytest.raises(ValueError, match="10 classes"):  # as many units, another last layer
        load_slim(tmp_path / "pruned.pt", load_model("digits-resnet", "random", 7), example("digits-resnet"))


# ---- programs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 6])
def test_exported_program_answers_alike(case: Any, tmp_path: Path, batch: int) -> None:
    name, _, _, slim = case
    slim.train()
    export_program(slim, example(name), tmp_path / "slim.pt2")
    assert all(module.training for module in slim.modules())
    x = images(batch, *NETWORKS[name], seed=3)
    assert_close([torch.export.load(tmp_path / "slim.pt2").module()(x)], outputs(slim, x), 1e-6)


def test_onnx_answers_alike(case: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnx"), pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    name, _, _, slim = case
    assert export_onnx(slim.train(), example(name), tmp_path / "slim.onnx") is True
    assert all(module.training for module in slim.modules())
    session = runtime.InferenceSession(tmp_path / "slim.onnx", providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    assert taken.shape == ["batch", *NETWORKS[name]]
    for batch in (1, 6):
        x = images(batch, *NETWORKS[name], seed=3)
        assert_close([torch.from_numpy(session.run(None, {taken.name: x.numpy()})[0])], outputs(slim, x))


class TwoInputs(nn.Module):
    """Two inputs, two outputs, a number among the arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return self.linear(x) * scale, self.linear(x + y)


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    module, args = TwoInputs(), (images(1, 4), images(1, 4, seed=1), 2.0)
    export_program(module, args, tmp_path / "two.pt2")
    x, y = images(5, 4), images(5, 4, seed=1)
    assert_close(list(torch.export.load(tmp_path / "two.pt2").module()(x, y, 2.0)), outputs(module, x, y, 2.0))
    if export.find_spec("onnx") and export.find_spec("onnxscript"):
        export_onnx(module, args, tmp_path / "two.onnx")


def test_inputs_of_integers_stay_what_they_are(tmp_path: Path) -> None:
    """Indices of words, which noise would put out of range."""
    torch.manual_seed(0)
    module, words = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 2)), torch.tensor([[0, 4, 2]])
    export_program(module, words, tmp_path / "words.pt2")
    more = torch.tensor([[1, 1, 3], [4, 0, 0]])
    assert_close([torch.export.load(tmp_path / "words.pt2").module()(more)], outputs(module, more))
    if export.find_spec("onnx") and export.find_spec("onnxscript"):
        export_onnx(module, words, tmp_path / "words.onnx")


class Nested(nn.Linear):
    def forward(self, inputs: dict[str, Any], more: list[Tensor]) -> Tensor:
        return super().forward(inputs["x"] + more[0]) * inputs["scale"]


def test_nested_inputs(tmp_path: Path) -> None:
    def inputs(batch: int) -> tuple[Any, ...]:
        return {"x": images(batch, 4), "scale": 2.0}, [images(batch, 4, seed=1)]

    module = Nested(4, 2)
    export_program(module, inputs(1), tmp_path / "nested.pt2")
    assert_close([torch.export.load(tmp_path / "nested.pt2").module()(*inputs(5))], outputs(module, *inputs(5)))


class AnyNumber(nn.Linear):
    def forward(self, *inputs: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(sum(inputs)) * scale  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=old_export)])
def test_any_number_of_inputs(count: int, tmp_path: Path) -> None:
    export_program(AnyNumber(4, 2), (images(1, 4),) * count, tmp_path / "program.pt2")
    compiled = torch.compile(AnyNumber(4, 2), backend="eager")
    export_program(compiled, (images(1, 4),) * count, tmp_path / "program.pt2")  # type: ignore[arg-type]


class Answers(nn.Module):
    """A class, whether it is a likely one, and nothing, next to what they are computed from."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.argmax(1), x.amax(1) > 1, x[:, :0], x


def test_outputs_of_integers_and_truth_values(tmp_path: Path) -> None:
    export_program(Answers(), images(1, 4), tmp_path / "answers.pt2")
    x = images(5, 4, seed=2)
    for found, expected in zip(torch.export.load(tmp_path / "answers.pt2").module()(x), Answers()(x), strict=True):
        assert torch.equal(found, expected)


class InPlace(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.5).mul_(2.0))


def test_a_forward_that_changes_its_input(tmp_path: Path) -> None:
    module = InPlace(4, 2)
    export_program(module, images(1, 4), tmp_path / "program.pt2")
    assert_close([torch.export.load(tmp_path / "program.pt2").module()(images(5, 4))], outputs(module, images(5, 4)))
    if export.find_spec("onnx") and export.find_spec("onnxscript"):
        export_onnx(module, images(1, 4), tmp_path / "program.onnx")


class Masked(nn.Linear):
    """Its least likely class is ruled out."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x.masked_fill(x == x.amin(1, keepdim=True), float("-inf"))


def test_outputs_may_be_infinite_but_in_the_same_places(tmp_path: Path) -> None:
    export_program(Masked(4, 3), images(1, 4), tmp_path / "masked.pt2")
    infinite = torch.tensor([0.5, float("-inf")])
    assert export._close(infinite, infinite) and not export._close(infinite, infinite.flip(0))
    assert not export._close(torch.full((2,), torch.nan), infinite)


needs_onnx = pytest.mark.skipif(
    not (export.find_spec("onnx") and export.find_spec("onnxscript") and export.find_spec("onnxruntime")),
    reason="needs the extra onnx",
)


@needs_onnx
def test_half_precision_is_exported_to_onnx(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 4))
    assert export_onnx(randomise(module).half(), images(1, 3, 8, 8).half(), tmp_path / "half.onnx")


class Counts(nn.Linear):
    def forward(self, x: Tensor) -> dict[str, Any]:  # type: ignore[override]
        return {"logits": super().forward(x), "classes": self.out_features}


@needs_onnx
@pytest.mark.parametrize(("module", "dtype"), [(Counts(4, 2), torch.float32), (nn.Conv2d(1, 2, 1), torch.bfloat16)])
def test_what_onnx_does_not_know_is_said(module: nn.Module, dtype: torch.dtype, tmp_path: Path) -> None:
    x = images(1, 4) if isinstance(module, nn.Linear) else images(1, 1, 4, 4)
    with pytest.raises(UnsupportedOperation, match=r"can't be written as ONNX, or not run in onnxruntime: \S+"):
        export_onnx(module.to(dtype), x.to(dtype), tmp_path / "network.onnx")
    assert not list(tmp_path.iterdir())


class FixedBatch(nn.Module):
    """Holds the batch size of its example."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, 4) * 2


class CountsImages(nn.Module):
    """Its batch is a number of Python's."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, 2) * 2


class Named(NamedTuple):
    logits: Tensor


class AnswersByName(nn.Module):
    def forward(self, x: Tensor) -> Named:
        return Named(x * 2)


class Chance(nn.Module):
    """Never answers the same, and so as no program does."""

    def forward(self, x: Tensor) -> Tensor:
        return x * random.random()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (FixedBatch(), "any batch size"),
        (CountsImages(), r"any batch size: (?s:.*)write x\.shape\[0\] for len\(x\)"),
        (Chance(), "something else"),
        (AnswersByName(), "can't write AnswersByName, usually for the type of what goes in or out"),
    ],
)
def test_what_cannot_be_exported_is_not_written(module: nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOperation, match=message):
        export_program(module, images(1, 4), tmp_path / "program.pt2")
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(ImportError, match=r"pip install gnnrl_gym\[onnx\]"):
        export_onnx(nn.Linear(4, 2), images(1, 4), tmp_path / "linear.onnx")


def test_sparse_networks_are_exported(tmp_path: Path) -> None:
    x = example("digits-resnet")
    network = make_network(load_model("digits-resnet"), x, "unstructured")
    export_program(network.slim(network.widths // 2), x, tmp_path / "sparse.pt2")
    program = torch.export.load(tmp_path / "sparse.pt2").module()
    assert_close([program(x)], outputs(network.mask(network.widths // 2), x), 1e-6)
