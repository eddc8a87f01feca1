"""The experiments by name, in the order of the report."""

from __future__ import annotations

from relaxnet_jax.reproduce import (
    ablation,
    energies,
    fig3a,
    fig3b,
    fig3c,
    figa1,
    figa2,
    figa3,
    frames,
    table1,
    table2,
    table3,
    table4,
    table5,
    table6,
)
from relaxnet_jax.reproduce.experiment import Experiment

_MODULES = (
    table1,
    table2,
    table3,
    table4,
    table5,
    table6,
    fig3a,
    fig3b,
    fig3c,
    figa1,
    figa2,
    figa3,
    frames,
    energies,
    ablation,
)
EXPERIMENTS: dict[str, Experiment] = {m.EXPERIMENT.name: m.EXPERIMENT for m in _MODULES}
