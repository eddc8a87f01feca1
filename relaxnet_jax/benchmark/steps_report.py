"""Rows of ``benchmark steps`` as a summary, a CSV file and a table."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from relaxnet_jax.benchmark.steps import CONVERGED, NO_OTHER, SKIPPED
from relaxnet_jax.data.files import atomic_path
from relaxnet_jax.relaxation.minima import (
    WRONG_MINIMUM,
    WRONG_MINIMUM_WHOLE,
    same_minimum_within,
)

COLUMNS = (
    "structure",
    "formula",
    "atoms",
    "cell",
    "start",
    "status",
    "result",
    "steps",
    "seconds",
    "start_seconds",
    "energy",
    "energy_difference_per_atom",
    "fmax",
    "remark",
)
HEADINGS = (
    "start",
    "n",
    "relaxed",
    "wrong minimum",
    "lower minimum",
    "ionic steps, median",
    "s, median",
    "s for start, median",
    "steps saved, median",
    "steps saved, mean",
    "… failures as 0",
)


def judged(
    rows: Sequence[dict[str, Any]],
    per_atom: float = WRONG_MINIMUM,
    whole: float = WRONG_MINIMUM_WHOLE,
) -> list[dict[str, Any]]:
    """Compares each row with the relaxation of its initial structure.

    Args:
      rows: from `run_steps`.
      per_atom: eV/atom; see `same_minimum_within`.
      whole: eV; see `same_minimum_within`.

    Returns:
      The rows with ``energy_difference_per_atom`` (eV, from the relaxation of the initial structure)
      and ``result``: "same minimum", "wrong minimum" or "lower minimum". Both are None unless both
      relaxations converged.
    """
    initial = {r["structure"]: r for r in rows if r["start"] == "initial"}
    found = []
    for row in rows:
        reference = initial[row["structure"]]
        difference = result = None
        if row["status"] == reference["status"] == CONVERGED:
            apart = row["energy"] - reference["energy"]
            difference = apart / row["atoms"]
            result = "same minimum"
            if abs(apart) > same_minimum_within(row["atoms"], per_atom, whole):
                result = "wrong minimum" if difference > 0 else "lower minimum"
        found.append(row | {"energy_difference_per_atom": difference, "result": result})
    return found


def summaries(rows: Sequence[dict[str, Any]], labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """Summarises the rows, as one dictionary per start.

    The structures covered are those whose initial state the oracle relaxed, and those without any
    other start, which are failures of every other start.

    Args:
      rows: from `judged`.
      labels: labels of the starts by key, in order, "initial" first.

    Returns:
      start, label: key and label of the start.
      n: number of structures, without those for which no time was left.
      relaxed: number relaxed to a minimum that is not wrong.
      wrong_minimum, lower_minimum: number that ended in such a minimum.
      wrong_minimum_rate: fraction of wrong minima among those that converged.
      reference_steps: median steps of the relaxed ones from their initial state.
      steps, seconds, start_seconds: medians over the relaxed ones.
      saved_median, saved_mean: saved fraction of the steps from the initial state, over the relaxed
        ones.
      saved_with_failures: its mean over all n, failures counting as 0.

      A value without anything to say is None.
    """
    by_start = {key: [r for r in rows if r["start"] == key] for key in labels}
    reference = {r["structure"]: r for r in by_start["initial"] if r["status"] == CONVERGED}
    counted = set(reference) | {
        r["structure"] for r in by_start["initial"] if r["remark"] == NO_OTHER
    }
    found = []
    for key, label in labels.items():
        own = [r for r in by_start[key] if r["structure"] in counted and r["status"] != SKIPPED]
        results = [r["result"] for r in own]
        good = [r for r in own if r["result"] in ("same minimum", "lower minimum")]
        wrong = results.count("wrong minimum")
        saved = [1 - r["steps"] / reference[r["structure"]]["steps"] for r in good]
        values: dict[str, Any] = {
            "start": key,
            "label": label,
            "n": len(own),
            "relaxed": len(good),
            "wrong_minimum": wrong,
            "lower_minimum": results.count("lower minimum"),
            "wrong_minimum_rate": wrong / (len(good) + wrong) if good or wrong else None,
            "reference_steps": _median(reference[r["structure"]]["steps"] for r in good),
        }
        for name in ("steps", "seconds", "start_seconds"):
            values[name] = _median(r[name] for r in good)
        values["saved_median"] = _median(saved)
        values["saved_mean"] = statistics.fmean(saved) if saved else None
        values["saved_with_failures"] = sum(saved) / len(own) if own else None
        found.append(values)
    return found


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The rows of `judged` as CSV."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def write_markdown(found: Sequence[dict[str, Any]], caption: str, path: Path) -> None:
    """The summaries as a Markdown table under its caption."""
    lines = [caption, "", _line(HEADINGS), "|---" + "|---:" * (len(HEADINGS) - 1) + "|"]
    lines += [_line(_cells(values)) for values in found]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def table(found: Sequence[dict[str, Any]], caption: str) -> Table:
    """The summaries for ``rich.console.Console().print``."""
    result = Table(title=escape(caption), title_justify="left", box=box.SIMPLE_HEAD)
    for k, heading in enumerate(HEADINGS):
        result.add_column(heading, justify="right" if k else "left")
    for values in found:
        result.add_row(*map(escape, _cells(values)))
    return result


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _cells(v: Mapping[str, Any]) -> list[str]:
    is_reference = v["start"] == "initial"
    wrong = "–" if is_reference or v["wrong_minimum_rate"] is None else str(v["wrong_minimum"])
    rate = "" if wrong == "–" else f" ({100 * v['wrong_minimum_rate']:.0f} %)"
    saved = ("saved_median", "saved_mean", "saved_with_failures")
    return [
        v["label"],
        str(v["n"]),
        str(v["relaxed"]),
        wrong + rate,
        "–" if is_reference else str(v["lower_minimum"]),
        _number(v["steps"]),
        _number(v["seconds"]),
        "–" if is_reference else _number(v["start_seconds"]),
        *("–" if is_reference or v[s] is None else f"{100 * v[s]:+.0f} %" for s in saved),
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None
