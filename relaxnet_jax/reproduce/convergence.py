"""Convergence of a run: the wall times at which its validation loss had fallen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

LEVELS = (0.85, 0.95, 0.99)
RULE = (
    "x % convergence is the wall time, compilation included, until the validation loss has fallen by x % "
    "of the way from its value after the first epoch to the best of the run"
)


def convergence_seconds(
    records: Sequence[Mapping[str, Any]], levels: Sequence[float] = LEVELS
) -> list[float | None]:
    """Seconds until the validation loss has fallen by each of ``levels``; None without a fall.

    Args:
      records: of ``metrics.jsonl``, with seconds since the start and validation loss of each epoch.
      levels: fractions of the whole fall.
    """
    found = [(r["seconds"], r["validation"]["loss"]) for r in records]
    curve = [(s, v) for s, v in found if v is not None and math.isfinite(v)]
    if not curve:
        return [None] * len(levels)
    first, best = curve[0][1], min(v for _, v in curve)
    if not best < first:
        return [None] * len(levels)
    return [next(s for s, v in curve if first - v >= level * (first - best)) for level in levels]
