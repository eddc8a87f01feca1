"""Relaxations that start from the same structure.

Two first frames are the same if they have the same composition and periodic directions, if the
metric tensors of their cells agree, and if their atoms agree one by one to within ``TOLERANCE``
after a rigid translation, in any order and any periodic image. Rotated copies of a periodic
structure are found, as the metric tensor does not depend on orientation. Not found are the same
crystal with other lattice vectors (supercells, another choice or order of vectors), mirror images,
and copies rotated along directions that are not periodic.

Each relaxation is first reduced to a hash of its composition, a hash of its whole content, and 27
numbers that are invariant under all these changes (see `invariants`). Structures of equal content
need no comparison. Those of the same composition that agree in all numbers are read again and
compared, the most similar first. The search thus takes time proportional to the number of
relaxations, even if a hundred thousand are nearly equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from ase.geometry import complete_cell
from scipy.spatial import KDTree

from relaxnet_jax.data.quality.columns import Columns
from relaxnet_jax.data.trajectory import RelaxationTrajectory

TOLERANCE = 1e-3  # Å
_VECTORS = np.array([
    [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1],
])  # fmt: skip
_PAIRS = np.triu_indices(3)
N_INVARIANTS = len(_PAIRS[0]) + 3 * len(_VECTORS)
# Å, by how much the numbers of one structure may differ: five standard deviations of the effect of
# independent errors of up to TOLERANCE in every coordinate, plus what the cell is allowed.
_WINDOW = 3.2e-3
_SLAB = 8192  # relaxations of one composition processed together
_UNLIKE = 16  # comparisons that may fail in a row, the most similar first
_KEPT_ATOMS = 16_384  # total size of structures kept for further comparisons
FIELDS = {"key": ("<i8", 1), "content": ("<i8", 1), "invariants": ("<f4", N_INVARIANTS)}


class First(NamedTuple):
    """First frame of a relaxation: numbers (N,), positions (N, 3) Å, cell (3, 3) Å, pbc (3,)."""

    atomic_numbers: np.ndarray
    positions: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray


def first_frame(t: RelaxationTrajectory) -> First:
    """The part of a relaxation that is compared."""
    # Copies, which do not keep the other frames in memory.
    return First(t.atomic_numbers, t.positions[0].copy(), t.cells[0].copy(), t.pbc.astype(bool))


def row(first: First) -> dict[str, object]:
    """The row of `FIELDS` for a structure."""
    composition = np.sort(first.atomic_numbers).astype("<i8").tobytes() + first.pbc.tobytes()
    arrays = (first.atomic_numbers.astype("<i8"), first.positions, first.cell, first.pbc)
    content = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)
    return {
        "key": hash64(composition),
        "content": hash64(content),
        "invariants": invariants(first),
    }


def hash64(content: bytes) -> int:
    """A signed 64-bit hash, the same on every machine."""
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def invariants(first: First) -> np.ndarray:
    """(27,) numbers in Å that are the same for the same structures.

    They are the metric tensor G_ij over |a_i| + |a_j| and, for seven reciprocal vectors h, sqrt(N) |F|
    and the complex sqrt(n) F f*, both over 2π|h| (h without the factor 2π). F is the structure factor
    weighted by element, f that of the rarest element alone. If atoms sit on sites of high symmetry,
    one or the other is still linear in their displacements; the roots make all numbers change by about as much as one
    atom moves.
    """
    fractional, cell = _fractional(first)
    lengths = np.linalg.norm(cell, axis=1)
    metric = (cell @ cell.T / np.add.outer(lengths, lengths))[_PAIRS]
    numbers, kinds, counts = np.unique(
        first.atomic_numbers, return_inverse=True, return_counts=True
    )
    # Golden-section multiples spread over [0.75, 1.25], so that no two elements have equal weights.
    weights = 0.75 + 0.5 * (numbers * 0.6180339887 % 1)
    rarest = counts.argmin()
    waves = np.exp(2j * np.pi * (_VECTORS @ fractional.T))
    total = waves @ weights[kinds] / (weights @ counts)
    rare = waves[:, kinds == rarest].mean(axis=1)
    spacings = 1 / (2 * np.pi * np.linalg.norm(_VECTORS @ np.linalg.inv(cell).T, axis=1))
    both = np.sqrt(counts[rarest]) * spacings * total * rare.conj()
    alone = np.sqrt(len(fractional)) * spacings * np.abs(total)
    return np.concatenate([metric, alone, both.real, both.imag])


def same_structure(a: First, b: First) -> bool:
    """Whether two structures are the same, by the module's definition."""
    za, zb = a.atomic_numbers, b.atomic_numbers
    if not np.array_equal(np.sort(za), np.sort(zb)) or not np.array_equal(a.pbc, b.pbc):
        return False
    fa, cell = _fractional(a)
    fb, other = _fractional(b)
    scale = np.linalg.norm(cell, axis=1)
    if np.any(np.abs(cell @ cell.T - other @ other.T) > 2 * TOLERANCE * np.add.outer(scale, scale)):
        return False
    numbers, counts = np.unique(za, return_counts=True)
    rarest = numbers[counts.argmin()]
    anchor = fa[np.flatnonzero(za == rarest)[0]]
    for candidate in np.flatnonzero(zb == rarest):
        shifted = fb - fb[candidate] + anchor
        if all(_match(fa[za == z], shifted[zb == z], cell, a.pbc) for z in numbers):
            return True
    return False


