"""Prototypes: the structure types that crystals of different elements may share."""

from __future__ import annotations

import warnings

import numpy as np

from relaxnet_jax.data.trajectory import RelaxationTrajectory

SYMPREC = 0.1  # Å; relaxed structures retain some of the noise they started with


def prototype(t: RelaxationTrajectory) -> str:
    """Anonymous formula and space group of the final structure, e.g. "A-B2 136" for rutile.

    The space group is found by spglib within 0.1 Å, also for slabs (their vacuum is part of the
    cell). It is left out without three periodic directions, or if spglib finds none.
    """
    import spglib

    _, counts = np.unique(t.atomic_numbers, return_counts=True)
    counts = np.sort(counts // np.gcd.reduce(counts))
    formula = "-".join(f"{chr(65 + k % 26)}{n if n > 1 else ''}" for k, n in enumerate(counts))
    if not np.all(t.pbc):
        return formula
    cell = t.cells[-1]
    fractional = t.positions[-1] @ np.linalg.inv(cell)
    crystal = (cell.tolist(), fractional.tolist(), t.atomic_numbers.tolist())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about how version 2 reports "none"
        found = spglib.get_symmetry_dataset(crystal, symprec=SYMPREC)
    return formula if found is None else f"{formula} {found.number}"
