"""Writing the HDF5 store: its layout, and a streaming writer with a checksum.

Layout (version 1), for R relaxations, A atoms, F frames and P = sum of frames * atoms:

    relaxations/  id, group, source (R,) utf-8; pbc (R, 3); has_stresses, has_charges,
                  has_times (R,); atom_offset, frame_offset, pair_offset (R+1,)
    atoms/        atomic_numbers, fixed_mask, charges (A,)
    frames/       energies, times (F,); cells (F, 3, 3); stresses (F, 6)
    pairs/        positions, forces (P, 3)
    attributes    format, version, metadata (JSON), sha256 of the content
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from relaxnet_jax.data.files import atomic_path
from relaxnet_jax.data.trajectory import RelaxationTrajectory
from relaxnet_jax.errors import InputError

FORMAT = "relaxnet_jax relaxations"
VERSION = 1
SUFFIXES = (".h5", ".hdf5")
# Rows (pairs of frame and atom) buffered before they are appended: about 4 MB.
FLUSH_ROWS = 65_536
REMEDY = "make one with 'relaxnet-jax data import FILE --out NAME.h5'"
# Dataset: (group, dtype, shape of a row). The order is that of the checksum.
COLUMNS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "pbc": ("relaxations", "|b1", (3,)),
    "has_stresses": ("relaxations", "|b1", ()),
    "has_charges": ("relaxations", "|b1", ()),
    "has_times": ("relaxations", "|b1", ()),
    "atomic_numbers": ("atoms", "<i8", ()),
    "fixed_mask": ("atoms", "|b1", ()),
    "charges": ("atoms", "<f8", ()),
    "energies": ("frames", "<f8", ()),
    "times": ("frames", "<f8", ()),
    "cells": ("frames", "<f8", (3, 3)),
    "stresses": ("frames", "<f8", (6,)),
    "positions": ("pairs", "<f8", (3,)),
    "forces": ("pairs", "<f8", (3,)),
}
Metadata = Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None
TEXTS = ("id", "group", "source")
OFFSETS = ("atom_offset", "frame_offset", "pair_offset")


def write_store(
    path: str | os.PathLike[str],
    trajectories: Iterable[RelaxationTrajectory],
    *,
    metadata: Metadata = None,
    unique: bool = True,
) -> int:
    """Writes relaxations to an HDF5 store; the file appears only when it is complete.

    Args:
      path: a file ending in .h5 or .hdf5; an existing one is replaced.
      trajectories: consumed one at a time, so they need not fit in memory together.
      metadata: JSON-serialisable facts about the data set, or a function that returns them, which is
        called once all relaxations have been consumed.
      unique: whether two relaxations with the same id are an error.

    Returns:
      The number of relaxations written.

    Raises:
      InputError: there are no relaxations, two share an id, one is unsound (see
        `RelaxationTrajectory.validate`), or the file cannot be written.
    """
    target = Path(path)
    if target.suffix not in SUFFIXES:
        raise InputError(f"{target}: unknown suffix {target.suffix!r}: end the store in .h5")
    with atomic_path(target) as temporary:
        return fill_store(temporary, target, trajectories, metadata, unique)


def fill_store(
    file: Path,
    target: Path,
    trajectories: Iterable[RelaxationTrajectory],
    metadata: Metadata = None,
    unique: bool = True,
) -> int:
    """`write_store` to the path ``file``, which is called ``target`` in messages."""
    seen: set[str] = set()
    count = 0
    with h5py.File(file, "w") as opened:
        writer = _Writer(opened)
        for trajectory in trajectories:
            try:
                trajectory.validate()
            except InputError as error:
                raise InputError(f"{target}: {error}") from error
            if unique and trajectory.id in seen:
                raise InputError(
                    f"{target}: relaxation {trajectory.id!r}, id: given twice: rename one"
                )
            seen.add(trajectory.id)
            count += 1
            writer.append(trajectory)
        if not count:
            raise InputError(f"{target}: no relaxations to write: give at least one")
        writer.close(dict((metadata() if callable(metadata) else metadata) or {}))
    return count


class _Writer:
    """Appends relaxations to an open file in chunks and updates the checksum."""

    def __init__(self, file: h5py.File) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.buffer: dict[str, list[Any]] = {name: [] for name in (*COLUMNS, *TEXTS)}
        self.offsets: dict[str, list[int]] = {name: [0] for name in OFFSETS}
        self.buffered = 0
        for name, (group, dtype, row) in COLUMNS.items():
            # gzip has a checksum of its own, so HDF5 rejects a damaged chunk on a lazy read.
            chunk = max(1, 8192 // max(1, int(np.prod(row))))
            file.create_dataset(
                f"{group}/{name}",
                shape=(0, *row),
                maxshape=(None, *row),
                chunks=(chunk, *row),
                dtype=dtype,
                shuffle=True,
                compression="gzip",
                compression_opts=1,
            )
        for name in TEXTS:
            file.create_dataset(
                f"relaxations/{name}", (0,), maxshape=(None,), dtype=h5py.string_dtype("utf-8")
            )

    def append(self, trajectory: RelaxationTrajectory) -> None:
        """Buffers one relaxation."""
        update_checksum(self.digest, trajectory)
        for name, value in columns_of(trajectory).items():
            self.buffer[name].append(value)
        for name in TEXTS:
            self.buffer[name].append(getattr(trajectory, name))
        n, n_atoms = trajectory.n_frames, trajectory.n_atoms
        for name, step in zip(OFFSETS, (n_atoms, n, n * n_atoms)):
            self.offsets[name].append(self.offsets[name][-1] + step)
        self.buffered += n * n_atoms
        if self.buffered >= FLUSH_ROWS:
            self.flush()

    def flush(self) -> None:
        """Appends the buffer to the file."""
        for name, values in self.buffer.items():
            if not values:
                continue
            group = COLUMNS[name][0] if name in COLUMNS else "relaxations"
            rows = np.concatenate(values) if name in COLUMNS else np.array(values, dtype=object)
            dataset = self.file[f"{group}/{name}"]
            start = dataset.shape[0]
            dataset.resize(start + len(rows), axis=0)
            dataset[start:] = rows
            values.clear()
        self.buffered = 0

    def close(self, metadata: dict[str, Any]) -> None:
        """Flushes the buffer, and writes offsets and attributes."""
        self.flush()
        for name, values in self.offsets.items():
            self.file.create_dataset(f"relaxations/{name}", data=np.array(values, dtype="<i8"))
        text = json.dumps(metadata, sort_keys=True)
        self.digest.update(text.encode())
        self.file.attrs["format"] = FORMAT
        self.file.attrs["version"] = VERSION
        self.file.attrs["metadata"] = text
        self.file.attrs["sha256"] = self.digest.hexdigest()


def columns_of(trajectory: RelaxationTrajectory) -> dict[str, np.ndarray]:
    """The rows of one relaxation in every column; zeros where an optional field is absent."""
    sizes = {"relaxations": 1, "atoms": trajectory.n_atoms, "frames": trajectory.n_frames}
    sizes["pairs"] = trajectory.n_atoms * trajectory.n_frames
    columns = {}
    for name, (group, dtype, row) in COLUMNS.items():
        if name.startswith("has_"):
            value: Any = getattr(trajectory, name.removeprefix("has_")) is not None
        else:
            value = getattr(trajectory, name)
        shape = (sizes[group], *row)
        columns[name] = (
            np.zeros(shape, dtype)
            if value is None
            else np.ascontiguousarray(value, dtype=dtype).reshape(shape)
        )
    return columns


def update_checksum(digest: Any, trajectory: RelaxationTrajectory) -> None:
    """Adds one relaxation to the checksum, including its sizes so that shifted data are noticed."""
    header = [*(getattr(trajectory, name) for name in TEXTS), *trajectory.positions.shape]
    digest.update(json.dumps(header).encode())
    for value in columns_of(trajectory).values():
        digest.update(value.tobytes())
