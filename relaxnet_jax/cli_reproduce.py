"""The arguments of ``relaxnet-jax reproduce``. `reproduce.command` does the work."""

from __future__ import annotations

import argparse

from relaxnet_jax.cli_data import add_set, command

# The names in `reproduce.registry`, which is not imported here because that starts JAX.
NAMES = (
    *(f"table{k}" for k in range(1, 7)),
    *("fig3a", "fig3b", "fig3c", "figA1", "figA2", "figA3"),
    *("frames", "energies", "ablation"),
)
EPILOG = """\
Experiments share their runs, which are kept in OUT/runs under a hash of configuration and data:
finished runs are reused, interrupted ones continued. --config replaces a configuration, e.g.
--config explicit=paper_explicit.py; --set changes all of them.
exit codes: 0 done; 1 some experiments could not be done; 2 bad input; 143 stopped, can be continued"""


def add_reproduce(commands) -> None:
    text = "reproduce the paper's tables and figures on your data"
    p = command(commands, "reproduce", "reproduce", text)
    # The names come first: options that take several values would swallow them.
    p.usage = "relaxnet-jax reproduce NAME [NAME ...] --data SET.h5 [options]"
    p.epilog = EPILOG
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument(
        "experiments",
        nargs="+",
        choices=(*NAMES, "all"),
        metavar="NAME",
        help=f"all, {', '.join(NAMES)}",
    )
    p.add_argument("--data", required=True, metavar="SET.h5", help="store made by 'data import'")
    p.add_argument(
        "--budget",
        type=float,
        metavar="MINUTES",
        help="wall-clock training time for all missing runs together",
    )
    p.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="runs trained at the same time, each on its share of the CPU cores (default: 1)",
    )
    p.add_argument("--plan", action="store_true", help="list the runs needed, and stop")
    p.add_argument(
        "--out", default="reproduce", metavar="DIR", help="output folder (default: reproduce)"
    )
    p.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2"
    )
    p.add_argument(
        "--folds",
        type=int,
        default=5,
        metavar="K",
        help="folds of table4's cross-validation (default: 5)",
    )
    p.add_argument(
        "--reference",
        metavar="CALC",
        help="also relax table5's structures with this potential: chgnet, emt or MODULE:FACTORY",
    )
    p.add_argument(
        "--config",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FILE",
        help="config to use instead of a shipped one: explicit, implicit, static, egnn or static_final",
    )
    add_set(p, "change fields of all configs, e.g. data.limit=200 model.features=32")
