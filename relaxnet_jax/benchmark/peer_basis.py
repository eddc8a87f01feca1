"""Radial and angular bases of the PyTorch peer; see `relaxnet_jax.basis`. Needs the ``bench`` extra."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.special import spherical_jn
from torch import Tensor, nn

from relaxnet_jax.basis.radial import bessel_roots

LARGEST_DEGREE = 4


def envelope(r: Tensor, cutoff: float, p: int) -> Tensor:
    """See `basis.radial.envelope`."""
    d = (r / cutoff).clamp(max=1.0)
    poly = (p + 1) * (p + 2) / 2 - p * (p + 2) * d + p * (p + 1) / 2 * d * d
    return 1.0 - d**p * poly


class RadialFeatures(nn.Module):
    """Gaussians and l = 0 Bessel functions; see `basis.radial.radial_features`."""

    centres: Tensor
    waves: Tensor

    def __init__(self, cutoff: float, n_gaussian: int, n_bessel: int) -> None:
        super().__init__()
        self.cutoff, self.spacing = cutoff, cutoff / n_gaussian
        centres, waves = (torch.arange(1, n + 1).double() for n in (n_gaussian, n_bessel))
        self.register_buffer("centres", self.spacing * centres)
        self.register_buffer("waves", math.pi / cutoff * waves)

    def forward(self, r: Tensor) -> Tensor:
        r = r[:, None]
        gaussians = torch.exp(-(((r - self.centres) / self.spacing) ** 2))
        return torch.cat([gaussians, torch.sin(self.waves * r) * (0.5 * self.cutoff / r)], -1)


class SphericalBessel(nn.Module):
    """j_l(z_ln r/c) N_ln, (E,) -> (E, n, l_max + 1); see `basis.radial.spherical_bessel_basis`."""

    scale: Tensor
    waves: Tensor

    def __init__(self, cutoff: float, n: int, l_max: int) -> None:
        super().__init__()
        roots = bessel_roots(l_max, n)
        norms = np.stack([np.abs(spherical_jn(l + 1, roots[l])) for l in range(l_max + 1)])
        self.register_buffer("scale", torch.as_tensor((math.sqrt(2 / cutoff**3) / norms).T))
        self.register_buffer("waves", torch.as_tensor(roots.T / cutoff))

    def forward(self, r: Tensor) -> Tensor:
        x = r[:, None, None] * self.waves
        inverse, sine, cosine = 1.0 / x, torch.sin(x), torch.cos(x)
        below, value = cosine * inverse, sine * inverse
        found = [value[..., 0]]
        for l in range(x.shape[-1] - 1):  # upward recurrence from j_{-1} and j_0
            below, value = value, (2 * l + 1) * inverse * value - below
            found.append(value[..., l + 1])
        return torch.stack(found, -1) * self.scale


def spherical_harmonics(a: Tensor, l_max: int) -> Tensor:
    """Orthonormal real harmonics of unit vectors, (E, 3) -> (E, (l_max + 1)²); l = 1 as x, y, z."""
    x, y, z = a.unbind(-1)
    xx, yy, zz = x * x, y * y, z * z
    one, c = torch.ones_like(x), math.sqrt(1 / math.pi)
    rows = [
        [c / 2 * one],
        [c * math.sqrt(3) / 2 * v for v in (x, y, z)],
        [
            c * math.sqrt(15) / 2 * x * y,
            c * math.sqrt(15) / 2 * y * z,
            c * math.sqrt(5) / 4 * (3 * zz - 1),
            c * math.sqrt(15) / 2 * x * z,
            c * math.sqrt(15) / 4 * (xx - yy),
        ],
        [
            c * math.sqrt(35 / 32) * y * (3 * xx - yy),
            c * math.sqrt(105) / 2 * x * y * z,
            c * math.sqrt(21 / 32) * y * (5 * zz - 1),
            c * math.sqrt(7) / 4 * z * (5 * zz - 3),
            c * math.sqrt(21 / 32) * x * (5 * zz - 1),
            c * math.sqrt(105) / 4 * z * (xx - yy),
            c * math.sqrt(35 / 32) * x * (xx - 3 * yy),
        ],
        [
            c * 3 / 4 * math.sqrt(35) * x * y * (xx - yy),
            c * 3 / 4 * math.sqrt(35 / 2) * y * z * (3 * xx - yy),
            c * 3 / 4 * math.sqrt(5) * x * y * (7 * zz - 1),
            c * 3 / 4 * math.sqrt(5 / 2) * y * z * (7 * zz - 3),
            c * 3 / 16 * (35 * zz * zz - 30 * zz + 3),
            c * 3 / 4 * math.sqrt(5 / 2) * x * z * (7 * zz - 3),
            c * 3 / 8 * math.sqrt(5) * (xx - yy) * (7 * zz - 1),
            c * 3 / 4 * math.sqrt(35 / 2) * x * z * (xx - 3 * yy),
            c * 3 / 16 * math.sqrt(35) * (xx * (xx - 3 * yy) - yy * (3 * xx - yy)),
        ],
    ]
    return torch.stack([value for row in rows[: l_max + 1] for value in row], -1)
