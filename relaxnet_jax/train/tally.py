"""Sums over the batches of a training epoch and of a validation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from relaxnet_jax.config import LossConfig
from relaxnet_jax.losses import Term, weighted_loss


@dataclasses.dataclass
class Tally:
    """Sums over the batches of an epoch; saved in checkpoints, so that the epoch can be resumed.

    Attributes:
      batches: number of batches done.
      structures: number of structures in them.
      done: entries [devices, batches, shares], one for each number of devices, and of shares of a
        batch, that the epoch has run with in turn: the position in its plan, see
        `plan.remaining_runs`.
      skipped: number of batches without an update because their loss or gradient was not finite.
      seconds: time spent on the batches, without compilation.
      waited: the part of this time spent waiting for batches.
      sums: sum of each metric over the batches that were not skipped.
    """

    batches: int = 0
    structures: int = 0
    skipped: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    done: list[list[int]] = dataclasses.field(default_factory=list)

    def add(
        self, metrics: dict[str, float], structures: int, devices: int, shares: int = 1
    ) -> bool:
        """Adds a batch (one step on all devices); returns whether the step was an update."""
        last = self.done[-1] if self.done else None
        # Entries of two numbers, from earlier versions, are taken to have the present shares.
        if last is None or (last[0], *last[2:]) not in ((devices,), (devices, shares)):
            self.done.append(last := [devices, 0, shares])
        last[1:] = [last[1] + 1, shares]
        self.batches, self.structures = self.batches + 1, self.structures + structures
        if not metrics["finite"]:
            self.skipped += 1
            return False
        for name, value in metrics.items():
            if name != "finite":
                self.sums[name] = self.sums.get(name, 0.0) + value
        return True

    def means(self) -> dict[str, float]:
        """Means of all metrics; only a loss of NaN if there was no update."""
        n = self.batches - self.skipped
        return {name: value / n for name, value in self.sums.items()} if n else {"loss": math.nan}

    def record(self) -> dict[str, Any]:
        """The training part of the epoch's record."""
        spent = max(self.seconds, 1e-9)
        return {
            "train": self.means(),
            "skipped": self.skipped,
            "structures_per_second": self.structures / spent,
            "waiting": self.waited / spent,
        }


class ValidationTally:
    """Sums of loss terms over the validation batches whose terms are all finite.

    The others are left out: one structure that the model cannot handle would turn every mean of the
    run into NaN.

    Attributes:
      batches: number of batches done.
      skipped: number of these that were left out.
    """

    def __init__(self) -> None:
        self.batches = self.skipped = 0
        self._sums: dict[str, np.ndarray] = {}

    def add(self, terms: dict[str, Term]) -> bool:
        """Adds a batch; returns whether it counts."""
        values = {name: np.array([t.total, t.number], np.float64) for name, t in terms.items()}
        finite = all(np.isfinite(v).all() for v in values.values())
        self.batches, self.skipped = self.batches + 1, self.skipped + (not finite)
        for name, value in values.items():
            before = self._sums.get(name, np.zeros(2))
            self._sums[name] = before + value if finite else before
        return finite

    def means(self, config: LossConfig) -> dict[str, float]:
        """Means of the loss and of every term; NaN if no batch counts."""
        if self.batches == self.skipped:
            return {"loss": math.nan} | dict.fromkeys(self._sums, math.nan)
        terms = {name: Term(total, number) for name, (total, number) in self._sums.items()}
        loss, _ = weighted_loss(terms, config)
        return {"loss": float(loss)} | {name: float(t.mean()) for name, t in terms.items()}
