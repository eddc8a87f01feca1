"""Reading the relaxations of one file of any supported kind."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from relaxnet_jax.data.archives import archive_members
from relaxnet_jax.data.ase_io import SkippedRelaxation, read_frames
from relaxnet_jax.data.json_sets import json_layout, read_json_set
from relaxnet_jax.data.sources import (
    Beside,
    Neighbours,
    is_archive,
    is_json,
    is_outcar,
    is_vasprun,
    plain_copy,
    plain_name,
    relaxation_id,
)
from relaxnet_jax.data.store import TrajectoryStore
from relaxnet_jax.data.store_write import REMEDY, SUFFIXES
from relaxnet_jax.data.trajectory import RelaxationTrajectory, sound_and_unwrapped
from relaxnet_jax.data.vasp.beside import Initial
from relaxnet_jax.data.vasp.run import VaspOptions, read_run
from relaxnet_jax.data.vasp.vasprun import Energy
from relaxnet_jax.errors import InputError


def read_relaxations(
    path: str | os.PathLike[str],
    name: str | None = None,
    energy: Energy = "free",
    initial: Initial | None = None,
    note: Callable[[str], None] | None = None,
    near: Beside | None = None,
) -> Iterator[RelaxationTrajectory | SkippedRelaxation]:
    """Reads the relaxations of a file, in order.

    A vasprun.xml or OUTCAR is one relaxation. Companion files of the same name beside it (in its
    folder or archive) complete it: the OUTCAR beside a vasprun.xml gives ``charges`` (net charges of
    the PAW spheres, see `outcar.Outcar`), the POSCAR or CONTCAR beside an OUTCAR the fixed atoms. If
    these are damaged, the run is read without them.

    In other files, consecutive frames with the same ``traj_id`` in their ``info`` form one
    relaxation, and their ``frame`` (if present) must ascend; without ``traj_id`` the whole file is
    one. If a frame cannot be parsed, the relaxation that its ``traj_id`` names is skipped, or, if it
    names none, those before and after it. Predictions of this package are left out. A relaxation
    that was computed starting from a prediction has the prediction's ``info`` in all its frames; it
    is named after the file and the ``traj_id``.

    JSON files of the ALIGNN-FF set, MPtrj and Alexandria are recognised by content (see
    `json_sets`). In an archive, every relaxation file is read. The relaxations of a store
    (`write_store`) are passed on as they are.

    Forces are raw, ``FixAtoms`` and selective dynamics become ``fixed_mask``, and positions are
    unwrapped.

    Args:
      path: a vasprun.xml, OUTCAR, any file that ASE reads as consecutive frames with energies and
        forces (extxyz, traj, db, ...), or a store, plain or compressed (.gz, .xz, .bz2); or a zip or
        tar archive.
      name: id of a relaxation that the file does not name; by default the file's name without
        suffixes, or the folder's name for VASP's own file names.
      energy: which energy to take from a vasprun.xml or OUTCAR, see `vasprun.read_vasprun`; ASE's
        readers give force-consistent (free) energies where they can.
      initial: "cif" if the first frame of a vasprun.xml or OUTCAR must be the crystal of the CIF
        beside it (see `beside.difference`). Other files are not compared.
      note: called with one line, which names the file, for each thing left out or assumed.
      near: the companion files; by default the file's folder is searched for them.

    Yields:
      A validated `RelaxationTrajectory` of at least two frames, or a `SkippedRelaxation`.

    Raises:
      InputError: the file is missing or unreadable, or nothing in it is a relaxation.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder: name the files in it")
    if not path.is_file():
        raise InputError(f"{path}: no such file: check the path")
    if name is None:
        name = relaxation_id(Path(path.name), path.absolute().parent)
    options = VaspOptions(energy, initial, note or (lambda _: None))
    if not is_archive(path):
        yield from _read_file(path, path, name, near or Neighbours().of(path), options)
        return
    for member in archive_members(path):
        own = relaxation_id(member.name)
        # At the top of an archive, VASP's own file names do not identify a run.
        label = name if own == plain_name(member.name) else f"{name}/{own}"
        if member.path is None:
            yield SkippedRelaxation(label, member.error)
            continue
        try:
            yield from _read_file(path / member.name, member.path, label, member.beside, options)
        except InputError as error:
            yield SkippedRelaxation(label, str(error).removeprefix(f"{path / member.name}: "))


def _read_file(
    shown: Path, path: Path, name: str, near: Beside, options: VaspOptions
) -> Iterator[RelaxationTrajectory | SkippedRelaxation]:
    """Yields the relaxations of the file at ``path``, which is called ``shown`` in messages."""
    if is_vasprun(path) or is_outcar(path):
        yield read_run(shown, path, name, near, options)
        return
    if options.initial:
        options.note(f"{shown}: not compared with a CIF: only vasprun.xml and OUTCAR are")
    layout = json_layout(path) if is_json(path) else None
    if layout is not None:
        yield from read_json_set(shown, path, layout)
        return
    with plain_copy(path) as plain:
        if plain.suffix.lower() in SUFFIXES:
            yield from _read_store(shown, plain)
        else:
            yield from read_frames(shown, plain, name)


def _read_store(shown: Path, path: Path) -> Iterator[RelaxationTrajectory | SkippedRelaxation]:
    """Yields the relaxations of a store of this package."""

    def reason(error: InputError) -> str:
        text = str(error).removeprefix(f"{path}: ")
        return text.replace(REMEDY, "give an intact store of this package")

    with contextlib.ExitStack() as stack:
        try:
            store = stack.enter_context(TrajectoryStore(path))
            names = store.ids
        except InputError as error:
            raise InputError(f"{shown}: {reason(error)}") from error
        for i, name in enumerate(names):
            try:
                found = sound_and_unwrapped(store[i])
            except InputError as error:  # only relaxations in a damaged part are lost
                yield SkippedRelaxation(name, reason(error))
                continue
            if found.n_frames > 1:
                yield found
            else:
                yield SkippedRelaxation(name, "a single frame: a relaxation needs two or more")
