"""Metrics as a table for people and as JSON and CSV for programs, from the same numbers."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from ase.data import chemical_symbols
from ase.formula import Formula
from rich import box
from rich.markup import escape
from rich.table import Table

from relaxnet_jax.data.files import atomic_path
from relaxnet_jax.errors import InputError
from relaxnet_jax.metrics import Comparison, Metrics, plain, structure_errors

LABELS = {
    "model": "RelaxNet",
    "lbfgs": "MLIP + LBFGS",
    "nothing": "doing nothing",
    "composition": "composition only",
}
UNITS = {
    "energy_mae": "eV/structure",
    "energy_mae_per_atom": "meV/atom",
    "relaxation_energy_mae_per_atom": "meV/atom",
    "work_mae_per_atom": "meV/atom",
    "forces_mae": "meV/Å",
    "positions_mae": "Å",
    "rmsd": "Å",
    "volume": "%",
    "lengths": "Å",
    "angles": "degrees",
    "seconds": "s/structure, without compilation",
}

_EVERY = ("model", "nothing", "composition")
_MOVING = ("model", "nothing")  # "composition only" predicts no geometry
_OF_CELLS = ("volume", "lengths", "angles")
# (heading, path into Metrics, how it is shown, predictors for which it is meaningful)
_ROWS = (
    *(
        (f"{name}, {label}", f"{frames}.{field}", "number", predictors)
        for name, field, predictors in (
            ("energy MAE (eV/structure)", "energy_mae", _EVERY),
            ("energy MAE (meV/atom)", "energy_mae_per_atom", _EVERY),
            ("E(t) - E(0) MAE (meV/atom)", "relaxation_energy_mae_per_atom", _MOVING),
            ("… by work of forces", "work_mae_per_atom", _MOVING),
            ("energy/atom, Pearson r", "pearson", _EVERY),
            ("force MAE (meV/Å)", "forces_mae", _EVERY),
            ("coordinate MAE (Å)", "positions_mae", _MOVING),
            ("aligned RMSD (Å)", "rmsd", _MOVING),
            ("volume error (%)", "volume", _MOVING),
            ("lattice vector MAE (Å)", "lengths", _MOVING),
            ("lattice angle MAE (°)", "angles", _MOVING),
        )
        for frames, label in (("final", "final frame"), ("all_frames", "all frames"))
    ),
    ("final coordinate MAE / doing nothing", "final_ratio", "number", _MOVING),
    ("… median over structures", "median_ratio", "number", _MOVING),
    ("improved over doing nothing", "improved_fraction", "percent", ("model",)),
    ("structures with falling energy", "monotone_fraction", "percent", ("model",)),
)


def label(name: str) -> str:
    """The name of a predictor in tables and figures; names without a label stay as they are."""
    return LABELS.get(name, name)


# (heading, key into the costs, how it is shown)
_COSTS = (
    ("seconds per structure", "seconds", "number"),
    ("optimiser steps", "steps", "number"),
    ("converged", "converged", "percent"),
)


def metrics_table(
    results: Mapping[str, Metrics],
    title: str,
    costs: Mapping[str, Mapping[str, float]] | None = None,
) -> Table:
    """One row per metric, with its unit, and one column per entry of ``results``.

    Args:
      results: metrics by name; "model", "nothing" and "composition" get readable headings.
      title: names the data set.
      costs: costs of a prediction, by the same names: seconds, steps, converged (a fraction).

    Returns:
      A table for ``rich.console.Console().print``. A dash stands for a metric that is undefined or
      meaningless for a predictor. The caption tells how many structures the means leave out. If
      any predictions are not finite, the last row counts them.
    """
    if not results:
        raise InputError("no metrics to tabulate; evaluate at least one predictor")
    first = next(iter(results.values()))
    note = f"{first.n_structures} structures; means over atoms and frames, then structures"
    left_out = first.n_structures - first.n_averaged
    if left_out:
        every = " in every column" if len(results) > 1 else ""
        note += f"; {left_out} left out of the means{every}: prediction not finite"
    table = Table(title=escape(title), caption=note, box=box.SIMPLE_HEAD, title_justify="left")
    table.caption_justify = "left"
    table.add_column("metric", no_wrap=True)
    for name in results:
        width = max(map(len, label(name).split()), default=0)  # headings wrap between words only
        table.add_column(escape(label(name)), justify="right", min_width=width)
    for row, (heading, path, kind, predictors) in enumerate(_ROWS):
        values = [_lookup(metrics, path) for metrics in results.values()]
        if path.rsplit(".", 1)[-1] in _OF_CELLS and all(value is None for value in values):
            continue  # no cell relaxes in these data
        cells = []
        for metrics in results.values():
            value = _lookup(metrics, path) if metrics.predictor in predictors else None
            cells.append(_percent(value) if kind == "percent" else _number(value))
        ends = "all frames" in heading or row == len(_ROWS) - 1
        table.add_row(heading, *cells, end_section=ends)
    for heading, key, kind in _COSTS if costs else ():
        found = [(costs or {}).get(name, {}).get(key) for name in results]
        table.add_row(heading, *(_percent(v) if kind == "percent" else _number(v) for v in found))
    if any(metrics.n_nonfinite for metrics in results.values()):
        counts = [str(m.n_nonfinite) if m.predictor == "model" else "–" for m in results.values()]
        table.add_row("structures without a finite prediction", *counts, style="bold red")
    return table


def write_metrics(
    path: str | os.PathLike[str],
    results: Mapping[str, Metrics],
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes ``{"units": …, "results": {name: Metrics.to_dict()}, **extra}`` as JSON.

    Atomic: readers see the old file or the whole new one. Non-finite numbers become null.

    Args:
      path: the JSON file; missing folders are made.
      results: metrics by name.
      extra: further top-level entries, e.g. data set, model, versions.
    """
    clash = {"units", "results"} & set(extra or {})
    if clash:
        raise InputError(f"{path}: extra must not contain {', '.join(sorted(clash))}; rename it")
    document = plain({**(extra or {}), "units": UNITS})
    document["results"] = {name: metrics.to_dict() for name, metrics in results.items()}
    text = json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False, default=str) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# Errors of the final frame, named as in `structure_errors`.
