"""Runs many tasks that yield relaxations, in several processes or on a cluster, with a file for each.

An interrupted run resumes where it stopped: a task whose file is there is not repeated.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from relaxnet_jax.data.ase_io import SkippedRelaxation
from relaxnet_jax.data.files import atomic_path, one_line
from relaxnet_jax.data.pools import run_everywhere
from relaxnet_jax.data.store import TrajectoryStore
from relaxnet_jax.data.store_write import write_store
from relaxnet_jax.data.trajectory import RelaxationTrajectory
from relaxnet_jax.errors import InputError


class Mark(NamedTuple):
    """A message that a task yields between its relaxations, e.g. at the end of one of several files."""

    kind: str
    text: str


Item = RelaxationTrajectory | SkippedRelaxation | Mark
LogEntry = list[str] | dict[str, str] | None
Work = Callable[[Any], Iterator[Any]]


class PartResult(NamedTuple):
    """Result of a task.

    Attributes:
      number: index of the task, from 0.
      path: the store of its relaxations, or None if there are none.
      log: an entry for each item the task yielded, in order: None for a relaxation, [id, reason] for
        a skipped one, {kind: text} for a `Mark`.
      error: "" or, on one line, what ended the task: an `InputError` that it raised (the relaxations
        before it are kept), or anything unexpected (nothing is kept).
    """

    number: int
    path: Path | None
    log: list[LogEntry]
    error: str

    @property
    def skipped(self) -> list[SkippedRelaxation]:
        """The relaxations left out."""
        return [SkippedRelaxation(*entry) for entry in self.log if isinstance(entry, list)]

    def items(self) -> Iterator[Item]:
        """Yields what the task yielded, in order, with one relaxation in memory at a time."""
        with contextlib.ExitStack() as stack:
            store = stack.enter_context(TrajectoryStore(self.path)) if self.path else None
            read = itertools.count()
            for entry in self.log:
                if isinstance(entry, list):
                    yield SkippedRelaxation(*entry)
                elif entry is not None:
                    yield from (Mark(*pair) for pair in entry.items())
                elif store is not None:
                    yield store[next(read)]


def run_parts(
    tasks: Sequence[Any],
    work: Work,
    folder: str | os.PathLike[str],
    *,
    key: Callable[[Any], str],
    jobs: int = 1,
    scheduler: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Generator[PartResult, None, None]:
    """Runs the tasks and yields their results in order, whichever finishes first.

    Args:
      tasks: picklable descriptions of the tasks.
      work: a module-level function (not a lambda) that yields a task's relaxations, a
        `SkippedRelaxation` for each one left out, and `Mark`; the same items whenever it is called.
      folder: folder for one file per task, an .h5 store, or .json for a task without relaxations;
        every other ``part-*`` in it is deleted. On a cluster all workers must reach the folder, and
        all files that ``work`` reads, under the same paths.
      key: gives all that a task's result depends on as a string; a file is reused if its key matches.
      jobs: number of processes on this machine; with 1 the work is done in this process.
      scheduler: address of a Dask scheduler whose workers do the work instead.
      progress: called with (tasks done, number of tasks) after each task.

    Raises:
      InputError: the folder cannot be written, ``distributed`` is not installed, or the scheduler
        does not answer. A failure inside a task, even one that kills its process, is reported as
        that task's `PartResult.error`.
    """
    folder = Path(folder).absolute()
    parts = [_Part.of(folder, index, key(task)) for index, task in enumerate(tasks)]
    _clean(folder, {path.name for part in parts for path in (part.store, part.bare)})
    calls = [(_do, (part, work, task)) for part, task in zip(parts, tasks)]
    started = [part.started for part in parts]
    errors: dict[int, str] = {}
    following = 0
    with contextlib.closing(run_everywhere(calls, started, jobs, scheduler)) as finished:
        for count, done in enumerate(finished, 1):
            errors[done.number] = done.error
            parts[done.number].started.unlink(missing_ok=True)  # left by a process that died
            if progress is not None:
                progress(count, len(parts))
            while following in errors:
                yield _result(following, parts[following], errors.pop(following))
                following += 1


class _Part(NamedTuple):
    """The files of a task: ``store`` or ``bare`` (log only) once done, ``started`` while it runs."""

    store: Path
    bare: Path
    started: Path
    key: str

    @classmethod
    def of(cls, folder: Path, index: int, key: str) -> _Part:
        digest = hashlib.sha256(key.encode()).hexdigest()
        stem = folder / f"part-{index:06d}-{digest[:16]}"
        store, bare, started = (stem.with_suffix(s) for s in (".h5", ".json", ".started"))
        return cls(store, bare, started, digest)


def _clean(folder: Path, wanted: set[str]) -> None:
    """Creates the folder and deletes parts of earlier runs that do not belong to this one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in [*folder.glob("part-*"), *folder.glob(".part-*")]:
            if file.name not in wanted:
                file.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror}): choose another output path"
        ) from error


def _do(part: _Part, work: Work, task: Any) -> str:
    """Runs one task unless it is done already; returns the error, or ""."""
    if not part.store.parent.is_dir():
        return f"{part.store.parent}: no such folder: make it accessible to all workers"
    try:
        if _read_log(part, verify=True) is None:
            part.started.touch()
            _write(part, work, task)
    except Exception as error:
        return f"{type(error).__name__}: {one_line(error)}"
    finally:
        part.started.unlink(missing_ok=True)
    return ""


def _write(part: _Part, work: Work, task: Any) -> None:
    """Writes a task's relaxations and log to a store; only the log if there are no relaxations."""
    log: list[LogEntry] = []
    errors: list[str] = []

    def relaxations() -> Iterator[RelaxationTrajectory]:
        try:
            for item in work(task):
                if isinstance(item, RelaxationTrajectory):
                    log.append(None)
                    yield item
                else:
                    log.append({item.kind: item.text} if isinstance(item, Mark) else [*item])
        except InputError as error:
            errors.append(str(error))

    def facts() -> dict[str, Any]:
        return {"part": {"key": part.key, "log": log, "error": "".join(errors)}}

    made = relaxations()
    first = next(made, None)
    if first is not None:
        # Ids shared by two tasks, or two files of a task, are handled by the reader of the parts.
        write_store(part.store, itertools.chain([first], made), metadata=facts, unique=False)
        return
    with atomic_path(part.bare) as temporary:
        temporary.write_text(json.dumps(facts()), encoding="utf-8")


def _read_log(part: _Part, verify: bool = False) -> dict[str, Any] | None:
    """Log and error of a finished part; None if it is missing, damaged or of another key."""
    try:
        if part.store.exists():
            with TrajectoryStore(part.store) as store:
                if verify:
                    store.verify()
                found = store.metadata["part"]
        else:
            found = json.loads(part.bare.read_text(encoding="utf-8"))["part"]
        return found if found["key"] == part.key else None
    except (OSError, InputError, ValueError, KeyError, TypeError):
        return None


def _result(index: int, part: _Part, error: str) -> PartResult:
    found = None if error else _read_log(part)
    if found is None:
        error = error or f"{part.store}: missing: let no other run use this folder"
        return PartResult(index, None, [], error)
    path = part.store if part.store.exists() else None
    return PartResult(index, path, found["log"], found["error"])
