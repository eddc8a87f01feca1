"""Reading one VASP run: its vasprun.xml or OUTCAR, with its companion files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from relaxnet_jax.data.sources import Beside, decompressed, is_vasprun
from relaxnet_jax.data.trajectory import RelaxationTrajectory
from relaxnet_jax.data.vasp.beside import Initial, difference, fixed_by, with_charges
from relaxnet_jax.data.vasp.outcar import read_outcar
from relaxnet_jax.data.vasp.unfinished import NoRelaxation
from relaxnet_jax.data.vasp.vasprun import Energy, read_vasprun
from relaxnet_jax.errors import InputError


class VaspOptions(NamedTuple):
    """Options for reading VASP runs, see `reading.read_relaxations`."""

    energy: Energy = "free"
    initial: Initial | None = None
    note: Callable[[str], None] = lambda _: None


def read_run(
    shown: Path, path: Path, name: str, near: Beside, options: VaspOptions
) -> RelaxationTrajectory:
    """Reads the relaxation of a vasprun.xml or OUTCAR.

    The OUTCAR beside a vasprun.xml gives the charges, the POSCAR or CONTCAR beside an OUTCAR the
    fixed atoms; if these are damaged, that is noted and the run is read without them. If the
    vasprun.xml is damaged or holds fewer than two complete ionic steps, the OUTCAR beside it is read
    instead, and that is noted.

    Args:
      shown: the file, as named in messages.
      path: where the file is.
      name: id of the relaxation.
      near: the companion files.
      options: options; ``note`` is called with one line, which names the file, for each thing left
        out or assumed.

    Raises:
      InputError: the file is not a sound relaxation, or it does not start from the CIF beside it
        although that is required.
    """

    def note(line: str) -> None:
        options.note(f"{shown}: {line}")

    try:
        read = _read_vasprun if is_vasprun(path) else _read_outcar
        trajectory = read(path, name, near, options, note)
        if options.initial:
            _check_initial(trajectory, near.cif)
    except InputError as error:
        raise InputError(f"{shown}: {_unnamed(error, path)}") from None
    return trajectory


def _read_vasprun(
    path: Path,
    name: str,
    near: Beside,
    options: VaspOptions,
    note: Callable[[str], None],
) -> RelaxationTrajectory:
    """The relaxation of a vasprun.xml with the OUTCAR's charges, or else that of the OUTCAR."""
    try:
        with decompressed(path) as stream:
            trajectory = read_vasprun(stream, name, options.energy, note=note)
    except NoRelaxation:
        raise
    except InputError as error:
        if near.outcar is None:
            raise
        reason = _unnamed(error, path)
    else:
        if near.outcar is None:
            return trajectory
        try:
            return with_charges(trajectory, near.outcar)
        except InputError as error:
            note(f"charges left out: {near.outcar.name}: {_unnamed(error, near.outcar)}")
            return trajectory
    outcar = near.outcar.name
    kept: list[str] = []
    try:
        trajectory = _read_outcar(near.outcar, name, near, options, kept.append)
    except InputError as error:
        reason += f" (nor can {outcar} be used: {_unnamed(error, near.outcar)})"
        raise InputError(reason) from None
    note(f"cannot be used ({reason}): {outcar} is read instead")
    for line in kept:
        note(f"{outcar}: {line}")
    return trajectory


def _read_outcar(
    path: Path,
    name: str,
    near: Beside,
    options: VaspOptions,
    note: Callable[[str], None],
) -> RelaxationTrajectory:
    """The relaxation of an OUTCAR with the fixed atoms of the POSCAR beside it."""
    with decompressed(path) as stream:
        fixed = _fixed(near.structure, note)
        return read_outcar(stream, name, options.energy, fixed=fixed, note=note)


def _check_initial(trajectory: RelaxationTrajectory, cif: Path | None) -> None:
    """Raises InputError unless the first frame is the crystal of the CIF."""
    remedy = "give the CIF the run started from, or leave out the comparison"
    if cif is None:
        raise InputError(f"no CIF of this run beside it: {remedy}")
    try:
        unlike = difference(trajectory, cif)
    except InputError as error:
        raise InputError(f"{cif.name}: {_unnamed(error, cif)}") from None
    if unlike:
        raise InputError(f"does not start from {cif.name}: {unlike}: {remedy}")


def _fixed(poscar: Path | None, note: Callable[[str], None]) -> np.ndarray | None:
    """(N,) bool: fixed atoms by the selective dynamics beside an OUTCAR; None if unknown."""
    if poscar is None:
        return None
    try:
        return fixed_by(poscar)
    except InputError as error:
        reason = _unnamed(error, poscar)
        if "some directions" in reason:
            raise InputError(f"{poscar.name}: {reason}") from None
        note(f"selective dynamics left out: {poscar.name}: {reason}")
        return None


def _unnamed(error: InputError, path: Path) -> str:
    """The error message without the path, which may be that of a temporary copy."""
    return str(error).removeprefix(f"{path}: ")
