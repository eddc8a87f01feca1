"""Calibration: how well the spread of a committee estimates the true errors of its mean."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.table import Table

from relaxnet_jax.committee import AT_ONE, deviations
from relaxnet_jax.data.files import atomic_path
from relaxnet_jax.errors import InputError
from relaxnet_jax.metrics import Comparison, together

# (quantity, unit for display, factor to that unit)
QUANTITIES = (("positions", "Å", 1.0), ("energy", "meV/atom", 1e3))


class Errors(NamedTuple):
    """Spreads and errors of the final frames of S structures.

    Attributes:
      ids: names of the S structures.
      spread, error: (S,) for each quantity. "positions": Å, root mean square over the free atoms of
        each atom's deviation (a vector), in the true cell where it relaxes. "energy": eV/atom.
      left_out: number of structures that were compared but left out, because they have fewer than
        two members with a finite and usable prediction, or no free atoms.
    """

    ids: list[str]
    spread: dict[str, np.ndarray]
    error: dict[str, np.ndarray]
    left_out: int = 0


class Calibration(NamedTuple):
    """Calibration of the spread of one quantity.

    The statistics from ``spearman`` to ``error`` are None if there are no structures.

    Attributes:
      n: number of structures, without those at rest.
      at_rest: number of structures whose spread and error of positions are both below
        `committee.AT_ONE`: symmetry holds their atoms in place, and only rounding is left.
      spearman: rank correlation of spread and error; None where one of them is constant.
      within_one, within_two: fractions of structures whose error is within one or two spreads.
      ratio: median of error over spread.
      spread, error: medians over the structures.
      left_out: see `Errors`; counted neither in n nor in at_rest.
    """

    n: int
    at_rest: int
    spearman: float | None = None
    within_one: float | None = None
    within_two: float | None = None
    ratio: float | None = None
    spread: float | None = None
    error: float | None = None
    left_out: int = 0


def committee_errors(members: Sequence[Sequence[Comparison]]) -> Errors:
    """Spreads of the members' predictions and errors of their mean.

    For each structure, only members whose prediction is finite and usable count, as in the mean
    that `relax` predicts. Structures with fewer than two such members, or without free atoms, are
    left out and counted.

    Args:
      members: the comparisons of each member on the same relaxations, in any order.

    Raises:
      InputError: the members were not compared on the same structures, or none is left.
    """
    ids: list[str] = []
    spreads: dict[str, list[float]] = {name: [] for name, *_ in QUANTITIES}
    errors: dict[str, list[float]] = {name: [] for name, *_ in QUANTITIES}
    structures = together(members)
    for every in structures:
        first, own = every[0], [c for c in every if c.finite and c.usable]
        if len(own) < 2 or not first.free_mask.any():
            continue
        final = np.stack([c.prediction("model")[0][-1] for c in own])
        energies = np.array([c.pred_energies[-1] for c in own]) / first.atomic_numbers.size
        ids.append(first.id)
        spreads["positions"].append(_rms(deviations(final, first.fixed_mask)))
        spreads["energy"].append(float(energies.std(ddof=1)))
        true = first.true_energies[-1] / first.atomic_numbers.size
        errors["positions"].append(_distance(final.mean(axis=0), first))
        errors["energy"].append(abs(float(energies.mean() - true)))
    if not ids:
        raise InputError("no structure has free atoms and usable predictions from two members")
    spread, error = ({k: np.array(v) for k, v in values.items()} for values in (spreads, errors))
    return Errors(ids, spread, error, len(structures) - len(ids))


def calibrate(found: Errors) -> dict[str, Calibration]:
    """The calibration of each quantity, by name."""
    from scipy.stats import spearmanr

    result = {}
    for name, *_ in QUANTITIES:
        spread, error = found.spread[name], found.error[name]
        at_rest = np.maximum(spread, error) < (AT_ONE if name == "positions" else 0.0)
        spread, error = spread[~at_rest], error[~at_rest]
        if not len(spread):
            result[name] = Calibration(0, int(at_rest.sum()), left_out=found.left_out)
            continue
        constant = np.ptp(spread) == 0 or np.ptp(error) == 0
        result[name] = Calibration(
            n=len(spread),
            at_rest=int(at_rest.sum()),
            spearman=None if constant else float(spearmanr(spread, error).statistic),
            within_one=float(np.mean(error <= spread)),
            within_two=float(np.mean(error <= 2 * spread)),
            ratio=float(np.median(error / np.maximum(spread, 1e-12))),
            spread=float(np.median(spread)),
            error=float(np.median(error)),
            left_out=found.left_out,
        )
    return result


def calibration_table(found: dict[str, Calibration], members: int) -> Table:
    """The calibration as a table for ``rich.console.Console().print``."""
    caption = f"final frames; spread: standard deviation of {members} models; error: that of their mean prediction"
    table = Table(title="Calibration of the committee", caption=caption, box=box.SIMPLE_HEAD)
    table.title_justify = table.caption_justify = "left"
    table.add_column("")
    for name, shown, _ in QUANTITIES:
        table.add_column(f"{name} ({shown})", justify="right")
    for heading, field, form in (
        ("median spread", "spread", "{:.3g}"),
        ("median error", "error", "{:.3g}"),
        ("error / spread, median", "ratio", "{:.2f}"),
        ("Spearman correlation", "spearman", "{:.2f}"),
        ("errors within 1 spread", "within_one", "{:.0%}"),
        ("errors within 2 spreads", "within_two", "{:.0%}"),
        ("structures", "n", "{}"),
        ("… at rest, left out", "at_rest", "{}"),
        ("… not usable, left out", "left_out", "{}"),
    ):
        cells = []
        for name, _, unit in QUANTITIES:
            factor = unit if field in ("spread", "error") else 1
            value = getattr(found[name], field)
            cells.append("–" if value is None else form.format(factor * value).replace("%", " %"))
        table.add_row(heading, *cells)
    return table


_FILES = ("calibration.json", "calibration.csv")


def remove_calibration(folder: Path) -> None:
    """Removes the files that `write_calibration` wrote to this folder earlier."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)


def write_calibration(
    found: Errors, calibrated: dict[str, Calibration], members: Sequence[str], folder: Path
) -> list[Path]:
    """Writes calibration.json, and calibration.csv with a row per structure; returns their paths."""
    files = [folder / name for name in _FILES]
    document: dict[str, Any] = {
        "members": list(members),
        "units": {"positions": "Å", "energy": "eV/atom"},
        "calibration": {name: c._asdict() for name, c in calibrated.items()},
    }
    with atomic_path(files[0]) as temporary:
        text = json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False)
        temporary.write_text(text, encoding="utf-8")
    columns = [f"{name}_{what}" for name, *_ in QUANTITIES for what in ("spread", "error")]
    values = [d[name] for name, *_ in QUANTITIES for d in (found.spread, found.error)]
    with atomic_path(files[1]) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["structure", *columns])
        writer.writerows(zip(found.ids, *(v.tolist() for v in values)))
    return files


def _distance(positions: np.ndarray, c: Comparison) -> float:
    """Root mean square error of the free atoms, Å; without rigid translations where no atom is fixed."""
    away = positions - c.true_positions[-1]
    if not c.fixed_mask.any():
        away = away - away.mean(axis=0)
    return _rms(np.linalg.norm(away[c.free_mask], axis=-1))


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))
