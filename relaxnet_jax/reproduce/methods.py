"""The relaxation methods that tables 5 and 6 compare, with their errors and costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from relaxnet_jax import metrics
from relaxnet_jax.metrics import together
from relaxnet_jax.reproduce import charts, paper
from relaxnet_jax.reproduce.lab import Lab, Predicted
from relaxnet_jax.reproduce.runs import Run
from relaxnet_jax.reproduce.scores import (
    EMPTY,
    Score,
    errors,
    final_fmax,
    measured,
    numbers,
    relative,
)
from relaxnet_jax.reproduce.section import Cell, Table
from relaxnet_jax.reproduce.setting import Setting


@dataclasses.dataclass(frozen=True)
class Method:
    """Errors and costs of the final frames of one method, with each seed.

    Attributes:
      energy: energy error in eV/structure.
      per_atom: energy error in meV/atom.
      forces: force error in meV/Å.
      positions: coordinate error in Å.
      rmsd: aligned RMSD in Å.
      seconds: inference time per structure.
      converged: fraction of the structures; of minimisations only.
      steps: mean number of L-BFGS steps; of minimisations only.
      failed: number of non-finite predictions, over all seeds.
    """

    energy: Score
    per_atom: Score
    forces: Score
    positions: Score
    rmsd: Score
    seconds: Score = EMPTY
    converged: Score = EMPTY
    steps: Score = EMPTY
    failed: int = 0


def method(predicted: Sequence[Predicted], forces: bool = True) -> Method:
    """The `Method` of the predictions with each seed, with or without their forces."""
    compared = [p.comparisons for p in predicted]
    minimised = all("converged" in p.facts for p in predicted)
    energy = errors(compared, "energy_mae")

    def facts(name: str) -> Score:
        if not minimised:
            return EMPTY
        return numbers([sum(p.facts[name]) / len(p.facts[name]) for p in predicted])

    return Method(
        energy,
        errors(compared, "energy_mae_per_atom"),
        errors(compared, "forces_mae") if forces else EMPTY,
        errors(compared, "positions_mae"),
        errors(compared, "rmsd"),
        numbers([p.facts["seconds"] for p in predicted]),
        facts("converged"),
        facts("steps"),
        energy.missing,
    )


def averaged(predicted: Sequence[Predicted]) -> Predicted:
    """The mean of the seeds' predictions, a committee's, as one prediction at the cost of all."""
    made = tuple(metrics.averaged(own) for own in together([p.comparisons for p in predicted]))
    facts = {"seconds": sum(p.facts["seconds"] for p in predicted), "left_out": []}
    return Predicted(made, facts)


def doing_nothing(predicted: Sequence[Predicted]) -> Method:
    """The true initial frame as the final one: it costs a DFT step, but no time of ours."""
    compared = [p.comparisons for p in predicted][:1]

    def error(name: str) -> Score:
        return errors(compared, name, predictor="nothing")

    return Method(
        error("energy_mae"),
        error("energy_mae_per_atom"),
        error("forces_mae"),
        error("positions_mae"),
        error("rmsd"),
    )


def foreign(made: Method) -> Method:
    """Drops the energies of a potential trained on another functional, and marks its scores exact.

    It was not trained here, so there is only one of it and no spread over seeds.
    """
    forces, positions, rmsd, seconds = (
        dataclasses.replace(score, exact=True)
        for score in (made.forces, made.positions, made.rmsd, made.seconds)
    )
    return Method(
        EMPTY,
        EMPTY,
        forces,
        positions,
        rmsd,
        seconds,
        made.converged,
        made.steps,
        made.failed,
    )


def criteria(lab: Lab, explicit: Sequence[Run]) -> dict[str, list[float]]:
    """C1 and C2 in eV/Å, for each seed.

    C2 is the final force norm of explicit RelaxNet with the same seed: the mean over the test
    structures of the largest force it predicts at its final frame.
    """
    own = [measured([lab.paths(run).comparisons], final_fmax).mean for run in explicit]
    return {"C1": [paper.C1] * len(explicit), "C2": own}


def minimised(lab: Lab, runs: Sequence[Run], fmax: Sequence[float]) -> Method | None:
    """A potential minimised with L-BFGS; None if a criterion is not a positive number."""
    if any(not f > 0 for f in fmax):
        return None
    return method([lab.relaxed(run, f) for run, f in zip(runs, fmax)])


def passes(predicted: Sequence[Predicted]) -> str:
    """A sentence for the reader on how predicted paths were timed."""
    found = {p.facts.get("passes", 1) for p in predicted}  # earlier versions made a single pass
    least, most = min(found, default=1), max(found, default=1)
    if most == 1:
        return "Predicted paths were timed in one pass over the test split."
    count = f"{most}" if least == most else f"{least} to {most}"
    return f"Predicted paths were timed in {count} passes over the test split, of which the best counts."


def seeds(setting: Setting, role: str, **changes) -> list[Run]:
    """The runs of a role, one per seed."""
    label = changes.pop("label", "")
    return [setting.run(role, seed, label=label, **changes) for seed in setting.seeds]


COLUMNS = (
    "method",
    "energy MAE (eV)",
    "paper: energy MAE (eV)",
    "energy MAE (meV/atom)",
    "force MAE (eV/Å)",
    "paper: force MAE (eV/Å)",
    "coordinate MAE (Å)",
    "/ doing nothing",
    "aligned RMSD (Å)",
    "inference (ms/structure)",
    "paper: inference (ms/structure)",
    "L-BFGS steps",
    "converged (%)",
    "failed",
)


def methods_table(methods: dict[str, tuple[str, Method]], nothing: Method) -> Table:
    """A row for each method.

    Args:
      methods: label and `Method` by name; the name is also the key in `paper.TABLE5`.
      nothing: the row of doing nothing.
    """
    rows: list[list[Cell]] = []
    for name, (label, m) in {**methods, "nothing": ("doing nothing", nothing)}.items():
        theirs = paper.TABLE5.get(name)
        rows.append(
            [
                label,
                m.energy,
                theirs[0] if theirs else None,
                m.per_atom,
                scaled(m.forces, 1e-3),
                theirs[1] if theirs else None,
                m.positions,
                relative(m.positions, nothing.positions),
                m.rmsd,
                scaled(m.seconds, 1e3),
                1e3 * theirs[2] / paper.TABLE5_STRUCTURES if theirs else None,
                m.steps,
                scaled(m.converged, 100),
                m.failed,
            ]
        )
    return Table("Final frames of the test split", COLUMNS, rows)


def methods_figure(
    methods: dict[str, tuple[str, Method]], nothing: Method, path: Path, caption: str
) -> None:
    """Bar charts of the table's positions, energies and times."""
    by_label = dict(methods.values())
    inference = "inference (ms/structure)"
    panels = {
        "coordinate MAE (Å)": {k: m.positions for k, m in by_label.items()},
        "energy MAE (meV/atom)": {k: m.per_atom for k, m in by_label.items()},
        inference: {k: scaled(m.seconds, 1e3) for k, m in by_label.items()},
    }
    marks = {
        "coordinate MAE (Å)": {"doing nothing": nothing.positions.mean},
        "energy MAE (meV/atom)": {"doing nothing": nothing.per_atom.mean},
    }
    charts.bars(panels, path, caption, marks, log=(inference,))


def scaled(score: Score, factor: float) -> Score:
    """The score in another unit."""
    return dataclasses.replace(score, values=factor * score.values)
