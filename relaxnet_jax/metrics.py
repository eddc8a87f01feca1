"""Errors of predicted relaxations: the single definition of every number we report.

Averages are *macro* averages: first over atoms and Cartesian components and, for
``all_frames``, over the frames present (t = 0 included, as in the paper) within one
structure, then over structures, so that every structure counts once however large it
is. Structures in which nothing moves count too. Only free atoms (those the DFT run
could move) enter force and coordinate errors; a structure without any has no such error.

Three predictors are measured on the same structures:

- ``model``: the prediction.
- ``nothing``: the first true frame, kept throughout ("doing nothing"). Its energies and forces
  are the *true* ones of that frame, so it is an oracle that costs one DFT step and is exact at t = 0.
- ``composition``: the composition energy sum_i eps(Z_i), zero forces, the initial positions.

A structure whose prediction is not finite has no error to average. It is left out of the
means of all three predictors alike, counted in ``Metrics.n_nonfinite``, and counts as a
failure in the two fractions and in the median. To make the columns of one table means over
the same structures, pass their ids (`finite_ids`) to ``evaluate``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from relaxnet_jax.errors import InputError
from relaxnet_jax.strain import deformations, from_reference, mean_deformed, to_reference
from relaxnet_jax.work import work

Predictor = Literal["model", "nothing", "composition"]

# Å. A structure whose coordinate MAE of doing nothing is below this is at rest: its displacements
# are no more than rounding, of files and of cells mapped onto each other, and ratios to them say nothing.
AT_REST = 1e-4
MONOTONE_TOLERANCE = 1e-6  # eV, largest rise of an energy that still counts as falling; see `falls`
_PER_FRAME = ("energy_mae_per_atom", "forces_mae", "positions_mae")


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """One structure: the m frames present of its true relaxation, and the same frames as predicted.

    Entry 0 is the first frame and entry m-1 the final one.

    Attributes:
      id: name of the relaxation.
      atomic_numbers: (N,) int.
      cell: (3, 3), Å, rows are lattice vectors.
      pbc: (3,) bool.
      fixed_mask: (N,) bool, True for atoms that were held fixed.
      true_positions, pred_positions: (m, N, 3), Å, unwrapped.
      true_energies, pred_energies: (m,), eV per structure.
      true_forces, pred_forces: (m, N, 3), eV/Å.
      composition_energy: eV per structure, sum_i eps(Z_i).
      slots: (m,) int, increasing, position of each entry on the frame grid 0 … n_frames-1.
      n_frames: length of that grid.
      true_cells, pred_cells: (m, 3, 3), Å, where the cell relaxes; None where it is fixed.
      usable: whether the predicted final geometry may be used (see `trust.unusable`).
      final_only: whether the model predicts only the final energy and no forces, as direct
        predictors do; errors of the other energies and of forces are then NaN, whatever the arrays hold.
    """

    id: str
    atomic_numbers: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray
    fixed_mask: np.ndarray
    true_positions: np.ndarray
    true_energies: np.ndarray
    true_forces: np.ndarray
    pred_positions: np.ndarray
    pred_energies: np.ndarray
    pred_forces: np.ndarray
    composition_energy: float
    slots: np.ndarray
    n_frames: int
    true_cells: np.ndarray | None = None
    pred_cells: np.ndarray | None = None
    usable: bool = True
    final_only: bool = False

    def __post_init__(self) -> None:
        """Converts the arrays (floats to float64) and checks them; an InputError names the field."""
        n, m = np.size(self.atomic_numbers), np.size(self.slots)
        shapes: dict[str, tuple[type, tuple[int, ...]]] = {
            "atomic_numbers": (int, (n,)), "slots": (int, (m,)), "cell": (float, (3, 3)),
            "pbc": (bool, (3,)), "fixed_mask": (bool, (n,)),
        }  # fmt: skip
        for kind in ("true", "pred"):
            shapes[f"{kind}_energies"] = (float, (m,))
            shapes[f"{kind}_positions"] = shapes[f"{kind}_forces"] = (float, (m, n, 3))
            if self.relaxes_cell:
                shapes[f"{kind}_cells"] = (float, (m, 3, 3))
        for name, (dtype, shape) in shapes.items():
            array: np.ndarray = np.asarray(getattr(self, name), dtype=dtype)
            if array.shape != shape:
                raise InputError(f"{self.id}: {name} has shape {array.shape}, expected {shape}")
            if not name.startswith("pred_") and not np.isfinite(array).all():
                raise InputError(f"{self.id}: {name} is not finite; remove the structure")
            object.__setattr__(self, name, array)
        if n == 0 or m == 0:
            raise InputError(f"{self.id}: no atoms or no frames; remove the structure")
        if self.slots[0] < 0 or self.slots[-1] >= self.n_frames or (np.diff(self.slots) < 1).any():
            grid = f"0 … {self.n_frames - 1}"
            raise InputError(f"{self.id}: slots {self.slots.tolist()} must increase within {grid}")

    @property
    def relaxes_cell(self) -> bool:
        """Whether cells are compared too."""
        return self.true_cells is not None

    @property
    def free_mask(self) -> np.ndarray:
        """(N,) bool, True for atoms that could move."""
        return ~self.fixed_mask

    @property
    def finite(self) -> bool:
        """Whether the whole prediction is finite."""
        arrays = (self.pred_positions, self.pred_energies, self.pred_forces, self.pred_cells)
        return all(bool(np.isfinite(a).all()) for a in arrays if a is not None)

    def cells(self, predictor: Predictor) -> np.ndarray:
        """Cells (m, 3, 3) Å of a predictor; defined only where ``relaxes_cell``."""
        assert self.true_cells is not None and self.pred_cells is not None
        return self.pred_cells if predictor == "model" else np.repeat(
            self.true_cells[:1], len(self.slots), axis=0
        )  # fmt: skip

    def prediction(self, predictor: Predictor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions (m, N, 3) Å, energies (m,) eV and forces (m, N, 3) eV/Å of a predictor.

        Where the cell relaxes, the predicted lattice coordinates are placed in the *true* cell of
        the frame, so that only internal displacements are compared. Energies and forces are NaN
        where the model predicts none (``final_only``).
        """
        if predictor == "model":
            positions = self._in_true_cell(self.pred_positions, predictor)
            energies, forces = self.pred_energies, self.pred_forces
            if self.final_only:
                energies = np.append(np.full(len(energies) - 1, np.nan), energies[-1])
                forces = np.full_like(forces, np.nan)
            return positions, energies, forces
        positions = np.broadcast_to(self.true_positions[:1], self.true_positions.shape)
        positions = self._in_true_cell(positions, predictor)
        if predictor == "nothing":
            forces = np.broadcast_to(self.true_forces[:1], self.true_forces.shape)
            return positions, np.full_like(self.true_energies, self.true_energies[0]), forces
        energies = np.full_like(self.true_energies, self.composition_energy)
        return positions, energies, np.zeros_like(self.true_forces)

    def _in_true_cell(self, positions: np.ndarray, predictor: Predictor) -> np.ndarray:
        if self.true_cells is None:
            return positions
        own, true = (
            _deformations(self.true_cells[0], cells)
            for cells in (self.cells(predictor), self.true_cells)
        )
        return from_reference(to_reference(positions, own), true)


