"""Unrelaxed structures: substituted, repeated, strained and rattled parents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from relaxnet_jax.data.generate import symmetric
from relaxnet_jax.data.generation.elements import radii, substituted
from relaxnet_jax.data.generation.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Collection

    from ase import Atoms

# Fraction of the sum of two covalent radii; a start with closer atoms is drawn again.
MIN_CONTACT = 0.7
MAX_DRAWS = 50


def draw_start(
    parent: Atoms, settings: Settings, elements: Collection[int] | None, rng: np.random.Generator
) -> Atoms | None:
    """Draws an unrelaxed structure made from the parent.

    Substitution scales the structure with the mean covalent radius, so that the volume scales with
    its cube. Strain is applied only if all directions are periodic; fixed atoms are not rattled.

    Args:
      parent: the structure to begin with.
      settings: settings of the data set.
      elements: atomic numbers that substitution may choose from, None for any.
      rng: generator of all random choices.

    Returns:
      The structure, or None if after MAX_DRAWS draws two atoms are still too close (MIN_CONTACT).
    """
    for _ in range(MAX_DRAWS):
        atoms = _draw(parent, settings, elements, rng)
        if not too_close(atoms, MIN_CONTACT):
            return atoms
    return None


def _draw(
    parent: Atoms, settings: Settings, elements: Collection[int] | None, rng: np.random.Generator
) -> Atoms:
    atoms = parent.copy()
    numbers = substituted(parent.numbers, settings.substitute, elements, rng, settings.f_elements)
    scale = radii(numbers).sum() / radii(parent.numbers).sum()
    atoms.numbers = numbers
    strain = symmetric(rng.uniform(-settings.strain, settings.strain, 6))
    deformation = scale * (np.eye(3) + strain * bool(atoms.pbc.all()))
    atoms.set_cell(atoms.cell.array @ deformation)
    atoms.set_positions(atoms.positions @ deformation, apply_constraint=False)
    if max(settings.supercell) > 1:
        atoms = atoms.repeat(settings.supercell)
    free = np.ones(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        free[constraint.index] = False
    noise = rng.normal(0.0, rng.uniform(*settings.rattle), (len(atoms), 3))
    atoms.positions[free] += noise[free]
    return atoms


def too_close(atoms: Atoms, fraction: float) -> bool:
    """Whether two atoms are closer than ``fraction`` of the sum of their covalent radii.

    Periodic images count, and so do pairs of fixed atoms.
    """
    from ase.neighborlist import neighbor_list

    return len(neighbor_list("i", atoms, fraction * radii(atoms.numbers))) > 0
