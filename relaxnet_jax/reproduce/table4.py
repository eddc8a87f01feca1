"""Table 4: energies per atom by k-fold cross-validation, compared with static models."""

from __future__ import annotations

from typing import Any

from relaxnet_jax.metrics import Comparison
from relaxnet_jax.reproduce import charts, paper
from relaxnet_jax.reproduce.experiment import Experiment
from relaxnet_jax.reproduce.formats import number
from relaxnet_jax.reproduce.lab import Lab
from relaxnet_jax.reproduce.runs import Run
from relaxnet_jax.reproduce.scores import Score, errors, relative
from relaxnet_jax.reproduce.section import Cell, Section, Table
from relaxnet_jax.reproduce.setting import Setting
from relaxnet_jax.reproduce.unlike import unlike
from relaxnet_jax.reproduce.verdict import Claim, Outcome, all_of, decided, lower

MODELS = {"explicit": "RelaxNet explicit", "static": "static RelaxNet", "egnn": "EGNN"}
VALIDATION = 0.05
PAIRED = "standard errors are those of the paired differences over folds"


def case_runs(setting: Setting, role: str) -> list[Run]:
    """One run per fold, with the first seed."""
    split_file = setting.config(role).data.split_file
    splits = (1 - VALIDATION - 1 / setting.folds, VALIDATION, 1 / setting.folds)
    own: dict[str, Any] = {} if split_file else {"data__splits": splits}
    seed = setting.seeds[0]
    return [
        setting.run(role, seed, label=f"fold {k} of {setting.folds}", data__fold=k, **own)
        for k in range(setting.folds)
    ]


def runs(setting: Setting) -> list[Run]:
    """Every model with every fold."""
    return [run for role in MODELS for run in case_runs(setting, role)]


def section(lab: Lab) -> Section:
    """The table, its figure and its claims."""
    setting = lab.setting
    explicit = [lab.paths(run).comparisons for run in case_runs(setting, "explicit")]
    frames = setting.config("explicit").dynamics.frames
    static = {
        role: [lab.points(run, frames).comparisons for run in case_runs(setting, role)]
        for role in MODELS
        if role != "explicit"
    }
    final, every = (_folds(explicit, which) for which in ("final", "all"))
    places, still = (
        errors(explicit, "positions_mae", "final", predictor) for predictor in ("model", "nothing")
    )
    head: list[Cell] = [
        f"{MODELS['explicit']}: predicted path",
        relative(places, still),
        final,
        every,
    ]
    rows: list[list[Cell]] = [[*head, *paper.TABLE4_RELAXNET[1:]]]
    compared: dict[str, tuple[Score, Score]] = {}
    for role, predicted in static.items():
        compared[role] = _folds(predicted, "final"), _folds(predicted, "all")
        rows.append([f"{MODELS[role]}: at the true frames", None, *compared[role], None, None])
    nothing = [_folds(explicit, which, "nothing") for which in ("final", "all")]
    alone = relative(still, still).mean
    rows.append(["doing nothing (true initial energy)", alone, *nothing, None, None])
    rows += [
        [f"{name}, paper", None, None, None, None, value]
        for name, (_, value) in paper.TABLE4.items()
    ]
    path = setting.out / "table4.png"
    bars = {MODELS["explicit"]: every} | {MODELS[role]: pair[1] for role, pair in compared.items()}
    marks = {"doing nothing": nothing[1].mean, "paper's RelaxNet": paper.TABLE4_RELAXNET[2]}
    panel = "energy MAE, all frames (meV/atom)"
    charts.bars({panel: bars}, path, f"{setting.folds} folds of {setting.name}.", {panel: marks})
    return Section(
        "table4",
        f"Table 4: energies by {setting.folds}-fold cross-validation",
        "Every relaxation is tested once, by a model trained on none of its group; ± is the standard "
        "deviation over folds. Static models are given the true positions of every frame and predict its "
        "energy; RelaxNet is given only the initial positions and predicts the whole path. The paper's other models "
        "are those of the JARVIS leaderboard (55,713 structures, all frames; RelaxNet 24,311). The configs "
        "were chosen on the test split of the other sections; few of the structures tested here are part of it.",
        [Table("Test splits of all folds", COLUMNS, rows, "folds")],
        [
            Claim(
                "RelaxNet's all-frame energies are as good as those of static models, from less input",
                all_of(
                    [
                        lower(
                            by_fold(every),
                            by_fold(own[1]),
                            (MODELS["explicit"], MODELS[role]),
                            "meV/atom",
                        )
                        for role, own in compared.items()
                    ]
                ),
                f"lower than those of both static models; {PAIRED}",
            ),
            Claim(
                "final-frame energies are better than all-frame ones",
                lower(by_fold(final), by_fold(every), ("final", "all frames"), "meV/atom"),
                PAIRED,
            ),
            *(
                Claim(
                    f"energy errors, {frames}, reach the paper's {theirs} meV/atom (of other data)",
                    _reached(found, theirs),
                    "the mean over folds is at most that",
                    ours=True,
                )
                for frames, found, theirs in (
                    ("final frame", final, paper.TABLE4_RELAXNET[1]),
                    ("all frames", every, paper.TABLE4_RELAXNET[2]),
                )
            ),
            *(
                Claim(
                    f"final geometry: less than {factor:g} of doing nothing",
                    lower(
                        by_fold(places), by_fold(still), ("RelaxNet", "doing nothing"), "Å", factor
                    ),
                    PAIRED,
                    ours=True,
                )
                for factor in (0.5, 0.25)
            ),
        ],
        [(path, "all-frame energy errors")],
        unlike(setting, static),
    )


COLUMNS = (
    "model",
    "final coordinate MAE / doing nothing",
    "energy MAE, final (meV/atom)",
    "energy MAE, all frames (meV/atom)",
    "paper: final (meV/atom)",
    "paper: all frames (meV/atom)",
)


def by_fold(s: Score) -> Score:
    """The means of the folds, to be compared in pairs: a hard fold is hard for all models."""
    means = s.by_seed
    return Score(tuple(f"fold {k}" for k in range(len(means))), means[None], exact=True)


def _reached(found: Score, theirs: float) -> Outcome:
    mean = found.mean
    return decided(mean <= theirs if found.seeds else None, f"{number(mean)} meV/atom", found.seeds)


def _folds(predicted: list[tuple[Comparison, ...]], which, predictor="model") -> Score:
    """Energy errors per atom, with folds in place of seeds; no structure is in two folds."""
    return errors(predicted, "energy_mae_per_atom", which, predictor)


EXPERIMENT = Experiment("table4", runs, section)
