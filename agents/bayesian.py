"""Bayesian optimisation over a finite pool, with BoTorch (optional extra `bayesian`)."""

from __future__ import annotations

import contextlib
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.ask_tell import run_ask_tell
from agents.recorder import EvaluationsExhausted, PlanRecorder
from gnnrl_gym.errors import MissingExtra

START = 8  # graphs that are scored before the first model


def bayesian(recorder: PlanRecorder, seed: int = 0, out: Path | None = None, start: int = START) -> None:
    """Gaussian process over the pool's descriptors, log noisy expected improvement, final pick by posterior mean.

    `recorder.best` is the scored graph with the highest posterior mean, which the noise of one lucky training fools
    less than the highest score; `recorder.best_accuracy` is the score it had.

    Args:
        recorder: around an environment with a pool, such as `GNNRL-Relational-v0`.
        start: graphs, chosen by chance, that are scored first.

    Raises:
        MissingExtra: BoTorch is not installed.
        ValueError: the environment has no pool.
    """
    env: Any = recorder.unwrapped
    if not hasattr(env, "pool"):
        raise ValueError(f"bayesian chooses from a pool, and {type(env).__name__} has none: use GNNRL-Relational-v0.")
    require_botorch()
    optimizer = PoolOptimizer(env, seed, start)
    with contextlib.suppress(EvaluationsExhausted):  # the pick is still to be made
        run_ask_tell(recorder, optimizer)
    pick = optimizer.pick()
    recorder.best, recorder.best_accuracy = np.array(pick), optimizer.scores[pick]


def random_graphs(recorder: PlanRecorder, seed: int = 0, out: Path | None = None) -> None:
    """The control: graphs of the pool in random order, none twice; the best score wins."""
    env: Any = recorder.unwrapped
    for index in np.random.default_rng(seed).permutation(len(env.pool)):
        if recorder.exhausted:
            return
        recorder.play([env.action_for(int(index))])


def require_botorch() -> None:
    """Import BoTorch, which takes seconds, or say which extra is missing.

    Raises:
        MissingExtra: BoTorch is not installed.
    """
    if find_spec("botorch") is None:
        raise MissingExtra("The searcher 'bayesian' needs botorch: pip install gnnrl_gym[bayesian]")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its dependencies use what torch is about to drop
        import botorch  # noqa: F401


class PoolOptimizer:
    """Asks for one graph at a time and is told its score.

    The model: a Gaussian process with a Matern 5/2 kernel, a length per descriptor, and noise that is learned, on the
    descriptors that vary in the pool, each scaled to [0, 1]. The acquisition: log noisy expected improvement (Ament et
    al. 2023), of every unseen graph.

    Args:
        env: has `pool` and `action_for`.
        seed: of the first graphs and of the samples behind the acquisition.
        start: how many graphs are chosen by chance first.

    Attributes:
        scores: by graph, the returns it was told, plus 1: search accuracies.
    """

    def __init__(self, env: Any, seed: int, start: int = START) -> None:
        self.env, self.seed = env, seed
        self._places = torch.from_numpy(env.pool.units[:, env.pool.varies]).double()
        order = np.random.default_rng(seed).permutation(len(self._places))
        self._first = [int(index) for index in order[: max(start, 2)]]
        self.scores: dict[int, float] = {}

    def ask(self) -> np.ndarray:
        """The action of the next graph, [1, ...]; [0] once every graph is scored."""
        unseen = [index for index in range(len(self._places)) if index not in self.scores]
        if not unseen:
            return np.empty(0)
        # each is asked for once: an environment that has seen it already may answer with another graph
        self._first = [index for index in self._first if index not in self.scores]
        return np.array([self.env.action_for(self._first.pop(0) if self._first else self._most_promising(unseen))])

    def tell(self, actions: np.ndarray, returns: np.ndarray, infos: list[dict[str, Any]]) -> None:
        """Remember."""
        for info in infos:
            self.scores[int(info["graph"])] = float(info["search_accuracy"])

    def pick(self) -> int:
        """The scored graph with the highest posterior mean."""
        seen = list(self.scores)
        if len(seen) < 3:  # no model: the best score
            return max(seen, key=lambda index: self.scores[index])
        means = self._model().posterior(self._places[seen]).mean[:, 0].detach()
        return seen[int(means.argmax())]

    def _most_promising(self, unseen: list[int]) -> int:
        from botorch.acquisition.logei import qLogNoisyExpectedImprovement
        from botorch.sampling.normal import SobolQMCNormalSampler

        sampler = SobolQMCNormalSampler(torch.Size([256]), seed=self.seed)
        seen = self._places[list(self.scores)]
        model = self._model()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(self.seed)  # pruning the baseline draws from the global generator
            acquisition = qLogNoisyExpectedImprovement(model, seen, sampler, prune_baseline=True)
            values = acquisition(self._places[unseen][:, None])
        return unseen[int(values.argmax())]

    def _model(self) -> Any:
        """The Gaussian process fitted to what was seen. The fit starts anew each time and uses no chance."""
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import SingleTaskGP
        from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior
        from gpytorch.mlls import ExactMarginalLogLikelihood

        x, y = self._places[list(self.scores)], _column(list(self.scores.values()))
        kernel = get_covar_module_with_dim_scaled_prior(ard_num_dims=x.shape[1], use_rbf_kernel=False)
        model = SingleTaskGP(x, y, covar_module=kernel)  # which standardises y
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of retries of the fit
            torch.default_generator.manual_seed(self.seed)
            fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
        return model


def _column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]
