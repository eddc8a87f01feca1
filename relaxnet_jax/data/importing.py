"""Importing files into one store; every relaxation is read, or reported with the reason why not."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import os
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from relaxnet_jax.console import printable
from relaxnet_jax.data.ase_io import SkippedRelaxation
from relaxnet_jax.data.files import remove_leftovers
from relaxnet_jax.data.import_tasks import (
    TASK_BYTES,
    ReadTask,
    key,
    read_files,
    size_of,
    split_task,
    stamped,
)
from relaxnet_jax.data.parts import Item, Mark, run_parts
from relaxnet_jax.data.shards import SHARD_SIZE, is_sharded, write_shards
from relaxnet_jax.data.sources import Source, find_sources
from relaxnet_jax.data.store_write import SUFFIXES, write_store
from relaxnet_jax.data.trajectory import AT_NELM, UNFINISHED, RelaxationTrajectory
from relaxnet_jax.data.vasp.beside import Initial
from relaxnet_jax.data.vasp.vasprun import Energy
from relaxnet_jax.errors import InputError
from relaxnet_jax.runtime import usable_cores

# For fewer bytes, starting another process takes longer than reading.
ALONE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class ImportReport:
    """Outcome of an import.

    Attributes:
      read: number of relaxations in the store.
      skipped: (file, id, reason) of each relaxation left out; id is "" if the whole file could not
        be read, or a folder could not be searched.
      frames: number of ionic steps in the store.
      unfinished: number of relaxations in the store from VASP runs that did not finish (see
        `vasp.unfinished`).
      at_nelm: number of relaxations in the store with electronically unconverged ionic steps (see
        `vasp.electronic`).
    """

    read: int
    skipped: list[tuple[str, str, str]]
    frames: int
    unfinished: int = 0
    at_nelm: int = 0


def import_files(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    report: Callable[[str], None] | None = None,
    groups: Mapping[str, str] | None = None,
    energy: Energy = "free",
    initial: Initial | None = None,
    *,
    jobs: int | None = 1,
    scheduler: str | None = None,
    shard_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImportReport:
    """Imports files, folders and archives into one store or a folder of shards.

    Unsound relaxations and unreadable files are left out and reported; the import continues with
    the rest. The result is the same to the byte whatever processes read the files, and however often
    the import was interrupted and repeated. What was read before an interruption is kept beside
    ``out`` in the folder ``.NAME.parts`` until the import is complete (except for a single file or
    archive, and for imports of up to 64 MB by one process).

    Args:
      paths: files of ionic steps and stores (see `read_relaxations`), and folders to search for them
        (see `find_sources`).
      out: the store to write, ending in .h5; an existing one is replaced (the command refuses that
        without --overwrite). A path without suffix, or a folder, becomes a folder of shards (see
        `write_shards`).
      report: called with one line for each file and each thing left out.
      groups: group of each relaxation by id (see `read_groups`), overriding the file's own.
      energy: which energy to take from VASP's files, see `read_vasprun`.
      initial: what the first frame must agree with, see `read_relaxations`.
      jobs: number of processes; None for one per usable core if there is enough to read.
      scheduler: address of a Dask scheduler whose workers read the files instead; they must reach
        the files and the folder of ``out`` under the same paths as this process.
      shard_size: relaxations per shard, 10,000 by default.
      progress: called with (files done, number of files) after each file.

    Returns:
      The counts, and what was skipped.

    Raises:
      InputError: no relaxation could be read, or ``groups`` names none of them (nothing is left
        behind in either case); ``out`` cannot be written; or see `run_parts`.
    """

    def say(line: str) -> None:
        if report is not None:
            report(printable(line))

    out = Path(out)
    sharded = is_sharded(out)
    if shard_size is not None and not sharded:
        raise InputError(f"{out}: shards need a folder: give a name without suffix")
    if jobs is not None and jobs < 1:
        raise InputError(f"jobs {jobs}: give 1 or more")
    found = find_sources([paths] if isinstance(paths, str | Path) else paths)
    if not found.sources:
        raise InputError("no files to import: name at least one")
    if found.others:
        say(f"{found.others} files in the folders ignored: not relaxation files, or the OUTCAR of a "
            "run whose vasprun.xml is read")  # fmt: skip
    if found.attempts:
        say(f"{found.attempts} archives of custodian's failed attempts (error.N.tar.gz) in the folders "
            "are left out: name them to read them")  # fmt: skip
    read = [source.path.resolve() for source in found.sources]
    # Shards in the output folder would be replaced while others are still to be read.
    replaced = [path.parent for path in read if sharded and path.suffix in SUFFIXES]
    if out.resolve() in (*read, *replaced):
        raise InputError(f"{out}: is also read: choose another output path")
    task = ReadTask(stamped(found.sources), energy, initial)
    total = sum(size_of(file) for file in task.files)
    if jobs is None:
        jobs = usable_cores() if len(found.sources) > 1 and total > ALONE_BYTES else 1
    folder = out.absolute().with_name(f".{out.absolute().name}.parts")
    if scheduler is None and not folder.exists() and (
        len(found.sources) == 1 or (jobs == 1 and total <= TASK_BYTES)
    ):  # fmt: skip
        items: Iterator[Item] = read_files(task)
    else:
        if folder.exists():
            remove_leftovers(out)
        items = _read_in_parts(split_task(task), folder, jobs, scheduler)
    merged = _Merged(found.sources, groups, say, progress)
    for place, reason in found.closed:
        merged.skipped.append((place, "", reason))
        say(f"{place}: skipped: {reason}")
    size = SHARD_SIZE if shard_size is None else shard_size
    metadata = {"files": [printable(source.path.name) for source in found.sources]}
    try:
        with contextlib.closing(merged.relaxations(items)) as relaxations:
            if sharded:
                write_shards(out, relaxations, size, metadata=metadata)
            else:
                write_store(out, relaxations, metadata=metadata)
    except KeyboardInterrupt:
        if any(folder.glob("part-*")):
            say(f"{out}: not complete; give the same command again to resume")
        raise
    finally:
        if merged.done:
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # if nothing was read
    return ImportReport(
        read=len(merged.seen),
        skipped=merged.skipped,
        frames=merged.frames,
        unfinished=merged.unfinished,
        at_nelm=merged.at_nelm,
    )


def _read_in_parts(
    tasks: list[ReadTask], folder: Path, jobs: int, scheduler: str | None
) -> Iterator[Item]:
    """Yields what `read_files` yields for all tasks, in order."""
    results = run_parts(tasks, read_files, folder, key=key, jobs=jobs, scheduler=scheduler)
    with contextlib.closing(results):
        for task, result in zip(tasks, results):
            if not result.error:
                yield from result.items()
            elif len(task.files) == 1:
                yield Mark("end", result.error)
            else:
                # One of the files is at fault; reading each alone saves the others.
                alone = [task._replace(files=(file,)) for file in task.files]
                inner = folder / f"task-{result.number:06d}"
                yield from _read_in_parts(alone, inner, max(jobs, 2), scheduler)


class _Merged:
    """Passes the relaxations of all files on, and counts them.

    Attributes:
      skipped, frames, unfinished, at_nelm: see `ImportReport`.
      seen: ids of the relaxations passed on.
      done: whether all files have been processed.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        groups: Mapping[str, str] | None,
        say: Callable[[str], None],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.sources, self.groups, self.say = sources, groups, say
        self.progress = progress or (lambda done, total: None)
        self.skipped: list[tuple[str, str, str]] = []
        self.frames = self.unfinished = self.at_nelm = 0
        self.seen: set[str] = set()
        self.done = False

    def relaxations(self, items: Iterable[Item]) -> Generator[RelaxationTrajectory, None, None]:
        """Yields the relaxations to store, of all files; an id that occurs again is skipped.

        Raises:
          InputError: there are none.
        """
        left = iter(items)
        for count, source in enumerate(self.sources, 1):
            yield from self._of_file(str(source.path), left)
            self.progress(count, len(self.sources))
        self.done = True
        if not self.seen:
            raise InputError(self._nothing())
        if self.groups is not None:
            self._tell_groups(self.groups)

    def _of_file(self, file: str, items: Iterator[Item]) -> Iterator[RelaxationTrajectory]:
        before, read = len(self.skipped), 0
        for item in items:
            if isinstance(item, Mark) and item.kind == "note":
                self.say(item.text)
                continue
            if isinstance(item, Mark):
                if item.text:
                    self.skipped[before:] = [(file, "", item.text)]
                    self.say(f"{file}: skipped: {item.text}")
                else:
                    left_out = len(self.skipped) - before
                    self.say(f"{file}: {read} relaxations read, {left_out} skipped")
                return
            if isinstance(item, RelaxationTrajectory) and item.id in self.seen:
                item = SkippedRelaxation(item.id, "id occurs in another file: rename it")
            if isinstance(item, SkippedRelaxation):
                self.skipped.append((file, *item))
                self.say(f"{file}: skipped {item.id}: {item.reason}")
                continue
            if self.groups is not None:
                item = dataclasses.replace(item, group=self.groups.get(item.id, item.group))
            self.seen.add(item.id)
            self.frames += item.n_frames
            self.unfinished += item.source.endswith(UNFINISHED)
            self.at_nelm += item.source.removesuffix(UNFINISHED).endswith(AT_NELM)
            read += 1
            yield item

    def _tell_groups(self, groups: Mapping[str, str]) -> None:
        named = self.seen & groups.keys()
        if not named:
            raise InputError(
                f"--groups: names none of the {len(self.seen)} relaxations read (the first is "
                f"{min(self.seen)!r}): its column id must hold their ids"
            )
        for count, what in (
            (
                len(self.seen) - len(named),
                "relaxations are not in it: they are grouped by composition",
            ),
            (len(groups) - len(named), "of its ids were not read"),
        ):
            if count:
                self.say(f"--groups: {count} {what}")

    def _nothing(self) -> str:
        culprit, label, reason = self.skipped[0]
        line = f"{culprit}: {label}: {reason}" if label else f"{culprit}: {reason}"
        if len(self.skipped) > 1:
            line += f" (nor could any of the other {len(self.skipped) - 1} be read)"
        return line


def read_groups(path: str | os.PathLike[str]) -> dict[str, str]:
    """Reads groups by id from a CSV file with the columns ``id`` and ``group``.

    Raises:
      InputError: the file is missing or unreadable, lacks one of the columns, has a row without id
        or group, or assigns two groups to one id.
    """
    try:
        # Excel writes a byte order mark, which would become part of the first column's name.
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            missing = {"id", "group"} - set(rows.fieldnames or [])
            if missing:
                raise InputError(f"{path}: no column {', '.join(sorted(missing))}: add it")
            groups: dict[str, str] = {}
            for row in rows:
                if not (row["id"] and row["group"]):
                    raise InputError(f"{path}: line {rows.line_num}: no id or no group: add it")
                if groups.setdefault(row["id"], row["group"]) != row["group"]:
                    both = f"{groups[row['id']]!r} and {row['group']!r}"
                    raise InputError(
                        f"{path}: line {rows.line_num}: {row['id']!r} is in the groups {both}: keep one"
                    )
            return groups
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as CSV: check the path") from error
