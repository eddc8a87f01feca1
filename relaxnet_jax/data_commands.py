"""The commands ``relaxnet-jax data …``. None of them starts JAX.

Each takes the parsed arguments and returns an exit code.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relaxnet_jax.console import bar, lazy_bar, note, q, say, status
from relaxnet_jax.errors import InputError

if TYPE_CHECKING:
    from relaxnet_jax.data.importing import ImportReport


def _check_new(out: str | Path | None, overwrite: bool) -> None:
    """Raises InputError if a finished file or set of shards would be replaced without --overwrite.

    The functions that write replace existing files; the commands check first, because their users
    may not be aware of them.
    """
    if not out and overwrite:
        raise InputError("--overwrite: also give --out")
    if out and not overwrite and _finished(Path(out)):
        raise InputError(f"{out}: exists; give another --out, or --overwrite to replace it")


def _finished(out: Path) -> bool:
    """Whether there is a file, which appears only when it is complete, or a folder with all its shards."""
    from relaxnet_jax.data import TrajectoryStore

    if not out.is_dir():
        return out.exists()
    if not any(out.glob("[!.]*.h5")):
        return False
    try:
        with TrajectoryStore(out) as store:
            return not store.incomplete
    except InputError:  # whatever it is, it is not an unfinished import
        return True


def data_import(args: argparse.Namespace) -> int:
    """``relaxnet-jax data import``."""
    from relaxnet_jax.data import import_files, read_groups

    _check_new(args.out, args.overwrite)
    groups = read_groups(args.groups) if args.groups else None
    with lazy_bar("files") as progress:
        result = import_files(
            args.files,
            args.out,
            note,
            groups,
            args.energy,
            args.initial,
            jobs=args.jobs,
            scheduler=args.scheduler,
            shard_size=args.shard_size,
            progress=progress,
        )
    say(
        f"{args.out}: {result.read} relaxations with {result.frames} ionic steps; "
        f"{len(result.skipped)} skipped{_imperfect(result)}"
    )
    for file, name, reason in result.skipped:
        say(f"  skipped {file}{f', {name}' if name else ''}: {reason}")
    say(f"next: relaxnet-jax train --config explicit.py --set data.path={q(args.out)}")
    return 0


def _imperfect(result: ImportReport) -> str:
    """Part of the last line: counts of unfinished runs and of runs with unconverged ionic steps."""
    counts = {
        "unfinished, with their complete ionic steps": result.unfinished,
        "with electronically unconverged ionic steps": result.at_nelm,
    }
    return "".join(f"; {n} {what} (see their source)" for what, n in counts.items() if n)


def data_split(args: argparse.Namespace) -> int:
    """``relaxnet-jax data split``."""
    from relaxnet_jax.data import TrajectoryStore
    from relaxnet_jax.data.split_file import (
        FRACTIONS,
        By,
        folds_like,
        make_folds,
        same_splits,
        write_splits,
    )

    dealing = {"--folds": args.folds, "--fractions": args.fractions, "--seed": args.seed}
    if args.like and (given := [name for name, value in dealing.items() if value is not None]):
        raise InputError(f"--like: makes no random split; leave out {', '.join(given)}")
    by: By = args.by or ("formula" if args.like else "group")

    source = Path(args.store)
    out = Path(args.out or source.with_name(f"{source.stem}.splits.json"))
    with TrajectoryStore(source) as store:
        facts: dict[str, Any] = {"set": store.checksum, "by": by}
        if args.like:
            with TrajectoryStore(args.like[0]) as other:
                folds = folds_like(store, other, args.like[1], by)
                facts["like"] = other.checksum
        else:
            facts["seed"] = seed = args.seed or 0
            fractions = tuple(args.fractions or FRACTIONS)
            folds = make_folds(store, 1 if args.folds is None else args.folds, by, fractions, seed)
        if not same_splits(out, store.ids, folds, facts):
            _check_new(out, args.overwrite)
            write_splits(out, store.ids, folds, facts)
    for k, fold in enumerate(folds):
        sizes = ", ".join(f"{len(rows)} {name}" for name, rows in fold._asdict().items())
        say(f"fold {k}: {sizes}")
    say(f"{out}: {len(folds)} fold(s) by {by}")
    say(
        f"next: relaxnet-jax train --config explicit.py --set data.path={q(source)} "
        f"data.split_file={q(out)}" + (" data.fold=0" if len(folds) > 1 else "")
    )
    return 0


def data_jarvis(args: argparse.Namespace) -> int:
    """``relaxnet-jax data jarvis``."""
    from relaxnet_jax.data.jarvis import fetch_jarvis, read_ids

    _check_new(args.out, args.overwrite)
    ids = read_ids(args.ids) if args.ids is not None else None
    result = fetch_jarvis(
        args.out,
        ids,
        args.limit,
        args.downloads,
        args.index,
        args.category,
        note,
        jobs=args.jobs,
        scheduler=args.scheduler,
    )
    say(
        f"{args.out}: {result.imported.read} relaxations with {result.imported.frames} ionic steps; "
        f"{result.came} archives fetched, {len(result.failed)} failed, {len(result.skipped)} skipped; "
        f"{len(result.imported.skipped)} relaxations not read{_imperfect(result.imported)}"
    )
    say(f"status of each archive: {result.manifest}")
    if result.failed:
        say("to fetch those that failed, rerun the same command with --overwrite")
    say(f"next: relaxnet-jax train --config explicit.py --set data.path={q(args.out)}")
    return 0


def data_info(args: argparse.Namespace) -> int:
    """``relaxnet-jax data info``."""
    from relaxnet_jax.data import TrajectoryStore
    from relaxnet_jax.data.quality.statistics import summarise, summary_lines

    with TrajectoryStore(args.store) as store, bar("relaxations", len(store)) as advance:
        summary = summarise(store, advance)
    if args.figure:
        from relaxnet_jax.evaluate.data_figure import distribution_figure

        caption = f"{Path(args.store).name}: {summary.relaxations} relaxations"
        distribution_figure(summary, args.figure, caption)
        note(f"figure: {args.figure}")
    if args.json:
        say(json.dumps(summary.to_dict(), indent=1, ensure_ascii=False))
    else:
        for line in (f"{args.store}:", *summary_lines(summary)):
            say(line)
    return 0


def data_check(args: argparse.Namespace) -> int:
    """``relaxnet-jax data check``."""
    from relaxnet_jax.data import TrajectoryStore
    from relaxnet_jax.data.quality.checks import Limits, check_store, report_lines, write_clean
    from relaxnet_jax.data.quality.reasons import chosen

    if bool(args.out) != bool(args.drop):
        missing = "--drop all, or the reasons to drop" if args.out else "--out CLEAN.h5"
        raise InputError(f"--{'out' if args.out else 'drop'}: also give {missing}")
    _check_new(args.out, args.overwrite)
    reasons = chosen(args.drop)
    names = ("max_force", "max_energy_change", "converged", "energy_deviations")
    limits = Limits(**{name: getattr(args, name) for name in (*names, "charge_deviations")})
    with TrajectoryStore(args.store) as store:
        with bar("relaxations", len(store)) as advance:
            report = check_store(store, limits, advance)
        written = write_clean(store, report, reasons, args.out) if args.out else None
    if args.json:
        result = report.to_dict() | {"limits": dataclasses.asdict(limits)}
        if written:
            result |= {"out": args.out, "written": written[0], "dropped": written[1]}
        say(json.dumps(result, indent=1, ensure_ascii=False))
        return 0
    for line in (f"{args.store}:", *report_lines(report)):
        say(line)
    if written:
        why = ", ".join(args.drop)
        say(f"{args.out}: {written[0]} relaxations written, {written[1]} dropped for {why}")
    return 0


def data_emt(args: argparse.Namespace) -> int:
    """``relaxnet-jax data emt``."""
    from relaxnet_jax.data import TrajectoryStore, default_dataset, emt_relaxations, write_store

    if args.n < 1:
        raise InputError(f"--n {args.n}: give 1 or more relaxations")
    _check_new(args.out, args.overwrite)
    if args.out:
        metadata = {"generator": "emt", "n": args.n, "seed": args.seed}
        with bar("EMT relaxations", args.n) as advance:
            made = emt_relaxations(args.n, args.seed, lambda done, _: advance(done))
            write_store(args.out, made, metadata=metadata)
        path = Path(args.out)
    else:
        with status("EMT relaxations…"):
            path = default_dataset(args.n, args.seed, note)
    with TrajectoryStore(path) as store:
        say(f"{path}: {len(store)} relaxations with {store.n_frames.sum()} ionic steps")
    change = f"data.n_emt={args.n}" if args.n != 600 else ""
    if args.out or args.seed:
        change = f"data.path={q(path)}"
    say("next: relaxnet-jax train --config explicit.py" + (f" --set {change}" if change else ""))
    return 0


def data_generate(args: argparse.Namespace) -> int:
    """``relaxnet-jax data generate``."""
    from relaxnet_jax.data.generation import Settings, generate_set, standing

    names = [field.name for field in dataclasses.fields(Settings)]
    values = {name: getattr(args, name) for name in names}
    values |= {name: tuple(values[name]) for name in ("rattle", "supercell")}
    settings = Settings(**values)
    following = f"next: relaxnet-jax train --config explicit.py --set data.path={q(args.out)}"
    if not args.overwrite:
        found = standing(args.out, args.structures, args.n, settings)
        if found == "complete":
            say(
                f"{args.out}: already complete, made by this same command; --overwrite makes it again"
            )
            say(following)
            return 0
        if found == "other":
            _check_new(args.out, args.overwrite)
    with bar("relaxations", args.n) as advance:
        result = generate_set(
            args.structures,
            args.n,
            args.out,
            settings,
            jobs=args.jobs,
            scheduler=args.scheduler,
            progress=advance,
            report=note,
        )
    say(f"{args.out}: {result.made} relaxations with {result.frames} ionic steps")
    if result.unconverged:
        say(f"  {result.unconverged} of them not converged (marked in their source)")
    kinds = collections.Counter(reason.partition(":")[0] for _, reason in result.refused)
    for kind, count in kinds.most_common():
        say(f"  {count} structures refused: {kind}")
    for kind, count in result.failed.items():
        say(f"  {count} attempts failed: {kind}")
    for name, reason in result.lost:
        say(f"  left out {name}: {reason}")
    for indices, reason in result.broken:
        say(f"  missing {indices}: {reason}; run the command again to retry them")
    say(following)
    return 0
