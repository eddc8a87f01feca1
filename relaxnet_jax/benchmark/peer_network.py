"""The energy network of RelaxNet in PyTorch, as someone who knows PyTorch would write it.

Written for comparison: the same functions with the same parameter names as `models`, in eager mode, on
plain edge lists without padding. Sums over neighbours use ``index_add``. Needs the ``bench`` extra.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from relaxnet_jax.benchmark.peer_basis import (
    LARGEST_DEGREE,
    RadialFeatures,
    SphericalBessel,
    envelope,
    spherical_harmonics,
)
from relaxnet_jax.config import Config
from relaxnet_jax.errors import InputError
from relaxnet_jax.graph import MAX_ATOMIC_NUMBER
from relaxnet_jax.models.energy import VELOCITY_UNIT
from relaxnet_jax.models.layers import PAIR_NORM
from relaxnet_jax.models.moments import BOND_NORM, THIRD_NORM

NORM_EPSILON = 1e-6  # Flax's


class Edges(NamedTuple):
    """Directed edges: receivers (E,), senders (E,), and offsets (E, 3) of the senders in Å."""

    receivers: Tensor
    senders: Tensor
    offsets: Tensor

    def vectors(self, positions: Tensor) -> Tensor:
        """Vectors from receivers to senders, (E, 3) Å."""
        return positions[self.senders] - positions[self.receivers] + self.offsets

    def sum(self, values: Tensor, n_atoms: int) -> Tensor:
        """Sum over each receiver's edges: (E, ...) -> (N, ...)."""
        return segment_sum(values, self.receivers, n_atoms)


def segment_sum(values: Tensor, index: Tensor, n: int) -> Tensor:
    """Sums of the values with each index: (S, ...), (S,) -> (n, ...)."""
    return values.new_zeros((n, *values.shape[1:])).index_add(0, index, values)


@dataclasses.dataclass(frozen=True)
class PeerGraph:
    """A batch without padding.

    Attributes:
      positions: (N, 3) Å.
      atomic_numbers: (N,).
      masses: (N,) amu.
      free: (N, 1) bool, True where the atom may move.
      graph: (N,), the structure that each atom belongs to.
      held: (G, 1) bool, True for structures with fixed atoms.
      n_graphs: G.
      edges, bonds: see `Edges`.
    """

    positions: Tensor
    atomic_numbers: Tensor
    masses: Tensor
    free: Tensor
    graph: Tensor
    held: Tensor
    n_graphs: int
    edges: Edges
    bonds: Edges


def check_peer(config: Config) -> None:
    """Raises InputError for configurations that the peer does not implement."""
    m, d = config.model, config.dynamics
    unknown = {
        "model.architecture": m.architecture != "dtnn",
        "dynamics.latent": d.latent not in ("explicit", "implicit"),
        "loss.huber_forces": config.loss.huber_forces != 0,
        "model.interaction": m.interaction != "moments",
        "model.charges": m.charges,
        "model.update_positions": m.update_positions,
        "model.l_max": m.l_max > LARGEST_DEGREE,
        "model.l_angle": m.l_angle > LARGEST_DEGREE,
        "dynamics.solver": d.solver != "rk4",
        "dynamics.order": d.order != "second",
        "dynamics.mass": d.mass == "learned",
        "dynamics.cell": d.cell != "fixed",
        "data.frame_selection": config.data.frame_selection != "equidistant",
        "train.noise": config.train.noise != 0,
    }
    for field, wrong in unknown.items():
        if wrong:
            value = config
            for part in field.split("."):
                value = getattr(value, part)
            raise InputError(
                f"config {config.name!r}: the PyTorch peer does not support {field}={value!r}; use "
                "explicit.py"
            )


# Layers


def layer_norm(features: int) -> nn.LayerNorm:
    return nn.LayerNorm(features, eps=NORM_EPSILON)


class Mlp(nn.Module):
    """Linear layers with SiLU between them."""

    def __init__(self, inputs: int, widths: tuple[int, ...], small: bool = False) -> None:
        super().__init__()
        sizes = (inputs, *widths)
        last = "small_out" if small else "out"
        names = [f"Dense_{k}" for k in range(len(widths) - 1)] + [last]
        for name, a, b in zip(names, sizes, widths):
            self.add_module(name, nn.Linear(a, b))

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = self.children()
        for layer in inner:
            x = silu(layer(x))
        return last(x)


