"""Element properties, and the embeddings that start from them."""

import numpy as np
from ase.data import atomic_numbers

from relaxnet_jax.model import create_model
from relaxnet_jax.models.elements import FIELDS, element_properties


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
    """Distances of the embeddings follow those of the properties."""
    embedding = np.asarray(create_model().params["encoder"]["element"]["embedding"])
    known = np.flatnonzero((element_properties() != 0).all(1))
    assert len(known) > 60
    ours, theirs = (
        np.linalg.norm(table[known, None] - table[known], axis=-1)[np.triu_indices(len(known), 1)]
        for table in (embedding, element_properties())
    )
    assert np.corrcoef(ours, theirs)[0, 1] > 0.8
    # None coincide, also not those without known properties.
    apart = np.linalg.norm(embedding[:, None] - embedding[None], axis=-1)
    assert apart[~np.eye(119, dtype=bool)].min() > 1.0
