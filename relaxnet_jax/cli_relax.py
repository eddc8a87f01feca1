"""The arguments of ``relaxnet-jax relax``."""

from __future__ import annotations

import argparse

from relaxnet_jax.cli_data import command

EXIT_CODES = """\
exit codes: 0 all relaxed; 1 some failed, each named on stderr with the reason, the others are done;
2 wrong arguments, or nothing could be relaxed"""


def add_relax(commands) -> None:
    text = "relax structure files: final structures, paths, and how far to trust them"
    p = command(commands, "relax", "relax", text)
    p.epilog = EXIT_CODES
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="structures in any format ASE reads, all images of each or, as FILE@-1 or FILE@0:5, "
        "some; folders, searched for POSCAR*, vasp, poscar, cif, xyz, extxyz and traj files that are "
        "no results of this package",
    )
    p.add_argument(
        "--model",
        action="append",
        metavar="DIR",
        help="a training run or a model folder (default: the committee that comes with the package); "
        "given several times, models trained from different seeds: their mean predicts, and how "
        "far they disagree is an estimate of its error",
    )
    p.add_argument("--frames", type=int, default=5, metavar="N", help="of each path (default: 5)")
    p.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="structures predicted at once (default: 16 on a CPU, 128 on an accelerator); what does not "
        "fit in memory is halved",
    )
    p.add_argument(
        "--refine",
        metavar="NAME",
        help="go on from the prediction with ASE's LBFGS and the calculator emt, chgnet or "
        "MODULE:FACTORY, a function of yours that returns one; from the initial structure where that "
        "fails or does not converge",
    )
    p.add_argument(
        "--compare",
        action="store_true",
        help="with --refine: also relax the initial structure, at twice the cost, and say what was "
        "saved in ionic steps (geometries whose forces were computed) and whether the prediction "
        "led to a higher minimum",
    )
    p.add_argument(
        "--fmax",
        type=float,
        default=0.05,
        metavar="F",
        help="eV/Å, below which a structure counts as relaxed, and at which --refine and static "
        "models stop (default: 0.05)",
    )
    p.add_argument(
        "--steps",
        type=int,
        default=500,
        metavar="N",
        help="LBFGS steps of --refine and of static models at most (default: 500)",
    )
    p.add_argument(
        "--fixed", metavar="INDICES", help="atoms to hold, from 0, e.g. 0,3,8-11, beside the file's"
    )
    p.add_argument(
        "--fix-below", type=float, metavar="Z", help="hold the atoms with z below so many Å"
    )
    p.add_argument(
        "--keep-cell",
        action="store_true",
        help="relax the atoms only, though the model relaxes cells too: slabs and molecules in a "
        "periodic box, say",
    )
    p.add_argument(
        "--out",
        default="relaxed",
        metavar="DIR",
        help="for all results, summary.csv, and NAME-relaxed.* and NAME-path.* of each file, NAME being the file's "
        "or, where that says nothing (POSCAR), the folder's (default: relaxed)",
    )
    p.add_argument(
        "--format",
        choices=("poscar", "cif", "extxyz", "traj"),
        help="of the relaxed structures (default: that of a POSCAR or CIF, else extxyz); paths "
        "are extxyz, or traj with traj",
    )
    p.add_argument("--overwrite", action="store_true", help="replace files that exist")
    p.add_argument(
        "--skip-existing",
        action="store_true",
        help="leave out inputs whose relaxed structure and path are in --out already (and, with "
        "--refine, refined): to go on with what was interrupted; not where these are of another "
        "structure of that name, or of another --model",
    )
    p.add_argument(
        "--plot", action="store_true", help="draw energy, fmax and displacement along each path"
    )
    p.add_argument(
        "--html",
        metavar="FILE",
        help="the path of one structure as a page to look at in a browser, without network",
    )
    p.add_argument("--json", action="store_true", help="print JSON instead of the table")
