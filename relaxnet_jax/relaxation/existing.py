"""What earlier commands have left in the folder of results, for ``--skip-existing``."""

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

SAME = 1e-3  # Å; files round positions
REPLACE = "give another --out, or replace it with --overwrite instead of --skip-existing"


class Existing(NamedTuple):
    """Results of earlier commands.

    Attributes:
      names: of the inputs whose relaxed structure and path are there.
      frames: of files that also hold those of inputs still to be done: the frames to keep.
    """

    names: set[str]
    frames: dict[Path, list[Atoms]]


def existing(
    planned: Sequence[tuple[Input, Target]],
    rows: Sequence[Mapping[str, str]],
    models: summary.Models,
    refine: str | None = None,
) -> Existing:
    """What need not be done again. A file of one input's is whole if it is there, since it is written
    so; of a file with the images of several the frames are read.

    Args:
      rows: of the folder's summary. models: what predicts.
      refine: the calculator that is to have refined them, by their rows; None where none is.

    Raises:
      InputError: a file that has to be read cannot be; or what is there is of another structure that
        has the name, or of other models.
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
        """Of a path that is there."""
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
    """Raises InputError where the path in the file, which begins at ``begin``, is not the input's or,
    as its row in the summary says, was predicted by others than these models."""
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
    """In what the first frame of a path is not the structure it should be of; empty if in nothing."""
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
    """Raises InputError instead of what ASE's readers raise."""
    try:
        yield
    except Exception as error:  # they raise many kinds
        raise InputError(
            f"{file}: --skip-existing cannot read it ({one_line(error)}); delete it, or give another --out"
        ) from error
