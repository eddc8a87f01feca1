"""Relaxes the test split with an outside potential, as a reference for the models."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from relaxnet_jax.benchmark.ledger import fingerprint
from relaxnet_jax.benchmark.relaxers import atoms_of
from relaxnet_jax.data.generation.calculators import Calculator
from relaxnet_jax.data.trajectory import RelaxationTrajectory
from relaxnet_jax.errors import InputError
from relaxnet_jax.evaluate.run import compare
from relaxnet_jax.graph import Structure
from relaxnet_jax.lbfgs import STEPS
from relaxnet_jax.model import RelaxNet
from relaxnet_jax.predict import FOLLOWED
from relaxnet_jax.relaxation.refine import Leg, descend
from relaxnet_jax.reproduce.archive import to_record
from relaxnet_jax.reproduce.predictions import Made, Report
from relaxnet_jax.solving import Path

if TYPE_CHECKING:
    from ase import Atoms


def identity(calculator: Calculator, model: RelaxNet, data: str, ids: Sequence[str]) -> str:
    """A hash of what `relaxed_by` depends on, except the force criterion.

    Args:
      calculator: the outside potential.
      model: see `relaxed_by`.
      data: the store's checksum.
      ids: ids of the relaxations.
    """
    facts = {
        "calculator": (calculator.label, calculator.version),
        "data": (data, list(ids)),
        "graph": dataclasses.asdict(model.config.graph),
        "dynamics": (model.config.dynamics.mass, model.config.dynamics.cell),
        "elements": list(model.elements),
    }
    return fingerprint(facts)


def relaxed_by(
    calculator: Calculator,
    model: RelaxNet,
    relaxations: Sequence[RelaxationTrajectory],
    fmax: float,
    report: Report,
) -> Made:
    """First and last frames of ASE's LBFGS with a calculator, one structure at a time.

    ``seconds`` is the mean LBFGS time of a structure; ``steps`` and ``converged`` have one entry
    per structure.

    Args:
      calculator: the outside potential.
      model: decides which relaxations can be compared, and how; it predicts nothing.
      relaxations: the true relaxations.
      fmax: eV/Å; where the cell relaxes, it also applies to the stress times the volume.
      report: receives a line on every structure that is left out or fails.
    """
    facts: dict[str, Any] = {"fmax": fmax, "steps": [], "converged": []}
    spent = 0.0

    def predict(structures: Sequence[Structure]) -> list[Path]:
        nonlocal spent
        made = []
        for structure in structures:
            path, leg = _path(structure, calculator, fmax)
            made.append(path)
            spent += leg.seconds if leg else 0.0
            facts["steps"].append(leg.steps - 1 if leg else 0)
            facts["converged"].append(leg.converged if leg else False)
        return made

    compared, left_out = compare(model, relaxations, report, predict=predict, n_frames=2)
    return [to_record(c) for c in compared], facts | {
        "left_out": left_out,
        "seconds": spent / max(len(compared), 1),
    }


def _path(s: Structure, calculator: Calculator, fmax: float) -> tuple[Path, Leg | None]:
    """First and last frame, and the minimisation between them; NaN and None if that fails."""
    atoms, failure, frames, leg = atoms_of(s), "", [], None
    relax_cell = bool(s.strain.any())
    try:
        frames.append(_frame(atoms, calculator))
        leg = descend(atoms, calculator, fmax, STEPS, relax_cell)
        frames.append(_frame(atoms, calculator))
    except InputError as error:
        failure, nowhere = str(error), np.full_like(s.positions, np.nan)
        frames, leg = [(nowhere, np.nan, nowhere, s.cell)] * 2, None
    positions, energies, forces, cells = (np.array(v, float) for v in zip(*frames))
    times, still = np.array([0.0, 1.0]), np.zeros_like(positions)
    return Path(times, positions, still, energies, forces, cells, FOLLOWED, failure), leg


def _frame(atoms: Atoms, calculator: Calculator) -> tuple[np.ndarray, float, np.ndarray, Any]:
    """Positions, energy, raw forces and cell.

    Raises:
      InputError: see `descend`.
    """
    still = atoms.copy()
    leg = descend(still, calculator, np.inf, 0, relax_cell=False)
    forces = still.calc.get_forces(still)
    return atoms.positions.copy(), leg.energy, forces, atoms.cell.array.copy()
