"""The tasks of an import: reading a few files each, possibly in separate processes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from relaxnet_jax.data.files import one_line
from relaxnet_jax.data.parts import Item, Mark
from relaxnet_jax.data.reading import read_relaxations
from relaxnet_jax.data.sources import Beside, Source
from relaxnet_jax.data.vasp.beside import Initial
from relaxnet_jax.data.vasp.vasprun import Energy
from relaxnet_jax.errors import InputError

# Upper limits of a task. Small files share a task, so that each does not cost a part file of its
# own; a task takes at most a sixteenth of the files, so that few files are spread over processes.
TASK_FILES = 32
TASK_BYTES = 64 << 20
MIN_TASKS = 16


class ReadFile(NamedTuple):
    """A file to read, described for the process that reads it.

    Attributes:
      path: absolute path.
      shown: path as the user gave it.
      id: id of its relaxation, if the file does not name it.
      beside: absolute paths of its companion files (see `sources.Beside`).
      stamps: (size in bytes, modification time in ns) of ``path`` and of each of ``beside``;
        (-1, -1) for a missing one.
    """

    path: str
    shown: str
    id: str
    beside: tuple[str | None, ...]
    stamps: tuple[tuple[int, int], ...]


class ReadTask(NamedTuple):
    """Files that one process reads, and the options of `read_relaxations`."""

    files: tuple[ReadFile, ...]
    energy: Energy
    initial: Initial | None


def stamped(sources: Iterable[Source]) -> tuple[ReadFile, ...]:
    """Sources with stamps that show whether they or their companion files have changed."""
    files = []
    for source in sources:
        path = source.path.absolute()
        beside = [str(found.absolute()) if found else None for found in source.beside]
        stamps = tuple(_stamp(name) for name in (str(path), *beside))
        files.append(ReadFile(str(path), str(source.path), source.id, tuple(beside), stamps))
    return tuple(files)


def _stamp(path: str | None) -> tuple[int, int]:
    with contextlib.suppress(OSError):
        if path is not None:
            stat = os.stat(path)
            return stat.st_size, stat.st_mtime_ns
    return -1, -1


def size_of(file: ReadFile) -> int:
    """Number of bytes to read for a file, including its companion files."""
    return sum(max(size, 0) for size, _ in file.stamps)


def key(task: ReadTask) -> str:
    """A string of everything that the result of a task depends on."""
    from relaxnet_jax import __version__

    return json.dumps([__version__, *task])


def read_files(task: ReadTask) -> Iterator[Item]:
    """Reads the files of a task in order.

    Yields:
      Relaxations, skipped ones, a `Mark` "note" for each remark, and a `Mark` "end" at the end of
      each file, whose text is the reason if the file cannot be read.
    """
    for file in task.files:
        notes: list[str] = []
        near = Beside(*(Path(path) if path else None for path in file.beside))
        found = read_relaxations(file.path, file.id, task.energy, task.initial, notes.append, near)
        reason = ""
        try:
            for item in found:
                yield from _remarks(notes, file)
                yield item
        except InputError as error:
            # The error says why no relaxation of this file was read.
            reason = str(error).removeprefix(f"{file.path}: ")
        except MemoryError:
            raise
        except Exception as error:
            reason = f"cannot be read ({type(error).__name__}: {one_line(error)}): report this"
        yield from _remarks(notes, file)
        yield Mark("end", reason)


def _remarks(notes: list[str], file: ReadFile) -> Iterator[Mark]:
    """Yields and removes the notes taken so far, with files named as the user gave them."""
    name = Path(file.path).name
    folder, shown = (path.removesuffix(name) for path in (file.path, file.shown))
    while notes:
        yield Mark("note", notes.pop(0).replace(folder, shown))


def split_task(task: ReadTask) -> list[ReadTask]:
    """Splits a task into tasks of a few consecutive files each, whatever is going to run them."""
    most = min(TASK_FILES, -(-len(task.files) // MIN_TASKS))
    chunks: list[list[ReadFile]] = []
    filled = 0
    for file in task.files:
        if not chunks or len(chunks[-1]) == most or filled + size_of(file) > TASK_BYTES:
            chunks.append([])
            filled = 0
        chunks[-1].append(file)
        filled += size_of(file)
    return [task._replace(files=tuple(chunk)) for chunk in chunks]
