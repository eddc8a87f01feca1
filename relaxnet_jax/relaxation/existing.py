"""Results that earlier runs of the command left in the output folder, for ``--skip-existing``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from relaxnet_jax.constraints import held_atoms
from relaxnet_jax.data.ase_io import Unreadable, images_of, text_of
from relaxnet_jax.data.files import one_line
from relaxnet_jax.errors import InputError
from relaxnet_jax.relaxation import summary
from relaxnet_jax.relaxation.inputs import Input
from relaxnet_jax.relaxation.outputs import Target

if TYPE_CHECKING:
    from ase import Atoms

SAME = 1e-3  # Å; files hold rounded positions
REPLACE = "give another --out, or replace it with --overwrite instead of --skip-existing"


class Existing(NamedTuple):
    """Results of earlier runs.

    Attributes:
      names: names of the inputs whose relaxed structure and path exist.
      frames: for each file that is shared with inputs still to be done, the frames to keep.
    """

    names: set[str]
    frames: dict[Path, list[Atoms]]


def existing(
    planned: Sequence[tuple[Input, Target]],
    rows: Sequence[Mapping[str, str]],
    models: summary.Models,
    refine: str | None = None,
) -> Existing:
    """Finds the results that need not be computed again.

    A file of a single input is complete if it exists, since it is written whole or not at all. A file
    that holds several images is read to see which of them it has.

    Args:
      planned: the inputs and their output files.
      rows: rows of the folder's summary.
      models: the models that predict now.
      refine: name of the calculator that must have refined the results, according to their rows;
        None if no refinement is asked for.

    Raises:
      InputError: a file cannot be read, or holds the path of another structure of the same name, or
        one that other models predicted.
    """
    told = {row["name"]: row for row in rows if row["relaxed file"]}
    read: dict[Path, list[Atoms]] = {}
    ids: dict[Path, set[str]] = {}

    def holds(file: Path, own: bool, name: str) -> bool:
        if own or not file.exists():
            return file.exists()
        if file not in read:
            read[file] = _frames(file)
            ids[file] = {_id(atoms) for atoms in read[file]}
        return name in ids[file]

    def begin(file: Path, name: str) -> Atoms:
        """The first frame of a path that exists."""
        if file not in read:
            return _first(file)
        return next(atoms for atoms in read[file] if _id(atoms) == name)

    names: set[str] = set()
    todo: set[str] = set()
    unfinished: set[Path] = set()
    for one, target in planned:
        single = one.name == one.stem
        relaxed = holds(target.relaxed, single or target.form in ("poscar", "cif"), one.name)
        path = holds(target.path, single, one.name)
        row = told.get(one.name)
        if path:
            _check_same(one, target.path, begin(target.path, one.name), row, models)
        done = refine is None or (row is not None and row["refined"] == refine)
        if relaxed and path and done:
            names.add(one.name)
        else:
            todo.add(one.name)
            unfinished |= {target.relaxed, target.path}
    frames = {f: [a for a in read[f] if _id(a) not in todo] for f in unfinished & read.keys()}
    return Existing(names, frames)


def _id(atoms: Atoms) -> str:
    return text_of(atoms.info.get("traj_id"))


def _check_same(
    one: Input, file: Path, begin: Atoms, row: Mapping[str, str] | None, models: summary.Models
) -> None:
    """Checks that an existing path is that of the input, predicted by the same models.

    Args:
      begin: first frame of the path in the file.
      row: the input's row in the summary, which names the models; None if there is none.
      models: the models that predict now.

    Raises:
      InputError: the path is of another structure, or of other models.
    """
    other = _difference(begin, one.atoms)
    if other:
        named = row is not None and row["input"] != one.place
        whose = row["input"] if row is not None and named else "another structure"
        raise InputError(
            f"{file}: is the path of {whose}, not of {one.place} as it is now ({other} differ); {REPLACE}"
        )
    by = summary.UNKNOWN if row is None else summary.models_of(row)
    if by.checksum and models.checksum and by.checksum != models.checksum:
        raise InputError(
            f"{file}: {one.name} was predicted by the model {by}, not by {models}; {REPLACE}"
        )


def _difference(begin: Atoms, atoms: Atoms) -> str:
    """What differs between the first frame of a path and a structure; empty if nothing does."""
    if not np.array_equal(begin.numbers, atoms.numbers):
        return "atoms"
    if not np.array_equal(begin.pbc, atoms.pbc):
        return "periodic directions"
    if not np.allclose(begin.cell.array, atoms.cell.array, rtol=0, atol=SAME):
        return "lattice vectors"
    if not np.allclose(begin.positions, atoms.positions, rtol=0, atol=SAME):
        return "positions"
    fixed, asked = (held_atoms(each)[0] for each in (begin, atoms))
    return "" if np.array_equal(fixed, asked) else "fixed atoms"


def _frames(file: Path) -> list[Atoms]:
    import ase.io

    with _reading(file):
        return list(ase.io.iread(file, ":", file.suffix[1:], do_not_split_by_at_sign=True))


def _first(file: Path) -> Atoms:
    """The first frame of a file."""
    with _reading(file):
        item = next(iter(images_of(file)))
        if isinstance(item, Unreadable):
            raise ValueError(item)
        return item


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turns whatever ASE's readers raise into InputError."""
    try:
        yield
    except Exception as error:  # ASE's readers raise many kinds
        raise InputError(
            f"{file}: --skip-existing cannot read it ({one_line(error)}); delete it, or give another --out"
        ) from error
