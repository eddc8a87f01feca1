"""The checks of `RelaxationTrajectory.validate`, one function per kind of fault."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import numpy as np

from relaxnet_jax.errors import InputError

if TYPE_CHECKING:
    from relaxnet_jax.data.trajectory import RelaxationTrajectory

# Energies within one relaxation differ by less than this, in eV/atom: cohesive energies are
# below 10 and real relaxations drop by at most 1.5, so anything beyond is a parsing fault.
MAX_ENERGY_SPAN = 20.0
# Å; atoms of a meaningful structure are never this close.
MIN_DISTANCE = 1e-3
# Å³; a smaller cell has coplanar lattice vectors. Also the bound of an area in Å² or a length in Å.
MIN_VOLUME = 1e-6


def _fail(traj: RelaxationTrajectory, where: str, what: str, remedy: str) -> NoReturn:
    raise InputError(f"relaxation {traj.id!r}, {where}: {what}: {remedy}")


def check_shapes(traj: RelaxationTrajectory) -> None:
    """Raises InputError unless every field has the shape that ``positions`` implies."""
    shape = np.shape(traj.positions)
    if len(shape) != 3 or shape[2] != 3 or 0 in shape:
        _fail(traj, "positions", f"shape {shape}", "give (frames, atoms, 3), none of them 0")
    n, n_atoms = shape[:2]
    expected: dict[str, tuple[int, ...]] = {
        "atomic_numbers": (n_atoms,),
        "cells": (n, 3, 3),
        "pbc": (3,),
        "energies": (n,),
        "forces": (n, n_atoms, 3),
        "fixed_mask": (n_atoms,),
        "stresses": (n, 6),
        "charges": (n_atoms,),
        "times": (n,),
    }
    for name, wanted in expected.items():
        value = getattr(traj, name)
        if value is None and name in ("stresses", "charges", "times"):
            continue
        if np.shape(value) != wanted:
            _fail(traj, name, f"shape {np.shape(value)}", f"positions imply {wanted}")


def check_numbers(traj: RelaxationTrajectory) -> None:
    """Raises InputError unless numbers are finite, and elements, energies and times possible."""
    for name in ("positions", "cells", "energies", "forces", "stresses", "charges", "times"):
        value = getattr(traj, name)
        if value is None:
            continue
        bad = np.argwhere(~np.isfinite(value))
        if len(bad):
            where = f"{'atom' if name == 'charges' else 'frame'} {bad[0][0]}, {name}"
            _fail(traj, where, "not a finite number", "repair or remove the relaxation")
    numbers = np.asarray(traj.atomic_numbers)
    if not np.issubdtype(numbers.dtype, np.integer) or numbers.min() < 1 or numbers.max() > 118:
        _fail(traj, "atomic_numbers", "not all within 1 to 118", "name the elements")
    away = np.abs(traj.energies - np.median(traj.energies)) / traj.n_atoms
    if away.max() > MAX_ENERGY_SPAN:
        what = f"{away.max():.3g} eV/atom from the other frames"
        _fail(traj, f"frame {away.argmax()}, energies", what, "repair or remove the relaxation")
    times = traj.times
    if times is not None and (times.min() < 0 or times.max() > 1 or np.any(np.diff(times) <= 0)):
        _fail(traj, "times", "not ascending within [0, 1]", "leave them out or sort the frames")


def check_geometry(traj: RelaxationTrajectory) -> None:
    """Raises InputError if periodic lattice vectors are degenerate or two atoms coincide."""
    periodic = np.asarray(traj.pbc, dtype=bool)
    if periodic.any():
        # Lattice vectors along non-periodic directions may be missing, as in ASE's slabs.
        given = periodic | traj.cells.any(axis=(0, 2))
        sizes = np.linalg.svd(traj.cells[:, given], compute_uv=False).prod(axis=1)
        if sizes.min() < MIN_VOLUME:
            name, unit = [("length", "Å"), ("area", "Å²"), ("volume", "Å³")][given.sum() - 1]
            where, what = f"frame {sizes.argmin()}, cells", f"{name} {sizes.min():.3g} {unit}"
            remedy = (
                "give independent lattice vectors; a non-periodic direction needs none, but pbc F"
            )
            _fail(traj, where, what, remedy)
    close = _coincident(traj.positions, _completed(traj.cells), periodic)
    if close is not None:
        frame, i, j = close
        where, what = f"frame {frame}, positions", f"atoms {i} and {j} at one point"
        _fail(traj, where, what, "remove one of them")


def _completed(cells: np.ndarray) -> np.ndarray:
    """Cells (n, 3, 3) whose zero vectors are replaced by 1 Å vectors orthogonal to the others."""
    missing = ~cells.any(axis=(0, 2))
    if not missing.any():
        return cells
    _, _, rows = np.linalg.svd(cells)
    completed = cells.copy()
    completed[:, missing] = rows[:, 3 - missing.sum() :]
    return completed


def _coincident(
    positions: np.ndarray, cells: np.ndarray, periodic: np.ndarray
) -> tuple[int, int, int] | None:
    """(frame, i, j) of the first two atoms closer than MIN_DISTANCE, or None.

    Periodic images count. ``cells`` must have three independent lattice vectors.
    """
    from scipy.spatial import KDTree

    n, n_atoms = positions.shape[:2]
    points, radius = positions, MIN_DISTANCE
    if periodic.any():
        inverses = np.linalg.inv(cells)
        # Columns of the inverse are 1/height long, so this radius reaches at least as far.
        radius = min(MIN_DISTANCE * np.linalg.norm(inverses, axis=1).max(), 0.49)
        points = positions @ inverses
        points = np.where(periodic, points % 1.0 % 1.0, points)
    # One tree for all frames, which are 1 apart along a fourth axis (boxsize 0: not periodic).
    labels = np.repeat(np.arange(n, dtype=float), n_atoms)[:, None]
    tree = KDTree(np.hstack([labels, points.reshape(-1, 3)]), boxsize=[0.0, *periodic])
    pairs = tree.query_pairs(radius, p=np.inf, output_type="ndarray")
    if not len(pairs):
        return None
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    frames, i, j = pairs[:, 0] // n_atoms, pairs[:, 0] % n_atoms, pairs[:, 1] % n_atoms
    d = positions[frames, i] - positions[frames, j]
    if periodic.any():
        shifts = np.round(np.einsum("pc,pcd->pd", d, inverses[frames])) * periodic
        d -= np.einsum("pd,pdc->pc", shifts, cells[frames])
    close = np.flatnonzero(np.linalg.norm(d, axis=-1) < MIN_DISTANCE)
    if not len(close):
        return None
    first = close[0]
    return int(frames[first]), int(i[first]), int(j[first])
