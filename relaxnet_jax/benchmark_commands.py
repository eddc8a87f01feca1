"""The commands ``relaxnet-jax benchmark …``. Each takes the parsed arguments and returns an exit code."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from relaxnet_jax.config import Config, load_config, shipped_configs
from relaxnet_jax.console import note, result_console, say
from relaxnet_jax.errors import InputError
from relaxnet_jax.runtime import batch_shares, check_devices, enable_compilation_cache

FAST_RELAXATIONS = 60  # relaxations of the generated data with --fast


def benchmark_speed(args: argparse.Namespace) -> int:
    """``relaxnet-jax benchmark speed``."""
    chosen = _configs(args)[: 1 if args.fast else None]
    configs = [sized for config in chosen for sized in _of_sizes(config, args.batch_size)]
    _check_minutes(args)
    enable_compilation_cache()
    check_devices(None)
    _check_kernels(args)
    from relaxnet_jax.benchmark import report
    from relaxnet_jax.benchmark.speed import PARTS, run_speed

    folder = Path(args.out)
    path = Path(args.json or folder / "speed.json")
    document = run_speed(
        configs, path, note, args.fast, args.only or PARTS, args.minutes, args.kernels
    )
    console = result_console()
    say(report.device_line(document))
    ceilings = report.ceilings_line(document)
    if ceilings:
        say(ceilings)
    if report.steps_of(document):
        for table in [*report.steps_tables(document), *report.kernel_tables(document)]:
            console.print(table)
    for line in report.remarks(document):
        note(line)
    for file in [path, *report.write_curves(document, folder)]:
        say(str(file))
    return 0


def benchmark_peers(args: argparse.Namespace) -> int:
    """``relaxnet-jax benchmark peers``."""
    config = peers_config(args)
    _check_minutes(args)
    enable_compilation_cache()
    batch_shares(config)
    from relaxnet_jax.benchmark import report
    from relaxnet_jax.benchmark.peers import run_peers

    path = Path(args.json or Path(args.out) / "peers.json")
    document = run_peers(config, path, note, args.fast, args.only, args.minutes)
    say(report.device_line(document))
    result_console().print(report.peers_table(document))
    for line in report.remarks(document):
        note(line)
    say(str(path))
    return 0


def benchmark_steps(args: argparse.Namespace) -> int:
    """``relaxnet-jax benchmark steps``."""
    _check_minutes(args)
    enable_compilation_cache()
    check_devices(None)
    from relaxnet_jax.benchmark.steps_command import benchmark_steps as run

    return run(args)


def _check_kernels(args: argparse.Namespace) -> None:
    import jax

    if args.kernels and args.only and "steps" not in args.only:
        raise InputError("--kernels: only steps are profiled; add steps to --only, or leave it out")
    if args.kernels and jax.default_backend() == "cpu":
        raise InputError(
            "--kernels: JAX's profiler reports kernels on GPUs only, and JAX runs on a CPU "
            "here; leave it out"
        )


def _check_minutes(args: argparse.Namespace) -> None:
    if args.minutes is not None and args.minutes <= 0:
        raise InputError(f"--minutes {args.minutes:g}: must be positive")


def _configs(args: argparse.Namespace) -> list[Config]:
    """The given configurations, or all shipped ones that solve the ODE, on the given data.

    Configurations of the paper, with 64 structures in a batch, are used only when given.
    """
    if args.config:
        return [load_config(name, _changes(args)) for name in args.config]
    shipped = [load_config(p, _changes(args)) for p in sorted(shipped_configs().glob("*.py"))]
    shipped = [c for c in shipped if not c.name.startswith("paper_")]
    return [c for c in shipped if c.dynamics.latent in ("explicit", "implicit")]


def _of_sizes(config: Config, sizes: Sequence[int] | None) -> list[Config]:
    """The configuration with each of the batch sizes, named after them; unchanged if there are none."""
    if sizes is None:
        return [config]
    if min(sizes) < 1:
        raise InputError(f"--batch-size {min(sizes)}: give at least 1")
    return [
        dataclasses.replace(
            config,
            name=f"{config.name}, batches of {n}",
            train=dataclasses.replace(config.train, batch_size=n),
        )
        for n in sizes
    ]


def peers_config(args: argparse.Namespace) -> Config:
    """The configuration that both sides run: without noise on the initial positions, which the peer lacks."""
    return load_config(args.config, _changes(args) | {"train.noise": 0.0})


def _changes(args: argparse.Namespace) -> dict[str, object]:
    """The changes that --data and --fast make to a configuration."""
    if args.data:
        return {"data.path": args.data, "data.variable_cell": "drop"}
    return {"data.n_emt": FAST_RELAXATIONS} if args.fast else {}
