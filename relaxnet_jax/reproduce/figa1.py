"""Figure A.1: distributions over the data set."""

from __future__ import annotations

import numpy as np

from relaxnet_jax.data.quality.statistics import summarise
from relaxnet_jax.evaluate.data_figure import STILL, distribution_figure
from relaxnet_jax.reproduce import paper
from relaxnet_jax.reproduce.experiment import Experiment
from relaxnet_jax.reproduce.lab import Lab
from relaxnet_jax.reproduce.section import Cell, Section, Table
from relaxnet_jax.reproduce.verdict import Claim, Outcome, decided

LABELS = {
    "atoms": "atoms per structure",
    "frames": "frames per relaxation",
    "displacement": "mean displacement (Å)",
    "max_displacement": "largest displacement (Å)",
    "first_energy": "initial energy (eV/atom)",
    "last_energy": "final energy (eV/atom)",
}


def section(lab: Lab) -> Section:
    """The figure and its numbers, over the whole store whatever part of it the report uses."""
    setting = lab.setting
    summary = summarise(setting.dataset.trajectories.store)
    rows: list[list[Cell]] = [
        ["relaxations", summary.relaxations, None, None, paper.STRUCTURES],
        ["elements", len(summary.elements), None, None, paper.ELEMENTS],
    ]
    for name, label in LABELS.items():
        if name in summary.distributions:
            d = summary.distributions[name]
            theirs = f"at most {paper.MOST_ATOMS}" if name == "atoms" else None
            rows.append([label, d.median, d.min, d.max, theirs])
    path = setting.out / "figA1.png"
    distribution_figure(summary, path, f"{setting.name}: {summary.relaxations} relaxations")
    elements, most = len(summary.elements), int(summary.distributions["atoms"].max)
    return Section(
        "figA1",
        "Figure A.1: the data",
        "Distributions over the relaxations in the data set; the paper's is JARVIS-DFT.",
        [Table(setting.name, ("quantity", "count or median", "least", "most", "paper"), rows)],
        [
            Claim(
                f"the data are diverse: {paper.ELEMENTS} elements, up to {paper.MOST_ATOMS} atoms",
                decided(
                    elements >= paper.ELEMENTS and most >= paper.MOST_ATOMS,
                    f"{elements} elements, up to {most} atoms",
                ),
                "at least as many of both",
            ),
            Claim(
                "most displacements are between 0.001 and 0.01 Å",
                common(summary.values["displacement"]),
                "more than half of the mean displacements of the relaxations",
            ),
        ],
        [(path, "distributions")],
    )


def common_share(moved: np.ndarray) -> float | None:
    """Percentage of the non-zero displacements (Å) in the paper's range; None if nothing moves."""
    moved = moved[moved > STILL]
    low, high = paper.COMMON_DISPLACEMENT
    return 100 * float(((moved >= low) & (moved <= high)).mean()) if len(moved) else None


def common(moved: np.ndarray) -> Outcome:
    """Whether more than half of the displacements lie in the paper's range."""
    share = common_share(moved)
    if share is None:
        return decided(None, "nothing moves")
    median = np.median(moved[moved > STILL])
    return decided(share > 50, f"{share:.1f} % of them are; their median is {median:.3g} Å")


EXPERIMENT = Experiment("figA1", lambda setting: [], section)
