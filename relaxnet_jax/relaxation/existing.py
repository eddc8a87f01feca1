"""What earlier commands have left in the folder of results, for ``--skip-existing``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from relaxnet_jax.data.ase_io import text_of
from relaxnet_jax.data.files import one_line
from relaxnet_jax.errors import InputError
from relaxnet_jax.relaxation.inputs import Input
from relaxnet_jax.relaxation.outputs import Target

if TYPE_CHECKING:
    from ase import Atoms


class Existing(NamedTuple):
    """Results of earlier commands.

    Attributes:
      names: of the inputs whose relaxed structure and path are there.
      frames: of files that also hold those of inputs still to be done: the frames to keep.
    """

    names: set[str]
    frames: dict[Path, list[Atoms]]


def existing(
    planned: Sequence[tuple[Input, Target]], refined: Collection[str] | None = None
) -> Existing:
    """What need not be done again. A file of one input's is whole if it is there, since it is written
    so; of a file with the images of several the frames are read.

    Args:
      refined: names of the structures that need not be refined any more; None where none need be.

    Raises:
      InputError: a file that has to be read cannot be.
    """
    read: dict[Path, list[Atoms]] = {}
    ids: dict[Path, set[str]] = {}

    def holds(file: Path, own: bool, name: str) -> bool:
        if own or not file.exists():
            return file.exists()
        if file not in read:
            read[file] = _frames(file)
            ids[file] = {_id(atoms) for atoms in read[file]}
        return name in ids[file]

    names: set[str] = set()
    todo: set[str] = set()
    unfinished: set[Path] = set()
    for one, target in planned:
        single = one.name == one.stem
        relaxed = holds(target.relaxed, single or target.form in ("poscar", "cif"), one.name)
        path = holds(target.path, single, one.name)
        if relaxed and path and (refined is None or one.name in refined):
            names.add(one.name)
        else:
            todo.add(one.name)
            unfinished |= {target.relaxed, target.path}
    frames = {f: [a for a in read[f] if _id(a) not in todo] for f in unfinished & read.keys()}
    return Existing(names, frames)


def _id(atoms: Atoms) -> str:
    return text_of(atoms.info.get("traj_id"))


def _frames(file: Path) -> list[Atoms]:
    import ase.io

    try:
        return list(ase.io.iread(file, ":", file.suffix[1:], do_not_split_by_at_sign=True))
    except Exception as error:  # ASE's readers raise many kinds
        raise InputError(
            f"{file}: --skip-existing cannot read it ({one_line(error)}); delete it, or give another --out"
        ) from error
