"""The addition theorem at work, against sums over triplets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relaxnet_jax.basis.angular import real_spherical_harmonics, zonal_harmonics
from relaxnet_jax.models.moments import angular_environment

L, CHANNELS, N_ATOMS = 4, 3, 5


@pytest.mark.usefixtures("x64")
def test_environment_is_the_sum_over_the_other_bonds():
    """Also with collinear and single bonds, and atoms without any; values and gradients."""
    rng = np.random.default_rng(0)
    receivers = np.repeat([0, 1, 2, 4], [6, 1, 2, 4])
    a = rng.normal(size=(len(receivers), 3))
    a[8] = -2.0 * a[7]  # collinear: the two bonds of atom 2
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    weights = rng.normal(size=(len(receivers), CHANNELS))
    others = (receivers[:, None] == receivers) & ~np.eye(len(receivers), dtype=bool)

    def ours(a, weights):
        a = a / jnp.linalg.norm(a, axis=1, keepdims=True)
        harmonics = real_spherical_harmonics(a, L).array
        return angular_environment(harmonics, weights, jnp.asarray(receivers), N_ATOMS)

    def direct(a, weights):
        a = a / jnp.linalg.norm(a, axis=1, keepdims=True)
        zonal = zonal_harmonics(a @ a.T, L)
        return jnp.einsum("jk,jkl,kc->jlc", others * 1.0, zonal, weights)

    probe = rng.normal(size=(len(receivers), L + 1, CHANNELS))
    found = []
    for f in (ours, direct):
        value, gradient = jax.value_and_grad(
            lambda *x, f=f: jnp.sum(probe * jnp.sin(f(*x))), argnums=(0, 1)
        )(jnp.asarray(a), jnp.asarray(weights))
        found.append([f(a, weights), value, *gradient])
    assert np.abs(found[1][0]).max() > 0.5 and np.abs(found[1][2]).max() > 0.1
    for x, y in zip(*found):
        np.testing.assert_allclose(x, y, atol=1e-12)
    assert np.abs(found[0][0][6]).max() < 1e-12  # a single bond has no angles
