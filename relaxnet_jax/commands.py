"""The commands of `cli`. Each takes the parsed arguments and returns an exit code.

Results go to stdout, progress and remarks to stderr. Imports that start JAX are inside the
functions, after `runtime.enable_compilation_cache`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from relaxnet_jax.config import (
    PRETRAINED,
    Config,
    from_json,
    load_config,
    parse_override,
    to_dict,
    to_json,
)
from relaxnet_jax.console import COMPILING, bar, note, q, result_console, say, status
from relaxnet_jax.errors import InputError
from relaxnet_jax.runtime import (
    batch_shares,
    check_devices,
    enable_compilation_cache,
    share_cores,
)

SOME_LEFT_OUT = 1
TERMINATED = 143  # the shell's exit code of a process ended by SIGTERM

if TYPE_CHECKING:
    from relaxnet_jax.data.trajectory import RelaxationTrajectory
    from relaxnet_jax.model import RelaxNet


def train(args: argparse.Namespace) -> int:
    """``relaxnet-jax train``."""
    config, workdir = _run_of(args)
    enable_compilation_cache()
    from relaxnet_jax.train.hosts import find_place, joined

    place = find_place(args.coordinator, args.processes, args.process_id)
    first = place is None or place.index == 0
    again = f"continue with: relaxnet-jax train --resume --workdir {q(workdir)}"
    with joined(place, args.join_seconds):
        if place is None:
            shares = batch_shares(config, args.devices)
        else:
            shares = 1
            check_devices(args.devices)
        from relaxnet_jax.train.checkpoint import has_checkpoint
        from relaxnet_jax.train.loop import train as run

        try:
            result = run(config, workdir, resume=args.resume, devices=args.devices, shares=shares)
        except KeyboardInterrupt:
            if first and has_checkpoint(workdir):
                note(f"\nstopped; {again}")
            raise
    if result.stopped:
        if first:
            note(f"stopped; {again}")
        return TERMINATED
    if first:
        say(f"next: relaxnet-jax eval --workdir {q(workdir)}")
    return 0


def _run_of(args: argparse.Namespace) -> tuple[Config, Path]:
    """Config and workdir of a training run: as given, or the run's own with --resume."""
    if args.config:
        config = load_config(args.config, args.set)
        return config, Path(args.workdir or Path("runs", config.name))
    if not args.resume:
        raise InputError(
            "train: which config? give --config explicit.py, or --resume --workdir "
            "DIR to continue a run"
        )
    if not args.workdir:
        raise InputError("train --resume: which run? give --workdir DIR")
    file = Path(args.workdir, "config.json")
    if not file.is_file():
        raise InputError(
            f"{args.workdir}: holds no run to resume (config.json is missing); start "
            "one with --config explicit.py instead of --resume"
        )
    return load_config(to_dict(from_json(file.read_text(), str(file))), args.set), file.parent


