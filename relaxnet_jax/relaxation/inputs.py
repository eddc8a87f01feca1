"""Reads files and folders into structures to relax, under names that never collide."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from relaxnet_jax.console import printable
from relaxnet_jax.data.ase_io import images_of, predicted
from relaxnet_jax.data.files import is_poscar
from relaxnet_jax.data.sources import plain_name
from relaxnet_jax.data.trajectory import PREDICTED
from relaxnet_jax.errors import InputError
from relaxnet_jax.structure_files import Failure, read_images

if TYPE_CHECKING:
    from ase import Atoms

# What folders are searched for. A CONTCAR beside a POSCAR is the result of another run, so it has to be
# named to be relaxed.
SEARCHED = (".cif", ".vasp", ".poscar", ".xyz", ".extxyz", ".traj")
# Words that make ASE take a file for one of VASP's (or DL_POLY's), whatever its suffix.
_WORDS = re.compile(r"(?i)[._-]*(POSCAR|CONTCAR|CENTCAR|OUTCAR|XDATCAR|CONFIG)[._-]*")
_INDEX = re.compile(r"-?\d+|-?\d*:-?\d*(:-?\d*)?")
# Names of files that this command writes: paths; and paths or relaxed structures.
_PATH = re.compile(r"-path\.(extxyz|traj)$")
_RESULT = re.compile(r"-(path\.(extxyz|traj)|relaxed\.(vasp|cif|extxyz|traj))$")
_SOURCE = re.compile(rf"""(?:^|\s)source=(["']?){PREDICTED}\1(?:\s|$)""")
_RANGE = re.compile(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*")


@dataclasses.dataclass(frozen=True, eq=False)
class Input:
    """One structure to relax.

    Attributes:
      name: unique even if case is ignored, and fit for a file name.
      place: what messages call it: the file and, if that has several images, the index of the image.
      source: the file.
      stem: unique name of the file, without suffix; see `distinct_stems`.
      atoms: the structure, with the constraints asked for.
    """

    name: str
    place: str
    source: Path
    stem: str
    atoms: Atoms


@dataclasses.dataclass(frozen=True)
class Hold:
    """Atoms to hold fixed in addition to those that the file holds.

    Attributes:
      indices: indices of atoms, counted from 0.
      below: atoms with a smaller Cartesian z, in Å, are held; None for no such limit.
    """

    indices: tuple[int, ...] = ()
    below: float | None = None


def parse_indices(text: str) -> tuple[int, ...]:
    """Parses indices of atoms, counted from 0, e.g. "0,3,8-11". Raises InputError."""
    found: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part)
        first, last = (match[1], match[2] or match[1]) if match else ("1", "0")
        if int(last) < int(first):
            raise InputError(f"--fixed {text}: give atoms counted from 0, e.g. --fixed 0,3,8-11")
        found.update(range(int(first), int(last) + 1))
    return tuple(sorted(found))


def find_files(
    named: Sequence[str], exclude: Path, note: Callable[[str], None] = lambda _: None
) -> tuple[dict[Path, list[slice]], list[Failure]]:
    """Finds the files to read, each once, and the images wanted of each.

    A file is given as FILE or FILE@INDEX (as in ASE: -1, 0:5), possibly several times. Folders are
    searched recursively for POSCAR* and the suffixes `SEARCHED`. Passed over are hidden files and
    folders, ``exclude``, results of this command wherever they are, and files that say of themselves
    that they were predicted.

    Args:
      named: files and folders.
      exclude: a folder that is not searched.
      note: called with one line for each folder in which results are passed over.

    Returns:
      The images wanted of each file, in order, and failures.
    """
    files: dict[Path, tuple[Path, list[slice]]] = {}
    failures: list[Failure] = []
    for text in named:
        path, images = _selected(text)
        if path.is_dir():
            passed: list[Path] = []
            inside = list(_inside(path, exclude.resolve(), passed))
            if passed:
                note(
                    f"{text}: {len(passed)} results of this package skipped; name them to include them"
                )
            if not inside:
                kinds = ", ".join(SEARCHED)
                failures.append(Failure(text, f"holds no POSCAR, {kinds} file; name the files"))
        elif path.exists():
            inside = [path]
        else:
            failures.append(Failure(text, "no such file; check the path"))
            continue
        for file in inside:
            files.setdefault(file.resolve(), (file, []))[1].append(images)
    return dict(files.values()), failures


def _selected(text: str) -> tuple[Path, slice]:
    """Splits FILE@INDEX into file and images; an existing file with an @ in its name takes precedence."""
    path, (file, at, index) = Path(text), text.rpartition("@")
    match = _INDEX.fullmatch(index)
    if not at or path.exists() or match is None:
        return path, slice(None)
    if ":" not in index:
        last = int(index)
        return Path(file), slice(last, last + 1 or None)
    return Path(file), slice(*(int(part) if part else None for part in index.split(":")))


def _inside(folder: Path, exclude: Path, passed: list[Path]) -> Iterable[Path]:
    """Yields the files to read in a folder; appends results found there to ``passed``."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(
            f for f in folders if not f.startswith(".") and Path(root, f).resolve() != exclude
        )
        ours = {name[: match.start()] for name in names if (match := _PATH.search(name))}
        for name in sorted(names):
            wanted = name.upper().startswith("POSCAR") or name.lower().endswith(SEARCHED)
            if not wanted or name.startswith("."):
                continue
            result, file = _RESULT.search(name), Path(root, name)
            ours_too = result and any(name[: result.start()].startswith(stem) for stem in ours)
            if ours_too or _predicted(file):
                passed.append(file)
            else:
                yield file


def _predicted(file: Path) -> bool:
    """Whether an extxyz or traj file begins with a prediction.

    Its first frame must say so, and the second must not belong to a relaxation computed from it.
    """
    try:
        if file.suffix.lower() in (".xyz", ".extxyz"):
            with file.open(encoding="utf-8") as lines:
                _, comment = next(lines), next(lines)
            says_so = _SOURCE.search(comment) is not None
        elif file.suffix.lower() == ".traj":
            from ase.io import Trajectory

            with Trajectory(str(file)) as frames:
                says_so = frames[0].info.get("source") == PREDICTED
        else:
            return False
        if not says_so:
            return False
        two = [a for a in itertools.islice(images_of(file), 2) if not isinstance(a, str)]
        of_one = len({str(atoms.info.get("traj_id")) for atoms in two}) == 1
        return not of_one or predicted(two)
    except Exception:  # unreadable files are reported when they are read
        return False


def read_inputs(
    files: Mapping[Path, Sequence[slice]], hold: Hold
) -> tuple[list[Input], list[Failure]]:
    """Reads the wanted images of all files; an image that cannot be read becomes a failure."""
    inputs: list[Input] = []
    failures: list[Failure] = []
    taken: set[str] = set()
    for (file, wanted), stem in zip(files.items(), distinct_stems(list(files))):
        try:
            images = read_images(file)
        except InputError as error:
            failures.append(Failure(str(file), str(error).removeprefix(f"{file}: ")))
            continue
        numbers = range(len(images))
        chosen = list(dict.fromkeys(k for part in wanted for k in numbers[part]))
        if not all(numbers[part] for part in wanted):
            failures.append(
                Failure(str(file), f"has {len(images)} image(s), none of those asked for")
            )
        for index in chosen:
            image, single = images[index], len(images) == 1
            place = str(file) if single else f"{file}, image {index}"
            if isinstance(image, str):
                failures.append(Failure(place, image))
                continue
            try:
                atoms = held(image, hold)
            except InputError as error:
                failures.append(Failure(place, str(error)))
                continue
            name = _free(stem if single else f"{stem}-{index}", taken)
            inputs.append(Input(name, place, file, stem, atoms))
    return inputs, failures


def held(atoms: Atoms, hold: Hold) -> Atoms:
    """A copy with more atoms in `FixAtoms`; other constraints are kept.

    Raises:
      InputError: an index is out of range.
    """
    from ase.constraints import FixAtoms

    atoms = atoms.copy()
    if hold.indices and hold.indices[-1] >= len(atoms):
        raise InputError(
            f"--fixed {hold.indices[-1]}: out of range; give atoms 0 to {len(atoms) - 1}"
        )
    fixed = np.zeros(len(atoms), bool)
    fixed[list(hold.indices)] = True
    if hold.below is not None:
        fixed |= atoms.positions[:, 2] < hold.below
    if not fixed.any():
        return atoms
    others = []
    for constraint in atoms.constraints:
        if isinstance(constraint, FixAtoms):
            fixed[constraint.index] = True
        else:
            others.append(constraint)
    atoms.set_constraint([*others, FixAtoms(np.flatnonzero(fixed))])
    return atoms


def distinct_stems(files: Sequence[Path]) -> list[str]:
    """A name for each file, unique even if case is ignored.

    It is the file's own name without suffix, preceded by the folders above where names collide, and
    numbered where those are the same too. Words like POSCAR are left out, since ASE would read a path
    under such a name as a POSCAR: both mp-1/POSCAR and POSCAR.mp-1 become mp-1.
    """
    parts = [_parts(file) for file in files]
    depth = [1] * len(files)
    while True:
        names = ["-".join(p[-d:]) for p, d in zip(parts, depth)]
        # More folders do not tell files of one folder apart: they are numbered instead.
        met: dict[str, set[str]] = {}
        for name, part in zip(names, parts):
            met.setdefault(name.casefold(), set()).add("/".join(part).casefold())
        meet = [
            i
            for i, name in enumerate(names)
            if len(met[name.casefold()]) > 1 and depth[i] < len(parts[i])
        ]
        if not meet:
            taken: set[str] = set()
            return [_free(name, taken) for name in names]
        for i in meet:
            depth[i] += 1


def _parts(file: Path) -> list[str]:
    """Folders and name of a file, without parts that consist only of words like POSCAR."""
    file = file.with_name(plain_name(file))
    whole = is_poscar(file) and file.suffix.lower() not in (".vasp", ".poscar")
    name = file.name if whole else file.stem  # of POSCAR.mp-1, the suffix is the name
    parts = (*file.absolute().parts[1:-1], name)
    found = [_WORDS.sub("-", printable(part)).strip("-") for part in parts]
    return [part for part in found if part] or ["structure"]


def _free(name: str, taken: set[str]) -> str:
    """The name, with a number if it is taken; adds it to ``taken``."""
    result, number = name, 2
    while result.casefold() in taken:
        result, number = f"{name}-{number}", number + 1
    taken.add(result.casefold())
    return result
