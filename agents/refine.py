"""What happens to a run afterwards: fine-tuning, and checking it again."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from agents.progress import Progress
from agents.provenance import DIGESTS, digest_of_data
from agents.results import SearchResult
from agents.run_folder import COPY, check_writable, is_of_run
from gnnrl_gym.checks import check_choice, check_number, check_seed, check_whole
from gnnrl_gym.copies import copy_of
from gnnrl_gym.evaluation.accuracy import accuracy, resolve_device
from gnnrl_gym.evaluation.finetuning import finetune
from gnnrl_gym.evaluation.precision import fitting_dtype
from gnnrl_gym.evaluation.threads import fitting_threads
from gnnrl_gym.export import read_slim, update_slim
from gnnrl_gym.files import alone_in, digest_of
from gnnrl_gym.pruning.masks import zeros_held
from gnnrl_gym.pruning.network import PrunableNetwork
from gnnrl_gym.pruning.timing import take_turns
from gnnrl_gym.zoo import DataSplits

CHECKPOINT = "finetuning-"  # files of a run folder, while it is fine-tuned
IMAGES = ("train", "all")
REPEATS = 50  # forwards behind a latency


def finetune_run(
    run: str | os.PathLike[str],
    epochs: int,
    learning_rate: float = 0.02,
    device: str = "auto",
    seed: int = 0,
    model: nn.Module | None = None,
    data: DataSplits | None = None,
    schedule: str = "cosine",
    distill: float = 0.0,
    images: str = "train",
) -> SearchResult:
    """Fine-tune the pruned network of a run folder; the record gets `finetuned_accuracy`, measured on the test split
    once, after the last epoch.

    Interrupted, it leaves the record as it was, and beside it the last whole epoch: the same call goes on from there
    and ends as if it had never stopped. If the loss becomes NaN or infinite, the record also stays as it was. The
    training computes in the precision that the run was searched in.

    Args:
        model, data: needed where the search was given objects instead of names.
        schedule: of the learning rate, see `gnnrl_gym.evaluation.finetuning.finetune`.
        distill: weight of the dense network's outputs in the loss, in [0, 1]; 0: labels alone.
        images: "train": the train split. "all": the search split too, which has done its work once a plan is chosen.

    Raises:
        ValueError: a number out of range, an unknown schedule; data whose labels, size or normalisation are not those
            of the run; `distill` above 0 although the dense network of the run has random weights, or the one given
            here has other weights than the run's; or the training diverged. The run stays as it was.
        PermissionError: nothing can be written in the run folder. BlockingIOError: another process works there.
    """
    how, folder = _how(epochs, learning_rate, schedule, distill, images, seed, device), Path(run)
    SearchResult.load(run)  # there must be one
    check_writable(folder, COPY)
    with alone_in(folder):
        return _finetuned(SearchResult.load(run), folder, model, data, how)


def _finetuned(
    result: SearchResult, folder: Path, model: nn.Module | None, data: DataSplits | None, how: dict[str, Any]
) -> SearchResult:  # fmt: skip
    place, splits = resolve_device(how["device"]), _splits(result, folder, data)
    if how["images"] == "all":
        splits = replace(splits, train=splits.train.joined(splits.search))
    network = result.network(model)
    slim = result.pruned(network).to(place)
    done = read_slim(result.weights_file)["finetuning"]
    if len(done) > len(result.settings.get("finetuning", [])):  # cut when the weights were written, the record not
        _record(result, folder, slim, splits, done[-1])
        if {**done[-1], "device": how["device"]} == how:
            return result
    _tune(result, folder, network, slim, splits, how)
    update_slim(result.weights_file, slim, [*result.settings.get("finetuning", []), how])
    _record(result, folder, slim, splits, how)
    return result


def _how(
    epochs: int, learning_rate: float, schedule: str, distill: float, images: str, seed: int, device: str
) -> dict[str, Any]:
    """What a run's record says of a fine-tuning, with Python's own numbers instead of NumPy's.

    Raises:
        ValueError: a number out of range, or unknown images.
    """
    check_whole(1, epochs=epochs)
    check_seed(seed=seed)
    check_number("at least 0", learning_rate=learning_rate, distill=distill)
    check_choice("images", images, IMAGES)
    how = {"epochs": int(epochs), "learning_rate": float(learning_rate), "schedule": schedule}
    return how | {"distill": float(distill), "images": images, "seed": int(seed), "device": str(device)}


def _tune(
    result: SearchResult, folder: Path, network: PrunableNetwork, slim: nn.Module, splits: DataSplits,
    how: dict[str, Any],
) -> None:  # fmt: skip
    """Train `slim`, the pruned network of `network`, in place."""
    place = next(slim.parameters()).device
    teacher = _teacher(result, folder, network, how["distill"])
    dtype = fitting_dtype(result.settings.get("precision", "auto"), network, place)  # absent from old records
    # the epochs before are in the name: what an earlier fine-tuning may have left is no part of this one
    checkpoint = folder / f"{CHECKPOINT}{result.finetune_epochs or 0}.pt"
    named = {name: how[name] for name in ("epochs", "learning_rate", "seed", "schedule", "distill")}
    bar = Progress(how["epochs"], "epoch", "fine-tuning", lines=how["epochs"])

    def show(epoch: int, loss: float) -> None:
        bar.at(epoch, f"training loss {loss:.3f}")

    with closing(bar), zeros_held(network, slim, result.kept()), fitting_threads(network):
        finetune(slim, splits, **named, on_epoch=show, teacher=teacher, dtype=dtype, checkpoint=checkpoint)


def _record(result: SearchResult, folder: Path, slim: nn.Module, data: DataSplits, how: dict[str, Any]) -> None:
    """Write what a fine-tuning has made of the run, and remove what was kept of it on the way."""
    result.finetuned_accuracy = accuracy(slim, data.test)
    result.finetune_epochs = (result.finetune_epochs or 0) + how["epochs"]
    result.settings.setdefault("finetuning", []).append(how)
    result.save(folder)
    for left in folder.glob(f"{CHECKPOINT}*.pt"):
        left.unlink()


def _splits(result: SearchResult, run: str | os.PathLike[str], data: DataSplits | None) -> DataSplits:
    """The data of a run: `data`, or what its record names.

    Raises:
        ValueError: other data than the run's. TypeError, FileNotFoundError: as `SearchResult.splits`.
    """
    splits = result.splits(data)
    if not is_of_run(run, "data_digest", digest_of_data(splits)):
        raise ValueError(
            f"{os.fspath(run)!r} was run with other {DIGESTS['data_digest']} than {splits.name!r} has here: give the "
            "run's own again (in Python as data=)."
        )
    return splits


def _teacher(result: SearchResult, run: Path, network: PrunableNetwork, distill: float) -> nn.Module | None:
    """The dense network, where the pruned one is to learn from it.

    Raises:
        ValueError: it is not trained, or not the run's.
    """
    if not distill:
        return None
    if result.settings.get("objective") and result.weights is None:
        raise ValueError(f"distill={distill}, but the dense network of {str(run)!r} is not trained: use 0.")
    if not _is_dense(result, run, network):
        raise ValueError(
            f"distill={distill} learns from the network that {str(run)!r} pruned, but {result.model} has other "
            "weights here: give the run's own (in Python as model=), or use 0."
        )
    return copy_of(network.model)


def _is_dense(result: SearchResult, run: str | os.PathLike[str], network: PrunableNetwork) -> bool:
    """Whether `network` has the weights that the run's plans were scored with."""
    return result.dense_is_kept and is_of_run(run, "weights_digest", digest_of(network.model.state_dict()))


