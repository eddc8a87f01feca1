"""How well the spread of a committee tells the true errors of its mean."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.table import Table

from relaxnet_jax.committee import deviations
from relaxnet_jax.data.files import atomic_path
from relaxnet_jax.errors import InputError
from relaxnet_jax.metrics import Comparison, together

# (quantity, unit it is shown in, factor)
QUANTITIES = (("positions", "Å", 1.0), ("energy", "meV/atom", 1e3))


class Errors(NamedTuple):
    """Of the final frame of each of S structures.

    Attributes:
      ids: S names.
      spread, error: by quantity (S,). positions: Å, root mean square over the free atoms of an
        atom's deviation (a vector), in the true cell where it relaxes; energy: eV/atom.
    """

    ids: list[str]
    spread: dict[str, np.ndarray]
    error: dict[str, np.ndarray]


class Calibration(NamedTuple):
    """Of one quantity.

    Attributes:
      n: structures.
      spearman: rank correlation of spread and error; None where one of them is constant.
      within_one, within_two: fraction of structures whose error is within so many spreads.
      ratio: median of error over spread.
      spread, error: medians.
    """

    n: int
    spearman: float | None
    within_one: float
    within_two: float
    ratio: float
    spread: float
    error: float


def committee_errors(members: Sequence[Sequence[Comparison]]) -> Errors:
    """Spreads of the members' predictions and errors of their mean.

    Structures with a prediction that is not finite, or without free atoms, are left out.

    Args:
      members: of each, the comparisons on the same relaxations, in any order.

    Raises:
      InputError: the members were not compared on the same structures, or none is left.
    """
    ids: list[str] = []
    spreads: dict[str, list[float]] = {name: [] for name, *_ in QUANTITIES}
    errors: dict[str, list[float]] = {name: [] for name, *_ in QUANTITIES}
    for own in together(members):
        first = own[0]
        if not all(c.finite for c in own) or not first.free_mask.any():
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
        raise InputError("no structure with free atoms and finite predictions of all members")
    arrays = ({k: np.array(v) for k, v in values.items()} for values in (spreads, errors))
    return Errors(ids, *arrays)


def calibrate(found: Errors) -> dict[str, Calibration]:
    """By quantity."""
    from scipy.stats import spearmanr

    result = {}
    for name, *_ in QUANTITIES:
        spread, error = found.spread[name], found.error[name]
        constant = np.ptp(spread) == 0 or np.ptp(error) == 0
        result[name] = Calibration(
            n=len(spread),
            spearman=None if constant else float(spearmanr(spread, error).statistic),
            within_one=float(np.mean(error <= spread)),
            within_two=float(np.mean(error <= 2 * spread)),
            ratio=float(np.median(error / np.maximum(spread, 1e-12))),
            spread=float(np.median(spread)),
            error=float(np.median(error)),
        )
    return result


def calibration_table(found: dict[str, Calibration], members: int) -> Table:
    """For ``rich.console.Console().print``."""
    caption = (
        f"final frames; spread: standard deviation of {members} models; error: of the mean of their "
        "predictions"
    )
    table = Table(title="Calibration of the committee", caption=caption, box=box.SIMPLE_HEAD)
    table.title_justify = table.caption_justify = "left"
    table.add_column("")
    for name, unit, _ in QUANTITIES:
        table.add_column(f"{name} ({unit})", justify="right")
    rows = {
        "median spread": lambda c, factor: f"{factor * c.spread:.3g}",
        "median error": lambda c, factor: f"{factor * c.error:.3g}",
        "error / spread, median": lambda c, _: f"{c.ratio:.2f}",
        "Spearman correlation": lambda c, _: "–" if c.spearman is None else f"{c.spearman:.2f}",
        "errors within 1 spread": lambda c, _: f"{100 * c.within_one:.0f} %",
        "errors within 2 spreads": lambda c, _: f"{100 * c.within_two:.0f} %",
    }
    for heading, text in rows.items():
        table.add_row(heading, *(text(found[name], factor) for name, _, factor in QUANTITIES))
    return table


def write_calibration(
    found: Errors, calibrated: dict[str, Calibration], members: Sequence[str], folder: Path
) -> list[Path]:
    """calibration.json, and calibration.csv with a row per structure; returns their paths."""
    files = [folder / "calibration.json", folder / "calibration.csv"]
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
    """Å, root mean square over the free atoms; rigid translations aside where none is fixed."""
    away = positions - c.true_positions[-1]
    if not c.fixed_mask.any():
        away = away - away.mean(axis=0)
    return _rms(np.linalg.norm(away[c.free_mask], axis=-1))


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))
