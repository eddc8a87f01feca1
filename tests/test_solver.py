"""The ODE solver: order, frames, times, gradients through the whole of it."""

import dataclasses
import functools
import itertools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from tiny import (
    SCHEMES,
    batch,
    compiled,
    no_weights,
    split,
    systems,
    tiny_config,
    tiny_model,
)

from relaxnet_jax.config import DynamicsConfig
from relaxnet_jax.dynamics import State, limited
from relaxnet_jax.model import predict_trajectory
from relaxnet_jax.solver import RK4, frame_grid, interpolate_states, solve_with_rates

pytestmark = pytest.mark.usefixtures("x64", "optimised")
# NumPy: made at import, before the fixture turns double precision on.
START = State(np.array([[0.4, -1.0, 2.0]]), np.array([[1.0, 0.5, 0.0]]), np.ones((1, 1)))


def pendulum(state):
    """Three pendulums, and a latent that feels their speed."""
    speed = jnp.sum(state.velocities**2, -1, keepdims=True)
    return State(state.velocities, -4 * jnp.sin(state.positions) * state.latent,
                 -state.latent * speed)  # fmt: skip


@functools.cache
def exact():
    """The pendulums' states at the frames 0, 1/4, ..., 1."""
    def f(t, y):
        x, u, h = y[:3], y[3:6], y[6:]
        return np.concatenate([u, -4 * np.sin(x) * h, -h * (u**2).sum()])

    y0 = np.concatenate([np.ravel(leaf) for leaf in START[:3]])
    y = solve_ivp(f, (0, 1), y0, "DOP853", np.linspace(0, 1, 5), rtol=1e-13, atol=1e-13).y.T
    return State(y[:, None, :3], y[:, None, 3:6], y[:, None, 6:])


def test_rk4_is_of_fourth_order():
    errors = []
    for substeps in (2, 4, 8, 16):
        config = DynamicsConfig(frames=5, substeps=substeps)
        states = solve_with_rates(pendulum, START, config)[0]
        assert states.positions.shape == (5, 1, 3) and states.latent.shape == (5, 1, 1)
        for leaf, start in zip(states[:3], START[:3]):
            np.testing.assert_array_equal(leaf[0], start)
        # the largest over the frames: at a single one the error may pass through zero
        errors.append([np.abs(a[1:] - b[1:]).max() for a, b in zip(states[:3], exact()[:3])])
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.array(errors).min() > 1e-12  # rounding plays no part
    assert (orders[-1] > 3.7).all() and (orders[-1] < 4.3).all(), orders


