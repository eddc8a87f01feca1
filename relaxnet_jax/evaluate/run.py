"""Evaluation of a model on relaxations: predictions, metrics, table, figures."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from relaxnet_jax.data.dataset import SPLITS, read_trajectories
from relaxnet_jax.data.frames import select_frames
from relaxnet_jax.data.importing import import_files
from relaxnet_jax.data.sample import centred, reference_frames
from relaxnet_jax.data.trajectory import RelaxationTrajectory
from relaxnet_jax.errors import InputError
from relaxnet_jax.evaluate.figures import parity_figure, per_frame_figure
from relaxnet_jax.evaluate.origin import foreign_origin
from relaxnet_jax.evaluate.run_data import relaxations_of_run
from relaxnet_jax.evaluate.tables import write_metrics, write_structures
from relaxnet_jax.graph import Structure, build_structure
from relaxnet_jax.lbfgs import FMAX, check_potential, minimise
from relaxnet_jax.metrics import (
    Comparison,
    Metrics,
    Predictor,
    averaged,
    evaluate,
    finite_ids,
    together,
)
from relaxnet_jax.model import RelaxNet, load_model, model_folder
from relaxnet_jax.predict import as_trajectory, minimised_path, predict_structures
from relaxnet_jax.solver import frame_grid
from relaxnet_jax.solving import Path as PredictedPath
from relaxnet_jax.strain import deformations, from_reference
from relaxnet_jax.train.start import SEEN, trained_ids
from relaxnet_jax.trust import trust_flags

_NOT_UNSEEN = ": their errors are not those on unseen structures"
BLOCK = 1024  # relaxations that are read, and turned into graphs, at a time
PREDICTORS: tuple[Predictor, ...] = ("model", "nothing", "composition")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Metrics by predictor, the comparisons they were made from, and what was left out.

    Attributes:
      results: metrics by predictor. All means are over the same structures: those for which every
        method has a finite prediction.
      comparisons: the comparisons, one per structure.
      left_out: why structures were left out, a line for each.
      name: name of the data.
      costs: by predictor, only if energies were minimised: seconds per structure (without compilation)
        and, for a minimisation, fmax, the mean number of steps and the fraction that converged.
      seen: how many of the relaxations trained the model's start or, if the data are not a split of the
        run, the model itself; as far as is known.
      among: ids of the structures that the means are over; None for all with a finite prediction.
      foreign: a sentence if the data's energies seem to be of another origin (`foreign_origin`), else
        empty.
    """

    results: dict[str, Metrics]
    comparisons: list[Comparison]
    left_out: list[str]
    name: str
    costs: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    seen: int = 0
    among: frozenset[str] | None = None
    foreign: str = ""


