"""Which elements may replace each other, and the sizes of their atoms."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from relaxnet_jax.data.trajectory import reduced_formula

# Groups 1 to 18 of the periodic table. Hydrogen is not an alkali metal and stands alone. So do the
# f elements other than lanthanum, which belong to no group, unless f elements are asked for.
_GROUPS = (
    (3, 11, 19, 37, 55),
    (4, 12, 20, 38, 56),
    (21, 39, 57),
    (22, 40, 72),
    (23, 41, 73),
    (24, 42, 74),
    (25, 43, 75),
    (26, 44, 76),
    (27, 45, 77),
    (28, 46, 78),
    (29, 47, 79),
    (30, 48, 80),
    (5, 13, 31, 49, 81),
    (6, 14, 32, 50, 82),
    (7, 15, 33, 51, 83),
    (8, 16, 34, 52),
    (9, 17, 35, 53),
    (2, 10, 18, 36, 54),
)
_GROUP_OF = {z: group for group in _GROUPS for z in group}
_RARE_EARTHS = (21, 39, *range(57, 72))
_ACTINIDES = tuple(range(89, 95))
_FAMILY_OF = _GROUP_OF | {z: family for family in (_RARE_EARTHS, _ACTINIDES) for z in family}


def group_of(number: int, f_elements: bool = False) -> tuple[int, ...]:
    """Atomic numbers of the element's group of the periodic table, ascending, including itself.

    Astatine, radon and all elements below them are left out; an element of no group is alone.

    Args:
      number: atomic number.
      f_elements: whether scandium, yttrium and the lanthanides are one group, and actinium to
        plutonium another.
    """
    return (_FAMILY_OF if f_elements else _GROUP_OF).get(number, (number,))


def family_formula(numbers: np.ndarray, f_elements: bool = False) -> str:
    """Reduced formula with every element replaced by the lightest of its group.

    All materials that substitution can make from one material share it: NaCl and KBr are both "FLi".

    Args:
      numbers: (N,) atomic numbers.
      f_elements: see `group_of`.
    """
    return reduced_formula(np.array([group_of(int(z), f_elements)[0] for z in numbers]))


def substituted(
    numbers: np.ndarray,
    probability: float,
    allowed: Collection[int] | None,
    rng: np.random.Generator,
    f_elements: bool = False,
) -> np.ndarray:
    """Replaces elements at random by others of their group.

    All atoms of an element change together, and different elements stay different.

    Args:
      numbers: (N,) int, atomic numbers.
      probability: probability of replacing each element.
      allowed: atomic numbers to choose from; None for all.
      rng: generator of the random choices.
      f_elements: see `group_of`.

    Returns:
      (N,) atomic numbers.
    """
    result = np.array(numbers)
    present = {int(z) for z in np.unique(numbers)}
    for z in sorted(present):
        # Drawn whether or not it is used, so that the elements' draws do not affect each other.
        wanted, choice = rng.random(), rng.random()
        family = group_of(z, f_elements)
        others = [o for o in family if o not in present and (allowed is None or o in allowed)]
        if others and wanted < probability:
            new = others[int(choice * len(others))]
            present.add(new)
            result[numbers == z] = new
    return result


def radii(numbers: Iterable[int]) -> np.ndarray:
    """(N,) covalent radii, Å."""
    from ase.data import covalent_radii

    table: Any = covalent_radii
    return np.asarray(table)[np.asarray(numbers)]


def names(numbers: Iterable[int]) -> str:
    """Symbols of the elements, each once, in order of atomic number."""
    from ase.data import chemical_symbols

    return ", ".join(chemical_symbols[z] for z in sorted({int(z) for z in numbers}))