class Geometry(NamedTuple):
    """The counterpart of `models.layers.Geometry`; radial features are per edge."""

    vectors: Tensor
    lengths: Tensor
    radial: Tensor
    envelope: Tensor
    directions: Tensor
    bond_radial: Tensor
    bond_envelope: Tensor


class PowerSpectrum(nn.Module):
    def __init__(self, features: int, channels: int, n: int, l_max: int) -> None:
        super().__init__()
        self.weight = nn.Linear(features, channels)
        self.mix_kernel = nn.Parameter(torch.empty(l_max + 1, n, channels))

    def forward(self, radial: Tensor, harmonics: Tensor, h: Tensor, edges: Edges) -> Tensor:
        weights = self.weight(h)[edges.senders]
        weighted = torch.einsum("enl,lnc->elc", radial, self.mix_kernel) * weights[:, None]
        invariants = []
        for l in range(radial.shape[-1]):
            products = weighted[:, l, :, None] * harmonics[:, None, l * l : (l + 1) ** 2]
            total = edges.sum(products, len(h)) / PAIR_NORM
            invariants.append(torch.log1p((total**2).sum(-1)))
        return torch.cat(invariants, -1)


class PairConvolution(nn.Module):
    def __init__(self, features: int, hidden: int, radial: int) -> None:
        super().__init__()
        self.filter = Mlp(radial, (hidden, features))
        self.norm = layer_norm(features)
        self.send = nn.Linear(features, features)
        self.update = Mlp(features, (features, features))

    def forward(self, h: Tensor, edges: Edges, geo: Geometry) -> Tensor:
        filters = self.filter(geo.radial) * geo.envelope[:, None]
        messages = filters * self.send(self.norm(h))[edges.senders]
        return h + self.update(edges.sum(messages, len(h)) / PAIR_NORM)


class VectorUpdate(nn.Module):
    def __init__(self, features: int, channels: int) -> None:
        super().__init__()
        self.norm = layer_norm(features)
        self.gate = Mlp(features, (features, 2 * channels))
        self.mix = Mlp(features, (features, 2 * channels))

    def forward(self, h: Tensor, v: Tensor, total: Tensor) -> Tensor:
        normed = self.norm(h)
        return self.gate(normed)[..., None] * v + self.mix(normed)[..., None] * total


class MomentMPNN(nn.Module):
    def __init__(self, config: Config, radial: int) -> None:
        super().__init__()
        m = config.model
        F, T, C, W = m.features, m.triplet_features, m.vector_features, m.moment_channels
        self.hidden, self.moments, self.l_angle = T, W, m.l_angle
        self.with_vectors = m.vector_messages
        width = 2 * T if m.vector_messages else T
        self.width = width
        self.norm = layer_norm(F)
        self.senders = nn.Linear(F, width + W, bias=False)
        self.bonds = nn.Linear(radial, width + W)
        self.angles = nn.Linear((m.l_angle + 1) * W, width, bias=False)
        self.receiver = nn.Linear(F, width)
        self.scalar_out = nn.Linear(T, F)
        self.update = Mlp(F, (F, F))
        if m.vector_messages:
            self.third = nn.Linear(W, C, bias=False)
            self.vector_out = nn.Linear(T, 3 * C, bias=False)
            self.vectors = VectorUpdate(F, C)

    def forward(self, h: Tensor, v: Tensor, bonds: Edges, geo: Geometry) -> tuple[Tensor, Tensor]:
        n, T, a = len(h), self.hidden, geo.directions
        cut = geo.bond_envelope[:, None]
        normed = self.norm(h)
        sent = self.senders(normed)[bonds.senders]
        radial = self.bonds(geo.bond_radial)
        weights = radial[:, self.width :] * sent[:, self.width :] * (cut / THIRD_NORM)
        environment = self._environment(spherical_harmonics(a, self.l_angle), weights, bonds, n)
        hidden = radial[:, : self.width] + sent[:, : self.width] + self.angles(environment)
        hidden = silu(hidden + self.receiver(normed)[bonds.receivers]) * (cut / BOND_NORM)
        h = h + self.update(self.scalar_out(bonds.sum(hidden[:, :T], n)))
        if not self.with_vectors:
            return h, v
        b = bonds.sum(self.third(weights)[:, :, None] * a[:, None, :], n)  # (N, C, 3)
        first, second, third = self.vector_out(hidden[:, T:]).chunk(3, 1)
        b_along = torch.einsum("eca,ea->ec", b[bonds.receivers], a)
        along = torch.cat([first - second * b_along, third], 1)
        total = bonds.sum(along[:, :, None] * a[:, None, :], n)
        C = b.shape[1]
        polar = total[:, :C] + bonds.sum(second, n)[:, :, None] * b
        axial = torch.linalg.cross(total[:, C:], b)
        return h, self.vectors(h, v, torch.cat([polar, axial], 1))

    def _environment(self, harmonics: Tensor, weights: Tensor, bonds: Edges, n: int) -> Tensor:
        moments = bonds.sum(harmonics[:, :, None] * weights[:, None, :], n)
        products = harmonics[:, :, None] * moments[bonds.receivers]
        found = []
        for l in range(self.l_angle + 1):
            norm = math.sqrt(4 * math.pi / (2 * l + 1))
            found.append(norm * products[:, l * l : (l + 1) ** 2].sum(1) - weights / norm)
        return torch.cat(found, 1)


