"""``relaxnet-jax benchmark steps``: ionic steps that an oracle needs from different starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from relaxnet_jax.benchmark.cases import Case
from relaxnet_jax.benchmark.ledger import Ledger, fingerprint
from relaxnet_jax.benchmark.starts import INITIAL, Kind, Start
from relaxnet_jax.data.generation.calculators import Calculator
from relaxnet_jax.errors import InputError
from relaxnet_jax.relaxation.refine import descend

CONVERGED, UNCONVERGED = "converged", "not converged"
FAILED, NO_START, SKIPPED = "failed", "no start", "skipped"
NO_OTHER = "no other start"  # so there is no reason to relax the initial structure


class Limits(NamedTuple):
    """When relaxations stop.

    Attributes:
      fmax: eV/Å.
      max_steps: largest number of LBFGS steps of each relaxation.
      minutes: time after which no relaxation begins; None for no limit.
    """

    fmax: float = 0.05
    max_steps: int = 500
    minutes: float | None = None


def run_steps(
    cases: Sequence[Case],
    oracle: Calculator,
    kinds: Sequence[Kind],
    limits: Limits,
    ledger: Ledger,
    report: Callable[[str], None] = lambda _: None,
    progress: Callable[[int], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Relaxes every structure with the oracle from its initial state and from every other start.

    Relaxations that the ledger has for the same structure, start, oracle and limits are not run again;
    those that failed are tried again. A structure without any other start is not relaxed at all.

    Args:
      cases: the structures.
      oracle: the calculator whose steps are counted.
      kinds: the starts besides the initial structure; may be empty.
      limits: when relaxations stop.
      ledger: where results are kept.
      report: called with one line for each remark.
      progress: called with the number of structures done.

    Returns:
      One row per structure and start, the initial one first, with the keys
      structure, formula, atoms, cell ("fixed" or "variable"), start;
      status: `CONVERGED`, `UNCONVERGED` (after ``max_steps``), `FAILED` (the oracle did), `NO_START` or
        `SKIPPED` (no other start, or no time left);
      steps (ionic, see `refine.Leg`), seconds, energy (eV), fmax (eV/Å): None if there are none;
      start_seconds: time to find the start;
      remark.
    """
    end = None if limits.minutes is None else time.monotonic() + 60 * limits.minutes
    every = (INITIAL, *kinds)
    keys = {
        (case.name, kind.key): _key(case, kind, oracle, limits) for case in cases for kind in every
    }
    late = {kind.key for kind in kinds if kind.one_by_one}
    starts: dict[tuple[str, str], Start] = {}
    for kind in kinds:  # models predict in batches; other calculators wait for the structure's turn
        wanted = [c for c in cases if ledger.get(keys[c.name, kind.key]) is None]
        if wanted and kind.key not in late:
            report(f"{kind.label}: {len(wanted)} structures")
            starts |= {(c.name, kind.key): s for c, s in zip(wanted, kind.find(wanted))}
    rows = []
    for done, case in enumerate(cases, 1):
        own: list[dict[str, Any]] = []
        for kind in (*kinds, INITIAL):
            kept = ledger.get(keys[case.name, kind.key])
            if kept is not None:
                own.append(kept)
            elif end is not None and time.monotonic() > end:
                own.append(_row(case, kind, SKIPPED, remark="no time left"))
            elif kind is INITIAL and kinds and all(r["status"] == NO_START for r in own):
                own.append(_row(case, kind, SKIPPED, remark=NO_OTHER))
            else:
                start = starts.get((case.name, kind.key)) or kind.find([case])[0]
                own.append(_leg(case, kind, start, oracle, limits))
                if own[-1]["status"] in (CONVERGED, UNCONVERGED):
                    ledger.put(keys[case.name, kind.key], own[-1])
            if own[-1]["status"] != CONVERGED:
                report(f"{case.name}, {kind.label}: {own[-1]['status']}: {own[-1]['remark']}")
        rows += [own[-1], *own[:-1]]
        progress(done)
    return rows


def _leg(
    case: Case, kind: Kind, start: Start, oracle: Calculator, limits: Limits
) -> dict[str, Any]:
    """The row of one relaxation."""
    given = {"start_seconds": start.seconds, "remark": start.remark}
    if start.atoms is None:
        return _row(case, kind, NO_START, **given)
    try:
        leg = descend(start.atoms, oracle, limits.fmax, limits.max_steps, case.relax_cell)
    except InputError as error:
        return _row(case, kind, FAILED, **(given | {"remark": str(error)}))
    values = {"steps": leg.steps, "seconds": leg.seconds, "energy": leg.energy, "fmax": leg.fmax}
    if not leg.converged:
        given["remark"] = f"fmax {leg.fmax:.3f} eV/Å after {leg.steps} steps"
    return _row(case, kind, CONVERGED if leg.converged else UNCONVERGED, **values, **given)


def _row(case: Case, kind: Kind, status: str, **values: Any) -> dict[str, Any]:
    return {
        "structure": case.name,
        "formula": case.atoms.get_chemical_formula(empirical=True),
        "atoms": len(case.atoms),
        "cell": "variable" if case.relax_cell else "fixed",
        "start": kind.key,
        "status": status,
        "steps": None,
        "seconds": None,
        "energy": None,
        "fmax": None,
        "start_seconds": 0.0,
        "remark": "",
    } | values


def _key(case: Case, kind: Kind, oracle: Calculator, limits: Limits) -> str:
    atoms = case.atoms
    facts = {
        "name": case.name,
        "numbers": atoms.numbers,
        "positions": atoms.positions,
        "cell": atoms.cell.array,
        "pbc": atoms.pbc,
        "charges": atoms.get_initial_charges(),
        "constraints": [constraint.todict() for constraint in atoms.constraints],
        "relax_cell": case.relax_cell,
        "start": (kind.key, kind.identity),
        "oracle": (oracle.label, oracle.version),
        "limits": (limits.fmax, limits.max_steps),
    }
    return fingerprint(facts)
