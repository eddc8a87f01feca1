"""RelaxNet in eager PyTorch with torchdiffeq: trajectories, loss and training step.

The peer that RelaxNet is timed against, with the same architecture, parameters, batches and solver
steps. Needs the ``bench`` extra.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.traverse_util
import jax
import numpy as np
import torch
from torch import Tensor, nn
from torchdiffeq import odeint
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import rk4_step_func
from torchdiffeq._impl.solvers import FixedGridODESolver

from relaxnet_jax.benchmark.peer_network import Edges, PeerGraph, PeerNetwork, segment_sum
from relaxnet_jax.config import Config
from relaxnet_jax.losses import TERMS, Targets
from relaxnet_jax.model import RelaxNet
from relaxnet_jax.typing import Graph, Params


class PeerTrajectory(NamedTuple):
    """Positions, velocities and forces (n, N, 3) and energies (n, G); see `solver.Trajectory`."""

    positions: Tensor
    velocities: Tensor
    energies: Tensor
    forces: Tensor


class PeerTargets(NamedTuple):
    """As `losses.Targets`, without padding; ``sizes`` (G,) are the atoms per structure."""

    positions: Tensor
    forces: Tensor
    energies: Tensor
    frame_mask: Tensor
    last: Tensor
    sizes: Tensor


# From JAX


def peer_network(model: RelaxNet, dtype: torch.dtype = torch.float32) -> PeerNetwork:
    """The peer with a model's parameters. Raises InputError, see `check_peer`."""
    network = PeerNetwork(model.config)
    copy_parameters(model.params, network)
    return network.to(dtype)


def copy_parameters(params: Params, network: PeerNetwork) -> None:
    """Copies Flax parameters into the modules of the same names.

    Raises:
      ValueError: a parameter has no counterpart on the other side (a programming error).
    """
    ours = flax.traverse_util.flatten_dict(jax.device_get(params))
    theirs = dict(network.named_parameters())
    for path, value in ours.items():
        stacked = path[:2] == ("encoder", "dtnn")  # layers are stacked along the first axis
        for index, layer in enumerate(value) if stacked else ((None, value),):
            *modules, name = path if index is None else (*path[:2], str(index), *path[2:])
            target = theirs.pop(".".join([*modules, _NAMES.get(name, name)]), None)
            matrix = layer.T if name == "kernel" else layer
            if target is None or target.shape != matrix.shape:
                raise ValueError(f"parameter {'/'.join(path)} {layer.shape} has no counterpart")
            target.data = torch.tensor(np.asarray(matrix))
    if theirs:
        raise ValueError(f"parameters without counterpart: {', '.join(theirs)}")


_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def peer_graph(graph: Graph, dtype: torch.dtype = torch.float32) -> PeerGraph:
    """The real atoms, edges and bonds of a padded graph."""
    graph = jax.device_get(graph)
    nodes, bonds = graph.nodes, graph.edges["bonds"]
    atoms = nodes["mask"]  # padding comes last

    def edges(receivers, senders, offsets, mask):
        to, of = (torch.as_tensor(x[mask].astype(np.int64)) for x in (receivers, senders))
        return Edges(to, of, torch.as_tensor(offsets[mask]).to(dtype))

    n_graphs = int(graph.globals["mask"].sum())
    index = torch.as_tensor(nodes["graph"][atoms].astype(np.int64))
    fixed = torch.as_tensor(nodes["fixed"][atoms])
    return PeerGraph(
        positions=torch.as_tensor(nodes["positions"][atoms]).to(dtype),
        atomic_numbers=torch.as_tensor(nodes["atomic_numbers"][atoms].astype(np.int64)),
        masses=torch.as_tensor(nodes["masses"][atoms]).to(dtype),
        free=~fixed[:, None],
        graph=index,
        held=segment_sum(fixed.to(dtype), index, n_graphs)[:, None] > 0,
        n_graphs=n_graphs,
        edges=edges(graph.receivers, graph.senders, graph.edges["offsets"], graph.edges["mask"]),
        bonds=edges(bonds["receivers"], bonds["senders"], bonds["offsets"], bonds["mask"]),
    )


