"""What all experiments of a report share: data, splits, seeds and configurations."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from relaxnet_jax.config import Config, load_config
from relaxnet_jax.data.dataset import Dataset, load_dataset
from relaxnet_jax.data.generation.calculators import Calculator
from relaxnet_jax.data.split_file import write_splits
from relaxnet_jax.data.splits import Splits
from relaxnet_jax.errors import InputError
from relaxnet_jax.reproduce.budget import weight_of
from relaxnet_jax.reproduce.runs import FinishedRuns, Run
from relaxnet_jax.train.start import start_facts

ROLES = ("explicit", "implicit", "static", "egnn", "static_final")
SHOWN = {"static_final": "direct"}
# Fields that the command sets itself, and the options that determine them.
_RESERVED = {
    "data.path": "--data",
    "train.max_minutes": "--budget",
    "train.seed": "--seeds",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Data, seeds and configurations of a report.

    Attributes:
      data: path of the store.
      out: the report's folder.
      seeds: seeds of initialisation and shuffling.
      sources: config file by role (see `ROLES`).
      changes: "section.field=value" items, applied to every configuration.
      folds: number of folds of the cross-validation.
      reference: an outside potential to compare with, if any.
    """

    data: str
    out: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    changes: tuple[str, ...] = ()
    folds: int = 5
    reference: Calculator | None = None
    _sizes: dict[tuple, int] = dataclasses.field(default_factory=dict, repr=False)
    _shares: dict[float, tuple[Path, str]] = dataclasses.field(default_factory=dict, repr=False)
    _configs: dict[str, Config] = dataclasses.field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for item in self.changes:
            key = item.partition("=")[0].strip()
            if key in _RESERVED:
                raise InputError(f"--set {key}: use {_RESERVED[key]} instead")

    def config(self, role: str, **changes: Any) -> Config:
        """The configuration of a role with an experiment's changes (section__field=value)."""
        if role not in self._configs:
            self._configs[role] = self._read(role)
        config = self._configs[role]
        own = {key.replace("__", "."): value for key, value in changes.items()}
        return load_config(dataclasses.asdict(config), own) if own else config

    def _read(self, role: str) -> Config:
        source = self.sources.get(role, f"{role}.py")
        base = {"data.path": self.data, "data.variable_cell": "drop"}
        config = load_config(dataclasses.asdict(load_config(source, base)), self.changes)
        if role != "explicit" and _selection(config) != _selection(self.config("explicit")):
            raise InputError(
                f"{source}: selects other relaxations or splits than explicit (data.limit, splits, fold, seed, "
                "split_file, dynamics.cell); all must be tested on the same: set these fields with --set"
            )
        return config

    def why_not(self, role: str) -> str:
        """Why a role cannot be trained with these settings; empty if it can.

        For example, a direct predictor predicts no stresses.
        """
        try:
            self.config(role)
        except InputError as error:
            return str(error)
        return ""

    def need_fixed_cells(self, experiment: str) -> None:
        """Rejects variable cells for experiments that compare positions of different frames.

        Where cells relax, the strain would count as displacement.

        Raises:
          InputError: cells relax with these settings.
        """
        if self.config("explicit").dynamics.cell != "fixed":
            raise InputError(
                f"{experiment}: compares positions of different frames, which have different cells "
                "with dynamics.cell=variable; omit this experiment, or use --set dynamics.cell=fixed"
            )

    def run(self, role: str, seed: int, share: float = 1.0, label: str = "", **changes: Any) -> Run:
        """A training run.

        Args:
          role: the role whose configuration is used.
          seed: seed of the run.
          share: fraction of the training split; smaller shares are subsets of larger ones.
          label: what is special about the run, for its name.
          changes: section__field=value.
        """
        config = self.config(role, train__seed=seed, **changes)
        split, count = "", self._training(config)
        if share < 1.0:
            if changes.keys() & {"data__fold", "data__splits"}:
                raise ValueError("a share is of the training split of the report")
            file, split = self._share(share)
            data = dataclasses.replace(config.data, split_file=str(file), fold=0)
            config, count = dataclasses.replace(config, data=data), self._count(share)
        start = start_facts(config).get("started_from", "")
        special = f", {label}" if label else ""
        split = split or self._own_split_file(config)
        return Run(
            f"{SHOWN.get(role, role)}{special}, seed {seed}",
            config,
            weight_of(config, share),
            self._finished.digest(config, self.checksum, split, start),
            count,
        )

    @functools.cached_property
    def _finished(self) -> FinishedRuns:
        """Runs that were already finished when the command began."""
        return FinishedRuns(self.out)

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The relaxations and splits of the report. Raises InputError."""
        return load_dataset(self.config("explicit"))

    @functools.cached_property
    def checksum(self) -> str:
        """Checksum of the store."""
        return self.dataset.trajectories.store.checksum

    @property
    def name(self) -> str:
        """Name of the data, for captions."""
        return Path(self.dataset.name).name

    def write_shares(self, runs: Iterable[Run], report: Callable[[str], None]) -> None:
        """Writes the split files of shares that these runs use, unless they exist."""
        for run in runs:
            path = Path(run.config.data.split_file)
            if path.parent == self.out / "splits" and not path.is_file():
                splits = self.dataset.splits
                part = Splits(self._part(run.relaxations), splits["validation"], splits["test"])
                write_splits(path, self.dataset.trajectories.ids, [part], {"of": self.name})
                report(f"{path}: {run.relaxations} of the training relaxations")

    def _training(self, config: Config) -> int:
        """Number of relaxations in a configuration's training split."""
        key = _selection(config)
        if key == _selection(self.config("explicit")):
            return len(self.dataset.splits["train"])
        if key not in self._sizes:
            self._sizes[key] = len(load_dataset(config).splits["train"])
        return self._sizes[key]

    def _part(self, count: int) -> np.ndarray:
        """The first ``count`` training rows in a random order common to all counts, sorted."""
        rows, seed = self.dataset.splits["train"], self.config("explicit").data.seed
        return np.sort(rows[np.random.default_rng(seed).permutation(len(rows))[:count]])

    def _count(self, share: float) -> int:
        return max(1, round(share * len(self.dataset.splits["train"])))

    def _share(self, share: float) -> tuple[Path, str]:
        """Path of the split file of a share, and the hash of its content."""
        if share not in self._shares:
            ids, splits, count = (
                self.dataset.trajectories.ids,
                self.dataset.splits,
                self._count(share),
            )
            rows = [self._part(count), splits["validation"], splits["test"]]
            content = json.dumps([[ids[i] for i in part] for part in rows])
            digest = hashlib.sha256(content.encode()).hexdigest()
            file = self.out / "splits" / f"{count}-{digest[:8]}.json"
            self._shares[share] = file, digest
        return self._shares[share]

    def _own_split_file(self, config: Config) -> str:
        file = config.data.split_file
        return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


def _selection(config: Config) -> tuple:
    """The settings that decide which relaxations are trained and tested on."""
    d = config.data
    return d.limit, d.splits, d.fold, d.seed, d.split_file, d.n_emt, config.dynamics.cell
