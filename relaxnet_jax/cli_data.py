"""The arguments of ``relaxnet-jax data …``. `data_commands` does the work."""

from __future__ import annotations

import argparse


def command(commands, name: str, run: str, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def add_set(p: argparse.ArgumentParser, text: str) -> None:
    p.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=text)


def _add_overwrite(p: argparse.ArgumentParser, what: str = "set") -> None:
    p.add_argument("--overwrite", action="store_true", help=f"replace a finished {what} at --out")


def add_data(commands) -> None:
    text = "make or import training data"
    data = commands.add_parser("data", help=text, description=text[0].upper() + text[1:] + ".")
    kinds = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    p = command(kinds, "import", "data_import", "import your own relaxations into a store")
    p.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="files with energies and forces of every ionic step: vasprun.xml, OUTCAR, extxyz, traj, db, "
        "JSON of ALIGNN-FF, MPtrj and Alexandria, …, also compressed; zip and tar archives; folders, "
        "searched for all of these except JSON; stores (.h5)",
    )
    p.add_argument(
        "--out",
        required=True,
        metavar="NAME.h5",
        help="store to write; without a suffix, a folder of shards",
    )
    _add_overwrite(p)
    _add_parallel(p)
    p.add_argument(
        "--shard-size", type=int, metavar="N", help="relaxations per shard (default: 10000)"
    )
    p.add_argument(
        "--groups",
        metavar="CSV",
        help="file with columns id and group; splits keep each group together (default: each composition)",
    )
    p.add_argument(
        "--energy",
        choices=("free", "sigma0", "internal"),
        default="free",
        help="which energy of a vasprun.xml or OUTCAR: free (TOTEN, consistent with the forces; the "
        "default), sigma0 (without smearing), internal (without entropy)",
    )
    p.add_argument(
        "--initial",
        choices=("cif",),
        help="cif: compare the first frame of each vasprun.xml and OUTCAR with the .cif of the "
        "same name (or the only one) beside it, and leave out the runs that differ",
    )
    p = command(kinds, "split", "data_split", "assign relaxations to training, validation and test")
    p.add_argument("store", metavar="NAME.h5", help="the store to split")
    p.add_argument(
        "--folds",
        type=int,
        metavar="K",
        help="number of folds, each the test split once (default: 1)",
    )
    p.add_argument(
        "--by",
        choices=("group", "formula", "elements", "prototype", "id"),
        help="what stays together: a group as stored (the default), a reduced formula (the default with "
        "--like), a set of elements, a prototype (anonymous formula and space group of the final "
        "structure); id: each relaxation by itself, for sets of one composition; valid only if they are "
        "independent of each other, e.g. no two end alike",
    )
    p.add_argument(
        "--fractions",
        nargs=3,
        type=float,
        metavar=("TRAIN", "VALIDATION", "TEST"),
        help="default: 0.9 0.05 0.05; with several folds, each test split is 1/K",
    )
    p.add_argument("--seed", type=int, help="random seed of the split (default: 0)")
    p.add_argument(
        "--like",
        nargs=2,
        metavar=("OTHER.h5", "SPLITS"),
        help="instead of a random split: what shares a kind (--by) with the validation or test split of "
        "another set, given by its split file (or a run's splits.json), goes to that split here, all else "
        "to training; for pretraining on this set a model to be trained on the other",
    )
    p.add_argument(
        "--out",
        metavar="FILE",
        help="split file to write (default: NAME.splits.json beside the set)",
    )
    _add_overwrite(p, "split file")
    p = command(kinds, "jarvis", "data_jarvis", "download relaxations of JARVIS-DFT into a store")
    p.add_argument("--out", required=True, metavar="NAME.h5", help="the store to write")
    _add_overwrite(p)
    p.add_argument(
        "--ids",
        metavar="IDS",
        help="JVASP-39,JVASP-1002,… or a file with one per line (default: all, tens of thousands)",
    )
    p.add_argument("--limit", type=int, metavar="N", help="at most N archives")
    p.add_argument(
        "--downloads",
        metavar="DIR",
        help="folder for the archives (default: NAME-downloads beside --out)",
    )
    p.add_argument(
        "--index",
        metavar="FILE_OR_URL",
        help="index of the raw files, e.g. of a mirror (default: figshare's)",
    )
    p.add_argument(
        "--category",
        default="DFT-SCF",
        help="category in the index (default: DFT-SCF, the geometry optimisations)",
    )
    _add_parallel(p)
    p = command(kinds, "info", "data_info", "summarise the contents of a store")
    p.add_argument("store", metavar="SET.h5", help="a store, or a folder of stores")
    p.add_argument("--figure", metavar="PNG", help="draw the distributions")
    p.add_argument("--json", action="store_true", help="print JSON")
    _add_check(kinds)
    _add_generate(kinds)
    p = command(kinds, "emt", "data_emt", "generate sample data: alloys relaxed with EMT")
    p.add_argument("--n", type=int, default=600, help="number of relaxations (default: 600)")
    p.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    p.add_argument(
        "--out",
        metavar="NAME.h5",
        help="the store to write (default: in the cache, "
        "where training with data.path=emt finds it)",
    )
    _add_overwrite(p)


