"""Several training runs at a time, each in its own process on its own cores."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

from relaxnet_jax.errors import InputError
from relaxnet_jax.reproduce.plan import Entry
from relaxnet_jax.reproduce.training import StoppedError, train_entry
from relaxnet_jax.runtime import enable_compilation_cache, usable_cores

STOPPED, UNUSABLE = "stopped", "unusable"
LOGS = "logs"  # subfolder of the report: what each run would have printed to the terminal
LOG_WIDTH = 160


@dataclasses.dataclass(frozen=True)
class _Worker:
    """A process, the run it trains, its cores, and the connection on which it answers."""

    process: Any
    entry: Entry
    cores: list[int]
    answer: connection.Connection


def train_side_by_side(
    entries: Sequence[Entry], out: Path, jobs: int, say: Callable[[str], None]
) -> None:
    """Trains runs of a plan, ``jobs`` at a time, the longest first, on equal shares of the cores.

    A batch of a hundred atoms keeps no more than one or two cores busy, so runs side by side take
    less time than one after the other on all cores. If a run cannot be trained, the reason is
    reported and the others continue.

    Raises:
      StoppedError: SIGTERM was received; the runs in progress have written checkpoints.
    """
    waiting, free = sorted(entries, key=lambda e: -(e.minutes or 0.0)), core_shares(jobs)
    at_work: list[_Worker] = []
    with _terminating(at_work, say) as told:
        while at_work or (waiting and not told):
            while waiting and free and not told:
                at_work.append(_start(waiting.pop(0), out, free.pop(0)))
                if told:  # SIGTERM came between start and append
                    at_work[-1].process.terminate()
                run = at_work[-1].entry
                say(
                    f"[{len(entries) - len(waiting)}/{len(entries)}] {run.run.name}: "
                    f"{run.minutes:.2f} min, log: {_log(out, run)}"
                )
            ended = connection.wait([w.process.sentinel for w in at_work])
            for worker in [w for w in at_work if w.process.sentinel in ended]:
                at_work.remove(worker)
                free.append(worker.cores)
                say(f"{worker.entry.run.name}: {_outcome(worker, out)}")
    if told:
        raise StoppedError


def core_shares(jobs: int) -> list[list[int]]:
    """Divides the cores this process may use into ``jobs`` parts.

    The parts are empty on platforms that do not report which cores these are.

    Raises:
      InputError: there are fewer cores than jobs.
    """
    if jobs > usable_cores():
        raise InputError(
            f"--jobs {jobs}: only {usable_cores()} core(s) available; give at most that many"
        )
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return [cores[len(cores) * k // jobs : len(cores) * (k + 1) // jobs] for k in range(jobs)]


@contextlib.contextmanager
def _terminating(at_work: list[_Worker], say: Callable[[str], None]) -> Iterator[list[bool]]:
    """Forwards SIGTERM to the workers; yields a list that is non-empty once it was received.

    After Ctrl-C or an error it waits until the workers have written checkpoints.
    """
    told: list[bool] = []

    def stop(*_: object) -> None:
        told.append(True)
        for worker in at_work:
            worker.process.terminate()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield told
    finally:
        for worker in at_work:  # left over by an exception, Ctrl-C included
            worker.process.terminate()
        if at_work:
            with contextlib.suppress(OSError):  # Ctrl-C may have ended what reads this
                say(f"stopping {len(at_work)} run(s) with a checkpoint…")
        for worker in at_work:
            worker.process.join()
        signal.signal(signal.SIGTERM, before)


def _log(out: Path, entry: Entry) -> Path:
    return out / LOGS / f"{entry.run.digest}.log"


def _start(entry: Entry, out: Path, cores: list[int]) -> _Worker:
    context = multiprocessing.get_context("spawn")  # JAX does not survive a fork
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(entry, out, cores, theirs), daemon=True)
    process.start()
    theirs.close()  # so that ours reaches its end when the process ends
    return _Worker(process, entry, cores, ours)


def _outcome(worker: _Worker, out: Path) -> str:
    """Describes the outcome of a run whose process has ended."""
    worker.process.join()
    code = worker.process.exitcode
    try:
        kind, text = worker.answer.recv()
    except EOFError:
        kind, text = "", ""
    worker.answer.close()
    if kind == UNUSABLE:
        return text
    if kind == STOPPED or code == -signal.SIGTERM:
        return "stopped (SIGTERM)"
    if code == 0:
        return "done"
    why = "killed, perhaps out of memory: lower --jobs" if code == -signal.SIGKILL else "crashed"
    return f"its process ended with exit code {code} ({why}); see {_log(out, worker.entry)}"


def _end_with_parent() -> None:
    """Ends this process as SIGTERM would once its parent is gone, however the parent ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _work(entry: Entry, out: Path, cores: list[int], answer: connection.Connection) -> None:
    """Trains a run; the entry point of a worker process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if cores:
        os.sched_setaffinity(0, cores)  # before JAX counts them
    enable_compilation_cache()
    from rich.console import Console

    from relaxnet_jax.train.report import ConsoleReport

    log = _log(out, entry)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", buffering=1, encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)  # tracebacks and the output of libraries
        try:
            report = ConsoleReport(Console(file=file, width=LOG_WIDTH))
            train_entry(entry, out, report, devices=1)
        except StoppedError:
            answer.send((STOPPED, ""))
        except InputError as error:
            answer.send((UNUSABLE, str(error)))
        except KeyboardInterrupt:
            raise SystemExit(1) from None