def compare(
    model: RelaxNet,
    trajectories: Sequence[RelaxationTrajectory],
    report: Callable[[str], None],
    batch_size: int | None = None,
    predict: Callable[[Sequence[Structure]], list[PredictedPath]] | None = None,
    n_frames: int | None = None,
) -> tuple[list[Comparison], list[str]]:
    """Compares true with predicted frames.

    Translations of the centroid are removed from the true and the predicted frames of structures without
    fixed atoms, so that models that conserve the centre of mass are measured like those that conserve the
    centroid. Structures that the model cannot take are reported and left out.

    Args:
      report: called with one line for each remark.
      batch_size: structures predicted at once.
      predict: computes the paths, on these frames; by default `predict_structures`.
      n_frames: number of frames, equidistant; by default that of the model.

    Returns:
      The comparisons, and why structures were left out.
    """
    n = n_frames or model.config.dynamics.frames
    structures, kept, left_out = [], [], []
    for t in trajectories:
        try:
            structures.append(frame_structure(model, t, 0))
            kept.append(t)
        except InputError as error:
            left_out.append(str(error))
            report(f"left out: {error}")
    paths = (
        predict(structures)
        if predict is not None
        else predict_structures(model, structures, np.linspace(0.0, 1.0, n), batch_size)
    )
    comparisons = []
    for t, structure, path in zip(kept, structures, paths):
        trajectory = as_trajectory(t.id, structure, path)
        flags = trust_flags(trajectory, model, path.skin, path.approached)
        grave = next((flag for flag in flags if flag.unusable), None)
        if path.failure:
            report(f"{t.id}: {path.failure}")
        elif grave:
            report(f"{t.id}: included, though flagged as unusable ({grave.name}: {grave.detail})")
        chosen = select_frames(t.n_frames, n, "equidistant")
        relaxes = bool(structure.strain.any())
        true, steps = reference_frames(t, chosen.indices, relaxes, "unit")
        true = from_reference(true, steps)
        predicted, cells = path.positions[chosen.slots], path.cells[chosen.slots]
        if np.isfinite(predicted).all() and np.isfinite(cells).all():
            steps = deformations(cells)
            predicted = centred(predicted, steps, t.fixed_mask, np.ones(t.n_atoms))
            predicted = from_reference(predicted, steps)
        comparisons.append(
            Comparison(
                id=t.id,
                atomic_numbers=t.atomic_numbers,
                cell=t.cells[0],
                pbc=t.pbc,
                fixed_mask=t.fixed_mask,
                true_positions=true,
                true_energies=t.energies[chosen.indices],
                true_forces=t.forces[chosen.indices],
                pred_positions=predicted,
                pred_energies=path.energies[chosen.slots],
                pred_forces=path.forces[chosen.slots],
                composition_energy=model.composition_energy(t.atomic_numbers),
                slots=chosen.slots,
                n_frames=n,
                true_cells=t.cells[chosen.indices] if relaxes else None,
                pred_cells=path.cells[chosen.slots] if relaxes else None,
                usable=grave is None,
                final_only=model.config.dynamics.latent == "direct",
            )
        )
    return comparisons, left_out


def frame_structure(model: RelaxNet, t: RelaxationTrajectory, frame: int) -> Structure:
    """One frame as a structure for the model. Raises InputError if the model cannot take it."""
    model.check_elements(t.atomic_numbers, t.id)
    return build_structure(
        t.atomic_numbers,
        t.positions[frame],
        t.cells[frame],
        t.pbc,
        model.config,
        t.fixed_mask,
        t.charges,
        t.id,
        relax_cell=t.variable_cell,
    )


def model_of(workdir: str | Path) -> RelaxNet:
    """The best model of a training run, or that of a model folder. Raises InputError if there is none."""
    folder = model_folder(workdir)
    if folder == Path(workdir) and not (folder / "model.json").exists():
        raise InputError(
            f"{workdir}: holds no trained model (no 'model' folder); run relaxnet-jax train "
            f"--workdir {workdir} first"
        )
    return load_model(folder)


