"""Solves batches of structures on one or several devices, split so that they fit in memory."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from relaxnet_jax.batching import (
    REUSE,
    BatchShape,
    collate,
    fitting_shape,
    known_shape,
    remember_shape,
    split_nodes,
)
from relaxnet_jax.graph import Structure
from relaxnet_jax.memory import ERRORS, does_not_fit, out_of_memory
from relaxnet_jax.model import RelaxNet, dtype_of, solve_compiled
from relaxnet_jax.models.energy import RelaxNetwork
from relaxnet_jax.neighbors import approach, approach_of
from relaxnet_jax.runtime import ONE_THREAD
from relaxnet_jax.solver import Stages
from relaxnet_jax.strain import from_reference, to_voigt
from relaxnet_jax.typing import Graph

AHEAD = 1  # groups of batches queued on the devices while the group before them is solved


@dataclasses.dataclass(frozen=True, eq=False)
class Path:
    """The predicted path of one structure (NumPy, float64).

    Attributes:
      times: (n,) pseudotimes.
      positions: (n, N, 3) Å.
      velocities: (n, N, 3) Å, see `solver.Trajectory`.
      energies: (n,) eV, total.
      forces: (n, N, 3) eV/Å.
      cells: (n, 3, 3) Å.
      skin: skin of the neighbour list that was used, Å; `predict.FOLLOWED` where lists followed the
        atoms; None where no pair can be missed, as with a direct predictor.
      failure: why there is no prediction (energies, forces and positions are then NaN); empty otherwise.
      stresses: (n, 6) eV/Å³ in ASE's order, tension positive; None for fixed cells.
      approached: Å, by how much two atoms may have approached each other at the requested times or
        at any of the solver's stages (for the adaptive solver, whose stages are not available, at
        its frames).
      unconverged: number of steps of a minimisation that ended above fmax; 0 otherwise.
      listed: the structure with the neighbour list that was used; None where lists followed the
        atoms.
    """

    times: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray
    energies: np.ndarray
    forces: np.ndarray
    cells: np.ndarray
    skin: float | None
    failure: str = ""
    stresses: np.ndarray | None = None
    approached: float = 0.0
    unconverged: int = 0
    listed: Structure | None = None

    def at(self, rows: np.ndarray) -> Path:
        """The path restricted to some of its frames."""
        return dataclasses.replace(
            self,
            positions=self.positions[rows],
            velocities=self.velocities[rows],
            energies=self.energies[rows],
            forces=self.forces[rows],
            cells=self.cells[rows],
            stresses=None if self.stresses is None else self.stresses[rows],
        )


class Batch(NamedTuple):
    """Structures that are solved together, and their padded shape."""

    structures: list[Structure]
    shape: BatchShape


def usable_devices(model: RelaxNet) -> int:
    """The number of this process's devices on which batches of a model may be solved in parallel.

    It is 1 if JAX's settings or the placement of the parameters select a device, if compilation is
    disabled, and for the adaptive solver, whose loops `jax.pmap` cannot trace.
    """
    settings: Any = jax.config
    told = settings.jax_default_device is not None or settings.jax_disable_jit
    arrays = [x for x in jax.tree.leaves(model.params) if isinstance(x, jax.Array)]
    if told or any(x.committed for x in arrays) or model.config.dynamics.solver != "rk4":
        return 1
    return jax.local_device_count()


class _Everywhere:
    """`solve_compiled` on several devices at once, one batch each, all of the same shape."""

    def __init__(self, network: RelaxNetwork, n_devices: int) -> None:
        def solve(params, scale, graph, times):
            return solve_compiled.inline(network, params, scale, graph, times)

        devices = jax.local_devices()[:n_devices]
        # JAX gives an unnamed axis a name unique to this process, with which no other process would
        # find the compiled program in the cache.
        self._mapped = jax.pmap(
            solve, axis_name="devices", in_axes=(None, None, 0, None), devices=devices
        )
        self._options = ONE_THREAD if devices[0].platform == "cpu" else None
        self.compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def __call__(self, *args: Any) -> Any:
        kinds = tuple((np.shape(x), str(np.result_type(x))) for x in jax.tree.leaves(args))
        if kinds not in self.compiled:
            self.compiled[kinds] = self._mapped.lower(*args).compile(self._options)
        return self.compiled[kinds](*args)


_everywhere = functools.lru_cache(maxsize=32)(_Everywhere)


def compiled_shapes() -> int:
    """The number of batch shapes compiled for prediction in this process."""
    return solve_compiled.cache_size()


class _Running(NamedTuple):
    """Batches dispatched to the devices: centred structures, graphs, and the pending result."""

    starts: list[list[Structure]]
    graphs: list[Graph]
    result: Any


class Batches:
    """Solves batches on several devices at once, and splits those that do not fit in memory.

    Attributes:
      n_devices: number of devices that each solve one batch at the same time. These batches have the
        same shape and so share one program.
      used: shapes of the batches solved so far.
      kind: the kind of program, see `batching.known_shape`.
      too_much: lowest padded cost so far that did not fit in memory. A batch of at least that cost is
        split without being tried, since trying it means compiling it first.
    """

    def __init__(
        self, model: RelaxNet, times: np.ndarray | None, n_frames: int, n_devices: int = 1
    ) -> None:
        self.model, self.n_frames, self.n_devices = model, n_frames, n_devices
        self.dtype = dtype_of(model.params)
        self.times = None if times is None else times.astype(self.dtype)
        self.used: list[BatchShape] = []
        frames = None if times is None else n_frames
        self.kind = "solve", model.network, self.dtype.name, frames, n_devices
        self.too_much = math.inf

    def known_shape(self, structures: Sequence[Structure], shape: BatchShape) -> BatchShape:
        """A shape used before that holds the structures and costs at most `REUSE` times ``shape``.

        Where there is none, ``shape`` itself.
        """
        return known_shape(self.kind, structures, shape, REUSE)

    def solve(self, batches: Sequence[Batch]) -> Iterator[tuple[int, list[Path]]]:
        """Yields the index in ``batches`` and the paths of each batch, in the order they are solved.

        The paths have all solved frames, including those not requested, see `Path.at`. The next
        batches are prepared while the devices are busy.
        """
        running: deque[tuple[list[int], _Running | None]] = deque()
        for group in self._groups(batches):
            running.append((group, self._begin([batches[k] for k in group])))
            if len(running) > AHEAD:
                yield from self._end(batches, *running.popleft())
        while running:
            yield from self._end(batches, *running.popleft())

    def _groups(self, batches: Sequence[Batch]) -> Iterator[list[int]]:
        """Yields groups of batches of one shape, at most one batch per device."""
        by_shape: dict[BatchShape, list[int]] = {}
        for k, batch in enumerate(batches):
            by_shape.setdefault(batch.shape, []).append(k)
        for alike in by_shape.values():
            for first in range(0, len(alike), self.n_devices):
                yield alike[first : first + self.n_devices]

    def _begin(self, group: list[Batch]) -> _Running | None:
        """Gives a batch to each device; None if they do not, or would not, fit in memory."""
        shape, model = group[0].shape, self.model
        if shape.cost >= self.too_much and any(len(b.structures) > 1 for b in group):
            return None
        starts = [[s.centred() for s in batch.structures] for batch in group]
        graphs = [collate(near, shape, self.dtype) for near in starts]
        known = model.params, model.energy_scale
        try:
            if self.n_devices == 1:
                result = solve_compiled(model.network, *known, graphs[0], self.times)
            else:
                # Devices without a batch repeat the last one: they would wait for the others anyway.
                full = graphs + graphs[-1:] * (self.n_devices - len(graphs))
                stacked = jax.tree.map(lambda *parts: np.stack(parts), *full)
                result = _everywhere(model.network, self.n_devices)(*known, stacked, self.times)
            return _Running(starts, graphs, result)
        except ERRORS as error:
            self._too_much(error, shape)
            return None

    def _end(
        self, batches: Sequence[Batch], group: list[int], running: _Running | None
    ) -> Iterator[tuple[int, list[Path]]]:
        """Yields the paths of dispatched batches; those that do not fit in memory are solved in parts."""
        members = [batches[k] for k in group]
        solved = None if running is None else self._result(running, members[0].shape)
        # At this point the exception, and the arrays its traceback holds, have been released.
        running = None if solved is None else running
        for row, (k, batch) in enumerate(zip(group, members)):
            if running is None:
                yield k, self._in_parts(batch)
                continue
            own = solved if self.n_devices == 1 else jax.tree.map(lambda x, r=row: x[r], solved)
            near, graph = running.starts[row], running.graphs[row]
            yield k, _paths(self.model, batch.structures, near, graph, own)

    def _result(self, running: _Running, shape: BatchShape) -> Any:
        """The result, copied to the host; None if it did not fit in the devices' memory."""
        try:
            result = jax.device_get(running.result)
        except ERRORS as error:
            self._too_much(error, shape)
            return None
        if shape not in self.used:
            self.used.append(shape)
        remember_shape(self.kind, shape)
        return result

    def _too_much(self, error: BaseException, shape: BatchShape) -> None:
        if not out_of_memory(error):
            raise error
        self.too_much = min(self.too_much, shape.cost)

    def _in_parts(self, batch: Batch) -> list[Path]:
        """The paths of a batch that does not fit in memory, solved in two halves.

        A single structure is retried in a shape of its own if that is smaller.
        """
        structures, shape = batch
        if len(structures) == 1:
            own = batch_shape(structures, 1)
            if own.cost < shape.cost:  # it was tried in a shape shared with others
                return self._alone(Batch(structures, own))
            return [_without_memory(structures[0], self.n_frames)]
        middle = len(structures) // 2
        parts = structures[:middle], structures[middle:]
        return [
            path
            for part in parts
            for path in self._alone(Batch(part, batch_shape(part, len(part))))
        ]

    def _alone(self, batch: Batch) -> list[Path]:
        ((_, paths),) = self.solve([batch])
        return paths


