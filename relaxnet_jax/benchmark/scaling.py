"""Time and memory per atom against the number of atoms, and against the number of frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from ase.spacegroup import crystal

from relaxnet_jax import dynamics
from relaxnet_jax.batching import collate, fitting_shape
from relaxnet_jax.benchmark.costs import memory_bytes
from relaxnet_jax.benchmark.machine import no_room
from relaxnet_jax.benchmark.timing import compile_once, measure
from relaxnet_jax.benchmark.work import Step, Work, inference_step, training_step
from relaxnet_jax.config import Config
from relaxnet_jax.graph import Structure, structure_from_atoms
from relaxnet_jax.losses import CellTargets, Targets
from relaxnet_jax.model import RelaxNet, create_model
from relaxnet_jax.typing import Graph

# Repetitions of the two-atom cell: 2, 20, 100, 500, 2,000, 6,000 and 20,000 atoms.
CELLS = (
    (1, 1, 1),
    (1, 2, 5),
    (2, 5, 5),
    (5, 5, 10),
    (10, 10, 10),
    (10, 15, 20),
    (20, 20, 25),
)
FRAMES = (1, 2, 5, 10, 20, 50)
FRAME_CELL = (2, 5, 5)


def supercell(repeat: tuple[int, int, int]) -> Atoms:
    """B2 NiAl, its two atoms moved off their sites, in the same way in every copy of the cell.

    The neighbours of an atom, and the work for it, are thus the same in every supercell.
    """
    cell = crystal(["Ni", "Al"], [(0, 0, 0), (0.5, 0.5, 0.5)], spacegroup=221, cellpar=[2.89] * 3)
    cell.positions += np.random.default_rng(0).normal(0, 0.05, cell.positions.shape)
    return cell.repeat(repeat)


def atoms_entry(config: Config, repeat: tuple[int, int, int], training: bool) -> dict[str, Any]:
    """Seconds and memory per atom for the path of one supercell, or for a training step on it."""
    model = create_model(config)
    structure = structure_from_atoms(supercell(repeat), config)
    graph = _graph([structure])
    step = inference_step(model, graph)
    if training:
        work = Work(config, "supercell", model, ())
        step = training_step(work, (graph, _targets(graph, config)))
    return {"atoms": structure.n_atoms, "frames": config.dynamics.frames} | _measure(
        step, structure.n_atoms * config.dynamics.frames, structure.n_atoms
    )


def frames_entry(config: Config, frames: int) -> dict[str, Any]:
    """Seconds for a path of so many frames, solved on its own grid; one frame is the initial one alone."""
    solved = dataclasses.replace(config.dynamics, frames=max(frames, 2))
    model = create_model(dataclasses.replace(config, dynamics=solved))
    structure = structure_from_atoms(supercell(FRAME_CELL), model.config)
    graph = _graph([structure])
    step = inference_step(model, graph) if frames > 1 else _first_frame(model, graph)
    return {"atoms": structure.n_atoms, "frames": frames} | _measure(
        step, structure.n_atoms * frames, structure.n_atoms
    )


def _graph(structures: list[Structure]) -> Graph:
    return jax.device_put(collate(structures, fitting_shape(structures)))


def _targets(graph: Graph, config: Config) -> Targets:
    """Targets in which nothing moves; what a step costs does not depend on them."""
    n, shape = config.dynamics.frames, graph.nodes["positions"].shape
    n_graphs = graph.n_node.shape[0]
    positions = jnp.broadcast_to(graph.nodes["positions"], (n, *shape))
    energies = jnp.zeros((n, n_graphs), jnp.float32)
    present = jnp.broadcast_to(graph.globals["mask"], (n, n_graphs))
    last = jnp.full(n_graphs, n - 1, jnp.int32)
    cells = None
    if config.dynamics.cell == "variable":
        still = jnp.broadcast_to(jnp.eye(3, dtype=jnp.float32), (n, n_graphs, 3, 3))
        cells = CellTargets(still, still, jnp.zeros_like(still), present)
    return Targets(positions, jnp.zeros_like(positions), energies, present, last, None, cells)


def _first_frame(model: RelaxNet, graph: Graph) -> Step:
    """Energy and forces of the initial structure."""

    def solve(params, graph):
        network, scale = model.network, jnp.asarray(model.energy_scale)
        state = dynamics.initial_state(network, params, graph, graph.nodes["positions"])
        return dynamics.evaluate(network, params, scale, graph, state)

    return Step(solve, (model.params, graph))


def _measure(step: Step, atom_frames: int, atoms: int) -> dict[str, Any]:
    """Time and memory that a step takes; in place of the time a reason if it would not fit in memory."""
    _, compiled, seconds = compile_once(step.function, step.arguments, step.donate)
    need = memory_bytes(compiled)
    found: dict[str, Any] = {
        "compile_s": seconds,
        "memory_bytes": need,
        "memory_bytes_per_atom": need / atoms,
    }
    if reason := no_room(need):
        return found | {"skipped": reason}
    timing = measure(step.runner(compiled), seconds=2.0)
    return found | {
        "seconds": dataclasses.asdict(timing),
        "seconds_per_atom": timing.median / atoms,
        "seconds_per_atom_and_frame": timing.median / atom_frames,
    }


Entries = list[tuple[str, Callable[[], dict[str, Any]]]]


def scaling_entries(config: Config, fast: bool, only: tuple[str, ...]) -> Entries:
    """(key, measurement) for every point of the curves; cheap and informative ones first."""
    cells = CELLS[:4:2] + CELLS[4:5] if fast else CELLS
    frames = FRAMES[:4:3] if fast else FRAMES
    name = config.name
    found: Entries = []
    if "atoms" in only:
        found += [
            (
                f"{name} / inference / {2 * int(np.prod(r))} atoms",
                lambda r=r: atoms_entry(config, r, False),  # type: ignore[misc]
            )
            for r in cells
        ]
    if "frames" in only:
        found += [
            (f"{name} / inference / {n} frames", lambda n=n: frames_entry(config, n))  # type: ignore[misc]
            for n in frames
        ]
    if "training" in only and not fast:
        found += [
            (
                f"{name} / training step / {2 * int(np.prod(r))} atoms",
                lambda r=r: atoms_entry(config, r, True),  # type: ignore[misc]
            )
            for r in cells
        ]
    return found