def _add_parallel(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="number of processes (default: the usable cores; one for little work)",
    )
    p.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="address of a Dask scheduler, e.g. tcp://host:8786, whose workers do the work; they must see "
        "all files, and the folder of --out, under the same paths",
    )


def _add_generate(kinds) -> None:
    p = command(kinds, "generate", "data_generate", "make training data by relaxing structures")
    p.add_argument(
        "--calculator",
        required=True,
        metavar="NAME",
        help="emt, chgnet, or MODULE:FACTORY: your function, imported and called without arguments, that "
        "returns an ASE calculator",
    )
    p.add_argument(
        "--structures",
        required=True,
        nargs="+",
        metavar="FILE",
        help="structure files in any format ASE reads, all images; prototypes: the mineral prototypes of "
        "jarvis-tools",
    )
    p.add_argument("--n", type=int, required=True, help="number of relaxations")
    p.add_argument("--out", required=True, metavar="NAME.h5", help="the store to write")
    _add_overwrite(p)
    p.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    p.add_argument(
        "--rattle",
        nargs=2,
        type=float,
        default=(0.02, 0.15),
        metavar=("LOW", "HIGH"),
        help="range of the standard deviation per coordinate, Å (default: 0.02 0.15)",
    )
    p.add_argument(
        "--strain", type=float, default=0.02, help="largest strain component, ± (default: 0.02)"
    )
    p.add_argument(
        "--substitute",
        type=float,
        default=0.0,
        metavar="P",
        help="probability of replacing each element by another of its group (default: 0)",
    )
    p.add_argument(
        "--f-elements",
        action="store_true",
        help="also let rare earths (Sc, Y, La to Lu) replace each other, and actinides (Ac to Pu)",
    )
    p.add_argument(
        "--supercell",
        nargs=3,
        type=int,
        default=(1, 1, 1),
        metavar=("A", "B", "C"),
        help="repetitions (default: 1 1 1)",
    )
    p.add_argument("--relax-cell", action="store_true", help="relax the cell too")
    p.add_argument("--optimizer", choices=("lbfgs", "fire"), default="lbfgs", help="default: lbfgs")
    p.add_argument("--fmax", type=float, default=0.03, help="eV/Å (default: 0.03)")
    p.add_argument("--max-steps", type=int, default=200, metavar="N", help="default: 200")
    p.add_argument(
        "--keep-unconverged",
        action="store_true",
        help="keep relaxations that --max-steps ends, marked as unconverged",
    )
    p.add_argument(
        "--max-atoms",
        type=int,
        default=40,
        metavar="N",
        help="refuse larger structures (default: 40)",
    )
    p.add_argument(
        "--attempts", type=int, default=5, metavar="N", help="attempts per relaxation (default: 5)"
    )
    p.add_argument(
        "--group-by",
        choices=("parent", "formula"),
        default="parent",
        help="what splits keep together: all relaxations of one structure or prototype (the default), or "
        "of one composition",
    )
    _add_parallel(p)


def _add_check(kinds) -> None:
    from relaxnet_jax.data.quality.reasons import REASONS

    p = command(kinds, "check", "data_check", "find unphysical relaxations")
    p.add_argument("store", metavar="SET.h5", help="a store, or a folder of stores")
    bounds = (
        ("max-force", "eV/Å", "force on any free atom", 50),
        ("max-energy-change", "eV/atom", "energy change from the first frame", 2),
        ("converged", "eV/Å", "largest force of the last frame", 0.1),
        ("energy-deviations", "K", "robust deviations from composition energies", 10),
        ("charge-deviations", "K", "robust deviations from the element's median charge", 10),
    )
    for name, unit, text, default in bounds:
        p.add_argument(
            f"--{name}",
            type=float,
            metavar=unit,
            default=float(default),
            help=f"{text} (default: {default})",
        )
    p.add_argument("--json", action="store_true", help="print JSON, with all findings")
    p.add_argument(
        "--out",
        metavar="CLEAN.h5",
        help="write the relaxations left after --drop; without a suffix, a folder of shards",
    )
    _add_overwrite(p)
    p.add_argument(
        "--drop",
        nargs="+",
        default=[],
        metavar="REASON",
        help=f"reasons to drop relaxations from --out: all, or some of {', '.join(REASONS)}",
    )
