"""Solving the neural ODE with diffrax: classical RK4 on the frame grid, or adaptive Tsit5."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from relaxnet_jax import dynamics
from relaxnet_jax.config import DynamicsConfig
from relaxnet_jax.dynamics import State
from relaxnet_jax.models.energy import RelaxNetwork
from relaxnet_jax.typing import AnyArray, Graph, Params, Positions, Times


class RK4(diffrax.AbstractERK):
    """The classical fourth-order Runge-Kutta method with fixed steps (Kutta 1901)."""

    tableau: ClassVar[diffrax.ButcherTableau] = diffrax.ButcherTableau(
        a_lower=(np.array([1 / 2]), np.array([0, 1 / 2]), np.array([0.0, 0.0, 1.0])),
        b_sol=np.array([1 / 6, 1 / 3, 1 / 3, 1 / 6]),
        b_error=np.zeros(4),  # no embedded method: for fixed steps only
        c=np.array([1 / 2, 1 / 2, 1.0]),
    )
    interpolation_cls: ClassVar[Callable] = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms) -> int:
        """Order of convergence."""
        return 4


class Trajectory(NamedTuple):
    """A batch of predicted trajectories, all on the n frames asked for.

    Attributes:
      positions: (n, N, 3) Å. velocities: (n, N, 3) Å per unit pseudotime.
      energies: (n, G) eV, relative to the composition energies.
      forces: (n, N, 3) eV/Å, raw: also on fixed atoms.
    """

    positions: Array
    velocities: Array
    energies: Array
    forces: Array


def frame_grid(config: DynamicsConfig) -> np.ndarray:
    """Pseudotimes k/(n-1) of the n frames: (n,)."""
    return np.linspace(0.0, 1.0, config.frames)


def solve_states(field: Callable[[State], State], start: State, config: DynamicsConfig) -> State:
    """States on the frame grid: leaves (n, ...).

    Reverse-mode differentiable; one state per step is kept, the rest recomputed. The adaptive
    solver chooses its steps for the whole batch at once, so there a structure's result depends,
    within the tolerances, on the others in its batch; with fixed steps it does not.
    """
    dtype = start.positions.dtype
    frames = jnp.asarray(frame_grid(config), dtype)
    solver: diffrax.AbstractSolver
    controller: diffrax.AbstractStepSizeController
    if config.solver == "rk4":
        steps = np.linspace(0.0, 1.0, (config.frames - 1) * config.substeps + 1)
        # Frame times must be bit-equal to step times for StepTo and SaveAt to agree.
        frames = jnp.asarray(steps[:: config.substeps], dtype)
        solver, dt0 = RK4(), None
        controller = diffrax.StepTo(ts=jnp.asarray(steps, dtype))
        max_steps = len(steps)
    else:
        solver, dt0 = diffrax.Tsit5(), 0.1 / (config.frames - 1)
        controller = diffrax.PIDController(rtol=config.rtol, atol=config.atol)
        max_steps = config.max_steps
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: field(y)),
        solver,
        t0=0.0,
        t1=1.0,
        dt0=dt0,
        y0=start,
        saveat=diffrax.SaveAt(ts=frames),
        stepsize_controller=controller,
        adjoint=diffrax.RecursiveCheckpointAdjoint(checkpoints=max_steps),
        max_steps=max_steps,
    )
    return solution.ys


def interpolate_states(states: State, rates: State, node_times: Array) -> State:
    """Cubic Hermite interpolation of states on the frame grid, at each atom's own times.

    Args:
      states, rates: values and time derivatives on the grid: leaves (n, N, ...).
      node_times: (m, N) pseudotimes in [0, 1].

    Returns:
      States with leaves (m, N, ...); at the grid's own times exactly the grid's values.
    """
    intervals = states.positions.shape[0] - 1
    scaled = node_times * intervals
    left = jnp.clip(jnp.floor(scaled), 0, intervals - 1).astype(jnp.int32)
    theta = (scaled - left)[..., None]
    atoms = jnp.arange(node_times.shape[1])[None]
    h00 = (1 + 2 * theta) * (1 - theta) ** 2
    h10, h01 = theta * (1 - theta) ** 2, theta**2 * (3 - 2 * theta)
    h11 = theta**2 * (theta - 1)

    def leaf(y, dy):
        y0, y1, d0, d1 = y[left, atoms], y[left + 1, atoms], dy[left, atoms], dy[left + 1, atoms]
        return h00 * y0 + h01 * y1 + (h10 * d0 + h11 * d1) / intervals

    return jax.tree.map(leaf, states, rates)


def solve_trajectory(
    network: RelaxNetwork,
    params: Params,
    scale: AnyArray,
    graph: Graph,
    times: Times | None = None,
    positions: Positions | None = None,
) -> Trajectory:
    """The relaxation trajectories of a padded batch: a pure function of its arguments.

    It jits, vmaps over batches of equal shape, and is reverse-mode differentiable with
    respect to ``params`` and ``positions``.

    Args:
      network: the learned functions (static).
      params: their parameters. scale: eV, energy unit of the network.
      graph: padded batch, see `relaxnet_jax.graph`.
      times: None for the frame grid k/(n-1) of the configuration; or (m,) pseudotimes in
        [0, 1] for all structures, or (m, G) for each structure its own. The ODE is always
        solved on the configuration's grid; other times are read off the cubic interpolation.
      positions: (N, 3) Å initial positions; the graph's own by default.

    Returns:
      `Trajectory`; energies relative to the composition energies.
    """
    positions = graph.nodes["positions"] if positions is None else positions

    def field(state):
        return dynamics.vector_field(network, params, scale, graph, state)

    if network.dynamics.latent == "implicit":
        # The encoder's inside is recomputed in the reverse pass instead of being kept for the
        # stages of a step. The explicit scheme's pair pass is small: keeping it is faster.
        field = jax.checkpoint(field)

    @jax.checkpoint
    def read(state):
        result = dynamics.evaluate(network, params, scale, graph, state)
        return result.energies, result.forces

    start = dynamics.initial_state(network, params, graph, positions)
    states = solve_states(field, start, network.dynamics)
    if times is not None:
        times = jnp.asarray(times, positions.dtype)
        if times.ndim == 1:
            times = jnp.broadcast_to(times[:, None], (times.shape[0], graph.n_node.shape[0]))
        states = interpolate_states(
            states, jax.lax.map(field, states), times[:, graph.nodes["graph"]]
        )
    # Reading frames off the solver's interpolation rounds; what is held must not move by a bit.
    held = jnp.where(dynamics.movable(graph), states.positions, positions)
    energies, forces = jax.lax.map(read, states._replace(positions=held))
    return Trajectory(held, states.velocities, energies, forces)
