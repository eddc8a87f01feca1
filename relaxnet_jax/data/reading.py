"""Relaxations from one file, whatever it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from relaxnet_jax.data.ase_io import SkippedRelaxation, read_frames
from relaxnet_jax.data.json_sets import json_layout, read_json_set
from relaxnet_jax.data.sources import (
    archive_members,
    decompressed,
    is_archive,
    is_json,
    is_vasprun,
    plain_copy,
    plain_name,
    relaxation_id,
)
from relaxnet_jax.data.trajectory import RelaxationTrajectory
from relaxnet_jax.data.vasp_xml import Energy, read_vasprun
from relaxnet_jax.errors import InputError


def read_relaxations(
    path: str | os.PathLike[str], name: str | None = None, energy: Energy = "free"
) -> Iterator[RelaxationTrajectory | SkippedRelaxation]:
    """Reads the relaxations of a file, in order.

    A vasprun.xml is one relaxation. Of other files, consecutive frames that share ``traj_id`` in
    their ``info`` are one relaxation, and their ``frame`` (if there) must ascend; without
    ``traj_id`` the whole file is one. JSON files of the ALIGNN-FF set and of MPtrj are recognised by
    content (see `json_sets`). Of an archive every file of relaxations is read. Forces are
    raw, ``FixAtoms`` and selective dynamics become ``fixed_mask``, positions are unwrapped.

    Args:
      path: vasprun.xml, any file ASE reads as consecutive frames with energies and forces
        (extxyz, traj, db, OUTCAR, ...), plain or as .gz, .xz, .bz2, or a zip or tar archive.
      name: id of a relaxation the file does not name; by default the file's name without
        suffixes, and for VASP's own file names that of the folder.
      energy: which energy of a vasprun.xml, see `vasp_xml.read_vasprun`; ASE's readers give
        force-consistent (free) ones where they can.

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
    if not is_archive(path):
        yield from _read_file(path, path, name, energy)
        return
    for member in archive_members(path):
        own = relaxation_id(member.name)
        # VASP's own file names at the top of an archive name nothing.
        label = name if own == plain_name(member.name) else f"{name}/{own}"
        if member.path is None:
            yield SkippedRelaxation(label, member.error)
            continue
        try:
            yield from _read_file(path / member.name, member.path, label, energy)
        except InputError as error:
            yield SkippedRelaxation(label, str(error).removeprefix(f"{path / member.name}: "))


def _read_file(
    shown: Path, path: Path, name: str, energy: Energy
) -> Iterator[RelaxationTrajectory | SkippedRelaxation]:
    """The relaxations of a file at ``path`` that is called ``shown`` in messages."""
    layout = json_layout(path) if is_json(path) else None
    if layout is not None:
        yield from read_json_set(shown, path, layout)
        return
    if not is_vasprun(path):
        with plain_copy(path) as plain:
            yield from read_frames(shown, plain, name)
        return
    with decompressed(path) as stream:
        try:
            trajectory = read_vasprun(stream, name, energy, source=shown.name)
        except InputError as error:
            raise InputError(f"{shown}: {error}") from None
    yield trajectory
