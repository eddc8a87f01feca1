"""The arguments of ``relaxnet-jax benchmark …``. `benchmark_commands` does the work."""

from __future__ import annotations

import argparse

from relaxnet_jax.cli_data import command
from relaxnet_jax.relaxation.minima import WRONG_MINIMUM, WRONG_MINIMUM_WHOLE

# The parts of `benchmark.speed` and `benchmark.peers`, which are not imported here because that starts JAX.
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
    p.add_argument(
        "--batch-size",
        type=int,
        nargs="+",
        metavar="N",
        help="structures of a batch, instead of the configs' own; several are measured one by one",
    )
    p.add_argument(
        "--kernels",
        action="store_true",
        help="profile the steps too: time on the device by kind of kernel",
    )
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
    _add_steps(kinds)


def _add_steps(kinds) -> None:
    p = command(
        kinds,
        "steps",
        "benchmark_steps",
        "count the ionic steps that a calculator is saved by starting from predictions",
    )
    p.add_argument(
        "--oracle",
        required=True,
        metavar="NAME",
        help="relaxes every structure with ASE's LBFGS: emt, chgnet, gpaw (plane waves, PBE, no "
        "spins; bin/setup_gpaw installs it), or MODULE:FACTORY, a function of yours that returns "
        "an ASE calculator",
    )
    p.add_argument(
        "--structures",
        nargs="+",
        required=True,
        metavar="SET",
        help="stores, of which the models' test split is used, or structure files and folders",
    )
    p.add_argument(
        "--model",
        metavar="DIR",
        help="start from its prediction: a run or model folder, or pretrained: the package's own",
    )
    p.add_argument(
        "--egnn",
        metavar="DIR",
        help="also start from the minimum of this static or implicit model's own energy (L-BFGS)",
    )
    p.add_argument(
        "--chgnet", action="store_true", help="also start from the end of CHGNet's relaxation"
    )
    p.add_argument(
        "--shaken",
        type=float,
        metavar="S",
        help="also start from the initial structure with its atoms moved by chance, by Gaussian noise "
        "of so many Å: how often another start nearby ends elsewhere, whoever found it",
    )
    p.add_argument(
        "--limit", type=int, metavar="N", help="so many structures, drawn by chance (default: all)"
    )
    p.add_argument(
        "--fmax", type=float, default=0.05, metavar="F", help="eV/Å, of all (default: 0.05)"
    )
    p.add_argument(
        "--max-steps", type=int, default=500, metavar="N", help="of each relaxation (default: 500)"
    )
    p.add_argument(
        "--wrong-minimum",
        type=float,
        default=1e3 * WRONG_MINIMUM,
        metavar="E",
        help="meV/atom, by which a relaxation that ends higher than that of the initial structure "
        f"counts as failed (default: {1e3 * WRONG_MINIMUM:g})",
    )
    p.add_argument(
        "--wrong-minimum-whole",
        type=float,
        default=WRONG_MINIMUM_WHOLE,
        metavar="E",
        help="eV of the whole structure, likewise; the stricter of the two counts (default: "
        f"{WRONG_MINIMUM_WHOLE:g})",
    )
    p.add_argument(
        "--cutoff",
        type=float,
        metavar="E",
        help="eV, of gpaw's plane waves (default: 600, where cells relax 900)",
    )
    p.add_argument(
        "--kpoint-density", type=float, metavar="D", help="of gpaw, per Å⁻¹ (default: 3)"
    )
    p.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="begin no relaxation after so long; the same command goes on (default: no limit)",
    )
    p.add_argument(
        "--out",
        default="benchmark",
        metavar="DIR",
        help="for what is written; relaxations kept in it are not made again (default: benchmark)",
    )
    p.add_argument("--json", metavar="FILE", help="all figures (default: DIR/steps.json)")


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
