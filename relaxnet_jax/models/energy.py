"""The energy network: encoder, geometry read-out, attention, energy head, and the ODE's heads."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import jraph
from jax import Array

from relaxnet_jax.config import DynamicsConfig, GraphConfig, ModelConfig
from relaxnet_jax.graph import pair_list, pair_map, unordered_pairs
from relaxnet_jax.models.egnn import EGNNEncoder
from relaxnet_jax.models.encoder import Encoder, Encoding
from relaxnet_jax.models.layers import MLP, PAIR_NORM, AttentionBlock, pair_geometry
from relaxnet_jax.models.precision import matmul_precision
from relaxnet_jax.ops import both_ways, convolve_pairs, gather_senders, spread, sum_edges
from relaxnet_jax.typing import Energies, Graph, Latent, Params, Positions, Velocities

# Å; velocities are learned in this unit, so that training starts near doing nothing.
VELOCITY_UNIT = 0.05
# Likewise the units of strain rates (dimensionless) and of the cell's mass (eV per atom).
STRAIN_UNIT = 0.02
CELL_MASS = 10.0


class RelaxNetwork(nn.Module):
    """All learned functions of RelaxNet, as methods that share parameters.

    Energies are relative to the composition energies, in units of the training set's energy
    spread per atom; `potential` converts them to eV.
    """

    graph_config: GraphConfig
    config: ModelConfig
    dynamics: DynamicsConfig

    def setup(self) -> None:
        m, d = self.config, self.dynamics
        encoder = {"dtnn": Encoder, "egnn": EGNNEncoder}[m.architecture]
        self.encoder = encoder(self.graph_config, m)
        if m.attention:
            self.attention = AttentionBlock(m.attention_heads)
        self.head = MLP((m.features, m.features // 2, 1), small=True)
        if d.latent == "explicit":
            self.pair_send = nn.Dense(m.pair_features)
            # No bias, so that filters are zero beyond the cutoff and in padding.
            self.pair_filter = nn.Dense(m.pair_features, use_bias=False)
            self.pair_update = MLP((m.features, m.features))
            self.rate = MLP((m.features, m.features), small=True)
            if d.mass == "learned":
                self.mobility_head = MLP((m.features, 1), small=True)
                if d.cell == "variable":
                    self.compliance_head = MLP((m.features, 1), small=True)
        if d.latent == "static":  # an energy only, without the heads of the ODE
            return
        self.velocity_gate = _VelocityHead(m)
        if d.cell == "variable":
            self.strain_gate = _StrainHead(m)
            self.log_cell_mass = self.param("log_cell_mass", nn.initializers.zeros, ())
            if d.friction:
                self.log_cell_friction = self.param("log_cell_friction", nn.initializers.zeros, ())
        if d.friction:
            self.log_friction = self.param("log_friction", nn.initializers.zeros, ())
        if d.time_scale or d.order == "first":
            self.log_time_scale = self.param("log_time_scale", nn.initializers.zeros, ())

    def encode(self, graph: Graph, positions: Positions) -> Encoding:
        """Runs the full encoder on the positions."""
        return self.encoder(graph, positions)

    def pair_pass(self, h: Latent, graph: Graph, positions: Positions) -> Array:
        """Pair features p_i = sum_j W(r_ij) * (V h_j), (N, P): cheap ones, for the explicit scheme."""
        radial = pair_geometry(graph, positions, self.graph_config, self.config).radial
        filters, sent = self.pair_filter(radial), self.pair_send(h)
        return convolve_pairs(filters, sent, unordered_pairs(graph)) / PAIR_NORM

    def explicit_energy(
        self, h: Latent, graph: Graph, positions: Positions
    ) -> tuple[Energies, Array]:
        """Energies (G,) of the latents h at the positions x, and the pair features p (N, P)."""
        p = self.pair_pass(h, graph, positions)
        return self.read_out(h + self.pair_update(jnp.concatenate([h, p], -1)), graph), p

    def read_out(self, h: Latent, graph: Graph) -> Energies:
        """Attention block and energy head, summed over each structure: (G,)."""
        if self.config.attention:
            h = self.attention(h, graph)
        per_atom = jnp.where(graph.nodes["mask"], self.head(h)[:, 0], 0.0)
        return jraph.segment_sum(per_atom, graph.nodes["graph"], graph.n_node.shape[0])

    def latent_rate(
        self, h: Latent, p: Array, velocities: Velocities, strain_rate: Array | None = None
    ) -> Latent:
        """dh/dt = MLP(h, p, |u|²), the explicit scheme's evolution of the embedding.

        Given the strain rate L (N, 3, 3) of each atom's cell, the MLP also takes tr L and |L|², with
        L in units of STRAIN_UNIT.
        """
        inputs = [h, p, jnp.sum(velocities**2, -1, keepdims=True)]
        if strain_rate is not None:
            scaled = strain_rate / STRAIN_UNIT
            trace = jnp.trace(scaled, axis1=-2, axis2=-1)
            inputs.append(jnp.stack([trace, jnp.sum(scaled**2, (-2, -1))], -1))
        return self.rate(jnp.concatenate(inputs, -1))

    def initial_velocity(self, encoding: Encoding, graph: Graph) -> Velocities:
        """u(0) (N, 3), not yet constrained; see `dynamics.constrain_velocity`."""
        return self.velocity_gate(encoding, graph)

    def initial_strain_rate(self, encoding: Encoding, graph: Graph) -> Array:
        """L(0) (G, 3, 3), symmetric, not yet projected; see `dynamics.strainable`."""
        return self.strain_gate(encoding, graph)

    def mobility(self, h: Latent) -> Array:
        """Inverse masses 1/m_i > 0 (N, 1) from the latents h, for dynamics.mass="learned"."""
        return _positive(self.mobility_head(h))

    def cell_mass(self, h: Latent, graph: Graph) -> Array:
        """Mass M > 0 of the cell, eV per atom: a scalar, or with dynamics.mass="learned" (G, 1, 1).

        The latter is a function of the mean latent of each structure.
        """
        mass = CELL_MASS * jnp.exp(self.log_cell_mass)
        if self.dynamics.mass != "learned":
            return mass
        n_graphs, size = graph.n_node.shape[0], jnp.maximum(graph.n_node, 1).astype(h.dtype)
        total = jnp.where(graph.nodes["mask"][:, None], h, 0.0)
        mean = jraph.segment_sum(total, graph.nodes["graph"], n_graphs) / size[:, None]
        return mass / _positive(self.compliance_head(mean))[..., None]

    def cell_friction(self) -> Array:
        """Friction gamma' >= 0 of the cell, dimensionless; zero when friction is switched off."""
        return jnp.exp(self.log_cell_friction) if self.dynamics.friction else jnp.zeros(())

    def friction(self) -> Array:
        """Friction gamma >= 0 of the atoms, dimensionless; zero when switched off."""
        return jnp.exp(self.log_friction) if self.dynamics.friction else jnp.zeros(())

    def time_scale(self) -> Array:
        """Pseudotime scale s > 0 (in first order, the mobility); one when switched off."""
        on = self.dynamics.time_scale or self.dynamics.order == "first"
        return jnp.exp(self.log_time_scale) if on else jnp.ones(())

    def initialise(self, graph: Graph) -> Energies:
        """Calls every method once, so that ``init`` creates every parameter."""
        positions = graph.nodes["positions"]
        encoding = self.encode(graph, positions)
        if self.dynamics.latent == "static":
            return self.read_out(encoding.h, graph)
        velocities = self.initial_velocity(encoding, graph)
        self.friction(), self.time_scale()
        rates: tuple[Array, ...] = ()
        if self.dynamics.cell == "variable":
            self.cell_mass(encoding.h, graph), self.cell_friction()
            rates = (self.initial_strain_rate(encoding, graph)[graph.nodes["graph"]],)
        if self.dynamics.latent != "explicit":
            return self.read_out(encoding.h, graph)
        energy, p = self.explicit_energy(encoding.h, graph, positions)
        if self.dynamics.mass == "learned":
            self.mobility(encoding.h)
        self.latent_rate(encoding.h, p, velocities, *rates)
        return energy


