"""One relaxation made ready for training (NumPy): its graph and the frames chosen of it."""

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
    """One relaxation ready for training: its initial structure and the chosen frames.

    Arrays over the n frame slots: positions (n, N, 3) Å, forces (n, N, 3) eV/Å, energies (n,) eV,
    frame_mask (n,), times (n,); absent slots are zero.
    Where the cell relaxes, positions are reference positions (see `relaxnet_jax.strain`), and
    deformations (n, 3, 3), the identity in absent slots, stresses (n, 3, 3) eV/Å³ and stress_mask
    (n,) say the rest.
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
    """n, the number of frame slots of a batch."""
    return (
        config.dynamics.frames
        if config.data.frame_selection == "equidistant"
        else config.data.max_frames
    )


def without_drift(positions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Frames (n, N, 3) translated rigidly so that their weighted centre stays where it began."""
    centre = np.average(positions, axis=1, weights=weights)
    return positions - (centre - centre[:1])[:, None]


def make_sample(
    trajectory: RelaxationTrajectory, config: Config, relax_cell: bool | None = None
) -> Sample:
    """Chooses the frames of a relaxation and builds the graph of its first one.

    Args:
      relax_cell: whether its cell may relax; by default, whether it does.

    The dynamics conserve momentum; so in a structure without fixed atoms the frames'
    rigid translation, which has no physical meaning, is removed (about the centre of mass, or
    the centroid with unit masses).

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
    # a third lattice vector there is none.
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
    """The frames in which atoms may be neighbours that the skin does not foresee."""
    g, found = config.graph, []
    for k in indices[1:]:
        x, cells = t.positions[[0, k]], t.cells[[0, k]]
        if approach(x, cells, g.cutoff + g.skin) > g.skin:
            found.append((x[1], cells[1]))
    return found


def reference_frames(
    t: RelaxationTrajectory, indices: np.ndarray, relaxes: bool, mass: str
) -> tuple[np.ndarray, np.ndarray]:
    """Some frames as the dynamics can follow them: without rigid translation.

    Args:
      mass: of the dynamics: with "atomic" the centre of mass rests, else the centroid.

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
    """Frames mapped back to the initial cell by their deformations (m, 3, 3), their weighted centre
    where it was in the first one unless atoms are fixed: reference positions (m, N, 3) Å."""
    if (steps != np.eye(3)).any():
        positions = to_reference(positions, steps)
    return positions if fixed_mask.any() else without_drift(positions, weights)


def driftless(t: RelaxationTrajectory, relaxes: bool, config: Config) -> RelaxationTrajectory:
    """A relaxation without its rigid translation, as training sees it."""
    mass = config.dynamics.mass
    positions, steps = reference_frames(t, np.arange(t.n_frames), relaxes, mass)
    return dataclasses.replace(t, positions=from_reference(positions, steps))
