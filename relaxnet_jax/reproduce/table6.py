"""Table 6: EGNN potentials of 2 and 4 layers with L-BFGS."""

from __future__ import annotations

from relaxnet_jax.reproduce.experiment import Experiment
from relaxnet_jax.reproduce.lab import Lab
from relaxnet_jax.reproduce.methods import (
    Method,
    criteria,
    doing_nothing,
    methods_figure,
    methods_table,
    minimised,
    seeds,
)
from relaxnet_jax.reproduce.runs import Run
from relaxnet_jax.reproduce.section import Section
from relaxnet_jax.reproduce.setting import Setting
from relaxnet_jax.reproduce.verdict import Claim, Outcome, all_of, lower

LAYERS = {2: "egnn", 4: "egnn4"}  # names in paper.TABLE5


def _potentials(setting: Setting, layers: int) -> list[Run]:
    """EGNN runs by number of layers; those of the shipped EGNN are the ones of table 5."""
    if layers == setting.config("egnn").model.layers:
        return seeds(setting, "egnn")
    return seeds(setting, "egnn", label=f"{layers} layers", model__layers=layers)


def runs(setting: Setting) -> list[Run]:
    """EGNN with 2 and 4 layers, and explicit RelaxNet, whose final forces define C2."""
    potentials = [run for layers in LAYERS for run in _potentials(setting, layers)]
    return seeds(setting, "explicit") + potentials


def section(lab: Lab) -> Section:
    """The table, its figure and its claims."""
    setting = lab.setting
    explicit = seeds(setting, "explicit")
    limits = criteria(lab, explicit)
    methods: dict[str, tuple[str, Method]] = {}
    for layers, name in LAYERS.items():
        for criterion, fmax in limits.items():
            made = minimised(lab, _potentials(setting, layers), fmax)
            if made is not None:
                label = f"EGNN, {layers} layers + LBFGS ({criterion})"
                methods[f"{name} {criterion}"] = (label, made)
    nothing = doing_nothing([lab.paths(run) for run in explicit])
    path = setting.out / "table6.png"
    caption = f"EGNN + LBFGS, test split of {setting.name}."
    methods_figure(methods, nothing, path, caption)
    return Section(
        "table6",
        "Table 6: EGNN of 2 and 4 layers as a potential for relaxation",
        "As table 5, for EGNN potentials of two depths.",
        [methods_table(methods, nothing)],
        _claims(methods),
        [(path, "EGNN by depth")],
    )


def _claims(methods: dict[str, tuple[str, Method]]) -> list[Claim]:
    def compare(quantity: str, unit: str, lower_is: str) -> Outcome:
        higher = "egnn" if lower_is == "egnn4" else "egnn4"
        outcomes = []
        for criterion in ("C1", "C2"):
            keys = [f"{name} {criterion}" for name in (lower_is, higher)]
            if all(key in methods for key in keys):
                (a_name, a), (b_name, b) = (methods[key] for key in keys)
                scores = getattr(a, quantity), getattr(b, quantity)
                outcomes.append(lower(*scores, (a_name, b_name), unit))
        return all_of(outcomes)

    return [
        Claim("4 layers have worse energies than 2", compare("energy", "eV", "egnn")),
        Claim("4 layers have better forces than 2", compare("forces", "meV/Å", "egnn4")),
        Claim("inference takes longer with 4 layers", compare("seconds", "s", "egnn")),
    ]


EXPERIMENT = Experiment("table6", runs, section)
