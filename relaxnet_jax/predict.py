"""Structures in, trajectories out: batched, in few padded shapes, with the skin checked."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, overload

import jax
import numpy as np
from ase import Atoms

from relaxnet_jax import solver
from relaxnet_jax.batching import (
    REUSE,
    BatchShape,
    collate,
    fitting_shape,
    known_shape,
    pack,
    remember_shape,
    shared_shapes,
    split_nodes,
    structure_cost,
)
from relaxnet_jax.data.trajectory import PREDICTED, RelaxationTrajectory
from relaxnet_jax.errors import InputError
from relaxnet_jax.graph import Structure, build_structure
from relaxnet_jax.lbfgs import FMAX, STEPS, Minimisation, minimise
from relaxnet_jax.memory import ERRORS, batch_size_of, does_not_fit, out_of_memory
from relaxnet_jax.model import RelaxNet, atoms_list, dtype_of, solve_compiled
from relaxnet_jax.neighbors import approach
from relaxnet_jax.strain import from_reference, to_voigt
from relaxnet_jax.trust import NOT_CONVERGED, Flag, constraint_flags, trust_flags

# Neighbour lists are rebuilt with a wider skin at most this often before giving up: an atom
# that outruns every skin is a diverged prediction, not a short list.
MAX_WIDENINGS = 3
MAX_SKIN = 6.0  # Å
FOLLOWED = 1e3  # Å, stands for the skin where neighbour lists follow the atoms


@dataclasses.dataclass(frozen=True, eq=False)
class Path:
    """One structure's predicted path: NumPy, float64.

    Attributes:
      times (n,), positions (n, N, 3) Å, velocities (n, N, 3), see `solver.Trajectory`, energies (n,) eV total,
      forces (n, N, 3) eV/Å, cells (n, 3, 3) Å; skin: Å, of the neighbour list that was used; None
      where each frame had its own.
      approached: Å, how much two atoms may have approached at any of the solver's frames.
      stresses: (n, 6) eV/Å³ in ASE's order, tension positive; None where cells are fixed.
      failure: why there is no prediction (all values are then NaN), else empty.
      unconverged: where a minimisation ended above fmax: after how many steps; else 0.
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

    def at(self, rows: np.ndarray) -> Path:
        """Some of its frames."""
        return dataclasses.replace(
            self,
            positions=self.positions[rows],
            velocities=self.velocities[rows],
            energies=self.energies[rows],
            forces=self.forces[rows],
            cells=self.cells[rows],
            stresses=None if self.stresses is None else self.stresses[rows],
        )


