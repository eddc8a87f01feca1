"""Samples on disk: neighbour lists are built once, and memory hardly grows with the data set.

A file holds one record per relaxation (its arrays one after the other, see `_FIELDS`), then an
index (npz, no pickles), the index's length and `MAGIC`. It lies in the cache folder under a name
derived from everything it depends on, so a later run with the same data and configuration finds it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import joblib
import numpy as np

from relaxnet_jax.config import Config
from relaxnet_jax.data.buckets import Sizes, size_of
from relaxnet_jax.data.files import atomic_path
from relaxnet_jax.data.relaxations import Relaxations
from relaxnet_jax.data.sample import Sample, frame_slots, make_sample
from relaxnet_jax.errors import InputError
from relaxnet_jax.graph import MAX_ATOMIC_NUMBER, Structure
from relaxnet_jax.neighbors import Neighbors
from relaxnet_jax.runtime import cache_folder

MAGIC = b"relaxnet_jax samples 6\n"
# Field: (dtype, shape in terms of N atoms, E edges, n frames). The order is that of a record.
_FIELDS: dict[str, tuple[str, tuple[str | int, ...]]] = {
    "frames": ("<f8", ("n", "N", 3)),
    "forces": ("<f8", ("n", "N", 3)),
    "energies": ("<f8", ("n",)),
    "times": ("<f8", ("n",)),
    "deformations": ("<f8", ("n", 3, 3)),
    "stresses": ("<f8", ("n", 3, 3)),
    "strain": ("<f8", (3, 3)),
    "positions": ("<f8", ("N", 3)),
    "charges": ("<f8", ("N",)),
    "cell": ("<f8", (3, 3)),
    "reach": ("<f8", (1,)),
    "atomic_numbers": ("<i4", ("N",)),
    "receivers": ("<i4", ("E",)),
    "senders": ("<i4", ("E",)),
    "reverse": ("<i4", ("E",)),
    "shifts": ("<i2", ("E", 3)),
    "bond": ("|b1", ("E",)),
    "fixed_mask": ("|b1", ("N",)),
    "pbc": ("|b1", (3,)),
    "frame_mask": ("|b1", ("n",)),
    "stress_mask": ("|b1", ("n",)),
}
_ELEMENT_BYTES = -(-(MAX_ATOMIC_NUMBER + 1) // 8)  # one bit per element
CHUNK = 128  # relaxations prepared together
PARALLEL = 2000  # number of relaxations from which starting worker processes pays off
UNUSED_DAYS = 30  # days without use after which a cached file is deleted


@dataclasses.dataclass(frozen=True)
class _Row:
    """The record of one relaxation, or the reason why it has none."""

    record: bytes
    sizes: tuple[int, ...]
    elements: np.ndarray
    reason: str


class SampleFile:
    """Samples of a set of relaxations, read from disk when indexed.

    Attributes:
      sizes: sizes of all samples, zero for those in ``left_out``.
      left_out: reason by row, for relaxations of which no sample could be made.
    """

    def __init__(self, path: Path, n_frames: int) -> None:
        self.path, self.n_frames = path, n_frames
        self._descriptor = os.open(path, os.O_RDONLY)
        try:
            index = self._read_index()
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            self.close()
            raise InputError(f"{path}: damaged cache file: delete it") from error
        # What is kept here per relaxation is the only memory that grows with their number.
        self.sizes = Sizes(*np.ascontiguousarray(index["sizes"].T, np.int32))
        self._elements = index["elements"]  # one bit per element
        self._offsets = index["offsets"]
        self._names, self._name_ends = index["names"].tobytes(), index["name_ends"]
        left_out = json.loads(index["left_out"].tobytes().decode())
        self.left_out: dict[int, str] = {int(k): v for k, v in left_out.items()}

    def _read_index(self) -> dict[str, np.ndarray]:
        end = os.fstat(self._descriptor).st_size - len(MAGIC) - 8
        tail = os.pread(self._descriptor, len(MAGIC) + 8, end)
        if tail[8:] != MAGIC:
            raise ValueError("wrong format, or truncated")
        length = int.from_bytes(tail[:8], "little")
        packed = io.BytesIO(os.pread(self._descriptor, length, end - length))
        with np.load(packed, allow_pickle=False) as index:
            return {name: index[name] for name in index.files}

    def close(self) -> None:
        """Closes the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._name_ends)

    def id(self, row: int) -> str:
        """Id of the relaxation."""
        begin = int(self._name_ends[row - 1]) if row else 0
        return self._names[begin : int(self._name_ends[row])].decode()

    def has_any(self, elements: np.ndarray) -> np.ndarray:
        """(R,) bool: which relaxations contain one of the given elements ((119,) bool)."""
        return np.any(self._elements & np.packbits(elements), axis=1)

    def __getitem__(self, row: int) -> Sample:
        """The sample of a relaxation, with energies as stored; raises KeyError if it is left out."""
        if row in self.left_out:
            raise KeyError(f"{self.id(row)}: {self.left_out[row]}")
        begin, end = int(self._offsets[row]), int(self._offsets[row + 1])
        record = os.pread(self._descriptor, end - begin, begin)
        lengths = {"N": self.sizes.atoms[row], "E": self.sizes.edges[row], "n": self.n_frames}
        return _decode(record, lengths, int(self.sizes.slots[row]), self.id(row))


