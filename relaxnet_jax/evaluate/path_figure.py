"""A predicted path as a figure: energy, largest force and displacement against pseudotime."""

from __future__ import annotations

import os

import matplotlib
import numpy as np

from relaxnet_jax.data.trajectory import RelaxationTrajectory
from relaxnet_jax.evaluate.figures import SERIES, SPARE, STYLE, new_figure, save_figure
from relaxnet_jax.strain import reference_positions


def path_curves(path: RelaxationTrajectory) -> dict[str, np.ndarray]:
    """Curves along a path by name, (n,) each.

    Returns:
      times; energies: relative to the first frame, meV/atom; fmax: eV/Å; mean, largest: displacement
      of the free atoms from the first frame, within the cell, Å.
    """
    moved = np.linalg.norm(path_displacements(path), axis=-1)[:, ~path.fixed_mask]
    n = path.n_frames
    return {
        "times": np.linspace(0.0, 1.0, n) if path.times is None else path.times,
        "energies": 1e3 * (path.energies - path.energies[0]) / path.n_atoms,
        "fmax": path.fmax,
        "mean": moved.mean(1) if moved.size else np.zeros(n),
        "largest": moved.max(1, initial=0.0),
    }


def path_displacements(path: RelaxationTrajectory) -> np.ndarray:
    """Displacements (n, N, 3) from the first frame, mapped to its cell, so without the cell's motion; Å."""
    return reference_positions(path.positions, path.cells) - path.positions[:1]


def path_figure(path: RelaxationTrajectory, file: str | os.PathLike[str], fmax: float) -> None:
    """Draws energy, fmax and displacement along a path.

    Args:
      path: a path of n frames.
      file: the PNG.
      fmax: eV/Å, the force below which a structure is relaxed; drawn as a line.
    """
    curves = path_curves(path)
    times, first, second = curves["times"], SERIES["model"], SPARE[0]
    with matplotlib.rc_context(STYLE):
        figure = new_figure(8.0, 2.8, f"{path.id}, {path.formula}, predicted by {path.source}")
        energy, force, displacement = figure.subplots(1, 3)
        energy.plot(times, curves["energies"], clip_on=False, **first)
        energy.set(ylabel="energy − initial (meV/atom)")
        force.plot(times, curves["fmax"], clip_on=False, **first)
        force.axhline(fmax, color="#444444", linewidth=0.8, linestyle="--")
        force.annotate(
            f"{fmax:g}", (1.0, fmax), xytext=(0, 2), textcoords="offset points", ha="right",
            fontsize=8, color="#444444",
        )  # fmt: skip
        force.set(ylabel="largest force (eV/Å)")
        displacement.plot(times, curves["largest"], label="largest", clip_on=False, **first)
        displacement.plot(times, curves["mean"], label="mean", clip_on=False, **second)
        displacement.set(ylabel="displacement (Å)")
        displacement.legend()
        for axis in (energy, force, displacement):
            axis.set(xlabel="pseudotime")
            axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
        for axis in (force, displacement):
            axis.set_ylim(bottom=0)
        save_figure(figure, file)