def test_tsit5_agrees():
    config = DynamicsConfig(frames=5, solver="tsit5", rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(solve_with_rates(pendulum, START, config)[0][:3], exact()[:3]):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    coarse = DynamicsConfig(frames=5, solver="tsit5", rtol=1e-3, atol=1e-3)
    error = np.abs(solve_with_rates(pendulum, START, coarse)[0].positions - exact().positions).max()
    assert 1e-9 < error < 1e-2


def test_passengers_steer_no_steps():
    """Rates of what nobody integrates come out as they are, and adaptive steps ignore them."""
    def field(wild):
        def both(augmented):
            state, _ = augmented
            passenger = wild * jnp.sin(40 * state.positions) - 20.0
            return pendulum(state), passenger
        return both

    config = DynamicsConfig(frames=5, solver="tsit5", rtol=1e-4, atol=1e-4)
    start = START, jnp.zeros((1, 3))
    calm, wild = (
        solve_with_rates(field(w), start, config, controlled=lambda y: y[0]) for w in (0.0, 100.0)
    )
    for a, b in zip(calm[0][0][:3], wild[0][0][:3]):
        np.testing.assert_array_equal(a, b)
    steered = solve_with_rates(field(100.0), start, config)
    assert np.abs(steered[0][0].positions - wild[0][0].positions).max() > 0
    for frames in (5, 8, 32):  # steps of 1/7 are no binary fractions
        config = DynamicsConfig(frames=frames)
        _, (_, passenger), _ = solve_with_rates(field(0.0), start, config)
        assert passenger.shape == (frames, 1, 3) and (np.asarray(passenger) == -20.0).all()


def test_interpolation():
    """Exact on the grid, exact for cubics, of fourth order otherwise."""
    def states(f, n):
        t = jnp.linspace(0, 1, n)[:, None, None]
        value, rate = jax.jvp(f, (t,), (jnp.ones_like(t),))
        return State(value, 2 * value, value[..., :0]), State(rate, 2 * rate, rate[..., :0])

    def cubic(t):
        return jnp.concatenate([1 + t - 3 * t**2, 2 * t**3], -1)

    times = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (50, 1))).at[0].set(1.0)
    found = interpolate_states(*states(cubic, 4), times, [0])
    np.testing.assert_allclose(found.positions, cubic(times[..., None]), atol=1e-13)
    assert found.latent.shape == (50, 1, 0)
    grid = states(jnp.sin, 4)[0]
    on_grid = interpolate_states(*states(jnp.sin, 4), jnp.linspace(0, 1, 4)[:, None], [0])
    np.testing.assert_array_equal(on_grid.positions, grid.positions)
    errors = [
        np.abs(interpolate_states(*states(lambda t: jnp.sin(3 * t), n), times, [0]).positions
               - jnp.sin(3 * times[..., None])).max()
        for n in (5, 9, 17)
    ]  # fmt: skip
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert (orders > 3.5).all() and (orders < 4.5).all()


def test_each_structure_has_its_own_times():
    value = jnp.stack([jnp.arange(3.0), 10 + jnp.arange(3.0)], 1)[..., None]
    states = State(value, value, value)
    rates = jax.tree.map(lambda y: 2 * jnp.ones_like(y), states)
    # Structures 0 and 1; the second atom belongs to structure 1, and so does the second cell.
    cells = value[..., None] * jnp.ones((3, 3))
    states = states._replace(deformation=cells, strain_rate=cells)
    rates = rates._replace(deformation=2 + 0 * cells, strain_rate=2 + 0 * cells)
    times = jnp.asarray([[0.25, 0.75], [1.0, 0.0]])
    found = interpolate_states(states, rates, times, np.array([0, 1]))
    np.testing.assert_allclose(found.positions[..., 0], [[0.5, 11.5], [2, 10]])
    assert found.deformation.shape == (2, 2, 3, 3)
    np.testing.assert_allclose(found.strain_rate[:, :, 1, 2], [[0.5, 11.5], [2, 10]])
    swapped = interpolate_states(states, rates, times, np.array([1, 0]))
    np.testing.assert_allclose(swapped.positions[..., 0], [[1.5, 10.5], [0, 12]])


@pytest.mark.parametrize("substeps", [1, 3])
def test_the_scan_is_diffrax_with_its_solver(x64, substeps):
    """States, rates and gradients of `solve_with_rates` and of diffeqsolve with `RK4` on the same steps."""
    config = DynamicsConfig(frames=4, substeps=substeps)
    steps = jnp.linspace(0.0, 1.0, 3 * substeps + 1)

    def field(y):
        return {"x": y["v"], "v": -jnp.sin(3.0 * y["x"]) - 0.1 * y["v"]}

    def ours(y):
        return solve_with_rates(field, y, config)[:2]

    def theirs(y):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: field(y)), RK4(), 0.0, 1.0, None, y,
            saveat=diffrax.SaveAt(ts=jnp.linspace(0.0, 1.0, 4)),
            stepsize_controller=diffrax.StepTo(ts=steps),
        )  # fmt: skip
        return solution.ys, jax.vmap(field)(solution.ys)

    start = {"x": jnp.array([0.3, -1.0]), "v": jnp.array([1.0, 0.2])}
    for a, b in zip(jax.tree.leaves(ours(start)), jax.tree.leaves(theirs(start)), strict=True):
        assert a.shape == (4, 2)
        np.testing.assert_allclose(a, b, rtol=1e-12)
    gradients = [
        jax.grad(lambda y, s=solve: sum(jnp.sum(x**2) for x in jax.tree.leaves(s(y))))(start)
        for solve in (ours, theirs)
    ]
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


