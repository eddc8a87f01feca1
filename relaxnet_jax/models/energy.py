"""The energy network: encoder, geometry read-out, attention, head, and the ODE's own heads."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import jraph
from jax import Array

from relaxnet_jax.config import DynamicsConfig, GraphConfig, ModelConfig
from relaxnet_jax.graph import pair_list
from relaxnet_jax.models.encoder import Encoder, Encoding
from relaxnet_jax.models.layers import MLP, PAIR_NORM, AttentionBlock, pair_geometry
from relaxnet_jax.ops import gather_senders, spread, sum_edges
from relaxnet_jax.typing import Energies, Graph, Latent, Params, Positions, Velocities

# Å; velocities are learned in this unit, so that training starts near doing nothing.
VELOCITY_UNIT = 0.05


class RelaxNetwork(nn.Module):
    """All learned functions of RelaxNet, as methods that share parameters.

    Energies are in units of the training set's spread per atom and relative to the
    composition energies; `potential` turns them into eV.
    """

    graph_config: GraphConfig
    config: ModelConfig
    dynamics: DynamicsConfig

    def setup(self) -> None:
        m, d = self.config, self.dynamics
        self.encoder = Encoder(self.graph_config, m)
        if m.attention:
            self.attention = AttentionBlock(m.attention_heads)
        self.head = MLP((m.features, m.features // 2, 1), small=True)
        if d.latent == "explicit":
            self.pair_send = nn.Dense(m.pair_features)
            self.pair_filter = nn.Dense(m.pair_features, use_bias=False)
            self.pair_update = MLP((m.features, m.features))
            self.rate = MLP((m.features, m.features), small=True)
        self.velocity_gate = _VelocityHead(m)
        if d.friction:
            self.log_friction = self.param("log_friction", nn.initializers.zeros, ())
        if d.time_scale or d.order == "first":
            self.log_time_scale = self.param("log_time_scale", nn.initializers.zeros, ())

    def encode(self, graph: Graph, positions: Positions) -> Encoding:
        """h and vector features of the positions, by the full encoder."""
        return self.encoder(graph, positions)

    def pair_pass(self, h: Latent, graph: Graph, positions: Positions) -> Array:
        """p_i = sum_j W(r_ij) * (V h_j): (N, P), the explicit scheme's cheap look at x."""
        _, _, radial, _ = pair_geometry(graph, positions, self.graph_config, self.config)
        edges = pair_list(graph)
        messages = self.pair_filter(radial) * gather_senders(self.pair_send(h), edges)
        return sum_edges(messages, edges.receivers, h.shape[0]) / PAIR_NORM

    def explicit_energy(
        self, h: Latent, graph: Graph, positions: Positions
    ) -> tuple[Energies, Array]:
        """Energy (G,) of latent h at x, and the pair features p (N, P)."""
        p = self.pair_pass(h, graph, positions)
        return self.read_out(h + self.pair_update(jnp.concatenate([h, p], -1)), graph), p

    def read_out(self, h: Latent, graph: Graph) -> Energies:
        """Attention block and energy head, summed over each structure: (G,)."""
        if self.config.attention:
            h = self.attention(h, graph)
        per_atom = jnp.where(graph.nodes["mask"], self.head(h)[:, 0], 0.0)
        return jraph.segment_sum(per_atom, graph.nodes["graph"], graph.n_node.shape[0])

    def latent_rate(self, h: Latent, p: Array, velocities: Velocities) -> Latent:
        """dh/dt = MLP(h, p, |u|²), the explicit scheme's evolution of the embedding."""
        speed = jnp.sum(velocities**2, -1, keepdims=True)
        return self.rate(jnp.concatenate([h, p, speed], -1))

    def initial_velocity(self, encoding: Encoding, graph: Graph) -> Velocities:
        """u(0) (N, 3): unconstrained; see `dynamics.constrain_velocity`."""
        return self.velocity_gate(encoding, graph)

    def friction(self) -> Array:
        """gamma >= 0, dimensionless; zero when switched off."""
        return jnp.exp(self.log_friction) if self.dynamics.friction else jnp.zeros(())

    def time_scale(self) -> Array:
        """Pseudotime scale (or mobility) > 0; one when switched off."""
        on = self.dynamics.time_scale or self.dynamics.order == "first"
        return jnp.exp(self.log_time_scale) if on else jnp.ones(())

    def initialise(self, graph: Graph) -> Energies:
        """Calls every method once, so that ``init`` makes every parameter."""
        positions = graph.nodes["positions"]
        encoding = self.encode(graph, positions)
        velocities = self.initial_velocity(encoding, graph)
        self.friction(), self.time_scale()
        if self.dynamics.latent == "implicit":
            return self.read_out(encoding.h, graph)
        energy, p = self.explicit_energy(encoding.h, graph, positions)
        self.latent_rate(encoding.h, p, velocities)
        return energy


def call(network: RelaxNetwork, params: Params, method: str, *args: Any) -> Any:
    """One of the network's methods with these parameters."""
    return network.apply({"params": params}, *args, method=method)


class _VelocityHead(nn.Module):
    """u(0)_i = sum_j sum_n G_n(h_i, h_j, r_ij) f_ij,n1 + W v_i + W' (v_i x axial_i).

    The first term is an equivariant linear map of the l = 1 part of the edge expansion,
    gated by invariants; the others carry the triplets' vector features.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, encoding: Encoding, graph: Graph) -> Velocities:
        m, h, geo, edges = self.config, encoding.h, encoding.geometry, pair_list(graph)
        sent = nn.Dense(m.features, use_bias=False, name="senders")(h)
        own = nn.Dense(m.features, name="receiver")(h)
        radial = nn.Dense(m.features, use_bias=False, name="radial")(geo.radial)
        hidden = nn.silu(gather_senders(sent, edges) + spread(own, edges.receivers) + radial)
        gates = nn.Dense(m.n_bessel, name="small_gates")(hidden)
        radial, harmonics = encoding.expansion  # envelope included
        along = jnp.sum(gates * radial[:, :, 1], 1, keepdims=True) * harmonics.filter("1o").array
        u = sum_edges(along, edges.receivers, h.shape[0]) / PAIR_NORM
        if m.vector_messages:
            polar, axial = encoding.vectors
            weights = nn.Dense(2 * m.vector_features, name="small_vectors")(nn.silu(own))
            w_polar, w_cross = jnp.split(weights[..., None], 2, axis=1)
            u = u + jnp.sum(w_polar * polar + w_cross * jnp.cross(polar, axial), 1)
        return VELOCITY_UNIT * u


__all__ = ["RelaxNetwork"]
