"""The state that training begins with."""

import jax
import numpy as np

from relaxnet_jax.config import TrainConfig
from relaxnet_jax.train.state import initial_train_state, make_optimizer


def test_initial_state_is_the_optimizers():
    """Made without asking optax for values, it is what optax would have made."""
    params = {"layer": {"kernel": np.ones((2, 3), np.float32), "bias": np.ones(3, np.float32)}}
    state = initial_train_state(params, TrainConfig())
    expected = make_optimizer(TrainConfig()).init(params)
    assert jax.tree.structure(state.optimizer) == jax.tree.structure(expected)
    for found, wanted in zip(jax.tree.leaves(state.optimizer), jax.tree.leaves(expected)):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)
    for average, own in zip(jax.tree.leaves(state.ema), jax.tree.leaves(params)):
        np.testing.assert_array_equal(average, own)
        assert not np.shares_memory(average, own)  # buffers of the state are donated
    assert state.step == state.skipped == 0 and state.step.dtype == np.int32
