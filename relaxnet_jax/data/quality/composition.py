"""Energies compared with fitted energies of the elements, robustly and separately per source."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np
from scipy import sparse

# Rounds of reweighting; the residuals of all sets tried converge within 20.
_ROUNDS = 50
# eV/atom; smaller residuals have equal weight in the fit, and no source has a smaller scale.
FLOOR = 0.02
_BLOCK = 8192  # rows of a table built at a time
# An element's energy counts as known if at least this many relaxations contain it; with fewer, the
# fit would follow a wrong one.
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
        # Flat arrays: many small ones would take twenty times the memory.
        self._numbers, self._counts, self._ends = array("B"), array("I"), array("q", [0])

    def add(self, i: int, atomic_numbers: np.ndarray, energy: float, source: str) -> None:
        """Adds relaxation ``i`` (in order): (N,) atomic numbers, total energy in eV, source."""
        numbers, counts = np.unique(atomic_numbers, return_counts=True)
        self._numbers.extend(numbers.tolist())
        self._counts.extend(counts.tolist())
        self._ends.append(len(self._numbers))
        self.energies[i] = energy / counts.sum()
        self.sources[i] = self._codes.setdefault(source, len(self._codes))

    def deviations(self) -> tuple[np.ndarray, np.ndarray]:
        """Residuals from the composition energies of each source, and their typical size.

        Composition energies are the least-absolute-deviations fit E/N = sum_Z x_Z eps_Z.

        Returns:
          (R,) residuals and (R,) scales (1.4826 median |residual| of the source, at least
          20 meV), eV/atom; NaN if a relaxation cannot be judged, because its source has too few
          relaxations for their elements, or one of its elements occurs in fewer than 3.
        """
        n = len(self.energies)
        residuals, scales = np.full(n, np.nan), np.full(n, np.nan)
        order = np.argsort(self.sources, kind="stable")
        edges = np.flatnonzero(np.diff(self.sources[order])) + 1
        for rows in np.split(order, edges):
            rows = self._judged(rows[np.isfinite(self.energies[rows])])
            if len(rows):
                residuals[rows] = self._least_absolute(rows)
                scales[rows] = max(FLOOR, 1.4826 * float(np.median(np.abs(residuals[rows]))))
        return residuals, scales

    def _tables(self, rows: np.ndarray) -> Iterator[tuple[slice, sparse.csr_matrix]]:
        """Yields the fractions of the 119 elements block by block: (slice of ``rows``, (k, 119))."""
        numbers, counts, ends = map(np.asarray, (self._numbers, self._counts, self._ends))
        for begin in range(0, len(rows), _BLOCK):
            part = slice(begin, begin + _BLOCK)
            lengths = ends[rows[part] + 1] - ends[rows[part]]
            own = np.concatenate([[0], np.cumsum(lengths)])
            places = np.arange(own[-1]) + np.repeat(ends[rows[part]] - own[:-1], lengths)
            table = sparse.csr_matrix(
                (counts[places].astype(float), numbers[places].astype(np.int32), own),
                shape=(len(lengths), 119),
            )
            table.data /= np.repeat(np.asarray(table.sum(axis=1)).ravel(), lengths)
            yield part, table

    def _judged(self, rows: np.ndarray) -> np.ndarray:
        """The rows whose elements each occur in MIN_RELAXATIONS such rows; none if there are too few."""
        while len(rows):
            counts = np.sum([table.getnnz(axis=0) for _, table in self._tables(rows)], axis=0)
            rare = ((counts > 0) & (counts < MIN_RELAXATIONS)).astype(float)
            if not rare.any():
                return rows if len(rows) > 2 * np.count_nonzero(counts) else rows[:0]
            rows = rows[np.concatenate([table @ rare == 0 for _, table in self._tables(rows)])]
        return rows

    def _least_absolute(self, rows: np.ndarray) -> np.ndarray:
        """Residuals of the least-absolute-deviations fit, by iteratively reweighted least squares."""
        # Relative to the median, so that absurd energies do not cost the others precision.
        target = self.energies[rows]
        target -= np.median(target)
        residuals = target
        for k in range(_ROUNDS):
            weights = 1.0 / np.maximum(np.abs(residuals), FLOOR) if k else np.ones(len(target))
            normal, right = np.zeros((119, 119)), np.zeros(119)
            for part, table in self._tables(rows):
                weighted = table.multiply(weights[part, None]).tocsr()
                normal += (table.T @ weighted).toarray()
                right += weighted.T @ target[part]
            solution = np.linalg.pinv(normal, rcond=1e-10, hermitian=True) @ right
            fitted = np.concatenate([table @ solution for _, table in self._tables(rows)])
            before, residuals = residuals, target - fitted
            if np.abs(residuals - before).max() < 1e-3 * FLOOR:
                break
        return residuals