def peer_targets(graph: Graph, targets: Targets, dtype: torch.dtype = torch.float32) -> PeerTargets:
    """The real part of a padded batch's targets."""
    graph, targets = jax.device_get((graph, targets))
    atoms, structures = graph.nodes["mask"], graph.globals["mask"]
    return PeerTargets(
        torch.as_tensor(targets.positions[:, atoms]).to(dtype),
        torch.as_tensor(targets.forces[:, atoms]).to(dtype),
        torch.as_tensor(targets.energies[:, structures]).to(dtype),
        torch.as_tensor(targets.frame_mask[:, structures]),
        torch.as_tensor(targets.last[structures].astype(np.int64)),
        torch.as_tensor(graph.n_node[structures]).to(dtype),
    )


# Dynamics


class ClassicalRK4(FixedGridODESolver):
    """The classical Runge-Kutta method of order 4.

    torchdiffeq's own "rk4" is the 3/8 rule: as many evaluations, but other numbers than ours.
    """

    order = 4

    def _step_func(self, func, t0, dt, t1, y0):
        f0 = func(t0, y0)
        return rk4_step_func(func, t0, dt, t1, y0, f0=f0), f0


SOLVERS["classical_rk4"] = ClassicalRK4


class Field(nn.Module):
    """The vector field of (x, u, h); see `dynamics.vector_field`."""

    def __init__(self, network: PeerNetwork, graph: PeerGraph, scale: float) -> None:
        super().__init__()
        self.network, self.graph, self.scale = network, graph, scale
        d = network.config.dynamics
        self.inertia = graph.masses if d.mass == "atomic" else torch.ones_like(graph.masses)
        self.dynamics = d

    def evaluate(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Energies (G,) in eV, forces (N, 3) at fixed h in eV/Å, and pair features."""
        training = torch.is_grad_enabled()
        with torch.enable_grad():
            # A separate tensor, since h may depend on the same positions, and F is -dE/dx at fixed h.
            own = x.view_as(x) if training else x.detach().requires_grad_()
            energies, pair = self.network.energy(h, self.graph, own)
            energies = energies * self.scale
            (gradient,) = torch.autograd.grad(energies.sum(), own, create_graph=training)
        return energies, -gradient, pair

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor, Tensor]):
        x, u, h = state
        _, forces, pair = self.evaluate(x, h)
        acceleration = torch.where(self.graph.free, forces / self.inertia[:, None], 0.0)
        if self.dynamics.friction:
            acceleration = acceleration - self.network.log_friction.exp() * u
        seen, limit = u, self.dynamics.max_speed
        if limit > 0:
            squared = (u**2).sum(-1, keepdim=True) / limit**2
            seen = self.constrained(u * (1.0 + squared**2) ** -0.25)
        dx, du = seen, acceleration
        if self.dynamics.time_scale:
            speed = self.network.log_time_scale.exp()
            dx, du = speed * dx, speed * du
        if pair is None:
            return dx, du, torch.zeros_like(h)
        squares = (seen**2).sum(-1, keepdim=True)
        return dx, du, self.network.rate(torch.cat([h, pair, squares], -1))

    def initial_velocity(self, encoding: Any) -> Tensor:
        """The initial velocity u(0), constrained."""
        return self.constrained(self.network.velocity_gate(encoding, self.graph))

    def constrained(self, u: Tensor) -> Tensor:
        """Velocities that respect fixed atoms and total momentum; see `dynamics.constrain_velocity`."""
        graph = self.graph
        u = torch.where(graph.free, u, 0.0)
        weight = self.inertia[:, None]
        momentum = segment_sum(weight * u, graph.graph, graph.n_graphs)
        drift = momentum / segment_sum(weight, graph.graph, graph.n_graphs)
        drift = torch.where(graph.held, 0.0, drift)
        return torch.where(graph.free, u - drift[graph.graph], 0.0)


def solve(network: PeerNetwork, graph: PeerGraph, scale: float) -> PeerTrajectory:
    """The trajectories of a batch on the configuration's frames; see `solver.solve_trajectory`."""
    d = network.config.dynamics
    field = Field(network, graph, scale)
    encoding = network.encoder(graph, graph.positions)
    x = graph.positions.clone()
    if torch.is_grad_enabled():
        x.requires_grad_()
    h = encoding.h if d.latent == "explicit" else x.new_zeros((len(x), 0))
    times = torch.linspace(0.0, 1.0, d.frames, dtype=x.dtype)
    options = {"step_size": 1.0 / ((d.frames - 1) * d.substeps)} if d.substeps > 1 else {}
    start = (x, field.initial_velocity(encoding), h)
    positions, velocities, latents = odeint(
        field, start, times, method="classical_rk4", options=options
    )
    evaluated = [field.evaluate(a, b) for a, b in zip(positions, latents)]
    energies, forces, _ = zip(*evaluated)
    return PeerTrajectory(positions, velocities, torch.stack(energies), torch.stack(forces))


# Training


def peer_loss(
    prediction: PeerTrajectory, targets: PeerTargets, graph: PeerGraph, config: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its terms, without those for cells; see `losses.loss_terms`."""
    c, t = config.loss, targets
    size = t.sizes if c.energy_per == "atom" else torch.ones_like(t.sizes)
    atom_mask = t.frame_mask[:, graph.graph] & graph.free[:, 0]
    error = prediction.energies - t.energies
    energy = error.abs() / size
    change = (error - error.gather(0, t.last[None])).abs() / size
    before_last = torch.arange(len(error))[:, None] < t.last
    rise = (prediction.energies[1:] - prediction.energies[:-1]).clamp(min=0) / size

    def deviation(found: Tensor, true: Tensor) -> Tensor:
        return (
            ((found - true) ** 2).mean(-1) if c.errors == "squared" else (found - true).norm(dim=-1)
        )

    force = deviation(prediction.forces, t.forces)
    moved = deviation(prediction.positions, t.positions)[1:]
    last, atoms = t.last[graph.graph], torch.arange(len(graph.graph))
    true = torch.where(graph.free, t.positions[last, atoms] - graph.positions, 0.0)
    ours = torch.where(graph.free, prediction.positions[last, atoms] - graph.positions, 0.0)
    length = true.norm(dim=-1)
    cosine = torch.nn.functional.cosine_similarity(true, ours, dim=-1, eps=1e-12)
    terms = {
        "energy": _mean(energy, t.frame_mask),
        "energy_change": _mean(change, t.frame_mask & before_last),
        "monotonicity": _mean(rise, t.frame_mask[1:] & t.frame_mask[:-1]),
        "forces": _mean(force, atom_mask),
        "positions": _mean(moved, atom_mask[1:]),
        "direction": ((1 - cosine) * length).sum() / length.sum().clamp(min=1e-12),
    }
    return torch.stack([getattr(c, name) * terms[name] for name in TERMS]).sum(), terms


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum() / mask.sum().clamp(min=1)


class PeerTraining:
    """A training step: forward, loss, backward, clipping, AdamW, moving average."""

    def __init__(self, network: PeerNetwork, scale: float) -> None:
        self.network, self.scale, t = network, scale, network.config.train
        named = list(network.named_parameters())
        # As in Flax, what is called a kernel decays: matrices of linear layers and the mixing kernel.
        decays = {
            f"{name}.weight" for name, m in network.named_modules() if isinstance(m, nn.Linear)
        }
        kernels = [p for name, p in named if name in decays or name.endswith("kernel")]
        others = [p for name, p in named if name not in decays and not name.endswith("kernel")]
        self.parameters: list[Tensor] = [p for _, p in named]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": kernels, "weight_decay": t.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=t.learning_rate,
            fused=True,
        )
        self.average = [p.detach().clone() for p in self.parameters]
        self.steps = 0
        self.config = network.config

    def step(self, graph: PeerGraph, targets: PeerTargets) -> float:
        """One step; returns the loss before it."""
        t = self.config.train
        self.optimizer.zero_grad(set_to_none=True)
        loss, _ = peer_loss(solve(self.network, graph, self.scale), targets, graph, self.config)
        loss.backward(inputs=self.parameters)
        nn.utils.clip_grad_norm_(self.parameters, t.clip_norm)
        self.optimizer.step()
        decay = min(t.ema, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1.0 - decay)
        return loss.item()


def infer(network: PeerNetwork, graph: PeerGraph, scale: float) -> PeerTrajectory:
    """`solve` without recording gradients; the caller must turn off those of the parameters."""
    with torch.no_grad():
        return solve(network, graph, scale)
