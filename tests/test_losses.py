"""The terms of the loss against numbers worked out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import jraph
import numpy as np
import pytest

from relaxnet_jax.config import LossConfig
from relaxnet_jax.losses import (
    TERMS,
    Targets,
    coordinate_error,
    force_error,
    loss_terms,
    weighted_loss,
)
from relaxnet_jax.solver import Trajectory

# Structure 0: atoms 0 (free), 1 (free, does not move), 2 (fixed). Structure 1: atom 3.
# Structure 2 is padding and owns atom 4. Three frames; structure 1 lacks the middle one.
START = np.zeros((5, 3))


@pytest.fixture
def graph():
    return jraph.GraphsTuple(
        nodes={
            "positions": jnp.asarray(START),
            "fixed": jnp.asarray([False, False, True, False, False]),
            "mask": jnp.asarray([True, True, True, True, False]),
            "graph": jnp.asarray([0, 0, 0, 1, 2]),
        },
        edges={}, senders=None, receivers=None,
        globals={"mask": jnp.asarray([True, True, False])},
        n_node=jnp.asarray([3, 1, 1]), n_edge=None,
    )  # fmt: skip


@pytest.fixture
def targets():
    positions, forces = np.zeros((3, 5, 3)), np.zeros((3, 5, 3))
    positions[1, 0] = [0.5, 0, 0]
    positions[2, 0] = [1, 0, 0]
    positions[2, 3] = [0, 3, 0]
    forces[0, 0] = [1, 2, 0]
    forces[:, 2] = 100.0  # raw forces of the fixed atom
    forces[1, 3] = 50.0  # of the frame that is not there
    positions[1, 3] = 70.0
    energies = np.array([[-3.0, -1.0, 5.0], [-6.0, 99.0, 5.0], [-9.0, -2.0, 5.0]])
    mask = np.array([[True, True, False], [True, False, False], [True, True, False]])
    return Targets(*map(jnp.asarray, (positions, forces, energies, mask, np.array([2, 2, 0]))))


@pytest.fixture
def prediction():
    positions, velocities, forces = (np.zeros((3, 5, 3)) for _ in range(3))
    positions[0] = 7.0  # the first frame is given: whatever stands there does not count
    positions[1, 0] = [0.5, 0.2, 0]
    positions[2, 0] = [1, 1, 0]
    positions[2, 3] = [0, -1, 0]
    positions[2, 1] = [0, 0, 0.3]
    positions[:, 2] = 9.0  # fixed
    positions[:, 4] = 11.0  # padding
    forces[0, 0] = [1, 2, 3]
    forces[2, 3] = [0, 2, 0]
    forces[:, 4] = 13.0
    energies = np.array([[-3.6, -1.5, 8.0], [-3.0, 0.0, 9.0], [-9.0, -1.0, 99.0]])
    return Trajectory(*map(jnp.asarray, (positions, velocities, energies, forces)))


EXPECTED = {
    # |E - Ê| per atom: structure 0 (3 atoms) 0.6, 3, 0; structure 1 0.5, -, 1.
    "energy": (0.2 + 1.0 + 0.0 + 0.5 + 1.0, 5),
    # Off by -0.6, 3, 0 and -0.5, -, 1: from the final frame 0.6 and 3, and 1.5.
    "energy_change": (0.2 + 1.0 + 1.5, 3),
    # Rises: structure 0: 0.6 then none; structure 1: no pair of frames exists.
    "monotonicity": (0.6 / 3, 2),
    # Structure 0: atoms 0, 1 in three frames; structure 1: atom 3 in two. 9 + 4.
    "forces": (9.0 + 4.0, 3 * (3 * 2 + 2)),
    # Frames 1, 2: 0.04; 1 + 0.09 + (3 + 1)².
    "positions": (0.04 + 1.0 + 0.09 + 16.0, 3 * (2 * 2 + 1)),
    # Atom 0: 45°, moves 1; atom 1 does not move; atom 3: backwards, moves 3.
    "direction": ((1 - np.sqrt(0.5)) * 1 + 2 * 3, 4.0),
}


@pytest.mark.parametrize("name", TERMS)
def test_term(graph, targets, prediction, name):
    term = loss_terms(prediction, targets, graph, LossConfig())[name]
    total, number = EXPECTED[name]
    np.testing.assert_allclose(term.total, total, rtol=1e-5)
    np.testing.assert_allclose(term.number, number)
    np.testing.assert_allclose(term.mean(), total / number, rtol=1e-5)


def test_norms_instead_of_squares(graph, targets, prediction):
    terms = loss_terms(prediction, targets, graph, LossConfig(errors="norm"))
    # The same atoms and frames as in EXPECTED, an error vector each.
    np.testing.assert_allclose(terms["forces"], (3.0 + 2.0, 3 * 2 + 2), rtol=1e-6)
    np.testing.assert_allclose(terms["positions"], (0.2 + 1 + 0.3 + 4, 2 * 2 + 1), rtol=1e-6)
    for name in ("energy", "energy_change", "monotonicity", "direction"):
        np.testing.assert_allclose(terms[name], EXPECTED[name], rtol=1e-5)


def test_pseudo_huber_forces(graph, targets, prediction):
    """√(d² + e²) - d of two error vectors, of lengths 3 and 2, whatever `errors` are."""
    for errors in ("squared", "norm"):
        config = LossConfig(errors=errors, huber_forces=0.5)
        terms = loss_terms(prediction, targets, graph, config)
        expected = sum(np.sqrt(0.25 + e**2) - 0.5 for e in (3.0, 2.0))
        np.testing.assert_allclose(terms["forces"], (expected, 3 * 2 + 2), rtol=1e-6)
        other = loss_terms(prediction, targets, graph, LossConfig(errors=errors))["positions"]
        np.testing.assert_allclose(terms["positions"], other)


def test_energy_per_structure(graph, targets, prediction):
    terms = loss_terms(prediction, targets, graph, LossConfig(energy_per="structure"))
    np.testing.assert_allclose(terms["energy"].total, 0.6 + 3 + 0 + 0.5 + 1, rtol=1e-5)
    np.testing.assert_allclose(terms["energy_change"].total, 0.6 + 3 + 1.5, rtol=1e-5)
    np.testing.assert_allclose(terms["monotonicity"].total, 0.6, rtol=1e-5)
    np.testing.assert_allclose(terms["forces"].total, EXPECTED["forces"][0])


def test_weighted_sum(graph, targets, prediction):
    weights = dict(zip(TERMS, (2.0, 13.0, 3.0, 5.0, 7.0, 11.0), strict=True))
    config = LossConfig(**weights)
    loss, means = weighted_loss(loss_terms(prediction, targets, graph, config), config)
    expected = sum(weights[name] * a / b for name, (a, b) in EXPECTED.items())
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert set(means) == set(TERMS)
    for name in TERMS:
        single = dataclasses.replace(LossConfig(**dict.fromkeys(TERMS, 0.0)), **{name: 1.0})
        loss, _ = weighted_loss(loss_terms(prediction, targets, graph, single), single)
        np.testing.assert_allclose(loss, means[name])


@pytest.mark.parametrize(
    "changes", [{"errors": "squared"}, {"errors": "norm"}, {"huber_forces": 0.3}], ids=str
)
def test_gradients_are_finite(graph, targets, prediction, changes):
    """Also for a prediction that does not move at all, and for a perfect one."""
    config = LossConfig(energy_change=2.0, **changes)

    def loss(prediction):
        return weighted_loss(loss_terms(prediction, targets, graph, config), config)[0]

    still = prediction._replace(positions=jnp.zeros((3, 5, 3)))
    perfect = Trajectory(targets.positions, prediction.velocities, targets.energies, targets.forces)
    for case in (prediction, still, perfect):
        value, gradient = jax.value_and_grad(loss)(case)
        assert np.isfinite(value)
        for leaf in (gradient.positions, gradient.energies, gradient.forces):
            assert np.isfinite(leaf).all()
        for leaf in (gradient.positions, gradient.forces):  # fixed and padding atoms
            assert (leaf[:, [2, 4]] == 0).all()
        assert (gradient.energies[:, 2] == 0).all()
    assert loss(perfect) == 0
    assert np.abs(jax.grad(loss)(still).positions).max() > 0
    moving = jax.grad(loss)(prediction)
    assert (moving.positions[1, 3] == 0).all() and moving.energies[1, 1] == 0  # absent frame
    assert (moving.positions[0] == 0).all()


def test_empty_batch(graph, targets, prediction):
    """A device without structures contributes nothing, not NaN."""
    empty = graph._replace(
        globals={"mask": jnp.zeros(3, bool)}, nodes=graph.nodes | {"mask": jnp.zeros(5, bool)})
    terms = loss_terms(prediction, targets, empty, LossConfig())
    loss, means = weighted_loss(terms, LossConfig())
    assert loss == 0 and all(value == 0 for value in means.values())


def test_force_error(graph, targets, prediction):
    """Per component, of the atoms and frames of the force term."""
    np.testing.assert_allclose(force_error(prediction, targets, graph), (3.0 + 2.0, 24), rtol=1e-6)


def test_coordinate_error(graph, targets, prediction):
    """Final frame, mean over free coordinates of a structure, then over structures."""
    ours, nothing = coordinate_error(prediction, targets, graph)
    np.testing.assert_allclose(ours.total, (1 + 0.3) / 6 + 4 / 3, rtol=1e-5)
    np.testing.assert_allclose(nothing.total, 1 / 6 + 3 / 3, rtol=1e-5)
    assert ours.number == nothing.number == 2
    all_fixed = graph._replace(
        nodes=graph.nodes | {"fixed": jnp.asarray([True, True, True, False, False])})
    ours, _ = coordinate_error(prediction, targets, all_fixed)
    np.testing.assert_allclose(ours.mean(), 4 / 3, rtol=1e-5)
