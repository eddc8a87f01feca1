"""Lazy reading of the HDF5 store (see `store_write` for its layout)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import operator
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from relaxnet_jax.data.files import one_line
from relaxnet_jax.data.shards import incomplete
from relaxnet_jax.data.store_write import (
    COLUMNS,
    FORMAT,
    OFFSETS,
    REMEDY,
    TEXTS,
    VERSION,
    update_checksum,
    write_store,
)
from relaxnet_jax.data.trajectory import CELL_TOLERANCE, RelaxationTrajectory
from relaxnet_jax.errors import InputError

__all__ = ["TrajectoryStore", "write_store"]

BLOCK = 512  # relaxations read together if only a small column is needed

# Bytes cached per file: two decompressed chunks of each column, which suffices to read in order, and
# HDF5's own metadata, whose cache would otherwise grow to 32 MiB.
_CHUNK_CACHE = 128 * 1024
_INDEX_CACHE = 512 * 1024


def _compact(offsets: np.ndarray) -> np.ndarray:
    """Ascending offsets in half the memory if they fit, as they are kept for every relaxation."""
    small = len(offsets) and offsets[-1] <= np.iinfo(np.int32).max
    return offsets.astype(np.int32) if small else offsets


class _Shard:
    """One open HDF5 file with its offsets."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise InputError(f"{path}: no such store: {REMEDY}")
        try:
            self.file = h5py.File(path, "r", rdcc_nbytes=_CHUNK_CACHE)
            index = self.file.id.get_mdc_config()
            index.set_initial_size = True
            index.initial_size = index.min_size = index.max_size = _INDEX_CACHE
            self.file.id.set_mdc_config(index)
        except OSError as error:
            # HDF5 passes the operating system's error number on.
            if error.errno:
                raise InputError(
                    f"{path}: cannot be opened ({os.strerror(error.errno)}): check its permissions, "
                    "and that no process is writing to it"
                ) from error
            raise InputError(
                f"{path}: not an HDF5 file or damaged ({one_line(error)}): {REMEDY}"
            ) from error
        try:
            self._read_header()
        except InputError:
            self.file.close()
            raise
        except Exception as error:
            self.file.close()
            raise self.damaged(error) from error

    def _read_header(self) -> None:
        attributes = self.file.attrs
        if attributes.get("format") != FORMAT:
            raise InputError(f"{self.path}: HDF5, but not a store of relaxations: {REMEDY}")
        if attributes["version"] != VERSION:
            version = attributes["version"]
            raise InputError(
                f"{self.path}: store version {version}, this package reads {VERSION}: {REMEDY}"
            )
        self.metadata = json.loads(attributes["metadata"])
        self.sha256 = attributes["sha256"]
        self.atom, self.frame, self.pair = (
            _compact(self.file[f"relaxations/{o}"][:]) for o in OFFSETS
        )
        self.sizes = {
            "relaxations": len(self.atom) - 1,
            "atoms": self.atom[-1],
            "frames": self.frame[-1],
            "pairs": self.pair[-1],
        }
        # Kept open, since HDF5 drops a dataset's cache of decompressed chunks when it is closed.
        self.columns = {name: self.file[f"{group}/{name}"] for name, (group, *_) in COLUMNS.items()}
        self.strings = {name: self.file[f"relaxations/{name}"].asstr() for name in TEXTS}
        for name, (group, _, row) in COLUMNS.items():
            if self.columns[name].shape != (self.sizes[group], *row):
                raise ValueError(f"{group}/{name} has the wrong length for its offsets")
        self.flags = {n: self.columns[n][:] for n, c in COLUMNS.items() if c[0] == "relaxations"}

    def damaged(self, error: BaseException) -> InputError:
        """The error to raise for a read that failed."""
        return InputError(f"{self.path}: damaged store ({one_line(error)}): {REMEDY}")

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Turns HDF5's errors about a damaged file into an InputError that names it."""
        try:
            yield
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise self.damaged(error) from error

    def texts(self, name: str) -> list[str]:
        """All ids, groups or sources."""
        with self.guard():
            return [str(text) for text in self.strings[name][:]]

    def read(self, i: int) -> RelaxationTrajectory:
        """Relaxation ``i`` of the file."""
        bounds = {
            "atoms": slice(self.atom[i], self.atom[i + 1]),
            "frames": slice(self.frame[i], self.frame[i + 1]),
            "pairs": slice(self.pair[i], self.pair[i + 1]),
        }
        data: dict[str, Any] = {"pbc": self.flags["pbc"][i].copy()}
        with self.guard():
            for name, (group, _, _) in COLUMNS.items():
                if group == "relaxations":
                    continue
                absent = f"has_{name}" in self.flags and not self.flags[f"has_{name}"][i]
                data[name] = None if absent else self.columns[name][bounds[group]]
            data |= {name: str(strings[i]) for name, strings in self.strings.items()}
            n_atoms = len(data["atomic_numbers"])
            for name in ("positions", "forces"):
                data[name] = data[name].reshape(-1, n_atoms, 3)
        return RelaxationTrajectory(**data)


