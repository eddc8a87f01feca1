"""Predictions of a trained model on relaxations, of every kind that experiments use.

Each function returns what `archive` stores: records, one per structure, and facts, among them
``left_out`` (why structures are missing) and ``seconds`` (per structure, building its graph
included, without compilation).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from relaxnet_jax.data.frames import select_frames
from relaxnet_jax.data.sample import without_drift
from relaxnet_jax.data.trajectory import RelaxationTrajectory
from relaxnet_jax.errors import InputError
from relaxnet_jax.evaluate.run import compare, frame_structure, graph_seconds
from relaxnet_jax.graph import Structure, build_structure, masses_of
from relaxnet_jax.lbfgs import minimise
from relaxnet_jax.model import RelaxNet
from relaxnet_jax.predict import minimised_path, predict_structures
from relaxnet_jax.reproduce.archive import to_record
from relaxnet_jax.solving import Path

Made = tuple[list[dict[str, np.ndarray]], dict[str, Any]]
Relaxations = Sequence[RelaxationTrajectory]
Report = Callable[[str], None]
PASSES = 3  # of a timed prediction: other programs rarely delay all of them
LONGEST = 10.0  # s, for all passes together


def paths(model: RelaxNet, relaxations: Relaxations, n_frames: int, report: Report) -> Made:
    """The model's own paths on ``n_frames`` equidistant frames, from the ODE or a direct predictor.

    The prediction is repeated once the programs are compiled; ``seconds`` is that of the best of
    these ``passes``.
    """
    grid, seconds, passes = np.linspace(0.0, 1.0, n_frames), 0.0, 0

    def predict(structures: Sequence[Structure]) -> list[Path]:
        nonlocal seconds, passes
        predict_structures(model, structures, grid)
        found, times = timed(lambda: predict_structures(model, structures, grid))
        seconds, passes = min(times) / max(len(structures), 1), len(times)
        return found

    compared, left_out = compare(model, relaxations, report, predict=predict, n_frames=n_frames)
    seconds += graph_seconds(model, relaxations)
    facts = {"seconds": seconds, "passes": passes, "left_out": left_out}
    return [to_record(c) for c in compared], facts


def timed(call: Callable[[], list[Path]]) -> tuple[list[Path], list[float]]:
    """Times a call, made `PASSES` times or fewer if that would take longer than `LONGEST`.

    Returns:
      What the call returns, and the seconds of every pass.
    """
    times: list[float] = []
    while not times or (len(times) < PASSES and sum(times) + min(times) <= LONGEST):
        begin = time.perf_counter()
        found = call()
        times.append(time.perf_counter() - begin)
    return found, times


def relaxed(
    model: RelaxNet, relaxations: Relaxations, n_frames: int, fmax: float, report: Report
) -> Made:
    """L-BFGS minimisations; ``steps`` and ``converged`` are lists with one entry per structure."""
    facts: dict[str, Any] = {"fmax": fmax}

    def predict(structures: Sequence[Structure]) -> list[Path]:
        found = minimise(model, structures, fmax)
        facts["steps"] = [m.steps for m in found.paths]
        facts["converged"] = [m.converged for m in found.paths]
        facts["seconds"] = found.seconds / max(len(structures), 1)
        return [minimised_path(m, np.linspace(0.0, 1.0, n_frames)) for m in found.paths]

    compared, left_out = compare(model, relaxations, report, predict=predict, n_frames=n_frames)
    facts["seconds"] = facts.get("seconds", 0.0) + graph_seconds(model, relaxations)
    return [to_record(c) for c in compared], facts | {"left_out": left_out}


def points(model: RelaxNet, relaxations: Relaxations, n_frames: int, report: Report) -> Made:
    """Energies and forces of a static model at the true frames; no atom is moved."""
    usable, frames, left_out = [], [], []
    for t in relaxations:
        chosen = select_frames(t.n_frames, n_frames)
        try:
            own = [frame_structure(model, t, int(k)) for k in chosen.indices]
        except InputError as error:
            left_out.append(str(error))
            report(f"left out: {error}")
            continue
        usable.append((t, chosen))
        frames += own

    def predict(structures: Sequence[Structure]) -> list[Path]:
        found = iter(minimise(model, frames, steps=0).paths)
        made = []
        for t, c in usable:
            positions = np.repeat(t.positions[:1], n_frames, axis=0)
            energies, forces = np.zeros(n_frames), np.zeros((n_frames, t.n_atoms, 3))
            cells = np.repeat(t.cells[:1], n_frames, axis=0)
            positions[c.slots], cells[c.slots] = t.positions[c.indices], t.cells[c.indices]
            for slot in c.slots:
                one = next(found)
                energies[slot], forces[slot] = one.energies[0], one.forces[0]
            times = np.linspace(0.0, 1.0, n_frames)
            still = np.zeros_like(positions)
            made.append(Path(times, positions, still, energies, forces, cells, skin=None))
        return made

    taken = [t for t, _ in usable]
    compared, _ = compare(model, taken, report, predict=predict, n_frames=n_frames)
    return [to_record(c) for c in compared], {"left_out": left_out}


def shaken(model: RelaxNet, relaxations: Relaxations, scale: float, report: Report) -> Made:
    """Paths from initial positions with Gaussian noise of ``scale`` Å on the free atoms.

    As in training, structures without fixed atoms keep their centre. The draws are the same for
    every scale and model. Where the noise puts atoms on top of each other, the prediction is NaN.
    """
    n = model.config.dynamics.frames

    def predict(structures: Sequence[Structure]) -> list[Path]:
        moved: dict[int, Structure] = {}
        for i, s in enumerate(structures):
            draws = np.random.default_rng([7, i]).normal(size=s.positions.shape)
            noise = scale * _within(s, draws, model.config.dynamics.mass)
            try:
                moved[i] = build_structure(
                    s.atomic_numbers,
                    s.positions + noise,
                    s.cell,
                    s.pbc,
                    model.config,
                    s.fixed_mask,
                    s.charges,
                    relax_cell=bool(s.strain.any()),
                )
            except InputError as error:
                report(f"noise of {scale:g} Å: {error}")
        found = dict(zip(moved, predict_structures(model, list(moved.values()))))
        return [found[i] if i in found else _nowhere(s, n) for i, s in enumerate(structures)]

    compared, left_out = compare(model, relaxations, report, predict=predict)
    return [to_record(c) for c in compared], {"left_out": left_out, "scale": scale}


def _within(s: Structure, draws: np.ndarray, mass: str) -> np.ndarray:
    """The draws, zeroed on fixed atoms; if there are none, without the motion of the centre."""
    if s.fixed_mask.any():
        return np.where(s.fixed_mask[:, None], 0.0, draws)
    weights = masses_of(s.atomic_numbers) if mass == "atomic" else np.ones(s.n_atoms)
    return without_drift(np.stack([np.zeros_like(draws), draws]), weights)[1]


def _nowhere(s: Structure, n: int) -> Path:
    frames, cells = np.full((n, s.n_atoms, 3), np.nan), np.repeat(s.cell[None], n, axis=0)
    times = np.linspace(0.0, 1.0, n)
    reason = "atoms overlap"
    return Path(times, frames, frames, np.full(n, np.nan), frames, cells, 0.0, reason)


def dense(model: RelaxNet, relaxations: Relaxations, n_frames: int, report: Report) -> Made:
    """Whole predicted paths beside the true frames.

    The arrays of a record are ``pred`` (n, N, 3) Å, ``true`` (m, N, 3) Å with m at most n,
    ``cell``, ``numbers``, ``fixed`` and ``id``.
    """
    kept: list[Path] = []

    def predict(structures: Sequence[Structure]) -> list[Path]:
        kept.extend(predict_structures(model, structures, np.linspace(0.0, 1.0, n_frames)))
        return kept

    found = []
    compared, left_out = compare(model, relaxations, report, predict=predict, n_frames=n_frames)
    for c, path in zip(compared, kept):
        record = {"pred": path.positions, "true": c.true_positions, "cell": c.cell}
        fixed = {"numbers": c.atomic_numbers, "fixed": c.fixed_mask, "id": np.array(c.id)}
        found.append(record | fixed)
    return found, {"left_out": left_out}
