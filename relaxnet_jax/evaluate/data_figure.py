"""Figure of what a data set holds (the paper's figure A.1), as PNG."""

from __future__ import annotations

import os

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator

from relaxnet_jax.data.quality.statistics import DataSummary
from relaxnet_jax.evaluate.figures import SERIES, SPARE, STYLE, new_figure, save_figure

_BINS = 40
# Å; smaller displacements come from rounding, in files and in mapping cells on each other.
STILL = 1e-6
_FIRST, _LAST = SERIES["nothing"]["color"], SERIES["model"]["color"]
_OTHER = SPARE[0]["color"]


def distribution_figure(
    summary: DataSummary, path: str | os.PathLike[str], caption: str = ""
) -> None:
    """Draws the distributions of atoms, elements, energies (eV/atom) and displacements (Å).

    Energies are those of the first and the last frame. Displacements are the mean and the largest
    over free atoms, from the first to the last frame; relaxations in which none exceeds 1e-6 Å are
    counted, not drawn.

    Args:
      summary: from `summarise`.
      path: the PNG.
      caption: printed under the figure; names the data set.
    """
    drawn = ("atoms", "first_energy", "last_energy", "displacement", "max_displacement")
    values = {name: summary.values[name] for name in drawn}
    values = {name: v[np.isfinite(v)] for name, v in values.items()}
    with matplotlib.rc_context(STYLE):
        figure = new_figure(8.0, 5.6, caption)
        grid = figure.subplot_mosaic([["a", "e", "d"], ["z", "z", "z"]])
        atoms = values["atoms"]
        width = max(1, int(np.ptp(atoms)) // _BINS + 1)
        edges = np.arange(atoms.min() - 0.5, atoms.max() + width, width).tolist()
        grid["a"].hist(atoms, edges, color=_OTHER, histtype="stepfilled", alpha=0.45)
        grid["a"].hist(atoms, edges, color=_OTHER, histtype="step", linewidth=1.0)
        grid["a"].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        both = {"first_energy": ("first frame", _FIRST), "last_energy": ("last frame", _LAST)}
        _histogram(grid["e"], values, both, "energy (eV/atom)")
        both = {"displacement": ("mean", _LAST), "max_displacement": ("largest", _FIRST)}
        _histogram(grid["d"], values, both, "displacement, first to last (Å)", above=STILL)
        still = int((values["max_displacement"] <= STILL).sum())
        if still:
            grid["d"].set_xlabel(f"{grid['d'].get_xlabel()}\n{still} at rest, not drawn")
        grid["a"].set(xlabel="atoms", ylabel="relaxations")
        axis, symbols = grid["z"], list(summary.elements)
        heights = [n for n, _ in summary.elements.values()]
        places = np.arange(len(symbols))
        axis.bar(places, heights, width=0.75, color=_OTHER)
        size = 8 if len(symbols) <= 40 else 5.5
        axis.set_xticks(places, symbols, fontsize=size)
        axis.tick_params(axis="x", length=0)
        axis.set(xlabel="element", ylabel="relaxations", xlim=(-0.8, max(len(symbols), 8) - 0.2))
        save_figure(figure, path)


def _histogram(axis, values, series, label: str, above: float | None = None) -> None:
    """Outlined histograms on common bins; with ``above``, of larger values only, on a logarithmic axis."""
    columns = {name: values[name] for name in series}
    drawn = np.concatenate(list(columns.values()))
    if above is not None:
        drawn = drawn[drawn > above]
    if len(drawn):
        low, high = drawn.min(), drawn.max()
        if above is not None:
            low, high = (low, high) if high > 1.01 * low else (low / 2, high * 2)
            edges = np.geomspace(low, high * (1 + 1e-9), _BINS + 1)
            axis.set_xscale("log")
        else:
            low, high = (low, high) if high - low > 1e-9 * abs(high) else (low - 0.5, high + 0.5)
            edges = np.linspace(low, high, _BINS + 1)
        for name, (text, colour) in series.items():
            filled = {"histtype": "stepfilled", "alpha": 0.45, "label": text}
            axis.hist(columns[name], edges, color=colour, **filled)
            axis.hist(columns[name], edges, color=colour, histtype="step", linewidth=1.0)
    if len(series) > 1 and len(drawn):
        axis.legend(loc="best", handlelength=1.2, fontsize=8)
    axis.set_xlabel(label)
