"""Files in, one store out: every relaxation is read, or named with the reason it was not."""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from relaxnet_jax.data.ase_io import SkippedRelaxation
from relaxnet_jax.data.reading import read_relaxations
from relaxnet_jax.data.sources import find_sources
from relaxnet_jax.data.store_write import write_store
from relaxnet_jax.data.trajectory import RelaxationTrajectory
from relaxnet_jax.data.vasp_xml import Energy
from relaxnet_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class ImportReport:
    """What an import did.

    Attributes:
      read: number of relaxations in the store.
      skipped: (file, id, reason) of each relaxation left out; id is "" where the whole file
        could not be read.
      frames: number of ionic steps in the store.
    """

    read: int
    skipped: list[tuple[str, str, str]]
    frames: int


def import_files(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    report: Callable[[str], None] | None = None,
    groups: Mapping[str, str] | None = None,
    energy: Energy = "free",
) -> ImportReport:
    """Imports files, folders and archives into one store.

    A relaxation that is unsound, and a file that cannot be read, is left out, reported, and
    the rest goes on.

    Args:
      paths: files of ionic steps (see `read_relaxations`), and folders to search for them (see
        `find_sources`).
      out: the store to write, ending in .h5; an existing one is replaced.
      report: called with one line for each file and each thing left out.
      groups: group of a relaxation by id (see `read_groups`), instead of the file's own.
      energy: which energy of a vasprun.xml, see `read_vasprun`.

    Returns:
      Counts, and what was skipped.

    Raises:
      InputError: no relaxation could be read (nothing is left behind), or ``out`` cannot be
        written.
    """
    say = report or (lambda _: None)
    found = find_sources([paths] if isinstance(paths, str | Path) else paths)
    if not found.sources:
        raise InputError("no files to import: name at least one")
    if found.others:
        say(f"{found.others} files in the folders are no files of relaxations, or the OUTCAR of a "
            "run whose vasprun.xml is read")  # fmt: skip
    if Path(out).resolve() in [source.path.resolve() for source in found.sources]:
        raise InputError(f"{out}: is also read: choose another output path")
    skipped: list[tuple[str, str, str]] = []
    frames = 0

    def relaxations() -> Iterator[RelaxationTrajectory]:
        nonlocal frames
        seen: set[str] = set()
        errors: list[InputError] = []
        for file, name in found.sources:
            before, read = len(skipped), 0
            try:
                for item in read_relaxations(file, name, energy):
                    if isinstance(item, RelaxationTrajectory) and item.id in seen:
                        item = SkippedRelaxation(item.id, "id occurs in another file: rename it")
                    if isinstance(item, SkippedRelaxation):
                        skipped.append((str(file), *item))
                        say(f"{file}: skipped {item.id}: {item.reason}")
                        continue
                    if groups is not None:
                        item = dataclasses.replace(item, group=groups.get(item.id, item.group))
                    seen.add(item.id)
                    frames += item.n_frames
                    read += 1
                    yield item
            except InputError as error:
                # The error says why no relaxation of this file was read.
                errors.append(error)
                reason = str(error).removeprefix(f"{file}: ")
                skipped[before:] = [(str(file), "", reason)]
                say(f"{file}: skipped: {reason}")
            else:
                say(f"{file}: {read} relaxations read, {len(skipped) - before} skipped")
        if not seen:
            if len(errors) == 1 and len(found.sources) == 1:
                raise errors[0]
            culprit, label, reason = skipped[0]
            where = f"{culprit}: {label}: " if label else f"{culprit}: "
            raise InputError(
                f"{where}{reason} (nor could any of the other {len(skipped) - 1} be read)"
                if len(skipped) > 1
                else where + reason
            )

    read = write_store(
        out, relaxations(), metadata={"files": [source.path.name for source in found.sources]}
    )
    return ImportReport(read=read, skipped=skipped, frames=frames)


def read_groups(path: str | os.PathLike[str]) -> dict[str, str]:
    """Groups by id from a CSV file with the columns ``id`` and ``group``.

    Raises:
      InputError: the file is missing, or lacks one of the columns.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            missing = {"id", "group"} - set(rows.fieldnames or [])
            if missing:
                raise InputError(f"{path}: no column {', '.join(sorted(missing))}: add it")
            return {row["id"]: row["group"] for row in rows}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as CSV: check the path") from error
