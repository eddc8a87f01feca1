"""What the batches of an epoch, and of a validation, add up to."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from relaxnet_jax.config import LossConfig
from relaxnet_jax.losses import Term, weighted_loss


@dataclasses.dataclass
class Tally:
    """Sums over the batches of an epoch; goes into a checkpoint, so that it can be taken up again.

    Attributes:
      batches: done. structures: in them.
      done: [devices, batches, shares], one for each number of devices and shares of a batch the epoch
        has run with in turn: the position in its plan, see `plan.remaining_runs`.
      skipped: batches without an update, their loss or gradient not being finite.
      seconds: spent on them without compiling. waited: of these, until a batch was there.
      sums: of each metric over the batches that were not skipped.
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
        """Takes a batch (one step, of all devices) in; returns whether it was an update."""
        last = self.done[-1] if self.done else None
        # Of two numbers, as once written, it was with the shares of whoever goes on.
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
        """Of every metric; a loss that is not a number where nothing was added."""
        n = self.batches - self.skipped
        return {name: value / n for name, value in self.sums.items()} if n else {"loss": math.nan}

    def record(self) -> dict[str, Any]:
        """What an epoch's record says of its training."""
        spent = max(self.seconds, 1e-9)
        return {
            "train": self.means(),
            "skipped": self.skipped,
            "structures_per_second": self.structures / spent,
            "waiting": self.waited / spent,
        }


class ValidationTally:
    """Sums of loss terms over validation batches. Those that are not finite are left out: one
    structure beyond the model would make every mean of the run a NaN.

    Attributes:
      batches: done. skipped: of them, left out.
    """

    def __init__(self) -> None:
        self.batches = self.skipped = 0
        self._sums: dict[str, np.ndarray] = {}

    def add(self, terms: dict[str, Term]) -> bool:
        """Takes a batch in; returns whether it counts."""
        values = {name: np.array([t.total, t.number], np.float64) for name, t in terms.items()}
        finite = all(np.isfinite(v).all() for v in values.values())
        self.batches, self.skipped = self.batches + 1, self.skipped + (not finite)
        for name, value in values.items():
            before = self._sums.get(name, np.zeros(2))
            self._sums[name] = before + value if finite else before
        return finite

    def means(self, config: LossConfig) -> dict[str, float]:
        """The loss and every term; NaN where no batch counts."""
        if self.batches == self.skipped:
            return {"loss": math.nan} | dict.fromkeys(self._sums, math.nan)
        terms = {name: Term(total, number) for name, (total, number) in self._sums.items()}
        loss, _ = weighted_loss(terms, config)
        return {"loss": float(loss)} | {name: float(t.mean()) for name, t in terms.items()}
