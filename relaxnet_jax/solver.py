"""Solving the neural ODE with diffrax: classical RK4 on the frame grid, or adaptive Tsit5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from relaxnet_jax import dynamics
from relaxnet_jax.config import DynamicsConfig
from relaxnet_jax.dynamics import State
from relaxnet_jax.errors import InputError
from relaxnet_jax.graph import relaxing_cells
from relaxnet_jax.models.energy import RelaxNetwork, call
from relaxnet_jax.models.precision import in_float32
from relaxnet_jax.programs import storable
from relaxnet_jax.strain import deform_positions, exponential
from relaxnet_jax.typing import AnyArray, Graph, Params, Positions, Times


class RK4(diffrax.AbstractERK):
    """The classical fourth-order Runge-Kutta method (Kutta 1901), for fixed steps: no error estimate.

    Usable as a diffrax solver, e.g. ``diffeqsolve(…, solver=RK4(), stepsize_controller=StepTo(ts))``.
    For trajectories, `solve_with_rates` runs the steps in its own scan.
    """

    tableau: ClassVar = diffrax.ButcherTableau(
        c=np.array([1 / 2, 1 / 2, 1]),
        b_sol=np.array([1 / 6, 1 / 3, 1 / 3, 1 / 6]),
        b_error=np.zeros(4),
        a_lower=(np.array([1 / 2]), np.array([0, 1 / 2]), np.array([0, 0, 1])),
    )
    interpolation_cls: ClassVar[Callable] = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms) -> int:
        """Order of convergence."""
        return 4


def _stages(n_steps: int) -> np.ndarray:
    """Coefficients of the stages of ``n_steps`` steps of `RK4`, plus the first stage of one more step.

    Each stage depends only on the one before it: k_s = h f(y + a_s k_{s-1}).

    Returns:
      (4 n_steps + 1, 3): for each stage a_s, b_s, and 1 if the step ends with this stage, else 0.
    """
    tableau = RK4.tableau
    before = np.array([0.0, *(row[-1] for row in tableau.a_lower)])
    step = np.stack([before, tableau.b_sol, np.arange(4) == 3], axis=1)
    return np.concatenate([np.tile(step, (n_steps, 1)), np.zeros((1, 3))])


@storable
class Stages(NamedTuple):
    """How far atoms and cells moved at the points where the solver evaluated the vector field.

    For RK4 these are all stages. Those between frames matter: atoms can outrun the neighbour list
    there even if they do not at any frame. For Tsit5, only the frames are available.

    Attributes:
      moved: (N,) Å, largest distance of each atom from its position in the initial structure
        strained with the cell.
      deformation: (s, G, 3, 3), deformation gradients of the cells at each of the s stages; None for
        fixed cells.
    """

    moved: Array
    deformation: Array | None = None


@storable
class Trajectory(NamedTuple):
    """A batch of predicted trajectories at the n requested frames.

    Attributes:
      positions: (n, N, 3) Å.
      velocities: (n, N, 3) Å, the state u of the second-order dynamics: far below
        dynamics.max_speed (see `dynamics`), dx/dt is s u, with the learned time scale s, plus the
        contribution of the strain. Zero in first order.
      energies: (n, G) eV, relative to the composition energies.
      forces: (n, N, 3) eV/Å, raw: also on fixed atoms.
      reference: (n, N, 3) Å, positions mapped back to the initial cell; None for fixed cells.
      deformation: (n, G, 3, 3), deformation gradients of the cells; None for fixed cells.
      virial: (n, G, 3, 3) eV, dE/d(strain); None for fixed cells.
      stages: the solver's stages, with gradients stopped; None for direct predictors, which solve
        no ODE.
    """

    positions: Array
    velocities: Array
    energies: Array
    forces: Array
    reference: Array | None = None
    deformation: Array | None = None
    virial: Array | None = None
    stages: Stages | None = None


class Solved(NamedTuple):
    """The solution of an ODE whose state is any tree of arrays.

    Attributes:
      states: states on the frame grid, leaves (n, ...).
      rates: their time derivatives, leaves (n, ...).
      stages: states at all stages of the solver, leaves (s, ...). For Tsit5, whose stages are not
        available, the states on the frame grid.
    """

    states: Any
    rates: Any
    stages: Any


def frame_grid(config: DynamicsConfig) -> np.ndarray:
    """The pseudotimes k/(n-1) of the n frames, shape (n,)."""
    return np.linspace(0.0, 1.0, config.frames)


def solve_with_rates(
    field: Callable[[Any], Any],
    start: Any,
    config: DynamicsConfig,
    controlled: Callable[[Any], Any] = lambda state: state,
) -> Solved:
    """Solves d(state)/dt = field(state) from t = 0 to 1 and returns the solution on the frame grid.

    RK4 runs the stages of all its steps in one scan (diffrax's "manual stepping"), because
    `diffrax.diffeqsolve` with `RecursiveCheckpointAdjoint` puts two more copies of the vector field
    into the traced gradient, and `jax.pmap` cannot trace its loops. The reverse pass stores the state
    of each stage and recomputes the field. The time derivatives at the frames are the first stages of
    the steps that start there; only the last frame needs one extra stage, so no evaluation is wasted.

    Tsit5 chooses its steps for the whole batch at once, by the largest error of any number in
    ``controlled(state)``. A structure's result therefore depends, within the tolerances, on the other
    structures in its batch; with the fixed steps of RK4 it does not.
    """
    dtype = jnp.result_type(*jax.tree.leaves(start))
    if config.solver == "rk4":
        checkpointed = jax.checkpoint(field, prevent_cse=False)
        n_steps = (config.frames - 1) * config.substeps
        h = jnp.asarray(1.0 / n_steps, dtype)
        zero = jax.tree.map(jnp.zeros_like, start)

        def stage(carry, coefficients):
            # State at the start of the step; h f of the last stage; sum of b_s k_s.
            y, k, total = carry
            a, b, ends = coefficients
            at = jax.tree.map(lambda y, k: y + a * k, y, k)
            rate = checkpointed(at)
            k = jax.tree.map(lambda rate: h * rate, rate)
            total = jax.tree.map(lambda total, k: total + b * k, total, k)
            y = jax.tree.map(lambda y, total: y + ends * total, y, total)
            k, total = jax.tree.map(lambda x: (1 - ends) * x, (k, total))
            return (y, k, total), (at, rate)

        stages = jnp.asarray(_stages(n_steps), dtype)
        _, (states, rates) = jax.lax.scan(stage, (start, zero, zero), stages)
        frames = slice(None, None, 4 * config.substeps)
        on_frames, their_rates = jax.tree.map(lambda x: x[frames], (states, rates))
        return Solved(on_frames, their_rates, states)
    term = diffrax.ODETerm(lambda t, y, args: field(y))
    solution = diffrax.diffeqsolve(
        term,
        diffrax.Tsit5(),
        t0=0.0,
        t1=1.0,
        dt0=0.1 / (config.frames - 1),
        y0=start,
        saveat=diffrax.SaveAt(ts=jnp.asarray(frame_grid(config), dtype)),
        stepsize_controller=diffrax.PIDController(
            rtol=config.rtol, atol=config.atol, norm=lambda y: _largest(controlled(y))
        ),
        adjoint=diffrax.RecursiveCheckpointAdjoint(checkpoints=config.max_steps),
        max_steps=config.max_steps,
        throw=False,  # a failed solve returns non-finite values
    )
    return Solved(solution.ys, jax.lax.map(jax.checkpoint(field), solution.ys), solution.ys)


def _largest(tree: Any) -> Array:
    """The largest absolute value in a tree; unlike a mean, it is unaffected by zero padding."""
    return jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0.0) for x in jax.tree.leaves(tree)]))


def interpolate_states(states: State, rates: State, times: Array, index: AnyArray) -> State:
    """Cubic Hermite interpolation of states on the frame grid, at each structure's own times.

    Args:
      states: values on the grid, with leaves (n, N, ...) for atoms and (n, G, 3, 3) for cells.
      rates: their time derivatives, in the same layout.
      times: (m, G) pseudotimes in [0, 1]; the range is not checked.
      index: (N,) structure of each atom.

    Returns:
      States with leaves (m, N, ...) and (m, G, 3, 3). At the times of the grid they equal its values
      to rounding.
    """
    intervals = states.positions.shape[0] - 1

    def leaf(y, dy, times):
        scaled = times * intervals
        left = jnp.clip(jnp.floor(scaled), 0, intervals - 1).astype(jnp.int32)
        theta = (scaled - left).reshape(*times.shape, *[1] * (y.ndim - 2))
        rows = jnp.arange(times.shape[1])[None]
        h00 = (1 + 2 * theta) * (1 - theta) ** 2
        h10, h01 = theta * (1 - theta) ** 2, theta**2 * (3 - 2 * theta)
        h11 = theta**2 * (theta - 1)
        y0, y1, d0, d1 = y[left, rows], y[left + 1, rows], dy[left, rows], dy[left + 1, rows]
        return h00 * y0 + h01 * y1 + (h10 * d0 + h11 * d1) / intervals

    def cells(name):
        y, dy = getattr(states, name), getattr(rates, name)
        return None if y is None else leaf(y, dy, times)

    x, u, h = (leaf(y, dy, times[:, index]) for y, dy in zip(states[:3], rates[:3]))
    return State(x, u, h, cells("deformation"), cells("strain_rate"))


def _furthest(graph: Graph, states: State) -> Stages:
    """Reduces the states of all stages, the first of which is the initial state, to `Stages`."""
    x, steps = states.positions, states.deformation
    moved = x - x[:1]
    if steps is not None:
        moved = deform_positions(steps, moved, graph.nodes["graph"])
    moved, steps = jax.lax.stop_gradient((moved, steps))
    return Stages(jnp.max(jnp.linalg.norm(moved, axis=-1), axis=0), steps)


def _direct_trajectory(
    network: RelaxNetwork,
    params: Params,
    scale: AnyArray,
    graph: Graph,
    times: Times | None,
    positions: Positions,
) -> Trajectory:
    """The trajectory of a direct predictor: u(0) is the total displacement, the path a straight line.

    Where the cell relaxes, L(0) is its total logarithmic strain, and the cell follows
    D(t) = exp(t L). Only the final frame is a prediction: every frame gets its energy, and forces and
    virials are zero, as in a relaxed structure.
    """
    encoding = call(network, params, "encode", graph, positions)
    moved = call(network, params, "initial_velocity", encoding, graph)
    moved = dynamics.constrain_velocity(graph, moved, dynamics.inertia(network, graph))
    energies = call(network, params, "read_out", encoding.h, graph) * scale
    times = frame_grid(network.dynamics) if times is None else times
    times = jnp.asarray(times, positions.dtype)
    fraction = times[:, None, None]
    if times.ndim == 2:
        fraction = times[:, graph.nodes["graph"], None]
    path = jnp.where(dynamics.movable(graph), positions + fraction * moved, positions)
    shape = (times.shape[0], *moved.shape)
    moved = jnp.broadcast_to(moved, shape)
    energies = jnp.broadcast_to(energies, (times.shape[0], *energies.shape))
    forces = jnp.zeros(shape, positions.dtype)
    if network.dynamics.cell == "fixed":
        return Trajectory(path, moved, energies, forces)
    strain = dynamics.strainable(
        graph, call(network, params, "initial_strain_rate", encoding, graph)
    )
    deformation = exponential(times.reshape(times.shape[0], -1, 1, 1) * strain)
    x, u, deformation = _deformed(graph, path, moved, deformation)
    return Trajectory(x, u, energies, forces, path, deformation, jnp.zeros_like(deformation))


def _deformed(
    graph: Graph, reference: Array, velocities: Array, deformation: Array
) -> tuple[Array, Array, Array]:
    """Returns x = D y (n, N, 3), D u (n, N, 3), and D (n, G, 3, 3).

    Where a cell may not be strained, D is exactly the identity and x exactly y, free of rounding.
    """
    index = graph.nodes["graph"]
    allowed = relaxing_cells(graph)[:, None, None]
    deformation = jnp.where(allowed, deformation, jnp.eye(3, dtype=deformation.dtype))
    x = deform_positions(deformation, reference, index)
    u = deform_positions(deformation, velocities, index)
    return jnp.where(allowed[index, :, 0], x, reference), u, deformation


@in_float32
def solve_trajectory(
    network: RelaxNetwork,
    params: Params,
    scale: AnyArray,
    graph: Graph,
    times: Times | None = None,
    positions: Positions | None = None,
) -> Trajectory:
    """The relaxation trajectories of a padded batch: a pure function of its arguments.

    It works under `jax.jit` and under `jax.vmap` over batches of equal shape, and is reverse-mode
    differentiable with respect to ``params`` and ``positions``.

    Args:
      network: the learned functions (static).
      params: their parameters.
      scale: eV, the network's unit of energy.
      graph: padded batch, see `relaxnet_jax.graph`.
      times: pseudotimes in [0, 1], either (m,) for all structures or (m, G) for each structure
        separately; None for the configuration's frame grid k/(n-1). The ODE is always solved on
        that grid; states at other times are interpolated with cubic polynomials.
      positions: (N, 3) Å, initial positions; the graph's own by default.

    Returns:
      A `Trajectory`, with energies relative to the composition energies.

    Raises:
      InputError: the model is static, i.e. has no trajectory of its own.
    """
    positions = graph.nodes["positions"] if positions is None else positions
    if network.dynamics.latent == "static":
        raise InputError(
            "dynamics.latent='static' is a potential without a path of its own; minimise its energy: "
            "relax(model, atoms), predict_structures or RelaxNetCalculator"
        )
    if network.dynamics.latent == "direct":
        return _direct_trajectory(network, params, scale, graph, times, positions)

    def evaluate(state):
        return dynamics.evaluate(network, params, scale, graph, state)

    # The solver evaluates energies and forces at every frame anyway: returned as the rates of unused
    # extra states, they need no further evaluation.
    def field(augmented):
        state, _ = augmented
        result = evaluate(state)
        rates = dynamics.vector_field(network, params, graph, state, result)
        return rates, (result.energies, result.forces, result.virial)

    start = dynamics.initial_state(network, params, graph, positions)
    n_graphs = graph.n_node.shape[0]
    virials = None if start.deformation is None else jnp.zeros_like(start.deformation)
    unused = (jnp.zeros(n_graphs, positions.dtype), jnp.zeros_like(positions), virials)
    (states, _), (rates, (energies, forces, virials)), (every, _) = solve_with_rates(
        field, (start, unused), network.dynamics, controlled=lambda augmented: augmented[0]
    )
    stages = _furthest(graph, every)
    if times is not None:
        times = jnp.asarray(times, positions.dtype)
        if times.ndim == 1:
            times = jnp.broadcast_to(times[:, None], (times.shape[0], n_graphs))
        states = interpolate_states(states, rates, times, graph.nodes["graph"])
        result = jax.lax.map(jax.checkpoint(evaluate), states)
        energies, forces, virials = result.energies, result.forces, result.virial
    # Interpolation rounds, but fixed atoms must not move at all.
    held = jnp.where(dynamics.movable(graph), states.positions, positions)
    if states.deformation is None:
        return Trajectory(held, states.velocities, energies, forces, stages=stages)
    x, u, deformation = _deformed(graph, held, states.velocities, states.deformation)
    return Trajectory(x, u, energies, forces, held, deformation, virials, stages)
