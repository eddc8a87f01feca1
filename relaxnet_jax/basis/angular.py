"""Angular bases: real spherical harmonics of directions, zonal harmonics of angles."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jax import Array

if TYPE_CHECKING:
    import e3nn_jax as e3nn


def zonal_harmonics(cosine: Array, l_max: int) -> Array:
    """Zonal harmonics Y_l0 = sqrt((2l+1)/4pi) P_l(cos theta), l = 0..l_max, by Bonnet's recurrence.

    Polynomials in cos theta, hence smooth even for collinear bonds, where theta itself is not.

    Args:
      cosine: (...) cos theta in [-1, 1].

    Returns:
      (..., l_max + 1).
    """
    legendre = [jnp.ones_like(cosine), cosine]
    for l in range(1, l_max):
        legendre.append(((2 * l + 1) * cosine * legendre[l] - l * legendre[l - 1]) / (l + 1))
    norms = [math.sqrt((2 * l + 1) / (4 * math.pi)) for l in range(l_max + 1)]
    return jnp.stack([c * p for c, p in zip(norms, legendre)], -1)


def real_spherical_harmonics(vectors: Array, l_max: int) -> e3nn.IrrepsArray:
    """Orthonormal real spherical harmonics Y_lm of the directions (equation 5).

    Args:
      vectors: (..., 3) Å, nonzero; only their directions matter.

    Returns:
      IrrepsArray (..., (l_max + 1)²) of irreps 0e + 1o + 2e + …
    """
    import e3nn_jax as e3nn  # takes a second (SciPy, SymPy); only tracing needs it

    return e3nn.spherical_harmonics(
        e3nn.Irreps.spherical_harmonics(l_max),
        e3nn.IrrepsArray("1o", vectors),
        normalize=True,
        normalization="integral",
    )


class EdgeExpansion(NamedTuple):
    """The edge expansion f_nlm = radial_nl(r) Y_lm(direction), equation (6b), as its two factors.

    Here radial_nl = j_l(z_ln r/c), see `basis.radial.spherical_bessel_basis`.

    An equivariant linear map treats all m of a degree alike, so it can act on the radial factor
    alone: with 6 roots and degrees up to 3, on 24 numbers per edge instead of 96.

    Attributes:
      radial: (E, n, L+1) radial factor.
      harmonics: (E, (L+1)²) spherical harmonics, of irreps 0e + 1o + 2e + …
    """

    radial: Array
    harmonics: e3nn.IrrepsArray

    def product(self) -> e3nn.IrrepsArray:
        """Multiplies the factors: f_nlm, IrrepsArray (E, n, (L+1)²), one set of irreps per root."""
        import e3nn_jax as e3nn

        degrees = self.radial.shape[-1]
        repeats = jnp.array([2 * l + 1 for l in range(degrees)])
        radial = jnp.repeat(self.radial, repeats, axis=-1, total_repeat_length=degrees**2)
        return e3nn.IrrepsArray(self.harmonics.irreps, radial * self.harmonics.array[:, None, :])
