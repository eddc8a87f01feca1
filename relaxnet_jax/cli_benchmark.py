"""The arguments of ``relaxnet-jax benchmark …``. `benchmark_commands` does the work."""

from __future__ import annotations

from relaxnet_jax.cli_data import command

# The parts of `benchmark.speed`, which is not imported here: it starts JAX.
SPEED_PARTS = ("steps", "atoms", "frames", "training")


def add_benchmark(commands) -> None:
    text = "measure speed, memory and scaling"
    group = commands.add_parser("benchmark", help=text, description=text.capitalize() + ".")
    kinds = group.add_subparsers(title="commands", metavar="COMMAND", required=True)
    p = command(kinds, "speed", "benchmark_speed", "time training and inference on this machine")
    p.add_argument(
        "--config",
        nargs="+",
        metavar="FILE",
        help="config files or names of shipped ones (default: all shipped ones)",
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
        help="for tables and figure (default: benchmark)",
    )
    p.add_argument("--json", metavar="FILE", help="all figures (default: DIR/speed.json)")
