"""Deformation gradients, strains and stresses of cells that change (pure functions).

A deformation gradient D (3, 3) maps the initial crystal to the deformed one. A lattice vector a
becomes D a, so cells, whose rows are lattice vectors, become cell·Dᵀ, and an atom that keeps its
place in the lattice moves from y to x = D y. The *reference positions* y of a relaxation are its
positions mapped back to the initial cell: y contains the internal displacements, D the strain.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from relaxnet_jax.ops import safe_divide
from relaxnet_jax.typing import AnyArray


def deform_positions(deformation: Array, positions: Array, index: AnyArray) -> Array:
    """The deformed position x = D y of each atom: (..., N, 3).

    Args:
      deformation: (..., G, 3, 3), D of each structure.
      positions: (..., N, 3), y of each atom.
      index: (N,), structure of each atom.
    """
    return jnp.einsum("...nab,...nb->...na", deformation[..., index, :, :], positions)


def deformations(cells: np.ndarray) -> np.ndarray:
    """D of every frame (n, 3, 3), from the cells (n, 3, 3), the first of which is the initial one.

    Along directions in which the initial cell has no lattice vector, D is the identity.
    """
    inverse = np.linalg.pinv(cells[0])
    return np.swapaxes(inverse @ cells + np.eye(3) - inverse @ cells[0], -1, -2)


def to_reference(positions: np.ndarray, deformation: np.ndarray) -> np.ndarray:
    """Reference positions y = D⁻¹ x of positions (..., N, 3) deformed by D (..., 3, 3), in NumPy."""
    return positions @ np.swapaxes(np.linalg.inv(deformation), -1, -2)


def from_reference(reference: np.ndarray, deformation: np.ndarray) -> np.ndarray:
    """Positions x = D y (..., N, 3) of reference positions: the inverse of `to_reference`."""
    return reference @ np.swapaxes(deformation, -1, -2)


def reference_positions(positions: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """A path's positions mapped back to its first cell; unchanged if the cell is fixed.

    Args:
      positions: (n, N, 3) Å.
      cells: (n, 3, 3) Å.

    Returns:
      (n, N, 3) Å.
    """
    if (cells == cells[:1]).all():
        return positions  # unchanged, without rounding
    return to_reference(positions, deformations(cells))


def internal_displacements(positions: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Displacements from the first frame to the last, excluding the motion of atoms with the cell.

    Args:
      positions: (n, N, 3) Å.
      cells: (n, 3, 3) Å.

    Returns:
      (N, 3) Å.
    """
    return reference_positions(positions[[0, -1]], cells[[0, -1]])[1] - positions[0]


def mean_deformed(
    positions: Sequence[np.ndarray], deformation: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The mean positions and mean deformation of one crystal deformed in several ways.

    The reference positions are averaged, so that atoms move along with the mean cell.

    Args:
      positions: several arrays (..., N, 3).
      deformation: their deformation gradients (..., 3, 3).

    Returns:
      Mean positions (..., N, 3) and mean deformation gradient (..., 3, 3).
    """
    mean = np.mean(deformation, axis=0)
    reference = np.mean([to_reference(x, d) for x, d in zip(positions, deformation)], axis=0)
    return from_reference(reference, mean), mean


def symmetric(matrix: Array) -> Array:
    """(M + Mᵀ)/2 of the last two axes."""
    return (matrix + jnp.swapaxes(matrix, -1, -2)) / 2


def log_strain(deformation: Array) -> Array:
    """The logarithmic (Hencky) strain ½ log(DᵀD): (..., 3, 3) -> (..., 3, 3), symmetric.

    It is free of rotations. With X = DᵀD - 1, the logarithm is computed by the Padé approximant
    log(1 + X) ≈ (X + X²/2)(1 + X + X²/6)⁻¹. Unlike those of an eigendecomposition, its derivatives are
    finite at equal eigenvalues, in particular at D = 1. For stretches from 0.75 to 1.33 its error is
    below 0.1 %.
    """
    identity = jnp.eye(3, dtype=deformation.dtype)
    excess = jnp.swapaxes(deformation, -1, -2) @ deformation - identity
    square = excess @ excess
    # The factors are functions of one symmetric matrix, so they commute.
    return (excess + square / 2) @ _inverse(identity + excess + square / 6) / 2


def exponential(strain: Array) -> Array:
    """The exponential of a symmetric strain (..., 3, 3), i.e. the inverse of `log_strain`.

    It is computed by the Taylor series to fourth order, which is positive definite for every strain
    and has a relative error below 1e-6 for strains up to 0.15.
    """
    identity = jnp.eye(3, dtype=strain.dtype)
    square = strain @ strain
    return identity + strain + square @ (identity / 2 + strain / 6 + square / 24)


def _inverse(matrix: Array) -> Array:
    """Inverse of (..., 3, 3), by cofactors."""
    a, b, c = (matrix[..., row, :] for row in range(3))
    cofactors = jnp.stack([jnp.cross(b, c), jnp.cross(c, a), jnp.cross(a, b)], -1)
    return cofactors / determinant(matrix)[..., None, None]


def determinant(matrix: Array) -> Array:
    """Determinant (...) of (..., 3, 3), as a triple product: smooth and cheap."""
    return jnp.sum(matrix[..., 0, :] * jnp.cross(matrix[..., 1, :], matrix[..., 2, :]), -1)


def stress(virial: Array, cell: Array, deformation: Array) -> Array:
    """Stress (1/V) dE/d(strain), eV/Å³, tension positive (ASE's sign); zero without a volume.

    Args:
      virial: (..., 3, 3) eV, dE/d(strain).
      cell: (..., 3, 3) Å, the initial cell.
      deformation: (..., 3, 3), the deformation gradient D.
    """
    volume = jnp.abs(determinant(cell)) * determinant(deformation)
    return safe_divide(virial, volume[..., None, None])


VOIGT = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))  # ASE's order: xx yy zz yz xz xy


def to_voigt(matrix: np.ndarray) -> np.ndarray:
    """Symmetric matrices (..., 3, 3) to Voigt vectors (..., 6) in ASE's order."""
    return np.stack([matrix[..., a, b] for a, b in VOIGT], -1)


def from_voigt(vector: np.ndarray) -> np.ndarray:
    """Voigt vectors (..., 6) in ASE's order to symmetric matrices (..., 3, 3)."""
    out = np.zeros((*vector.shape[:-1], 3, 3))
    for k, (a, b) in enumerate(VOIGT):
        out[..., a, b] = out[..., b, a] = vector[..., k]
    return out
