"""ASE's constraints: which atoms they hold in their places, and atoms moved under them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ase import Atoms

    from relaxnet_jax.data.trajectory import RelaxationTrajectory


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


def move_to_end(atoms: Atoms, path: RelaxationTrajectory) -> None:
    """Gives the atoms cell and positions of a path's last frame, their constraints applied.

    Raises:
      RuntimeError, ValueError or ArithmeticError: ASE cannot satisfy them (rigid bonds and angles).
    """
    for constraint in atoms.constraints:
        # What is rigid without given lengths keeps those it has before the cell changes. Lengths
        # alone would keep ASE from initializing the rest.
        if getattr(constraint, "bondlengths", None) is None:
            if hasattr(constraint, "initialize"):
                constraint.initialize(atoms)
            elif hasattr(constraint, "initialize_bond_lengths"):
                constraint.bondlengths = constraint.initialize_bond_lengths(atoms)
    # Scaled: what constraints hold keeps its place in the lattice, as it does on the path.
    atoms.set_cell(path.cells[-1], scale_atoms=True)
    atoms.set_positions(path.positions[-1])