def evaluate(args: argparse.Namespace) -> int:
    """``relaxnet-jax eval``."""
    enable_compilation_cache()
    share_cores()
    from relaxnet_jax.evaluate.run import (
        evaluate_workdir,
        mean_evaluation,
        model_of,
        write_evaluation,
    )
    from relaxnet_jax.evaluate.tables import metrics_table
    from relaxnet_jax.lbfgs import FMAX

    if args.fmax is not None and not args.fmax > 0:
        raise InputError(f"--fmax {args.fmax:g}: give a force in eV/Å, above 0")
    moved = _moved(args)
    if moved is not None and args.data is not None:
        raise InputError(
            "--set data.path: applies only to the run's own data; leave it out with --data"
        )
    named = [args.workdir, *args.committee]
    if PRETRAINED in named and args.data is None:
        raise InputError(
            f"{PRETRAINED}: does not include its training data; give relaxations with --data FILE"
        )
    runs = [run for name in named for run in _runs_of(name)]
    fmax = FMAX if args.lbfgs and args.fmax is None else args.fmax
    models = [model_of(run) for run in runs]
    if len(runs) > 1:
        from relaxnet_jax.committee import check_members

        check_members(models)
        if args.lbfgs or (fmax is not None and models[0].config.dynamics.latent != "static"):
            option = "--lbfgs" if args.lbfgs else "--fmax"
            raise InputError(f"{option}: cannot be used with several models; leave it out")
    with status("predicting…"):
        members = [
            evaluate_workdir(run, args.split, args.data, note, fmax, model, moved)
            for run, model in zip(runs, models)
        ]
    result = members[0]
    what = Path(args.data).stem if args.data else args.split
    committee = "-committee" if len(runs) > 1 else ""
    out = Path(args.out or Path(args.workdir, f"eval-{what}{committee}"))
    console = result_console()
    if committee:
        result = mean_evaluation(members)
    console.print(metrics_table(result.results, result.name, result.costs))
    files = write_evaluation(result, out, note)
    if committee:
        from relaxnet_jax import calibration

        try:
            errors = calibration.committee_errors([m.comparisons for m in members])
        except InputError as error:  # the table is valid without it
            note(f"no calibration: {error}")
            calibration.remove_calibration(out)
        else:
            found = calibration.calibrate(errors)
            console.print(calibration.calibration_table(found, len(members)))
            files += calibration.write_calibration(errors, found, runs, out)
    for file in files:
        say(str(file))
    command = "relax" if committee else "predict"
    say(f"next: relaxnet-jax {command} FILE {' '.join(f'--model {q(name)}' for name in named)}")
    return 0


def _moved(args: argparse.Namespace) -> str | None:
    """Current path of a run's data: data.path from ``--set``, which accepts nothing else here."""
    given = dict(map(parse_override, args.set))
    if other := ", ".join(given.keys() - {"data.path"}):
        raise InputError(
            f"--set {other}: the settings of a trained run are fixed; only data.path may be set, to the "
            "current location of its data"
        )
    return str(given["data.path"]) if given else None


def _runs_of(name: str) -> list[str]:
    from relaxnet_jax.model import member_folders

    return [str(folder) for folder in member_folders(name)] if name == PRETRAINED else [name]


def predict(args: argparse.Namespace) -> int:
    """``relaxnet-jax predict``."""
    if args.frames < 2:
        raise InputError(f"--frames {args.frames}: give at least 2, the first and the last")
    source = Path(args.file)
    if source.is_dir():
        raise InputError(f"{source}: is a folder; give a file, or use relaxnet-jax relax")
    if not source.is_file():
        raise InputError(f"{source}: no such file; check the path")
    enable_compilation_cache()
    from relaxnet_jax import structure_files as files
    from relaxnet_jax.committee import predict_members
    from relaxnet_jax.relaxation.inputs import distinct_stems

    out = Path(args.out or f"{distinct_stems([source])[0]}-path.extxyz")
    files.check_output(out, source)
    if out.exists() and not args.overwrite:
        raise InputError(f"{out}: exists; give another --out, or --overwrite")
    options = files.Options(relax_cell=not args.keep_cell)
    share_cores()
    models = _load_members(args.model)
    found, unreadable = files.read_structures(source, note)
    if len(found) > 1 and not files.holds_many(out):
        raise InputError(
            f"{out}: can hold only one structure, {source} has {len(found)}; write .extxyz"
        )
    with bar("structures", len(found), COMPILING) as advance:
        predicted, failed = predict_members(models, found, args.frames, advance, options)
    results, useless = files.sorted_out(predicted)
    left_out = unreadable + failed + useless
    for failure in (*failed, *useless):
        if results or failure is not left_out[0]:  # else the error below reports it
            note(f"left out: {failure}")
    if not results:
        more = f" (and {len(left_out) - 1} more left out)" if len(left_out) > 1 else ""
        raise InputError(f"{source}: no structure could be predicted: {left_out[0]}{more}")
    files.write_trajectories([result.path for result in results], out)
    for result in results[:20]:
        say(files.summary(result.path, result.flags))
    if len(results) > 20:
        say(f"… and {len(results) - 20} more")
    what = f"{len(results)} trajectories of {args.frames} frames"
    say(
        f"{out}: {what if files.holds_many(out) else 'the final frame'}"
        + (f"; {len(left_out)} structures left out" if left_out else "")
    )
    return SOME_LEFT_OUT if left_out else 0


