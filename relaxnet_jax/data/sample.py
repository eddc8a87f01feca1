"""A relaxation prepared for training (NumPy): its graph and its selected frames."""

from __future__ import annotations

import dataclasses

import numpy as np

from relaxnet_jax.config import Config
from relaxnet_jax.data.checks import MIN_VOLUME
from relaxnet_jax.data.frames import select_frames
from relaxnet_jax.data.trajectory import RelaxationTrajectory
from relaxnet_jax.graph import Structure, build_structure, masses_of
from relaxnet_jax.neighbors import Frames, approach
from relaxnet_jax.strain import deformations, from_reference, from_voigt, to_reference


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """A relaxation prepared for training: its initial structure and the selected frames.

    Arrays with a leading n run over the frame slots; empty slots are zero unless stated otherwise.

    Attributes:
      id: id of the relaxation.
      structure: initial structure with its graph.
      positions: (n, N, 3), Å; reference positions if the cell relaxes (see `relaxnet_jax.strain`).
      forces: (n, N, 3), eV/Å.
      energies: (n,), eV.
      frame_mask: (n,) bool, which slots hold a frame.
      times: (n,) pseudotimes.
      deformations: (n, 3, 3), deformation of the cell; the identity in empty slots.
      stresses: (n, 3, 3), eV/Å³.
      stress_mask: (n,) bool, where the stress is known.
    """

    id: str
    structure: Structure
    positions: np.ndarray
    forces: np.ndarray
    energies: np.ndarray
    frame_mask: np.ndarray
    times: np.ndarray
    deformations: np.ndarray
    stresses: np.ndarray
    stress_mask: np.ndarray


def frame_slots(config: Config) -> int:
    """Number n of frame slots of a batch."""
    return (
        config.dynamics.frames
        if config.data.frame_selection == "equidistant"
        else config.data.max_frames
    )


def without_drift(positions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Frames (n, N, 3) translated rigidly so that their weighted centre stays that of the first."""
    centre = np.average(positions, axis=1, weights=weights)
    return positions - (centre - centre[:1])[:, None]


def make_sample(
    trajectory: RelaxationTrajectory, config: Config, relax_cell: bool | None = None
) -> Sample:
    """Selects frames of a relaxation and builds the graph of its first frame.

    The dynamics conserve momentum. Without fixed atoms, the rigid translation of the frames, which
    has no physical meaning, is therefore removed: that of the centre of mass, or of the centroid
    with unit masses.

    Args:
      relax_cell: whether the cell may relax; by default, whether it does in ``trajectory``.

    Raises:
      InputError: see `graph.build_structure`.
    """
    t, n = trajectory, frame_slots(config)
    chosen = select_frames(t.n_frames, n, config.data.frame_selection)
    structure = build_structure(
        t.atomic_numbers,
        t.positions[0],
        t.cells[0],
        t.pbc,
        config,
        fixed_mask=t.fixed_mask,
        charges=t.charges,
        name=t.id,
        relax_cell=t.variable_cell if relax_cell is None else relax_cell,
        later=_beyond_the_skin(t, chosen.indices, config),
    )
    relaxes = bool(structure.strain.any())
    positions, steps = reference_frames(t, chosen.indices, relaxes, config.dynamics.mass)

    def slots(values):
        out = np.zeros((n, *values.shape[1:]))
        out[chosen.slots] = values
        return out

    identity = np.broadcast_to(np.eye(3), (n, 3, 3)).copy()
    identity[chosen.slots] = steps
    # Without three periodic directions the volume, and so the stress, depends on the vacuum; without
    # a third lattice vector there is no volume.
    known = t.stresses is not None and bool(structure.strain.any() or np.all(t.pbc))
    known &= abs(np.linalg.det(structure.cell)) >= MIN_VOLUME
    stresses = np.zeros_like(steps)
    if t.stresses is not None:
        stresses = from_voigt(t.stresses[chosen.indices])
    return Sample(
        id=t.id,
        structure=structure,
        positions=slots(positions),
        forces=slots(t.forces[chosen.indices]),
        energies=slots(t.energies[chosen.indices]),
        frame_mask=slots(np.ones(len(chosen.slots))) > 0,
        times=slots(chosen.times),
        deformations=identity,
        stresses=slots(stresses),
        stress_mask=slots(np.full(len(chosen.slots), float(known))) > 0,
    )


def _beyond_the_skin(t: RelaxationTrajectory, indices: np.ndarray, config: Config) -> Frames:
    """The frames in which atoms may be neighbours that the skin does not cover."""
    g, found = config.graph, []
    for k in indices[1:]:
        x, cells = t.positions[[0, k]], t.cells[[0, k]]
        if approach(x, cells, g.cutoff + g.skin) > g.skin:
            found.append((x[1], cells[1]))
    return found


def reference_frames(
    t: RelaxationTrajectory, indices: np.ndarray, relaxes: bool, mass: str
) -> tuple[np.ndarray, np.ndarray]:
    """Frames as the dynamics can follow them, i.e. without rigid translation.

    Args:
      mass: ``dynamics.mass``: with "atomic" the centre of mass is kept at rest, else the centroid.

    Returns:
      Reference positions (m, N, 3) Å and deformations (m, 3, 3), the identity unless the cell
      ``relaxes``; see `strain`.
    """
    weights = masses_of(t.atomic_numbers) if mass == "atomic" else np.ones(t.n_atoms)
    steps = np.broadcast_to(np.eye(3), (len(indices), 3, 3)).copy()
    if relaxes:
        steps = deformations(t.cells)[indices]
    return centred(t.positions[indices], steps, t.fixed_mask, weights), steps


def centred(
    positions: np.ndarray, steps: np.ndarray, fixed_mask: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Maps frames back to the initial cell and, unless atoms are fixed, removes their drift.

    Args:
      steps: (m, 3, 3), deformations of the frames.
      weights: (N,), weights of the centre that is kept at its place in the first frame.

    Returns:
      Reference positions (m, N, 3), Å.
    """
    if (steps != np.eye(3)).any():
        positions = to_reference(positions, steps)
    return positions if fixed_mask.any() else without_drift(positions, weights)


def driftless(t: RelaxationTrajectory, relaxes: bool, config: Config) -> RelaxationTrajectory:
    """A relaxation without its rigid translation, as used in training."""
    mass = config.dynamics.mass
    positions, steps = reference_frames(t, np.arange(t.n_frames), relaxes, mass)
    return dataclasses.replace(t, positions=from_reference(positions, steps))
