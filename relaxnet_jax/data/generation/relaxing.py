"""Runs one relaxation and keeps every ionic step, or gives the reason why it failed."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from relaxnet_jax.data.ase_io import fixed_atoms, labels_of
from relaxnet_jax.data.files import one_line
from relaxnet_jax.data.generation.settings import Settings
from relaxnet_jax.data.generation.start import too_close
from relaxnet_jax.data.trajectory import UNCONVERGED, RelaxationTrajectory
from relaxnet_jax.errors import InputError

if TYPE_CHECKING:
    from ase import Atoms

MAX_FORCE = 100.0  # eV/Å; beyond it, atoms overlap or the calculator extrapolates
MAX_RISE = 1.0  # eV/atom above the start; a relaxation should only go down
MAX_SWELL = 3.0  # factor by which the volume of the cell may change
MIN_CONTACT = 0.5  # fraction of the sum of two covalent radii
MAX_STEP = 0.2  # Å, largest displacement of an atom in one step

Failure = str


def relax(
    atoms: Atoms, calculator: Any, settings: Settings, name: str, group: str, source: str
) -> RelaxationTrajectory | Failure:
    """Relaxes the atoms (in place) with ASE and keeps every ionic step.

    Energies are the force-consistent ones if the calculator distinguishes them. Forces are raw and
    those on the atoms, also if the cell relaxes. Stresses are kept if the calculator provides them and
    all directions are periodic.

    Args:
      atoms: the starting structure.
      calculator: a new ASE calculator.
      settings: settings of the data set.
      name, group, source: id, group and source of the trajectory.

    Returns:
      The validated trajectory, or a line "KIND: DETAIL" that says why there is none: there was nothing
      to relax, the relaxation did not converge or became unphysical, or the calculator failed.
    """
    atoms.calc = calculator
    frames: list[tuple[Any, ...]] = []
    converged = False
    try:
        with warnings.catch_warnings():
            # E.g. from an optimiser that limits its step; what matters shows in the result.
            warnings.simplefilter("ignore")
            for done in _steps(atoms, settings):
                frames.append(_frame(atoms))
                converged = bool(done)
                failure = _unphysical(atoms, frames)
                if failure:
                    return f"unphysical: {failure} at step {len(frames) - 1}"
    except Exception as error:  # calculators raise anything
        return f"calculator failed: {type(error).__name__}: {one_line(error)}"
    if not converged and not settings.keep_unconverged:
        return f"not converged: after {settings.max_steps} steps"
    if len(frames) < 2:
        return "nothing to relax: the start is a minimum"
    if frames[-1][2] > frames[0][2]:
        return "unphysical: ends at a higher energy than it starts at"
    positions, cells, energies, forces, stresses = (list(column) for column in zip(*frames))
    charges = atoms.get_initial_charges()
    trajectory = RelaxationTrajectory(
        id=name,
        atomic_numbers=atoms.numbers.astype(np.int64),
        positions=np.array(positions),
        cells=np.array(cells),
        pbc=atoms.pbc.copy(),
        energies=np.array(energies, dtype=np.float64),
        forces=np.array(forces, dtype=np.float64),
        fixed_mask=fixed_atoms(atoms),
        group=group,
        stresses=None if any(s is None for s in stresses) else np.array(stresses, np.float64),
        charges=np.array(charges, dtype=np.float64) if np.any(charges) else None,
        source=source + ("" if converged else UNCONVERGED),
    )
    try:
        return trajectory.validate()
    except InputError as error:
        return f"unphysical: {str(error).partition(', ')[2] or error}"


def _steps(atoms: Atoms, settings: Settings) -> Any:
    """Iterator of the optimiser, which yields whether the current step is converged."""
    from ase.filters import FrechetCellFilter
    from ase.optimize import FIRE, LBFGS

    kind: Any = {"lbfgs": LBFGS, "fire": FIRE}[settings.optimizer]
    target: Any = FrechetCellFilter(atoms) if settings.relax_cell else atoms
    optimizer = kind(target, maxstep=MAX_STEP, logfile=None)
    return optimizer.irun(fmax=settings.fmax, steps=settings.max_steps)


def _frame(atoms: Atoms) -> tuple[Any, ...]:
    """Positions, cell, energy, forces and stress (or None) of the current step."""
    # The optimiser has just computed these forces, so nothing is computed twice.
    calculator: Any = atoms.calc
    stress: Any = None
    if atoms.pbc.all() and "stress" in calculator.implemented_properties:
        calculator.get_property("stress", atoms)
        stress = labels_of(atoms)[2]
    energy, forces, _ = labels_of(atoms)
    if energy is None or forces is None:
        raise RuntimeError("its results lack energy or forces")
    copies = (np.array(forces), None if stress is None else np.array(stress))
    return atoms.get_positions(), atoms.cell.array.copy(), energy, *copies


def _unphysical(atoms: Atoms, frames: list[tuple[Any, ...]]) -> Failure:
    """What is wrong with the last frame; "" if nothing is."""
    _, first_cell, first_energy, _, _ = frames[0]
    _, cell, energy, forces, stress = frames[-1]
    if not all(np.isfinite(v).all() for v in (energy, forces, stress) if v is not None):
        return "energy, forces or stress not finite"
    largest = np.linalg.norm(forces, axis=-1).max()
    if largest > MAX_FORCE:
        return f"force of {largest:.3g} eV/Å"
    rise = (energy - first_energy) / len(atoms)
    if rise > MAX_RISE:
        return f"energy {rise:.3g} eV/atom above the start"
    volume, first_volume = (abs(np.linalg.det(c)) for c in (cell, first_cell))
    if first_volume > 0 and not 1 / MAX_SWELL < volume / first_volume < MAX_SWELL:
        return f"volume {volume / first_volume:.3g} times that of the start"
    if too_close(atoms, MIN_CONTACT):
        return "two atoms too close"
    return ""
