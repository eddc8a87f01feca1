"""Properties of the elements, from which their embeddings are initialised."""

from __future__ import annotations

import functools
import math

import numpy as np
from ase.data import chemical_symbols

from relaxnet_jax.graph import MAX_ATOMIC_NUMBER

# Fields of jarvis-tools' table: place in the periodic table, electronegativity, radius, valence
# electrons, ionisation energy, electron affinity, molar volume, polarisability, melting point,
# heat of fusion.
FIELDS = (
    "coulmn",  # sic
    "row",
    "X",
    "atom_rad",
    "nsvalence",
    "npvalence",
    "ndvalence",
    "nfvalence",
    "first_ion_en",
    "elec_aff",
    "mol_vol",
    "polzbl",
    "mp",
    "hfus",
)


@functools.cache
def element_properties() -> np.ndarray:
    """(119, 14) properties by atomic number, each with mean 0 and variance 1 over the elements.

    Values missing from jarvis-tools are zero, the mean (36 heavy or rare elements lack most).
    """
    from jarvis.core.specie import chem_data

    table = np.full((MAX_ATOMIC_NUMBER + 1, len(FIELDS)), np.nan)
    for number in range(1, MAX_ATOMIC_NUMBER + 1):
        known = chem_data.get(chemical_symbols[number], {})
        for column, field in enumerate(FIELDS):
            value = float(known.get(field, math.nan))
            if value > -90:  # -99 stands for unknown
                table[number, column] = value
    table = (table - np.nanmean(table, 0)) / np.nanstd(table, 0)
    return np.nan_to_num(table)
