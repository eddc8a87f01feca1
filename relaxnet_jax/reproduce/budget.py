"""How a report's time is divided among its runs."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping

from relaxnet_jax.config import Config

# Relative times, in units of the explicit scheme with 5 frames and RK4. The implicit scheme
# evaluates its encoder at every stage, the direct predictor only once.
LATENT = {"explicit": 1.0, "implicit": 3.0, "static": 1.0, "direct": 0.5}
RULE = (
    "weights: explicit 1, implicit 3, each times frames/5 and substeps, doubled for tsit5; static 1, "
    "direct 0.5; all times the square root of the fraction of the training relaxations used"
)


def weight_of(config: Config, share: float = 1.0) -> float:
    """The weight of a run; see `RULE`."""
    d = config.dynamics
    weight = LATENT[d.latent] * share**0.5
    if d.latent in ("explicit", "implicit"):
        weight *= d.frames / 5 * d.substeps * (2.0 if d.solver == "tsit5" else 1.0)
    return weight


def divide(minutes: float, weights: Mapping[str, float]) -> dict[str, float]:
    """Divides ``minutes`` in proportion to the weights."""
    total = sum(weights.values())
    return {name: minutes * weight / total for name, weight in weights.items()}


def clock(minutes: Iterable[float], jobs: int) -> float:
    """Wall-clock minutes of runs trained ``jobs`` at a time, the longest first."""
    ends = [0.0] * jobs
    for own in sorted(minutes, reverse=True):
        heapq.heapreplace(ends, ends[0] + own)
    return max(ends)
