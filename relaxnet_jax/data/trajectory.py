"""`RelaxationTrajectory`: one relaxation, from the first ionic step to the last."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np

from relaxnet_jax.errors import InputError

# Energies within one relaxation differ by eV, so anything beyond this is a parsing fault.


@dataclasses.dataclass(frozen=True, eq=False)
class RelaxationTrajectory:
    """Positions, energies and forces of the ionic steps of one relaxation.

    All arrays are NumPy, floating arrays float64. Frames are in order and
    unwrapped: no atom jumps across the cell from one frame to the next.

    Attributes:
      id: name of the relaxation, unique in its data set.
      atomic_numbers: (N,) int.
      positions: (n, N, 3), Å, Cartesian.
      cells: (n, 3, 3), Å, rows are lattice vectors.
      pbc: (3,) bool.
      energies: (n,), eV per structure (total energy as the code gave it).
      forces: (n, N, 3), eV/Å, raw: those on fixed atoms are not zeroed.
      fixed_mask: (N,) bool, True where the atom was held fixed.
      group: materials that may not be separated by a split share a group.
      stresses: (n, 6) or None, eV/Å³, Voigt order xx yy zz yz xz xy, tension positive.
      charges: (N,) or None, e.
      times: (n,) pseudotime in [0, 1], or None for k/(n-1).
      source: where it came from (file, code, functional).
    """

    id: str
    atomic_numbers: np.ndarray
    positions: np.ndarray
    cells: np.ndarray
    pbc: np.ndarray
    energies: np.ndarray
    forces: np.ndarray
    fixed_mask: np.ndarray
    group: str = ""
    stresses: np.ndarray | None = None
    charges: np.ndarray | None = None
    times: np.ndarray | None = None
    source: str = ""
