"""Runs calls in this process, in several on this machine, or on the workers of a Dask cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from relaxnet_jax.data.files import one_line
from relaxnet_jax.errors import InputError

Call = tuple[Callable[..., str], tuple]
DIED = "its process was killed or ran out of memory: give it more, or fewer jobs"
CONNECT_SECONDS = 20


class Done(NamedTuple):
    """Outcome of call ``number``: the ``error`` it returned, or that it killed its process."""

    number: int
    error: str


def run_everywhere(
    calls: Sequence[Call], started: Sequence[Path], jobs: int = 1, scheduler: str | None = None
) -> Generator[Done, None, None]:
    """Runs the calls and yields the outcome of each as it finishes, in any order.

    Args:
      calls: functions and their arguments; each returns "" or an error.
      started: for each call, a file that exists while it runs, which shows the calls that were
        running when a process died.
      jobs: number of processes on this machine; with 1 the calls run in this process.
      scheduler: address of a Dask scheduler to use instead.

    Raises:
      InputError: ``distributed`` is not installed, or the scheduler does not answer.
    """
    if jobs < 1:
        raise InputError(f"jobs {jobs}: give 1 or more")
    if scheduler is not None:
        yield from _cluster(calls, scheduler)
    elif jobs > 1 and len(calls) > 1:
        yield from _processes(calls, started, min(jobs, len(calls)))
    else:
        for index, (function, arguments) in enumerate(calls):
            yield Done(index, function(*arguments))


def _call(index: int, function: Callable[..., str], arguments: tuple) -> Done:
    return Done(index, function(*arguments))


def _processes(
    calls: Sequence[Call], started: Sequence[Path], jobs: int
) -> Generator[Done, None, None]:
    """Runs the calls in several processes on this machine.

    A process that dies takes joblib's pool with it. The calls that were running are then repeated
    one by one to find the one at fault, and the rest continues.
    """
    pending = dict(enumerate(calls))
    while pending:
        try:
            for done in _pool(pending, jobs):
                del pending[done.number]
                yield done
        except BrokenProcessPool:
            suspects = [i for i in pending if started[i].exists()] or [*pending][:jobs]
            for index in suspects:
                try:
                    (done,) = _pool({index: calls[index]}, 2)
                except BrokenProcessPool:
                    done = Done(index, DIED)
                del pending[index]
                yield done


def _pool(calls: dict[int, Call], jobs: int) -> Generator[Done, None, None]:
    from joblib import Parallel, delayed

    # One call at a time: they take seconds each, and a batch would be lost as a whole.
    parallel = Parallel(n_jobs=jobs, backend="loky", return_as="generator_unordered", batch_size=1)
    results = parallel(delayed(_call)(index, *call) for index, call in [*calls.items()])
    with contextlib.closing(results):
        yield from results


def _cluster(calls: Sequence[Call], scheduler: str) -> Generator[Done, None, None]:
    """Runs the calls on a Dask cluster.

    Dask itself moves the calls of a lost worker to others, up to its limit of losses per call.
    """
    try:
        from distributed import Client, as_completed
    except ImportError as error:
        raise InputError(
            f"scheduler {scheduler}: Dask is not installed: pip install 'relaxnet-jax[dask]'"
        ) from error
    try:
        client: Any = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"scheduler {scheduler}: does not answer ({one_line(error)}): check the address, "
            "e.g. tcp://host:8786"
        ) from error
    with client:
        futures = {
            client.submit(_call, index, *call, pure=False): index
            for index, call in enumerate(calls)
        }
        try:
            for future in as_completed(futures, loop=client.loop):
                failure = future.exception()
                index = futures.pop(future)
                yield future.result() if failure is None else Done(index, _failure(failure))
        finally:
            client.cancel([*futures])


def _failure(error: BaseException) -> str:
    text = f"{type(error).__name__}: {one_line(error)}"
    return DIED if type(error).__name__ == "KilledWorker" else text
