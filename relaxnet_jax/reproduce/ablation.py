"""Beyond the paper: the effect of each choice of dynamics, solver and encoder, one at a time."""

from __future__ import annotations

from typing import Any

from relaxnet_jax.metrics import Comparison, falls
from relaxnet_jax.reproduce import charts
from relaxnet_jax.reproduce.experiment import Experiment
from relaxnet_jax.reproduce.lab import Lab
from relaxnet_jax.reproduce.methods import passes, scaled, seeds
from relaxnet_jax.reproduce.runs import Run
from relaxnet_jax.reproduce.scores import EMPTY, Score, errors, measured, numbers, relative
from relaxnet_jax.reproduce.section import Cell, Section, Table
from relaxnet_jax.reproduce.setting import Setting
from relaxnet_jax.reproduce.verdict import Claim, Outcome, all_of, lower

ROLE = "explicit"
UNDAMPED = {"dynamics__friction": False, "dynamics__time_scale": False}
# Each variant is the shipped config with these changes; variants equal to it are left out.
VARIANTS: dict[str, dict[str, Any]] = {
    "paper: undamped Newton, atomic mass": UNDAMPED | {"dynamics__mass": "atomic"},
    "undamped Newton, unit mass": UNDAMPED | {"dynamics__mass": "unit"},
    "no friction": {"dynamics__friction": False},
    "friction": {"dynamics__friction": True},
    "no time scale": {"dynamics__time_scale": False},
    "time scale": {"dynamics__time_scale": True},
    "atomic mass": {"dynamics__mass": "atomic"},
    "unit mass": {"dynamics__mass": "unit"},
    "learned mass": {"dynamics__mass": "learned"},
    "first order": {"dynamics__order": "first"},
    "Tsit5": {"dynamics__solver": "tsit5"},
    "2 substeps": {"dynamics__substeps": 2},
    "4 substeps": {"dynamics__substeps": 4},
    "position update": {"model__update_positions": True},
    "no attention": {"model__attention": False},
    "no vector messages": {"model__vector_messages": False},
    "triplets instead of moments": {"model__interaction": "triplets"},
    "moments instead of triplets": {"model__interaction": "moments"},
}
SHIPPED = "shipped config"


def case_runs(setting: Setting, name: str) -> list[Run]:
    """The runs of a variant."""
    if name == SHIPPED:
        return seeds(setting, ROLE)
    return seeds(setting, ROLE, label=name, **VARIANTS[name])


def cases(setting: Setting) -> list[str]:
    """The shipped config and the variants that differ from it, each once."""
    seen, kept = [setting.config(ROLE)], [SHIPPED]
    for name, changes in VARIANTS.items():
        config = setting.config(ROLE, **changes)
        if config not in seen:
            seen.append(config)
            kept.append(name)
    return kept


def runs(setting: Setting) -> list[Run]:
    """Every variant with every seed."""
    return [run for name in cases(setting) for run in case_runs(setting, name)]


def section(lab: Lab) -> Section:
    """The table, its figure, and which variants are better than the shipped config."""
    setting = lab.setting
    names = cases(setting)
    found = {name: case_runs(setting, name) for name in names}
    made = {name: [lab.paths(run) for run in found[name]] for name in names}
    compared = {name: [p.comparisons for p in predicted] for name, predicted in made.items()}
    places = {name: errors(compared[name], "positions_mae") for name in names}
    energy = {name: errors(compared[name], "energy_mae_per_atom") for name in names}
    nothing = {
        metric: errors(compared[SHIPPED][:1], metric, predictor="nothing")
        for metric in ("positions_mae", "energy_mae_per_atom", "forces_mae")
    }
    still = nothing["positions_mae"].mean
    rows: list[list[Cell]] = []
    for name in names:
        rows.append(
            [
                name,
                places[name],
                relative(places[name], nothing["positions_mae"]),
                energy[name],
                errors(compared[name], "energy_mae_per_atom", "all"),
                errors(compared[name], "forces_mae"),
                errors(compared[name], "forces_mae", "all"),
                scaled(measured(compared[name], _falls), 100),
                numbers([lab.epoch_seconds(run) for run in found[name]]),
                scaled(numbers([p.facts["seconds"] for p in made[name]]), 1e3),
                numbers([len(lab.epochs(run)) for run in found[name]]),
                places[name].missing,
            ]
        )
    rest = [nothing["energy_mae_per_atom"], None, nothing["forces_mae"], *[None] * 6]
    rows.append(["doing nothing", nothing["positions_mae"], 1.0, *rest])
    path = setting.out / "ablation.png"
    marks = {"coordinate MAE (Å)": {"doing nothing": still}}
    panels = {"coordinate MAE (Å)": places, "energy MAE (meV/atom)": energy}
    charts.bars(panels, path, f"Final frame, test split of {setting.name}.", marks)
    return Section(
        "ablation",
        "Dynamics, solver and encoder, one choice at a time",
        "The config of the explicit scheme and variants of it (not in the paper). Each is given training time by its "
        "weight, which accounts for frames, substeps and solver but not for the encoder: a more expensive encoder "
        "gets fewer epochs.",
        [Table("Test split", COLUMNS, rows)],
        _claims(places, energy),
        [(path, "final frame of each variant")],
        [passes([p for predicted in made.values() for p in predicted])],
    )


COLUMNS = (
    "variant",
    "final coordinate MAE (Å)",
    "/ doing nothing",
    "energy MAE, final (meV/atom)",
    "energy MAE, all (meV/atom)",
    "force MAE, final (meV/Å)",
    "force MAE, all (meV/Å)",
    "energies that fall (%)",
    "time/epoch (s)",
    "inference (ms/structure)",
    "epochs",
    "failed",
)


def _falls(c: Comparison) -> float:
    """1 where the predicted energy never rises, else 0; NaN where a prediction is not finite."""
    return float(falls(c)) if c.finite else float("nan")


def _claims(places: dict[str, Score], energy: dict[str, Score]) -> list[Claim]:
    def best(scores: dict[str, Score], unit: str) -> Outcome:
        own = scores[SHIPPED]
        variants = [v for v in scores if v != SHIPPED]
        return all_of([lower(own, scores[v], (SHIPPED, v), unit) for v in variants])

    newton = next(iter(VARIANTS))
    return [
        Claim(
            "the shipped config has better final positions than the paper's dynamics",
            lower(places[SHIPPED], places.get(newton, EMPTY), (SHIPPED, newton), "Å"),
            ours=True,
        ),
        Claim("no variant has better final positions", best(places, "Å"), ours=True),
        Claim("no variant has better final energies", best(energy, "meV/atom"), ours=True),
    ]


EXPERIMENT = Experiment("ablation", runs, section)
