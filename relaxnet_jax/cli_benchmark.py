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
        help="config files or names of shipped configs (default: the shipped ones that solve the ODE)",
    )
    p.add_argument(
        "--data", metavar="STORE", help="store of relaxations (default: the data of the configs)"
    )
    p.add_argument(
        "--only",
        nargs="+",
        choices=SPEED_PARTS,
        metavar="PART",
        help="steps: training and inference per bucket; atoms, frames: scaling of inference; training: "
        "scaling of the training step (default: all)",
    )
    p.add_argument("--fast", action="store_true", help="only the first config, at few points")
    p.add_argument(
        "--batch-size",
        type=int,
        nargs="+",
        metavar="N",
        help="structures per batch, instead of the configs' own; several sizes are measured in turn",
    )
    p.add_argument(
        "--kernels",
        action="store_true",
        help="also profile the steps: device time by kind of kernel",
    )
    _add_output(p, "speed")
    p = command(kinds, "peers", "benchmark_peers", "time other programs on the same structures")
    p.add_argument(
        "--config",
        default="explicit.py",
        metavar="FILE",
        help="config of our model (default: explicit.py)",
    )
    p.add_argument(
        "--data", metavar="STORE", help="store of relaxations (default: the data of the config)"
    )
    p.add_argument(
        "--only",
        nargs="+",
        choices=PEER_PARTS,
        metavar="PEER",
        help="torch: the same architecture in eager PyTorch; chgnet: relaxation with CHGNet and ASE's "
        "LBFGS; torch-sim: the same in batches (default: all that are installed)",
    )
    p.add_argument("--fast", action="store_true", help="one bucket, few structures")
    _add_output(p, "peers")
    _add_steps(kinds)


def _add_steps(kinds) -> None:
    p = command(
        kinds,
        "steps",
        "benchmark_steps",
        "count the ionic steps saved by starting a calculator's relaxations from predictions",
    )
    p.add_argument(
        "--oracle",
        required=True,
        metavar="NAME",
        help="calculator that relaxes every structure with ASE's LBFGS: emt, chgnet, gpaw (plane waves, "
        "PBE, no spins; bin/setup_gpaw installs it), or MODULE:FACTORY, your function that returns an ASE "
        "calculator",
    )
    p.add_argument(
        "--structures",
        nargs="+",
        required=True,
        metavar="SET",
        help="stores, of which only the models' test split is used, or structure files and folders",
    )
    p.add_argument(
        "--model",
        metavar="DIR",
        help="start from this model's prediction: a run or model folder, or pretrained (shipped with the "
        "package)",
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
        help="also start from the initial structure with Gaussian noise of S Å on its atoms, to see how "
        "often any other start nearby ends elsewhere",
    )
    p.add_argument(
        "--limit", type=int, metavar="N", help="use N structures, drawn at random (default: all)"
    )
    p.add_argument(
        "--fmax",
        type=float,
        default=0.05,
        metavar="F",
        help="force threshold of all relaxations, eV/Å (default: 0.05)",
    )
    p.add_argument(
        "--max-steps",
        type=int,
        default=500,
        metavar="N",
        help="maximum number of steps per relaxation (default: 500)",
    )
    p.add_argument(
        "--wrong-minimum",
        type=float,
        default=1e3 * WRONG_MINIMUM,
        metavar="E",
        help="a relaxation that ends more than this above that of the initial structure counts as failed, "
        f"meV/atom (default: {1e3 * WRONG_MINIMUM:g})",
    )
    p.add_argument(
        "--wrong-minimum-whole",
        type=float,
        default=WRONG_MINIMUM_WHOLE,
        metavar="E",
        help="the same for the whole structure, eV; the stricter of the two counts (default: "
        f"{WRONG_MINIMUM_WHOLE:g})",
    )
    p.add_argument(
        "--cutoff",
        type=float,
        metavar="E",
        help="plane-wave cutoff of gpaw, eV (default: 600, or 900 where cells relax)",
    )
    p.add_argument(
        "--kpoint-density",
        type=float,
        metavar="D",
        help="k-point density of gpaw, per Å⁻¹ (default: 3)",
    )
    p.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="start no relaxation after M minutes; rerun the same command to continue (default: no limit)",
    )
    p.add_argument(
        "--out",
        default="benchmark",
        metavar="DIR",
        help="output folder; relaxations already in it are not repeated (default: benchmark)",
    )
    p.add_argument(
        "--json", metavar="FILE", help="JSON file of all results (default: DIR/steps.json)"
    )


def _add_output(p: argparse.ArgumentParser, name: str) -> None:
    p.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="start no measurement after M minutes (default: 10, with --fast 2); rerun the same command to "
        "continue",
    )
    p.add_argument(
        "--out",
        default="benchmark",
        metavar="DIR",
        help="output folder (default: benchmark)",
    )
    p.add_argument(
        "--json", metavar="FILE", help=f"JSON file of all results (default: DIR/{name}.json)"
    )
