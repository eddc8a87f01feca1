"""Predicts the trajectories of many structures: in batches of few padded shapes, checking the skin."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, overload

import numpy as np
from ase import Atoms

from relaxnet_jax import solver
from relaxnet_jax.batching import BatchShape, fitting_shape, pack, shared_shapes, structure_cost
from relaxnet_jax.data.trajectory import PREDICTED, RelaxationTrajectory
from relaxnet_jax.errors import InputError
from relaxnet_jax.graph import Structure, build_structure
from relaxnet_jax.lbfgs import FMAX, STEPS, Minimisation, minimise
from relaxnet_jax.memory import batch_size_of
from relaxnet_jax.model import RelaxNet, atoms_list, check_one
from relaxnet_jax.solving import Batch, Batches, Path, batch_shape, usable_devices
from relaxnet_jax.trust import NOT_CONVERGED, Flag, constraint_flags, trust_flags

# A neighbour list is rebuilt with a wider skin at most this many times: if an atom still outruns it,
# the prediction has diverged, and the list is not to blame.
MAX_WIDENINGS = 3
MAX_SKIN = 6.0  # Å
FOLLOWED = 1e3  # Å, placeholder for the skin where neighbour lists follow the atoms

Divided = list[tuple[list[int], BatchShape]]  # batches: indices of structures, and their shape


def _on_grid(grid: np.ndarray, times: np.ndarray) -> np.ndarray | None:
    """Indices (m,) of the times (m,) on the grid (n,); None unless all of them are on it."""
    nearest = np.abs(grid[:, None] - times).argmin(axis=0)
    return nearest if np.abs(grid[nearest] - times).max() < 1e-12 else None


def predict_structures(
    model: RelaxNet,
    structures: Sequence[Structure],
    times: np.ndarray | None = None,
    batch_size: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
    fmax: float = FMAX,
    steps: int = STEPS,
) -> list[Path]:
    """Predicts the paths of many structures, in the order given.

    Batches have similar costs, whatever the sizes of the structures, and their shapes are rounded up,
    so that few shapes are compiled. Several batches are solved at the same time, one on each of this
    process's devices (`solving.usable_devices`). A batch that does not fit in a device's memory is
    halved until it does. If a single structure does not fit, the ``failure`` of its path says so, and
    the others are still predicted.

    If atoms approach each other by more than the skin, the neighbour list could miss a pair. Such
    structures are solved again with a wider skin, where possible in shapes already compiled.

    Static models define no path of their own; theirs is the path of `lbfgs.minimise`, see
    `minimised_path`.

    Args:
      times: (n,) pseudotimes in [0, 1]; the configuration's frames by default.
      batch_size: structures per batch and device; by default 16 on a CPU, 128 on an accelerator.
      progress: called with the number of structures done.
      fmax, steps: for static models only, see `lbfgs.minimise`.

    Raises:
      InputError: times that are not pseudotimes, or a batch_size below 1.
    """
    batch_size = batch_size_of(batch_size)
    grid = solver.frame_grid(model.config.dynamics)
    times = grid if times is None else np.asarray(times, np.float64)
    if times.ndim != 1 or len(times) == 0 or times.min() < 0 or times.max() > 1:
        raise InputError(
            "times: must be a one-dimensional, non-empty array of pseudotimes in [0, 1]"
        )
    if model.config.dynamics.latent == "static":
        found = minimise(model, structures, fmax, steps, batch_size=batch_size, progress=progress)
        return [minimised_path(m, times) for m in found.paths]
    # The solver's own frames come for free; at any other times the states are evaluated anew.
    rows = _on_grid(grid, times)
    asked, n_frames = (times, len(times)) if rows is None else (None, len(grid))
    rows = np.arange(n_frames) if rows is None else rows
    done: dict[int, Path] = {}
    batches, cutoff = None, model.config.graph.cutoff
    # A direct predictor evaluates only the initial positions, so it misses no pair wherever atoms go.
    at_start = model.config.dynamics.latent == "direct" and not model.config.model.update_positions
    pending = dict(enumerate(structures))
    for widening in range(MAX_WIDENINGS + 1):
        divided = _divide(pending, batch_size, batches.used if batches else ())
        batches = batches or _solver(model, asked, n_frames, pending, divided)
        if len(divided) == 1:
            divided = _known(batches, pending, divided)
        retry = {}
        packed = [Batch([pending[i] for i in members], shape) for members, shape in divided]
        for k, paths in batches.solve(packed):
            for i, raw in zip(divided[k][0], paths):
                structure = pending[i]
                skin = structure.neighbors.reach - cutoff
                if (
                    not at_start
                    and raw.approached > skin
                    and np.isfinite(raw.approached)
                    and skin < MAX_SKIN - 1e-9
                    and widening < MAX_WIDENINGS
                ):
                    retry[i] = _with_skin(model, structure, min(1.25 * raw.approached, MAX_SKIN))
                else:
                    done[i] = dataclasses.replace(
                        raw.at(rows), times=times, skin=None if at_start else skin, listed=structure
                    )
            progress(len(done))
        if not retry:
            break
        pending = retry
    return [done[i] for i in range(len(structures))]


def _solver(
    model: RelaxNet,
    times: np.ndarray | None,
    n_frames: int,
    structures: Mapping[int, Structure],
    divided: Divided,
) -> Batches:
    """A solver on all devices if there are several batches, or one with a program compiled there."""
    everywhere = Batches(model, times, n_frames, usable_devices(model))
    if len(divided) > 1 or _known(everywhere, structures, divided) != divided:
        return everywhere
    return Batches(model, times, n_frames)


def _known(batches: Batches, structures: Mapping[int, Structure], divided: Divided) -> Divided:
    """The same batches, in shapes that were used before wherever one has room."""
    return [
        (members, batches.known_shape([structures[i] for i in members], shape))
        for members, shape in divided
    ]


def minimised_path(found: Minimisation, times: np.ndarray) -> Path:
    """A minimisation of k steps as a path: pseudotime t is the state after t·k steps, rounded.

    If the minimisation failed, positions, energies, forces and stresses are NaN, and ``failure`` gives
    the reason.

    Args:
      times: (n,) pseudotimes in [0, 1].
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
) -> Divided:
    """Divides structures into batches, given by their indices, and chooses the batches' shapes.

    Shapes that were already used are preferred, even if batches have to be smaller to fit in them: a
    new shape takes much longer to compile than to run.
    """
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
    shapes = [batch_shape([structures[i] for i in group], batch_size) for group in groups]
    return placed + list(zip(groups, shared_shapes(shapes)))