def relax(args: argparse.Namespace) -> int:
    """``relaxnet-jax relax``."""
    from relaxnet_jax.relaxation.command import relax as run

    return run(args, _load_members)


def info(args: argparse.Namespace) -> int:
    """``relaxnet-jax info``."""
    import json

    from relaxnet_jax.model import load_model, member_folders
    from relaxnet_jax.model_facts import facts

    for folder in member_folders(args.model):
        config = load_model(folder).config  # raises if anything is missing or damaged
        say(str(folder))
        told = facts(config, json.loads((folder / "model.json").read_text(encoding="utf-8")))
        width = max(map(len, told))
        for name, text in told.items():
            say(f"  {name:{width}}  {text}")
    return 0


def config(args: argparse.Namespace) -> int:
    """``relaxnet-jax config``: a complete configuration, as in a run's config.json."""
    say(to_json(load_config(args.config, args.set)))
    return 0


def reproduce(args: argparse.Namespace) -> int:
    """``relaxnet-jax reproduce``."""
    from relaxnet_jax.reproduce.command import reproduce as run

    return run(args)


def demo(args: argparse.Namespace) -> int:
    """``relaxnet-jax demo``: the test relaxation of median displacement, predicted and true."""
    enable_compilation_cache()
    check_devices(None)
    from relaxnet_jax import structure_files as files
    from relaxnet_jax.committee import predict_members
    from relaxnet_jax.data.sample import driftless
    from relaxnet_jax.evaluate.figures import trajectory_figure
    from relaxnet_jax.evaluate.run_data import relaxations_of_run
    from relaxnet_jax.model import load_model

    out = Path(args.out or Path(args.workdir, "demo"))
    model = load_model(args.workdir)
    found, _ = relaxations_of_run(Path(args.workdir), "test", model.config, note, _moved(args))
    name = found.name
    usable = [t for t in found if set(t.atomic_numbers.tolist()) <= set(model.elements)]
    if not usable:
        raise InputError(
            f"{name}: no test relaxation has only elements of the model; train on more data"
        )
    true = _middle(usable)
    start, frames = true.atoms(0), model.config.dynamics.frames
    relaxes = bool(model.structure(start, true.id, true.variable_cell).strain.any())
    options = files.Options(relax_cell=true.variable_cell)
    results, failed = predict_members({name: model}, [(true.id, start)], frames, options=options)
    if not results:
        raise InputError(str(failed[0]))
    predicted = results[0].path
    caption = f"{true.id}, {true.formula}: test relaxation of median displacement; {name}"
    predicted.write(out / "predicted.extxyz")
    true.write(out / "true.extxyz")
    trajectory_figure(
        driftless(true, relaxes, model.config), predicted, out / "trajectory.png", caption
    )
    say(f"predicted: {files.summary(results[0].path, results[0].flags)}")
    say(f"true:      {files.summary(true)}")
    for file in ("predicted.extxyz", "true.extxyz", "trajectory.png"):
        say(str(out / file))
    return 0


def _middle(relaxations: list[RelaxationTrajectory]) -> RelaxationTrajectory:
    """The relaxation with the median mean displacement within the cell."""
    import numpy as np

    from relaxnet_jax.strain import internal_displacements

    moved = [
        np.linalg.norm(internal_displacements(t.positions, t.cells), axis=-1).mean()
        for t in relaxations
    ]
    return relaxations[int(np.argsort(moved, kind="stable")[len(moved) // 2])]


def _load_members(name: str) -> dict[str, RelaxNet]:
    """The model of a workdir or model folder, or the committee that comes with the package, by name."""
    from relaxnet_jax.model import load_model, member_folders

    if name != PRETRAINED:
        return {name: load_model(name)}
    note(
        "pretrained models: trained on CHGNet's energies, not on DFT; choose another with --model DIR"
    )
    return {f"{PRETRAINED}/{path.name}": load_model(path) for path in member_folders(name)}
