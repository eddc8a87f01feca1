"""Table 3: noise on the initial positions, during and after training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from relaxnet_jax.metrics import Comparison
from relaxnet_jax.reproduce import charts, paper
from relaxnet_jax.reproduce.experiment import Experiment
from relaxnet_jax.reproduce.formats import number
from relaxnet_jax.reproduce.lab import Lab, Predicted
from relaxnet_jax.reproduce.methods import seeds
from relaxnet_jax.reproduce.runs import Run
from relaxnet_jax.reproduce.scores import Score, bound, errors, measured, score
from relaxnet_jax.reproduce.section import Cell, Section, Table
from relaxnet_jax.reproduce.setting import Setting
from relaxnet_jax.reproduce.verdict import Claim, Outcome, all_of, complete, decided, lower

IN_TRAINING = (0.0, 1e-2, 1e-1)  # Å
SHIPPED = -1.0  # stands for the config's own noise, on the config's share of the structures
AFTER = paper.TABLE3_SCALES
CONSTANT = 0.05  # largest relative change that counts as near-constant


def scales(setting: Setting) -> tuple[float, ...]:
    """The noise scales in training: the paper's, and the config's own if it has any."""
    t = setting.config("explicit").train
    return (*IN_TRAINING, SHIPPED) if t.noise or t.strain_noise else IN_TRAINING


def label_of(setting: Setting, alpha: float) -> str:
    """The label of a scale, for tables."""
    t = setting.config("explicit").train
    return f"{t.noise:g} ({t.noise_share:.0%}: as shipped)" if alpha == SHIPPED else f"{alpha:g}"


def case_runs(setting: Setting, alpha: float) -> list[Run]:
    """Explicit runs trained with noise of ``alpha`` Å on every structure, as in the paper.

    With `SHIPPED`, the noise is the config's own.
    """
    if alpha == SHIPPED:
        return seeds(setting, "explicit")
    t = setting.config("explicit").train
    changes: dict[str, float] = {"train__noise": alpha, "train__strain_noise": 0.0}
    if alpha:
        changes["train__noise_share"] = 1.0
    shipped = not alpha and t.noise == t.strain_noise == 0
    label = "" if shipped else f"noise {alpha:g} Å"
    return seeds(setting, "explicit", label=label, **changes)


def runs(setting: Setting) -> list[Run]:
    """Every in-training scale with every seed."""
    setting.need_fixed_cells("table3")
    return [run for alpha in scales(setting) for run in case_runs(setting, alpha)]


def section(lab: Lab) -> Section:
    """The grid, its figure and its claims."""
    setting = lab.setting
    trained = scales(setting)
    made = {
        (alpha, beta): [lab.shaken(run, beta) for run in case_runs(setting, alpha)]
        for alpha in trained
        for beta in AFTER
    }
    grid = {key: [p.comparisons for p in predicted] for key, predicted in made.items()}
    energy, per_atom, forces, places = (
        {key: errors(compared, metric) for key, compared in grid.items()}
        for metric in ("energy_mae", "energy_mae_per_atom", "forces_mae", "positions_mae")
    )
    contraction = {
        (a, b): _contraction(made[a, 0.0], made[a, b]) for a in trained for b in AFTER if b
    }
    rows: list[list[Cell]] = []
    for alpha in trained:
        for at, beta in enumerate(AFTER):
            key, theirs = (alpha, beta), paper.TABLE3.get(alpha)
            rows.append(
                [
                    label_of(setting, alpha),
                    f"{beta:g}",
                    energy[key],
                    theirs[0][at] if theirs else None,
                    per_atom[key],
                    forces[key],
                    theirs[1][at] if theirs else None,
                    places[key],
                    contraction.get(key),
                    energy[key].missing,
                ]
            )
    for beta in AFTER:
        compared = grid[0.0, beta][:1]
        same = [errors(grid[0.0, 0.0][:1], m, predictor="nothing") for m in _QUANTITIES]
        left = measured(compared, _untouched)
        rows.append(
            [
                "doing nothing",
                f"{beta:g}",
                same[0],
                None,
                same[1],
                same[2],
                None,
                left,
                None,
                left.missing,
            ]
        )
    path = setting.out / "table3.png"
    _draw(setting, per_atom, places, contraction, path)
    return Section(
        "table3",
        "Table 3: perturbed initial positions",
        "Gaussian noise on the initial positions of the free atoms, with a standard deviation of α Å "
        "in training and β Å in prediction (the same draws for every model). Errors of the final frame "
        "are against the true final frame of the unperturbed relaxation. 'Moved / noise' is how far the noise moves "
        "the predicted final positions, over how far it moved the initial ones (root mean squares): below 1 the "
        "model contracts, as a relaxation does. Doing nothing "
        "keeps the perturbed positions and the energy and forces of the unperturbed structure.",
        [Table("Final frame of the test split", COLUMNS, rows)],
        _claims(energy, forces, places, contraction, trained),
        [(path, "errors and contraction against the noise after training")],
    )


_QUANTITIES = ("energy_mae", "energy_mae_per_atom", "forces_mae")
COLUMNS = (
    "α (Å)",
    "β (Å)",
    "energy MAE (eV)",
    "paper: energy MAE (eV)",
    "energy MAE (meV/atom)",
    "force MAE (meV/Å)",
    "paper: force MAE (meV/Å)",
    "coordinate MAE (Å)",
    "moved / noise",
    "failed",
)


def _untouched(c: Comparison) -> float:
    """Error in Å of the perturbed initial positions, taken as the final ones."""
    return float(np.abs(c.pred_positions[0] - c.true_positions[-1])[c.free_mask].mean())


def _contraction(still: Sequence[Predicted], shaken: Sequence[Predicted]) -> Score:
    """RMS displacement of the final positions over that of the initial ones, by structure."""
    rows = []
    for a, b in zip(still, shaken):
        before = {c.id: c for c in a.comparisons}
        row = {}
        for c in b.comparisons:
            moved = [
                (c.pred_positions - before[c.id].pred_positions)[k][c.free_mask] for k in (0, -1)
            ]
            initial, final = (float(np.sqrt((d**2).mean())) if d.size else np.nan for d in moved)
            row[c.id] = final / initial if initial else np.nan
        rows.append(row)
    return score(rows)


def _claims(energy, forces, places, contraction, trained: Sequence[float]) -> list[Claim]:
    shipped = SHIPPED if SHIPPED in trained else 0.0
    constant = [_constant(scores, what) for scores, what in ((energy, "energy"), (forces, "force"))]
    worse = [
        lower(scores[0.0, 0.0], scores[alpha, 0.0], (f"α = 0 {what}", f"α = {alpha:g}"), unit)
        for scores, what, unit in ((energy, "energy", "eV"), (forces, "force", "meV/Å"))
        for alpha in IN_TRAINING[1:]
    ]
    moved = contraction[shipped, 0.1]
    return [
        Claim(
            "errors hardly depend on the noise after training (0 to 1 Å; α = 0)",
            all_of(constant),
            f"no noise changes either error by more than {CONSTANT:.0%}, and no prediction fails",
        ),
        Claim("noise in training makes errors larger", all_of(worse)),
        Claim(
            "noise of 0.1 Å moves the predicted final positions by less than the noise (as shipped)",
            complete(
                lower(moved, bound(1.0, moved), ("moved / noise", "bound")),
                places[shipped, 0.1].missing,
                f"of {places[shipped, 0.1].values.size} predictions",
            ),
            ours=True,
        ),
    ]


def _constant(scores: dict[tuple[float, float], Score], what: str) -> Outcome:
    reference = scores[0.0, 0.0].mean
    others = [scores[0.0, beta] for beta in AFTER[1:]]
    if not np.isfinite(reference) or reference == 0:
        return decided(None, f"no {what} errors without noise")
    changes = [abs(s.mean / reference - 1) for s in others]
    failed = sum(s.missing for s in others) - len(others) * scores[0.0, 0.0].missing
    shown = ", ".join(f"{b:g} Å: {number(100 * c)} %" for b, c in zip(AFTER[1:], changes))
    text = f"{what} MAE changes by {shown}" + (f"; {failed} predictions fail" if failed else "")
    holds = bool(np.nanmax(changes) <= CONSTANT) and failed == 0
    return decided(holds, text, scores[0.0, 0.0].seeds)


def _draw(setting, per_atom, places, contraction, path) -> None:
    shown = [b for b in AFTER if b]

    def curves(scores):
        names = {a: f"α = {label_of(setting, a)}" for a in scales(setting)}
        return {name: (shown, [scores[a, b] for b in shown]) for a, name in names.items()}

    panels = {
        "energy MAE (meV/atom)": curves(per_atom),
        "coordinate MAE (Å)": curves(places),
        "moved / noise": curves(contraction),
    }
    caption = f"Final frame, test split of {setting.name}."
    charts.lines(
        panels, path, caption, "noise after training β (Å)", xlog=True, ylog=tuple(panels)[:2]
    )


EXPERIMENT = Experiment("table3", runs, section)