def _packed(
    structures: Mapping[int, Structure], numbers: Sequence[int], batch_size: int
) -> list[list[int]]:
    packed = pack([structure_cost(structures[i]) for i in numbers], batch_size)
    return [[numbers[k] for k in members] for members in packed]


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

    For a structure too large for the device's memory, all values of the path are NaN. Warnings name

    - every structure whose prediction should not be used (see `trust.trust_flags`), including those
      too large;
    - structures with constraints that the path ignores (`head_start` moves atoms under them);
    - structures that a static model did not relax to ``fmax`` within ``steps``.

    Args:
      model: from `load_model` or `create_model`.
      atoms: ASE Atoms, or a sequence of them; `FixAtoms` are respected.
      n_frames: frames of the result, equally spaced in pseudotime, first and last included.
      batch_size: structures solved at once; by default 16 on a CPU, 128 on an accelerator.
      relax_cell: whether cells relax along their periodic directions, if the model was trained for
        that (dynamics.cell="variable"); other models keep them.
      fmax: eV/Å, largest force of a relaxed structure; for static models only.
      steps: largest number of LBFGS steps (`lbfgs.minimise`); for static models only.

    Returns:
      A `RelaxationTrajectory` (a list of them for a sequence).

    Raises:
      InputError: ``model`` is not a single model (for several, use `relax_committee`); a structure
        cannot be used (the message names its place in the sequence); n_frames < 2 or batch_size < 1.
    """
    check_one(model)
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
            reason = one.failure or f"the prediction is unusable, {grave.name}: {grave.detail}"
            warnings.warn(f"{one.path.id}: {reason}", RuntimeWarning, stacklevel=2)
            continue
        late = [flag for flag in one.flags if flag.name == NOT_CONVERGED]
        for flag in (*told[:1], *late):
            text = f"{one.path.id}: {flag.name}: {flag.detail}"
            warnings.warn(text, UserWarning, stacklevel=2)
    results = [one.path for one in judged]
    return results[0] if single else results


class Judged(NamedTuple):
    """A predicted path with its trust flags.

    Attributes:
      path: the predicted trajectory.
      flags: reasons not to trust it, see `trust.trust_flags`.
      failure: see `solving.Path`.
      listed: see `solving.Path`.
    """

    path: RelaxationTrajectory
    flags: tuple[Flag, ...]
    failure: str = ""
    listed: Structure | None = None


def judge(
    model: RelaxNet, named: Sequence[tuple[str, Structure]], n_frames: int, **options: Any
) -> list[Judged]:
    """Predicts paths of ``n_frames`` equidistant frames for named structures, and flags them.

    Args:
      named: names and structures; the results have the same order.
      options: passed to `predict_structures`.
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
        found.append(Judged(trajectory, flags, path.failure, path.listed))
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
