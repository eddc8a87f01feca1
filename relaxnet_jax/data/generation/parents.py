"""Structures that relaxations are made from: those of the user, or mineral prototypes."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from relaxnet_jax.data.ase_io import fixed_atoms, text_of
from relaxnet_jax.data.files import one_line
from relaxnet_jax.data.generation.elements import names
from relaxnet_jax.data.generation.settings import Settings
from relaxnet_jax.errors import InputError

if TYPE_CHECKING:
    from ase import Atoms

PROTOTYPES = "prototypes"
_PROTOTYPE_FILE = "mineral_name_prototype.json"


class Parent(NamedTuple):
    """A structure to make relaxations from.

    Attributes:
      name: name, unique in the set, which becomes part of the ids of its relaxations.
      atoms: the structure, without calculator and with no constraint but ``FixAtoms``.
      group: group of all its relaxations, "" if none is given.
    """

    name: str
    atoms: Atoms
    group: str = ""


class Parents(NamedTuple):
    """The ``usable`` parents, and (name, reason) of each parent that was ``refused``."""

    usable: list[Parent]
    refused: list[tuple[str, str]]


def read_parents(structures: Sequence[str]) -> Parents:
    """Reads parents from files that ASE reads, one per image, and from the word "prototypes".

    The ``info`` of an image may name a ``group`` (or ``parent``); charges, magnetic moments and fixed
    atoms are kept.

    Raises:
      InputError: a file is missing, or nothing in it can be read.
    """
    from relaxnet_jax.structure_files import read_structures

    found: list[Parent] = []
    refused: list[tuple[str, str]] = []
    for given in structures:
        if given == PROTOTYPES:
            found += mineral_prototypes()
            continue
        path = Path(given)
        if not path.is_file():
            raise InputError(f"{path}: no such file: name structure files, or {PROTOTYPES}")
        images, bad = read_structures(path, lambda _: None)
        refused += bad
        for name, atoms in images:
            try:
                found.append(_parent(name, atoms))
            except InputError as error:
                refused.append((name, str(error)))
    usable: list[Parent] = []
    taken: set[str] = set()
    for parent in found:
        name, count = parent.name, 1
        while name in taken:
            count += 1
            name = f"{parent.name}-{count}"
        taken.add(name)
        usable.append(parent._replace(name=name))
    return Parents(usable, refused)


def _parent(name: str, atoms: Atoms) -> Parent:
    """Turns an image into a parent; raises InputError for constraints that cannot be kept."""
    from ase.constraints import FixAtoms, FixCartesian, FixScaled

    kept = FixAtoms | FixCartesian | FixScaled
    others = [c for c in atoms.constraints if not isinstance(c, kept)]
    if others:
        raise InputError(f"constraint {type(others[0]).__name__} cannot be kept: remove it")
    fixed = fixed_atoms(atoms)
    info = atoms.info.get("key_value_pairs", {}) | atoms.info
    copy = atoms.copy()
    copy.info = {}
    copy.set_constraint(FixAtoms(mask=fixed) if fixed.any() else None)
    return Parent(name, copy, text_of(info.get("group")) or text_of(info.get("parent")))


def mineral_prototypes() -> list[Parent]:
    """The mineral prototypes shipped with jarvis-tools: about 1,080 relaxed bulk crystals.

    The group of each is its prototype: stoichiometry, space group and number of atoms in the
    conventional cell, e.g. "AB_225_8" for rock salt.

    Raises:
      InputError: jarvis-tools is not installed, or its file is missing or damaged.
    """
    from ase import Atoms

    spec = importlib.util.find_spec("jarvis")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{PROTOTYPES}: jarvis-tools is not installed: pip install jarvis-tools")
    path = Path(spec.submodule_search_locations[0]) / "core" / f"{_PROTOTYPE_FILE}.zip"
    found = []
    try:
        with zipfile.ZipFile(path) as archive:
            table: dict[str, Any] = json.loads(archive.read(_PROTOTYPE_FILE))
        for label, entries in table.items():
            # Wyckoff letters depend on the choice of origin: copper and palladium, which have the
            # same structure, are A_225_a_4 and A_225_b_4.
            formula, space_group, _, n_atoms = label.split("_")
            for _, _, name, crystal in entries:
                where = "positions" if crystal["cartesian"] else "scaled_positions"
                atoms = Atoms(
                    crystal["elements"],
                    cell=np.array(crystal["lattice_mat"]),
                    pbc=True,
                    **{where: np.array(crystal["coords"])},
                )
                found.append(Parent(name, atoms, f"{formula}_{space_group}_{n_atoms}"))
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path}: no prototypes can be read ({one_line(error)}): pip install --upgrade "
            "--force-reinstall jarvis-tools"
        ) from error
    return found


def sift(found: Parents, settings: Settings, elements: Collection[int] | None) -> Parents:
    """Refuses the parents that the calculator or the settings cannot take.

    Args:
      found: all parents.
      settings: settings of the data set.
      elements: atomic numbers that the calculator supports, None for any.
    """
    usable, refused = [], list(found.refused)
    for parent in found.usable:
        reason = _refusal(parent.atoms, settings, elements)
        if reason:
            refused.append((parent.name, reason))
        else:
            usable.append(parent)
    return Parents(usable, refused)


def _refusal(atoms: Atoms, settings: Settings, elements: Collection[int] | None) -> str:
    """Why relaxations cannot be made from these atoms; "" if they can."""
    strangers = set() if elements is None else set(atoms.numbers.tolist()) - set(elements)
    if 0 in atoms.numbers:
        return "has atoms without an element"
    if strangers:
        return f"elements unknown to {settings.calculator}: {names(strangers)}"
    total = len(atoms) * int(np.prod(settings.supercell))
    if total > settings.max_atoms:
        return f"more than {settings.max_atoms} atoms: raise --max-atoms"
    periodic, volume = np.asarray(atoms.pbc), abs(np.linalg.det(atoms.cell.array))
    if periodic.any() and volume < 1.0:
        return f"cell without volume: {volume:.3g} Å³"
    if np.any(np.asarray(settings.supercell)[~periodic] > 1):
        return "not periodic: --supercell repeats along such a direction"
    if settings.relax_cell and not periodic.all():
        return "not periodic in all directions: leave out --relax-cell"
    if total == 1 and not settings.relax_cell:
        return "one atom in a fixed cell: give --supercell or --relax-cell"
    if settings.relax_cell and atoms.constraints:
        return "has fixed atoms: leave out --relax-cell"
    if atoms.constraints and len(atoms.constraints[0].index) == len(atoms):
        return "all atoms are fixed"
    if not np.isfinite(atoms.positions).all():
        return "positions are not finite"
    return ""
