"""When a relaxation has ended in another, worse minimum than the one it is compared with."""

from __future__ import annotations

# Less is what two relaxations to the same largest force differ by. Per atom alone, one atom on
# another site of a large cell would pass: the stricter of the two counts.
WRONG_MINIMUM = 5e-3  # eV/atom
WRONG_MINIMUM_WHOLE = 0.1  # eV, of the whole structure


def same_minimum_within(
    atoms: int, per_atom: float = WRONG_MINIMUM, whole: float = WRONG_MINIMUM_WHOLE
) -> float:
    """The most, in eV, by which final energies of a structure of one minimum differ.

    Args:
      atoms: of the structure. per_atom: eV/atom. whole: eV.
    """
    return min(atoms * per_atom, whole)