def test_no_evaluation_is_wasted(x64):
    """Four of each step, and one for the last frame."""
    evaluated = []

    def field(y):
        jax.debug.callback(lambda y: evaluated.append(np.asarray(y)), y)
        return -y

    solved = solve_with_rates(field, jnp.ones(2), DynamicsConfig(frames=5, substeps=2))
    jax.block_until_ready(solved)
    jax.effects_barrier()
    assert len(evaluated) == 4 * 8 + 1
    # And the stages that are told are those: in whatever order the callbacks came.
    told = np.sort(np.asarray(solved.stages)[:, 0])
    np.testing.assert_allclose(told, np.sort(np.stack(evaluated)[:, 0]), rtol=1e-12)
    np.testing.assert_array_equal(solved.stages[::8], solved.states)


@pytest.mark.parametrize("latent", SCHEMES)
def test_model_trajectory_is_rk4_of_its_vector_field(latent):
    """The frames equal classical RK4 written out, which converges with fourth order."""
    config = tiny_config(latent)
    model, functions = tiny_model(config), compiled(config)
    graph = batch(systems(), config)
    result = functions.trajectory(model, graph)

    def integrate(n_steps):
        y = functions.start(model, graph, graph.nodes["positions"])
        states, h = [y], 1.0 / n_steps

        def moved(k, factor):
            return jax.tree.map(lambda a, b: a + factor * b, y, k)

        for _ in range(n_steps):
            k1 = functions.field(model, graph, y)
            k2 = functions.field(model, graph, moved(k1, h / 2))
            k3 = functions.field(model, graph, moved(k2, h / 2))
            k4 = functions.field(model, graph, moved(k3, h))
            y = jax.tree.map(
                lambda y, a, b, c, d: y + h / 6 * (a + 2 * b + 2 * c + d), y, k1, k2, k3, k4)
            states.append(y)
        return states

    states = integrate(2)  # three frames, one step between two
    real = np.asarray(graph.nodes["mask"])
    for k, state in enumerate(states):
        for ours, theirs in ((result.positions, state.positions),
                             (result.velocities, state.velocities)):  # fmt: skip
            np.testing.assert_allclose(ours[k][real], theirs[real], rtol=0, atol=1e-10)
        frame = functions.forces(model, graph, state.positions, state.latent)
        np.testing.assert_allclose(result.energies[k, :3], frame.energies[:3], rtol=1e-9)
        np.testing.assert_allclose(
            result.forces[k][real], frame.forces[real], rtol=0, atol=1e-8)  # fmt: skip
    assert np.array_equal(frame_grid(config.dynamics), [0, 0.5, 1])
    ends = [np.asarray(integrate(n)[-1].positions)[real] for n in (16, 32, 64)]
    differences = [np.abs(a - b).max() for a, b in itertools.pairwise(ends)]
    assert 3.6 < np.log2(differences[0] / differences[1]) < 4.4


@pytest.fixture(scope="module")
def explicit(x64):
    config = tiny_config("explicit", model__layers=1)
    return config, tiny_model(config), batch(systems(), config)


