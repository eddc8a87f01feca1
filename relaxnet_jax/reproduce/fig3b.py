"""Figure 3b: distances of predicted frames from the relaxed structure, and of a static model's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import colormaps
from scipy.stats import skew

from relaxnet_jax.evaluate.figures import SERIES, STYLE, new_figure, save_figure
from relaxnet_jax.metrics import Comparison, coordinate_errors
from relaxnet_jax.reproduce import paper
from relaxnet_jax.reproduce.experiment import Experiment
from relaxnet_jax.reproduce.lab import Lab
from relaxnet_jax.reproduce.methods import seeds
from relaxnet_jax.reproduce.runs import Run
from relaxnet_jax.reproduce.scores import Score, errors, numbers, relative, score
from relaxnet_jax.reproduce.section import Cell, Section, Table
from relaxnet_jax.reproduce.setting import Setting
from relaxnet_jax.reproduce.verdict import Claim, Outcome, all_of, lower

STATIC = "direct predictor"


def runs(setting: Setting) -> list[Run]:
    """The explicit scheme, and the direct predictor as the paper's static model of coordinates."""
    setting.need_fixed_cells("fig3b")
    return seeds(setting, "explicit") + seeds(setting, "static_final")


def section(lab: Lab) -> Section:
    """The figure, its numbers and its claims."""
    setting = lab.setting
    found = seeds(setting, "explicit")
    paths = [lab.paths(run).comparisons for run in found]
    static = seeds(setting, "static_final")
    direct = [lab.paths(run).comparisons for run in static]
    frames = found[0].config.dynamics.frames
    distance = {f"frame {k}": to_relaxed(paths, k) for k in range(frames)}
    distance[STATIC] = to_relaxed(direct, static[0].config.dynamics.frames - 1)
    nothing = errors(paths[:1], "positions_mae", predictor="nothing")
    tails = {name: _skewness(s) for name, s in distance.items()}
    rows: list[list[Cell]] = [
        [name, s, relative(s, nothing), _medians(s), tails[name]] for name, s in distance.items()
    ]
    rows.append(["doing nothing", nothing, 1.0, _medians(nothing), _skewness(nothing)])
    final = distance[f"frame {frames - 1}"]
    names = (f"frame {frames - 1}", STATIC)
    path = setting.out / "fig3b.png"
    drawn = _draw(distance, path, setting.name)
    return Section(
        "fig3b",
        "Figure 3b: coordinate errors by frame, and of a static model",
        "Mean absolute difference, over the coordinates of a structure's free atoms, between every "
        "predicted frame and the true final one; frame 0 is doing nothing. Means are over the "
        "structures whose relaxation has the frame. The paper does not say "
        "which frame its errors refer to; this reading fits its statement that the static model's "
        "distribution parallels that of frame 0. The static model predicts the final positions "
        "directly, with the same encoder.",
        [Table("Test split", COLUMNS, rows)],
        [
            Claim(
                "intermediate frames improve the final coordinates over direct prediction",
                lower(final, distance[STATIC], names, "Å"),
            ),
            Claim(
                "errors become smaller with every frame",
                falling([distance[f"frame {k}"] for k in range(frames)]),
            ),
            Claim(
                "the static model's distribution has the longer tail",
                lower(tails[names[0]], tails[STATIC], names),
                "its skewness is higher",
            ),
        ],
        [(path, "distributions of coordinate errors")] if drawn else [],
        [f"The paper's final coordinate MAE is {paper.COORDINATE_MAE} Å, before alignment."],
    )


COLUMNS = ("prediction", "mean error (Å)", "/ doing nothing", "median error (Å)", "skewness")


def to_relaxed(predicted: Sequence[Sequence[Comparison]], slot: int) -> Score:
    """Coordinate error in Å of a predicted frame against the true final frame.

    NaN where the prediction is not finite.
    """
    rows = []
    for comparisons in predicted:
        row = {}
        for c in comparisons:
            at = np.flatnonzero(c.slots == slot)
            if len(at):
                positions = c.prediction("model")[0][at[0]]
                error = coordinate_errors(positions, c.true_positions[-1], c.free_mask)
                row[c.id] = float(error) if c.finite else math.nan
        rows.append(row)
    return score(rows)


def _skewness(s: Score) -> Score:
    kept = [row[np.isfinite(row)] for row in s.values]
    return numbers([float(skew(v)) if len(v) > 2 and np.ptp(v) > 0 else None for v in kept])


def _medians(s: Score) -> Score:
    kept = [row[np.isfinite(row)] for row in s.values]
    return numbers([float(np.median(v)) if len(v) else None for v in kept])


def falling(scores: Sequence[Score]) -> Outcome:
    """Whether each frame's errors are lower than those of the frame before.

    Each pair is compared on the structures that have both, as short relaxations lack some frames.
    """
    return all_of(
        [
            lower(after, before, (f"frame {k}", f"frame {k - 1}"), "Å", paired=True)
            for k, (before, after) in enumerate(itertools.pairwise(scores), 1)
        ]
    )


def _draw(distance: dict[str, Score], path: Path, data: str) -> bool:
    """Draws the distributions; False if there is nothing to draw."""
    pooled = {
        name: s.values[np.isfinite(s.values) & (s.values > 0)] for name, s in distance.items()
    }
    pooled = {name: v for name, v in pooled.items() if len(v)}
    if not pooled:
        return False
    both = np.concatenate(list(pooled.values()))
    edges = np.geomspace(both.min() / 1.01, both.max() * 1.01, 31).tolist()
    with matplotlib.rc_context(STYLE):
        caption = f"Against the true final positions; all seeds, test split of {data}."
        figure = new_figure(6.0, 3.4, caption)
        axis = figure.subplots()
        frames = [name for name in pooled if name != STATIC]
        colours = colormaps["viridis"](np.linspace(0, 0.9, len(frames)))
        for name, colour in zip(frames, colours):
            axis.hist(pooled[name], edges, histtype="step", color=colour, label=name, density=False)
        if STATIC in pooled:
            style = {"color": SERIES["nothing"]["color"], "label": STATIC}
            axis.hist(pooled[STATIC], edges, alpha=0.35, histtype="stepfilled", **style)
        axis.set(xscale="log", xlabel="coordinate error (Å)", ylabel="structures")
        figure.legend(loc="outside upper center", ncols=3, fontsize=8)
        save_figure(figure, path)
    return True


EXPERIMENT = Experiment("fig3b", runs, section)
