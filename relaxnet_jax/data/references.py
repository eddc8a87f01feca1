"""The energy reference of a training set: composition energies, and the spread around them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

BLOCK = 1024  # rows between two reductions of the least-squares problem


def fit_element_energies(
    relaxations: Iterable[tuple[np.ndarray, np.ndarray]], n_elements: int
) -> tuple[np.ndarray, float, np.ndarray]:
    """Fits composition energies to the final frames, and measures the spread around them.

    Minimises sum_s (E_s - sum_i eps(Z_i))² / N_s². The minimum-norm solution is taken: if the
    compositions do not determine an element's energy alone, the combinations that occur are still
    right. The relaxations are visited once and not kept, since the problem is reduced as it grows
    (sequential QR).

    Args:
      relaxations: (atomic_numbers (N,), energies (n,) in eV) of each relaxation.
      n_elements: length of the table.

    Returns:
      The element energies (n_elements,), eV, zero for elements that do not occur; the standard
      deviation per atom over all frames, eV (at least 1 meV); and (n_elements,) bool, which elements
      occur.
    """
    final, mean = _LeastSquares(n_elements), _LeastSquares(n_elements)
    seen = np.zeros(n_elements, bool)
    n_frames, within, weighted = 0, 0.0, np.zeros(n_elements + 1)
    for numbers, energies in relaxations:
        fractions = np.bincount(numbers, minlength=n_elements) / len(numbers)
        per_atom = np.asarray(energies, np.float64) / len(numbers)
        seen |= fractions > 0
        final.add(np.append(fractions, per_atom[-1]))
        average, n = per_atom.mean(), len(per_atom)
        row = np.append(fractions, average)
        mean.add(np.sqrt(n) * row)
        weighted += n * row
        within += float(((per_atom - average) ** 2).sum())
        n_frames += n
    matrix = final.reduced()
    table = np.zeros(n_elements)
    table[seen] = np.linalg.lstsq(matrix[:, :-1][:, seen], matrix[:, -1], rcond=1e-10)[0]
    # Residuals of relaxation s: its frames scatter (within) around mean_s - f_s . table.
    combination = np.append(-table, 1.0)
    square = within + float(((mean.reduced() @ combination) ** 2).sum())
    bias = float(weighted @ combination) / n_frames
    spread = np.sqrt(max(square / n_frames - bias**2, 0.0))
    return table, float(max(spread, 1e-3)), seen


class _LeastSquares:
    """Rows [A | b] of a least-squares problem, stored as the factor R of their QR factorisation."""

    def __init__(self, n_columns: int) -> None:
        self.rows = [np.zeros((0, n_columns + 1))]
        self.waiting = 0

    def add(self, row: np.ndarray) -> None:
        """Adds an equation."""
        self.rows.append(row[None])
        self.waiting += 1
        if self.waiting >= BLOCK:
            self.reduced()

    def reduced(self) -> np.ndarray:
        """Reduces the rows to a matrix R with R^T R = [A | b]^T [A | b]."""
        stacked = np.concatenate(self.rows)
        if len(stacked) > stacked.shape[1]:
            stacked = np.asarray(np.linalg.qr(stacked, mode="r"))
        self.rows, self.waiting = [stacked], 0
        return stacked
