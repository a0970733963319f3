"""What a BoGP run is asked, what it found, and the report of it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from agents.provenance import machine, versions
from agents.results import RESULT
from gnnrl_gym.checks import check_seed, check_whole
from gnnrl_gym.envs.relational import RelationalEnv
from gnnrl_gym.files import read_json


@dataclass(frozen=True)
class Question:
    """What is asked of a run; what the environment is told is described at `RelationalEnv`.

    Attributes:
        model, data, density, scope, nodes, pool_size, epochs, learning_rate, weight_decay, shift, train_seeds: of the
            environment; learning_rate, weight_decay and shift of the training at the end, too.
        evaluations: of each of the two searches, `bayesian` and, as a control, `random`.
        seed: of the pool and of the searches.
        final_epochs, final_seeds: of the training at the end; its seeds are none that the search has seen.
        controls: graphs drawn from the pool at random that are trained at the end, too.

    Raises:
        ValueError: a number of these is out of range, there are more evaluations or controls than graphs, or the
            model is a module or the data a data set of the caller's: a record can't hold them.
    """

    model: str = "mlp-64-64"
    data: str = "digits"
    density: float = 0.25
    scope: str = "hidden"
    nodes: int = 16
    pool_size: int = 64
    epochs: int = 5
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    shift: int = 0
    train_seeds: int = 1
    evaluations: int = 30
    seed: int = 0
    final_epochs: int = 20
    final_seeds: int = 3
    controls: int = 10

    def __post_init__(self) -> None:
        self._make_plain()
        names = ("evaluations", "final_epochs", "final_seeds", "controls")
        check_whole(1, **{name: getattr(self, name) for name in names})
        check_seed(seed=self.seed)
        for name in ("evaluations", "controls"):
            if getattr(self, name) > self.pool_size:
                raise ValueError(f"{name}={getattr(self, name)} is more than the {self.pool_size} graphs of the pool.")

    @classmethod
    def of(cls, asked: dict[str, Any]) -> Question:
        """The question among what a run folder keeps."""
        return cls(**{name: value for name, value in asked.items() if name != "environment"})

    def _make_plain(self) -> None:
        """Numbers of NumPy, which JSON and some generators don't take, become Python's; a path becomes text."""
        for name, value in list(vars(self).items()):
            plain = value.item() if isinstance(value, np.generic) else value
            object.__setattr__(self, name, os.fspath(plain) if isinstance(plain, os.PathLike) else plain)
        for name, kind in (("model", "a name"), ("data", "a name or a path")):
            if not isinstance(getattr(self, name), str):
                raise ValueError(
                    f"{name} must be {kind}, got {type(getattr(self, name)).__name__}: its record has to say what ran. "
                    "Search with agents.bayesian.bayesian on GNNRL-Relational-v0, which takes objects, instead."
                )

    def environment(self, device: str) -> RelationalEnv:
        """The environment in question."""
        names = ("model", "data", "density", "scope", "nodes", "pool_size", "epochs", "learning_rate", "weight_decay",
                 "shift", "train_seeds")  # fmt: skip
        settings = {name: getattr(self, name) for name in names}
        env = gym.make("GNNRL-Relational-v0", **settings, pool_seed=self.seed, action="index", device=device)
        return env.unwrapped  # type: ignore[return-value]


@dataclass
class BogpResult:
    """What a run found; `result.json` holds the same. Accuracies are shares in [0, 1].

    Attributes:
        model, data, method, seed, evaluations: as asked. budget: the density; metric: always `weights`.
        graph: the pick, its index in the pool; edges: of every graph; descriptors: of the pick, by name.
        weights_ratio: share of the weights in question that its masks keep; params_ratio: of all parameters.
        search_accuracy: of the pick, as the search saw it. random_search_accuracy: of random search's pick.
        test_accuracy: of the pick after the final training, the mean over `final_seeds`.
        dense_test_accuracy, random_search_test_accuracy: likewise.
        random_test_accuracy: the mean over the random graphs of the pool, each with all seeds.
        trained: test accuracies of every final training: by name (`dense`, `bayesian`, `random search`), and of the
            random graphs a list per graph.
        noise: standard deviations, over the random graphs, of what differs between `graphs` (their means over the
            seeds, so a part of it is noise) and of what differs between `seeds` of one graph; None where there is
            one graph or one seed.
        correlations: Spearman's, between each varying descriptor and the search accuracy, over all graphs scored.
        seconds: wall time. settings: what else was asked. versions, machine: where it ran.
    """

    model: str
    data: str
    budget: float
    method: str
    seed: int
    evaluations: int
    graph: int
    edges: int
    descriptors: dict[str, float]
    weights_ratio: float
    params_ratio: float
    search_accuracy: float
    random_search_accuracy: float
    test_accuracy: float
    dense_test_accuracy: float
    random_search_test_accuracy: float
    random_test_accuracy: float
    trained: dict[str, Any]
    noise: dict[str, float | None]
    correlations: dict[str, float]
    seconds: float
    settings: dict[str, Any]
    metric: str = "weights"
    versions: dict[str, str] = field(default_factory=versions)
    machine: str = field(default_factory=machine)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> BogpResult:
        """Read a run folder.

        Raises:
            FileNotFoundError: there is no run, or it is not finished.
            ValueError: the record is damaged or of another kind.
        """
        path = Path(folder) / RESULT
        if not path.is_file():
            raise FileNotFoundError(f"No {RESULT} in {os.fspath(folder)!r}: no finished run of `gnnrl bogp`.")
        try:
            return cls(**read_json(path))
        except TypeError as error:
            raise ValueError(f"{path} is not the record of a run of `gnnrl bogp`: {error}") from error


def report(result: BogpResult) -> str:
    """Markdown: what was asked, what was found, beside the controls."""
    settings, pick = result.settings, result.trained["bayesian"]
    seeds = f"{len(pick)} seeds, {settings['final_epochs']} epochs"
    rows = [
        ("dense", "", "", result.trained["dense"]),
        ("bayesian", f"{result.evaluations}", f"{100 * result.search_accuracy:.2f}", pick),
        ("random search", f"{result.evaluations}", f"{100 * result.random_search_accuracy:.2f}",
         result.trained["random search"]),
        (f"{len(result.trained['random graphs'])} random graphs", "", "", np.ravel(result.trained["random graphs"])),
    ]  # fmt: skip
    lines = [
        f"# BoGP: {result.model} on {result.data}, {result.budget:.0%} of the weights ({settings['scope']})", "",
        f"Pool: {settings['pool_size']} graphs of {settings['nodes']} nodes and {result.edges} edges. "
        f"Kept: {result.weights_ratio:.2%} of these weights, {result.params_ratio:.2%} of all parameters.", "",
        f"| | evaluations | search accuracy | test accuracy ({seeds}) |", "| --- | ---: | ---: | ---: |",
        *(f"| {name} | {count} | {search} | {spread(values)} |" for name, count, search, values in rows), "",
        f"The pick is graph {result.graph}: {_listed(result.descriptors)}.", "",
        f"Noise of training (seeds of one graph): {_points(result.noise['seeds'])}; between graphs: "
        f"{_points(result.noise['graphs'])}. Rank correlation with the search accuracy: "
        f"{_listed(result.correlations) or 'none to be measured'}.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def spread(values: Any) -> str:
    """Mean and standard deviation in percent."""
    percent = 100 * np.asarray(values, float)
    return f"{percent.mean():.2f} ± {percent.std(ddof=1):.2f}" if len(percent) > 1 else f"{percent.mean():.2f}"


def _points(deviation: float | None) -> str:
    return "not measured, there was one" if deviation is None else f"{100 * deviation:.2f} points"


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