def together(members: Sequence[Sequence[Comparison]]) -> list[tuple[Comparison, ...]]:
    """Groups the comparisons of a committee's members by structure, in the order of the first member.

    Args:
      members: the comparisons of each member on the same relaxations, in any order.

    Raises:
      InputError: the members were not compared on the same relaxations, or not on the same frames.
    """
    by_id = [{c.id: c for c in comparisons} for comparisons in members]
    for other in by_id[1:]:
        if set(other) != set(by_id[0]):
            raise InputError(
                "the members were not evaluated on the same structures: train them with the same data and "
                "splits (only train.seed may differ), or give --data FILE"
            )
    found = [tuple(own[key] for own in by_id) for key in by_id[0]]
    if any(c.n_frames != own[0].n_frames for own in found for c in own):
        raise InputError(
            "the members do not have the same frames: train them with the same dynamics.frames (only "
            "train.seed may differ)"
        )
    return found


def averaged(members: Sequence[Comparison]) -> Comparison:
    """Averages the members' predictions of one structure, as `committee.join` does.

    Only usable predictions are averaged; if there are none, the finite ones; if there are none
    of these either, all.
    """
    first, finite = members[0], [c for c in members if c.finite]
    members = [c for c in finite if c.usable] or finite or members
    mean = {
        name: np.mean([getattr(c, name) for c in members], axis=0)
        for name in ("pred_positions", "pred_energies", "pred_forces")
    }
    if first.true_cells is not None:
        own = [c.cells("model") for c in members]
        steps = [_deformations(first.true_cells[0], cells) for cells in own]
        positions = [c.pred_positions for c in members]
        mean["pred_positions"], _ = mean_deformed(positions, steps)
        mean["pred_cells"] = np.mean(own, axis=0)
    return dataclasses.replace(first, usable=any(c.usable for c in members), **mean)


