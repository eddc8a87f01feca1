"""The change in energy along a path, computed from the path's forces."""

from __future__ import annotations

import numpy as np


def work(positions: np.ndarray, forces: np.ndarray, fixed_mask: np.ndarray) -> np.ndarray:
    """E(t) - E(0) as -∫ F·dx over the free atoms from the first frame on, by the trapezoid rule.

    If a model's loss treats each frame's energy separately (``loss.energy_change=0``), a difference of
    two predicted energies carries the errors of both, whereas the forces give the slope directly.

    Args:
      positions: (n, N, 3) Å, unwrapped, in a fixed cell.
      forces: (n, N, 3) eV/Å.
      fixed_mask: (N,) bool, the atoms to leave out.

    Returns:
      (n,) eV, starting with 0; negative along a relaxation.
    """
    free = ~np.asarray(fixed_mask, bool)
    steps = np.diff(positions, axis=0)[:, free]
    means = 0.5 * (forces[1:] + forces[:-1])[:, free]
    return np.append(0.0, -np.cumsum((means * steps).sum(axis=(1, 2))))
