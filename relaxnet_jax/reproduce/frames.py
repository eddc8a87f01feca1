"""Beyond the paper: training on all frames of a relaxation, masked, or on equidistant ones."""

from __future__ import annotations

from relaxnet_jax.reproduce import charts
from relaxnet_jax.reproduce.experiment import Experiment
from relaxnet_jax.reproduce.lab import Lab
from relaxnet_jax.reproduce.methods import seeds
from relaxnet_jax.reproduce.runs import Run
from relaxnet_jax.reproduce.scores import Score, errors, numbers, relative
from relaxnet_jax.reproduce.section import Cell, Section, Table
from relaxnet_jax.reproduce.setting import Setting
from relaxnet_jax.reproduce.verdict import Claim, lower

KINDS = {"equidistant": "equidistant frames", "all": "all frames, each at its own time"}
DENSE = 10  # equidistant frames on which both are also compared


def case_runs(setting: Setting, kind: str) -> list[Run]:
    """Runs of the explicit scheme with one selection of frames."""
    plain = kind == setting.config("explicit").data.frame_selection
    label = "" if plain else KINDS[kind].split(",")[0]
    return seeds(setting, "explicit", label=label, data__frame_selection=kind)


def runs(setting: Setting) -> list[Run]:
    """Both selections of frames, with every seed."""
    return [run for kind in KINDS for run in case_runs(setting, kind)]


def section(lab: Lab) -> Section:
    """The table, its figure and its claims."""
    setting = lab.setting
    rows: list[list[Cell]] = []
    found = {kind: case_runs(setting, kind) for kind in KINDS}
    coarse, dense = (
        {k: [lab.paths(r, n).comparisons for r in rs] for k, rs in found.items()}
        for n in (None, DENSE)
    )
    places = {kind: errors(coarse[kind], "positions_mae") for kind in KINDS}
    energy = {kind: errors(dense[kind], "energy_mae_per_atom", "all") for kind in KINDS}
    forces = {kind: errors(dense[kind], "forces_mae", "all") for kind in KINDS}
    nothing = errors(coarse["equidistant"][:1], "positions_mae", predictor="nothing")
    for kind, label in KINDS.items():
        row: list[Cell] = [label, places[kind], relative(places[kind], nothing)]
        row += [errors(coarse[kind], "energy_mae_per_atom"), errors(coarse[kind], "forces_mae")]
        row += [errors(dense[kind], "positions_mae", "all"), energy[kind], forces[kind]]
        row += [numbers([lab.epoch_seconds(r) for r in found[kind]])]
        rows.append([*row, numbers([len(lab.epochs(r)) for r in found[kind]])])
    rows.append(_nothing(coarse["equidistant"][:1], dense["equidistant"][:1]))
    path = setting.out / "frames.png"
    short = {KINDS[k].split(",")[0]: k for k in KINDS}
    panels = {
        "final coordinate MAE (Å)": {name: places[k] for name, k in short.items()},
        "energy MAE (meV/atom)": {name: energy[k] for name, k in short.items()},
    }
    marks = {"final coordinate MAE (Å)": {"doing nothing": nothing.mean}}
    charts.bars(panels, path, f"Explicit scheme, test split of {setting.name}.", marks)
    names = "all frames", "equidistant"
    return Section(
        "frames",
        "All frames of a relaxation against equidistant ones",
        "The paper needs exactly n frames of every relaxation. Here a relaxation may have any number of frames, "
        "each at its own pseudotime, with absent ones masked. Models with both selections of frames are trained on the "
        "same relaxations, and compared on the final frame and on "
        f"{DENSE} equidistant frames (fewer if a relaxation has fewer).",
        [Table("Test split", COLUMNS, rows)],
        [
            Claim(text, lower(scores["all"], scores["equidistant"], names, unit), ours=True)
            for text, scores, unit in (
                ("all frames give better final positions", places, "Å"),
                (f"all frames give better energies on {DENSE} frames", energy, "meV/atom"),
                (f"all frames give better forces on {DENSE} frames", forces, "meV/Å"),
            )
        ],
        [(path, "by selection of frames")],
    )


COLUMNS = (
    "trained on",
    "final coordinate MAE (Å)",
    "/ doing nothing",
    "final energy MAE (meV/atom)",
    "final force MAE (meV/Å)",
    f"coordinate MAE, {DENSE} frames (Å)",
    f"energy MAE, {DENSE} frames (meV/atom)",
    f"force MAE, {DENSE} frames (meV/Å)",
    "time/epoch (s)",
    "epochs",
)


def _nothing(coarse, dense) -> list[Cell]:
    def error(compared, metric: str, which="final") -> Score:
        return errors(compared, metric, which, "nothing")

    row: list[Cell] = ["doing nothing", error(coarse, "positions_mae"), 1.0]
    row += [error(coarse, "energy_mae_per_atom"), error(coarse, "forces_mae")]
    row += [error(dense, "positions_mae", "all"), error(dense, "energy_mae_per_atom", "all")]
    return [*row, error(dense, "forces_mae", "all"), None, None]


EXPERIMENT = Experiment("frames", runs, section)