def _deformations(initial: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Deformation gradients D (m, 3, 3) that take the initial cell (3, 3) to the cells (m, 3, 3)."""
    return deformations(np.concatenate([initial[None], cells]))[1:]


@dataclasses.dataclass(frozen=True)
class FrameMetrics:
    """Errors over one choice of frames; None where undefined.

    Attributes:
      energy_mae: eV/structure.
      energy_mae_per_atom: meV/atom.
      relaxation_energy_mae_per_atom: meV/atom, error of E(t) - E(0): what remains of the energy
        error if the energy of the first frame is known, e.g. from DFT; for doing nothing it
        equals `energy_mae_per_atom`.
      work_mae_per_atom: meV/atom, error of E(t) - E(0) computed as the `work` of the predicted
        forces along the predicted path, over the structures whose cell is fixed.
      forces_mae: meV/Å, per component, free atoms.
      positions_mae: Å, per coordinate, free atoms, before alignment.
      rmsd: Å, ``aligned_rmsd``, free atoms.
      volume: %, |V/V_true - 1|, over the structures whose cell relaxes; for a slab or chain, of
        the periodic area or length.
      lengths: Å, of the periodic lattice vectors, over the structures whose cell relaxes.
      angles: degrees, between the periodic lattice vectors, over the structures whose cell relaxes.
      pearson: correlation of true and predicted energy per atom, pooled over all frames.
    """

    energy_mae: float | None
    energy_mae_per_atom: float | None
    relaxation_energy_mae_per_atom: float | None
    work_mae_per_atom: float | None
    forces_mae: float | None
    positions_mae: float | None
    rmsd: float | None
    volume: float | None
    lengths: float | None
    angles: float | None
    pearson: float | None


@dataclasses.dataclass(frozen=True, eq=False)
class PerFrame:
    """Errors by frame slot, each (n_frames,), over the structures with that frame; NaN if there are none.

    Attributes:
      energy_mae_per_atom: meV/atom.
      forces_mae: meV/Å.
      positions_mae: Å.
      counts: int, number of structures that have the frame (and are averaged over).
    """

    energy_mae_per_atom: np.ndarray
    forces_mae: np.ndarray
    positions_mae: np.ndarray
    counts: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Metrics:
    """Errors of one predictor on a set of structures; see the module's docstring.

    Attributes:
      predictor: "model", "nothing" or "composition".
      n_structures: number of structures, including those without a finite prediction.
      n_nonfinite: number of structures whose prediction by the model is not finite.
      n_averaged: number of structures over which the means are taken.
      final, all_frames: errors of the final frame, and of all frames present.
      monotone_fraction: fraction whose energy `falls`, of the structures with more than one frame.
      final_ratio: mean final ``positions_mae`` over that of doing nothing (ratio of means); None
        where the latter is at most `AT_REST`.
      median_ratio: median, over the structures that move by more than `AT_REST`, of the final
        ``positions_mae`` over that of doing nothing; the means are dominated by the few
        structures that move far.
      improved_fraction: fraction of structures whose final ``positions_mae`` is strictly below that
        of doing nothing; a structure that does not move (`AT_REST`) cannot be improved.
      per_frame: errors by frame.
    """

    predictor: str
    n_structures: int
    n_nonfinite: int
    n_averaged: int
    final: FrameMetrics
    all_frames: FrameMetrics
    monotone_fraction: float | None
    final_ratio: float | None
    median_ratio: float | None
    improved_fraction: float | None
    per_frame: PerFrame

    def to_dict(self) -> dict[str, Any]:
        """The metrics as plain dicts, lists, int and float, ready for JSON; None where undefined."""
        return plain(dataclasses.asdict(self))


def plain(value: Any) -> Any:
    """Converts containers, NumPy arrays and numbers to plain Python; non-finite floats become None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def coordinate_errors(pred: np.ndarray, true: np.ndarray, free_mask: np.ndarray) -> np.ndarray:
    """Mean absolute difference over free atoms and components, in the unit of the input.

    Args:
      pred, true: (..., N, 3), e.g. unwrapped positions in Å. They are not aligned.
      free_mask: (N,) bool.

    Returns:
      (...); NaN when no atom is free.
    """
    if not free_mask.any():
        return np.full(np.shape(pred)[:-2], np.nan)
    return np.abs(pred - true)[..., free_mask, :].mean(axis=(-2, -1))


def aligned_rmsd(
    pred: np.ndarray, true: np.ndarray, cell: np.ndarray, pbc: np.ndarray, free_mask: np.ndarray
) -> np.ndarray:
    """RMSD sqrt(mean_i |d_i|²) over free atoms after the alignment that the boundary conditions allow.

    - any pbc: rigid translation and minimum image, no rotation (the lattice fixes it);
    - no pbc: rigid translation and proper rotation (Kabsch, Acta Cryst. A32, 922, 1976);
    - any fixed atom: neither translation nor rotation, as fixed atoms pin the frame
      (minimum image along periodic directions only).

    Args:
      pred, true: (..., N, 3), Å.
      cell: (3, 3), Å.
      pbc: (3,) bool.
      free_mask: (N,) bool.

    Returns:
      (...), Å; NaN when no atom is free.
    """
    if not free_mask.any():
        return np.full(np.shape(pred)[:-2], np.nan)
    pinned = not free_mask.all()
    pred, true = pred[..., free_mask, :], true[..., free_mask, :]
    if pinned or not pbc.any():
        if not pinned:
            pred, true = _superpose(pred, true)
        return _rms(_minimum_image(pred - true, _reduced(cell[pbc])))
    d, lattice = pred - true, _reduced(cell[pbc])
    # A translation by about half a cell sends atoms to different images: also take images
    # relative to the circular mean, which has no cell boundary, and keep the better result.
    phase = np.exp(2j * np.pi * (d @ np.linalg.pinv(lattice))).mean(axis=-2, keepdims=True)
    residuals = []
    for shift in (np.zeros_like(d[..., :1, :]), np.angle(phase) / (2 * np.pi) @ lattice):
        residual = _minimum_image(d - shift, lattice)
        residuals.append(_rms(residual - residual.mean(axis=-2, keepdims=True)))
    return np.minimum(*residuals)


def pearson(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson correlation coefficient; None for fewer than two points or constant data."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.size < 2 or any(np.ptp(v) <= 1e-12 * np.abs(v).max() for v in (x, y)):
        return None
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)), -1, 1))


