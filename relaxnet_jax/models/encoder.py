"""The encoder: edge expansion, node features, L DTNN layers (paper, figure 2)."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from relaxnet_jax.basis.angular import EdgeExpansion, edge_expansion
from relaxnet_jax.config import GraphConfig, ModelConfig
from relaxnet_jax.graph import MAX_ATOMIC_NUMBER, shift_vectors
from relaxnet_jax.models.layers import (
    MLP,
    PAIR_NORM,
    Geometry,
    PairConvolution,
    TripletMPNN,
    VectorFeatures,
    geometry,
)
from relaxnet_jax.ops import gather_senders
from relaxnet_jax.typing import Graph, Latent, Positions


class Encoding(NamedTuple):
    """h (N, F), vector features; geometry and edge expansion of the positions."""

    h: Latent
    vectors: VectorFeatures
    geometry: Geometry
    expansion: EdgeExpansion


class PowerSpectrum(nn.Module):
    """Invariants of the edge expansion: log(1 + sum_m |sum_j w_c(Z_j) (W_l f_ij,lm)_c|²) for l, c.

    W_l mixes the n radial functions of degree l into C channels (an equivariant linear map).
    Returns (N, C·(l_max + 1)).
    """

    channels: int

    @nn.compact
    def __call__(self, expansion: EdgeExpansion, h: Array, graph: Graph) -> Array:
        C, n_atoms = self.channels, h.shape[0]
        radial, harmonics = expansion
        _, n_roots, degrees = radial.shape
        mix = self.param("mix_kernel", nn.initializers.lecun_normal(), (degrees, n_roots, C))
        weights = nn.Dense(C, name="weight")(h)
        weights = gather_senders(weights, graph.senders, graph.edges["reverse"])
        weighted = jnp.einsum("enl,lnc->elc", radial, mix) * weights[:, None]
        weighted = weighted.reshape(n_atoms, -1, degrees, C)
        invariants = []
        for l, chunk in enumerate(harmonics.chunks):  # (E, 1, 2l+1)
            chunk = chunk.reshape(n_atoms, -1, 2 * l + 1)
            total = jnp.einsum("nsc,nsm->ncm", weighted[:, :, l], chunk) / PAIR_NORM
            invariants.append(jnp.log1p(jnp.sum(total**2, -1)))
        return jnp.concatenate(invariants, -1)


class DTNNLayer(nn.Module):
    """Pair convolution, then TripletMPNN, both residual; then, if switched on, the positions move.

    A step of a scan: carries (h, v, positions) and gives out h.
    """

    graph_config: GraphConfig
    config: ModelConfig

    @nn.compact
    def __call__(self, carry, graph: Graph, shifts: Array, initial: Geometry):
        (h, v, positions), m = carry, self.config
        geo = initial
        if m.update_positions:
            geo = geometry(graph, positions, shifts, self.graph_config, m)
        h, step = PairConvolution(m.features, m.pair_features, m.update_positions, name="pair")(
            h, graph, geo
        )
        h, v = TripletMPNN(
            m.features,
            m.triplet_features,
            m.vector_features,
            m.vector_messages,
            m.l_angle,
            name="triplet",
        )(h, v, graph, geo)
        if step is not None:
            positions = positions + jnp.where(graph.nodes["fixed"][:, None], 0.0, step)
        return (h, v, positions), h


class Encoder(nn.Module):
    """positions -> node features h (N, F) and vectors (N, C, 3), equivariantly."""

    graph_config: GraphConfig
    config: ModelConfig

    @nn.compact
    def __call__(self, graph: Graph, positions: Positions) -> Encoding:
        g, m = self.graph_config, self.config
        n_atoms = positions.shape[0]
        shifts = shift_vectors(graph).astype(positions.dtype)
        geo = geometry(graph, positions, shifts, g, m)

        numbers = graph.nodes["atomic_numbers"]
        h = nn.Embed(MAX_ATOMIC_NUMBER + 1, m.features, name="element")(numbers)
        if m.charges:
            h = h + nn.Dense(m.features, name="charge")(graph.nodes["charges"][:, None])

        expansion = edge_expansion(geo.vectors, geo.lengths, g.cutoff, m.n_bessel, m.l_max)
        unit = g.cutoff**1.5 * geo.envelope[:, None, None]  # makes it dimensionless
        expansion = expansion._replace(radial=expansion.radial * unit)
        spectrum = PowerSpectrum(m.expansion_channels, name="spectrum")(expansion, h, graph)
        h = h + MLP((m.features, m.features), name="input")(spectrum)

        zeros = jnp.zeros((n_atoms, m.vector_features, 3), h.dtype)
        # A scan over the layers: one of them to compile, however many there are.
        layers = nn.scan(
            DTNNLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=m.layers,
        )(g, m, name="dtnn")
        carry = (h, VectorFeatures(zeros, zeros), positions)
        (_, v, _), by_layer = layers(carry, graph, shifts, geo)
        hidden = list(by_layer)
        if m.vector_messages:
            hidden.append(jnp.log1p(v.invariants()))
        h = nn.LayerNorm(name="norm")(
            nn.Dense(m.features, name="project")(jnp.concatenate(hidden, -1))
        )
        return Encoding(h, v, geo, expansion)
