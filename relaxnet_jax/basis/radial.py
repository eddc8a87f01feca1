"""Radial bases and the cutoff envelope (paper, section 4.1, equation 6a)."""

from __future__ import annotations

import functools
import itertools
import math

import jax.numpy as jnp
import numpy as np
from jax import Array

# Below this argument (plus l/2) the upward recurrence for j_l loses digits; the series is used.
_SERIES_BELOW = 1.5
_SERIES_TERMS = 8


def envelope(r: Array, cutoff: float, power: int = 6) -> Array:
    """Polynomial envelope: 1 at r = 0; zero, with two derivatives, at and beyond the cutoff.

    u(d) = 1 - (p+1)(p+2)/2 d^p + p(p+2) d^(p+1) - p(p+1)/2 d^(p+2), d = r/cutoff
    (Gasteiger et al., DimeNet, equation 8).

    Args:
      r: (...) Å. cutoff: Å. power: p >= 3.

    Returns:
      (...) in [0, 1], up to rounding.
    """
    p = power
    d = jnp.minimum(r / cutoff, 1.0)
    poly = (p + 1) * (p + 2) / 2 - p * (p + 2) * d + p * (p + 1) / 2 * d * d
    return 1.0 - d**p * poly


def gaussian_basis(r: Array, cutoff: float, n: int) -> Array:
    """Gaussians exp(-beta (r - r_k)²) with evenly spaced centres r_k in (0, cutoff].

    Args:
      r: (...) Å. cutoff: Å. n: number of centres.

    Returns:
      (..., n), dimensionless; neighbouring Gaussians cross at exp(-1/4).
    """
    spacing = cutoff / n
    centres = jnp.asarray(np.arange(1, n + 1) * spacing, r.dtype)
    return jnp.exp(-(((r[..., None] - centres) / spacing) ** 2))


def bessel_basis(r: Array, cutoff: float, n: int) -> Array:
    """The l = 0 spherical Bessel functions sin(k pi d)/d, d = r/c, k = 1..n, up to a constant.

    The sines come from one sine and one cosine by the Chebyshev recurrence
    sin((k+1)a) = 2 cos(a) sin(k a) - sin((k-1)a).

    Args:
      r: (...) Å, positive. cutoff: Å. n: number of roots.

    Returns:
      (..., n), dimensionless, of order one.
    """
    angle = math.pi * r / cutoff
    double_cos = 2.0 * jnp.cos(angle)
    sines = [jnp.zeros_like(angle), jnp.sin(angle)]
    for _ in range(n - 1):
        sines.append(double_cos * sines[-1] - sines[-2])
    return jnp.stack(sines[1:], -1) * (0.5 * cutoff / r[..., None])


def spherical_bessel(l_max: int, x: Array) -> Array:
    """Spherical Bessel functions j_l(x) for l = 0..l_max, accurate down to x = 0.

    Args:
      x: (..., l_max + 1), non-negative; entry l is the argument of j_l.

    Returns:
      (..., l_max + 1).
    """
    return jnp.stack([_spherical_jl(l, x[..., l]) for l in range(l_max + 1)], -1)


def _spherical_jl(l: int, x: Array) -> Array:
    threshold = _SERIES_BELOW + 0.5 * l
    small = x < threshold
    # Double where: each branch is evaluated only at arguments for which it is accurate.
    xs, xl = jnp.where(small, x, 1.0), jnp.where(small, threshold, x)
    half_square, term, total = -0.5 * xs * xs, jnp.ones_like(xs), jnp.ones_like(xs)
    for k in range(1, _SERIES_TERMS + 1):
        term = term * half_square / (k * (2 * l + 2 * k + 1))
        total = total + term
    series = xs**l / math.prod(range(1, 2 * l + 2, 2)) * total
    sine, cosine = jnp.sin(xl), jnp.cos(xl)
    lower, value = cosine / xl, sine / xl  # j_{-1}, j_0
    for k in range(l):
        lower, value = value, (2 * k + 1) / xl * value - lower
    return jnp.where(small, series, value)


@functools.cache
def bessel_roots(l_max: int, n: int) -> np.ndarray:
    """First n positive roots z_ln of j_l for l = 0..l_max: (l_max + 1, n), float64.

    The roots of j_{l-1} bracket those of j_l.
    """
    from scipy.optimize import brentq  # takes 0.5 s; stored programs contain the roots already
    from scipy.special import spherical_jn

    roots = np.pi * np.arange(1, n + l_max + 1)
    table = [roots[:n]]
    for l in range(1, l_max + 1):
        roots = np.array(
            [brentq(lambda x, l=l: spherical_jn(l, x), a, b) for a, b in itertools.pairwise(roots)]
        )
        table.append(roots[:n])
    return np.stack(table)


def spherical_bessel_basis(r: Array, cutoff: float, n: int, l_max: int) -> Array:
    """Orthonormal spherical Bessel functions j_l(z_ln r/c) N_ln on [0, c] (weight r²).

    N_ln = sqrt(2/c³)/|j_{l+1}(z_ln)|, so that the integral of r² b_ln b_lm over [0, c] is delta_nm.

    Args:
      r: (...) Å. cutoff: c in Å. n: number of roots per degree. l_max: highest degree.

    Returns:
      (..., n, l_max + 1), Å^(-3/2).
    """
    from scipy.special import spherical_jn

    roots = bessel_roots(l_max, n)  # (L+1, n)
    norms = np.stack([np.abs(spherical_jn(l + 1, roots[l])) for l in range(l_max + 1)])
    scale = jnp.asarray((math.sqrt(2.0 / cutoff**3) / norms).T, r.dtype)  # (n, L+1)
    arguments = r[..., None, None] * jnp.asarray(roots.T / cutoff, r.dtype)
    return scale * spherical_bessel(l_max, arguments)


def radial_features(r: Array, cutoff: float, n_gaussian: int, n_bessel: int) -> Array:
    """Both radial bases side by side, without the envelope: (...) -> (..., n_gaussian + n_bessel)."""
    return jnp.concatenate(
        [gaussian_basis(r, cutoff, n_gaussian), bessel_basis(r, cutoff, n_bessel)], -1
    )