def finite_ids(*columns: Sequence[Comparison]) -> frozenset[str]:
    """Ids of the structures for which each of several methods has a finite prediction.

    Args:
      columns: the comparisons of each method on the same relaxations.
    """
    own = ({c.id for c in comparisons if c.finite} for comparisons in columns)
    return frozenset.intersection(*map(frozenset, own))


def falls(c: Comparison, predictor: Predictor = "model") -> bool:
    """Whether the energy of a structure never rises from frame to frame.

    A rise of up to 1e-6 eV does not count, nor one of up to four units in the last place of
    float32, in which models compute energies relative to the composition energy: 3e-5 eV where
    such an energy is 100 eV.
    """
    energies = c.prediction(predictor)[1]
    largest = np.float32(np.abs(energies - c.composition_energy).max())
    tolerance = max(MONOTONE_TOLERANCE, 4 * float(np.spacing(largest)))
    return bool((np.diff(energies) <= tolerance).all())


def evaluate(
    comparisons: Sequence[Comparison],
    predictor: Predictor = "model",
    among: Collection[str] | None = None,
) -> Metrics:
    """All metrics of one predictor; the module's docstring says how they are averaged.

    Args:
      comparisons: one for each structure.
      predictor: "model", "nothing" or "composition".
      among: ids of the structures over which the means are taken (see `finite_ids`; None: all); the
        fractions and the median are over all structures, because failures count in them.

    Raises:
      InputError: no comparisons, or no such predictor.
    """
    if predictor not in get_args(Predictor):
        raise InputError(f"predictor {predictor!r} is not one of {', '.join(get_args(Predictor))}")
    if not comparisons:
        raise InputError("nothing to evaluate: the list of structures is empty; check the split")
    finite = [c for c in comparisons if c.finite]
    lost = [c for c in comparisons if not c.finite]
    averaged_over = [c for c in finite if among is None or c.id in among]
    n_frames = max(c.n_frames for c in comparisons)
    errors: dict[str, list[np.ndarray]] = {f.name: [] for f in dataclasses.fields(FrameMetrics)}
    by_slot = {name: np.full((len(averaged_over), n_frames), np.nan) for name in _PER_FRAME}
    pairs, still = [], []
    for row, c in enumerate(averaged_over):
        one, energies = structure_errors(c, predictor), c.prediction(predictor)[1]
        for name, values in one.items():
            errors[name].append(values)
        for name in _PER_FRAME:
            by_slot[name][row, c.slots] = one[name]
        pairs.append(np.stack([c.true_energies, energies]) / len(c.atomic_numbers))
        still.append(_final_error(c, "nothing"))
    ends = [(_final_error(c, predictor), _final_error(c, "nothing")) for c in finite]
    ratios = [a / b for a, b in ends if b > AT_REST]
    improved = [a < b and b > AT_REST for a, b in ends if not math.isnan(b)]
    told = [c for c in comparisons if predictor != "model" or not c.final_only]
    monotone = [c.finite and falls(c, predictor) for c in told if len(c.slots) > 1 or not c.finite]
    mean, mean_still = _mean([float(v[-1]) for v in errors["positions_mae"]]), _mean(still)
    ratio = None
    if mean is not None and mean_still is not None and mean_still > AT_REST:
        ratio = mean / mean_still
    counts = np.zeros(n_frames, int)
    for c in averaged_over:
        counts[c.slots] += 1
    return Metrics(
        predictor=predictor,
        n_structures=len(comparisons),
        n_nonfinite=len(lost),
        n_averaged=len(averaged_over),
        final=_frame_metrics(errors, pairs, slice(-1, None)),
        all_frames=_frame_metrics(errors, pairs, slice(None)),
        monotone_fraction=_mean(monotone),
        final_ratio=ratio,
        median_ratio=_median(ratios + [math.inf] * len(lost)),
        improved_fraction=_mean(improved + [False] * len(lost)),
        per_frame=PerFrame(**{k: _column_means(v) for k, v in by_slot.items()}, counts=counts),
    )


