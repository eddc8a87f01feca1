"""ASE constraints: which atoms they fix, and moving atoms subject to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ase import Atoms

    from relaxnet_jax.data.trajectory import RelaxationTrajectory


def held_atoms(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Finds the atoms that cannot move at all, and those that can move in some directions only.

    ``FixAtoms``, ``FixCartesian``, ``FixScaled``, ``FixedLine`` and ``FixedPlane`` are considered;
    other constraints (bond lengths, symmetry) are not.

    Returns:
      Two masks (N,) bool, of the atoms that are fixed and of those that are partly constrained; no
      atom is in both.
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


def move_to_end(atoms: Atoms, path: RelaxationTrajectory) -> None:
    """Moves atoms and cell to the last frame of a path, subject to the atoms' constraints.

    Raises:
      RuntimeError, ValueError or ArithmeticError: ASE cannot satisfy the constraints (rigid bonds and
        angles).
    """
    for constraint in atoms.constraints:
        # Rigid constraints without given lengths keep those from before the cell changes. Setting
        # the lengths alone would keep ASE from initializing the rest.
        if getattr(constraint, "bondlengths", None) is None:
            if hasattr(constraint, "initialize"):
                constraint.initialize(atoms)
            elif hasattr(constraint, "initialize_bond_lengths"):
                constraint.bondlengths = constraint.initialize_bond_lengths(atoms)
    # Scale the atoms: constrained ones keep their place in the lattice, as on the path.
    atoms.set_cell(path.cells[-1], scale_atoms=True)
    atoms.set_positions(path.positions[-1])
