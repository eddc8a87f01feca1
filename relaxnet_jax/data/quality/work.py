"""Work of the forces and stresses along a relaxation, and displacements of its atoms."""

from __future__ import annotations

import numpy as np

from relaxnet_jax.data.checks import MIN_VOLUME
from relaxnet_jax.data.trajectory import RelaxationTrajectory

# Indices that turn a stress in Voigt order xx yy zz yz xz xy into a (3, 3) matrix.
_VOIGT = np.array([[0, 5, 4], [5, 1, 3], [4, 3, 2]])


def displacements(
    trajectory: RelaxationTrajectory, start: np.ndarray, end: np.ndarray
) -> np.ndarray:
    """Displacements of atoms between frames, excluding the motion of the cell and the drift.

    If the cell varies, they are the changes of fractional coordinates, in the cell of the ``end``
    frame. If no atom is fixed, the mean over atoms is removed: nothing holds the structure in its
    place, and a rigid translation changes nothing.

    Args:
      trajectory: relaxation of N atoms.
      start, end: (k,) int, frame numbers.

    Returns:
      (k, N, 3), Å.
    """
    x, cells = trajectory.positions, trajectory.cells
    if trajectory.variable_cell:
        fractional = x[end] @ np.linalg.pinv(cells[end]) - x[start] @ np.linalg.pinv(cells[start])
        moved = fractional @ cells[end]
    else:
        moved = x[end] - x[start]
    return moved if trajectory.fixed_mask.any() else moved - moved.mean(axis=1, keepdims=True)


def step_works(trajectory: RelaxationTrajectory) -> np.ndarray | None:
    """Work of forces and stress along each step, from the labels at either end of the step.

    The energy falls by the mean of the two, up to third order in the step (trapezoid rule). Each is
    sum_i F_i·dx_i - V sum_ab sigma_ab d(strain)_ab, with dx at fixed strain.

    Returns:
      (2, n-1), eV: from the labels of the first and of the second frame of each step. None if the
      cell varies and there are no stresses, or no volume that they refer to.
    """
    x, forces, cells = trajectory.positions, trajectory.forces, trajectory.cells
    if not trajectory.variable_cell:
        moved = np.diff(x, axis=0)
        return np.stack([(f * moved).sum(axis=(1, 2)) for f in (forces[:-1], forces[1:])])
    volumes = np.abs(np.linalg.det(cells))
    if trajectory.stresses is None or volumes.min() < MIN_VOLUME:
        return None
    inverses = np.linalg.pinv(cells)
    change = np.diff(x @ inverses, axis=0)
    strains = (inverses[:-1] @ cells[1:] - np.eye(3), np.eye(3) - inverses[1:] @ cells[:-1])
    stresses = (trajectory.stresses * volumes[:, None])[:, _VOIGT]
    works = []
    for ends, strain in zip((slice(None, -1), slice(1, None)), strains):
        of_forces = (forces[ends] * (change @ cells[ends])).sum(axis=(1, 2))
        works.append(of_forces - (stresses[ends] * strain).sum(axis=(1, 2)))
    return np.stack(works)


def cell_jumps(trajectory: RelaxationTrajectory) -> list[tuple[int, int, float, float]]:
    """Finds atoms that cross much of the cell within one step.

    Such an atom moves by more than half of the shortest lattice vector, or ends nearer to another
    periodic image than to where it was. A drift of the whole structure does not count.

    Returns:
      (frame, atom, displacement in Å, bound in Å) of the atom that moves furthest in each such step,
      where ``frame`` is the one at the end of the step. Empty if no direction is periodic.
    """
    periodic = np.asarray(trajectory.pbc, dtype=bool)
    if trajectory.n_frames < 2 or not periodic.any():
        return []
    end = np.arange(1, trajectory.n_frames)
    moved = displacements(trajectory, end - 1, end)
    if not trajectory.fixed_mask.any():
        # If there are few atoms, one that jumps shifts the mean, so the middle atom gives the drift.
        middle = np.median(moved, axis=1, keepdims=True)
        nearest = np.linalg.norm(moved - middle, axis=-1).argmin(axis=1)
        moved = moved - moved[np.arange(len(end)), nearest][:, None]
    cells = trajectory.cells[1:]
    images = np.round(moved @ np.linalg.pinv(cells)) * periodic
    combinations = np.array(np.meshgrid(*[[-1, 0, 1] if p else [0] for p in periodic]))
    combinations = combinations.reshape(3, -1).T
    lattice = combinations[np.any(combinations, axis=1)] @ cells
    bounds = 0.5 * np.linalg.norm(lattice, axis=-1).min(axis=1)
    lengths = np.linalg.norm(moved, axis=-1)
    bad = (lengths > bounds[:, None]) | np.any(images, axis=-1)
    return [
        (int(end[k]), int(atom), float(lengths[k, atom]), float(bounds[k]))
        for k in np.flatnonzero(bad.any(axis=1))
        for atom in [np.where(bad[k], lengths[k], -1).argmax()]
    ]
