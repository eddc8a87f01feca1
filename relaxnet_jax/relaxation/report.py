"""The report on each structure: one record, shown as a row of a table or as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from relaxnet_jax.console import WIDE
from relaxnet_jax.relaxation.minima import WRONG_MINIMUM, WRONG_MINIMUM_WHOLE
from relaxnet_jax.relaxation.refine import Refined

if TYPE_CHECKING:
    from relaxnet_jax.structure_files import Predicted

UNITS = {
    "energy": "eV",
    "force": "eV/Å",
    "length": "Å",
    "volume": "Å³",
    "stress": "eV/Å³ (xx yy zz yz xz xy, tension positive)",
    "time": "s",
}
MAX_ROWS = 50


def record(
    result: Predicted, fmax: float, seconds: float, refined: Refined | None
) -> dict[str, Any]:
    """The record of one predicted relaxation, in types that JSON knows.

    Args:
      fmax: largest force asked for, eV/Å.
      seconds: this structure's share of the prediction time.
      refined: result of ``--refine``, or None.
    """
    from relaxnet_jax.strain import internal_displacements
    from relaxnet_jax.trust import UNKNOWN_FORCES

    path, flags, spread = result
    free = ~path.fixed_mask
    volumes = np.abs(np.linalg.det(path.cells[[0, -1]]))
    relaxes = path.variable_cell
    stress = path.stresses[-1] if relaxes and path.stresses is not None else None
    pull = 0.0 if stress is None else cell_force(stress, float(volumes[1]), path.n_atoms)
    last = max(float(path.fmax[-1]), pull)
    moved = np.linalg.norm(internal_displacements(path.positions, path.cells), axis=-1)[free]
    values: dict[str, Any] = {
        "name": path.id,
        "formula": path.formula,
        "atoms": path.n_atoms,
        "fixed_atoms": int(path.fixed_mask.sum()),
        "energy_first": float(path.energies[0]),
        "energy_last": float(path.energies[-1]),
        "energy_change_per_atom": float(path.energies[-1] - path.energies[0]) / path.n_atoms,
        "fmax_first": float(path.fmax[0]),
        "fmax_last": float(path.fmax[-1]),
        "largest_displacement": float(moved.max(initial=0.0)),
        "cell_relaxed": relaxes,
        "volume_first": float(volumes[0]),
        "volume_last": float(volumes[1]),
        "stress_last": None if stress is None else stress.tolist(),
        "cell_force_last": None if stress is None else pull,
        "converged": last < fmax and not any(f.name in UNKNOWN_FORCES for f in flags),
        "flags": [{"name": f.name, "detail": f.detail} for f in flags],
        "seconds": seconds,
        "spread": None if spread is None else spread._asdict(),
    }
    if refined is not None:
        without, with_start = refined.without, refined.with_start
        difference = None
        if without is not None and with_start is not None:
            difference = (with_start.energy - without.energy) / path.n_atoms
        values["refined"] = {
            "without_head_start": None if without is None else without._asdict(),
            "with_head_start": None if with_start is None else with_start._asdict(),
            "energy_difference_per_atom": difference,
            "wrong_minimum": refined.wrong_minimum,
            "kept": refined.kept,
            "failure": refined.failure,
        }
    return values


def cell_force(stress: np.ndarray, volume: float, atoms: int) -> float:
    """The force on the cell, in eV/Å, that a relaxation of the cell compares with fmax.

    It is the longest row of stress times volume, divided by the number of atoms, as in ASE's
    `FrechetCellFilter`.
    """
    from relaxnet_jax.strain import from_voigt

    return float(np.linalg.norm(from_voigt(stress), axis=-1).max()) * volume / atoms


def tables(
    records: Sequence[dict[str, Any]],
    fmax: float,
    refine: str | None,
    width: int = WIDE,
    compare: bool = False,
) -> list[Table]:
    """Tables of the records for ``rich.console.Console().print``, each of at most `MAX_ROWS` rows.

    Args:
      fmax: largest force asked for, eV/Å.
      refine: name of the calculator that refined; None for no refinement.
      width: columns of the terminal. If a row does not fit, flags go below the structure's name and
        spreads beside their quantities, and only the last fmax is shown: no name or flag is cut off.
      compare: whether all structures were refined from their initial state too.
    """
    shown = records[:MAX_ROWS]
    caption = (
        f"by the model's own energies and forces; converged: fmax below {fmax:g} eV/Å (for the cell too, "
        "if it relaxes)"
    )
    committee = next((r["spread"]["members"] for r in records if r["spread"]), 0)
    if committee:
        caption += f";\n±: spread of {committee} models in the final energy and positions"
    predicted = _predicted(shown, caption, bool(committee), narrow=False)
    if _width(predicted) > width:
        predicted = _predicted(shown, caption, bool(committee), narrow=True)
    if not refine:
        return [predicted]
    refined = _table(f"refined with {refine}", _refined_caption(fmax, compare))
    names = min(_longest(r["name"] for r in shown), 24)
    refined.add_column("structure", overflow="fold", min_width=names)
    for heading in ("ionic\nsteps", "energy\neV", "seconds"):
        refined.add_column(heading, justify="right", no_wrap=True)
    refined.add_column("result")
    for r in shown:
        refined.add_row(escape(r["name"]), *_refined_cells(r.get("refined")))
    return [predicted, refined]


def _refined_caption(fmax: float, compare: bool) -> str:
    if not compare:
        return (
            f"LBFGS to {fmax:g} eV/Å from the prediction; where that fails or does not converge, from "
            "the initial\nstructure → from the prediction; --compare shows the steps saved"
        )
    return (
        f"LBFGS to {fmax:g} eV/Å from the initial structure → from the prediction; wrong minimum: "
        f"the latter ends higher\nby more than {1e3 * WRONG_MINIMUM:g} meV/atom or "
        f"{WRONG_MINIMUM_WHOLE:g} eV, and the former is kept"
    )


def _predicted(
    records: Sequence[dict[str, Any]], caption: str, committee: bool, narrow: bool
) -> Table:
    """One row per record; ``narrow`` selects the layout for few columns, see `tables`."""
    cells_relax = any(r["cell_relaxed"] for r in records)
    rows = [_row(r, cells_relax, committee, narrow) for r in records]
    table = _table("predicted", caption)
    if narrow:
        table.padding, table.show_edge, table.pad_edge = (0, 1, 0, 0), False, False
    names = _longest(r["name"] for r in records)
    # In terminals of less than 80 columns, numbers give way first.
    table.add_column("structure", overflow="fold", min_width=min(names, 24) if narrow else names)
    for heading in rows[0] if rows else ():
        table.add_column(heading, justify="right", no_wrap=True)
    if not narrow:
        flags = [flag["name"] for r in records for flag in r["flags"]]
        table.add_column("flags", min_width=_longest(flags))
    for r, row in zip(records, rows):
        flags = [escape(flag["name"]) for flag in r["flags"]]
        name, numbers = escape(r["name"]), map(escape, row.values())
        if narrow:
            table.add_row("\n".join([name, *(f"  {flag}" for flag in flags)]), *numbers)
        else:
            table.add_row(name, *numbers, "\n".join(flags))
    return table


def _row(r: dict[str, Any], cells_relax: bool, committee: bool, narrow: bool) -> dict[str, str]:
    """The cells of a record's row, by heading."""
    energy, moved = f"{1e3 * r['energy_change_per_atom']:+.1f}", f"{r['largest_displacement']:.3f}"
    spread = r["spread"]
    spread_energy = "–" if spread is None else f"{1e3 * spread['energy_per_atom']:.1f}"
    spread_positions = "–" if spread is None else f"{spread['positions']:.3f}"
    if narrow and spread is not None:
        energy += f" ± {spread_energy}"
        moved = f"{r['largest_displacement']:.2f} ± {spread['positions']:.2f}"
    row = {"atoms": str(r["atoms"]), "ΔE\nmeV/atom": energy}
    if cells_relax:
        before, after = r["volume_first"], r["volume_last"]
        known = r["cell_relaxed"] and before > 0
        row["ΔV\n%"] = f"{100 * (after / before - 1):+.1f}" if known else "–"
    last = f"{r['fmax_last']:.3f}"
    row["fmax\neV/Å"] = last if narrow else f"{r['fmax_first']:.3f} → {last}"
    row["moved\nÅ"] = moved
    if committee and not narrow:
        row |= {"± E\nmeV/atom": spread_energy, "± positions\nÅ": spread_positions}
    row["con-\nverged" if narrow else "converged"] = "yes" if r["converged"] else "no"
    return row


