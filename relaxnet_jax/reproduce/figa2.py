"""Figure A.2: predicted against true energies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from relaxnet_jax.evaluate.figures import parity_figure
from relaxnet_jax.metrics import Comparison, pearson
from relaxnet_jax.reproduce import fig3a, paper
from relaxnet_jax.reproduce.experiment import Experiment
from relaxnet_jax.reproduce.formats import number
from relaxnet_jax.reproduce.lab import Lab
from relaxnet_jax.reproduce.scores import Score, numbers
from relaxnet_jax.reproduce.section import Cell, Section, Table
from relaxnet_jax.reproduce.verdict import Claim, Outcome, decided


def section(lab: Lab) -> Section:
    """The figure, its numbers and its claim."""
    setting = lab.setting
    found = fig3a.runs(setting)
    predicted = [lab.paths(run).comparisons for run in found]
    total = {p: _correlations(predicted, p, False) for p in ("model", "nothing", "composition")}
    relative = {p: _correlations(predicted, p, True) for p in ("model", "nothing")}
    rows: list[list[Cell]] = [
        ["total energies", total["model"], total["nothing"], total["composition"], paper.PEARSON],
        ["per atom, less composition", relative["model"], relative["nothing"], None, None],
    ]
    path, files = setting.out / "figA2.png", []
    if any(c.finite for c in predicted[0]):
        parity_figure(predicted[0], path, f"{found[0].name}, test split of {setting.name}")
        files = [(path, "parity of energies")]
    return Section(
        "figA2",
        "Figure A.2: parity of energies",
        "Implicit scheme, 10 frames, a fifth of the training split (as in table 2); all frames of all test "
        "structures. Anything that knows the composition predicts total energies that correlate with the true "
        "ones, so the second row and the figure show what the composition does not explain.",
        [Table("Pearson's correlation of predicted and true", COLUMNS, rows)],
        [
            Claim(
                "predicted energies agree strongly with true ones (the paper: PCC 0.979)",
                agreement(total["model"], total["composition"].mean),
                f"the correlation of total energies is at least {paper.PEARSON}; inconclusive if "
                "the composition alone reaches that",
            )
        ],
        files,
    )


COLUMNS = ("energies", "RelaxNet", "doing nothing", "composition only", "paper")


def agreement(correlation: Score, composition: float) -> Outcome:
    """Whether predicted total energies correlate with the true ones as strongly as in the paper.

    Nothing follows if the composition, which needs no structure, reaches that correlation too, as
    it does where total energies span thousands of eV.

    Args:
      correlation: correlations of the model's energies with the true ones, by seed.
      composition: correlation of the composition's energies with the true ones; NaN if undefined.
    """
    model = correlation.mean
    text = f"PCC {number(model, 4)}; composition only {number(composition, 4)}"
    if not np.isfinite(model):
        return decided(None, text)
    if model >= paper.PEARSON and composition >= paper.PEARSON:
        return decided(None, f"{text}: on these data the composition alone reaches it")
    return decided(bool(model >= paper.PEARSON), text, correlation.seeds)


def _correlations(predicted: Sequence[Sequence[Comparison]], predictor, per_atom: bool) -> Score:
    """Pearson's correlation by seed, over all frames of all structures with a finite prediction."""
    found = []
    for comparisons in predicted:
        pairs = []
        for c in comparisons:
            if c.finite:
                both = np.stack([c.true_energies, c.prediction(predictor)[1]])
                size = len(c.atomic_numbers)
                pairs.append((both - c.composition_energy) / size if per_atom else both)
        found.append(pearson(*np.concatenate(pairs, axis=1)) if pairs else None)
    return numbers(found)


EXPERIMENT = Experiment("figA2", fig3a.runs, section)
