"""The data set of a run: finding, limiting and splitting its relaxations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from relaxnet_jax.config import Config
from relaxnet_jax.data.generate import default_dataset
from relaxnet_jax.data.relaxations import Relaxations
from relaxnet_jax.data.split_file import read_splits
from relaxnet_jax.data.splits import Splits, split_groups
from relaxnet_jax.data.store import TrajectoryStore
from relaxnet_jax.errors import InputError

SPLITS = Splits._fields


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Relaxations and the split each belongs to.

    Attributes:
      trajectories: all relaxations that are used.
      splits: indices into ``trajectories`` by split name.
      left_out: number of relaxations left out, by reason.
    """

    trajectories: Relaxations
    splits: dict[str, np.ndarray]
    left_out: dict[str, int]

    @property
    def name(self) -> str:
        """Name of the data set, for captions."""
        return self.trajectories.name

    def ids(self) -> dict[str, list[str]]:
        """Relaxation ids by split."""
        ids = self.trajectories.ids
        return {k: [ids[i] for i in v] for k, v in self.splits.items()}


def read_trajectories(
    path: str, config: Config, report: Callable[[str], None]
) -> tuple[Relaxations, dict[str, int]]:
    """Reads all relaxations of a store (or of the generated data) that the model can follow.

    Returns:
      The relaxations, read from disk when indexed, and the number of those left out by reason.

    Raises:
      InputError: there is no such store, or it has relaxations with a changing cell that may not be
        dropped, or only such relaxations.
    """
    generated = path == "emt"
    file = default_dataset(config.data.n_emt, 0, report) if generated else path
    store = TrajectoryStore(file)
    if store.incomplete:
        report(
            f"{path}: not complete, {len(store)} relaxations so far: rerun the command that makes it"
        )
    name = "EMT alloys (generated, not DFT)" if generated else str(path)
    if config.dynamics.cell == "variable":  # such a model follows fixed cells too
        return Relaxations(store, np.arange(len(store)), name), {}
    changes = store.variable_cell()
    left_out = {"the cell changes": int(changes.sum())} if changes.any() else {}
    if changes.any() and config.data.variable_cell == "error":
        raise InputError(
            f"{path}: the cell changes in {changes.sum()} of {len(store)} relaxations, which this "
            "fixed-cell model cannot follow; train one that can (explicit_cell.py, or "
            "dynamics.cell=variable), or leave them out with --set data.variable_cell=drop"
        )
    if changes.all():
        raise InputError(
            f"{path}: no relaxation with a fixed cell; import some, or use data.path=emt"
        )
    return Relaxations(store, np.flatnonzero(~changes), name), left_out


def load_dataset(config: Config, report: Callable[[str], None] = lambda _: None) -> Dataset:
    """Finds, limits and splits the relaxations of ``config.data``.

    Raises:
      InputError: see `read_trajectories`, `splits.split_groups` and `split_file.read_splits`.
    """
    found, left_out = read_trajectories(config.data.path, config, report)
    limit = config.data.limit
    if limit and limit < len(found):
        chosen = np.random.default_rng(config.data.seed).permutation(len(found))[:limit]
        found = found.take(np.sort(chosen))
    data = config.data
    if data.split_file:
        ids, known = found.ids, set(found.store.ids)
        splits, unnamed = read_splits(data.split_file, ids, data.fold, known)
        if unnamed:
            left_out[f"not named in {data.split_file}"] = unnamed
    else:
        name = f"data.path {data.path}"
        splits = split_groups(found.groups, data.splits, data.fold, data.seed, name)
    return Dataset(found, splits._asdict(), left_out)