def _with_grid(grid: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The times (m,) and those of the grid (n,) in order, each once, and where the former are."""
    nearest = grid[np.abs(grid[:, None] - times).argmin(axis=0)]
    times = np.where(np.abs(nearest - times) < 1e-12, nearest, times)
    every = np.unique(np.concatenate([grid, times]))
    return every, np.searchsorted(every, times)


def compiled_shapes() -> int:
    """How many batch shapes have been compiled for prediction in this process."""
    return solve_compiled.cache_size()


def predict_structures(
    model: RelaxNet,
    structures: Sequence[Structure],
    times: np.ndarray | None = None,
    batch_size: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
    fmax: float = FMAX,
    steps: int = STEPS,
) -> list[Path]:
    """Predicted paths of many structures, in the order given.

    Batches are of similar cost, whatever the sizes of the structures, and their shapes rounded up,
    so that few are compiled; what is solved again comes in shapes that are compiled already.
    Where atoms approach by more than the skin, the neighbour list could miss a pair: those
    structures are solved again with a wider one. A batch that does not fit in the device's memory
    is halved until it does; the path of a structure that does not fit alone says so in
    ``failure``, and the others go on.

    Static models have no path of their own: theirs is `lbfgs.minimise`'s, see `minimised_path`.

    Args:
      times: (n,) pseudotimes in [0, 1]; the configuration's frames by default.
      batch_size: structures per batch; by default 16 on a CPU, 128 on an accelerator.
      progress: called with the number of structures done.
      fmax, steps: of static models, see `lbfgs.minimise`.

    Raises:
      InputError: times that are not pseudotimes, or a batch_size below 1.
    """
    batch_size = batch_size_of(batch_size)
    grid = solver.frame_grid(model.config.dynamics)
    times = grid if times is None else np.asarray(times, np.float64)
    if times.ndim != 1 or len(times) == 0 or times.min() < 0 or times.max() > 1:
        raise InputError("times: must be pseudotimes in [0, 1], one dimension, at least one")
    if model.config.dynamics.latent == "static":
        found = minimise(model, structures, fmax, steps, batch_size=batch_size, progress=progress)
        return [minimised_path(m, times) for m in found.paths]
    # On the grid too, whatever times are asked for: there the skin is checked.
    every, rows = _with_grid(grid, times)
    done: dict[int, Path] = {}
    batches = _Batches(model, None if len(every) == len(grid) else every, len(every))
    pending = {i: (s, model.config.graph.skin) for i, s in enumerate(structures)}
    for widening in range(MAX_WIDENINGS + 1):
        retry = {}
        waiting = {i: structure for i, (structure, _) in pending.items()}
        divided = _divide(waiting, batch_size, batches.used)
        if len(divided) == 1:
            divided = [(divided[0][0], batches.known_shape(list(waiting.values()), divided[0][1]))]
        for members, shape in divided:
            paths = batches.predict([waiting[i] for i in members], shape)
            for i, raw in zip(members, paths):
                structure, skin = pending[i]
                # From the structure the list was made for.
                x, cells = [structure.positions, *raw.positions], [structure.cell, *raw.cells]
                needed = approach(np.stack(x), np.stack(cells), structure.neighbors.reach)
                if (
                    needed > skin
                    and np.isfinite(needed)
                    and skin < MAX_SKIN
                    and widening < MAX_WIDENINGS
                ):
                    wider = min(1.25 * needed, MAX_SKIN)
                    retry[i] = (_with_skin(model, structure, wider), wider)
                else:
                    done[i] = dataclasses.replace(
                        raw.at(rows), times=times, skin=skin, approached=needed
                    )
            progress(len(done))
        if not retry:
            break
        pending = retry
    return [done[i] for i in range(len(structures))]


def minimised_path(found: Minimisation, times: np.ndarray) -> Path:
    """A minimisation of k steps as a path: at pseudotime t it is where it was after t·k steps.

    Args:
      times: (n,) in [0, 1]. What failed is not a number, and says why.
    """
    rows = np.rint(np.asarray(times, np.float64) * found.steps).astype(int)
    stresses = np.zeros(0) if found.stresses is None else found.stresses[rows]
    values = [found.positions[rows], found.energies[rows], found.forces[rows], stresses]
    if found.failure:
        values = [np.full_like(v, np.nan) for v in values]
    positions, energies, forces, stresses = values
    return Path(
        times,
        positions,
        np.zeros_like(positions),
        energies,
        forces,
        found.cells[rows],
        FOLLOWED,
        found.failure,
        None if found.stresses is None else stresses,
        unconverged=0 if found.converged or found.failure else found.steps,
    )


def _with_skin(model: RelaxNet, s: Structure, skin: float) -> Structure:
    return build_structure(
        s.atomic_numbers,
        s.positions,
        s.cell,
        s.pbc,
        model.config.with_skin(skin),
        s.fixed_mask,
        s.charges,
        relax_cell=bool(s.strain.any()),
    )


def _divide(
    structures: Mapping[int, Structure], batch_size: int, used: Sequence[BatchShape]
) -> list[tuple[list[int], BatchShape]]:
    """Batches of structures by number, and their shapes: such that have been used where there is
    room, in smaller batches if need be, since a new one is compiled for much longer than it runs."""
    placed, rest = [], list(structures)
    if used:
        waiting, rest = _packed(structures, rest, batch_size), []
        while waiting:
            group = waiting.pop()
            need = fitting_shape([structures[i] for i in group])
            roomy = [shape for shape in used if shape.holds(need)]
            middle = len(group) // 2
            if roomy:
                placed.append((group, min(roomy, key=lambda shape: shape.cost)))
            elif middle:
                waiting += [group[:middle], group[middle:]]
            else:
                rest += group
    groups = _packed(structures, rest, batch_size)
    shapes = [_batch_shape([structures[i] for i in group], batch_size) for group in groups]
    return placed + list(zip(groups, shared_shapes(shapes)))


def _packed(
    structures: Mapping[int, Structure], numbers: Sequence[int], batch_size: int
) -> list[list[int]]:
    packed = pack([structure_cost(structures[i]) for i in numbers], batch_size)
    return [[numbers[k] for k in members] for members in packed]


class _Batches:
    """Solves batches, and smaller ones where they do not fit in memory.

    Attributes:
      used: the shapes of the batches so far.
      kind: of the program, see `batching.known_shape`.
      too_much: the least padded cost that did not fit so far. A batch of that cost is split
        without being tried: what is tried is compiled first.
    """

    def __init__(self, model: RelaxNet, times: np.ndarray | None, n_frames: int) -> None:
        self.model, self.times, self.n_frames = model, times, n_frames
        self.used: list[BatchShape] = []
        frames = None if times is None else n_frames
        self.kind = "solve", model.network, dtype_of(model.params).name, frames
        self.too_much = math.inf

    def known_shape(self, structures: Sequence[Structure], shape: BatchShape) -> BatchShape:
        """One that was used before, if it has room for these and costs little more than ``shape``."""
        return known_shape(self.kind, structures, shape, REUSE)

    def predict(self, structures: Sequence[Structure], shape: BatchShape) -> list[Path]:
        """The paths of one batch; see `predict_structures`."""
        if len(structures) == 1 or shape.cost < self.too_much:
            try:
                paths = _predict_batch(self.model, structures, self.times, shape)
                if shape not in self.used:
                    self.used.append(shape)
                remember_shape(self.kind, shape)
                return paths
            except ERRORS as error:
                if not out_of_memory(error):
                    raise
                self.too_much = min(self.too_much, shape.cost)
        # Out here the exception, and the arrays its traceback holds, are gone.
        if len(structures) == 1:
            own = _batch_shape(structures, 1)
            if own.cost < shape.cost:  # it was tried in one that others share
                return self.predict(structures, own)
            return [_without_memory(structures[0], self.n_frames)]
        middle = len(structures) // 2
        parts = structures[:middle], structures[middle:]
        return [
            path for part in parts for path in self.predict(part, _batch_shape(part, len(part)))
        ]


def _without_memory(structure: Structure, n_frames: int) -> Path:
    frames = np.full((n_frames, structure.n_atoms, 3), np.nan)
    message = does_not_fit(structure.n_atoms)
    cells = np.repeat(structure.cell[None], n_frames, axis=0)
    energies = np.full(n_frames, np.nan)
    return Path(np.zeros(0), frames, frames, energies, frames, cells, 0.0, message)


def _batch_shape(structures: Sequence[Structure], batch_size: int) -> BatchShape:
    shape = fitting_shape(structures, rounded=True)
    # The last, smaller batch of a set takes the full number of structures: one shape fewer.
    return dataclasses.replace(
        shape, n_graphs=max(shape.n_graphs, batch_size + 1 if len(structures) > 1 else 2)
    )


def _predict_batch(
    model: RelaxNet, structures: Sequence[Structure], times, shape: BatchShape
) -> list[Path]:
    dtype = dtype_of(model.params)
    near = [s.centred() for s in structures]
    graph = collate(near, shape, dtype)
    result = jax.device_get(
        solve_compiled(
            model.network,
            model.params,
            model.energy_scale,
            graph,
            None if times is None else times.astype(dtype),
        )
    )
    reference = result.positions if result.reference is None else result.reference
    split = [
        split_nodes(np.asarray(x, np.float64), graph)
        for x in (reference, result.velocities, result.forces)
    ]
    paths = []
    for index, (structure, start, x, u, f) in enumerate(zip(structures, near, *split)):
        energies = np.asarray(result.energies[:, index], np.float64)
        # Exact initial positions: the network's precision must not move an atom at t = 0.
        x = structure.positions + (x - np.asarray(start.positions, dtype))
        energies = energies + model.composition_energy(structure.atomic_numbers)
        cells, stresses = np.repeat(structure.cell[None], len(energies), axis=0), None
        if result.deformation is not None:
            steps = np.asarray(result.deformation[:, index], np.float64)
            virial = np.asarray(result.virial[:, index], np.float64)
            x, cells, stresses = _deformed(x, structure, steps, virial)
        paths.append(Path(np.zeros(0), x, u, energies, f, cells, 0.0, stresses=stresses))
    return paths


def _deformed(reference: np.ndarray, s: Structure, steps: np.ndarray, virial: np.ndarray):
    """Positions, cells and stresses of a path from its reference positions and deformations."""
    if not s.strain.any():  # the cell is held
        x, cells = reference, np.repeat(s.cell[None], len(steps), axis=0)
    else:
        x, cells = from_reference(reference, steps), from_reference(s.cell, steps)
    with np.errstate(all="ignore"):  # of cells that are not finite: they are flagged
        volumes = np.abs(np.linalg.det(cells))
    if not s.pbc.all() or volumes.min() == 0:  # no volume, no stress
        return x, cells, None
    return x, cells, to_voigt(virial / volumes[:, None, None])


@overload
def relax(
    model: RelaxNet,
    atoms: Atoms,
    n_frames: int = 5,
    batch_size: int | None = None,
    relax_cell: bool = True,
    fmax: float = FMAX,
    steps: int = STEPS,
) -> RelaxationTrajectory: ...
@overload
def relax(
    model: RelaxNet,
    atoms: Sequence[Atoms],
    n_frames: int = 5,
    batch_size: int | None = None,
    relax_cell: bool = True,
    fmax: float = FMAX,
    steps: int = STEPS,
) -> list[RelaxationTrajectory]: ...


def relax(model, atoms, n_frames=5, batch_size=None, relax_cell=True, fmax=FMAX, steps=STEPS):
    """Predicts the relaxation of one structure or of many; a static model minimises its energy.

    Args:
      model: from `load_model` or `create_model`.
      atoms: ASE Atoms, or a sequence of them; `FixAtoms` are respected.
      n_frames: frames of the result, equally spaced in pseudotime, first and last included.
      batch_size: structures solved at once; by default 16 on a CPU, 128 on an accelerator.
      relax_cell: whether cells relax along their periodic directions, if the model was trained for
        that (dynamics.cell="variable"); other models keep them.
      fmax, steps: of a static model: eV/Å, the largest force of a relaxed structure, and the most
        LBFGS steps (`lbfgs.minimise`).

    Returns:
      A `RelaxationTrajectory` (a list of them for a sequence). Of a structure too large for the
      device's memory all values are NaN. A warning names this and every other structure whose
      prediction should not be used (`trust.trust_flags`, which says more), those with
      constraints that the path ignores (`head_start` moves atoms under them), and those that a
      static model did not relax to ``fmax`` within ``steps``.

    Raises:
      InputError: a structure that cannot be used, named by its place in the sequence;
        n_frames < 2 or batch_size < 1.
    """
    if n_frames < 2:
        raise InputError(
            f"n_frames={n_frames}: a trajectory has at least 2 frames, the first and the last"
        )
    many, single = atoms_list(atoms), isinstance(atoms, Atoms)
    names = [a.info.get("traj_id") or f"{i}-{a.get_chemical_formula()}" for i, a in enumerate(many)]
    named = [(str(n), model.structure(a, str(n), relax_cell)) for a, n in zip(many, names)]
    judged = judge(model, named, n_frames, batch_size=batch_size, fmax=fmax, steps=steps)
    for one, a in zip(judged, many):
        told = constraint_flags(a, one.path)
        if grave := next((flag for flag in one.flags + told if flag.unusable), None):
            reason = one.failure or f"not to be used, {grave.name}: {grave.detail}"
            warnings.warn(f"{one.path.id}: {reason}", RuntimeWarning, stacklevel=2)
            continue
        late = [flag for flag in one.flags if flag.name == NOT_CONVERGED]
        for flag in (*told[:1], *late):
            text = f"{one.path.id}: {flag.name}: {flag.detail}"
            warnings.warn(text, UserWarning, stacklevel=2)
    results = [one.path for one in judged]
    return results[0] if single else results


class Judged(NamedTuple):
    """A predicted path, what speaks against it (`trust.trust_flags`), and `Path.failure`."""

    path: RelaxationTrajectory
    flags: tuple[Flag, ...]
    failure: str = ""


def judge(
    model: RelaxNet, named: Sequence[tuple[str, Structure]], n_frames: int, **options: Any
) -> list[Judged]:
    """Paths of ``n_frames`` equidistant frames of structures by name, in their order, with flags.

    Args:
      options: of `predict_structures`.
    """
    times = np.linspace(0.0, 1.0, n_frames)
    found = []
    for (name, structure), path in zip(
        named, predict_structures(model, [s for _, s in named], times, **options)
    ):
        trajectory = as_trajectory(name, structure, path)
        flags = trust_flags(trajectory, model, path.skin, path.approached)
        if path.unconverged:
            text = f"{path.unconverged} LBFGS steps did not reach fmax"
            flags = (*flags, Flag(NOT_CONVERGED, text))
        found.append(Judged(trajectory, flags, path.failure))
    return found


def as_trajectory(name: str, structure: Structure, path: Path) -> RelaxationTrajectory:
    """A predicted path as a `RelaxationTrajectory`."""
    return RelaxationTrajectory(
        id=name,
        atomic_numbers=structure.atomic_numbers,
        positions=path.positions,
        cells=path.cells,
        stresses=path.stresses,
        charges=structure.charges if structure.charges.any() else None,
        pbc=structure.pbc,
        energies=path.energies,
        forces=path.forces,
        fixed_mask=structure.fixed_mask,
        times=path.times,
        source=PREDICTED,
    )