def _without_memory(structure: Structure, n_frames: int) -> Path:
    frames = np.full((n_frames, structure.n_atoms, 3), np.nan)
    message = does_not_fit(structure.n_atoms)
    cells = np.repeat(structure.cell[None], n_frames, axis=0)
    energies = np.full(n_frames, np.nan)
    return Path(
        np.zeros(0), frames, frames, energies, frames, cells, 0.0, message, approached=np.inf
    )


def batch_shape(structures: Sequence[Structure], batch_size: int) -> BatchShape:
    shape = fitting_shape(structures, rounded=True)
    # A last, smaller batch is padded to the full number of structures, which saves one shape.
    return dataclasses.replace(
        shape, n_graphs=max(shape.n_graphs, batch_size + 1 if len(structures) > 1 else 2)
    )


def _paths(
    model: RelaxNet,
    structures: Sequence[Structure],
    near: Sequence[Structure],
    graph: Graph,
    result,
) -> list[Path]:
    """The paths of a batch's structures, from the result for their centred copies ``near``."""
    reference = result.positions if result.reference is None else result.reference
    split = [
        split_nodes(np.asarray(x, np.float64), graph)
        for x in (reference, result.velocities, result.forces)
    ]
    at_stages = _approached_at_stages(structures, graph, result.stages)
    paths = []
    for index, (structure, start, x, u, f) in enumerate(zip(structures, near, *split)):
        energies = np.asarray(result.energies[:, index], np.float64)
        # Start from the exact positions: rounding to the network's precision must not move an atom at t = 0.
        x = structure.positions + (x - np.asarray(start.positions, graph.nodes["positions"].dtype))
        energies = energies + model.composition_energy(structure.atomic_numbers)
        cells, stresses = np.repeat(structure.cell[None], len(energies), axis=0), None
        if result.deformation is not None:
            steps = np.asarray(result.deformation[:, index], np.float64)
            virial = np.asarray(result.virial[:, index], np.float64)
            x, cells, stresses = _deformed(x, structure, steps, virial)
        # Relative to the structure that the neighbour list was made for.
        seen = np.stack([structure.positions, *x]), np.stack([structure.cell, *cells])
        approached = max(at_stages[index], approach(*seen, structure.neighbors.reach))
        paths.append(
            Path(np.zeros(0), x, u, energies, f, cells, 0.0, "", stresses, approached=approached)
        )
    return paths


