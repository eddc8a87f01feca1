"""Whether the energies that a model is compared with have another zero than its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from relaxnet_jax.data.references import fit_element_energies
from relaxnet_jax.data.trajectory import reduced_formula
from relaxnet_jax.graph import MAX_ATOMIC_NUMBER
from relaxnet_jax.metrics import Comparison

LEAST = 0.1  # eV per atom; smaller errors are the model's own
SHARE = 0.2  # of the error, the most that energies of the elements may leave unexplained
# Compositions for each element; with fewer, energies of the elements could explain any error.
SPARE = 3


def foreign_origin(comparisons: Sequence[Comparison]) -> str:
    """A sentence if energies of the elements explain nearly all errors of the final energies, else empty.

    The data's energies are then of another code, functional or set of pseudopotentials. Also empty if
    there are too few compositions to tell.
    """
    known = [c for c in comparisons if c.finite]
    elements = {int(z) for c in known for z in c.atomic_numbers}
    compositions = {reduced_formula(c.atomic_numbers) for c in known}
    if len(compositions) < SPARE * max(len(elements), 1):
        return ""
    off = [(c.atomic_numbers, c.pred_energies[-1:] - c.true_energies[-1:]) for c in known]
    table, *_ = fit_element_energies(off, MAX_ATOMIC_NUMBER + 1)
    sizes = np.array([len(numbers) for numbers, _ in off])
    errors = np.array([error[0] for _, error in off])
    left = errors - np.array([table[numbers].sum() for numbers, _ in off])
    before, after = (float(np.abs(e / sizes).mean()) for e in (errors, left))
    if before < LEAST or after > SHARE * before:
        return ""
    return (
        f"final energies are off by {before:.3g} eV/atom, but only by {after:.2g} after fitting an energy "
        "per element: the data seem to come from another code, functional or set of pseudopotentials than "
        "the model's, which explains most of these errors; changes along the path can be compared"
    )
