"""The arguments of ``relaxnet-jax relax``."""

from __future__ import annotations

import argparse

from relaxnet_jax.cli_data import command

EXIT_CODES = """\
exit codes: 0 all relaxed; 1 some failed, each named on stderr with the reason;
2 bad input, or nothing could be relaxed"""


def add_relax(commands) -> None:
    text = "relax structure files: final structures, paths, and how far to trust them"
    p = command(commands, "relax", "relax", text)
    p.epilog = EXIT_CODES
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="structure files in any format ASE reads, all images or, as FILE@-1 or FILE@0:5, some; "
        "folders, searched for POSCAR*, vasp, poscar, cif, xyz, extxyz and traj files other than results "
        "of this package",
    )
    p.add_argument(
        "--model",
        action="append",
        metavar="DIR",
        help="training run or model folder (default: the committee shipped with the package); repeat for "
        "models trained from different seeds: their mean is the prediction, their disagreement estimates "
        "its error",
    )
    p.add_argument(
        "--frames", type=int, default=5, metavar="N", help="frames per path (default: 5)"
    )
    p.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="structures predicted at once (default: 16 on a CPU, 128 on an accelerator); batches that do "
        "not fit in memory are halved",
    )
    p.add_argument(
        "--refine",
        metavar="NAME",
        help="continue from the prediction with ASE's LBFGS and the calculator emt, chgnet or "
        "MODULE:FACTORY, your function that returns one; from the initial structure if that fails or does "
        "not converge",
    )
    p.add_argument(
        "--compare",
        action="store_true",
        help="with --refine: also relax the initial structure, at twice the cost, and report the ionic "
        "steps saved (geometries whose forces were computed) and whether the prediction led to a higher "
        "minimum",
    )
    p.add_argument(
        "--fmax",
        type=float,
        default=0.05,
        metavar="F",
        help="force in eV/Å below which a structure counts as relaxed, and at which --refine and static "
        "models stop (default: 0.05)",
    )
    p.add_argument(
        "--steps",
        type=int,
        default=500,
        metavar="N",
        help="maximum number of LBFGS steps of --refine and of static models (default: 500)",
    )
    p.add_argument(
        "--fixed",
        metavar="INDICES",
        help="atoms to fix, counted from 0, e.g. 0,3,8-11, in addition to those fixed in the file",
    )
    p.add_argument("--fix-below", type=float, metavar="Z", help="fix the atoms with z below Z Å")
    p.add_argument(
        "--keep-cell",
        action="store_true",
        help="relax the atoms only, even if the model relaxes cells, e.g. for slabs and molecules in a "
        "periodic box",
    )
    p.add_argument(
        "--out",
        default="relaxed",
        metavar="DIR",
        help="output folder: summary.csv, and NAME-relaxed.* and NAME-path.* for each file, where NAME is "
        "the file's or, if that is generic (POSCAR), the folder's (default: relaxed)",
    )
    p.add_argument(
        "--format",
        choices=("poscar", "cif", "extxyz", "traj"),
        help="format of the relaxed structures (default: that of a POSCAR or CIF, else extxyz); paths are "
        "extxyz, or traj with traj",
    )
    p.add_argument("--overwrite", action="store_true", help="replace existing files")
    p.add_argument(
        "--skip-existing",
        action="store_true",
        help="skip inputs whose relaxed structure and path are already in --out (and, with --refine, "
        "refined), to continue an interrupted command; not if they are of another structure of that name, "
        "or of another --model",
    )
    p.add_argument(
        "--plot", action="store_true", help="draw energy, fmax and displacement along each path"
    )
    p.add_argument(
        "--html",
        metavar="FILE",
        help="write the path of one structure as a web page that works offline",
    )
    p.add_argument("--json", action="store_true", help="print JSON instead of the table")
