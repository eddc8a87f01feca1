"""``relaxnet-jax benchmark steps``, from the parsed arguments to the exit code."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relaxnet_jax.benchmark import machine, starts, steps_report
from relaxnet_jax.benchmark.cases import find_cases
from relaxnet_jax.benchmark.ledger import Ledger
from relaxnet_jax.benchmark.oracles import load_oracle
from relaxnet_jax.benchmark.starts import INITIAL, Kind
from relaxnet_jax.benchmark.steps import Limits, run_steps
from relaxnet_jax.console import bar, note, result_console, say
from relaxnet_jax.data.files import atomic_path
from relaxnet_jax.data.generation.calculators import Calculator
from relaxnet_jax.errors import InputError
from relaxnet_jax.model import RelaxNet, load_model, member_folders

PACKAGES = (*machine.PACKAGES, "ase", "chgnet", "gpaw")


def benchmark_steps(args: argparse.Namespace) -> int:
    """Runs the relaxations, writes steps.csv, steps.md and steps.json, and prints the table.

    Raises:
      InputError: the arguments are wrong, or no initial structure could be relaxed.
    """
    _check(args)
    models = {name: getattr(args, name) for name in ("model", "egnn") if getattr(args, name)}
    loaded = {name: _load(folder) for name, folder in models.items()}
    every = [model for members, _ in loaded.values() for model in members.values()]
    variable = any(model.config.dynamics.cell == "variable" for model in every)
    oracle = load_oracle(args.oracle, variable, args.cutoff, args.kpoint_density)
    kinds = _kinds(args, loaded, variable)
    cases, failures = find_cases(args.structures, list(models.values()), variable, args.limit, note)
    for failure in failures:
        note(f"left out: {failure}")
    if variable and not any(case.relax_cell for case in cases):  # fixed cells need less
        oracle = load_oracle(args.oracle, False, args.cutoff, args.kpoint_density)
    folder = Path(args.out)
    ledger = Ledger(folder / "steps.jsonl")
    limits = Limits(args.fmax, args.max_steps, args.minutes)
    with bar("structures", len(cases)) as advance:
        rows = run_steps(cases, oracle, kinds, limits, ledger, note, advance)
    rows = steps_report.judged(rows, 1e-3 * args.wrong_minimum, args.wrong_minimum_whole)
    labels = {kind.key: kind.label for kind in (INITIAL, *kinds)}
    found = steps_report.summaries(rows, labels)
    files = [Path(args.json or folder / "steps.json"), folder / "steps.csv", folder / "steps.md"]
    caption = (
        f"LBFGS to {args.fmax:g} eV/Å with {oracle.source}: {' '.join(args.structures)}; wrong "
        f"minimum: ends higher by more than {args.wrong_minimum:g} meV/atom or "
        f"{args.wrong_minimum_whole:g} eV"
    )
    document = _facts(args, oracle, kinds) | {
        "left_out": [str(failure) for failure in failures],
        "summary": found,
        "rows": rows,
    }
    with atomic_path(files[0]) as temporary:
        text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False)
        temporary.write_text(text, encoding="utf-8")
    steps_report.write_rows(rows, files[1])
    steps_report.write_markdown(found, caption, files[2])
    result_console().print(steps_report.table(found, caption))
    for file in files:
        say(str(file))
    if not found[0]["n"]:
        raise InputError("benchmark steps: no initial structure was relaxed; see the reasons above")
    return 0


def _check(args: argparse.Namespace) -> None:
    for option in ("limit", "max_steps", "fmax", "wrong_minimum", "wrong_minimum_whole", "shaken"):
        value = getattr(args, option)
        if value is not None and not value > 0:
            raise InputError(f"--{option.replace('_', '-')} {value:g}: must be positive")
    if args.chgnet and args.oracle == "chgnet":
        raise InputError("--chgnet: CHGNet is already the oracle; omit it")


def _load(name: str) -> tuple[dict[str, RelaxNet], str]:
    paths = member_folders(name)
    return {str(path): load_model(path) for path in paths}, starts.model_identity(paths)


def _kinds(
    args: argparse.Namespace, loaded: dict[str, tuple[dict[str, RelaxNet], str]], variable: bool
) -> list[Kind]:
    """The starts asked for, besides the initial structure."""
    kinds = []
    if "model" in loaded:
        kinds.append(starts.predicted_start(*loaded["model"]))
    if "egnn" in loaded:
        members, identity = loaded["egnn"]
        if len(members) > 1:
            raise InputError(f"--egnn {args.egnn}: is a committee; give a single potential")
        (model,) = members.values()
        kinds.append(starts.minimised_start(model, identity, args.fmax, args.max_steps))
    if args.shaken is not None:
        kinds.append(starts.shaken_start(args.shaken))
    if args.chgnet:
        chgnet = load_oracle("chgnet", variable)
        kinds.append(starts.relaxed_start(chgnet, args.fmax, args.max_steps))
    return kinds


def _facts(args: argparse.Namespace, oracle: Calculator, kinds: Sequence[Kind]) -> dict[str, Any]:
    """Everything that the figures depend on."""
    return {
        "structures": args.structures,
        "limit": args.limit,
        "oracle": {"name": args.oracle, "source": oracle.source, "version": oracle.version},
        "fmax": args.fmax,
        "max_steps": args.max_steps,
        "wrong_minimum": 1e-3 * args.wrong_minimum,
        "wrong_minimum_whole": args.wrong_minimum_whole,
        "units": {
            "energy": "eV",
            "wrong_minimum": "eV/atom",
            "wrong_minimum_whole": "eV",
            "fmax": "eV/Å",
            "seconds": "s",
        },
        "starts": {k.key: {"label": k.label, "identity": k.identity} for k in kinds},
        "machine": machine.describe(PACKAGES),
    }
