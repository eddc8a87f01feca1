"""Charts of scores: bars and lines with error bars, drawn without pyplot."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from relaxnet_jax.evaluate.figures import SERIES, SPARE, STYLE, new_figure, save_figure
from relaxnet_jax.reproduce.scores import Score

COLOURS: tuple[dict[str, Any], ...] = (SERIES["model"], SERIES["nothing"], *SPARE)
OURS = SERIES["model"]["color"]


def bars(
    panels: Mapping[str, Mapping[str, Score]],
    path: Path,
    caption: str,
    marks: Mapping[str, Mapping[str, float]] | None = None,
    log: Collection[str] = (),
) -> None:
    """Horizontal bars, one panel per quantity; error bars show the deviation over seeds.

    Args:
      panels: by axis label, the scores by bar label. Scores without a finite mean are left out.
      path: the file to write.
      caption: the figure's caption.
      marks: by axis label, vertical lines as value by name, e.g. doing nothing.
      log: axis labels of the panels with a logarithmic axis.
    """
    shown = {k: {n: s for n, s in v.items() if np.isfinite(s.mean)} for k, v in panels.items()}
    labels = list(dict.fromkeys(name for scores in shown.values() for name in scores))
    with matplotlib.rc_context(STYLE):
        figure = new_figure(8.0, max(1.6, 0.8 + 0.27 * len(labels)), caption)
        axes = np.atleast_1d(figure.subplots(1, len(shown), sharey=True))
        for axis, (title, scores) in zip(axes, shown.items()):
            for row, name in enumerate(labels):
                if name in scores:
                    score = scores[name]
                    axis.barh(row, score.mean, 0.65, color=OURS, alpha=0.75)
                    if score.deviation is not None:
                        axis.errorbar(score.mean, row, xerr=score.deviation, color="#222222")
            for (name, value), style in zip((marks or {}).get(title, {}).items(), COLOURS[1:]):
                if np.isfinite(value):
                    axis.axvline(value, color=style["color"], linestyle="--", label=name)
            axis.set_xlabel(title)
            if title in log:
                axis.set_xscale("log")
            else:
                axis.set_xlim(left=0)
        axes[0].set_yticks(range(len(labels)), labels)
        axes[0].set_ylim(len(labels) - 0.4, -0.6)
        named = {n: h for axis in axes for h, n in zip(*axis.get_legend_handles_labels())}
        if named:
            figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=3)
        save_figure(figure, path)


def lines(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[Score]]]],
    path: Path,
    caption: str,
    xlabel: str,
    xlog: bool = False,
    ylog: Collection[str] = (),
) -> None:
    """Curves of scores with error bars, one panel per quantity.

    Args:
      panels: by axis label, (x, scores) by curve name.
      path: the file to write.
      caption: the figure's caption.
      xlabel: label of the abscissa.
      xlog: whether the abscissa is logarithmic.
      ylog: axis labels of the panels with a logarithmic ordinate.
    """
    with matplotlib.rc_context(STYLE):
        figure = new_figure(8.0, 3.0, caption)
        axes = np.atleast_1d(figure.subplots(1, len(panels)))
        for axis, (ylabel, curves) in zip(axes, panels.items()):
            for (name, (x, scores)), style in zip(curves.items(), COLOURS):
                y = np.array([s.mean for s in scores])
                spread = np.array([s.deviation or 0.0 for s in scores])
                axis.errorbar(x, y, yerr=spread, label=name, capsize=2, **style)
            axis.set(xlabel=xlabel, ylabel=ylabel)
            if xlog:
                axis.set_xscale("log")
                places = sorted({v for x, _ in curves.values() for v in x})
                axis.set_xticks(places, [f"{v:g}" for v in places], minor=False)
                axis.minorticks_off()
            if ylabel in ylog and any(s.mean > 0 for _, scores in curves.values() for s in scores):
                axis.set_yscale("log")
            else:
                axis.set_ylim(bottom=0)
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 4))
        save_figure(figure, path)
