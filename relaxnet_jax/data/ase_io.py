"""Relaxations from any file ASE reads, one relaxation in memory at a time."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from relaxnet_jax.data.files import one_line
from relaxnet_jax.data.trajectory import (
    RelaxationTrajectory,
    reduced_formula,
    unwrap_positions,
)
from relaxnet_jax.errors import InputError

if TYPE_CHECKING:
    import ase


class SkippedRelaxation(NamedTuple):
    """A relaxation left out.

    Attributes:
      id: its name.
      reason: one line, without the id.
    """

    id: str
    reason: str


class _Frame(NamedTuple):
    """What is kept of one ASE frame."""

    name: str
    index: int | None
    atoms: ase.Atoms
    energy: float | None
    forces: np.ndarray | None
    stress: np.ndarray | None


class _Damage(Exception):  # noqa: N818 - not an error yet: frames before it may be whole
    """ASE stopped in the middle of the file."""


def read_relaxations(
    path: str | os.PathLike[str],
) -> Iterator[RelaxationTrajectory | SkippedRelaxation]:
    """Reads the relaxations of a file, in order.

    Consecutive frames that share ``traj_id`` in their ``info`` are one relaxation, and their
    ``frame`` (if there) must ascend. Without ``traj_id`` the whole file is one relaxation,
    named after the file. Energies are force-consistent (free) ones where ASE offers them;
    forces are raw; ``FixAtoms`` becomes ``fixed_mask``; positions are unwrapped.

    Args:
      path: any file ASE reads as consecutive frames with energies and forces (extxyz, traj,
        db, OUTCAR, ...), plain or gzipped.

    Yields:
      A validated `RelaxationTrajectory` of at least two frames, or a `SkippedRelaxation`.

    Raises:
      InputError: the file is missing or unreadable, or no frame of it has energy and forces.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder: name the files in it")
    if not path.is_file():
        raise InputError(f"{path}: no such file: check the path")
    labelled = False
    seen: set[str] = set()
    with _plain(path) as plain:
        stem = Path(plain.name).stem
        frames = _frames(path, plain, stem)
        for name, group in itertools.groupby(frames, key=lambda frame: frame.name):
            members: list[_Frame] = []
            damage = ""
            try:
                members.extend(group)
            except _Damage as stopped:
                damage = str(stopped)
            except BaseException:
                raise
            labelled |= any(f.energy is not None and f.forces is not None for f in members)
            if name in seen:
                yield SkippedRelaxation(name, "id occurs before: give each relaxation its own")
            elif damage:
                yield SkippedRelaxation(name, damage)
            else:
                yield _build(name, members, path.name)
            seen.add(name)
            if damage:
                break
    if not labelled:
        raise InputError(
            f"{path}: no frame has energy and forces: give a file that stores both (ASE names "
            "them energy and forces)"
        )
