"""A data set as a folder of stores of bounded size, which can be read while it grows."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from relaxnet_jax.data.files import atomic_path
from relaxnet_jax.data.store_write import fill_store
from relaxnet_jax.data.trajectory import RelaxationTrajectory
from relaxnet_jax.errors import InputError

SHARD_SIZE = 10_000
_NAME = re.compile(r"shard-\d{5,}\.h5")


def write_shards(
    folder: str | os.PathLike[str],
    trajectories: Iterable[RelaxationTrajectory],
    size: int = SHARD_SIZE,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> int:
    """Writes relaxations to a folder of stores, shard-00000.h5 and so on.

    Shards appear in order, each when it is complete, so that the folder can be opened at any time
    and holds the relaxations so far. The metadata of a shard contain ``shard``: its ``index``, and
    whether it is the ``last``; until that one is there, the set counts as incomplete (see
    `incomplete`).

    Args:
      folder: created if necessary; shards in it are replaced once the first new one is complete.
      trajectories: consumed one at a time.
      size: relaxations per shard.
      metadata: JSON-serialisable facts about the data set, kept in the first shard.

    Returns:
      The number of relaxations written.

    Raises:
      InputError: see `write_store`; ``folder`` is a file or holds other stores; ``size`` is below 1.
    """
    target = Path(folder)
    if size < 1:
        raise InputError(f"{target}: {size} relaxations per shard: give 1 or more")
    old = _old_shards(target)
    stream = _unique(target, trajectories)
    head = next(stream, None)
    if head is None:
        raise InputError(f"{target}: no relaxations to write: give at least one")
    total = 0
    for index in itertools.count():
        path = target / f"shard-{index:05d}.h5"
        members = itertools.chain([head], itertools.islice(stream, size - 1))
        following: list[RelaxationTrajectory | None] = []

        def facts(index: int = index, following: list = following) -> dict[str, Any]:
            following.append(next(stream, None))
            given = dict(metadata or {}) if index == 0 else {}
            return given | {"shard": {"index": index, "last": following[0] is None}}

        with atomic_path(path) as temporary:
            total += fill_store(temporary, path, members, facts)
            # The last one first, so that what an interruption leaves counts as incomplete.
            while old:
                old.pop().unlink(missing_ok=True)
        head = following[0]
        if head is None:
            return total
    raise AssertionError


def is_sharded(out: Path) -> bool:
    """Whether the path of a new data set is a folder of shards: it has no suffix, or is a folder."""
    return out.is_dir() or not out.suffix


def incomplete(marks: Sequence[Mapping[str, Any] | None]) -> bool:
    """Whether shards are missing, judged by ``shard`` in the metadata of all stores of a set."""
    shards = [mark for mark in marks if mark]
    if not shards:
        return False
    return [m["index"] for m in shards] != [*range(len(shards))] or not shards[-1]["last"]


def _old_shards(folder: Path) -> list[Path]:
    """Shards in the folder in order of name; deletes unfinished ones of an interrupted run."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file: choose another output folder")
    stores = sorted(p for p in folder.glob("*.h5") if not p.name.startswith("."))
    for path in stores:
        if not _NAME.fullmatch(path.name):
            raise InputError(f"{path}: is not a shard of a set: choose another output folder")
    for path in folder.glob(".shard-*.tmp.h5"):
        path.unlink(missing_ok=True)
    return sorted(stores, key=lambda path: (len(path.name), path.name))


def _unique(
    folder: Path, trajectories: Iterable[RelaxationTrajectory]
) -> Iterator[RelaxationTrajectory]:
    seen: set[str] = set()
    for trajectory in trajectories:
        if trajectory.id in seen:
            raise InputError(f"{folder}: relaxation {trajectory.id!r}, id: given twice: rename one")
        seen.add(trajectory.id)
        yield trajectory
