"""Figure A.3: energy errors against energies and displacements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from scipy.stats import gaussian_kde, spearmanr
from scipy.stats import t as student

from relaxnet_jax.evaluate.figures import STYLE, new_figure, save_figure
from relaxnet_jax.metrics import Comparison
from relaxnet_jax.reproduce.experiment import Experiment
from relaxnet_jax.reproduce.figa1 import common, common_share
from relaxnet_jax.reproduce.lab import Lab
from relaxnet_jax.reproduce.methods import seeds
from relaxnet_jax.reproduce.runs import Run
from relaxnet_jax.reproduce.scores import errors, numbers
from relaxnet_jax.reproduce.section import Cell, Section, Table
from relaxnet_jax.reproduce.setting import Setting
from relaxnet_jax.reproduce.verdict import SIGNIFICANT, Claim, Outcome, decided


def runs(setting: Setting) -> list[Run]:
    """The explicit scheme."""
    setting.need_fixed_cells("figA3")
    return seeds(setting, "explicit")


def section(lab: Lab) -> Section:
    """The figure, its numbers and its claims."""
    setting = lab.setting
    predicted = [lab.paths(run).comparisons for run in runs(setting)]
    points = [frame_points(comparisons) for comparisons in predicted]
    energy = [rank(np.abs(p["energy"]), p["error"], p["structure"]) for p in points]
    moved = [rank(*(p[k][p["moved"] > 0] for k in ("moved", "error", "structure"))) for p in points]
    share = numbers([common_share(points[0]["moved"])])
    errors_now = [errors(predicted, "energy_mae", which) for which in ("final", "all")]
    nothing = [errors(predicted[:1], "energy_mae", w, "nothing") for w in ("final", "all")]
    rows: list[list[Cell]] = [
        ["rank correlation of |E error| with |E|", numbers([r for r, _ in energy]), None],
        ["… with the displacement", numbers([r for r, _ in moved]), None],
        ["displacements in 0.001–0.01 Å (%)", share, None],
        ["energy MAE, final frame (eV)", errors_now[0], nothing[0]],
        ["energy MAE, all frames (eV)", errors_now[1], nothing[1]],
    ]
    path = setting.out / "figA3.png"
    files = [(path, "energy errors")] if _draw(points[0], path, setting.name) else []
    return Section(
        "figA3",
        "Figure A.3: energy errors, energies and displacements",
        "Explicit scheme, all frames of all test structures: absolute energy error against the true "
        "energy and against the mean distance of the free atoms from their start (true frames "
        "after the first). Correlations are Spearman's. Their p values count one point per structure, "
        "as the frames of a structure are not independent.",
        [Table("Test split", ("quantity", "RelaxNet", "doing nothing"), rows)],
        [
            Claim(
                "most true displacements are between 0.001 and 0.01 Å",
                common(points[0]["moved"]),
                "more than half of the true frames",
            ),
            Claim(
                "energy errors fall as displacements grow",
                _correlated(moved, -1),
                f"rank correlation negative with p < {SIGNIFICANT} with every seed",
            ),
            Claim(
                "energy errors are larger for energies of larger magnitude",
                _correlated(energy, 1),
                f"rank correlation positive with p < {SIGNIFICANT} with every seed",
            ),
        ],
        files,
    )


def frame_points(comparisons: Sequence[Comparison]) -> dict[str, np.ndarray]:
    """Arrays over all frames of all structures.

    Returns:
      ``energy`` (eV), ``error`` (eV), ``moved`` (Å, mean over the free atoms) and ``structure``,
      the number of the structure that the frame belongs to.
    """
    columns: dict[str, list[np.ndarray]] = {"energy": [], "error": [], "moved": [], "structure": []}
    for row, c in enumerate(comparisons):
        if c.finite and c.free_mask.any():
            away = (c.true_positions - c.true_positions[:1])[:, c.free_mask]
            columns["moved"].append(np.linalg.norm(away, axis=-1).mean(-1))
            columns["energy"].append(c.true_energies)
            columns["error"].append(np.abs(c.pred_energies - c.true_energies))
            columns["structure"].append(np.full(len(c.slots), row))
    return {k: np.concatenate(v) if v else np.zeros(0) for k, v in columns.items()}


def rank(x: np.ndarray, y: np.ndarray, structures: np.ndarray) -> tuple[float | None, float]:
    """Spearman's correlation, None where it is undefined, and its two-sided p.

    p is that of Student's t with as many points as there are structures.
    """
    n = len(np.unique(structures))
    if n < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None, 1.0
    r = float(spearmanr(x, y).statistic)
    below = math.sqrt(max(1.0 - r * r, 1e-12) / (n - 2))
    return r, float(2 * student.sf(abs(r) / below, n - 2))


def _correlated(found: Sequence[tuple[float | None, float]], sign: int) -> Outcome:
    known = [(r, p) for r, p in found if r is not None]
    if not known:
        return decided(None, "no correlation is defined")
    text = ", ".join(f"{r:+.2f} (p = {p:.1g})" for r, p in known)
    if all(sign * r > 0 and p < SIGNIFICANT for r, p in known):
        return decided(True, text, len(known))
    against = any(sign * r < 0 and p < SIGNIFICANT for r, p in known)
    return decided(False if against else None, text, len(known))


def _draw(points: dict[str, np.ndarray], path: Path, data: str) -> bool:
    """Draws the panels; False if there is nothing to draw."""
    panels = (
        ("energy", "true energy (eV)", points["error"] > 0, False),
        ("moved", "mean displacement (Å)", (points["error"] > 0) & (points["moved"] > 0), True),
    )
    if any(kept.sum() < 3 for _, _, kept, _ in panels):
        return False
    with matplotlib.rc_context(STYLE):
        caption = f"All frames, test split of {data}; colour: kernel density estimate."
        figure = new_figure(8.0, 3.2, caption)
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (name, label, kept, log) in zip(axes, panels):
            x, y = points[name][kept], points["error"][kept]
            axis.scatter(
                x, y, s=8, c=_density(np.log10(x) if log else x, np.log10(y)), linewidths=0
            )
            axis.set(xlabel=label, yscale="log", xscale="log" if log else "linear")
        axes[0].set_ylabel("|energy error| (eV)")
        save_figure(figure, path)
    return True


def _density(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Kernel density at the points; equal for all if they lie on a line."""
    try:
        return gaussian_kde(np.stack([x, y]))(np.stack([x, y]))
    except np.linalg.LinAlgError:
        return np.ones_like(x)


EXPERIMENT = Experiment("figA3", runs, section)