class SampleView(Sequence[Sample]):
    """A selection of a file's samples, with energies relative to the composition energies.

    Attributes:
      sizes: sizes of the selected samples, see `buckets.Sizes`.
    """

    def __init__(self, file: SampleFile, rows: np.ndarray, element_energies: np.ndarray) -> None:
        self.file, self.rows, self.element_energies = file, rows, element_energies
        self.sizes = Sizes(*(values[rows] for values in file.sizes))

    def __len__(self) -> int:
        return len(self.rows)

    def id(self, k: int) -> str:
        """Id of a relaxation, without reading its sample."""
        return self.file.id(int(self.rows[k]))

    def __getitem__(self, k):
        sample = self.file[int(self.rows[k])]
        composition = self.element_energies[sample.structure.atomic_numbers].sum()
        energies = np.where(sample.frame_mask, sample.energies - composition, 0.0)
        return dataclasses.replace(sample, energies=energies)


def prepare_samples(
    relaxations: Relaxations, config: Config, report: Callable[[str], None] = lambda _: None
) -> SampleFile:
    """Returns the samples of the relaxations, from the cache or newly made and cached.

    Their energies are total energies: subtract the composition energy on reading.

    Raises:
      InputError: the cache folder cannot be written to.
    """
    folder = cache_folder() / "samples"
    path = folder / f"{_key(relaxations, config)}.bin"
    if path.exists():
        try:
            found = SampleFile(path, frame_slots(config))
            os.utime(path)
            return found
        except InputError:
            report(f"{path}: damaged; making it again")
    start = time.perf_counter()
    report(f"preparing {len(relaxations)} relaxations (once for these data and settings)…")
    with atomic_path(path) as temporary:
        _write(temporary, relaxations, config)
    _delete_unused(folder)
    report(f"prepared in {time.perf_counter() - start:.0f} s: {path}")
    return SampleFile(path, frame_slots(config))


