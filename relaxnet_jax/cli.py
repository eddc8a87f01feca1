"""The command line ``relaxnet-jax``: arguments and exit codes. `commands` does the work.

Exit codes: 0 done, 2 bad input (one line on stderr says what and how to mend it),
130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from relaxnet_jax import __version__
from relaxnet_jax.errors import InputError

BAD_INPUT = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Complains on one line, the way all other errors are told."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Args:
      argv: the arguments after the program's name; those of the process by default.
    """
    try:
        args = build_parser().parse_args(argv)
        from relaxnet_jax import commands

        return getattr(commands, args.run)(args)
    except InputError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("\nrelaxnet-jax: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the output went away, e.g. head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}; check the path and its permissions")


def _fail(message: str) -> int:
    print(f"relaxnet-jax: error: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; ``run`` in its result names a function of `commands`."""
    parser = _Parser(
        prog="relaxnet-jax",
        description="Predict whole relaxation trajectories from the unrelaxed structure.",
    )
    parser.add_argument("--version", action="version", version=f"relaxnet-jax {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_train(commands)
    _add_eval(commands)
    _add_data(commands)
    _add_predict(commands)
    _add_demo(commands)
    return parser


def _command(commands, name: str, run: str, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def _add_train(commands) -> None:
    p = _command(commands, "train", "train", "train a model on relaxations")
    p.add_argument(
        "--config",
        metavar="FILE",
        help="a config file, or a shipped one's name: "
        "explicit.py, implicit.py (with --resume by default that of the run)",
    )
    p.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change fields of the config, e.g. train.epochs=50 data.path=mine.h5",
    )
    p.add_argument("--workdir", metavar="DIR", help="where the run lives (default: runs/CONFIG)")
    p.add_argument("--resume", action="store_true", help="continue the run in the workdir")
    p.add_argument("--devices", type=int, metavar="N", help="local devices to use (default: all)")


def _add_eval(commands) -> None:
    p = _command(commands, "eval", "evaluate", "measure a trained model on unseen relaxations")
    p.add_argument("--workdir", required=True, metavar="DIR", help="of the training run")
    p.add_argument(
        "--split",
        default="test",
        choices=("train", "validation", "test"),
        help="of the run's data (default: test)",
    )
    p.add_argument(
        "--data",
        metavar="FILE",
        help="use these relaxations instead of a split: a store, or any file 'data import' reads",
    )
    p.add_argument(
        "--out", metavar="DIR", help="for metrics and figures (default: WORKDIR/eval-SPLIT)"
    )


def _add_data(commands) -> None:
    text = "make or import training data"
    data = commands.add_parser("data", help=text, description=text[0].upper() + text[1:] + ".")
    kinds = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    p = _command(kinds, "import", "data_import", "put relaxations of your own into a store")
    p.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="any file with energies and forces of every ionic step: vasprun.xml, OUTCAR, extxyz, "
        "traj, db, …, also compressed; zip and tar archives; folders, searched for all of these",
    )
    p.add_argument("--out", required=True, metavar="NAME.h5", help="the store to write")
    p.add_argument(
        "--groups",
        metavar="CSV",
        help="columns id and group: relaxations of one "
        "group are never split apart (default: of one composition)",
    )
    p.add_argument(
        "--energy",
        choices=("free", "sigma0", "internal"),
        default="free",
        help="of a vasprun.xml: free (TOTEN, consistent with the forces; the default), sigma0 "
        "(without smearing), internal (without entropy)",
    )
    p = _command(kinds, "emt", "data_emt", "make the generated data: alloys relaxed with EMT")
    p.add_argument("--n", type=int, default=600, help="relaxations (default: 600)")
    p.add_argument("--seed", type=int, default=0, help="of all random choices (default: 0)")
    p.add_argument(
        "--out",
        metavar="NAME.h5",
        help="the store to write (default: in the cache, "
        "where training with data.path=emt finds it)",
    )


def _add_predict(commands) -> None:
    p = _command(commands, "predict", "predict", "predict the relaxation of structures")
    p.add_argument("file", metavar="FILE", help="structures in any format ASE reads; all images")
    p.add_argument("--model", required=True, metavar="DIR", help="a training run or a model folder")
    p.add_argument(
        "--frames",
        type=int,
        default=5,
        metavar="N",
        help="of each trajectory, first and last included (default: 5)",
    )
    p.add_argument(
        "--out",
        metavar="FILE",
        help=".extxyz or .traj: all frames of all structures; "
        ".cif, POSCAR: the final frame of one (default: NAME-relaxed.extxyz)",
    )


def _add_demo(commands) -> None:
    p = _command(commands, "demo", "demo", "show one test relaxation, predicted and true")
    p.add_argument("--workdir", required=True, metavar="DIR", help="of the training run")
    p.add_argument(
        "--out", metavar="DIR", help="for trajectories and figure (default: WORKDIR/demo)"
    )


if __name__ == "__main__":
    sys.exit(main())
