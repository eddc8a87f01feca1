"""Beyond the paper: the energy that a relaxation releases, with and without a loss term for it."""

from __future__ import annotations

from typing import Any

from relaxnet_jax.metrics import Predictor
from relaxnet_jax.reproduce import charts
from relaxnet_jax.reproduce.experiment import Experiment
from relaxnet_jax.reproduce.lab import Lab
from relaxnet_jax.reproduce.methods import seeds
from relaxnet_jax.reproduce.runs import Run
from relaxnet_jax.reproduce.scores import Score, errors, numbers, relative
from relaxnet_jax.reproduce.section import Cell, Section, Table
from relaxnet_jax.reproduce.setting import Setting
from relaxnet_jax.reproduce.verdict import Claim, lower

ROLE = "explicit"
WEIGHT = 10.0  # of the loss term, where the config has none
WITH, WITHOUT = "loss of energy changes", "no loss of energy changes"
KINDS = (WITH, WITHOUT)
CHANGE = "relaxation_energy_mae_per_atom"


def case_runs(setting: Setting, kind: str) -> list[Run]:
    """Runs of the explicit scheme with or without the term; one of these is the shipped config."""
    shipped = setting.config(ROLE).loss.energy_change
    if (shipped > 0) == (kind == WITH):
        return seeds(setting, ROLE)
    return seeds(setting, ROLE, label=kind, loss__energy_change=0.0 if shipped else WEIGHT)


def runs(setting: Setting) -> list[Run]:
    """Runs with and without the term, with every seed."""
    return [run for kind in KINDS for run in case_runs(setting, kind)]


def section(lab: Lab) -> Section:
    """The table, its figure and the claims on what the term does."""
    setting = lab.setting
    found = {kind: case_runs(setting, kind) for kind in KINDS}
    made = {kind: [lab.paths(run).comparisons for run in found[kind]] for kind in KINDS}

    def of(predictor: Predictor, metric: str, **which: Any):
        return errors(made[WITH][:1], metric, predictor=predictor, **which)

    places = {kind: errors(made[kind], "positions_mae") for kind in KINDS}
    change = {kind: errors(made[kind], CHANGE) for kind in KINDS}
    work = {kind: errors(made[kind], "work_mae_per_atom") for kind in KINDS}
    energy = {kind: errors(made[kind], "energy_mae_per_atom") for kind in KINDS}
    forces = {kind: errors(made[kind], "forces_mae", "all") for kind in KINDS}
    still, released = of("nothing", "positions_mae"), of("nothing", CHANGE)
    rows: list[list[Cell]] = []
    for kind in KINDS:
        row: list[Cell] = [kind, change[kind], errors(made[kind], CHANGE, "all"), work[kind]]
        row += [energy[kind], errors(made[kind], "energy_mae_per_atom", "all")]
        row += [forces[kind], relative(places[kind], still)]
        rows.append([*row, numbers([len(lab.epochs(run)) for run in found[kind]])])
    others: dict[Predictor, str] = {"nothing": "doing nothing", "composition": "composition only"}
    for predictor, name in others.items():
        change_cells: list[Cell] = [None, None]
        if predictor == "nothing":
            change_cells = [released, of("nothing", CHANGE, frames="all")]
        own = [of(predictor, "energy_mae_per_atom", frames=f) for f in ("final", "all")]
        rest = [of(predictor, "forces_mae", frames="all"), relative(still, still), None]
        rows.append([name, *change_cells, None, *own, *rest])
    path = setting.out / "energies.png"
    panels = {
        "E(1) - E(0), MAE (meV/atom)": change,
        "work of forces, MAE (meV/atom)": work,
        "final coordinate MAE (Å)": places,
    }
    marks = {"E(1) - E(0), MAE (meV/atom)": {"doing nothing": released.mean}}
    charts.bars(panels, path, f"Explicit scheme, test split of {setting.name}.", marks)
    return Section(
        "energies",
        "The energy that a relaxation releases",
        "The paper's loss compares the energy of each frame separately. Most of an energy belongs to the composition, "
        "is learned from few compositions and is the same on all frames; the change along the path is "
        "small beside the error of that. Models are trained with and without a loss term on the changes E(t) - E(1) "
        "(`loss.energy_change`). The changes are also compared with the work of the forces along the same paths, "
        "which needs no predicted energies.",
        [Table("Test split, explicit scheme", COLUMNS, rows)],
        _claims(change, work, energy, places, forces, released),
        [(path, "energies and positions, with and without the term")],
    )


COLUMNS = (
    "trained with",
    "E(1) - E(0) MAE (meV/atom)",
    "E(t) - E(0) MAE, all (meV/atom)",
    "… by work of forces, final (meV/atom)",
    "energy MAE, final (meV/atom)",
    "energy MAE, all (meV/atom)",
    "force MAE, all (meV/Å)",
    "final coordinate MAE / doing nothing",
    "epochs",
)


def _claims(change, work, energy, places, forces, released: Score) -> list[Claim]:
    both, unit = ("with the term", "without"), "meV/atom"
    own = ("E(1) - E(0)", "work")
    outcomes = {
        "the term makes E(1) - E(0) better": lower(change[WITH], change[WITHOUT], both, unit),
        "with it E(1) - E(0) is better than doing nothing": lower(
            change[WITH], released, ("with the term", "doing nothing"), unit
        ),
        "without it E(1) - E(0) is better than doing nothing": lower(
            change[WITHOUT], released, ("without", "doing nothing"), unit
        ),
        "with it E(1) - E(0) is better than the work of the same paths' forces": lower(
            change[WITH], work[WITH], own, unit, paired=True
        ),
        "with it E(1) - E(0) is better than the work of forces without it": lower(
            change[WITH], work[WITHOUT], ("E(1) - E(0) with the term", "work without"), unit
        ),
        "the term makes final energies better": lower(energy[WITH], energy[WITHOUT], both, unit),
        "the term makes final positions better": lower(places[WITH], places[WITHOUT], both, "Å"),
        "the term makes forces better, all frames": lower(
            forces[WITH], forces[WITHOUT], both, "meV/Å"
        ),
    }
    return [Claim(text, outcome, ours=True) for text, outcome in outcomes.items()]


EXPERIMENT = Experiment("energies", runs, section)
