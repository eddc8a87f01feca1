"""Three-body messages at the cost of bonds, by the addition theorem of spherical harmonics."""

from __future__ import annotations

import math

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from relaxnet_jax.basis.angular import real_spherical_harmonics
from relaxnet_jax.graph import bond_list
from relaxnet_jax.models.layers import MLP, Geometry, VectorFeatures, VectorUpdate
from relaxnet_jax.models.precision import LayerNorm
from relaxnet_jax.ops import gather_senders, spread, sum_edges
from relaxnet_jax.typing import AnyArray, Graph

# Like layers.PAIR_NORM, for the sum over the third atom and the sum over the bonds.
THIRD_NORM = 4.0
BOND_NORM = 4.0


def angular_environment(
    harmonics: Array, weights: Array, receivers: AnyArray, n_atoms: int
) -> Array:
    """sum_{k != j} w_kc Y_l0(theta_jik) for every bond j of atom i, without listing triplets.

    The addition theorem, P_l(cos theta_jk) = 4 pi/(2l+1) sum_m Y_lm(j) Y_lm(k), turns the sum over
    k into moments A_i,lmc = sum_k w_kc Y_lm(k) of the atom, contracted with Y_lm(j) of the bond;
    the term k = j, for which P_l(1) = 1, is subtracted.

    Args:
      harmonics: (B, (L+1)²) orthonormal real spherical harmonics of the bonds' directions.
      weights: (B, C), w of each bond.
      receivers: (B,) the atom i of each bond, ascending.

    Returns:
      (B, L+1, C), with Y_l0 = sqrt((2l+1)/4 pi) P_l(cos theta).
    """
    degrees = math.isqrt(harmonics.shape[1])
    moments = sum_edges(harmonics[:, :, None] * weights[:, None, :], receivers, n_atoms)
    products = harmonics[:, :, None] * spread(moments, receivers)
    environment = []
    for l in range(degrees):
        norm = math.sqrt(4 * math.pi / (2 * l + 1))
        total = products[:, l**2 : (l + 1) ** 2].sum(1)
        environment.append(norm * total - weights / norm)
    return jnp.stack(environment, 1)


class MomentMPNN(nn.Module):
    """Scalar and vector messages of bonds, each a function of the angles to all others at the atom.

    Like `triplets.TripletMPNN`, but the sum over the third atom k is in the MLP's input instead of
    over its output. For the bond j->i at atom i with direction a, the MLPs take
    x_j = [h_i, h_j, radial(r_ij), sum_{k != j} w(h_k, r_ik) zonal(theta_jik)],
    where w(h_k, r_ik) = (W radial(r_ik)) * (V h_k):

      scalar message  MLP_s(x_j), summed; h <- h + MLP(sum)
      vector message  sum_c MLP_v(x_j)_c B_c, B = (a, b - (a·b) a, a x b), summed;
                      v <- MLP_g(h) * v + MLP_m(h) * sum

    with b = sum_k w'(h_k, r_ik) r_ik/|r_ik|, w' a linear map of w. B is the Gram-Schmidt basis
    without the normalisation, so that nothing is singular for collinear bonds.
    """

    features: int
    hidden: int
    moments: int
    channels: int
    vector_messages: bool
    l_angle: int

    @nn.compact
    def __call__(self, h: Array, v: VectorFeatures, graph: Graph, geo: Geometry):
        T, C, W = self.hidden, self.channels, self.moments
        width = 2 * T if self.vector_messages else T
        edges, n_atoms, a = bond_list(graph), h.shape[0], geo.directions
        cut = geo.bond_envelope[:, None]

        # One gather serves both the first layer of the message and the weight of the third atom.
        normed = LayerNorm(name="norm")(h)
        sent = gather_senders(nn.Dense(width + W, use_bias=False, name="senders")(normed), edges)
        radial = nn.Dense(width + W, name="bonds")(geo.bond_radial)
        weights = radial[:, width:] * sent[:, width:] * (cut / THIRD_NORM)

        harmonics = real_spherical_harmonics(a, self.l_angle).array
        environment = angular_environment(harmonics, weights, edges.receivers, n_atoms)
        angles = nn.Dense(width, use_bias=False, name="angles")(
            environment.reshape(-1, (self.l_angle + 1) * W)
        )
        centre = nn.Dense(width, name="receiver")(normed)
        hidden = radial[:, :width] + sent[:, :width] + angles + spread(centre, edges.receivers)
        hidden = nn.silu(hidden) * (cut / BOND_NORM)

        scalars = sum_edges(hidden[:, :T], edges.receivers, n_atoms)
        scalars = nn.Dense(self.features, name="scalar_out")(scalars)
        h = h + MLP((self.features, self.features), name="update")(scalars)
        if not self.vector_messages:
            return h, v

        mixed = nn.Dense(C, use_bias=False, name="third")(weights)
        b = sum_edges(mixed[:, :, None] * a[:, None, :], edges.receivers, n_atoms)  # (N, C, 3)
        first, second, third = jnp.split(
            nn.Dense(3 * C, use_bias=False, name="vector_out")(hidden[:, T:]), 3, axis=1
        )
        b_along = jnp.einsum("nca,na->nc", spread(b, edges.receivers), a)
        # sum_j c1 a_j + c2 (b - (a_j·b) a_j), and (sum_j c3 a_j) x b.
        along = jnp.concatenate([first - second * b_along, third], 1)
        total = sum_edges(along[:, :, None] * a[:, None, :], edges.receivers, n_atoms)
        polar = total[:, :C] + sum_edges(second, edges.receivers, n_atoms)[:, :, None] * b
        axial = jnp.cross(total[:, C:], b)
        return h, VectorUpdate(self.features, C, name="vectors")(h, v, VectorFeatures(polar, axial))
