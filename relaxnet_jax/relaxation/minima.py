"""Criterion for a relaxation that ended in another, higher minimum than the one it is compared with."""

from __future__ import annotations

# Two relaxations to the same largest force differ by less. Per atom alone, a single atom on another
# site of a large cell would pass; so the stricter of the two limits applies.
WRONG_MINIMUM = 5e-3  # eV/atom
WRONG_MINIMUM_WHOLE = 0.1  # eV, for the whole structure


def same_minimum_within(
    atoms: int, per_atom: float = WRONG_MINIMUM, whole: float = WRONG_MINIMUM_WHOLE
) -> float:
    """Largest difference, in eV, between final energies of a structure in the same minimum.

    Args:
      atoms: number of atoms in the structure.
      per_atom: limit per atom, eV/atom.
      whole: limit for the whole structure, eV.
    """
    return min(atoms * per_atom, whole)
