"""An outside potential that relaxes the test split: what the models are measured against."""

from __future__ import annotations

import time
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
from relaxnet_jax.predict import FOLLOWED, Path
from relaxnet_jax.relaxation.refine import descend
from relaxnet_jax.reproduce.archive import to_record
from relaxnet_jax.reproduce.predictions import Made, Report

if TYPE_CHECKING:
    from ase import Atoms


def identity(calculator: Calculator, relaxations: Sequence[RelaxationTrajectory]) -> str:
    """A hash of what `relaxed_by` depends on, the criterion aside."""
    ids = [t.id for t in relaxations]
    return fingerprint({"calculator": (calculator.label, calculator.version), "ids": ids})


def relaxed_by(
    calculator: Calculator,
    model: RelaxNet,
    relaxations: Sequence[RelaxationTrajectory],
    fmax: float,
    report: Report,
) -> Made:
    """First and last frame of ASE's LBFGS with a calculator, one structure at a time.

    ``seconds`` is the mean time of a structure; ``steps`` and ``converged`` have one entry each.

    Args:
      model: says which relaxations it can take, and how they are compared; predicts nothing.
      fmax: eV/Å; of the stress times the volume too where the cell relaxes.
    """
    facts: dict[str, Any] = {"fmax": fmax, "steps": [], "converged": []}

    def predict(structures: Sequence[Structure]) -> list[Path]:
        begin = time.perf_counter()
        found = [_path(s, calculator, fmax, facts) for s in structures]
        facts["seconds"] = (time.perf_counter() - begin) / max(len(structures), 1)
        return found

    compared, left_out = compare(model, relaxations, report, predict=predict, n_frames=2)
    return [to_record(c) for c in compared], facts | {"left_out": left_out}


def _path(s: Structure, calculator: Calculator, fmax: float, facts: dict[str, Any]) -> Path:
    atoms, failure, frames = atoms_of(s), "", []
    relax_cell = bool(s.strain.any())
    try:
        frames.append(_frame(atoms, calculator))
        leg = descend(atoms, calculator, fmax, STEPS, relax_cell)
        frames.append(_frame(atoms, calculator))
        facts["steps"].append(leg.steps - 1)
        facts["converged"].append(leg.converged)
    except InputError as error:
        failure, nowhere = str(error), np.full_like(s.positions, np.nan)
        frames = [(nowhere, np.nan, nowhere, s.cell)] * 2
        facts["steps"].append(0)
        facts["converged"].append(False)
    positions, energies, forces, cells = (np.array(v, float) for v in zip(*frames))
    return Path(
        np.array([0.0, 1.0]),
        positions,
        np.zeros_like(positions),
        energies,
        forces,
        cells,
        FOLLOWED,
        failure,
    )


def _frame(atoms: Atoms, calculator: Calculator) -> tuple[np.ndarray, float, np.ndarray, Any]:
    """Positions, energy, raw forces, cell. Raises InputError as `descend` does."""
    still = atoms.copy()
    leg = descend(still, calculator, np.inf, 0, relax_cell=False)
    forces = still.calc.get_forces(still)
    return atoms.positions.copy(), leg.energy, forces, atoms.cell.array.copy()
