"""Which runs a report needs, which of them exist, and how long the others may take."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from relaxnet_jax.data.files import atomic_path
from relaxnet_jax.errors import InputError
from relaxnet_jax.reproduce.budget import divide
from relaxnet_jax.reproduce.runs import Run, State, folder_of, read_epochs, read_facts, state_of


@dataclasses.dataclass(frozen=True)
class Entry:
    """A run of a plan.

    Attributes:
      run: the training run.
      needed_by: names of the experiments that need it.
      state: whether it is missing, interrupted or finished.
      minutes: time it took if finished, otherwise the total time it may take; None if it has not
        been given any.
      left: how much of this remains; 0 for finished runs and where ``minutes`` is None.
    """

    run: Run
    needed_by: tuple[str, ...]
    state: State
    minutes: float | None
    left: float = 0.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """All runs, each once, in the order in which the experiments ask for them."""

    entries: tuple[Entry, ...]

    @property
    def left(self) -> list[Entry]:
        """The entries that are not finished."""
        return [e for e in self.entries if e.state != "finished"]

    def table(self) -> Table:
        """The plan as a table for the terminal."""
        table = Table(box=box.SIMPLE_HEAD)
        for name in ("run", "for", "state"):
            table.add_column(name)
        for name in ("relaxations", "weight", "minutes"):
            table.add_column(name, justify="right")
        for e in self.entries:
            minutes = "–" if e.minutes is None else f"{e.minutes:.2f}"
            weight, count = f"{e.run.weight:.2f}", str(e.run.relaxations)
            table.add_row(e.run.name, " ".join(e.needed_by), e.state, count, weight, minutes)
        return table


def make_plan(
    needs: Mapping[str, Sequence[Run]], out: Path, budget: float | None, identity: Any
) -> Plan:
    """Divides a budget among the missing runs.

    An interrupted run keeps the time it was given; what remains of it is deducted from the budget.

    Args:
      needs: runs by experiment.
      out: the report's folder.
      budget: minutes; None if not known yet.
      identity: identity of the command, in JSON types; the same command, given again, continues
        with the same division.

    Raises:
      InputError: interrupted runs take up the whole budget, so that none is left for missing ones.
    """
    runs: dict[str, Run] = {}
    needed_by: dict[str, list[str]] = {}
    for experiment, wanted in needs.items():
        for run in wanted:
            runs.setdefault(run.digest, run)
            names = needed_by.setdefault(run.digest, [])
            if experiment not in names:
                names.append(experiment)
    states = {digest: state_of(folder_of(out, run)) for digest, run in runs.items()}
    given = {digest: _given(folder_of(out, run)) for digest, run in runs.items()}
    if budget is not None:
        given |= _divided(runs, states, given, out, budget, identity)
    entries = []
    for digest, run in runs.items():
        minutes, left = given[digest], given[digest] or 0.0
        if states[digest] == "finished":
            minutes, left = read_facts(folder_of(out, run))["minutes"], 0.0
        elif states[digest] == "interrupted":
            left = max(left - _spent(folder_of(out, run)), 0.0)
        entries.append(Entry(run, tuple(needed_by[digest]), states[digest], minutes, left))
    return Plan(tuple(entries))


def _divided(
    runs: dict[str, Run],
    states: dict[str, State],
    given: dict[str, float | None],
    out: Path,
    budget: float,
    identity: Any,
) -> dict[str, float | None]:
    """Minutes for the missing runs."""
    missing = [digest for digest, state in states.items() if state == "missing"]
    before = _read(out)
    if before.get("command") == identity and all(d in before["minutes"] for d in missing):
        return {d: before["minutes"][d] for d in missing}
    for digest, state in states.items():
        if state == "interrupted" and (promised := given[digest]) is not None:
            budget -= max(promised - _spent(folder_of(out, runs[digest])), 0.0)
    if not missing:
        return {}
    if budget <= 0:
        raise InputError(
            "--budget: used up by interrupted runs, which keep their time; give more minutes"
        )
    return dict(divide(budget, {d: runs[d].weight for d in missing}))


def keep_plan(plan: Plan, out: Path, identity: Any) -> None:
    """Stores the division, in case the same command is given again."""
    minutes = {e.run.digest: e.minutes for e in plan.entries}
    before = _read(out)
    if before.get("command") == identity:
        minutes = before["minutes"] | minutes
    with atomic_path(out / "plan.json") as temporary:
        temporary.write_text(json.dumps({"command": identity, "minutes": minutes}, indent=1))


def _read(out: Path) -> dict[str, Any]:
    try:
        found = json.loads((out / "plan.json").read_text())
        return found if {"command", "minutes"} <= set(found) else {}
    except (OSError, ValueError):
        return {}


def _spent(folder: Path) -> float:
    """Minutes that an interrupted run has taken, counting whole epochs only."""
    try:
        return max((r["seconds"] / 60 for r in read_epochs(folder)), default=0.0)
    except FileNotFoundError:  # interrupted within its first epoch
        return 0.0


def _given(folder: Path) -> float | None:
    """The time limit of an interrupted run; None if it cannot be read."""
    try:
        return float(json.loads((folder / "config.json").read_text())["train"]["max_minutes"])
    except (OSError, ValueError, KeyError):
        return None
