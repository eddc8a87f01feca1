"""The neural ODE: its state, initial velocity and vector field (paper, section 4.2).

  dx/dt = s u            du/dt = s (F/m - gamma u)            (second order)
  dx/dt = s F/m          u = 0                                 (first order)
  dh/dt = MLP(h, p(x), |u|²)                                   (explicit scheme only)

with F = -dE/dx and m the atomic mass (or 1, or a function of h). Unless learned, s = 1 and gamma = 0.
s, gamma and t are dimensionless, so u is in Å and, with m in amu, a force of 1 eV/Å on 1 amu
accelerates by 1 Å per squared unit of pseudotime. Pseudotime has no other meaning.

Where the cell relaxes too (`relaxnet_jax.strain`), the state's positions are the reference
positions y, with u = dy/dt and -dE/dy = Dᵀ F in place of F. The deformation gradient D follows a
symmetric strain rate L, which contains no rotation:

  dD/dt = s L D          dL/dt = s (-P W P / (N M) - gamma' L)  (second order)
  dD/dt = -s P W P / (N M) D                                     (first order)

with W = dE/d(strain) in eV, N the number of atoms, M > 0 a learned fictitious mass of the cell
(eV per atom) and P the projector onto the directions in which the structure's cell may be strained.

The speeds of atoms saturate at dynamics.max_speed and the strain rates of cells at
dynamics.max_strain_rate: u and L in dx/dt, dD/dt and dh/dt (in first order, F/m and P W P / (N M)) are
`limited`, which leaves them unchanged far below the limits. Slowing down some atoms more than others
would move the centre of mass, so its motion is subtracted from all atoms. A speed can exceed its limit
because of this, but at most by a factor of two.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import jraph
from jax import Array

from relaxnet_jax.models.energy import RelaxNetwork, call
from relaxnet_jax.ops import safe_divide
from relaxnet_jax.potential import Evaluation, energies_and_forces
from relaxnet_jax.strain import deform_positions
from relaxnet_jax.typing import AnyArray, Graph, Latent, Params, Positions, Velocities


class State(NamedTuple):
    """The state of the ODE, or its time derivative in the same layout.

    Attributes:
      positions: (N, 3) Å; the reference positions for variable cells.
      velocities: (N, 3) Å.
      latent: h, (N, F) in the explicit scheme, otherwise (N, 0).
      deformation: (G, 3, 3), deformation gradients; None for fixed cells.
      strain_rate: (G, 3, 3); None for fixed cells.
    """

    positions: Positions
    velocities: Velocities
    latent: Latent
    deformation: Array | None = None
    strain_rate: Array | None = None


def inertia(network: RelaxNetwork, graph: Graph) -> Array:
    """The weights of the atoms in the centre of mass: (N,) atomic masses in amu, or ones."""
    masses = graph.nodes["masses"]
    return masses if network.dynamics.mass == "atomic" else jnp.ones_like(masses)


def movable(graph: Graph) -> Array:
    """Mask (N, 1) bool of real atoms that are not fixed."""
    return (graph.nodes["mask"] & ~graph.nodes["fixed"])[:, None]


def constrain_velocity(graph: Graph, velocities: Velocities, masses: Array) -> Velocities:
    """Zeroes the velocities of fixed atoms and the total momentum of free structures.

    Fixed and padding atoms get zero velocity. In structures without fixed atoms, the total momentum
    is removed; in those with fixed atoms, which hold the structure in place, it is kept.
    """
    index, n_graphs = graph.nodes["graph"], graph.n_node.shape[0]
    velocities = jnp.where(movable(graph), velocities, 0.0)
    weight = jnp.where(graph.nodes["mask"], masses, 0.0)
    momentum = jraph.segment_sum(weight[:, None] * velocities, index, n_graphs)
    mass = jraph.segment_sum(weight, index, n_graphs)
    held = jraph.segment_sum(graph.nodes["fixed"].astype(weight.dtype), index, n_graphs) > 0
    drift = jnp.where(held[:, None], 0.0, safe_divide(momentum, mass[:, None]))
    return jnp.where(movable(graph), velocities - drift[index], 0.0)


def limited(rate: Array, limit: float, axis: tuple[int, ...] = (-1,)) -> Array:
    """rate (1 + |rate|⁴/limit⁴)^(-1/4): the rate itself far below the limit, and never above it.

    Where a learned energy lacks repulsion, atoms or cells could otherwise collapse and, with the next
    step, leave all bounds. The function is smooth; it reduces a rate of 0.45 of the limit by 1 %, and
    one of 0.08 by 1e-5.

    Args:
      rate: (..., 3), or (..., 3, 3) with two axes in ``axis``.
      limit: in the unit of the rate; 0 for no limit.
      axis: the axes over which the norm is taken.
    """
    if limit == 0:
        return rate
    squared = jnp.sum(rate**2, axis=axis, keepdims=True) / limit**2
    return rate * (1.0 + squared**2) ** -0.25


def initial_state(
    network: RelaxNetwork, params: Params, graph: Graph, positions: Positions
) -> State:
    """The initial state: x(0), u(0) from the edge expansion and, if explicit, h(0) = encoder(x(0))."""
    encoding = call(network, params, "encode", graph, positions)
    moving = network.dynamics.order == "second" and network.dynamics.latent != "static"
    if moving:
        velocities = call(network, params, "initial_velocity", encoding, graph)
        velocities = constrain_velocity(graph, velocities, inertia(network, graph))
    else:
        velocities = jnp.zeros_like(positions)
    explicit = network.dynamics.latent == "explicit"
    latent = encoding.h if explicit else jnp.zeros((positions.shape[0], 0), positions.dtype)
    if network.dynamics.cell == "fixed":
        return State(positions, velocities, latent)
    n_graphs = graph.n_node.shape[0]
    deformation = jnp.broadcast_to(jnp.eye(3, dtype=positions.dtype), (n_graphs, 3, 3))
    rate = jnp.zeros_like(deformation)
    if moving:
        rate = strainable(graph, call(network, params, "initial_strain_rate", encoding, graph))
    return State(positions, velocities, latent, deformation, rate)


def strainable(graph: Graph, tensor: Array) -> Array:
    """P T P: the part of tensors T (G, 3, 3) that the cells may follow."""
    projector = jnp.asarray(graph.globals["strain"], tensor.dtype)
    return projector @ tensor @ projector


def evaluate(
    network: RelaxNetwork, params: Params, scale: AnyArray, graph: Graph, state: State
) -> Evaluation:
    """Energies, Cartesian forces and, for variable cells, virials of a state."""
    x, deformation = state.positions, state.deformation
    if deformation is not None:
        x = deform_positions(deformation, x, graph.nodes["graph"])
    return energies_and_forces(network, params, scale, graph, x, state.latent, deformation)


def vector_field(
    network: RelaxNetwork, params: Params, graph: Graph, state: State, result: Evaluation
) -> State:
    """The time derivative of a state, as a `State`, given the state's `evaluate` result."""
    forces, learned = result.forces, network.dynamics.mass == "learned"
    if state.deformation is not None:
        transposed = jnp.swapaxes(state.deformation, -1, -2)
        forces = deform_positions(transposed, forces, graph.nodes["graph"])
    if learned:
        forces = forces * call(network, params, "mobility", state.latent)
        # With unequal masses the centre of mass would stay at rest; in the frames, the centroid does.
        acceleration = constrain_velocity(graph, forces, inertia(network, graph))
    else:
        acceleration = jnp.where(movable(graph), forces / inertia(network, graph)[:, None], 0.0)
    speed = jnp.asarray(call(network, params, "time_scale"), acceleration.dtype)
    max_speed, max_rate = network.dynamics.max_speed, network.dynamics.max_strain_rate
    first = network.dynamics.order == "first"
    velocities = limited(acceleration if first else state.velocities, max_speed)
    if max_speed > 0:  # limiting slows the fastest atoms most: the centre of mass would drift
        velocities = constrain_velocity(graph, velocities, inertia(network, graph))
    raw = state.strain_rate
    strain_rate = None if raw is None else limited(raw, max_rate, (-2, -1))
    dx, du = speed * velocities, jnp.zeros_like(velocities)
    if not first:
        friction = jnp.asarray(call(network, params, "friction"), acceleration.dtype)
        du = speed * (acceleration - friction * state.velocities)
    if network.dynamics.latent == "explicit":
        extra = () if strain_rate is None else (strain_rate[graph.nodes["graph"]],)
        seen = state.velocities if first else velocities
        dh = call(network, params, "latent_rate", state.latent, result.pair, seen, *extra)
    else:
        dh = jnp.zeros_like(state.latent)
    if raw is None or strain_rate is None or state.deformation is None or result.virial is None:
        return State(dx, du, dh)
    size = jnp.maximum(graph.n_node, 1).astype(speed.dtype)[:, None, None]
    mass = jnp.asarray(call(network, params, "cell_mass", state.latent, graph), speed.dtype)
    push = -strainable(graph, result.virial) / (size * mass)
    if first:
        rate, drate = limited(push, max_rate, (-2, -1)), jnp.zeros_like(push)
    else:
        friction = jnp.asarray(call(network, params, "cell_friction"), speed.dtype)
        rate, drate = strain_rate, speed * (push - friction * raw)
    return State(dx, du, dh, speed * (rate @ state.deformation), drate)
