"""The data set of a run: relaxations found, checked, split."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from relaxnet_jax.config import Config
from relaxnet_jax.data.generate import default_dataset
from relaxnet_jax.data.pipeline import Sample, make_sample
from relaxnet_jax.data.splits import split_groups
from relaxnet_jax.data.store import TrajectoryStore
from relaxnet_jax.data.trajectory import RelaxationTrajectory
from relaxnet_jax.errors import InputError

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Relaxations and the split each belongs to.

    Attributes:
      trajectories: all that are used. splits: indices by split name.
      left_out: reason -> count.
      name: for captions.
    """

    trajectories: list[RelaxationTrajectory]
    splits: dict[str, np.ndarray]
    left_out: dict[str, int]
    name: str

    def ids(self) -> dict[str, list[str]]:
        """Relaxation ids by split."""
        return {k: [self.trajectories[i].id for i in v] for k, v in self.splits.items()}


def read_trajectories(
    path: str, config: Config, report: Callable[[str], None]
) -> tuple[list[RelaxationTrajectory], dict[str, int], str]:
    """All relaxations of a store (or of the generated data) that a fixed-cell model can use.

    Raises:
      InputError: no such store, or relaxations with a changing cell that are not to be dropped.
    """
    generated = path == "emt"
    file = default_dataset(config.data.n_emt, 0, report) if generated else path
    left_out: dict[str, int] = {}
    with TrajectoryStore(file) as store:
        found = [store[i] for i in range(len(store))]
    kept = [t for t in found if not t.variable_cell]
    changing = len(found) - len(kept)
    if changing and config.data.variable_cell == "error":
        raise InputError(
            f"{path}: the cell changes in {changing} of {len(found)} relaxations, which this "
            "fixed-cell model cannot follow; leave them out with --set data.variable_cell=drop"
        )
    if changing:
        left_out["the cell changes"] = changing
    if not kept:
        raise InputError(
            f"{path}: no relaxation with a fixed cell; import some, or use data.path=emt"
        )
    return kept, left_out, "EMT alloys (generated, not DFT)" if generated else str(path)


def load_dataset(config: Config, report: Callable[[str], None] = lambda _: None) -> Dataset:
    """Reads, limits and splits the relaxations of ``config.data``.

    Raises:
      InputError: see `read_trajectories` and `splits.split_groups`.
    """
    trajectories, left_out, name = read_trajectories(config.data.path, config, report)
    limit = config.data.limit
    if limit and limit < len(trajectories):
        chosen = np.random.default_rng(config.data.seed).permutation(len(trajectories))[:limit]
        trajectories = [trajectories[i] for i in sorted(chosen)]
    splits = split_groups(
        [t.group for t in trajectories], config.data.splits, config.data.fold, config.data.seed
    )
    return Dataset(trajectories, dict(zip(SPLITS, splits)), left_out, name)


def make_samples(
    trajectories: Sequence[RelaxationTrajectory],
    config: Config,
    element_energies: np.ndarray,
    seen: np.ndarray,
    report: Callable[[str], None],
) -> list[Sample | None]:
    """Training samples; None, with a reported reason, for a structure that cannot be used."""
    samples: list[Sample | None] = []
    for t in trajectories:
        sample = None
        if not seen[t.atomic_numbers].all():
            report(f"{t.id}: left out: contains an element absent from the training split")
        else:
            try:
                sample = make_sample(t, config, element_energies)
            except InputError as error:
                report(f"left out: {error}")
        samples.append(sample)
    return samples
