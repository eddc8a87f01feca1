"""E(n)-equivariant layers (Satorras, Hoogeboom & Welling 2021), a baseline for the DTNN encoder."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from relaxnet_jax.config import GraphConfig, ModelConfig
from relaxnet_jax.graph import pair_list, pair_map, pair_vectors
from relaxnet_jax.models.encoder import Encoding, embed_atoms, expand_edges
from relaxnet_jax.models.layers import MLP, PAIR_NORM, Geometry, VectorFeatures, geometry
from relaxnet_jax.models.precision import LayerNorm
from relaxnet_jax.ops import both_ways, gather_senders, spread, sum_edges
from relaxnet_jax.typing import Graph, Positions


class EGNNLayer(nn.Module):
    """One equivariant graph convolution (equations 3 to 6 of the paper) as a step of a scan.

      m_ij = phi_e(h_i, h_j, |x_i - x_j|²/c², a_ij)      a_ij: radial functions of r_ij at the input
      x_i <- x_i + C sum_j (x_i - x_j) phi_x(m_ij)
      h_i <- h_i + phi_h(h_i, C sum_j m_ij)

    It differs from the paper as follows:

    - Sums run over neighbours within the cutoff c instead of all pairs.
    - m_ij and phi_x(m_ij) are multiplied by the envelope of r_ij at the input, so that energies and
      forces are smooth when a pair enters the cutoff.
    - C is a constant in both sums, so that energies stay additive.
    - phi_h starts near zero, as phi_x does: with ordinary initial parameters, four layers learned
      nothing at learning rates that suit two.
    """

    graph_config: GraphConfig
    config: ModelConfig

    @nn.compact
    def __call__(self, carry: tuple[Array, Positions], graph: Graph, geo: Geometry):
        (h, positions), width, edges = carry, self.config.features, pair_list(graph)
        cut = geo.envelope[:, None]
        # Padding edges have length FAR, which must not enter any product.
        vectors = jnp.where(graph.edges["mask"][:, None], pair_vectors(graph, positions), 0.0)
        squares = jnp.sum(vectors**2, -1, keepdims=True) / self.graph_config.cutoff**2
        known = jnp.concatenate([squares, both_ways(geo.radial, pair_map(graph))], -1)

        # The first layer of phi_e acts on the parts of its input before they are gathered.
        hidden = nn.Dense(width, name="edges")(known)
        hidden = hidden + spread(
            nn.Dense(width, use_bias=False, name="receiver")(h), edges.receivers
        )
        sent = nn.Dense(width, use_bias=False, name="senders")(h)
        hidden = nn.silu(hidden + gather_senders(sent, edges))
        messages = nn.silu(nn.Dense(width, name="message")(hidden)) * cut

        weight = MLP((width, 1), small=True, name="positions")(messages) * cut
        total = sum_edges(messages, edges.receivers, h.shape[0]) / PAIR_NORM
        step = sum_edges(-weight * vectors, edges.receivers, h.shape[0]) / PAIR_NORM
        update = MLP((width, width), small=True, name="update")
        h = h + update(jnp.concatenate([h, total], -1))
        positions = positions + step.astype(positions.dtype)
        return (h, positions), positions


class EGNNEncoder(nn.Module):
    """Equivariant encoder: positions -> node features h (N, F) and vectors (N, L, 3).

    The inputs are those of the DTNN encoder, as is the projection, here of the last h alone. The
    polar vectors are the displacements of the atoms after each of the L layers; the axial vectors
    are zero.
    """

    graph_config: GraphConfig
    config: ModelConfig

    @nn.compact
    def __call__(self, graph: Graph, positions: Positions) -> Encoding:
        g, m = self.graph_config, self.config
        geo = geometry(graph, positions, g, m)
        expansion = expand_edges(geo, graph, g, m)
        h = embed_atoms(expansion, graph, m)
        layers = nn.scan(
            EGNNLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=m.layers,
        )(g, m, name="egnn")
        (h, _), by_layer = layers((h, positions), graph, geo)
        h = LayerNorm(name="norm")(nn.Dense(m.features, name="project")(h))
        moved = jnp.swapaxes(by_layer - positions, 0, 1)
        return Encoding(h, VectorFeatures(moved, jnp.zeros_like(moved)), geo, expansion)