@dataclass(frozen=True)
class Evaluation:
    """A run measured again; pairs are (dense, pruned). Accuracies are shares, latencies seconds per forward."""

    accuracy: float
    recorded_accuracy: float
    dense_accuracy: float
    macs: tuple[int, int]
    params: tuple[int, int]
    latency: tuple[float, float]


def evaluate_run(
    run: str | os.PathLike[str],
    device: str = "auto",
    batch: int = 1,
    model: nn.Module | None = None,
    data: DataSplits | None = None,
) -> Evaluation:
    """Rebuild the pruned network of a run folder from its plan and weights, and measure it on the test split.

    Any weights of `model` do, the pruned network has its own: the dense network's accuracy is the record's where they
    are others than the run's, or the run's were trained for it and not kept.

    Raises:
        ValueError: other data than the run's, by its labels, size and normalisation.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}.")
    result = SearchResult.load(run)
    place, splits = resolve_device(device), _splits(result, run, data)
    network = result.network(model)
    slim = result.pruned(network).to(place)
    dense = copy_of(network.model).to(place).eval()  # a module may be given in training mode
    images = splits.test.batch(torch.arange(batch) % len(splits.test))[0].to(place)
    with fitting_threads(network):
        pruned_accuracy = accuracy(slim, splits.test)
        ours = _is_dense(result, run, network)
        dense_accuracy = accuracy(dense, splits.test) if ours else result.dense_test_accuracy
        dense_latency, pruned_latency = take_turns([dense, slim], REPEATS, place, (images,))
    return Evaluation(
        accuracy=pruned_accuracy,
        recorded_accuracy=result.test_accuracy if result.finetuned_accuracy is None else result.finetuned_accuracy,
        dense_accuracy=dense_accuracy,
        macs=(network.macs(network.widths), network.macs(result.widths)),
        params=(network.params(network.widths), network.params(result.widths)),
        latency=(dense_latency, pruned_latency),
    )
