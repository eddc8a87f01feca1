"""What is said about each structure: one record, as a row of a table or as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from relaxnet_jax.relaxation.refine import WRONG_MINIMUM, Refined

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
    """What is known of one predicted relaxation: numbers, strings, lists and None only.

    Args:
      fmax: eV/Å, asked for.
      seconds: of prediction, the share of this structure. refined: by ``--refine``, or None.
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
    """eV/Å, what a relaxation of the cell takes for its largest force beside those of the atoms: the
    longest row of stress times volume over the number of atoms, as ASE's `FrechetCellFilter`."""
    from relaxnet_jax.strain import from_voigt

    return float(np.linalg.norm(from_voigt(stress), axis=-1).max()) * volume / atoms


def tables(records: Sequence[dict[str, Any]], fmax: float, refine: str | None) -> list[Table]:
    """The records for ``rich.console.Console().print``: at most `MAX_ROWS` rows in each table."""
    shown = records[:MAX_ROWS]
    caption = (
        f"by the model's own energies and forces; converged: fmax below {fmax:g} eV/Å (of the cell too "
        "where it relaxes);\n"
        "seconds: of all structures together, compiling included, by their number"
    )
    headings = ["atoms", "ΔE\nmeV/atom", "fmax\neV/Å", "moved\nÅ", "converged", "seconds"]
    cells_relax = any(r["cell_relaxed"] for r in records)
    if cells_relax:
        headings[2:2] = ["ΔV\n%"]
    committee = next((r["spread"]["members"] for r in records if r["spread"]), 0)
    if committee:
        headings[-2:-2] = ["± E\nmeV/atom", "± positions\nÅ"]
        caption += f";\n±: spread of {committee} models, of the final energy and positions"
    predicted = _table("predicted", headings, caption)
    predicted.add_column("flags", overflow="fold")
    for r in shown:
        cells = [
            r["name"],
            str(r["atoms"]),
            f"{1e3 * r['energy_change_per_atom']:+.1f}",
            f"{r['fmax_first']:.3f} → {r['fmax_last']:.3f}",
            f"{r['largest_displacement']:.3f}",
            "yes" if r["converged"] else "no",
            f"{r['seconds']:.2f}",
            ", ".join(f["name"] for f in r["flags"]),
        ]
        if cells_relax:
            before, after = r["volume_first"], r["volume_last"]
            known = r["cell_relaxed"] and before > 0
            cells[3:3] = [f"{100 * (after / before - 1):+.1f}" if known else "–"]
        if committee:
            s = r["spread"]
            shown_spread = ["–", "–"]
            if s is not None:
                shown_spread = [f"{1e3 * s['energy_per_atom']:.1f}", f"{s['positions']:.3f}"]
            cells[-3:-3] = shown_spread
        predicted.add_row(*map(escape, cells))
    if not refine:
        return [predicted]
    caption = (
        f"LBFGS to {fmax:g} eV/Å from the initial structure → from the prediction; wrong minimum: "
        f"the latter ends higher\nby more than {1e3 * WRONG_MINIMUM:g} meV/atom, and the former is kept"
    )
    headings = ["ionic\nsteps", "energy\neV", "seconds", "result"]
    refined = _table(f"refined with {refine}", headings, caption)
    for r in shown:
        refined.add_row(escape(r["name"]), *_refined_cells(r.get("refined")))
    return [predicted, refined]


def _table(title: str, headings: Sequence[str], caption: str) -> Table:
    result = Table(title=escape(title), caption=caption, box=box.SIMPLE_HEAD)
    result.title_justify = result.caption_justify = "left"
    result.add_column("structure", overflow="fold")
    for heading in headings:
        result.add_column(heading, justify="right", no_wrap=True)
    return result


def _refined_cells(refined: dict[str, Any] | None) -> list[str]:
    if refined is None:
        return ["–", "–", "–", "failed"]
    legs = refined["without_head_start"], refined["with_head_start"]
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
    """What the flags say, one line for all structures of which the same is said."""
    said: dict[str, list[str]] = {}
    for r in records:
        for flag in r["flags"]:
            said.setdefault(f"{flag['name']}: {flag['detail']}", []).append(r["name"])
    return [
        f"{names[0]}: {text}" if len(names) == 1 else f"{len(names)} structures: {text}"
        for text, names in said.items()
    ]


def totals(
    records: Sequence[dict[str, Any]], failed: int, seconds: float, refined: bool = False
) -> list[str]:
    """Closing lines: counts, time, and what the head start saved over all structures.

    Args:
      failed: failures, those to refine what was predicted among them. refined: whether that was
        asked for.
    """
    converged = sum(r["converged"] for r in records)
    flagged = sum(bool(r["flags"]) for r in records)
    unrefined = sum(refined and r.get("refined") is None for r in records)
    failed -= unrefined
    more = f"; {len(records) - MAX_ROWS} of them not shown (--json shows all)"
    lines = [
        f"{len(records)} relaxed in {seconds:.1f} s, {converged} converged, {flagged} flagged"
        + (f"; {unrefined} of them could not be refined" if unrefined else "")
        + (f"; {failed} failed" if failed else "")
        + (more if len(records) > MAX_ROWS else "")
    ]
    both = [r["refined"] for r in records if r.get("refined") is not None]
    known = [r for r in both if (leg := r["without_head_start"]) and leg["converged"]]
    if known:
        # Where the head start leads elsewhere or nowhere, the other relaxation is needed as well.
        good = [r for r in known if r["wrong_minimum"] is False]
        before = sum(r["without_head_start"]["steps"] for r in known)
        saved = sum(r["without_head_start"]["steps"] - r["with_head_start"]["steps"] for r in good)
        wrong = sum(r["wrong_minimum"] is True for r in known)
        nowhere = len(known) - len(good) - wrong
        lines.append(
            f"ionic steps: {before} without and {before - saved} with the head start "
            f"({100 * saved / before:+.0f} % saved, {len(known)} structures"
            + (", none where it fails or ends in a wrong minimum" if len(good) < len(known) else "")
            + f"); wrong minima: {wrong}"
            + (f"; failed or unconverged from the prediction: {nowhere}" if nowhere else "")
        )
    return lines