def find_duplicates(columns: Columns, read: Callable[[int], First]) -> list[list[int]]:
    """Finds groups of relaxations that start from the same structure.

    The search around a structure ends when 16 comparisons in a row have found no copy: a copy that is
    less similar than 16 other structures is not found.

    Args:
      columns: columns that include `FIELDS`.
      read: returns the first frame of the relaxation in a row.

    Returns:
      The rows of each group of two or more, ascending.
    """
    keys = columns["key"]
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = np.flatnonzero(keys[1:] != keys[:-1]) + 1
    del keys
    kept = _Kept(read)
    groups: list[list[int]] = []
    for begin, end in zip([0, *starts], [*starts, len(order)]):
        if end - begin > 1:
            groups += _of_one_composition(order[begin:end], columns, kept)
    return sorted(groups)


def _of_one_composition(rows: np.ndarray, columns: Columns, kept: _Kept) -> list[list[int]]:
    """`find_duplicates` among the given rows, which have one composition."""
    contents = columns.rows("content", rows)[:, 0]
    _, first, content = np.unique(contents, return_index=True, return_inverse=True)
    # One row represents all rows with the same content.
    group_of = np.arange(len(first))
    for group in _alike(rows[first], columns, kept):
        group_of[group] = group[0]
    group_of = group_of[content]
    order = np.argsort(group_of, kind="stable")
    sets = np.split(rows[order], np.flatnonzero(np.diff(group_of[order])) + 1)
    return [sorted(members.tolist()) for members in sets if len(members) > 1]


def _alike(rows: np.ndarray, columns: Columns, kept: _Kept) -> Iterator[list[int]]:
    """Yields groups of same structures among rows of different content, as indices into ``rows``."""
    if len(rows) < 2:
        return
    free = np.ones(len(rows), dtype=bool)
    for slab, n_own in _slabs(rows, columns):
        numbers = columns.rows("invariants", rows[slab]).astype(np.float64)
        tree = KDTree(numbers)
        # The nearest neighbour is the structure itself.
        near = tree.query(numbers[:n_own], 2, p=np.inf, distance_upper_bound=_WINDOW)[0][:, 1]
        for k in np.flatnonzero(np.isfinite(near)).tolist():
            if not free[slab[k]]:
                continue
            group, unlike = [int(slab[k])], 0
            for j in _nearest(tree, numbers[k]):
                if j == k or not free[slab[j]]:
                    continue
                if same_structure(kept.of(int(rows[slab[k]])), kept.of(int(rows[slab[j]]))):
                    group.append(int(slab[j]))
                    unlike = 0
                else:
                    unlike += 1
                if unlike == _UNLIKE:
                    break
            free[group] = False
            if len(group) > 1:
                yield group