def test_substeps_and_tsit5_agree_on_the_model(explicit):
    """Different solvers of one ODE: fine RK4 and tight Tsit5 meet, coarse RK4 is off."""
    config, model, graph = explicit
    real = np.asarray(graph.nodes["mask"])

    def end(**changes):
        dynamics = dataclasses.replace(config.dynamics, **changes)
        other = dataclasses.replace(config, dynamics=dynamics)
        result = compiled(other).trajectory(model.replace(config=other), graph)
        return np.asarray(result.positions[-1])[real]

    fine = end(substeps=12)
    adaptive = end(solver="tsit5", rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(fine, adaptive, atol=2e-5)
    weights = no_weights(graph)
    (_, coarse), _ = compiled(config).weighted(model, graph.nodes["positions"], graph, weights)
    assert np.abs(np.asarray(coarse.positions[-1])[real] - adaptive).max() > 1e-4


def test_times(explicit):
    """Shared times, the same for each structure, and each its own; the grid's are the frames."""
    config, model, graph = explicit
    predict = jax.jit(predict_trajectory)
    (_, frames), _ = compiled(config).weighted(
        model, graph.nodes["positions"], graph, no_weights(graph))
    real, n_graphs = np.asarray(graph.nodes["mask"]), graph.n_node.shape[0]
    times = np.array([0.0, 0.5, 1.0, 0.3])
    shared = predict(model, graph, times)
    for ours, theirs in zip(shared[:4], frames[:4]):
        columns = slice(None, 3) if ours.ndim == 2 else real
        np.testing.assert_allclose(
            np.asarray(ours)[:3, columns], np.asarray(theirs)[:, columns], rtol=0, atol=1e-9)
    own = np.broadcast_to(times[:, None], (4, n_graphs)).copy()
    own[:, 1] = [0.3, 0.0, 1.0, 0.5]
    each = predict(model, graph, own)
    owner = np.asarray(graph.nodes["graph"])
    for rows, order in ((owner == 0, [0, 1, 2, 3]), (owner == 1, [3, 0, 2, 1])):
        for ours, theirs in ((each.positions, shared.positions), (each.forces, shared.forces)):
            np.testing.assert_allclose(
                np.asarray(ours)[:, rows], np.asarray(theirs)[order][:, rows], rtol=0, atol=1e-9)
    np.testing.assert_allclose(each.energies[:, 1], shared.energies[[3, 0, 2, 1], 1], rtol=1e-9)


def test_vmap(explicit):
    """`predict_trajectory` over two stacked graphs equals the two one by one."""
    config, model, graph = explicit
    others = systems()
    for a in others:
        a.positions[-1] += 0.05
    graphs = [graph, batch(others, config)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *graphs)
    both = jax.jit(jax.vmap(predict_trajectory, in_axes=(None, 0)))(model, stacked)
    real = np.asarray(graph.nodes["mask"])
    for k, g in enumerate(graphs):
        (_, one), _ = compiled(config).weighted(
            model, g.nodes["positions"], g, no_weights(g))
        np.testing.assert_allclose(
            np.asarray(both.positions)[k][:, real], np.asarray(one.positions)[:, real], atol=1e-9)
        np.testing.assert_allclose(both.energies[k][:, :3], one.energies[:, :3], rtol=1e-9)
    assert np.abs(both.energies[0] - both.energies[1]).max() > 1e-4


def test_limited_rates():
    """The same far below the limit, never above it, smooth at zero and far beyond."""
    rates = jnp.array([[0.0, 0, 0], [0.3, 0, -0.4], [3.0, 4, 0], [1e12, 0, 0]])
    found = limited(rates, 5.0)
    np.testing.assert_array_equal(found[0], 0)
    np.testing.assert_allclose(found[1], rates[1], rtol=3e-5)
    np.testing.assert_allclose(found[2], rates[2] * 2**-0.25, rtol=1e-12)
    np.testing.assert_allclose(found[3], [5.0, 0, 0], rtol=1e-9)
    tensor = jnp.diag(jnp.array([2.0, -1.0, 2.0]))[None]
    np.testing.assert_allclose(limited(tensor, 3.0, (-2, -1)), tensor * 2**-0.25, rtol=1e-12)
    assert limited(rates, 0.0) is rates
    for dtype in (np.float32, np.float64):
        slopes = jax.vmap(jax.jacobian(lambda r: limited(r, 5.0)))(rates.astype(dtype))
        assert np.isfinite(slopes).all()
        np.testing.assert_allclose(slopes[0], np.eye(3))


@pytest.mark.parametrize("order", ("first", "second"))
def test_nothing_runs_away(order):
    """Of forces beyond all measure positions, cells and gradients stay finite, and nothing drifts."""
    def solve(unit, limits):
        changes = dict(zip(("dynamics__max_speed", "dynamics__max_strain_rate"), limits))
        changes |= {"dynamics__cell": "variable", "dynamics__mass": "unit"}
        config = tiny_config(dynamics__order=order, **changes)
        model = tiny_model(config)
        model = model.replace(energy_scale=model.energy_scale * unit)
        graph = batch(systems(), config)
        path = compiled(config).trajectory(model, graph)
        weights = [*no_weights(graph), np.zeros(path.cells.shape), np.zeros(path.stresses.shape)]
        weights[0][-1] = np.asarray(graph.nodes["mask"])[:, None]
        _, gradients = compiled(config).weighted(model, graph.nodes["positions"], graph, weights)
        return path, gradients, np.asarray(graph.nodes["mask"])

    path, gradients, real = solve(1e9, (10.0, 1.0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    volumes = np.abs(np.linalg.det(path.cells[:, 1:3]))
    stretched = np.linalg.solve(path.cells[0, 2], path.cells[-1, 2])
    assert np.abs(np.log(np.linalg.svd(stretched, compute_uv=False))).max() < 1.5
    assert volumes.min() > 0
    molecule = split(path.positions, systems())[0]
    np.testing.assert_allclose(molecule.mean(1), molecule[:1].mean(1).repeat(3, 0), atol=1e-9)
    assert 1 < np.linalg.norm(molecule[-1] - molecule[0], axis=-1).max() < 20
    free, _, _ = solve(1e9, (0.0, 0.0))
    assert not np.abs(free.positions[-1, real]).max() < 1e3
    # Motions of tenths of an Å are not touched.
    near, far = solve(1.0, (10.0, 1.0))[0], solve(1.0, (0.0, 0.0))[0]
    np.testing.assert_allclose(near.positions, far.positions, atol=1e-3)
    assert np.abs(near.positions[-1] - near.positions[0]).max() > 0.05


@pytest.mark.parametrize("latent", SCHEMES)
def test_gradients_through_the_ode(latent):
    """With respect to parameters, energy unit and element energies, and initial positions:
    as finite differences along random directions say."""
    config = tiny_config(latent, model__layers=1)
    model, weighted = tiny_model(config), compiled(config).weighted
    atoms = systems()
    graph, rng = batch(atoms, config), np.random.default_rng(0)
    x, weights = graph.nodes["positions"], no_weights(graph)
    real = np.flatnonzero(graph.nodes["mask"])
    for w in (weights[0], weights[1], weights[3]):
        w[:, real] = rng.normal(size=(3, len(real), 3))
    weights[2][:, :3] = rng.normal(size=(3, 3))

    def perturbed(tree, direction, step):
        return jax.tree.map(lambda a, d: a + step * d, tree, direction)

    def check(gradient, at, direction, step=1e-6):
        (up, _), _ = at(step)
        (down, _), _ = at(-step)
        numeric = (up - down) / (2 * step)
        pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(direction))
        analytic = sum(float(np.vdot(g, d)) for g, d in pairs)
        assert abs(analytic) > 1e-2
        np.testing.assert_allclose(analytic, numeric, rtol=2e-5)

    _, (by_model, by_positions) = weighted(model, x, graph, weights)
    direction = jax.tree.map(lambda a: rng.normal(size=np.shape(a)), model)
    check(by_model, lambda s: weighted(perturbed(model, direction, s), x, graph, weights),
          direction)  # fmt: skip
    move = np.zeros(x.shape)
    move[real] = rng.normal(size=(len(real), 3))
    check(by_positions, lambda s: weighted(model, x + s * move, graph, weights), move)
    assert np.abs(np.asarray(by_model.element_energies)).max() > 0.1
    assert float(np.abs(by_model.energy_scale)) > 1e-3
