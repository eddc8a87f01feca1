"""The building blocks of the encoder (paper, section 4.2 and figure 2).

Where the output of an MLP is summed over edges or triplets, its last, linear layer is applied
after the sum, and its first layer, which acts on a concatenation, is applied to each part before
the parts are gathered: the functions are the same, at the cost of atoms and edges instead of
triplets. The three-body layers are in `moments` and `triplets`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jraph
from jax import Array

from relaxnet_jax.basis.radial import envelope, radial_features
from relaxnet_jax.config import GraphConfig, ModelConfig
from relaxnet_jax.graph import (
    bond_vectors,
    once_per_pair,
    pair_list,
    pair_map,
    pair_vectors,
    unordered_pairs,
)
from relaxnet_jax.models.precision import LayerNorm
from relaxnet_jax.ops import both_ways, convolve_pairs, gather_senders, safe_norm, sum_edges
from relaxnet_jax.typing import Graph, Positions

# Sums over neighbours are divided by this, a typical envelope-weighted neighbour count in crystals,
# so that messages are of order one. It is a constant so that energies stay additive.
PAIR_NORM = 2.0


class MLP(nn.Module):
    """Dense layers with SiLU between them, the last one linear: (..., A) -> (..., widths[-1]).

    With ``small`` the output starts near zero (see `models.init`).
    """

    widths: tuple[int, ...]
    small: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for width in self.widths[:-1]:
            x = nn.silu(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1], name="small_out" if self.small else "out")(x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Geometry:
    """The features of the positions that the layers use.

    Attributes:
      vectors: (E, 3) Å, edge vectors.
      lengths: (E,) Å, edge lengths.
      envelope: (E,) envelope of the edges, with the pair cutoff.
      pair_lengths: (P,) Å, the length that the two edges of a pair share.
      pair_envelope: (P,) envelope of the pairs, with the pair cutoff.
      radial: (P, R) both radial bases of the pairs, times the envelope.
      directions: (B, 3) unit vectors of the bonds.
      bond_radial: (B, R) both radial bases of the bonds, with the triplet cutoff.
      bond_envelope: (B,) envelope of the bonds, with the triplet cutoff; zero in padding.
    """

    vectors: Array
    lengths: Array
    envelope: Array
    pair_lengths: Array
    pair_envelope: Array
    radial: Array
    directions: Array
    bond_radial: Array
    bond_envelope: Array

    def within(self, real: Geometry) -> Geometry:
        """Multiplies ``radial`` and all envelopes by the envelopes at the ``real`` positions.

        The neighbour list was built for the real positions. Where the encoder moves atoms, pairs
        that the list is not guaranteed to contain must not contribute.
        """
        return dataclasses.replace(
            self,
            radial=self.radial * real.pair_envelope[:, None],
            pair_envelope=self.pair_envelope * real.pair_envelope,
            envelope=self.envelope * real.envelope,
            bond_envelope=self.bond_envelope * real.bond_envelope,
        )


class PairGeometry(NamedTuple):
    """The features that depend on the distance alone, once for the two edges of a pair.

    Attributes:
      lengths: (P,) Å.
      envelope: (P,) envelope with the pair cutoff.
      radial: (P, R) both radial bases, times the envelope.
    """

    lengths: Array
    envelope: Array
    radial: Array


def pair_geometry(
    graph: Graph, positions: Positions, g: GraphConfig, m: ModelConfig
) -> PairGeometry:
    """The features of the positions that depend on the distance alone; `geometry` has them all."""
    lengths = safe_norm(once_per_pair(graph, positions))
    cut = envelope(lengths, g.cutoff, m.envelope_power)
    radial = radial_features(lengths, g.cutoff, m.n_gaussian, m.n_bessel) * cut[:, None]
    return PairGeometry(lengths, cut, radial)


def geometry(graph: Graph, positions: Positions, g: GraphConfig, m: ModelConfig) -> Geometry:
    """All pair and bond features of the positions."""
    vectors = pair_vectors(graph, positions)
    pair = pair_geometry(graph, positions, g, m)
    bonds = bond_vectors(graph, positions)
    bond_lengths = safe_norm(bonds)
    return Geometry(
        vectors=vectors,
        lengths=safe_norm(vectors),
        envelope=both_ways(pair.envelope, pair_map(graph)),
        pair_lengths=pair.lengths,
        pair_envelope=pair.envelope,
        radial=pair.radial,
        directions=bonds / bond_lengths[:, None],
        bond_radial=radial_features(bond_lengths, g.triplet_cutoff, m.n_gaussian, m.n_bessel),
        bond_envelope=envelope(bond_lengths, g.triplet_cutoff, m.envelope_power),
    )


class PairConvolution(nn.Module):
    """Continuous-filter convolution: m_ij = W(r_ij) * (V h_j); h_i <- h_i + MLP(sum_j m_ij).

    If ``with_positions``, it also returns sum_j MLP_c(m_ij) r_ij/|r_ij| (N, 3), the encoder's
    position update.
    """

    features: int
    hidden: int
    with_positions: bool = False

    @nn.compact
    def __call__(self, h: Array, graph: Graph, geo: Geometry) -> tuple[Array, Array | None]:
        # geo.radial contains the envelope, but the filter is nonlinear: this factor makes it vanish.
        filters = MLP((self.hidden, self.features), name="filter")(geo.radial)
        filters = filters * geo.pair_envelope[:, None]
        sent = nn.Dense(self.features, name="send")(LayerNorm(name="norm")(h))
        update = MLP((self.features, self.features), name="update")
        if not self.with_positions:
            total = convolve_pairs(filters, sent, unordered_pairs(graph)) / PAIR_NORM
            return h + update(total), None
        n_atoms, edges = h.shape[0], pair_list(graph)
        messages = both_ways(filters, pair_map(graph)) * gather_senders(sent, edges)
        total = sum_edges(messages, edges.receivers, n_atoms) / PAIR_NORM
        weight = (
            MLP((self.hidden, 1), small=True, name="positions")(messages) * geo.envelope[:, None]
        )
        along = weight * geo.vectors / geo.lengths[:, None]
        return h + update(total), sum_edges(along, edges.receivers, n_atoms) / PAIR_NORM


class VectorFeatures(NamedTuple):
    """Equivariant node features (N, C, 3): polar ones change sign under inversion, axial ones do not.

    The third vector of the orthogonal basis is a cross product, hence axial. The two kinds are kept
    apart and never mix in an invariant, so energies are unchanged by reflections too.
    """

    polar: Array
    axial: Array

    def invariants(self) -> Array:
        """Squared norms: (N, 2C)."""
        return jnp.concatenate([jnp.sum(self.polar**2, -1), jnp.sum(self.axial**2, -1)], -1)


class VectorUpdate(nn.Module):
    """v <- MLP_g(h) * v + MLP_m(h) * sum of the vector messages (figure 2)."""

    features: int
    channels: int

    @nn.compact
    def __call__(self, h: Array, v: VectorFeatures, total: VectorFeatures) -> VectorFeatures:
        C = self.channels
        normed = LayerNorm(name="norm")(h)
        gate = MLP((self.features, 2 * C), name="gate")(normed)[..., None]
        mix = MLP((self.features, 2 * C), name="mix")(normed)[..., None]
        return VectorFeatures(
            gate[:, :C] * v.polar + mix[:, :C] * total.polar,
            gate[:, C:] * v.axial + mix[:, C:] * total.axial,
        )


class AttentionBlock(nn.Module):
    """Multi-head softmax attention over the atoms of one structure, linear in their number.

    Each head pools a context c = sum_i softmax_i(q·k_i) w_i over the structure; every atom is
    updated by h <- h + MLP([h, c]). A doubled cell has twice as many atoms, each with half the
    weight: the context is the same, so the energy of a supercell is a multiple of the cell's.
    Attention acts at any distance: the energy of two different fragments far apart is not the sum
    of their separate energies.
    """

    heads: int

    @nn.compact
    def __call__(self, h: Array, graph: Graph) -> Array:
        n_atoms, features = h.shape
        index, n_graphs = graph.nodes["graph"], graph.n_node.shape[0]
        normed = LayerNorm(name="norm")(h)
        logits = nn.Dense(self.heads, name="score")(normed)
        weights = jraph.segment_softmax(logits, index, n_graphs)
        values = nn.Dense(features, name="value")(normed).reshape(n_atoms, self.heads, -1)
        context = jraph.segment_sum(
            (weights[..., None] * values).reshape(n_atoms, -1), index, n_graphs
        )
        # The first layer of MLP([h, c]) is applied by parts, that of the context once per structure.
        hidden = (
            nn.Dense(features, name="own")(normed)
            + nn.Dense(features, use_bias=False, name="context")(context)[index]
        )
        return h + nn.Dense(features, name="out")(nn.silu(hidden))