def _key(relaxations: Relaxations, config: Config) -> str:
    """Hash of everything the samples depend on."""
    parts = [
        MAGIC.decode(),
        relaxations.store.checksum,
        hashlib.sha256(relaxations.rows.astype("<i8").tobytes()).hexdigest(),
        hashlib.sha256(relaxations.starts.astype("<i8").tobytes()).hexdigest(),
        dataclasses.asdict(config.graph),
        config.triplet_skin,
        config.model.interaction,
        config.data.frame_selection,
        frame_slots(config),
        config.dynamics.mass,
        config.dynamics.cell,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _write(path: Path, relaxations: Relaxations, config: Config) -> None:
    n = len(relaxations)
    offsets, sizes = np.zeros(n + 1, "<i8"), np.zeros((n, len(Sizes._fields)), "<i4")
    elements, left_out = np.zeros((n, _ELEMENT_BYTES), np.uint8), {}
    with path.open("wb") as file:
        for row, made in enumerate(_rows(relaxations, config)):
            file.write(made.record)
            offsets[row + 1] = offsets[row] + len(made.record)
            sizes[row], elements[row] = made.sizes, made.elements
            if made.reason:
                left_out[row] = made.reason
        names = [name.encode() for name in relaxations.ids]
        packed = io.BytesIO()
        np.savez(
            packed,
            offsets=offsets,
            sizes=sizes,
            elements=elements,
            names=np.frombuffer(b"".join(names), np.uint8),
            name_ends=np.cumsum([len(name) for name in names], dtype="<i8"),
            left_out=np.frombuffer(json.dumps(left_out).encode(), np.uint8),
        )
        length = file.write(packed.getbuffer())
        file.write(length.to_bytes(8, "little") + MAGIC)


def _rows(relaxations: Relaxations, config: Config) -> Iterator[_Row]:
    """Yields all rows in order, made in several processes if there are many."""
    starts = range(0, len(relaxations), CHUNK)
    parts = (relaxations[k : k + CHUNK] for k in starts)
    jobs = joblib.cpu_count() if len(relaxations) >= PARALLEL else 1
    if jobs == 1:
        chunks: Iterator[list[_Row]] = (_make_rows(part, config) for part in parts)
    else:
        pool = joblib.Parallel(n_jobs=jobs, return_as="generator", pre_dispatch=2 * jobs)
        chunks = pool(joblib.delayed(_make_rows)(part, config) for part in parts)
    for chunk in chunks:
        yield from chunk


def _make_rows(part: Relaxations, config: Config) -> list[_Row]:
    rows = []
    for k in range(len(part)):
        trajectory, relax_cell = part.with_cell(k)
        elements = np.zeros(MAX_ATOMIC_NUMBER + 1, bool)
        elements[trajectory.atomic_numbers] = True
        try:
            sample = make_sample(trajectory, config, relax_cell)
        except InputError as error:
            rows.append(_Row(b"", (0,) * len(Sizes._fields), np.packbits(elements), str(error)))
            continue
        size = size_of(sample.structure)
        rows.append(_Row(_encode(sample), size, np.packbits(elements), ""))
    return rows


def _encode(sample: Sample) -> bytes:
    s = sample.structure
    values = vars(sample) | vars(s) | vars(s.neighbors)
    values |= {"frames": sample.positions, "positions": s.positions}
    return b"".join(
        np.ascontiguousarray(values[name], dtype).tobytes() for name, (dtype, _) in _FIELDS.items()
    )


def _decode(record: bytes, lengths: dict[str, int], n_slots: int, name: str) -> Sample:
    at, found = 0, {}
    for field, (dtype, letters) in _FIELDS.items():
        shape = [lengths[x] if isinstance(x, str) else x for x in letters]
        count = math.prod(shape)
        # A copy: the arrays of a sample must be writable, and the record's bytes are not.
        found[field] = np.frombuffer(record, dtype, count, at).reshape(shape).copy()
        at += found[field].nbytes
    neighbors = Neighbors(
        receivers=found["receivers"],
        senders=found["senders"],
        shifts=found["shifts"].astype(np.int32),
        reverse=found["reverse"],
        bond=found["bond"],
        n_slots=n_slots,
        reach=float(found["reach"][0]),
    )
    fields = ("atomic_numbers", "positions", "cell", "pbc", "fixed_mask", "charges", "strain")
    structure = Structure(**{k: found[k] for k in fields}, neighbors=neighbors)
    frames = (
        "forces",
        "energies",
        "frame_mask",
        "times",
        "deformations",
        "stresses",
        "stress_mask",
    )
    rest = {k: found[k] for k in frames}
    return Sample(id=name, structure=structure, positions=found["frames"], **rest)


def _delete_unused(folder: Path) -> None:
    oldest = time.time() - 86400 * UNUSED_DAYS
    for file in folder.glob("*.bin"):
        try:
            if file.stat().st_mtime < oldest:
                file.unlink()
        except OSError:  # another process was faster
            continue
