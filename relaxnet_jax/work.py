"""The energy that a path's own forces take it down by."""

from __future__ import annotations

import numpy as np


def work(positions: np.ndarray, forces: np.ndarray, fixed_mask: np.ndarray) -> np.ndarray:
    """-∫ F·dx over the free atoms from the first frame on, by the trapezoid rule: E(t) - E(0).

    Where a model's energies were learned each by itself (``loss.energy_change=0``), their differences
    carry the errors of both; its forces are their slope.

    Args:
      positions: (n, N, 3) Å, unwrapped, in a fixed cell. forces: (n, N, 3) eV/Å. fixed_mask: (N,).

    Returns:
      (n,) eV, 0 first, negative along a relaxation.
    """
    free = ~np.asarray(fixed_mask, bool)
    steps = np.diff(positions, axis=0)[:, free]
    means = 0.5 * (forces[1:] + forces[:-1])[:, free]
    return np.append(0.0, -np.cumsum((means * steps).sum(axis=(1, 2))))
