"""Companion files of a VASP run: charges, selective dynamics, the crystal it started from."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from relaxnet_jax.data.ase_io import fixed_atoms
from relaxnet_jax.data.files import one_line
from relaxnet_jax.data.sources import decompressed, plain_copy
from relaxnet_jax.data.trajectory import UNFINISHED, RelaxationTrajectory
from relaxnet_jax.data.vasp.outcar import Outcar
from relaxnet_jax.errors import InputError

if TYPE_CHECKING:
    import ase

Initial = Literal["cif"]
# A CIF is the structure the run started from if lengths (Å), angles (degrees) and positions (Å) agree
# to within these. CIFs are often rounded to three decimals; a relaxed crystal differs by more.
LENGTH_TOLERANCE = 0.01
ANGLE_TOLERANCE = 0.1
PLACE_TOLERANCE = 0.02


def with_charges(trajectory: RelaxationTrajectory, outcar: Path) -> RelaxationTrajectory:
    """Adds the charges in the OUTCAR of the same run to the relaxation of a vasprun.xml.

    They are the net charges of the PAW spheres from the last "total charge" table (see
    `Outcar.charges`). Without such a table the relaxation is returned unchanged.

    Raises:
      InputError: the OUTCAR is truncated, damaged or of another run; the message does not name it.
    """
    with decompressed(outcar) as stream:
        run = Outcar(stream)
        steps = sum(1 for _ in run.steps())
        numbers = run.numbers
    if not run.finished and not trajectory.source.endswith(UNFINISHED):
        raise InputError(f"ends after {steps} complete ionic steps: fetch it again")
    if not np.array_equal(numbers, trajectory.atomic_numbers) or steps != trajectory.n_frames:
        raise InputError(
            f"{steps} ionic steps of {len(numbers)} atoms, but the vasprun.xml has "
            f"{trajectory.n_frames} of {trajectory.n_atoms}, or the elements differ: it is from another run "
            "or truncated elsewhere"
        )
    if run.charges_fault:
        raise InputError(run.charges_fault)
    return dataclasses.replace(trajectory, charges=run.charges)


def fixed_by(poscar: Path) -> np.ndarray:
    """(N,) bool: which atoms the selective dynamics of a POSCAR or CONTCAR holds fixed.

    Raises:
      InputError: the file cannot be read, or an atom is held in some directions only; the message
        does not name the file.
    """
    return fixed_atoms(_structure(poscar, "vasp"))


def difference(trajectory: RelaxationTrajectory, cif: Path) -> str:
    """In which respect the first frame differs from the crystal of a CIF; "" if it does not.

    Composition, lengths and angles of the cell, and fractional coordinates are compared, with the
    atoms of an element in any order and in any periodic image. Orientation is not compared, as a CIF
    has none.

    Raises:
      InputError: the CIF cannot be read; the message does not name it.
    """
    from ase.geometry import cell_to_cellpar
    from scipy.optimize import linear_sum_assignment

    crystal = _structure(cif, "cif")
    numbers = trajectory.atomic_numbers
    if sorted(crystal.numbers) != sorted(numbers):
        found = trajectory.atoms(0).get_chemical_formula()
        return f"{found} in the first frame, {crystal.get_chemical_formula()} in the CIF"
    cell = trajectory.cells[0]
    mine, its = cell_to_cellpar(cell), crystal.cell.cellpar()
    for name, part, tolerance, unit in (
        ("a, b, c", slice(0, 3), LENGTH_TOLERANCE, "Å"),
        ("alpha, beta, gamma", slice(3, 6), ANGLE_TOLERANCE, "°"),
    ):
        if np.abs(mine[part] - its[part]).max() > tolerance:
            values = [", ".join(f"{x:.3f}" for x in found[part]) for found in (mine, its)]
            return f"{name} {values[0]} {unit} in the first frame, {values[1]} {unit} in the CIF"
    fractional = np.linalg.solve(cell.T, trajectory.positions[0].T).T
    for z in np.unique(numbers):
        atoms = np.flatnonzero(numbers == z)
        apart = fractional[atoms, None] - crystal.get_scaled_positions()[crystal.numbers == z]
        distances = np.linalg.norm((apart - np.round(apart)) @ cell, axis=-1)
        rows, columns = linear_sum_assignment(distances)
        matched = distances[rows, columns]
        if matched.max() > PLACE_TOLERANCE:
            return (
                f"atom {atoms[rows[matched.argmax()]]} of the first frame is {matched.max():.3f} Å "
                "from its position in the CIF"
            )
    return ""


def _structure(path: Path, form: str) -> ase.Atoms:
    """Reads the only structure of a file with ASE."""
    import ase.io

    with plain_copy(path) as plain, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            images = list(ase.io.iread(plain, index=":", format=form))
        except Exception as error:
            raise InputError(f"cannot be read ({one_line(error)}): repair or remove it") from error
    if len(images) != 1:
        raise InputError(f"holds {len(images)} structures: give one")
    return images[0]