class DTNNLayer(nn.Module):
    def __init__(self, config: Config, radial: int) -> None:
        super().__init__()
        m = config.model
        self.pair = PairConvolution(m.features, m.pair_features, radial)
        self.moments = MomentMPNN(config, radial)

    def forward(self, h: Tensor, v: Tensor, graph: PeerGraph, geo: Geometry):
        return self.moments(self.pair(h, graph.edges, geo), v, graph.bonds, geo)


class Encoding(NamedTuple):
    """Features h (N, F) and v (N, 2C, 3), the geometry, and the l = 1 part of the edge expansion."""

    h: Tensor
    v: Tensor
    geometry: Geometry
    radial: Tensor
    vectors: Tensor


class Encoder(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        g, m = config.graph, config.model
        self.graph_config, self.config = g, m
        radial = m.n_gaussian + m.n_bessel
        self.pair_radial = RadialFeatures(g.cutoff, m.n_gaussian, m.n_bessel)
        self.bond_radial = RadialFeatures(g.triplet_cutoff, m.n_gaussian, m.n_bessel)
        self.expansion = SphericalBessel(g.cutoff, m.n_bessel, m.l_max)
        self.element = nn.Embedding(MAX_ATOMIC_NUMBER + 1, m.features)
        self.spectrum = PowerSpectrum(m.features, m.expansion_channels, m.n_bessel, m.l_max)
        self.input = Mlp(m.expansion_channels * (m.l_max + 1), (m.features, m.features))
        self.dtnn = nn.ModuleList(DTNNLayer(config, radial) for _ in range(m.layers))
        width = m.layers * m.features + (2 * m.vector_features if m.vector_messages else 0)
        self.project = nn.Linear(width, m.features)
        self.norm = layer_norm(m.features)

    def pairs(self, edges: Edges, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Vectors, lengths, radial features times the envelope, and the envelope."""
        vectors = edges.vectors(positions)
        lengths = vectors.norm(dim=-1)
        cut = envelope(lengths, self.graph_config.cutoff, self.config.envelope_power)
        return vectors, lengths, self.pair_radial(lengths) * cut[:, None], cut

    def forward(self, graph: PeerGraph, positions: Tensor) -> Encoding:
        g, m = self.graph_config, self.config
        vectors, lengths, radial, cut = self.pairs(graph.edges, positions)
        bonds = graph.bonds.vectors(positions)
        bond_lengths = bonds.norm(dim=-1)
        geo = Geometry(
            vectors,
            lengths,
            radial,
            cut,
            bonds / bond_lengths[:, None],
            self.bond_radial(bond_lengths),
            envelope(bond_lengths, g.triplet_cutoff, m.envelope_power),
        )
        h = self.element(graph.atomic_numbers)
        functions = self.expansion(lengths) * (g.cutoff**1.5 * cut[:, None, None])
        harmonics = spherical_harmonics(vectors / lengths[:, None], m.l_max)
        h = h + self.input(self.spectrum(functions, harmonics, h, graph.edges))
        v = h.new_zeros((len(h), 2 * m.vector_features, 3))
        hidden = []
        for layer in self.dtnn:
            h, v = layer(h, v, graph, geo)
            hidden.append(h)
        if m.vector_messages:
            hidden.append(torch.log1p((v**2).sum(-1)))
        h = self.norm(self.project(torch.cat(hidden, -1)))
        return Encoding(h, v, geo, functions[:, :, 1], harmonics[:, 1:4])


class Attention(nn.Module):
    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = layer_norm(features)
        self.score = nn.Linear(features, heads)
        self.value = nn.Linear(features, features)
        self.own = nn.Linear(features, features)
        self.context = nn.Linear(features, features, bias=False)
        self.out = nn.Linear(features, features)

    def forward(self, h: Tensor, graph: PeerGraph) -> Tensor:
        normed = self.norm(h)
        logits = self.score(normed)
        index = graph.graph[:, None].expand_as(logits)
        top = logits.new_full((graph.n_graphs, self.heads), -torch.inf)
        top = top.scatter_reduce(0, index, logits.detach(), "amax")
        exponents = torch.exp(logits - top[graph.graph])
        total = segment_sum(exponents, graph.graph, graph.n_graphs)
        weights = exponents / total[graph.graph]
        values = self.value(normed).reshape(len(h), self.heads, -1)
        context = segment_sum((weights[..., None] * values).flatten(1), graph.graph, graph.n_graphs)
        hidden = self.own(normed) + self.context(context)[graph.graph]
        return h + self.out(silu(hidden))


class VelocityHead(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        m = config.model
        self.config = m
        self.senders = nn.Linear(m.features, m.features, bias=False)
        self.receiver = nn.Linear(m.features, m.features)
        self.radial = nn.Linear(m.n_gaussian + m.n_bessel, m.features, bias=False)
        self.small_gates = nn.Linear(m.features, m.n_bessel)
        if m.vector_messages:
            self.small_vectors = nn.Linear(m.features, 2 * m.vector_features)

    def forward(self, encoding: Encoding, graph: PeerGraph) -> Tensor:
        h, edges, C = encoding.h, graph.edges, self.config.vector_features
        own = self.receiver(h)
        hidden = self.senders(h)[edges.senders] + own[edges.receivers]
        gates = self.small_gates(silu(hidden + self.radial(encoding.geometry.radial)))
        along = (gates * encoding.radial).sum(1, keepdim=True) * encoding.vectors
        u = edges.sum(along, len(h)) / PAIR_NORM
        if self.config.vector_messages:
            weights = self.small_vectors(silu(own))[..., None]
            polar, axial = encoding.v[:, :C], encoding.v[:, C:]
            cross = torch.linalg.cross(polar, axial)
            u = u + (weights[:, :C] * polar + weights[:, C:] * cross).sum(1)
        return VELOCITY_UNIT * u


class PeerNetwork(nn.Module):
    """All learned functions; see `models.energy.RelaxNetwork`. Raises InputError, see `check_peer`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        check_peer(config)
        m, d = config.model, config.dynamics
        self.config = config
        self.encoder = Encoder(config)
        if m.attention:
            self.attention = Attention(m.features, m.attention_heads)
        self.head = Mlp(m.features, (m.features, m.features // 2, 1), small=True)
        if d.latent == "explicit":
            self.pair_send = nn.Linear(m.features, m.pair_features)
            self.pair_filter = nn.Linear(m.n_gaussian + m.n_bessel, m.pair_features, bias=False)
            self.pair_update = Mlp(m.features + m.pair_features, (m.features, m.features))
            inputs = m.features + m.pair_features + 1
            self.rate = Mlp(inputs, (m.features, m.features), small=True)
        self.velocity_gate = VelocityHead(config)
        if d.friction:
            self.log_friction = nn.Parameter(torch.zeros(()))
        if d.time_scale:
            self.log_time_scale = nn.Parameter(torch.zeros(()))

    def energy(
        self, h: Tensor, graph: PeerGraph, positions: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Energies (G,) in units of the scale, and the pair features (N, P) of the explicit scheme."""
        if self.config.dynamics.latent == "implicit":
            return self.read_out(self.encoder(graph, positions).h, graph), None
        _, _, radial, _ = self.encoder.pairs(graph.edges, positions)
        messages = self.pair_filter(radial) * self.pair_send(h)[graph.edges.senders]
        p = graph.edges.sum(messages, len(h)) / PAIR_NORM
        return self.read_out(h + self.pair_update(torch.cat([h, p], -1)), graph), p

    def read_out(self, h: Tensor, graph: PeerGraph) -> Tensor:
        """Attention and head, summed over each structure: (G,)."""
        if self.config.model.attention:
            h = self.attention(h, graph)
        return segment_sum(self.head(h)[:, 0], graph.graph, graph.n_graphs)
