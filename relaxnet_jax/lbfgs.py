"""L-BFGS minimisation of many structures at once with a model that is a potential.

The optimiser is ASE's `LBFGS`: two-loop recursion, initial inverse Hessian 1/70 Å²/eV, and the whole
step scaled down where an atom would move further than ``max_step``. Unlike ASE's, it leaves out pairs of
negative curvature, which would turn the step uphill. Structures share batches for energies and forces
only: each has its own history and its own convergence, and then makes room for the next.

Where cells relax, the coordinates are those of ASE's `UnitCellFilter`: the reference positions y and
N times the deformation gradient D, with the forces Dᵀ F and -W D⁻ᵀ/N (W = dE/d(strain), eV, in
the directions in which the cell may be strained). Convergence is judged by F and W/N.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from relaxnet_jax.batching import (
    WASTE,
    BatchShape,
    collate,
    fitting_shape,
    known_shape,
    largest_shape,
    remember_shape,
    structure_cost,
)
from relaxnet_jax.errors import InputError
from relaxnet_jax.graph import Structure, build_structure
from relaxnet_jax.memory import ERRORS, batch_size_of, does_not_fit, out_of_memory
from relaxnet_jax.model import RelaxNet, dtype_of
from relaxnet_jax.neighbors import approach
from relaxnet_jax.potential import compiled_shapes, evaluate, program_kind
from relaxnet_jax.strain import to_voigt
from relaxnet_jax.typing import Graph

FMAX = 0.05  # eV/Å
MAX_STEP = 0.2  # Å
STEPS = 500
HISTORY = 100
STIFFNESS = 70.0  # eV/Å², initial Hessian
SHRINK = 4  # a batch whose padded cost exceeds that of its structures by this factor gets a smaller shape


@dataclasses.dataclass(frozen=True, eq=False)
class Minimisation:
    """The path of one structure in k steps (NumPy, float64); entry 0 is the structure as given.

    Attributes:
      positions: (k+1, N, 3) Å.
      energies: (k+1,) eV, total.
      forces: (k+1, N, 3) eV/Å, raw: also on fixed atoms.
      cells: (k+1, 3, 3) Å.
      stresses: (k+1, 6) eV/Å³ in ASE's order; None unless the model's cells relax.
      converged: whether the largest force (on free atoms, and on the cell) fell below fmax.
      failure: why the minimisation stopped before that, other than at the maximum number of
        steps; else empty.
    """

    positions: np.ndarray
    energies: np.ndarray
    forces: np.ndarray
    cells: np.ndarray
    stresses: np.ndarray | None
    converged: bool
    failure: str = ""

    @property
    def steps(self) -> int:
        """Number k of steps."""
        return len(self.energies) - 1


@dataclasses.dataclass(frozen=True)
class Minimisations:
    """Minimisations of several structures.

    Attributes:
      paths: one for each structure, in their order.
      seconds: total wall-clock time without compilation.
      evaluations: number of batches evaluated.
    """

    paths: list[Minimisation]
    seconds: float
    evaluations: int


def check_potential(model: RelaxNet) -> None:
    """Raises InputError for a model whose energy cannot be minimised."""
    if not model.config.is_potential:
        raise InputError(
            f"dynamics.latent={model.config.dynamics.latent!r}: its energy is no function of the "
            "positions alone and cannot be minimised; use a static or implicit model"
        )


def minimise(
    model: RelaxNet,
    structures: Sequence[Structure],
    fmax: float = FMAX,
    steps: int = STEPS,
    max_step: float = MAX_STEP,
    batch_size: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Minimisations:
    """Relaxes structures by minimising a model's energy.

    Structures that do not fit in the device's memory together are evaluated in smaller batches. A
    structure that does not fit alone reports this in its ``failure``, and the others continue.

    Args:
      model: a static or implicit model.
      structures: from `RelaxNet.structure`; fixed atoms stay, cells relax where the structure allows it.
      fmax: eV/Å, largest force of a relaxed structure.
      steps: maximum number of steps for each structure.
      max_step: Å, largest distance by which an atom moves in one step.
      batch_size: structures evaluated at once; by default 16 on a CPU, 128 on an accelerator.
      progress: called with the number of structures done.

    Returns:
      The paths, in the order of the structures, and what they cost.

    Raises:
      InputError: a model that is no potential, or a batch_size below 1.
    """
    check_potential(model)
    batch_size = batch_size_of(batch_size)
    start = time.perf_counter()
    # The largest structures first, so that shapes shrink rather than grow.
    order = sorted(range(len(structures)), key=lambda i: -structures[i].neighbors.n_edges)
    waiting = deque(order)
    active: dict[int, _Descent] = {}
    begun: dict[int, _Descent] = {}  # started, waiting for room in the batch
    done: dict[int, Minimisation] = {}
    batch = _Batch(model, batch_size)
    while waiting or active:
        while waiting and len(active) < batch_size:
            index = waiting[0]
            descent = begun.pop(index, None) or _Descent(model, structures[index], max_step)
            if active and not batch.has_room([*active.values(), descent]):
                begun[index] = descent
                break
            active[waiting.popleft()] = descent
        members = list(active.values())
        found = batch.evaluate(members)
        if found is None and len(members) == 1:
            members[0].give_up(does_not_fit(members[0].size))
        elif found is None:
            for index in reversed(list(active)[len(members) // 2 :]):
                begun[index] = active.pop(index)
                waiting.appendleft(index)
            continue
        else:
            for descent, one in zip(members, found):
                descent.take(*one)
        for index, descent in list(active.items()):
            if descent.finished(fmax, steps) or not descent.step():
                done[index] = descent.result(fmax)
                del active[index]
        progress(len(done))
    seconds = time.perf_counter() - start - batch.compiling
    return Minimisations([done[i] for i in range(len(structures))], seconds, batch.evaluations)


def _longest_row(rows: np.ndarray) -> float:
    """The largest Euclidean norm among the rows (M, 3)."""
    return float(np.linalg.norm(rows, axis=1).max())


class _Descent:
    """The state of one structure's minimisation.

    Attributes:
      structure: the structure as it was when the neighbour list in use was built, with that list.
      x, force: (M, 3), the optimiser's coordinates and forces, see the module's docstring; the
        force is zero where nothing may move.
    """

    def __init__(self, model: RelaxNet, structure: Structure, max_step: float) -> None:
        self.model, self.origin, self.structure = model, structure, structure
        self.max_step, self.skin = max_step, model.config.graph.skin
        self.relaxes = bool(structure.strain.any())
        self.size = structure.n_atoms
        self.listed = np.eye(3)  # D at which the neighbour list was built
        self.x = np.array(structure.positions, np.float64)
        if self.relaxes:
            self.x = np.concatenate([self.x, self.size * np.eye(3)])
        self.composition = model.composition_energy(structure.atomic_numbers)
        self.pairs: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=HISTORY)
        self.before: tuple[np.ndarray, np.ndarray] | None = None
        self.force = np.zeros_like(self.x)
        self.largest = np.inf
        self.path: list[tuple] = []
        self.failure = ""

    @property
    def deformation(self) -> np.ndarray:
        """Deformation gradient D (3, 3)."""
        return self.x[self.size :] / self.size if self.relaxes else np.eye(3)

    @property
    def positions(self) -> np.ndarray:
        """Cartesian positions (N, 3), Å."""
        return self.x[: self.size] @ self.deformation.T if self.relaxes else self.x

    @property
    def cell(self) -> np.ndarray:
        """Lattice vectors (3, 3), Å, as rows."""
        return self.origin.cell @ self.deformation.T if self.relaxes else self.origin.cell

    @property
    def change(self) -> np.ndarray:
        """Deformation (3, 3) of the lattice since the neighbour list was built."""
        return self.deformation @ np.linalg.inv(self.listed)

    def take(self, energy: float, forces: np.ndarray, virial: np.ndarray | None) -> None:
        """Records the model's result at the current positions.

        Args:
          energy: eV, relative to the composition energy.
          forces: (N, 3) eV/Å.
          virial: (3, 3) eV, or None.
        """
        stress = None
        if virial is not None:
            volume = abs(np.linalg.det(self.cell))
            periodic = self.origin.pbc.all() and volume > 0
            stress = to_voigt(virial / volume) if periodic else None
        energy += self.composition
        self.path.append((self.positions.copy(), energy, forces, self.cell, stress))
        force = np.where(self.origin.fixed_mask[:, None], 0.0, forces)
        self.largest = _longest_row(force)
        if self.relaxes and virial is not None:
            projected = self.origin.strain @ virial @ self.origin.strain
            cell_force = -projected @ np.linalg.inv(self.deformation).T / self.size
            force = np.concatenate([force @ self.deformation, cell_force])
            self.largest = max(self.largest, _longest_row(projected) / self.size)
        self.force = force
        if not (np.isfinite(energy) and np.isfinite(force).all()):
            self.failure = "energy or forces are not finite"

    def give_up(self, reason: str) -> None:
        """Ends the minimisation here; if nothing was evaluated yet, energy and forces are NaN."""
        self.failure = reason
        if not self.path:
            forces = np.full((self.size, 3), np.nan)
            self.path.append((self.positions.copy(), np.nan, forces, self.cell, None))

    def fmax(self) -> float:
        """The largest force on a free atom or on the cell, eV/Å.

        The force on the cell is W/N, as in `FrechetCellFilter` and in the report of a relaxation,
        whatever the strain; the forces on the optimiser's coordinates also contain D.
        """
        return self.largest

    def finished(self, fmax: float, steps: int) -> bool:
        """Whether no further step is to be taken."""
        return bool(self.failure) or self.fmax() < fmax or len(self.path) > steps

    def step(self) -> bool:
        """Takes a step, and builds a new neighbour list if the old one is no longer valid.

        Returns:
          False if no neighbour list can be built.
        """
        if self.before is not None:
            s, y = self.x - self.before[0], self.before[1] - self.force
            if float((s * y).sum()) > 0:
                self.pairs.append((s, y))
        self.before = self.x, self.force
        step = inverse_hessian_times(self.force, self.pairs)
        longest = np.linalg.norm(step, axis=1).max()
        if longest >= self.max_step:
            step = step * (self.max_step / longest)
        self.x = self.x + step
        listed = self.structure
        moved = np.stack([listed.positions, self.positions])
        cells = np.stack([listed.cell, self.cell])
        if approach(moved, cells, listed.neighbors.reach) <= self.skin:
            return True
        try:
            self.structure = self._around()
        except InputError as error:
            self.failure = str(error)
            return False
        self.listed = self.deformation.copy()
        return True

    def _around(self) -> Structure:
        s = self.origin
        return build_structure(
            s.atomic_numbers,
            self.positions,
            self.cell,
            s.pbc,
            self.model.config,
            s.fixed_mask,
            s.charges,
            relax_cell=self.relaxes,
        )

    def result(self, fmax: float) -> Minimisation:
        """The path so far."""
        positions, energies, forces, cells, stresses = (list(v) for v in zip(*self.path))
        return Minimisation(
            positions=np.stack(positions),
            energies=np.array(energies),
            forces=np.stack(forces),
            cells=np.stack(cells),
            stresses=None if stresses[0] is None else np.stack(stresses),
            converged=not self.failure and self.fmax() < fmax,
            failure=self.failure,
        )


def inverse_hessian_times(
    force: np.ndarray, pairs: Sequence[tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """The L-BFGS step H·force by the two-loop recursion (Nocedal & Wright, algorithm 7.4).

    Args:
      force: (M, 3) eV/Å.
      pairs: (s, y) of each step: the step s (Å) and the decrease y of the force over it, with
        s·y > 0; oldest first.
    """
    q, weights = force.copy(), []
    for s, y in reversed(pairs):
        weight = (s * q).sum() / (s * y).sum()
        weights.append(weight)
        q -= weight * y
    z = q / STIFFNESS
    for (s, y), weight in zip(pairs, reversed(weights)):
        z += s * (weight - (y * z).sum() / (s * y).sum())
    return z


def _cost(members: Sequence[_Descent]) -> int:
    return sum(structure_cost(d.structure) for d in members)


class _Batch:
    """Evaluates structures together; the graph stays on the device as long as it is valid.

    Attributes:
      compiling: seconds taken by calls that compiled.
      evaluations: number of calls.
      too_much: least cost of structures that did not fit in memory together; infinite before.
      tight: whether a structure on its own is given no more room than it needs.
    """

    def __init__(self, model: RelaxNet, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        self.dtype = dtype_of(model.params)
        self.kind = program_kind(model.network, self.dtype)
        self.shape: BatchShape | None = None
        self.listed: list[Structure] = []
        self.graph: Graph | None = None
        self.compiling, self.evaluations = 0.0, 0
        self.too_much, self.tight = np.inf, False

    def has_room(self, members: Sequence[_Descent]) -> bool:
        """Whether structures of this total cost may fit in memory, as far as is known."""
        return self.too_much == np.inf or _cost(members) < self.too_much

    def evaluate(self, members: Sequence[_Descent]) -> list[tuple[Any, ...]] | None:
        """(energy, forces, virial or None) of each; None if they do not fit in memory together."""
        try:
            return list(self._evaluate(members))
        except ERRORS as error:
            if not out_of_memory(error):
                raise
        # Here, outside the handler, the exception is gone and with it the arrays its traceback holds.
        tried, self.shape, self.graph, self.listed = self.shape, None, None, []
        self.too_much = min(self.too_much, _cost(members))
        if len(members) == 1 and tried is not None and not self.tight:
            self.tight = tried != fitting_shape([members[0].structure])
            return self.evaluate(members) if self.tight else None
        return None

    def _evaluate(self, members: Sequence[_Descent]) -> Iterator[tuple[Any, ...]]:
        structures = [d.structure for d in members]
        if list(map(id, structures)) != list(map(id, self.listed)):
            self.shape = self._shape_for(structures)
            near = [s.centred() for s in structures]
            self.graph = jax.device_put(collate(near, self.shape, self.dtype))
            self.listed = structures
        assert self.shape is not None
        positions = np.zeros((self.shape.n_atoms, 3), self.dtype)
        deformation, at = None, 0
        if self.model.config.dynamics.cell == "variable":
            deformation = np.repeat(np.eye(3, dtype=self.dtype)[None], self.shape.n_graphs, axis=0)
        rows = []
        for index, descent in enumerate(members):
            rows.append(slice(at, at := at + descent.size))
            positions[rows[-1]] = descent.positions - descent.structure.origin
            if deformation is not None:
                deformation[index] = descent.change
        begin, before = time.perf_counter(), compiled_shapes()
        model, latent = self.model, np.zeros((self.shape.n_atoms, 0), self.dtype)
        known = model.network, model.params, model.energy_scale, self.graph
        found = jax.device_get(evaluate(*known, positions, latent, deformation))
        if compiled_shapes() > before:
            self.compiling += time.perf_counter() - begin
        self.evaluations += 1
        remember_shape(self.kind, self.shape)
        for index, own in enumerate(rows):
            virial = None if found.virial is None else np.asarray(found.virial[index], np.float64)
            yield float(found.energies[index]), np.asarray(found.forces[own], np.float64), virial

    def _shape_for(self, structures: Sequence[Structure]) -> BatchShape:
        if self.tight and len(structures) == 1:
            return fitting_shape(structures)
        needed = fitting_shape(structures, rounded=True)
        needed = dataclasses.replace(needed, n_graphs=self.batch_size + 1)
        if self.shape is not None and self.shape.cost <= SHRINK * needed.cost:
            needed = largest_shape([self.shape, needed])
            if needed == self.shape:
                return needed
        return known_shape(self.kind, structures, needed, WASTE)