def _table(title: str, caption: str) -> Table:
    result = Table(title=escape(title), caption=caption, box=box.SIMPLE_HEAD)
    result.title_justify = result.caption_justify = "left"
    return result


def _longest(texts: Iterable[str]) -> int:
    return max(map(cell_len, texts), default=0)


def _width(table: Table) -> int:
    """Columns that the table takes if nothing in it is wrapped."""
    console = Console(width=10 * WIDE)
    return Measurement.get(console, console.options, table).maximum


def _refined_cells(refined: dict[str, Any] | None) -> list[str]:
    if refined is None:
        return ["–", "–", "–", "failed"]
    legs = [refined["without_head_start"], refined["with_head_start"]]
    if legs[0] is None and not refined["failure"]:
        legs = legs[1:]  # the other was not needed
    converged = [leg is not None and leg["converged"] for leg in legs]
    if all(converged):
        verdict = "wrong minimum" if refined["wrong_minimum"] else "converged"
    elif any(converged):
        verdict = "converged only from the " + (
            "initial structure" if converged[0] else "prediction"
        )
    else:
        verdict = "not converged"

    def shown(key: str, form: str) -> str:
        return " → ".join("failed" if leg is None else format(leg[key], form) for leg in legs)

    return [shown("steps", "d"), shown("energy", ".3f"), shown("seconds", ".1f"), verdict]


