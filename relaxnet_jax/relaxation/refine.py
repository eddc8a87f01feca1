"""Refinement with ASE's LBFGS and a calculator, from the prediction or also from the initial structure."""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import threadpoolctl

from relaxnet_jax.data.files import one_line
from relaxnet_jax.data.generation.calculators import Calculator, check_calculator
from relaxnet_jax.data.generation.elements import names
from relaxnet_jax.data.trajectory import CELL_TOLERANCE
from relaxnet_jax.errors import InputError
from relaxnet_jax.relaxation.minima import same_minimum_within

if TYPE_CHECKING:
    from ase import Atoms

# Results of a calculator that are kept besides energy and forces.
EXTRAS = ("free_energy", "stress", "magmom", "magmoms")


class Leg(NamedTuple):
    """One LBFGS relaxation.

    Attributes:
      steps: ionic steps, i.e. geometries whose forces were computed, including the first.
      energy: final energy, eV.
      fmax: final largest force, eV/Å.
      converged: whether the requested fmax was reached.
      seconds: wall time.
    """

    steps: int
    energy: float
    fmax: float
    converged: bool
    seconds: float


class Refined(NamedTuple):
    """LBFGS from the predicted structure and, to compare or as a fallback, from the initial one.

    Attributes:
      without, with_start: relaxations from the initial and from the predicted structure; None for one
        that failed or, if ``failure`` is empty, was not needed.
      wrong_minimum: whether the relaxation with the head start ended higher by more than
        `same_minimum_within`; None if one of the two failed, did not converge or was not needed.
      atoms: the structure that is kept, with energy, forces and those of `EXTRAS` that were found
        (always the stress if the cell relaxed). It is the end of the relaxation with the head start;
        that of the other one if the former is a wrong minimum, failed, or did not converge while the
        latter did.
      kept: "with" or "without", the head start of the structure that is kept.
      failure: why one of the two failed; empty if neither did.
    """

    without: Leg | None
    with_start: Leg | None
    wrong_minimum: bool | None
    atoms: Atoms
    kept: str
    failure: str = ""


def load(name: str, relax_cell: bool = False) -> Calculator:
    """Loads the calculator of ``--refine``.

    Args:
      name: emt, chgnet or MODULE:FACTORY.
      relax_cell: whether cells may have relaxed, so that refining them takes stresses.

    Raises:
      InputError: see `check_calculator`.
    """
    return check_calculator(name, relax_cell, option="--refine")


def refine(
    initial: Atoms,
    predicted: Atoms,
    calculator: Calculator,
    fmax: float,
    steps: int,
    compare: bool = False,
) -> Refined:
    """Relaxes the predicted structure with LBFGS and, if necessary or to compare, the initial one.

    The initial one is necessary if the relaxation from the prediction fails or does not converge. If
    the predicted cell differs from the initial one, both relax the cell too (ASE's
    `FrechetCellFilter`); fmax then applies to the stress times the volume per atom as well.

    Args:
      initial, predicted: structures with their constraints; not changed.
      fmax: eV/Å.
      steps: largest number of optimiser steps of each relaxation.
      compare: always relax the initial structure, which costs as much as having no head start.

    Raises:
      InputError: the calculator does not know an element, or fails from both structures.
    """
    cell_too = not np.allclose(initial.cell.array, predicted.cell.array, atol=CELL_TOLERANCE)
    ends = {"with": predicted.copy(), "without": initial.copy()}
    legs: dict[str, Leg | None] = {}
    failures = {}
    for name, atoms in ends.items():
        first = legs.get("with")
        if name == "without" and first is not None and first.converged and not compare:
            break
        try:
            legs[name] = descend(atoms, calculator, fmax, steps, cell_too)
        except InputError as error:
            legs[name], failures[name] = None, str(error)
    if len(failures) == len(ends):
        raise InputError(f"--refine: {failures['with']}")
    without, with_start = legs.get("without"), legs["with"]
    wrong: bool | None = None
    if without and with_start and without.converged and with_start.converged:
        wrong = with_start.energy - without.energy > same_minimum_within(len(initial))
    better = without is not None and without.converged and not (with_start and with_start.converged)
    kept = "without" if wrong or better or with_start is None else "with"
    where = {"with": "from the prediction", "without": "from the initial structure"}
    failure = "; ".join(f"{where[name]}: {text}" for name, text in failures.items())
    return Refined(without, with_start, wrong, _results_only(ends[kept], cell_too), kept, failure)


