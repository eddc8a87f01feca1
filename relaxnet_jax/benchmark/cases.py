"""The structures of ``benchmark steps``: unseen relaxations of a store, or structure files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from relaxnet_jax.data.split_file import run_splits
from relaxnet_jax.errors import InputError
from relaxnet_jax.relaxation.inputs import Hold, find_files, read_inputs
from relaxnet_jax.structure_files import Failure

if TYPE_CHECKING:
    from ase import Atoms

Say = Callable[[str], None]


class Case(NamedTuple):
    """One structure to relax.

    Attributes:
      name: unique name.
      atoms: the initial structure, with constraints, without calculator.
      relax_cell: whether its cell is relaxed too.
    """

    name: str
    atoms: Atoms
    relax_cell: bool


def find_cases(
    named: Sequence[str], runs: Sequence[str], variable: bool, limit: int | None, say: Say
) -> tuple[list[Case], list[Failure]]:
    """The structures to relax, and failures for what cannot be read.

    Of a store, these are the first frames of the relaxations that are in the test split of every run,
    since only those are unseen by all. A run that was trained on another set leaves out none, nor does a
    model folder without a run beside it, which does not say what it was trained on. Relaxations that
    trained a model which a run started from are left out too.

    Args:
      named: stores ("emt": the generated data), structure files, and folders of them.
      runs: folders of the models that are compared.
      variable: whether cells are relaxed: those that relaxed in a store's relaxations, and those of all
        periodic structures in files.
      limit: largest number of structures, drawn at random, the same ones each time; None for all.
      say: called with one line for each remark.

    Raises:
      InputError: there is no structure, or a store cannot be read.
    """
    stores = [name for name in named if _is_store(name)]
    files, failures = find_files([n for n in named if n not in stores], Path())
    inputs, unreadable = read_inputs(files, Hold())
    found = [Case(i.name, _bare(i.atoms), variable and bool(i.atoms.pbc.any())) for i in inputs]
    for name in stores:
        found += _unseen(name, runs, variable, say)
    taken: set[str] = set()
    for k, case in enumerate(found):
        if case.name in taken:
            found[k] = case._replace(name=f"{case.name}-{k}")
        taken.add(found[k].name)
    if not found:
        first = f": {(failures + unreadable)[0]}" if failures + unreadable else ""
        raise InputError(f"--structures {' '.join(named)}: no structure to relax{first}")
    if limit is not None and limit < len(found):
        chosen = np.random.default_rng(0).permutation(len(found))[:limit]
        found = [found[k] for k in sorted(chosen)]
    return found, failures + unreadable


def _is_store(name: str) -> bool:
    path = Path(name)
    return name == "emt" or path.suffix in (".h5", ".hdf5") or any(path.glob("*.h5"))


def _unseen(name: str, runs: Sequence[str], variable: bool, say: Say) -> list[Case]:
    from relaxnet_jax.data.generate import default_dataset
    from relaxnet_jax.data.store import TrajectoryStore
    from relaxnet_jax.model import member_folders
    from relaxnet_jax.train.start import trained_ids

    with TrajectoryStore(default_dataset(report=say) if name == "emt" else name) as store:
        ids = store.ids
        keep = set(ids)
        for run, folder in [(name, folder) for name in runs for folder in member_folders(name)]:
            found = run_splits(folder)
            before = trained_ids(str(folder))
            if found is None:
                say(f"{run}: training data unknown; all of {name} is used")
            elif any(keep.intersection(members) for members in found[1].values()):
                keep &= set(found[1]["test"])
            elif not keep & before:
                say(f"{run}: trained on other data; all of {name} is used")
            if seen := len(keep & before):
                say(f"{run}: started from a model trained on {seen} of {name}; these are left out")
            keep -= before
        if not keep:
            raise InputError(
                f"--structures {name}: no relaxation is in the test split of all models; give "
                "models trained with the same splits (data.split_file), or other structures"
            )
        rows = [row for row, key in enumerate(ids) if key in keep]
        changes = store.variable_cell()
        return [Case(ids[k], _bare(store[k].atoms(0)), variable and bool(changes[k])) for k in rows]


def _bare(atoms: Atoms) -> Atoms:
    copy = atoms.copy()  # leaves out the calculator
    copy.set_initial_magnetic_moments(None)
    return copy