def _final_error(c: Comparison, predictor: Predictor) -> float:
    """``positions_mae`` of the final frame, Å."""
    final = c.prediction(predictor)[0][-1]
    return float(coordinate_errors(final, c.true_positions[-1], c.free_mask))


def _median(values: Sequence[float]) -> float | None:
    """The median; None if there are no values or if half of them are infinite."""
    found = float(np.median(values)) if values else math.inf
    return found if math.isfinite(found) else None


def structure_errors(c: Comparison, predictor: Predictor = "model") -> dict[str, np.ndarray]:
    """Errors (m,) of the frames of one structure, with the names and units of ``FrameMetrics``.

    NaN where the predictor predicts nothing.
    """
    positions, energies, forces = c.prediction(predictor)
    off, per_atom = energies - c.true_energies, 1e3 / len(c.atomic_numbers)
    found = {
        "energy_mae": np.abs(off),
        "energy_mae_per_atom": per_atom * np.abs(off),
        "relaxation_energy_mae_per_atom": per_atom * np.abs(off - off[0]),
        "forces_mae": 1e3 * coordinate_errors(forces, c.true_forces, c.free_mask),
        "positions_mae": coordinate_errors(positions, c.true_positions, c.free_mask),
        "rmsd": _rmsd(c, positions),
    }
    if c.true_cells is not None:
        return found | cell_errors(c.cells(predictor), c.true_cells, c.pbc)
    true = c.true_energies - c.true_energies[0]
    done = work(positions, forces, c.fixed_mask)
    return found | {"work_mae_per_atom": per_atom * np.abs(done - true)}


