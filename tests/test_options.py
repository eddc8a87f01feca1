"""Every switch of the configuration does what it says, and every combination starts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    SCHEMES,
    batch,
    compiled,
    molecule,
    no_weights,
    random_rotation,
    split,
    systems,
    tiny_config,
    tiny_model,
)

from relaxnet_jax.model import create_model, predict_trajectory

SWITCHES = {
    "dynamics__latent": SCHEMES,
    "dynamics__order": ("second", "first"),
    "dynamics__friction": (False, True),
    "dynamics__time_scale": (False, True),
    "model__attention": (True, False),
    "model__vector_messages": (True, False),
    "model__update_positions": (False, True),
    "model__charges": (False, True),
    "model__layers": (2, 1),
}


def options(values):
    changes = dict(zip(SWITCHES, values))
    return tiny_config(changes.pop("dynamics__latent"), **changes)


def flipped():
    """For both schemes: each switch alone, and all at once."""
    for latent in SCHEMES:
        default = [latent, *(v[0] for v in list(SWITCHES.values())[1:])]
        yield tuple(default)
        yield (latent, *(v[1] for v in list(SWITCHES.values())[1:]))
        for k, values in enumerate(list(SWITCHES.values())[1:], 1):
            yield (*default[:k], values[1], *default[k + 1 :])


def check_model(config):
    model = create_model(config)
    leaves = jax.tree.leaves(model.params)
    assert all(leaf.dtype == np.float32 and np.isfinite(leaf).all() for leaf in leaves)
    return {"/".join(str(k.key) for k in path)
            for path, _ in jax.tree_util.tree_flatten_with_path(model.params)[0]}  # fmt: skip


def test_every_switch_initialises():
    """And each switch changes the set of parameters."""
    found = {values: frozenset(check_model(options(values))) for values in set(flipped())}
    for latent in SCHEMES:
        default = (latent, *(v[0] for v in list(SWITCHES.values())[1:]))
        others = [v for v in found if v[0] == latent and v != default]
        assert len({found[v] for v in others} | {found[default]}) >= len(others) - 1
    names = set().union(*found.values())
    assert {"log_friction", "log_time_scale"} <= names


@pytest.mark.heavy
def test_every_combination_initialises():
    for values in itertools.product(*SWITCHES.values()):
        check_model(options(values))


@pytest.mark.usefixtures("x64")
def test_first_order_descends():
    """dx/dt = mobility · F: the implicit scheme's energy falls at every frame; u = 0."""
    config = tiny_config(
        "implicit", model__layers=1, dynamics__order="first", dynamics__max_speed=0.0
    )
    model = tiny_model(config)
    model = model.replace(params=model.params | {"log_time_scale": np.float64(-3.0)})
    atoms = systems()
    result = compiled(config).trajectory(model, batch(atoms, config))
    assert (np.diff(np.asarray(result.energies)[:, :3], axis=0) < -1e-6).all()
    assert (np.asarray(result.velocities) == 0).all()
    for x, a in zip(split(result.positions, atoms), atoms):
        assert 1e-4 < np.abs(x[-1] - a.positions).max() < 0.5
    # The slope at the start is that of gradient descent: mobility · F / m.
    graph = batch(atoms, config)
    state = compiled(config).start(model, graph, graph.nodes["positions"])
    rate = compiled(config).field(model, graph, state)
    for dx, f, a in zip(split(rate.positions, atoms), split(result.forces[0], atoms), atoms):
        expected = np.exp(-3.0) * f / a.get_masses()[:, None]
        if a.constraints:
            expected[a.constraints[0].index] = 0
        np.testing.assert_allclose(dx, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_friction_time_scale_unit_mass_charges():
    """dx/dt = s u, du/dt = s (F - gamma u) with unit masses; all four change what they should."""
    config = tiny_config(
        "explicit", model__layers=1, model__charges=True, dynamics__friction=True,
        dynamics__time_scale=True, dynamics__mass="unit", dynamics__max_speed=0.0)  # fmt: skip
    model, atoms = tiny_model(config), systems()
    graph, functions = batch(atoms, config), compiled(config)
    x = graph.nodes["positions"]
    state = functions.start(model, graph, x)
    rate = functions.field(model, graph, state)
    speed = float(np.exp(model.params["log_time_scale"]))
    friction = float(np.exp(model.params["log_friction"]))
    assert abs(speed - 1) > 0.05 and abs(friction - 1) > 0.05
    forces = functions.forces(model, graph, x, state.latent).forces
    free = np.asarray(graph.nodes["mask"] & ~graph.nodes["fixed"])
    u = np.asarray(state.velocities)
    np.testing.assert_allclose(rate.positions, speed * u, rtol=1e-9)
    expected = np.where(free[:, None], speed * (np.asarray(forces) - friction * u), 0)
    np.testing.assert_allclose(rate.velocities, expected, rtol=1e-9, atol=1e-12)

    weights = no_weights(graph)
    weights[0][-1] = np.random.default_rng(0).normal(size=weights[0][-1].shape)
    (_, path), (gradient, _) = functions.weighted(model, x, graph, weights)
    for name in ("log_time_scale", "log_friction"):
        value = float(gradient.params[name])
        assert np.isfinite(value) and abs(value) > 1e-4
    # Unit masses: the centroid stays.
    for k in (0, 2):
        velocities = split(path.velocities, atoms)[k]
        assert np.abs(velocities).max() > 1e-2
        assert np.abs(velocities.sum(1)).max() < 1e-10

    charged = systems()
    for a in charged:
        a.set_initial_charges(np.linspace(-1, 1, len(a)))
    other = batch(charged, config)
    (_, changed), _ = functions.weighted(model, x, other, weights)
    assert (np.abs(changed.energies - path.energies)[:, :3] > 1e-5).all()
    plain = tiny_config("explicit", model__layers=1)
    found = [compiled(plain).weighted(tiny_model(plain), x, g, weights)[0][1] for g in (
        graph, other)]  # fmt: skip
    np.testing.assert_array_equal(found[0].energies, found[1].energies)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("latent", SCHEMES)
def test_updated_positions_keep_the_symmetry(latent):
    """`update_positions` moves the encoder's own copy of the atoms, equivariantly."""
    config = tiny_config(latent, model__update_positions=True)
    model, q = tiny_model(config), random_rotation(0, -1)
    turned = systems()
    for a in turned:
        a.set_cell(a.cell.array @ q.T)
        a.positions = a.positions @ q.T
    found = []
    for atoms in (systems(), turned):
        graph = batch(atoms, config)
        state = compiled(config).start(model, graph, graph.nodes["positions"])
        result = compiled(config).forces(model, graph, state.positions, state.latent)
        found.append((state, result))
    (a, ra), (b, rb) = found
    np.testing.assert_allclose(b.velocities, a.velocities @ q.T, atol=1e-10)
    np.testing.assert_allclose(rb.forces, ra.forces @ q.T, atol=1e-8)
    np.testing.assert_allclose(rb.energies, ra.energies, rtol=1e-9)
    off = tiny_config(latent)
    model = model.replace(config=off)
    if latent == "explicit":
        state = compiled(off).start(model, graph, graph.nodes["positions"])
        assert np.abs(state.latent - b.latent).max() > 1e-3
    else:
        result = compiled(off).forces(model, graph, b.positions, b.latent)
        assert np.abs(result.energies - rb.energies)[:3].max() > 1e-6


@pytest.mark.parametrize("latent", SCHEMES)
def test_one_copy_of_the_network_is_traced(latent):
    """Neither more layers nor more frames make a larger program: what is compiled is a loop."""

    def size(**changes):
        config = tiny_config(latent, **changes)
        model = tiny_model(config, dtype=np.float32)
        graph = batch([molecule()], config, dtype=np.float32)

        def loss(model):
            return jnp.sum(predict_trajectory(model, graph).forces ** 2)

        return len(str(jax.make_jaxpr(jax.grad(loss))(model)).splitlines())

    small = size(model__layers=2)
    # One more layer to initialise, slice and concatenate; twice the frames change constants only.
    assert size(model__layers=3) < 1.02 * small
    assert abs(size(model__layers=2, dynamics__frames=6) - small) < 5  # a longer constant's line