def _positive(x: Array) -> Array:
    """exp(x) for small x, bounded by exp(-2) and exp(2): rates that no step can overshoot."""
    return jnp.exp(2.0 * jnp.tanh(x / 2.0))


def call(network: RelaxNetwork, params: Params, method: str, *args: Any) -> Any:
    """Calls one of the network's methods with these parameters."""
    with matmul_precision(network.config.matmul):
        return network.apply({"params": params}, *args, method=method)


class _VelocityHead(nn.Module):
    """u(0)_i = sum_j sum_n G_n(h_i, h_j, r_ij) f_ij,n1 + W v_i + W' (v_i x axial_i).

    The first term is an equivariant linear map of the l = 1 part of the edge expansion,
    gated by invariants; the other two use the vector features of the triplets.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, encoding: Encoding, graph: Graph) -> Velocities:
        m, h, geo, edges = self.config, encoding.h, encoding.geometry, pair_list(graph)
        sent = nn.Dense(m.features, use_bias=False, name="senders")(h)
        own = nn.Dense(m.features, name="receiver")(h)
        radial = nn.Dense(m.features, use_bias=False, name="radial")(geo.radial)
        radial = both_ways(radial, pair_map(graph))
        hidden = nn.silu(gather_senders(sent, edges) + spread(own, edges.receivers) + radial)
        gates = nn.Dense(m.n_bessel, name="small_gates")(hidden)
        radial, harmonics = encoding.expansion  # envelope included
        along = jnp.sum(gates * radial[:, :, 1], 1, keepdims=True) * harmonics.filter("1o").array
        u = sum_edges(along, edges.receivers, h.shape[0]) / PAIR_NORM
        if m.vector_messages:
            polar, axial = encoding.vectors
            weights = nn.Dense(2 * polar.shape[1], name="small_vectors")(nn.silu(own))
            w_polar, w_cross = jnp.split(weights[..., None], 2, axis=1)
            u = u + jnp.sum(w_polar * polar + w_cross * jnp.cross(polar, axial), 1)
        return VELOCITY_UNIT * u


class _StrainHead(nn.Module):
    """L(0) = mean_i T_i over a structure's atoms, from invariants and the l = 0 and 2 parts.

    T_i = sum_j sum_n [G_n f_ij,n0 1 + G'_n f_ij,n2 (r r - 1/3)] + w(h_i) 1, where r is the direction
    of the edge, and G and G' are functions of h_i, h_j and r_ij as in `_VelocityHead`. It is the
    mean, not the sum, so that a supercell is strained like its unit cell.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, encoding: Encoding, graph: Graph) -> Array:
        m, h, geo, edges = self.config, encoding.h, encoding.geometry, pair_list(graph)
        n_atoms, n_graphs = h.shape[0], graph.n_node.shape[0]
        width = m.pair_features
        own = nn.Dense(width, name="receiver")(h)
        hidden = gather_senders(nn.Dense(width, use_bias=False, name="senders")(h), edges)
        hidden = hidden + spread(own, edges.receivers)
        radial = nn.Dense(width, use_bias=False, name="radial")(geo.radial)
        hidden = nn.silu(hidden + both_ways(radial, pair_map(graph)))
        gates = nn.Dense(2 * m.n_bessel, name="small_gates")(hidden)
        radial = encoding.expansion.radial  # envelope included
        even = jnp.sum(gates[:, : m.n_bessel] * radial[:, :, 0], 1)
        quadrupole = jnp.sum(gates[:, m.n_bessel :] * radial[:, :, 2], 1)
        r, identity = geo.vectors / geo.lengths[:, None], jnp.eye(3, dtype=h.dtype)
        shape = r[:, :, None] * r[:, None, :] - identity / 3
        tensors = even[:, None, None] * identity + quadrupole[:, None, None] * shape
        per_atom = sum_edges(tensors, edges.receivers, n_atoms) / PAIR_NORM
        per_atom = per_atom + nn.Dense(1, name="small_own")(nn.silu(own))[..., None] * identity
        per_atom = jnp.where(graph.nodes["mask"][:, None, None], per_atom, 0.0)
        total = jraph.segment_sum(per_atom, graph.nodes["graph"], n_graphs)
        return STRAIN_UNIT * total / jnp.maximum(graph.n_node, 1).astype(h.dtype)[:, None, None]
