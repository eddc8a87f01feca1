"""The encoder: edge expansion, node features, L DTNN layers (paper, figure 2)."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from relaxnet_jax.basis.angular import EdgeExpansion, real_spherical_harmonics
from relaxnet_jax.basis.radial import spherical_bessel_basis
from relaxnet_jax.config import GraphConfig, ModelConfig
from relaxnet_jax.graph import MAX_ATOMIC_NUMBER, pair_list, pair_map
from relaxnet_jax.models.layers import (
    MLP,
    PAIR_NORM,
    Geometry,
    PairConvolution,
    VectorFeatures,
    geometry,
)
from relaxnet_jax.models.moments import MomentMPNN
from relaxnet_jax.models.precision import LayerNorm
from relaxnet_jax.models.triplets import TripletMPNN
from relaxnet_jax.ops import both_ways, gather_senders, sum_edges
from relaxnet_jax.typing import Graph, Latent, Positions


class Encoding(NamedTuple):
    """What the encoder returns: h (N, F) and vector features, geometry and edge expansion."""

    h: Latent
    vectors: VectorFeatures
    geometry: Geometry
    expansion: EdgeExpansion


class PowerSpectrum(nn.Module):
    """Invariants of the edge expansion: log(1 + sum_m |sum_j w_c(Z_j) (W_l f_ij,lm)_c|²) for all l, c.

    W_l mixes the n radial functions of degree l into C channels (an equivariant linear map).
    Returns (N, C·(l_max + 1)).
    """

    channels: int

    @nn.compact
    def __call__(self, expansion: EdgeExpansion, h: Array, graph: Graph) -> Array:
        C, n_atoms, edges = self.channels, h.shape[0], pair_list(graph)
        radial, harmonics = expansion
        _, n_roots, degrees = radial.shape
        mix = self.param("mix_kernel", nn.initializers.lecun_normal(), (degrees, n_roots, C))
        weights = gather_senders(nn.Dense(C, name="weight")(h), edges)
        weighted = jnp.einsum("enl,lnc->elc", radial, mix) * weights[:, None]
        invariants = []
        for l, chunk in enumerate(harmonics.chunks):  # (E, 1, 2l+1)
            products = weighted[:, l, :, None] * chunk
            total = sum_edges(products, edges.receivers, n_atoms) / PAIR_NORM
            invariants.append(jnp.log1p(jnp.sum(total**2, -1)))
        return jnp.concatenate(invariants, -1)


class DTNNLayer(nn.Module):
    """Pair convolution, then three-body messages, both residual; then the position update, if any.

    One step of a scan with the carry (h, v, positions) and the output h.
    """

    graph_config: GraphConfig
    config: ModelConfig

    @nn.compact
    def __call__(self, carry, graph: Graph, initial: Geometry):
        (h, v, positions), m = carry, self.config
        geo = initial
        if m.update_positions:
            geo = geometry(graph, positions, self.graph_config, m).within(initial)
        h, step = PairConvolution(m.features, m.pair_features, m.update_positions, name="pair")(
            h, graph, geo
        )
        h, v = three_body(m)(h, v, graph, geo)
        if step is not None:
            positions = positions + step  # fixed atoms too: the energy does not see which are
        return (h, v, positions), h


def three_body(m: ModelConfig) -> nn.Module:
    """The three-body layer named by ``model.interaction``."""
    shared: dict[str, Any] = {
        "features": m.features,
        "hidden": m.triplet_features,
        "channels": m.vector_features,
        "vector_messages": m.vector_messages,
        "l_angle": m.l_angle,
        "name": m.interaction,
    }
    if m.interaction == "triplets":
        return TripletMPNN(**shared)
    return MomentMPNN(moments=m.moment_channels, **shared)


def expand_edges(geo: Geometry, graph: Graph, g: GraphConfig, m: ModelConfig) -> EdgeExpansion:
    """The edge expansion, made dimensionless and multiplied by the envelope."""
    radial = spherical_bessel_basis(geo.pair_lengths, g.cutoff, m.n_bessel, m.l_max)
    radial = radial * (g.cutoff**1.5 * geo.pair_envelope[:, None, None])
    harmonics = real_spherical_harmonics(geo.vectors, m.l_max)
    return EdgeExpansion(both_ways(radial, pair_map(graph)), harmonics)


def embed_atoms(expansion: EdgeExpansion, graph: Graph, m: ModelConfig) -> Latent:
    """Node features (N, F) that the layers start from.

    To be called inside an encoder, whose parameters it creates.
    """
    h = nn.Embed(MAX_ATOMIC_NUMBER + 1, m.features, name="element")(graph.nodes["atomic_numbers"])
    if m.charges:
        h = h + nn.Dense(m.features, name="charge")(graph.nodes["charges"][:, None])
    spectrum = PowerSpectrum(m.expansion_channels, name="spectrum")(expansion, h, graph)
    return h + MLP((m.features, m.features), name="input")(spectrum)


class Encoder(nn.Module):
    """Equivariant encoder: positions -> node features h (N, F) and vectors (N, C, 3)."""

    graph_config: GraphConfig
    config: ModelConfig

    @nn.compact
    def __call__(self, graph: Graph, positions: Positions) -> Encoding:
        g, m = self.graph_config, self.config
        n_atoms = positions.shape[0]
        geo = geometry(graph, positions, g, m)

        expansion = expand_edges(geo, graph, g, m)
        h = embed_atoms(expansion, graph, m)

        zeros = jnp.zeros((n_atoms, m.vector_features, 3), h.dtype)
        # A scan over the layers compiles a single one, however many there are.
        layers = nn.scan(
            DTNNLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=m.layers,
        )(g, m, name="dtnn")
        carry = (h, VectorFeatures(zeros, zeros), positions)
        (_, v, _), by_layer = layers(carry, graph, geo)
        hidden = list(by_layer)
        if m.vector_messages:
            hidden.append(jnp.log1p(v.invariants()))
        h = LayerNorm(name="norm")(
            nn.Dense(m.features, name="project")(jnp.concatenate(hidden, -1))
        )
        return Encoding(h, v, geo, expansion)