class TrajectoryStore:
    """Relaxations in one or several HDF5 files, read from disk when indexed.

    Args:
      path: a store, a folder of stores (its .h5 files in order of name), or a sequence of these.

    Raises:
      InputError: a file is missing, not a store of this format and version, or damaged; a folder
        holds no store; two files hold the same id.
    """

    def __init__(self, path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> None:
        given = [path] if isinstance(path, str | os.PathLike) else list(path)
        self.paths: list[Path] = []
        for entry in map(Path, given):
            found = [p for p in sorted(entry.glob("*.h5")) if not p.name.startswith(".")]
            if entry.is_dir() and not found:
                raise InputError(f"{entry}: no .h5 file in this folder: {REMEDY}")
            self.paths += found if entry.is_dir() else [entry]
        if not self.paths:
            raise InputError(f"no store given: {REMEDY}")
        self._open()

    def _open(self) -> None:
        self._shards: list[_Shard] = []
        with contextlib.ExitStack() as stack:
            for path in self.paths:
                self._shards.append(_Shard(path))
                stack.callback(self._shards[-1].file.close)
            stack.pop_all()
        sizes = [shard.sizes["relaxations"] for shard in self._shards]
        self._starts = np.cumsum([0, *sizes])
        if len(self._shards) > 1 and len(set(self.ids)) < len(self):
            self.close()
            raise InputError(f"{self.paths[0]}, ...: stores share ids: give each relaxation once")

    def __getstate__(self) -> dict[str, Any]:
        """The paths only, as open files cannot be sent to another process."""
        return {"paths": self.paths}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.paths = state["paths"]
        self._open()

    def __enter__(self) -> TrajectoryStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files; nothing can be read afterwards."""
        for shard in self._shards:
            shard.file.close()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, i: int) -> RelaxationTrajectory:
        """Reads relaxation ``i`` (negative: from the end); raises IndexError beyond the last."""
        shard, i = self._locate(range(len(self))[operator.index(i)])
        return shard.read(i)

    def _locate(self, i: int) -> tuple[_Shard, int]:
        """The file of relaxation ``i``, and its index there."""
        k = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self._shards[k], i - int(self._starts[k])

    @property
    def ids(self) -> list[str]:
        """Ids of the relaxations."""
        return [text for shard in self._shards for text in shard.texts("id")]

    @property
    def groups(self) -> list[str]:
        """Group of each relaxation (see `relaxnet_jax.data.split_groups`)."""
        return [text for shard in self._shards for text in shard.texts("group")]

    @property
    def n_atoms(self) -> np.ndarray:
        """(R,) int, number of atoms of each relaxation."""
        return np.concatenate([np.diff(shard.atom) for shard in self._shards]).astype(np.int64)

    @property
    def n_frames(self) -> np.ndarray:
        """(R,) int, number of frames of each relaxation."""
        return np.concatenate([np.diff(shard.frame) for shard in self._shards]).astype(np.int64)

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata of the first file, as given to `write_store`."""
        return dict(self._shards[0].metadata)

    @property
    def checksum(self) -> str:
        """Hash of the content of all files, as written."""
        return hashlib.sha256("".join(s.sha256 for s in self._shards).encode()).hexdigest()

    def energies(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Reads only the atomic numbers (N,) and energies (n,), eV, of relaxation ``i``."""
        shard, i = self._locate(i)
        with shard.guard():
            numbers = shard.columns["atomic_numbers"][shard.atom[i] : shard.atom[i + 1]]
            return numbers, shard.columns["energies"][shard.frame[i] : shard.frame[i + 1]]

    def variable_cell(self) -> np.ndarray:
        """(R,) bool: which relaxations have a variable cell, see `RelaxationTrajectory`."""
        changes = [np.zeros(0, bool)]
        for shard in self._shards:
            for begin in range(0, shard.sizes["relaxations"], BLOCK):
                ends = shard.frame[begin : begin + BLOCK + 1]
                with shard.guard():
                    cells = shard.columns["cells"][ends[0] : ends[-1]]
                starts = ends[:-1] - ends[0]
                first = np.repeat(cells[starts], np.diff(ends), axis=0)
                moved = np.abs(cells - first).max(axis=(1, 2))
                changes.append(np.maximum.reduceat(moved, starts) > CELL_TOLERANCE)
        return np.concatenate(changes)

    def has_charges(self) -> np.ndarray:
        """(R,) bool: which relaxations have atomic charges."""
        found = [np.zeros(0, bool)]
        for shard in self._shards:
            with shard.guard():
                found.append(shard.columns["has_charges"][:])
        return np.concatenate(found)

    @property
    def incomplete(self) -> bool:
        """Whether shards of the set are missing: it is still being written, or was interrupted."""
        return incomplete([shard.metadata.get("shard") for shard in self._shards])

    def elements(self) -> np.ndarray:
        """(k,) int, atomic numbers that occur, ascending."""
        found: set[int] = set()
        for shard in self._shards:
            with shard.guard():
                found.update(np.unique(shard.columns["atomic_numbers"][:]).tolist())
        return np.array(sorted(found), dtype=np.int64)

    def verify(self) -> None:
        """Reads everything once and compares the checksums.

        Raises:
          InputError: the content is not what was written.
        """
        for shard in self._shards:
            digest = hashlib.sha256()
            for i in range(shard.sizes["relaxations"]):
                update_checksum(digest, shard.read(i))
            digest.update(json.dumps(shard.metadata, sort_keys=True).encode())
            if digest.hexdigest() != shard.sha256:
                raise InputError(f"{shard.path}: content does not match its checksum: {REMEDY}")