def evaluate_workdir(
    workdir: str | Path,
    split: str = "test",
    data: str | None = None,
    report: Callable[[str], None] = print,
    fmax: float | None = None,
    model: RelaxNet | None = None,
    moved: str | None = None,
) -> Evaluation:
    """Evaluates the best model of a run on one of its splits, or on another file.

    Args:
      workdir: folder of a run of `train`; with ``data``, a model folder will do.
      split: "train", "validation" or "test".
      data: a store or any file of relaxations; all of them are used instead of the split.
      report: called with one line for each remark.
      fmax: largest force, eV/Å, to which the model's energy is also minimised, as the predictor "lbfgs".
        A static model is evaluated in this way only, by default to `lbfgs.FMAX`.
      model: the run's model, if it has been read already (`model_of`).
      moved: where the run's data are now, if not where its config.json says.

    Raises:
      InputError: there is no model, there are no data or not those of the run, the model cannot be
        evaluated on any of them, or ``fmax`` is given with a model that is not a potential.
    """
    workdir = Path(workdir)
    model = model or model_of(workdir)
    if data is None:
        if split not in SPLITS:
            raise InputError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
        otherwise = ", or evaluate a file with --data"
        found, n = relaxations_of_run(workdir, split, model.config, report, moved, otherwise)
        trajectories: Sequence[RelaxationTrajectory] = found
        name = f"{found.name}, {split} split"
        seen = json.loads(model.statistics).get(SEEN, {}).get(split, 0)
        if seen:
            report(
                f"{workdir}: {seen} of the {n} {split} relaxations were used to train the model it started "
                f"from (train.start_from){_NOT_UNSEEN}"
            )
    else:
        trajectories, name = read_any(data, model, report), data
        seen = _seen(workdir, [t.id for t in trajectories])
        if seen:
            report(
                f"{data}: {seen} of the {len(trajectories)} relaxations were used to train the model, or "
                f"one it started from (by their ids){_NOT_UNSEEN}"
            )
    static = model.config.dynamics.latent == "static"
    if fmax is not None:
        check_potential(model)
    minimiser = _Minimiser(model, FMAX if fmax is None else fmax)
    comparisons, left_out = _compare_blocks(
        model, trajectories, report, minimiser if static else None
    )
    if not comparisons:
        raise InputError(f"{name}: nothing left to evaluate; use data with the model's elements")
    foreign = foreign_origin(comparisons) if data is not None else ""
    columns = {"lbfgs" if static else "model": comparisons}
    costs = {}
    if fmax is not None and not static:
        clock = _Clock(model)
        _compare_blocks(model, trajectories, lambda _: None, clock)
        costs["model"] = {"seconds": clock.seconds / max(clock.structures, 1)}
        columns["lbfgs"], _ = _compare_blocks(model, trajectories, lambda _: None, minimiser)
    results, among = _results(columns)
    if "lbfgs" in results:
        costs["lbfgs"] = minimiser.costs
    if costs:
        graphs = graph_seconds(model, trajectories)
        for cost in costs.values():
            cost["seconds"] += graphs
    return Evaluation(results, comparisons, left_out, name, costs, seen, among, foreign)


def _compare_blocks(
    model: RelaxNet,
    trajectories: Sequence[RelaxationTrajectory],
    report: Callable[[str], None],
    predict: Callable[[Sequence[Structure]], list[PredictedPath]] | None,
) -> tuple[list[Comparison], list[str]]:
    """`compare` in blocks of relaxations, so that they are not all in memory at once."""
    comparisons, left_out = [], []
    for begin in range(0, len(trajectories), BLOCK):
        block = list(trajectories[begin : begin + BLOCK])
        made, out = compare(model, block, report, predict=predict)
        comparisons += made
        left_out += out
    return comparisons, left_out


def _seen(workdir: Path, ids: Sequence[str]) -> int:
    try:
        return len(trained_ids(str(workdir)).intersection(ids))
    except InputError:  # damaged splits do not matter for other data
        return 0


def _results(
    columns: Mapping[str, Sequence[Comparison]],
) -> tuple[dict[str, Metrics], frozenset[str]]:
    """Metrics of several methods on the same relaxations, followed by those of the baselines.

    Returns:
      The metrics, with means over the same structures; and the ids of these structures.
    """
    among, first = finite_ids(*columns.values()), next(iter(columns.values()))
    results = {name: evaluate(own, "model", among) for name, own in columns.items()}
    return results | {p: evaluate(first, p, among) for p in PREDICTORS if p != "model"}, among


def mean_evaluation(members: Sequence[Evaluation]) -> Evaluation:
    """The evaluation of a committee: its mean in place of the model, and its first member to compare.

    Raises:
      InputError: see `metrics.together`.
    """
    comparisons = [averaged(own) for own in together([m.comparisons for m in members])]
    own, *_ = members[0].results  # "model", or "lbfgs" for static models
    columns = {own: comparisons, "first member": members[0].comparisons}
    results, among = _results(columns)
    name = f"{members[0].name}; mean of {len(members)} models"
    seen = max(m.seen for m in members)
    foreign = foreign_origin(comparisons) if any(m.foreign for m in members) else ""
    return Evaluation(results, comparisons, members[0].left_out, name, {}, seen, among, foreign)