def flag_lines(records: Sequence[dict[str, Any]]) -> list[str]:
    """The flags and their details, one line for all structures that share them."""
    said: dict[str, list[str]] = {}
    for r in records:
        for flag in r["flags"]:
            said.setdefault(f"{flag['name']}: {flag['detail']}", []).append(r["name"])
    return [
        f"{names[0]}: {text}" if len(names) == 1 else f"{len(names)} structures: {text}"
        for text, names in said.items()
    ]


def totals(
    records: Sequence[dict[str, Any]],
    failed: int,
    seconds: float,
    refined: bool = False,
    compare: bool = False,
) -> list[str]:
    """Closing lines: counts, time, ionic steps, and what the head start saved over all structures.

    Args:
      failed: number of failures, including those to refine a prediction.
      seconds: total time.
      refined: whether refinement was asked for.
      compare: whether the initial structures were refined too.
    """
    converged = sum(r["converged"] for r in records)
    flagged = sum(bool(r["flags"]) for r in records)
    unrefined = sum(refined and r.get("refined") is None for r in records)
    failed -= unrefined
    more = f"; {len(records) - MAX_ROWS} of them not shown (--json shows all)"
    mean = sum(r["seconds"] for r in records) / max(len(records), 1)
    each = f" ({mean:.2f} s each to predict, compiling included)" if records else ""
    lines = [
        f"{len(records)} relaxed in {seconds:.1f} s{each}, {converged} converged, {flagged} flagged"
        + (f"; {unrefined} of them could not be refined" if unrefined else "")
        + (f"; {failed} failed" if failed else "")
        + (more if len(records) > MAX_ROWS else "")
    ]
    found = [r["refined"] for r in records if r.get("refined") is not None]
    line = (_saved if compare else _spent)(found)
    return [*lines, line] if line else lines


def _spent(found: Sequence[dict[str, Any]]) -> str:
    """Line on the ionic steps from predictions, and from initial structures where those failed."""
    keys = ("with_head_start", "without_head_start")
    first, again = ([r[key] for r in found if r[key] is not None] for key in keys)
    if not found:
        return ""
    return f"ionic steps: {sum(leg['steps'] for leg in first)} from {len(first)} predictions" + (
        f", {sum(leg['steps'] for leg in again)} more from {len(again)} initial structures where the "
        "prediction failed or did not converge"
        if again
        else ""
    )


def _saved(found: Sequence[dict[str, Any]]) -> str:
    """Line on the ionic steps without and with the head start; empty if nothing can be compared."""
    known = [r for r in found if (leg := r["without_head_start"]) and leg["converged"]]
    if not known:
        return ""
    # If the head start leads to a wrong minimum or nowhere, the other relaxation is needed as well.
    good = [r for r in known if r["wrong_minimum"] is False]
    before = sum(r["without_head_start"]["steps"] for r in known)
    saved = sum(r["without_head_start"]["steps"] - r["with_head_start"]["steps"] for r in good)
    wrong = sum(r["wrong_minimum"] is True for r in known)
    nowhere = len(known) - len(good) - wrong
    return (
        f"ionic steps: {before} without and {before - saved} with the head start "
        f"({100 * saved / before:+.0f} % saved, {len(known)} structures"
        + (", none where it fails or ends in a wrong minimum" if len(good) < len(known) else "")
        + f"); wrong minima: {wrong}"
        + (f"; failed or unconverged from the prediction: {nowhere}" if nowhere else "")
    )