def _approached_at_stages(
    structures: Sequence[Structure], graph: Graph, stages: Stages | None
) -> list[float]:
    """By how much (Å) two atoms of each structure may have approached at the solver's stages."""
    if stages is None:
        return [0.0] * len(structures)
    found = []
    furthest = split_nodes(np.asarray(stages.moved, np.float64), graph)
    for index, (s, moved) in enumerate(zip(structures, furthest)):
        steps = None
        if stages.deformation is not None and s.strain.any():
            steps = np.asarray(stages.deformation[:, index], np.float64)
        found.append(approach_of(moved, steps, s.neighbors.reach))
    return found


def _deformed(reference: np.ndarray, s: Structure, steps: np.ndarray, virial: np.ndarray):
    """Positions, cells and stresses of a path from its reference positions and deformations."""
    if not s.strain.any():  # the cell is fixed
        x, cells = reference, np.repeat(s.cell[None], len(steps), axis=0)
    else:
        x, cells = from_reference(reference, steps), from_reference(s.cell, steps)
    with np.errstate(all="ignore"):  # cells that are not finite are flagged elsewhere
        volumes = np.abs(np.linalg.det(cells))
    if not s.pbc.all() or volumes.min() == 0:  # stress needs a volume
        return x, cells, None
    return x, cells, to_voigt(virial / volumes[:, None, None])
