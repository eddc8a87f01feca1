"""The command line ``relaxnet-jax``: arguments and exit codes. `commands` does the work.

Exit codes: 0 done, 1 partly done (predict, relax, reproduce), 2 bad input (one line on stderr says what is wrong
and how to fix it), 130 interrupted, 143 stopped by SIGTERM with a checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from relaxnet_jax import __version__
from relaxnet_jax.cli_benchmark import add_benchmark
from relaxnet_jax.cli_data import add_data, add_set, command
from relaxnet_jax.cli_relax import add_relax
from relaxnet_jax.cli_reproduce import add_reproduce
from relaxnet_jax.config import PRETRAINED
from relaxnet_jax.errors import InputError

BAD_INPUT = 2
INTERRUPTED = 130
CHANGES = "change fields of the config, e.g. train.epochs=50 data.path=mine.h5"
MOVED = "data.path=FILE: current location of the run's data; their checksum is verified"


class _Parser(argparse.ArgumentParser):
    """Argument parser whose errors are reported on one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Args:
      argv: the arguments after the program's name; by default those of the process.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if not given:
        build_parser().print_help(sys.stderr)
        return BAD_INPUT
    try:
        args = build_parser().parse_args(given)
        args.argv = given
        return getattr(_module(args.run), args.run)(args)
    except InputError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("\nrelaxnet-jax: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the output has exited, e.g. head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}; check the path and its permissions")


def _module(run: str) -> ModuleType:
    """The module that defines the function of this name."""
    from relaxnet_jax import benchmark_commands, commands, data_commands

    by_prefix = {"data_": data_commands, "benchmark_": benchmark_commands}
    return next((m for prefix, m in by_prefix.items() if run.startswith(prefix)), commands)


def _fail(message: str) -> int:
    print(f"relaxnet-jax: error: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; ``run`` in its result names a function of one of their modules."""
    parser = _Parser(
        prog="relaxnet-jax",
        description="Predict whole relaxation trajectories from the unrelaxed structure.",
    )
    parser.add_argument("--version", action="version", version=f"relaxnet-jax {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_eval(commands)
    add_data(commands)
    _add_predict(commands)
    add_relax(commands)
    _add_demo(commands)
    _add_info(commands)
    add_benchmark(commands)
    add_reproduce(commands)
    return parser


def _add_train(commands) -> None:
    p = command(commands, "train", "train", "train a model on relaxations")
    p.add_argument(
        "--config",
        metavar="FILE",
        help="config file or name of a shipped config: explicit.py, implicit.py, explicit_cell.py, … "
        "(default with --resume: the run's own)",
    )
    add_set(p, CHANGES)
    p.add_argument("--workdir", metavar="DIR", help="folder of the run (default: runs/CONFIG)")
    p.add_argument("--resume", action="store_true", help="continue the run in the workdir")
    p.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="number of local devices, GPUs or CPU cores, each with its own batches (default: all GPUs; on "
        "a CPU, its cores share each batch)",
    )
    hosts = p.add_argument_group(
        "several processes",
        "under SLURM's srun, the processes find each other without these options",
    )
    hosts.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address of process 0, reachable by the others"
    )
    hosts.add_argument("--processes", type=int, metavar="N", help="number of processes")
    hosts.add_argument(
        "--process-id", type=int, metavar="I", help="index of this process, 0 to N-1"
    )
    hosts.add_argument(
        "--join-seconds",
        type=float,
        default=300.0,
        metavar="S",
        help="seconds to wait for all processes to join (default: 300)",
    )


def _add_info(commands) -> None:
    p = command(commands, "info", "info", "describe a model: elements, data, errors, versions")
    p.add_argument(
        "model",
        nargs="?",
        default=PRETRAINED,
        metavar="DIR",
        help="training run or model folder (default: the committee shipped with the package)",
    )
    p = command(commands, "config", "config", "print the complete configuration, defaults included")
    p.add_argument("config", metavar="FILE", help="config file or name of a shipped config")
    add_set(p, CHANGES)


def _add_eval(commands) -> None:
    p = command(commands, "eval", "evaluate", "measure a trained model on unseen relaxations")
    p.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        help=f"folder of the training run; with --data, also a model folder or {PRETRAINED}",
    )
    p.add_argument(
        "--split",
        default="test",
        choices=("train", "validation", "test"),
        help="split of the run's data (default: test)",
    )
    p.add_argument(
        "--data",
        metavar="FILE",
        help="evaluate these relaxations instead of a split: a store or any file 'data import' reads",
    )
    add_set(p, MOVED)
    p.add_argument(
        "--out",
        metavar="DIR",
        help="output folder for metrics and figures (default: WORKDIR/eval-SPLIT)",
    )
    p.add_argument(
        "--lbfgs",
        action="store_true",
        help="also minimise the energy of a static or implicit model, with L-BFGS",
    )
    p.add_argument(
        "--fmax",
        type=float,
        metavar="F",
        help="force in eV/Å at which minimisation stops (default: 0.05)",
    )
    p.add_argument(
        "--committee",
        nargs="+",
        default=[],
        metavar="DIR",
        help="runs trained from other seeds: evaluate the mean prediction of all these models, and how "
        "well their disagreement predicts its errors",
    )


def _add_predict(commands) -> None:
    p = command(commands, "predict", "predict", "predict the relaxation of structures")
    p.add_argument(
        "file",
        metavar="FILE",
        help="structure file in any format ASE reads; all its images are used",
    )
    p.add_argument(
        "--model",
        default=PRETRAINED,
        metavar="DIR",
        help="training run or model folder (default: the committee shipped with the package)",
    )
    p.add_argument(
        "--frames",
        type=int,
        default=5,
        metavar="N",
        help="frames per trajectory, first and last included (default: 5)",
    )
    p.add_argument(
        "--out",
        metavar="FILE",
        help=".extxyz or .traj: all frames of all structures; "
        ".cif, .vasp, POSCAR: the final frame of one (default: NAME-path.extxyz)",
    )
    p.add_argument("--overwrite", action="store_true", help="replace an existing file")
    p.add_argument(
        "--keep-cell",
        action="store_true",
        help="relax the atoms only, even if the model relaxes cells",
    )
    p.epilog = (
        "exit codes: 0 all predicted; 1 some left out, each named on stderr; 2 nothing predicted"
    )


def _add_demo(commands) -> None:
    p = command(commands, "demo", "demo", "show one test relaxation, predicted and true")
    p.add_argument("--workdir", required=True, metavar="DIR", help="folder of the training run")
    add_set(p, MOVED)
    p.add_argument(
        "--out",
        metavar="DIR",
        help="output folder for trajectories and figure (default: WORKDIR/demo)",
    )


if __name__ == "__main__":
    sys.exit(main())
