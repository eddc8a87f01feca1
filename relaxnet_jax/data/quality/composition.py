"""Energies against those of the elements a structure is made of, robustly and per source."""

from __future__ import annotations

from array import array

import numpy as np
from scipy import sparse

# Rounds of reweighting; the residuals of all sets tried settle within 20.
_ROUNDS = 50
# eV/atom; residuals below it count alike in the fit, and no family is narrower than it.
FLOOR = 0.02
# An element's energy is known where this many relaxations hold it; with fewer, the fit follows
# whichever is wrong.
MIN_RELAXATIONS = 3


class Compositions:
    """Composition and final energy per atom of many relaxations, in a few bytes each.

    Args:
      n: number of relaxations.
    """

    def __init__(self, n: int) -> None:
        self.energies = np.full(n, np.nan)
        self.sources = np.zeros(n, dtype=np.int64)
        self._codes: dict[str, int] = {}
        # Flat: as many small arrays they would take twenty times the memory.
        self._numbers, self._fractions, self._ends = array("B"), array("d"), array("q", [0])

    def add(self, i: int, atomic_numbers: np.ndarray, energy: float, source: str) -> None:
        """Takes relaxation ``i`` (in order): (N,) int, total energy in eV."""
        numbers, counts = np.unique(atomic_numbers, return_counts=True)
        self._numbers.extend(numbers.tolist())
        self._fractions.extend((counts / counts.sum()).tolist())
        self._ends.append(len(self._numbers))
        self.energies[i] = energy / counts.sum()
        self.sources[i] = self._codes.setdefault(source, len(self._codes))

    def deviations(self) -> tuple[np.ndarray, np.ndarray]:
        """Residuals from the composition energies of each source, and their usual size.

        Composition energies are the least-absolute-deviations fit E/N = sum_Z x_Z eps_Z.

        Returns:
          (R,) residuals and (R,) scales (1.4826 median |residual| of the source, at least
          20 meV), eV/atom; NaN where it cannot be judged: the source has too few relaxations
          for its elements, or one of its elements occurs in fewer than 3.
        """
        n = len(self.energies)
        fractions, numbers, ends = map(np.array, (self._fractions, self._numbers, self._ends))
        table = sparse.csr_matrix((fractions, numbers.astype(np.int64), ends), shape=(n, 119))
        residuals, scales = np.full(n, np.nan), np.full(n, np.nan)
        order = np.argsort(self.sources, kind="stable")
        edges = np.flatnonzero(np.diff(self.sources[order])) + 1
        for rows in np.split(order, edges):
            rows = rows[np.isfinite(self.energies[rows])]
            kept = _judged(table[rows])
            rows = rows[kept]
            if not len(rows):
                continue
            part = table[rows]
            part = part[:, np.flatnonzero(part.getnnz(axis=0))]
            residuals[rows] = _least_absolute(part, self.energies[rows])
            scales[rows] = max(FLOOR, 1.4826 * float(np.median(np.abs(residuals[rows]))))
        return residuals, scales


def _judged(table: sparse.csr_matrix) -> np.ndarray:
    """(R,) bool: rows whose elements are all in MIN_RELAXATIONS such rows; none if too few."""
    kept = np.ones(table.shape[0], dtype=bool)
    while True:
        counts = np.asarray(table[kept].getnnz(axis=0))
        rare = (counts > 0) & (counts < MIN_RELAXATIONS)
        hit = kept & (table @ rare.astype(float) > 0)
        if not hit.any():
            break
        kept &= ~hit
    if kept.sum() < 2 * np.count_nonzero(counts) + 1:
        kept[:] = False
    return kept


def _least_absolute(fractions: sparse.csr_matrix, energies: np.ndarray) -> np.ndarray:
    """Residuals of the least-absolute-deviations fit, by reweighted least squares."""
    # About the median, so that absurd energies leave digits to the others.
    centre = np.median(energies)
    target = energies - centre
    weights = np.ones(len(target))
    residuals = target
    for _ in range(_ROUNDS):
        weighted = fractions.multiply(weights[:, None]).tocsr()
        normal = (fractions.T @ weighted).toarray()
        solution = np.linalg.pinv(normal, rcond=1e-10, hermitian=True) @ (weighted.T @ target)
        before, residuals = residuals, target - fractions @ solution
        weights = 1.0 / np.maximum(np.abs(residuals), FLOOR)
        if np.abs(residuals - before).max() < 1e-3 * FLOOR:
            break
    return residuals
