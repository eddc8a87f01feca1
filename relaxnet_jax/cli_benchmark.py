"""The arguments of ``relaxnet-jax benchmark …``. `benchmark_commands` does the work."""

from __future__ import annotations

import argparse

from relaxnet_jax.cli_data import command

# The parts of `benchmark.speed` and `benchmark.peers`, which are not imported here: they start JAX.
SPEED_PARTS = ("steps", "atoms", "frames", "training")
PEER_PARTS = ("torch", "chgnet", "torch-sim")


def add_benchmark(commands) -> None:
    text = "measure speed, memory and scaling"
    group = commands.add_parser("benchmark", help=text, description=text.capitalize() + ".")
    kinds = group.add_subparsers(title="commands", metavar="COMMAND", required=True)
    p = command(kinds, "speed", "benchmark_speed", "time training and inference on this machine")
    p.add_argument(
        "--config",
        nargs="+",
        metavar="FILE",
        help="config files or names of shipped ones (default: the shipped ones of the ODE)",
    )
    p.add_argument("--data", metavar="STORE", help="relaxations (default: those of the configs)")
    p.add_argument(
        "--only",
        nargs="+",
        choices=SPEED_PARTS,
        metavar="PART",
        help="steps: training and inference by bucket; atoms, frames: curves of inference; "
        "training: curve of the training step (default: all)",
    )
    p.add_argument("--fast", action="store_true", help="the first config and few points")
    _add_output(p, "speed")
    p = command(kinds, "peers", "benchmark_peers", "time other programs on the same structures")
    p.add_argument(
        "--config", default="explicit.py", metavar="FILE", help="of ours (default: explicit.py)"
    )
    p.add_argument("--data", metavar="STORE", help="relaxations (default: those of the config)")
    p.add_argument(
        "--only",
        nargs="+",
        choices=PEER_PARTS,
        metavar="PEER",
        help="torch: the same architecture in eager PyTorch; chgnet: relaxation with CHGNet and "
        "ASE's LBFGS; torch-sim: the same in batches (default: what is installed)",
    )
    p.add_argument("--fast", action="store_true", help="one bucket, few structures")
    _add_output(p, "peers")


def _add_output(p: argparse.ArgumentParser, name: str) -> None:
    p.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="begin no measurement after so long (default: 10, with --fast 2); the same command "
        "goes on where it ended",
    )
    p.add_argument(
        "--out",
        default="benchmark",
        metavar="DIR",
        help="for what is written (default: benchmark)",
    )
    p.add_argument("--json", metavar="FILE", help=f"all figures (default: DIR/{name}.json)")