_OF_STRUCTURES = (
    "energy_mae_per_atom",
    "relaxation_energy_mae_per_atom",
    "work_mae_per_atom",
    "forces_mae",
    "positions_mae",
    "rmsd",
    *_OF_CELLS,
)


def write_structures(path: str | os.PathLike[str], comparisons: Sequence[Comparison]) -> None:
    """Writes a CSV with the errors of every structure's final frame beside those of doing nothing.

    Names and units are those of ``metrics.json``. An empty cell is undefined, or has no finite prediction.
    """
    head = ["structure", "formula", "atoms", "finite", "usable"]
    head += [f"{who}{name}" for name in _OF_STRUCTURES for who in ("", "nothing_")]
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        for c in comparisons:
            formula = Formula.from_list([chemical_symbols[z] for z in c.atomic_numbers])
            row: list[Any] = [c.id, format(formula, "hill"), len(c.atomic_numbers)]
            row += [c.finite, c.usable]
            own = structure_errors(c) if c.finite else {}
            still = structure_errors(c, "nothing")
            for name in _OF_STRUCTURES:
                for errors in (own, still):
                    value = float(errors[name][-1]) if name in errors else math.nan
                    row.append(f"{value:.6g}" if math.isfinite(value) else "")
            writer.writerow(row)


def _lookup(metrics: Metrics, path: str) -> float | None:
    """The attribute at a dotted path."""
    value: Any = metrics
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _number(value: float | None) -> str:
    """Three significant digits, at most five decimals, no powers of ten below 1e6."""
    if value is None:
        return "–"
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    return f"{value:.{min(max(2 - math.floor(math.log10(abs(value))), 0), 5)}f}"


def _percent(value: float | None) -> str:
    """A fraction as a percentage with one decimal."""
    return "–" if value is None else f"{100 * value:.1f} %"
