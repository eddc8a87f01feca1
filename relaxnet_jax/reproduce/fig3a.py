"""Figure 3a: errors per frame and cumulative, and the distribution of force errors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps

from relaxnet_jax.evaluate.figures import SERIES, STYLE, new_figure, save_figure
from relaxnet_jax.metrics import Comparison, structure_errors
from relaxnet_jax.reproduce.experiment import Experiment
from relaxnet_jax.reproduce.lab import Lab
from relaxnet_jax.reproduce.runs import Run
from relaxnet_jax.reproduce.scores import Score, numbers, score
from relaxnet_jax.reproduce.section import Cell, Section, Table
from relaxnet_jax.reproduce.setting import Setting
from relaxnet_jax.reproduce.table2 import case_runs
from relaxnet_jax.reproduce.verdict import Claim, Outcome, all_of, lower

CASE = ("implicit", 10, 0.2)  # the paper's 10 frames of 1,000 structures
METRICS = {"energy_mae_per_atom": "energy MAE (meV/atom)", "forces_mae": "force MAE (meV/Å)"}


def runs(setting: Setting) -> list[Run]:
    """The runs of `CASE`, shared with table 2."""
    return case_runs(setting, *CASE)


def section(lab: Lab) -> Section:
    """The figure, its numbers and its claims."""
    setting = lab.setting
    found = runs(setting)
    predicted = [lab.paths(run).comparisons for run in found]
    frames = found[0].config.dynamics.frames
    single = {m: [at_frame(predicted, m, k, False) for k in range(frames)] for m in METRICS}
    summed = {m: [at_frame(predicted, m, k, True) for k in range(frames)] for m in METRICS}
    nothing = [at_frame(predicted[:1], m, frames - 1, False, "nothing") for m in METRICS]
    medians = [numbers([_median(force_errors(p, k)) for p in predicted]) for k in range(frames)]
    rows: list[list[Cell]] = [
        [str(k), *(values[m][k] for m in METRICS for values in (single, summed)), medians[k]]
        for k in range(frames)
    ]
    rows.append(["final, doing nothing", nothing[0], None, nothing[1], None, None])
    path = setting.out / "fig3a.png"
    _draw(single, summed, predicted[0], frames, path, setting.name)
    return Section(
        "fig3a",
        "Figure 3a: errors along the path",
        f"Implicit scheme, {frames} frames, a fifth of the training split (as in table 2). Per-frame errors "
        "are means over the structures that have the frame, cumulative errors over all frames up to it.",
        [Table("Test split", COLUMNS, rows)],
        [
            Claim(
                "energy and force errors decrease from frame to frame and are lowest at the final one",
                all_of([_lowest(single[m], label) for m, label in METRICS.items()]),
                "the errors of the final frame are lower than those of every other frame",
            ),
            Claim(
                "the distribution of force errors shifts to lower values with every frame",
                _shifting([structure_medians(predicted, k) for k in range(frames)]),
                "the median of the errors of a structure falls in every step, over the structures with both frames",
            ),
        ],
        [(path, "errors against the frame")],
    )


COLUMNS = (
    "frame",
    "energy MAE (meV/atom)",
    "cumulative energy MAE (meV/atom)",
    "force MAE (meV/Å)",
    "cumulative force MAE (meV/Å)",
    "median force error (meV/Å)",
)


def at_frame(
    predicted: Sequence[Sequence[Comparison]],
    metric: str,
    slot: int,
    cumulative: bool,
    predictor: Any = "model",
) -> Score:
    """A metric at one frame of the grid, or averaged over the frames up to it."""
    rows = []
    for comparisons in predicted:
        row = {}
        for c in comparisons:
            if predictor != "model" or c.finite:
                values = structure_errors(c, predictor)[metric]
                chosen = c.slots <= slot if cumulative else c.slots == slot
                if chosen.any():
                    row[c.id] = float(values[chosen].mean())
        rows.append(row)
    return score(rows)


def force_errors(comparisons: Sequence[Comparison], slot: int) -> np.ndarray:
    """Absolute errors of the force components of all free atoms at one frame, meV/Å."""
    found = []
    for c in comparisons:
        if c.finite:
            errors = np.abs(c.pred_forces - c.true_forces)[c.slots == slot][:, c.free_mask]
            found.append(1e3 * errors.ravel())
    return np.concatenate(found) if found else np.zeros(0)


def distribution(errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The non-zero errors in ascending order, and for each the share of all errors not above it.

    Errors of exactly zero, as of forces that symmetry forbids, cannot be drawn on a logarithmic
    axis, but count in the shares.
    """
    errors = np.sort(errors)
    share = np.arange(1, len(errors) + 1) / max(len(errors), 1)
    return errors[errors > 0], share[errors > 0]


def _median(values: np.ndarray) -> float | None:
    return float(np.median(values)) if len(values) else None


def _lowest(scores: Sequence[Score], label: str) -> Outcome:
    """Whether the last frame's errors are lower than every other's, on the structures with both."""
    return all_of(
        [
            lower(scores[-1], s, (f"{label} of the final frame", f"frame {k}"), paired=True)
            for k, s in enumerate(scores[:-1])
        ]
    )


def structure_medians(predicted: Sequence[Sequence[Comparison]], slot: int) -> Score:
    """Median of each structure's absolute errors of force components at one frame, meV/Å."""
    rows = []
    for comparisons in predicted:
        found = {c.id: force_errors([c], slot) for c in comparisons}
        rows.append({name: float(np.median(e)) for name, e in found.items() if len(e)})
    return score(rows)


def _shifting(medians: Sequence[Score]) -> Outcome:
    """Whether each frame's medians are lower than the frame before's, on the same structures."""
    return all_of(
        [
            lower(after, before, (f"frame {k + 1}", f"frame {k}"), "meV/Å", paired=True)
            for k, (before, after) in enumerate(itertools.pairwise(medians))
        ]
    )


def _draw(single, summed, comparisons, frames: int, path: Path, data: str) -> None:
    with matplotlib.rc_context(STYLE):
        caption = f"Implicit scheme, {frames} frames; test split of {data}. Error bars: seeds."
        figure = new_figure(8.0, 3.0, caption)
        axes = figure.subplots(1, 3)
        x = np.arange(frames)
        for axis, (metric, label) in zip(axes, METRICS.items()):
            for values, name, style in (
                (single, "per frame", SERIES["model"]),
                (summed, "cumulative", SERIES["nothing"]),
            ):
                y = [s.mean for s in values[metric]]
                spread = [s.deviation or 0.0 for s in values[metric]]
                axis.errorbar(x, y, yerr=spread, label=name, capsize=2, **style)
            axis.set(xlabel="frame", ylabel=label)
            axis.set_ylim(bottom=0)
        axes[0].legend()
        colours = colormaps["viridis"](np.linspace(0, 0.9, frames))
        for k in range(frames):
            errors, share = distribution(force_errors(comparisons, k))
            if len(errors):
                style = {"label": f"frame {k}"} if k in (0, frames - 1) else {}
                axes[2].plot(errors, share, color=colours[k], linewidth=1.2, **style)
        axes[2].set(xlabel="force error (meV/Å)", ylabel="cumulative share", xscale="log")
        if axes[2].lines:
            axes[2].legend()
        save_figure(figure, path)


EXPERIMENT = Experiment("fig3a", runs, section)
