"""What all experiments of a report share: data, splits, seeds, configurations."""

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
# What the command decides itself, and the option that says it.
_RESERVED = {
    "data.path": "--data",
    "train.max_minutes": "--budget",
    "train.seed": "--seeds",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Data, seeds and configurations of a report.

    Attributes:
      data: a store. out: the report's folder. seeds: of initialisation and shuffling.
      sources: config file by role (see `ROLES`). changes: "section.field=value" for all of them.
      folds: of the cross-validation. reference: an outside potential to compare with.
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
                raise InputError(f"--set {key}: is given by {_RESERVED[key]}")

    def config(self, role: str, **changes: Any) -> Config:
        """The configuration of a role with what an experiment changes (section__field=value)."""
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
                f"{source}: takes other relaxations or splits than explicit (data.limit, splits, fold, "
                "seed, split_file, dynamics.cell): all must be tested on the same; give them by --set"
            )
        return config

    def why_not(self, role: str) -> str:
        """Why a role cannot be trained with these settings; empty if it can.

        A direct predictor, for one, predicts no stresses.
        """
        try:
            self.config(role)
        except InputError as error:
            return str(error)
        return ""

    def need_fixed_cells(self, experiment: str) -> None:
        """Of experiments that take positions of one frame from those of another: where cells relax,
        the strain would count as displacement. Raises InputError there."""
        if self.config("explicit").dynamics.cell != "fixed":
            raise InputError(
                f"{experiment}: compares positions of different frames, which have different cells "
                "with dynamics.cell=variable; leave it out, or give --set dynamics.cell=fixed"
            )

    def run(self, role: str, seed: int, share: float = 1.0, label: str = "", **changes: Any) -> Run:
        """A training run.

        Args:
          role: of the configuration. seed: of the run.
          share: of the training split; smaller ones are parts of larger ones. label: of what is
            special about it.
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
        """Runs there were when the command began."""
        return FinishedRuns(self.out)

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The relaxations and the splits of the report. Raises InputError."""
        return load_dataset(self.config("explicit"))

    @functools.cached_property
    def checksum(self) -> str:
        """Of the store."""
        return self.dataset.trajectories.store.checksum

    @property
    def name(self) -> str:
        """Of the data, for captions."""
        return Path(self.dataset.name).name

    def write_shares(self, runs: Iterable[Run], report: Callable[[str], None]) -> None:
        """Writes the files of splits that these runs name."""
        for run in runs:
            path = Path(run.config.data.split_file)
            if path.parent == self.out / "splits" and not path.is_file():
                splits = self.dataset.splits
                part = Splits(self._part(run.relaxations), splits["validation"], splits["test"])
                write_splits(path, self.dataset.trajectories.ids, [part], {"of": self.name})
                report(f"{path}: {run.relaxations} of the training relaxations")

    def _training(self, config: Config) -> int:
        """Relaxations of a configuration's training split."""
        key = _selection(config)
        if key == _selection(self.config("explicit")):
            return len(self.dataset.splits["train"])
        if key not in self._sizes:
            self._sizes[key] = len(load_dataset(config).splits["train"])
        return self._sizes[key]

    def _part(self, count: int) -> np.ndarray:
        """Rows of the first so many of the training split in a random order, the same for all."""
        rows, seed = self.dataset.splits["train"], self.config("explicit").data.seed
        return np.sort(rows[np.random.default_rng(seed).permutation(len(rows))[:count]])

    def _count(self, share: float) -> int:
        return max(1, round(share * len(self.dataset.splits["train"])))

    def _share(self, share: float) -> tuple[Path, str]:
        """Where the splits of a share are, and the hash of their content."""
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
    """What decides which relaxations are trained and tested on."""
    d = config.data
    return d.limit, d.splits, d.fold, d.seed, d.split_file, d.n_emt, config.dynamics.cell