def _results_only(atoms: Atoms, stress_too: bool) -> Atoms:
    """The atoms with their calculator's results in place of the calculator.

    Calculators hold whole models, and those of all structures would otherwise be alive at once.
    """
    from ase.calculators.singlepoint import SinglePointCalculator

    results: dict[str, Any] = {
        "energy": float(atoms.get_potential_energy()),
        "forces": atoms.get_forces(apply_constraint=False),
    }
    if stress_too:
        results["stress"] = atoms.get_stress(apply_constraint=False)
    found = getattr(atoms.calc, "results", {})
    results |= {k: found[k] for k in EXTRAS if k not in results and found.get(k) is not None}
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def descend(atoms: Atoms, calculator: Calculator, fmax: float, steps: int, relax_cell: bool) -> Leg:
    """Relaxes the atoms in place with LBFGS; afterwards their calculator is a new one.

    Args:
      fmax: eV/Å.
      steps: largest number of optimiser steps.
      relax_cell: also relax the cell in its periodic directions (ASE's `FrechetCellFilter`); fmax
        then applies to the stress times the volume per atom as well.

    Raises:
      InputError: the calculator does not know an element, or fails.
    """
    elements = set(atoms.numbers.tolist())
    unknown = elements - (calculator.elements or elements)
    if unknown:
        raise InputError(f"{calculator.label} does not know {names(unknown)}")
    if relax_cell and atoms.cell.rank < 3:
        raise InputError(
            "its cell has no volume and cannot be relaxed; give a lattice vector along each "
            "direction, or keep the cell (--keep-cell)"
        )
    try:
        return _descend(atoms, calculator, fmax, steps, relax_cell)
    except InputError:
        raise
    except Exception as error:  # calculators may raise anything
        raise InputError(
            f"{calculator.label} failed ({type(error).__name__}: {one_line(error)})"
        ) from error


def _descend(
    atoms: Atoms, calculator: Calculator, fmax: float, steps: int, relax_cell: bool
) -> Leg:
    from ase.filters import FrechetCellFilter
    from ase.optimize import LBFGS

    begin = time.perf_counter()
    atoms.calc = calculator.make()
    kind: Any = LBFGS  # ASE's annotations do not allow logfile=None
    target: Any = FrechetCellFilter(atoms, mask=strain_mask(atoms)) if relax_cell else atoms
    optimizer = kind(target, logfile=None)
    # On ASE's 3 x 3 matrices, the threads of the linear algebra would only wait for each other.
    threads = threadpoolctl.threadpool_limits(1 if calculator.serial else None, user_api="blas")
    with threads, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the optimiser's; what matters shows in the result
        optimizer.run(fmax=fmax, steps=steps)
        energy, forces = atoms.get_potential_energy(), target.get_forces()
    last = float(np.linalg.norm(forces, axis=1).max(initial=0.0))
    if not (np.isfinite(energy) and np.isfinite(last)):
        raise RuntimeError("energy or forces are not finite")
    seconds = time.perf_counter() - begin
    return Leg(optimizer.nsteps + 1, float(energy), last, last < fmax, seconds)


def strain_mask(atoms: Atoms) -> np.ndarray:
    """Mask of strains for ASE's cell filters, (3, 3): 1 within the periodic directions, else 0.

    Raises:
      InputError: the periodic directions of a slab or chain are not along Cartesian axes, which
        ASE's filters cannot express.
    """
    from relaxnet_jax.graph import strain_projector

    projector = strain_projector(atoms.cell.array, atoms.pbc)
    periodic = np.diag(projector)
    if np.abs(projector - np.diag(periodic)).max() > 1e-6:
        raise InputError(
            "its cell cannot be relaxed: the periodic directions are not along x, y or z; rotate it, or "
            "keep the cell (--keep-cell)"
        )
    return np.outer(periodic, periodic).round()
