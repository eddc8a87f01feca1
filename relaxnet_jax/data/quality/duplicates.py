"""Relaxations that start from the same structure.

Two first frames are the same when they have the same composition and periodic directions,
metric tensors of the cell that agree, and atoms that agree one by one to within ``TOLERANCE``
after a rigid translation, in any order and any periodic image. Rotated copies of a periodic
structure are found (the metric tensor knows no orientation). Not found: other lattice vectors
for the same crystal (supercells, another choice or order of vectors), mirror images, and, along
directions that are not periodic, rotated copies.

Each relaxation is first reduced to four numbers that none of these changes touches, weighted
sums of |structure factor|²; only those whose numbers agree are read again and compared.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable

import numpy as np
from ase.geometry import complete_cell
from scipy.spatial import KDTree

from relaxnet_jax.data.trajectory import RelaxationTrajectory

TOLERANCE = 1e-3  # Å
_RANDOM = np.random.default_rng(20)
# Half of the reciprocal vectors up to index 2; the other half has the same amplitudes.
_VECTORS = np.array([h for h in itertools.product(range(-2, 3), repeat=3) if h > (0, 0, 0)])
_WEIGHTS = _RANDOM.dirichlet(np.ones(len(_VECTORS)), size=4)
# How far the numbers of one structure may differ: twice what displacements of up to half of
# TOLERANCE have been seen to change in cells from 3 Å.
_WINDOW = 2e-3


def key(t: RelaxationTrajectory) -> int:
    """Hash of composition and periodic directions, signed 64 bits."""
    content = np.sort(t.atomic_numbers).astype("<i8").tobytes() + t.pbc.astype(bool).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def invariants(t: RelaxationTrajectory) -> np.ndarray:
    """(4,) numbers in [0, 1] of the first frame, the same for the same structures."""
    fractional, _ = _first(t)
    weights = t.atomic_numbers / t.atomic_numbers.sum()
    factors = np.exp(2j * np.pi * (_VECTORS @ fractional.T)) @ weights
    return _WEIGHTS @ np.abs(factors) ** 2


def same_structure(a: RelaxationTrajectory, b: RelaxationTrajectory) -> bool:
    """Whether two relaxations start from the same structure, by the module's definition."""
    if key(a) != key(b):
        return False
    fa, cell = _first(a)
    fb, other = _first(b)
    scale = np.linalg.norm(cell, axis=1)
    if np.any(np.abs(cell @ cell.T - other @ other.T) > 2 * TOLERANCE * np.add.outer(scale, scale)):
        return False
    za, zb = a.atomic_numbers, b.atomic_numbers
    numbers, counts = np.unique(za, return_counts=True)
    rarest = numbers[counts.argmin()]
    anchor = fa[np.flatnonzero(za == rarest)[0]]
    periodic = np.asarray(a.pbc, dtype=bool)
    for candidate in np.flatnonzero(zb == rarest):
        shifted = fb - fb[candidate] + anchor
        if all(_match(fa[za == z], shifted[zb == z], cell, periodic) for z in numbers):
            return True
    return False


def find_duplicates(
    keys: np.ndarray, numbers: np.ndarray, read: Callable[[int], RelaxationTrajectory]
) -> list[list[int]]:
    """Groups of relaxations that start from the same structure.

    Args:
      keys: (R,) int64, see `key`. numbers: (R, 4), see `invariants`.
      read: gives a relaxation by its row.

    Returns:
      Rows of each group of two or more, ascending.
    """
    order = np.argsort(keys, kind="stable")
    groups = []
    for rows in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
        if len(rows) < 2:
            continue
        tree = KDTree(numbers[rows])
        free = np.ones(len(rows), dtype=bool)
        for k in range(len(rows)):
            near = [j for j in tree.query_ball_point(numbers[rows[k]], _WINDOW, p=np.inf) if j > k]
            if not free[k] or not any(free[j] for j in near):
                continue
            first, group = read(int(rows[k])), [k]
            group += [j for j in near if free[j] and same_structure(first, read(int(rows[j])))]
            free[group] = False
            if len(group) > 1:
                groups.append(sorted(rows[group].tolist()))
    return sorted(groups)


def _first(t: RelaxationTrajectory) -> tuple[np.ndarray, np.ndarray]:
    """(N, 3) fractional coordinates of the first frame and the (3, 3) cell they refer to, Å.

    Missing lattice vectors, and those along directions that are not periodic (which say
    nothing about the structure), are replaced by perpendicular ones of 10 Å.
    """
    cell = np.array(t.cells[0])
    missing = ~np.asarray(t.pbc, dtype=bool) | (np.linalg.norm(cell, axis=1) == 0)
    cell[missing] = 0.0
    cell = complete_cell(cell)
    cell[missing] *= 10.0 / np.linalg.norm(cell[missing], axis=1, keepdims=True)
    return t.positions[0] @ np.linalg.inv(cell), cell


def _match(a: np.ndarray, b: np.ndarray, cell: np.ndarray, periodic: np.ndarray) -> bool:
    """Whether (k, 3) points agree one to one; the translation, known from one atom of either,
    may be wrong by as much as that atom."""
    difference = a[:, None] - b[None]
    difference -= np.round(difference) * periodic
    distances = np.linalg.norm(difference @ cell, axis=-1)
    nearest = distances.argmin(axis=1)
    return len(set(nearest.tolist())) == len(a) and bool(
        np.all(distances[np.arange(len(a)), nearest] <= 2 * TOLERANCE)
    )
