"""Medians of atomic charges by element, from histograms of constant size."""

from __future__ import annotations

import numpy as np

BIN = 0.01  # e
RANGE = 20.0  # e; charges beyond it are counted in the outermost bins


class Charges:
    """Counts of atomic charges by element and bin, and the ``rows`` of relaxations with charges."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self._bins: dict[int, np.ndarray] = {}
        self._centres: dict[int, tuple[float, float]] = {}

    def add(self, i: int, atomic_numbers: np.ndarray, charges: np.ndarray) -> None:
        """Counts the charges (N,), e, of relaxation ``i`` with atomic numbers (N,)."""
        self.rows.append(i)
        n = int(2 * RANGE / BIN)
        places = np.clip(np.floor((charges + RANGE) / BIN), 0, n - 1).astype(int)
        for z in np.unique(atomic_numbers).tolist():
            counts = np.bincount(places[atomic_numbers == z], minlength=n)
            self._bins[z] = self._bins.get(z, 0) + counts

    def centres(self, atomic_numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Medians and robust standard deviations (1.4826 MAD) for the element of each atom.

        Call this once all relaxations have been counted.

        Returns:
          (N,) and (N,), e, accurate to within a bin.
        """
        for z in set(atomic_numbers.tolist()) - set(self._centres):
            counts = self._bins[z]
            values = (np.arange(len(counts)) + 0.5) * BIN - RANGE
            median = _weighted_median(values, counts)
            spread = _weighted_median(np.abs(values - median), counts)
            self._centres[z] = median, 1.4826 * spread
        both = np.array([self._centres[z] for z in atomic_numbers.tolist()])
        return both[:, 0], both[:, 1]


def _weighted_median(values: np.ndarray, counts: np.ndarray) -> float:
    order = np.argsort(values, kind="stable")
    total = np.cumsum(counts[order])
    return float(values[order][np.searchsorted(total, total[-1] / 2)])
