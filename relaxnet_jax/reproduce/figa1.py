"""Figure A.1: what the data set holds."""

from __future__ import annotations

from relaxnet_jax.data.quality.statistics import summarise
from relaxnet_jax.evaluate.data_figure import distribution_figure
from relaxnet_jax.reproduce import paper
from relaxnet_jax.reproduce.experiment import Experiment
from relaxnet_jax.reproduce.lab import Lab
from relaxnet_jax.reproduce.section import Cell, Section, Table
from relaxnet_jax.reproduce.verdict import Claim, decided

LABELS = {
    "atoms": "atoms per structure",
    "frames": "frames per relaxation",
    "displacement": "mean displacement (Å)",
    "max_displacement": "largest displacement (Å)",
    "first_energy": "initial energy (eV/atom)",
    "last_energy": "final energy (eV/atom)",
}


def section(lab: Lab) -> Section:
    """The figure and its numbers: of the whole store, whatever part of it the report is about."""
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
    moved = summary.distributions["displacement"].median
    return Section(
        "figA1",
        "Figure A.1: the data",
        "Distributions over the relaxations of the store, which is not the paper's JARVIS-DFT.",
        [Table(setting.name, ("quantity", "count or median", "least", "most", "paper"), rows)],
        [
            Claim(
                "JARVIS-DFT is diverse: 86 elements, up to 96 atoms",
                decided(
                    None, f"{setting.name} is another data set: {len(summary.elements)} elements"
                ),
            ),
            Claim(
                "most displacements are between 0.001 and 0.01 Å",
                decided(
                    paper.COMMON_DISPLACEMENT[0] <= moved <= paper.COMMON_DISPLACEMENT[1],
                    f"the median of {setting.name} is {moved:.3g} Å",
                ),
                "the median displacement of the data lies there",
            ),
        ],
        [(path, "distributions")],
    )


EXPERIMENT = Experiment("figA1", lambda setting: [], section)
