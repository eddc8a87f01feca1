"""Three-body messages with one MLP per triplet (paper, section 4.2 and figure 2)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from relaxnet_jax.basis.angular import zonal_harmonics
from relaxnet_jax.graph import bond_list
from relaxnet_jax.models.layers import MLP, Geometry, VectorFeatures, VectorUpdate
from relaxnet_jax.models.precision import LayerNorm
from relaxnet_jax.ops import gather_senders
from relaxnet_jax.typing import Graph

TRIPLET_NORM = 30.0  # see layers.PAIR_NORM


class TripletMPNN(nn.Module):
    """Scalar and vector messages of all triplets.

    For the bonds j->i and k->i at atom i, j != k, with directions a = r_ij/|r_ij| and
    b = r_ik/|r_ik| and angle theta, the MLPs take [h_i, h_j, h_k, zonal(theta), radial(r_ij),
    radial(r_ik)]:

      scalar message  MLP_s(...), summed; h <- h + MLP(sum)
      vector message  sum_c MLP_v(...)_c B_c, B = (a, b - cos(theta) a, a x b), summed;
                      v <- MLP_g(h) * v + MLP_m(h) * sum

    B is the Gram-Schmidt basis without the normalisation, which would be singular for collinear
    bonds: its second and third vectors vanish smoothly with sin(theta).
    """

    features: int
    hidden: int
    channels: int
    vector_messages: bool
    l_angle: int

    @nn.compact
    def __call__(self, h: Array, v: VectorFeatures, graph: Graph, geo: Geometry):
        slots, used = graph.nodes["bond_slots"], graph.nodes["bond_slot_mask"]
        T, C = self.hidden, self.channels
        width = 3 * T if self.vector_messages else T

        # The first layer of MLP_s and MLP_v acts on each part of the concatenation separately.
        # One gather serves both j and k.
        normed = LayerNorm(name="norm")(h)
        sent = nn.Dense(2 * width, use_bias=False, name="senders")(normed)
        parts = gather_senders(sent, bond_list(graph))
        parts = parts + nn.Dense(2 * width, use_bias=False, name="bonds")(geo.bond_radial)
        # Each atom's bonds are laid out in K slots, so that its triplets form a dense array.
        parts, a = parts[slots], geo.directions[slots]
        cut = jnp.where(used, geo.bond_envelope[slots], 0.0)
        centre = nn.Dense(width, name="receiver")(normed)
        part_j, part_k = parts[..., :width] + centre[:, None], parts[..., width:]
        angle_kernel = self.param(
            "angle_kernel", nn.initializers.lecun_normal(), (self.l_angle + 1, width)
        )
        scalars, first, of_k, moments = _triplet_sums(part_j, part_k, angle_kernel, a, cut, T)
        scalars = nn.Dense(self.features, name="scalar_out")(scalars)
        h = h + MLP((self.features, self.features), name="update")(scalars)
        if not self.vector_messages:
            return h, v

        # sum_jk c1 a_j + c2 (a_k - cos a_j): the coefficients of each direction are summed first.
        along_j = nn.Dense(C, use_bias=False, name="along")(first)
        perpendicular = nn.Dense(C, use_bias=False, name="perpendicular")(of_k - moments[:, :, 0])
        polar = jnp.einsum("njc,nja->nca", along_j + perpendicular, a)
        # sum_jk c3 a_j x a_k = sum_j a_j x (sum_k c3 a_k)
        inner = nn.Dense(C, use_bias=False, name="cross")(moments[:, :, 1:])
        axial = jnp.cross(a[..., None], inner, axis=2).sum(1).swapaxes(1, 2)
        total = VectorFeatures(polar, axial)
        return h, VectorUpdate(self.features, C, name="vectors")(h, v, total)


def _triplet_sums(part_j, part_k, angle_kernel, directions, cut, T: int):
    """Weighted sums over triplets of the activations g = SiLU(part_j + part_k + W zonal).

    Scans over the bonds j, so that only (N, K, width) values exist at once: they stay in cache and
    are recomputed in the reverse pass. Measured 2.4 times faster than the (N, K, K, width) array.

    Args:
      part_j, part_k: (N, K, width), of width T (scalar block only) or 3T (a scalar block and two
        vector blocks).
      angle_kernel: (l_angle + 1, width), W.
      directions: (N, K, 3) unit vectors of the bonds.
      cut: (N, K) envelope of the bonds, zero in unused slots.

    Returns:
      Four arrays, of which the last three are None without vector blocks: the scalar block summed
      over j and k (N, T); the first vector block summed over k (N, K, T); the second vector block
      summed over j (N, K, T); the second vector block times [cos theta, a_k] summed over k
      (N, K, 4, T).
    """
    n_atoms, n_bonds, width = part_j.shape
    vectors = width > T
    l_angle = angle_kernel.shape[0] - 1
    others = (1.0 - jnp.eye(n_bonds, dtype=part_j.dtype)) / TRIPLET_NORM

    @jax.checkpoint
    def bond(carry, x):
        part, a_j, cut_j, other = x
        cosine = jnp.einsum("na,nka->nk", a_j, directions)
        weight = cut_j[:, None] * cut * other
        hidden = part[:, None] + part_k + zonal_harmonics(cosine, l_angle) @ angle_kernel
        hidden = nn.silu(hidden) * weight[..., None]
        scalars = carry[0] + hidden[..., :T].sum(1)
        if not vectors:
            return (scalars,), None
        second = hidden[..., 2 * T :]
        rows = jnp.concatenate([cosine[:, None], directions.swapaxes(1, 2)], 1)
        moments = jnp.einsum("nrk,nkt->nrt", rows, second)
        return (scalars, carry[1] + second), (hidden[..., T : 2 * T].sum(1), moments)

    by_bond = [x.swapaxes(0, 1) for x in (part_j, directions, cut)]
    zero: tuple[Array, ...] = (jnp.zeros((n_atoms, T), part_j.dtype),)
    if vectors:
        zero = (*zero, jnp.zeros((n_atoms, n_bonds, T), part_j.dtype))
    carry, sums = jax.lax.scan(bond, zero, (*by_bond, others))
    if not vectors:
        return carry[0], None, None, None
    return carry[0], sums[0].swapaxes(0, 1), carry[1], sums[1].swapaxes(0, 1)