def cell_errors(cells: np.ndarray, true: np.ndarray, pbc: np.ndarray) -> dict[str, np.ndarray]:
    """Errors (m,) of cells (m, 3, 3) Å as in ``FrameMetrics``, means over the periodic vectors.

    Only the lattice of the periodic directions is compared: a vector along which nothing repeats,
    such as that through the vacuum of a slab, is a choice rather than a result.

    Args:
      cells: (m, 3, 3) Å, predicted.
      true: (m, 3, 3) Å.
      pbc: (3,) bool.

    Returns:
      Errors by name; NaN where undefined: angles if fewer than two vectors are periodic, all
      errors if none is.
    """
    periodic = np.asarray(pbc, bool)
    sizes, lengths, angles = zip(*(_lattice(c[:, periodic]) for c in (cells, true)))
    volume = 100 * np.abs(sizes[0] / sizes[1] - 1)
    return {
        "volume": volume if periodic.any() else np.full(len(volume), np.nan),
        "lengths": _row_means(np.abs(lengths[0] - lengths[1])),
        "angles": _row_means(np.abs(angles[0] - angles[1])),
    }


def _lattice(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sizes, lengths and angles of lattices.

    Args:
      vectors: (m, k, 3) Å, the k vectors of each lattice.

    Returns:
      The volumes, areas or lengths (m,) that the vectors span, their lengths (m, k) in Å, and the
      angles between any two of them in degrees (m, k(k-1)/2).
    """
    lengths = np.linalg.norm(vectors, axis=2)
    unit = vectors / lengths[..., None]
    pairs = itertools.combinations(range(vectors.shape[1]), 2)
    cosines = np.array([(unit[:, a] * unit[:, b]).sum(1) for a, b in pairs])
    gram = vectors @ np.swapaxes(vectors, 1, 2)
    sizes = np.sqrt(np.clip(np.linalg.det(gram), 0, None))
    angles = np.degrees(np.arccos(np.clip(cosines.reshape(-1, len(vectors)).T, -1, 1)))
    return sizes, lengths, angles


def _row_means(table: np.ndarray) -> np.ndarray:
    """Means (m,) over the rows of a table (m, k); NaN if k is 0."""
    return table.mean(1) if table.shape[1] else np.full(len(table), np.nan)


def _rmsd(c: Comparison, positions: np.ndarray) -> np.ndarray:
    """``aligned_rmsd`` (m,) of each frame in its true cell."""
    if c.true_cells is None:
        return aligned_rmsd(positions, c.true_positions, c.cell, c.pbc, c.free_mask)
    frames = zip(positions, c.true_positions, c.true_cells)
    return np.array([aligned_rmsd(x, y, cell, c.pbc, c.free_mask) for x, y, cell in frames])


def _frame_metrics(
    errors: dict[str, list[np.ndarray]], pairs: list[np.ndarray], frames: slice
) -> FrameMetrics:
    """Macro means of the errors over the chosen frames.

    Args:
      errors: by name, an array (m,) for each structure.
      pairs: true and predicted energies (2, m) eV/atom of each structure.
      frames: the chosen frames.
    """
    means = {k: _mean([float(v[frames].mean()) for v in vs]) for k, vs in errors.items() if vs}
    both = np.concatenate([p[:, frames] for p in pairs] or [np.empty((2, 0))], axis=1)
    correlation = pearson(*both) if np.isfinite(both).all() else None
    return FrameMetrics(**dict.fromkeys(errors, None) | means | {"pearson": correlation})


def _mean(values: Sequence[float]) -> float | None:
    """Mean without NaNs (e.g. of structures without free atoms); None if nothing is left."""
    kept = [float(v) for v in values if not math.isnan(v)]
    return math.fsum(kept) / len(kept) if kept else None


def _column_means(table: np.ndarray) -> np.ndarray:
    """Means (n,) of the columns of a table (S, n) without NaNs; NaN where a column has nothing else."""
    means = [_mean(column) for column in table.T.tolist()]
    return np.array([math.nan if mean is None else mean for mean in means])


def _rms(d: np.ndarray) -> np.ndarray:
    """Root mean square lengths sqrt(mean_i |d_i|²) of displacements (..., N, 3): (...), Å."""
    return np.sqrt((d**2).sum(axis=-1).mean(axis=-1))


def _superpose(pred: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres both (..., N, 3) and rotates ``pred`` onto ``true``, det R = +1 (Kabsch)."""
    pred = pred - pred.mean(axis=-2, keepdims=True)
    true = true - true.mean(axis=-2, keepdims=True)
    u, _, vt = np.linalg.svd(np.swapaxes(pred, -1, -2) @ true)
    u[..., :, -1] *= np.sign(np.linalg.det(u @ vt))[..., None]
    return pred @ (u @ vt), true


def _reduced(lattice: np.ndarray) -> np.ndarray:
    """Minkowski-reduced basis of the k <= 3 periodic vectors (k, 3), Å.

    Reduced means |b_i| <= |b_i + sum_{j != i} x_j b_j| for x_j in {-1, 0, 1}. The nearest
    image of a point is then at most one basis vector from where rounding puts it.
    """
    lattice = np.array(lattice, float)
    if len(lattice) and np.linalg.matrix_rank(lattice) < len(lattice):
        raise InputError("the periodic cell vectors are linearly dependent; check cell and pbc")
    steps = _steps(len(lattice))
    changed = True
    while changed:
        changed = False
        for i in range(len(lattice)):
            trial = lattice[i] + steps[steps[:, i] == 0] @ lattice
            lengths = np.linalg.norm(trial, axis=1)
            if lengths.min() < np.linalg.norm(lattice[i]) * (1 - 1e-10):
                lattice[i], changed = trial[lengths.argmin()], True
    return lattice


def _steps(k: int) -> np.ndarray:
    """All combinations of k numbers from -1, 0, 1: (3^k, k)."""
    return np.array(list(itertools.product((0.0, 1.0, -1.0), repeat=k)))


def _minimum_image(d: np.ndarray, lattice: np.ndarray) -> np.ndarray:
    """Shortest periodic image of each vector (..., 3) under a reduced lattice (k, 3), Å."""
    if len(lattice) == 0:
        return d
    d = d - np.round(d @ np.linalg.pinv(lattice)) @ lattice
    if 4 * (d**2).sum(axis=-1).max(initial=0) <= (lattice**2).sum(axis=-1).min():
        return d  # a vector within half the shortest lattice vector is the shortest image
    images = d[..., None, :] + _steps(len(lattice)) @ lattice
    nearest = (images**2).sum(axis=-1).argmin(axis=-1)
    return np.take_along_axis(images, nearest[..., None, None], axis=-2)[..., 0, :]
