"""``relaxnet-jax reproduce``, from the parsed arguments to the exit code."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from relaxnet_jax.console import note, result_console, say
from relaxnet_jax.data.files import held
from relaxnet_jax.errors import InputError
from relaxnet_jax.runtime import check_devices, enable_compilation_cache

if TYPE_CHECKING:
    from relaxnet_jax.data.generation.calculators import Calculator

SOME_FAILED, TERMINATED = 1, 143
TABLE_WIDTH = 120  # least width of the plan's table, also without a terminal


def reproduce(args: argparse.Namespace) -> int:
    """Plans, trains, predicts, writes sections and REPORT.md; see ``relaxnet-jax reproduce --help``.

    Raises:
      InputError: wrong arguments or unusable data; no budget although runs are missing.
    """
    _check(args)
    enable_compilation_cache()
    check_devices(None)
    _check_jobs(args.jobs)
    from relaxnet_jax.reproduce.budget import RULE, clock
    from relaxnet_jax.reproduce.plan import keep_plan, make_plan
    from relaxnet_jax.reproduce.registry import EXPERIMENTS
    from relaxnet_jax.reproduce.report import REPORT, write_report, write_section
    from relaxnet_jax.reproduce.setting import Setting
    from relaxnet_jax.reproduce.training import StoppedError
    from relaxnet_jax.reproduce.workers import train_side_by_side

    out = Path(args.out)
    names = [n for n in EXPERIMENTS if n in args.experiments or "all" in args.experiments]
    setting = Setting(
        args.data,
        out,
        tuple(args.seeds),
        _sources(args.config),
        tuple(args.set),
        args.folds,
        _reference(args.reference),
    )
    needs = {}
    for name in names:
        try:
            needs[name] = EXPERIMENTS[name].runs(setting)
        except InputError:  # reported by its section; the others continue
            if len(names) == 1:
                raise
    identity = [names, args.budget, args.jobs, list(setting.seeds)]
    budget = args.budget and args.budget * args.jobs
    plan = make_plan(needs, out, budget, identity)
    if budget and (span := clock([e.left for e in plan.left], args.jobs)) > args.budget:
        # Runs of different lengths leave cores idle towards the end: scale the budget to fit.
        plan = make_plan(needs, out, budget * args.budget / span, identity)
    if plan.entries:
        console = result_console()
        console.width = max(console.width, TABLE_WIDTH)
        console.print(plan.table())
    minutes = clock([e.left for e in plan.left], args.jobs)
    say(
        f"{len(plan.entries)} runs, {len(plan.left)} to train"
        + (f": {minutes:.1f} min of training, excluding predictions" if args.budget else "")
    )
    note(RULE)
    if args.plan:
        return 0
    if plan.left and args.budget is None:
        raise InputError(
            f"--budget: {len(plan.left)} runs to train; give the wall time in minutes for all of them"
        )
    command = shlex.join(["relaxnet-jax", *args.argv])
    with held(out, "reproduce", "--out"):
        keep_plan(plan, out, identity)
        try:
            if args.jobs > 1:  # what fails here is retried, alone, by its section
                setting.write_shares((e.run for e in plan.left), note)
                train_side_by_side(plan.left, out, args.jobs, note)
            failed = 0
            for name in names:
                failed += not write_section(EXPERIMENTS[name], setting, plan, command)
        except (StoppedError, KeyboardInterrupt) as stop:
            note("stopped; run the same command again to resume")
            if isinstance(stop, KeyboardInterrupt):
                raise
            return TERMINATED
        if len(names) > 1 or (out / REPORT).is_file():
            say(str(write_report(setting, EXPERIMENTS, command)))
    return SOME_FAILED if failed else 0


def _check(args: argparse.Namespace) -> None:
    if args.budget is not None and not args.budget > 0:
        raise InputError(f"--budget {args.budget:g}: must be positive (minutes)")
    if len(set(args.seeds)) != len(args.seeds) or min(args.seeds) < 0:
        raise InputError("--seeds: give distinct non-negative integers")
    if args.jobs < 1:
        raise InputError(f"--jobs {args.jobs}: give at least 1")
    if args.folds < 2:
        raise InputError(f"--folds {args.folds}: give at least 2")


def _check_jobs(jobs: int) -> None:
    import jax

    from relaxnet_jax.reproduce.workers import core_shares

    if jobs > 1 and (platform := jax.devices()[0].platform) != "cpu":
        raise InputError(
            f"--jobs {jobs}: only for CPUs; a {platform} trains one run at a time; omit it"
        )
    core_shares(jobs)


def _reference(name: str | None) -> Calculator | None:
    """The calculator named by ``--reference``, if any."""
    if name is None:
        return None
    from relaxnet_jax.data.generation.calculators import check_calculator

    return check_calculator(name, relax_cell=False, option="--reference")


def _sources(items: list[str]) -> dict[str, str]:
    """Config file by role, from "ROLE=FILE" items."""
    from relaxnet_jax.config import find_config
    from relaxnet_jax.reproduce.setting import ROLES

    found = {}
    for item in items:
        role, _, file = item.partition("=")
        if role not in ROLES or not file:
            raise InputError(
                f"--config {item!r}: give NAME=FILE, where NAME is one of {', '.join(ROLES)}"
            )
        # Checked now: a role that cannot be trained may be left out later, a misspelt file may not.
        found[role] = str(find_config(file))
    return found
