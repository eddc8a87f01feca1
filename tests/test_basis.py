"""Bases against scipy, quadrature and the identities that define them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import fixed_quad
from scipy.special import eval_legendre, spherical_jn

from relaxnet_jax.basis.angular import EdgeExpansion, real_spherical_harmonics, zonal_harmonics
from relaxnet_jax.basis.radial import (
    bessel_basis,
    bessel_roots,
    envelope,
    gaussian_basis,
    radial_features,
    spherical_bessel,
    spherical_bessel_basis,
)

pytestmark = pytest.mark.usefixtures("x64")
L = 5


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-9), (np.float32, 3e-6)])
def test_spherical_bessel(dtype, tolerance):
    """From zero to large arguments, values and derivatives, across the switch of formulas."""
    x = np.concatenate([[0, 1e-8, 1e-3], np.linspace(0.05, 8, 400), [20, 50.0]]).astype(dtype)
    degrees = np.arange(L + 1)

    def functions(x):
        return spherical_bessel(L, jnp.broadcast_to(x, (L + 1,)))

    expected = spherical_jn(degrees, x[:, None].astype(float))
    values = jax.jit(jax.vmap(functions))
    np.testing.assert_allclose(values(x), expected, rtol=0, atol=tolerance)
    slopes = spherical_jn(degrees, x[:, None].astype(float), derivative=True)
    np.testing.assert_allclose(
        jax.jit(jax.vmap(jax.jacfwd(functions)))(x), slopes, rtol=0, atol=30 * tolerance)
    # Relative accuracy where j_l is tiny: an upward recurrence would lose every digit.
    small = x[(x > 0.05) & (x < 2)]
    found = values(small)
    np.testing.assert_allclose(
        found, spherical_jn(degrees, small[:, None].astype(float)), rtol=10 * tolerance)


def test_roots():
    roots = bessel_roots(L, 6)
    assert roots.shape == (L + 1, 6)
    for degree, row in enumerate(roots):
        assert np.abs(spherical_jn(degree, row)).max() < 1e-12
        grid = np.linspace(0.5 + 0.5 * degree, row[-1] + 0.5, 20000)
        signs = np.sign(spherical_jn(degree, grid))
        assert (signs[1:] != signs[:-1]).sum() == 6  # none is left out


def test_spherical_bessel_basis_is_orthonormal():
    c, n, l_max = 4.2, 5, 4

    def products(r):
        b = np.asarray(spherical_bessel_basis(jnp.asarray(r), c, n, l_max))
        return np.moveaxis(np.einsum("rnl,rml,r->rlnm", b, b, r**2), 0, -1)

    overlap, _ = fixed_quad(products, 0, c, n=200)
    np.testing.assert_allclose(overlap, np.broadcast_to(np.eye(n), overlap.shape), atol=1e-10)
    at_cutoff = spherical_bessel_basis(jnp.asarray(c), c, n, l_max)
    np.testing.assert_allclose(at_cutoff, 0, atol=1e-12)


def test_bases_are_finite_with_their_gradients_at_small_distances():
    r = jnp.asarray([1e-4, 1e-2, 0.05, 0.5, 3.9, 4.0, 1000.0], jnp.float32)

    def features(r):
        return jnp.concatenate([
            spherical_bessel_basis(r, 4.0, 3, 2).reshape(-1), radial_features(r, 4.0, 6, 5),
            envelope(r, 4.0)[None]])  # fmt: skip

    def derivatives(r):
        first = jax.jacfwd(features)
        return features(r), first(r), jax.jacfwd(first)(r)

    values, slopes, curvatures = jax.jit(jax.vmap(derivatives))(r)
    assert np.isfinite(values).all() and np.isfinite(slopes).all()
    assert np.isfinite(curvatures[1:]).all()


def test_bessel_basis():
    """sin(k pi d)/d up to a constant, and continuous with its limit at zero."""
    r, c, n = np.linspace(0.05, 4.5, 50), 4.0, 7
    k = np.arange(1, n + 1)
    expected = 0.5 * np.sin(k * np.pi * r[:, None] / c) * c / r[:, None]
    np.testing.assert_allclose(bessel_basis(jnp.asarray(r), c, n), expected, atol=1e-12)
    np.testing.assert_allclose(bessel_basis(jnp.asarray(1e-6), c, n), 0.5 * k * np.pi, rtol=1e-9)
    # Proportional to j_0 at its roots.
    ratio = bessel_basis(jnp.asarray(r), c, n) / spherical_bessel_basis(jnp.asarray(r), c, n, 0)[
        ..., 0]
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:1], ratio.shape), rtol=1e-7)


def test_gaussian_basis():
    c, n = 5.0, 8
    centres = np.arange(1, n + 1) * c / n
    np.testing.assert_allclose(np.diag(gaussian_basis(jnp.asarray(centres), c, n)), 1)
    between = gaussian_basis(jnp.asarray((centres[1:] + centres[:-1]) / 2), c, n)
    np.testing.assert_allclose(np.diag(between), np.exp(-0.25))


@pytest.mark.parametrize("power", [3, 6])
def test_envelope(power):
    """1 at zero; value and two derivatives vanish at the cutoff and stay zero beyond."""
    c = 3.5
    derivatives = [lambda r: envelope(r, c, power)]
    derivatives += [jax.grad(derivatives[0])]
    derivatives += [jax.grad(derivatives[1])]
    assert derivatives[0](0.0) == 1
    for order, f in enumerate(derivatives):
        assert f(c + 1e-9) == 0 and f(2 * c) == 0 and f(1000.0) == 0
        # (c - r)^3 near the cutoff.
        assert abs(f(c - 1e-4)) < 20 * 1e-4 ** (3 - order) + 1e-13
    assert abs(jax.grad(derivatives[2])(c - 1e-6)) > 0.1  # the third does not vanish
    r = np.linspace(0, c, 100)
    values = np.asarray(jax.vmap(derivatives[0])(jnp.asarray(r)))
    assert (np.diff(values) <= 1e-15).all()
    d = r / c
    expected = (1 - (power + 1) * (power + 2) / 2 * d**power + power * (power + 2) * d ** (power + 1)
                - power * (power + 1) / 2 * d ** (power + 2))  # fmt: skip
    np.testing.assert_allclose(values, expected, atol=1e-12)


def test_zonal_harmonics():
    cosine = np.linspace(-1, 1, 41)
    for l_max in (0, 1, 12):
        found = zonal_harmonics(jnp.asarray(cosine), l_max)
        degrees = np.arange(l_max + 1)
        expected = np.sqrt((2 * degrees + 1) / (4 * np.pi)) * eval_legendre(
            degrees, cosine[:, None])  # fmt: skip
        np.testing.assert_allclose(found, expected, atol=1e-12)
    slopes = jax.vmap(jax.jacfwd(lambda c: zonal_harmonics(c, 5)))(jnp.asarray([-1.0, 1.0]))
    assert np.isfinite(slopes).all()


def sphere(n=24):
    """Directions and weights that integrate polynomials of degree < 2n over the sphere."""
    z, wz = np.polynomial.legendre.leggauss(n)
    phi = 2 * np.pi * np.arange(2 * n) / (2 * n)
    s = np.sqrt(1 - z**2)[:, None]
    points = np.stack([s * np.cos(phi), s * np.sin(phi), np.broadcast_to(z[:, None], s.shape)
                       + 0 * phi], -1)  # fmt: skip
    return points.reshape(-1, 3), np.repeat(wz * np.pi / n, 2 * n)


def test_spherical_harmonics_are_orthonormal():
    l_max = 5
    points, weights = sphere()
    lengths = np.random.default_rng(0).uniform(0.3, 3, len(points))[:, None]
    y = np.asarray(real_spherical_harmonics(jnp.asarray(points * lengths), l_max).array)
    overlap = np.einsum("p,pa,pb->ab", weights, y, y)
    np.testing.assert_allclose(overlap, np.eye((l_max + 1) ** 2), atol=1e-10)


def test_addition_theorem():
    """sum_m Y_lm(a) Y_lm(b) = (2l+1)/4pi P_l(cos) = sqrt((2l+1)/4pi) zonal_l(cos)."""
    a, b = np.random.default_rng(1).normal(size=(2, 30, 3))
    ya, yb = (real_spherical_harmonics(jnp.asarray(v), 4) for v in (a, b))
    cosine = np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    zonal = zonal_harmonics(jnp.asarray(cosine), 4)
    for degree, (p, q) in enumerate(zip(ya.chunks, yb.chunks)):
        expected = np.sqrt((2 * degree + 1) / (4 * np.pi)) * zonal[:, degree]
        np.testing.assert_allclose(np.sum(p * q, (-1, -2)), expected, atol=1e-10)


def test_edge_expansion():
    """j_l(z_ln r/c) Y_lm, normalised: orthonormal functions on the ball of the cutoff."""
    c, n, l_max = 3.0, 3, 2
    points, weights = sphere(8)
    radii, wr = np.polynomial.legendre.leggauss(60)
    radii, wr = (radii + 1) * c / 2, wr * c / 2
    vectors = (radii[:, None, None] * points).reshape(-1, 3)
    measure = (wr * radii**2)[:, None] * weights
    r = np.linalg.norm(vectors, axis=-1)
    radial = spherical_bessel_basis(jnp.asarray(r), c, n, l_max)
    harmonics = real_spherical_harmonics(jnp.asarray(vectors), l_max)
    expansion = EdgeExpansion(radial, harmonics).product()
    assert str(expansion.irreps) == "1x0e+1x1o+1x2e"
    f = np.asarray(expansion.array)
    overlap = np.einsum("p,pna,pmb->namb", measure.reshape(-1), f, f)
    for degree in range(l_max + 1):
        part = slice(degree**2, (degree + 1) ** 2)
        block = overlap[:, part, :, part].reshape(n * (2 * degree + 1), -1)
        np.testing.assert_allclose(block, np.eye(len(block)), atol=1e-9)
