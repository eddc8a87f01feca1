"""The neural ODE: its state, initial velocity and vector field (paper, section 4.2).

  dx/dt = s u            du/dt = s (F/m - gamma u)            (second order)
  dx/dt = s F/m          u = 0                                 (first order)
  dh/dt = MLP(h, p(x), |u|²)                                   (explicit scheme only)

with F = -dE/dx, m the atomic mass (or 1, or a function of h), s and gamma 1 and 0 unless learned. s, gamma
and t are dimensionless, so u is in Å and, for m in amu, a force of 1 eV/Å on 1 amu
accelerates by 1 Å per squared unit of pseudotime: pseudotime has no other meaning.

Where the cell relaxes too (`relaxnet_jax.strain`), the state's positions are the reference
positions y, with u = dy/dt and -dE/dy = Dᵀ F in place of F, and the deformation gradient D
follows a symmetric strain rate L, which holds no rotation:

  dD/dt = s L D          dL/dt = s (-P W P / (N M) - gamma' L)  (second order)
  dD/dt = -s P W P / (N M) D                                     (first order)

with W = dE/d(strain) in eV, N the number of atoms, M > 0 a learned fictitious mass of the cell
(eV per atom) and P the projector on the directions in which the structure's cell may be strained.

Where an atom would move faster than dynamics.max_speed or a cell strain faster than
dynamics.max_strain_rate, the u and L of dx/dt, dD/dt and dh/dt (F/m and P W P / (N M) in first order) are
`limited`, which far below are they themselves. What that takes from an atom and not from the others
would move the centre of mass, and is taken off all: a speed can exceed its limit by that, no more than twofold.
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
    """Positions (N, 3) Å, velocities (N, 3) Å, latent h (N, F) or (N, 0).

    Of variable cells also the deformation gradient and the strain rate, (G, 3, 3) each, and the
    positions are then the reference positions.
    """

    positions: Positions
    velocities: Velocities
    latent: Latent
    deformation: Array | None = None
    strain_rate: Array | None = None


def inertia(network: RelaxNetwork, graph: Graph) -> Array:
    """What weighs atoms in the motion of the whole: (N,) masses in amu, or ones."""
    masses = graph.nodes["masses"]
    return masses if network.dynamics.mass == "atomic" else jnp.ones_like(masses)


def movable(graph: Graph) -> Array:
    """(N, 1) bool: real atoms that are not held fixed."""
    return (graph.nodes["mask"] & ~graph.nodes["fixed"])[:, None]


def constrain_velocity(graph: Graph, velocities: Velocities, masses: Array) -> Velocities:
    """Velocities that respect fixed atoms and total momentum.

    Fixed and padding atoms get zero. A structure without fixed atoms gets zero total
    momentum; one with fixed atoms is held by them and keeps what it has.
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

    Smooth. Where a learned energy has no repulsion, atoms or cells would fall into each other, and out
    of all bounds with the next step; 1 % is taken off at 0.45 of the limit, 1e-5 at 0.08.

    Args:
      rate: (..., 3) or, by ``axis``, (..., 3, 3), whose norm counts. limit: in its unit; 0: none.
    """
    if limit == 0:
        return rate
    squared = jnp.sum(rate**2, axis=axis, keepdims=True) / limit**2
    return rate * (1.0 + squared**2) ** -0.25


def initial_state(
    network: RelaxNetwork, params: Params, graph: Graph, positions: Positions
) -> State:
    """x(0), u(0) from the edge expansion, and h(0) = encoder(x(0)) in the explicit scheme."""
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
    """P T P: what of a tensor (G, 3, 3) the cells may follow."""
    projector = jnp.asarray(graph.globals["strain"], tensor.dtype)
    return projector @ tensor @ projector


def evaluate(
    network: RelaxNetwork, params: Params, scale: AnyArray, graph: Graph, state: State
) -> Evaluation:
    """Energies, Cartesian forces and, of variable cells, virials of a state."""
    x, deformation = state.positions, state.deformation
    if deformation is not None:
        x = deform_positions(deformation, x, graph.nodes["graph"])
    return energies_and_forces(network, params, scale, graph, x, state.latent, deformation)


def vector_field(
    network: RelaxNetwork, params: Params, graph: Graph, state: State, result: Evaluation
) -> State:
    """The time derivative of a state with this `evaluate` result, itself laid out as a `State`."""
    forces, learned = result.forces, network.dynamics.mass == "learned"
    if state.deformation is not None:
        transposed = jnp.swapaxes(state.deformation, -1, -2)
        forces = deform_positions(transposed, forces, graph.nodes["graph"])
    if learned:
        forces = forces * call(network, params, "mobility", state.latent)
        # Of unequal masses the centre of mass is at rest, but the frames keep their centroid.
        acceleration = constrain_velocity(graph, forces, inertia(network, graph))
    else:
        acceleration = jnp.where(movable(graph), forces / inertia(network, graph)[:, None], 0.0)
    speed = jnp.asarray(call(network, params, "time_scale"), acceleration.dtype)
    max_speed, max_rate = network.dynamics.max_speed, network.dynamics.max_strain_rate
    first = network.dynamics.order == "first"
    velocities = limited(acceleration if first else state.velocities, max_speed)
    if max_speed > 0:  # which takes more off the fastest: the centre of mass would drift
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
