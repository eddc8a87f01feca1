"""Figure 3c: predicted pathways in space, and how smooth they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from relaxnet_jax.evaluate.figures import SERIES, STYLE, TRUTH, new_figure, save_figure
from relaxnet_jax.reproduce import paper
from relaxnet_jax.reproduce.experiment import Experiment
from relaxnet_jax.reproduce.lab import Lab
from relaxnet_jax.reproduce.methods import scaled, seeds
from relaxnet_jax.reproduce.runs import Run
from relaxnet_jax.reproduce.scores import Score, bound, errors, score
from relaxnet_jax.reproduce.section import Cell, Section, Table
from relaxnet_jax.reproduce.setting import Setting
from relaxnet_jax.reproduce.verdict import Claim, Outcome, all_of, complete, decided, lower

FRAMES = 21  # of the predicted paths
SHOWN = 3
MOVES = 0.01  # Å, atoms that move less have no meaningful direction
SMOOTH, TURNING = 1.5, 0.95
LABELS = {"true": "true", "pred": "RelaxNet"}


def runs(setting: Setting) -> list[Run]:
    """The explicit scheme."""
    setting.need_fixed_cells("fig3c")
    return seeds(setting, "explicit")


def section(lab: Lab) -> Section:
    """The figure, its numbers and its claims."""
    setting = lab.setting
    found = runs(setting)
    dense = [lab.dense(run, FRAMES) for run in found]
    compared = [lab.paths(run).comparisons for run in found]
    length = score([{str(r["id"]): _length(r["pred"], r["fixed"]) for r in rs} for rs in dense])
    forward = score([{str(r["id"]): _forward(r["pred"], r["fixed"]) for r in rs} for rs in dense])
    true = score([{str(r["id"]): _length(r["true"], r["fixed"]) for r in dense[0]}])
    mae, rmsd = errors(compared, "positions_mae"), errors(compared, "rmsd")
    nothing = [errors(compared[:1], m, predictor="nothing") for m in ("positions_mae", "rmsd")]
    rows: list[list[Cell]] = [
        ["final coordinate MAE (Å)", mae, nothing[0], paper.COORDINATE_MAE],
        ["final aligned RMSD (Å)", rmsd, nothing[1], paper.RMSD],
        ["path length / displacement", length, None, None],
        ["… of the true path", true, None, None],
        ["steps that go forward (%)", scaled(forward, 100), None, None],
    ]
    path = setting.out / "fig3c.png"
    files = [(path, "predicted and true pathways")] if _draw(dense[0], path, setting.name) else []
    return Section(
        "fig3c",
        "Figure 3c: pathways",
        f"Explicit scheme, predicted on {FRAMES} frames. Path length is the sum of an atom's steps "
        f"over its net displacement (or over {MOVES:g} Å if that is larger), averaged over the free atoms that "
        f"get further than {MOVES:g} Å from their start. A step goes forward if "
        "it makes an angle of less than 90° with the one before. True paths are those of the optimiser "
        "that made the data, on all of their frames, but no more than the predicted ones.",
        [Table("Test split", ("quantity", "RelaxNet", "doing nothing", "paper"), rows)],
        [
            Claim(
                "pathways are smooth and do not oscillate",
                complete(
                    smooth(length, forward),
                    sum(not np.isfinite(r["pred"]).all() for rs in dense for r in rs),
                    f"of {sum(map(len, dense))} paths",
                ),
                f"paths are shorter than {SMOOTH:g} times the displacement, and more than {TURNING:.0%} "
                "of steps go forward",
            )
        ],
        files,
    )


def _steps(path: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """Steps (n-1, M, 3) of the free atoms that move by more than `MOVES`, even if they return."""
    farthest = np.linalg.norm(path - path[0], axis=-1).max(0)
    return np.diff(path[:, ~fixed & (farthest > MOVES)], axis=0)


def _length(path: np.ndarray, fixed: np.ndarray) -> float:
    steps = _steps(path, fixed)
    if steps.shape[1] == 0 or not np.isfinite(steps).all():
        return float("nan")
    lengths = np.linalg.norm(steps, axis=-1).sum(0)
    return float((lengths / np.maximum(np.linalg.norm(steps.sum(0), axis=-1), MOVES)).mean())


def _forward(path: np.ndarray, fixed: np.ndarray) -> float:
    steps = _steps(path, fixed)
    if steps.shape[1] == 0 or len(steps) < 2 or not np.isfinite(steps).all():
        return float("nan")
    return float(((steps[1:] * steps[:-1]).sum(-1) > 0).mean())


def smooth(length: Score, forward: Score) -> Outcome:
    """Whether length over displacement is below `SMOOTH` and the forward share above `TURNING`."""
    if not length.seeds:
        return decided(None, f"no atom moves more than {MOVES:g} Å")
    names = ("path length / displacement", "bound")
    turning = ("bound", "share of steps that go forward")
    return all_of(
        [
            lower(length, bound(SMOOTH, length), names),
            lower(bound(TURNING, forward), forward, turning),
        ]
    )


def _draw(records: Sequence[Mapping[str, Any]], path: Path, data: str) -> bool:
    """Draws three random structures; False if no prediction is finite."""
    usable = [r for r in records if np.isfinite(r["pred"]).all()]
    order = np.random.default_rng(0).permutation(len(usable))[:SHOWN]
    if not len(order):
        return False
    with matplotlib.rc_context(STYLE):
        caption = (
            f"Free atoms of random structures of the test split of {data}; displacements are magnified. "
            "Dots: initial positions."
        )
        figure = new_figure(8.0, 3.2, caption)
        for place, index in enumerate(order, 1):
            axis: Any = figure.add_subplot(1, len(order), place, projection="3d")
            _pathways(axis, usable[index])
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=2)
        save_figure(figure, path)
    return True


def _pathways(axis: Any, record: Mapping[str, Any]) -> None:
    free = ~record["fixed"]
    start = record["pred"][0]
    largest = np.linalg.norm(record["true"][-1] - record["true"][0], axis=-1).max()
    # The largest displacement is drawn as a fifth of the structure's size.
    size = max(float(np.ptp(start, axis=0).max()), 1.0)
    factor = size / 5 / max(float(largest), 1e-3)
    for name, style in (("true", TRUTH), ("pred", SERIES["model"])):
        way = start + factor * (record[name] - record[name][0])
        for drawn, atom in enumerate(np.flatnonzero(free)):
            label = {} if drawn else {"label": LABELS[name]}
            axis.plot(*way[:, atom].T, color=style["color"], linewidth=1.2, **label)
    axis.scatter(*start[free].T, s=8, color="#222222", depthshade=False)
    axis.set_title(f"{str(record['id'])[:24]} (×{factor:.0f})", fontsize=7)
    axis.tick_params(labelsize=5, pad=-2)
    axis.set_box_aspect(np.maximum(np.ptp(start, axis=0), 0.2 * size))


EXPERIMENT = Experiment("fig3c", runs, section)
