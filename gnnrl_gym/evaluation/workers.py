"""Who measures plans: threads of this machine, or the machines of a Ray cluster."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

import torch

from gnnrl_gym.checks import check_whole
from gnnrl_gym.errors import MissingExtra
from gnnrl_gym.graph.groups import Ints

if TYPE_CHECKING:
    from gnnrl_gym.evaluation.accuracy import PlanEvaluator

Measure = Callable[[Ints], float]


class Workers(Protocol):
    """Measure plans side by side.

    Attributes:
        apart: whether each is a process of its own, with its own random numbers.
    """

    apart: bool

    def __call__(self, measure: Measure, plans: Sequence[Ints]) -> list[float]:
        """`measure` of every plan, a method of the evaluator that the workers are of."""


class Threads:
    """A thread for each plan, `count` at a time (default: as many as torch may use), in which torch uses one."""

    apart = False

    def __init__(self, count: int | None = None) -> None:
        self.count = count

    def __call__(self, measure: Measure, plans: Sequence[Ints]) -> list[float]:
        """`measure` of every plan."""
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(self.count or threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                return list(pool.map(measure, plans))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            finally:
                torch.set_num_threads(threads)


class RayCluster:
    """The processors of a Ray cluster: a task on one of them for each plan, and again on another if that is lost.

    Args:
        evaluator: is sent to every process once.
        address: of the cluster, as `ray.init` takes it: ``auto`` is the one that runs here, ``local`` begins one. Where
            the caller has called that, the cluster that it has joined is meant.

    Raises:
        MissingExtra: Ray is not installed.
        ValueError: there is no cluster.
    """

    apart = True

    def __init__(self, evaluator: PlanEvaluator, address: str) -> None:
        check_ray()
        import ray

        self._began = not ray.is_initialized()
        if self._began:
            _connect(address)
        self._task = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(_measured)
        try:
            self._evaluator = ray.put(evaluator)
        except BaseException:
            self.close()
            raise

    def __call__(self, measure: Measure, plans: Sequence[Ints]) -> list[float]:
        """`measure` of every plan."""
        import ray

        # within a list a reference stays one: the process looks up what it has
        return list(ray.get([self._task.remote([self._evaluator], measure.__name__, plan) for plan in plans]))

    def close(self) -> None:
        """Leave the cluster, if this has joined it; one that it began ends."""
        import ray

        if self._began:
            ray.shutdown()


def check_ray() -> None:
    """Check that Ray is installed.

    Raises:
        MissingExtra: it is not.
    """
    if importlib.util.find_spec("ray") is None:
        raise MissingExtra("Scoring on a Ray cluster needs ray: pip install gnnrl_gym[ray]")


def _connect(address: str) -> None:
    import ray

    host, _, port = address.rpartition(":")
    try:
        if host and port.isdigit() and "/" not in host:  # Ray itself tries for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except OSError as error:
        raise ValueError(
            f"There is no Ray cluster at {address!r}: begin one with `ray start --head`, or say 'local' for one of "
            "this machine alone."
        ) from error


def _measured(evaluator: list[Any], measure: str, plan: Ints) -> float:
    """What a process of the cluster does: `measure` is the name of the evaluator's method."""
    torch.set_num_threads(1)
    return float(getattr(_held(evaluator[0]), measure)(plan))


@functools.lru_cache(maxsize=1)
def _held(reference: Any) -> Any:
    """The evaluator, fetched once in each process."""
    import ray

    return ray.get(reference)


@contextlib.contextmanager
def scored_by(evaluator: PlanEvaluator, workers: int | None = None, ray: str | None = None) -> Iterator[None]:
    """While it is open, the given workers measure the plans of `evaluator`. On equal processors scores are equal.

    Args:
        workers: threads of this machine, each of which measures a plan. Default: as many as torch may use.
        ray: instead, all processors of a Ray cluster; its address as `ray.init` takes it, ``auto`` or ``local``. All
            its machines need this package, and the module that the network's class is from.

    Raises:
        ValueError: both, less than one worker, an evaluator on a GPU, or no cluster at this address.
        MissingExtra: Ray is not installed.
    """
    if workers is None and ray is None:
        yield
        return
    check_workers(workers, ray)
    if evaluator.device.type != "cpu":
        raise ValueError(f"workers and ray measure plans on CPUs, not on {evaluator.device}: use device='cpu'.")
    if workers is not None:
        evaluator.workers = Threads(workers)
    else:
        evaluator.workers = RayCluster(evaluator, str(ray))
    try:
        yield
    finally:
        if isinstance(evaluator.workers, RayCluster):
            evaluator.workers.close()
        evaluator.workers = None


def check_workers(workers: int | None, ray: str | None) -> None:
    """Check the numbers of threads and the address of a Ray cluster: at most one of the two may be given.

    Raises:
        ValueError: both are given, or fewer than one worker.
        MissingExtra: Ray is not installed.
    """
    if workers is not None:
        check_whole(1, workers=workers)
    if ray is not None:
        check_ray()
        if workers is not None:
            raise ValueError(f"workers={workers} are threads of this machine, which ray={ray!r} replaces: give one.")