def _slabs(rows: np.ndarray, columns: Columns) -> Iterator[tuple[np.ndarray, int]]:
    """Yields sets of structures that may be the same, as indices into ``rows``.

    Yields:
      Some thousands of structures sorted by one of their numbers, followed by the next ones that are
      within the window; and the number of structures before the next ones.
    """
    if len(rows) <= _SLAB:
        yield np.arange(len(rows)), len(rows)
        return
    parts = np.array_split(rows, len(rows) // _SLAB + 1)
    spreads = [np.std(columns.rows("invariants", part), axis=0) for part in parts]
    widest = int(np.mean(spreads, axis=0).argmax())
    values = np.concatenate([columns.rows("invariants", part)[:, widest] for part in parts])
    order = np.argsort(values, kind="stable")
    values = values[order]
    for begin in range(0, len(rows), _SLAB):
        end = min(begin + _SLAB, len(rows))
        stop = np.searchsorted(values, values[end - 1] + _WINDOW, side="right")
        yield order[begin:stop], end - begin


def _nearest(tree: KDTree, point: np.ndarray) -> Iterator[int]:
    """Yields the points within the window, the nearest first."""
    seen: set[int] = set()
    n = 2 * _UNLIKE
    while True:
        n = min(n, tree.n)
        distances, found = tree.query(point, n, p=np.inf, distance_upper_bound=_WINDOW)
        found = found[np.isfinite(distances)]
        for j in found.tolist():
            if j not in seen:
                seen.add(j)
                yield j
        if len(found) < n or n == tree.n:
            return
        n *= 4


class _Kept:
    """Structures that have been read, kept while there is room for them."""

    def __init__(self, read: Callable[[int], First]) -> None:
        self._read = read
        self._found: dict[int, First] = {}
        self._atoms = 0

    def of(self, i: int) -> First:
        """The structure in a row."""
        if i not in self._found:
            if self._atoms > _KEPT_ATOMS:
                self._found.clear()
                self._atoms = 0
            self._found[i] = self._read(i)
            self._atoms += len(self._found[i].atomic_numbers) + 16  # Python's own overhead
        return self._found[i]


def _fractional(first: First) -> tuple[np.ndarray, np.ndarray]:
    """(N, 3) fractional coordinates and the (3, 3) cell they refer to, Å.

    Missing lattice vectors, and those along directions that are not periodic (which are irrelevant
    to the structure), are replaced by perpendicular ones of 10 Å.
    """
    cell = np.array(first.cell)
    missing = ~first.pbc | (np.linalg.norm(cell, axis=1) == 0)
    cell[missing] = 0.0
    cell = complete_cell(cell)
    cell[missing] *= 10.0 / np.linalg.norm(cell[missing], axis=1, keepdims=True)
    return first.positions @ np.linalg.inv(cell), cell


def _match(a: np.ndarray, b: np.ndarray, cell: np.ndarray, periodic: np.ndarray) -> bool:
    """Whether two sets of (k, 3) points agree one to one.

    The translation is known from one atom of each structure only, and may be off by as much as these
    atoms are; the tolerance is therefore doubled.
    """
    difference = a[:, None] - b[None]
    difference -= np.round(difference) * periodic
    distances = np.linalg.norm(difference @ cell, axis=-1)
    nearest = distances.argmin(axis=1)
    return len(set(nearest.tolist())) == len(a) and bool(
        np.all(distances[np.arange(len(a)), nearest] <= 2 * TOLERANCE)
    )
