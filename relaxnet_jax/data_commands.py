"""What the commands ``relaxnet-jax data …`` do. Each takes the parsed arguments and returns an
exit code. None of them starts JAX.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from relaxnet_jax.console import bar, note, q, say, status
from relaxnet_jax.errors import InputError


def data_import(args: argparse.Namespace) -> int:
    """``relaxnet-jax data import``."""
    from relaxnet_jax.data import import_files, read_groups

    groups = read_groups(args.groups) if args.groups else None
    result = import_files(args.files, args.out, note, groups, args.energy)
    say(
        f"{args.out}: {result.read} relaxations with {result.frames} ionic steps; "
        f"{len(result.skipped)} skipped"
    )
    for file, name, reason in result.skipped:
        say(f"  skipped {file}{f', {name}' if name else ''}: {reason}")
    say(f"next: relaxnet-jax train --config explicit.py --set data.path={q(args.out)}")
    return 0


def data_split(args: argparse.Namespace) -> int:
    """``relaxnet-jax data split``."""
    from relaxnet_jax.data import TrajectoryStore
    from relaxnet_jax.data.split_file import make_folds, write_splits

    source = Path(args.store)
    out = Path(args.out or source.with_name(f"{source.stem}.splits.json"))
    with TrajectoryStore(source) as store:
        folds = make_folds(store, args.folds, args.by, tuple(args.fractions), args.seed)
        facts = {"set": store.checksum, "by": args.by, "seed": args.seed}
        write_splits(out, store.ids, folds, facts)
    for k, fold in enumerate(folds):
        sizes = ", ".join(f"{len(rows)} {name}" for name, rows in fold._asdict().items())
        say(f"fold {k}: {sizes}")
    say(f"{out}: {len(folds)} fold(s) by {args.by}")
    say(
        f"next: relaxnet-jax train --config explicit.py --set data.path={q(source)} "
        f"data.split_file={q(out)}" + (" data.fold=0" if len(folds) > 1 else "")
    )
    return 0


def data_jarvis(args: argparse.Namespace) -> int:
    """``relaxnet-jax data jarvis``."""
    from relaxnet_jax.data.jarvis import fetch_jarvis, read_ids

    ids = read_ids(args.ids) if args.ids is not None else None
    result = fetch_jarvis(
        args.out, ids, args.limit, args.downloads, args.index, args.category, note
    )
    say(
        f"{args.out}: {result.imported.read} relaxations with {result.imported.frames} ionic "
        f"steps; {result.came} archives came, {len(result.failed)} failed, "
        f"{len(result.skipped)} skipped; {len(result.imported.skipped)} relaxations not read"
    )
    say(f"of each archive: {result.manifest}")
    if result.failed:
        say("the same command again fetches those that failed")
    say(f"next: relaxnet-jax train --config explicit.py --set data.path={q(args.out)}")
    return 0


def data_emt(args: argparse.Namespace) -> int:
    """``relaxnet-jax data emt``."""
    from relaxnet_jax.data import TrajectoryStore, default_dataset, emt_relaxations, write_store

    if args.n < 1:
        raise InputError(f"--n {args.n}: give 1 or more relaxations")
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
