"""Output files: a relaxed structure and a path for each input; nothing is overwritten unasked."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from relaxnet_jax.constraints import move_to_end
from relaxnet_jax.data.files import is_poscar
from relaxnet_jax.data.sources import plain_name
from relaxnet_jax.data.trajectory import ALONE, REFINED, RelaxationTrajectory
from relaxnet_jax.errors import InputError
from relaxnet_jax.relaxation.inputs import Input
from relaxnet_jax.structure_files import write_frames

if TYPE_CHECKING:
    from ase import Atoms

    from relaxnet_jax.relaxation.refine import Refined
    from relaxnet_jax.trust import Flag

FORMATS = ("poscar", "cif", "extxyz", "traj")
_SUFFIX = {"poscar": ".vasp", "cif": ".cif", "extxyz": ".extxyz", "traj": ".traj"}
_ASE = {"poscar": "vasp", "cif": "cif", "extxyz": "extxyz", "traj": "traj"}
# The constraints that a format can hold; None for all. ASE drops the others silently.
_HOLDS = {
    "poscar": ("FixAtoms", "FixScaled", "FixedPlane", "FixedLine"),
    "cif": (),
    "extxyz": ("FixAtoms",),
    "traj": None,
}


@dataclasses.dataclass(frozen=True)
class Target:
    """Output files of one input.

    Attributes:
      form: one of `FORMATS`.
      relaxed: file of the final structure, shared by the images of an input file if the format holds
        several.
      path: file of all frames, likewise shared.
      figure: PNG of the path, or None.
    """

    form: str
    relaxed: Path
    path: Path
    figure: Path | None


def plan(inputs: Sequence[Input], out: Path, form: str | None, figures: bool) -> list[Target]:
    """The output files of each input, under ``out``.

    Args:
      form: one of `FORMATS`; by default that of the input if it is a POSCAR or CIF, else extxyz.
      figures: whether there is a figure of each path.
    """
    targets = []
    for one in inputs:
        kind = form or _like(one.source)
        shared = one.stem if kind in ("extxyz", "traj") else one.name
        path_suffix = ".traj" if kind == "traj" else ".extxyz"
        targets.append(
            Target(
                kind,
                out / f"{shared}-relaxed{_SUFFIX[kind]}",
                out / f"{one.stem}-path{path_suffix}",
                out / f"{one.name}-path.png" if figures else None,
            )
        )
    return targets


def without_cell(target: Target, atoms: Atoms) -> str:
    """Why the atoms cannot be written in the target's format; empty if they can."""
    if target.form == "poscar" and atoms.cell.rank < 3:
        return "it has no cell, but a POSCAR needs one; give --format extxyz"
    return ""


def _like(source: Path) -> str:
    source = source.with_name(plain_name(source))
    if is_poscar(source):
        return "poscar"
    return "cif" if source.suffix.lower() == ".cif" else "extxyz"


def check_free(files: Sequence[Path | None], overwrite: bool) -> None:
    """Checks that the files can be written, before hours of refinement rather than after.

    Raises:
      InputError: a file exists and may not be overwritten, or cannot be written.
    """
    for file in files:
        folder = next((p for p in file.absolute().parents if p.exists()), None) if file else None
        if folder is not None and not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            raise InputError(f"{folder}: cannot be written to; give another --out or --html")
        if file is not None and file.is_dir():
            raise InputError(f"{file}: is a folder; choose another name")
        if file is not None and file.exists() and not overwrite:
            raise InputError(f"{file}: exists; give another --out or --html, or --overwrite")


def relaxed_atoms(
    one: Input, path: RelaxationTrajectory, flags: Sequence[Flag], refined: Refined | None
) -> Atoms:
    """The input's atoms, with all they carry, at the final positions in the final cell.

    Energy, forces and, if the cell relaxes, stress are the model's. An unrefined structure has none of
    them if constraints that the path ignores moved its end. A refined one has the calculator's,
    with free energy and magnetic moments if there are any. ``info`` has ``traj_id``, ``source`` and,
    if the prediction was used and has flags, ``relaxnet_flags``.
    """
    from ase.calculators.singlepoint import SinglePointCalculator

    atoms = one.atoms.copy()
    results = {}
    if refined is None:
        move_to_end(atoms, path)
        if np.allclose(atoms.positions, path.positions[-1], rtol=0, atol=1e-6):
            results = {"energy": float(path.energies[-1]), "forces": path.forces[-1].copy()}
            if path.stresses is not None:
                results["stress"] = path.stresses[-1].copy()
    else:
        atoms.set_cell(refined.atoms.cell, apply_constraint=False)
        atoms.set_positions(refined.atoms.positions, apply_constraint=False)
        results = dict(refined.atoms.calc.results)
    if results:
        atoms.calc = SinglePointCalculator(atoms, **results)
    used = refined is None or refined.kept == "with"
    source = path.source if refined is None else REFINED
    atoms.info |= {"traj_id": one.name, "source": source if used else ALONE}
    if flags and used:
        atoms.info["relaxnet_flags"] = ", ".join(flag.name for flag in flags)
    return atoms


def lost_constraints(atoms: Atoms, form: str) -> list[str]:
    """Class names of the atoms' constraints that the format cannot hold."""
    kept = _HOLDS[form]
    kinds = {type(c).__name__ for c in atoms.constraints}
    return [] if kept is None else sorted(kinds - set(kept))


def write_relaxed(images: Sequence[Atoms], file: Path, form: str, append: bool = False) -> None:
    """Writes final structures to a file, whole or not at all. Raises InputError.

    Args:
      append: adds them to the structures in the file; only for a format that holds several.
    """
    write_frames(images, file, _ASE[form], append)
