"""Figures of predicted relaxations (the paper's figures 3 and A.2), as PNG.

Drawn with matplotlib's object interface: no pyplot, no display, no global state.
Colours are Okabe and Ito's, which colour-blind readers can tell apart, and every
series differs in its marker too. Files are written atomically.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from relaxnet_jax.data.files import atomic_path
from relaxnet_jax.errors import InputError
from relaxnet_jax.evaluate.tables import label
from relaxnet_jax.metrics import Comparison, Metrics, evaluate, pearson
from relaxnet_jax.strain import reference_positions

if TYPE_CHECKING:
    from relaxnet_jax.data.trajectory import RelaxationTrajectory

DPI = 200
STYLE: Any = {
    "font.size": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
}
TRUTH = {"color": "#444444", "marker": "s", "markerfacecolor": "white", "linestyle": "-"}
SERIES: dict[str, dict[str, Any]] = {
    "model": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "nothing": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
}
SPARE: tuple[dict[str, Any], ...] = (
    {"color": "#009E73", "marker": "^", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "D", "linestyle": ":"},
    {"color": "#E69F00", "marker": "v", "linestyle": "-"},
    {"color": "#56B4E9", "marker": "P", "linestyle": "--"},
)


def per_frame_figure(
    results: Mapping[str, Metrics], path: str | os.PathLike[str], caption: str
) -> None:
    """Energy (meV/atom), force (meV/Å) and coordinate (Å) MAE against the frame.

    Args:
      results: metrics by name. "Composition only" is left out, since it has no frames.
      path: the PNG.
      caption: printed under the figure; names the data set.
    """
    shown = {name: m for name, m in results.items() if m.predictor != "composition"}
    if not shown:
        raise InputError("no metrics with frames to draw; evaluate the model first")
    panels = (
        ("energy_mae_per_atom", "energy MAE (meV/atom)"),
        ("forces_mae", "force MAE (meV/Å)"),
        ("positions_mae", "coordinate MAE (Å)"),
    )
    with matplotlib.rc_context(STYLE):
        figure = new_figure(8.0, 3.0, caption)
        axes = figure.subplots(1, len(panels))
        spare = iter(SPARE * len(shown))
        styles = {name: SERIES.get(name) or next(spare) for name in shown}
        for axis, (field, ylabel) in zip(axes, panels):
            for name, metrics in shown.items():
                values = getattr(metrics.per_frame, field)
                frames = np.flatnonzero(np.isfinite(values))  # lines run across absent frames
                axis.plot(frames, values[frames], label=label(name), clip_on=False, **styles[name])
            axis.set(xlabel="frame", ylabel=ylabel)
            axis.set_ylim(bottom=0)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=len(names))
        save_figure(figure, path)


def parity_figure(
    comparisons: Sequence[Comparison],
    path: str | os.PathLike[str],
    caption: str,
    among: Collection[str] | None = None,
) -> None:
    """Predicted against true energy per atom, [E - sum_i eps(Z_i)]/N in eV, for all frames.

    Energies are relative to the composition energy, because total energies correlate almost perfectly
    for any model that knows the composition. The MAE is that of the metrics (macro average). For models
    that predict the final energy only, only final frames are drawn.

    Args:
      comparisons: the structures; those without a finite prediction are not drawn.
      path: the PNG.
      caption: printed under the figure; names the data set.
      among: ids of the structures to draw, those of the table beside the figure (`finite_ids`); None
        for all.
    """
    drawn = [c for c in comparisons if c.finite and (among is None or c.id in among)]
    final_only = any(c.final_only for c in drawn)
    metrics = evaluate(comparisons, among=among)
    mae = (metrics.final if final_only else metrics.all_frames).energy_mae_per_atom
    if mae is None or not drawn:
        raise InputError(f"{os.fspath(path)}: no structure has a finite prediction to draw")
    sizes = [len(c.atomic_numbers) for c in drawn]
    true = [(c.true_energies - c.composition_energy) / n for c, n in zip(drawn, sizes)]
    pred = [(c.pred_energies - c.composition_energy) / n for c, n in zip(drawn, sizes)]
    frames = slice(-1 if final_only else None, None)
    columns = (true, pred, [c.slots for c in drawn])
    x, y, slots = (np.concatenate([one[frames] for one in column]) for column in columns)
    # So that late frames do not hide early ones.
    order = np.random.default_rng(0).permutation(len(x))
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    pad = 0.05 * (high - low) or 0.01
    limits = (low - pad, high + pad)
    correlation = pearson(x, y)
    notes = [
        f"PCC {correlation:.3f}" if correlation is not None else "PCC undefined",
        f"MAE {mae:.3g} meV/atom",
        f"{len(drawn)} structures, {len(x)} frames",
    ]
    with matplotlib.rc_context(STYLE):
        figure = new_figure(4.6, 4.1, caption)
        axis = figure.subplots()
        n_frames = max(c.n_frames for c in drawn)
        axis.plot(limits, limits, color="#444444", linewidth=0.8, linestyle="--", zorder=0)
        size = float(np.clip(15000 / len(x), 5, 24))
        discrete = BoundaryNorm(np.arange(n_frames + 1) - 0.5, 256) if n_frames <= 12 else None
        norm = discrete or Normalize(0, n_frames - 1)
        points = axis.scatter(
            x[order],
            y[order],
            size,
            slots[order],
            cmap="viridis",
            norm=norm,
            alpha=0.8,
            linewidths=0,
        )
        axis.set(xlim=limits, ylim=limits, aspect="equal")
        axis.set(xlabel=r"true $[E - \Sigma\,\epsilon(Z)]\,/\,N$ (eV/atom)")
        axis.set(ylabel=r"predicted $[E - \Sigma\,\epsilon(Z)]\,/\,N$ (eV/atom)")
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_locator(MaxNLocator(nbins=5))
        axis.text(0.03, 0.97, "\n".join(notes), transform=axis.transAxes, va="top")
        bar = figure.colorbar(points, cax=axis.inset_axes((1.04, 0, 0.035, 1)), label="frame")
        bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
        bar.ax.minorticks_off()
        bar.outline.set_visible(False)
        save_figure(figure, path)


def trajectory_figure(
    true: RelaxationTrajectory,
    pred: RelaxationTrajectory,
    path: str | os.PathLike[str],
    caption: str = "",
) -> None:
    """Energy, largest force and RMS displacement of one relaxation along pseudotime.

    Args:
      true, pred: see `trajectory_curves`.
      path: the PNG.
      caption: printed under the figure; by default the relaxation's id and source.

    Raises:
      InputError: the two have different atoms.
    """
    curves = trajectory_curves(true, pred)
    with matplotlib.rc_context(STYLE):
        caption = caption or f"{true.id} ({true.source})".replace(" ()", "")
        figure = new_figure(8.0, 3.0, caption)
        axes = figure.subplots(1, 3)
        names, styles = ("true", "RelaxNet"), (TRUTH, SERIES["model"])
        for (times, *drawn), name, style in zip(curves, names, styles):
            for axis, curve in zip(axes, drawn):
                axis.plot(times, curve, label=name, clip_on=False, **style)
        labels = ("energy − true initial (meV/atom)", "largest force (eV/Å)")
        for axis, ylabel in zip(axes, (*labels, "RMS displacement (Å)")):
            axis.set(xlabel="pseudotime", ylabel=ylabel)
            axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
        for axis in axes[1:]:
            axis.set_ylim(bottom=0)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
        save_figure(figure, path)


def trajectory_curves(
    true: RelaxationTrajectory, pred: RelaxationTrajectory
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Curves of a relaxation and of its prediction along pseudotime.

    Energies are relative to the true first frame. The largest force is max_i |F_i|, the RMS displacement
    sqrt(mean_i |y_i(t) - y_i(0)|²), both over free atoms. Here y are positions mapped back to the initial
    cell, and y(0) those of the true first frame, so that displacements are within the cell.

    Args:
      true, pred: n frames each (n may differ), positions and cells Å, energies eV, forces eV/Å.

    Returns:
      For each of the two, times, energies (meV/atom), largest forces (eV/Å) and RMS displacements (Å),
      (n,) each.

    Raises:
      InputError: the two have different atoms.
    """
    if not np.array_equal(true.atomic_numbers, pred.atomic_numbers):
        raise InputError(f"{true.id}: prediction and truth have different atoms; match their ids")
    free, first = ~true.fixed_mask, true.positions[0]

    def curves(one: RelaxationTrajectory) -> tuple[np.ndarray, ...]:
        moved = ((reference_positions(one.positions, one.cells) - first)[:, free] ** 2).sum(axis=-1)
        return (
            np.linspace(0, 1, len(one.energies)) if one.times is None else one.times,
            1e3 * (one.energies - true.energies[0]) / len(true.atomic_numbers),
            np.linalg.norm(one.forces[:, free], axis=-1).max(axis=-1, initial=0),
            np.sqrt(moved.sum(axis=-1) / max(free.sum(), 1)),
        )

    return curves(true), curves(pred)


def new_figure(width: float, height: float, caption: str) -> Figure:
    """A figure of this size in inches, with extra height for the wrapped caption under its axes."""
    lines = textwrap.wrap(caption, width=int(17 * width))
    figure = Figure(figsize=(width, height + 0.17 * len(lines)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.supxlabel(
        "\n".join(lines), fontsize=8, color="#444444", x=0.01, ha="left", parse_math=False
    )
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes the PNG whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DPI, format="png", facecolor="white")