class _Minimiser:
    """Finds paths by L-BFGS; afterwards ``costs`` tells what they took."""

    def __init__(self, model: RelaxNet, fmax: float) -> None:
        self.model, self.fmax = model, fmax
        self._steps: list[int] = []
        self._converged: list[bool] = []
        self._seconds = 0.0

    def __call__(self, structures: Sequence[Structure]) -> list[PredictedPath]:
        found = minimise(self.model, structures, self.fmax)
        self._steps += [m.steps for m in found.paths]
        self._converged += [m.converged for m in found.paths]
        self._seconds += found.seconds
        return [minimised_path(m, frame_grid(self.model.config.dynamics)) for m in found.paths]

    @property
    def costs(self) -> dict[str, float]:
        """Means over all structures so far; empty if there are none."""
        if not self._steps:
            return {}
        return {
            "fmax": self.fmax,
            "steps": float(np.mean(self._steps)),
            "converged": float(np.mean(self._converged)),
            "seconds": self._seconds / len(self._steps),
        }


class _Clock:
    """Predicts the model's own paths and times them; its programs must have been compiled before.

    Attributes:
      seconds: time that all predictions took.
      structures: number of structures predicted.
    """

    def __init__(self, model: RelaxNet) -> None:
        self.model, self.seconds, self.structures = model, 0.0, 0

    def __call__(self, structures: Sequence[Structure]) -> list[PredictedPath]:
        begin = time.perf_counter()
        paths = predict_structures(self.model, structures)
        self.seconds += time.perf_counter() - begin
        self.structures += len(structures)
        return paths


def graph_seconds(model: RelaxNet, relaxations: Sequence[RelaxationTrajectory]) -> float:
    """Mean seconds to build the graph of an initial structure, over those that the model can take."""
    made, begin = 0, time.perf_counter()
    for t in relaxations:
        with contextlib.suppress(InputError):
            frame_structure(model, t, 0)
            made += 1
    return (time.perf_counter() - begin) / max(made, 1)


def read_any(
    path: str, model: RelaxNet, report: Callable[[str], None]
) -> list[RelaxationTrajectory]:
    """Reads the relaxations of a store, or imports those of any other file."""
    data = dataclasses.replace(model.config.data, variable_cell="drop")
    config = dataclasses.replace(model.config, data=data)

    def read(store: str) -> list[RelaxationTrajectory]:
        found, left_out = read_trajectories(store, config, report)
        for reason, count in left_out.items():
            report(f"{path}: {count} relaxations left out: {reason}, which this model keeps")
        return list(found)

    if path == "emt" or path.endswith((".h5", ".hdf5")) or Path(path).is_dir():
        return read(path)
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "imported.h5")
        import_files([path], store, report)
        return read(store)


def write_evaluation(
    evaluation: Evaluation, folder: str | Path, report: Callable[[str], None] = print
) -> list[Path]:
    """Writes metrics.json, structures.csv, per_frame.png and parity.png; returns their paths.

    A figure without any finite prediction is not drawn; that is reported, and an older figure removed.
    """
    folder = Path(folder)
    names = ("metrics.json", "structures.csv", "per_frame.png", "parity.png")
    metrics_file, table_file, *figures = files = [folder / name for name in names]
    write_metrics(
        metrics_file,
        evaluation.results,
        {
            "data": evaluation.name,
            "left_out": evaluation.left_out,
            "costs": evaluation.costs,
            "trained_on": evaluation.seen,
            "origin": evaluation.foreign,
        },
    )
    if evaluation.foreign:
        report(f"{evaluation.name}: {evaluation.foreign}")
    write_structures(table_file, evaluation.comparisons)
    averaged_over = any(metrics.n_averaged for metrics in evaluation.results.values())
    if averaged_over:
        per_frame_figure(evaluation.results, figures[0], evaluation.name)
    among = evaluation.among
    finite = any(c.finite and (among is None or c.id in among) for c in evaluation.comparisons)
    if finite:
        parity_figure(evaluation.comparisons, figures[1], evaluation.name, among)
    for file, drawn in zip(figures, (averaged_over, finite)):
        if not drawn:
            files.remove(file)
            file.unlink(missing_ok=True)
            report(f"{file}: not drawn, no prediction is finite")
    return files
