"""One VASP run: its vasprun.xml or OUTCAR, with what lies beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from relaxnet_jax.data.sources import Beside, decompressed, is_vasprun
from relaxnet_jax.data.trajectory import RelaxationTrajectory
from relaxnet_jax.data.vasp.beside import Initial, difference, fixed_by, with_charges
from relaxnet_jax.data.vasp.outcar import read_outcar
from relaxnet_jax.data.vasp.vasprun import Energy, read_vasprun
from relaxnet_jax.errors import InputError


class VaspOptions(NamedTuple):
    """What is asked of VASP runs, see `reading.read_relaxations`."""

    energy: Energy = "free"
    initial: Initial | None = None
    note: Callable[[str], None] = lambda _: None


def read_run(
    shown: Path, path: Path, name: str, near: Beside, options: VaspOptions
) -> RelaxationTrajectory:
    """The relaxation of a vasprun.xml or OUTCAR.

    The OUTCAR beside a vasprun.xml gives the charges, the POSCAR or CONTCAR beside an OUTCAR the
    fixed atoms; where these are damaged that is noted and the run is read without them.

    Args:
      shown: what the file is called in messages. path: where it is.
      name: id of the relaxation.
      near: what lies beside it.
      options: among them ``note``, called with one line, which names the file, for each thing
        left out or assumed.

    Raises:
      InputError: it is no sound relaxation, or does not start from the CIF beside it when that is
        asked for.
    """

    def note(line: str) -> None:
        options.note(f"{shown}: {line}")

    with decompressed(path) as stream:
        try:
            if is_vasprun(path):
                trajectory = read_vasprun(stream, name, options.energy, shown.name)
            else:
                fixed = _fixed(near.structure, note)
                trajectory = read_outcar(stream, name, options.energy, shown.name, fixed, note)
            if options.initial:
                _check_initial(trajectory, near.cif)
        except InputError as error:
            raise InputError(f"{shown}: {error}") from None
    if near.outcar is None:
        return trajectory
    try:
        return with_charges(trajectory, near.outcar)
    except InputError as error:
        note(f"charges left out: {near.outcar.name}: {_unnamed(error, near.outcar)}")
        return trajectory


def _check_initial(trajectory: RelaxationTrajectory, cif: Path | None) -> None:
    """Raises InputError unless the first frame is the crystal of the CIF."""
    remedy = "give the CIF the run started from, or leave out the comparison with one"
    if cif is None:
        raise InputError(f"no CIF of this run beside it: {remedy}")
    try:
        unlike = difference(trajectory, cif)
    except InputError as error:
        raise InputError(f"{cif.name}: {_unnamed(error, cif)}") from None
    if unlike:
        raise InputError(f"does not start from {cif.name}: {unlike}: {remedy}")


def _fixed(poscar: Path | None, note: Callable[[str], None]) -> np.ndarray | None:
    """(N,) bool of the selective dynamics beside an OUTCAR, None where nothing tells."""
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
    """The message without the path, which may be that of a temporary copy."""
    return str(error).removeprefix(f"{path}: ")
