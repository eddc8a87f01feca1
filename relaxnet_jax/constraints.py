"""Which atoms ASE's constraints hold in their places."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ase import Atoms


def held_atoms(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Atoms that cannot move at all, and those that can in some directions only.

    ``FixAtoms``, ``FixCartesian``, ``FixScaled``, ``FixedLine`` and ``FixedPlane`` hold atoms;
    other constraints (bond lengths, symmetry) do not count.

    Returns:
      (N,) bool and (N,) bool; no atom is in both.
    """
    from ase.constraints import FixAtoms, FixCartesian, FixedLine, FixedPlane, FixScaled

    fixed, partly = np.zeros((2, len(atoms)), dtype=bool)
    for constraint in atoms.constraints:
        if isinstance(constraint, FixCartesian | FixScaled):
            held = fixed if np.all(constraint.mask) else partly
            held[constraint.index] |= np.any(constraint.mask)
        elif isinstance(constraint, FixAtoms):
            fixed[constraint.index] = True
        elif isinstance(constraint, FixedLine | FixedPlane):
            partly[constraint.index] = True
    return fixed, partly & ~fixed
