"""Element properties, and the embeddings that start from them."""

import numpy as np
from ase.data import atomic_numbers

from relaxnet_jax.model import create_model
from relaxnet_jax.models.elements import FIELDS, element_properties


def distance(table, a, b):
    return np.linalg.norm(table[atomic_numbers[a]] - table[atomic_numbers[b]])


def test_properties_are_standardised():
    table = element_properties()
    assert table.shape == (119, len(FIELDS)) and np.isfinite(table).all()
    known = table != 0
    for column, where in zip(table.T, known.T):
        assert where.sum() > 80
        assert abs(column[where].mean()) < 1e-6 and abs(column[where].std() - 1) < 0.01
    assert not table[0].any()  # the padding element has none
    electronegativity = table[:, FIELDS.index("X")]
    assert electronegativity[1:93].argmax() + 1 == atomic_numbers["F"]


def test_similar_elements_start_as_neighbours():
    embedding = np.asarray(create_model().params["encoder"]["element"]["embedding"])
    for a, b, c in (("Cu", "Ag", "O"), ("Na", "K", "Cl"), ("Ni", "Pd", "Ba"), ("F", "Cl", "Fe")):
        assert distance(embedding, a, b) < distance(embedding, a, c)
    # None coincide, also not those without known properties.
    apart = np.linalg.norm(embedding[:, None] - embedding[None], axis=-1)
    assert apart[~np.eye(119, dtype=bool)].min() > 1.0
