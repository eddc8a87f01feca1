"""Figures are whole PNGs with something on them, drawn without pyplot."""

import os
import subprocess
import sys
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from relaxnet_jax.errors import InputError
from relaxnet_jax.evaluate import parity_figure, per_frame_figure, trajectory_figure
from relaxnet_jax.metrics import Comparison, evaluate


def relaxations(count=6, n=5, atoms=4, seed=0):
    rng = np.random.default_rng(seed)
    decay = np.exp(-3 * np.linspace(0, 1, n))
    out = []
    for s in range(count):
        start, step = rng.uniform(0, 5, (atoms, 3)), rng.normal(0, 0.05, (atoms, 3))
        true = start + (1 - decay)[:, None, None] * step
        energies = -4.0 * atoms + 0.1 * rng.normal() + 0.3 * decay
        forces = decay[:, None, None] * rng.normal(size=(n, atoms, 3))
        slots = np.arange(n) if s % 2 else np.arange(0, n, 2)
        one = Comparison(
            f"s{s}", np.full(atoms, 29), 5 * np.eye(3), np.ones(3), np.zeros(atoms),
            true[slots], energies[slots], forces[slots], 0.2 * start + 0.8 * true[slots],
            energies[slots] + 0.05, 0.9 * forces[slots], -4.0 * atoms, slots, n,
        )  # fmt: skip
        out.append(one)
    return out


def trajectory(c, kind, times=None):
    return SimpleNamespace(
        id=c.id, atomic_numbers=c.atomic_numbers, fixed_mask=c.fixed_mask, times=times,
        source="synthetic", positions=getattr(c, f"{kind}_positions"),
        energies=getattr(c, f"{kind}_energies"), forces=getattr(c, f"{kind}_forces"),
    )  # fmt: skip


def check(path):
    """A PNG of more than 150 dpi with ink, and alone in its folder."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = matplotlib.image.imread(path)[..., :3]
    assert min(image.shape[:2]) > 500
    assert 0.01 < (image < 0.9).any(axis=-1).mean() < 0.5
    assert len(np.unique(image.sum(axis=-1))) > 50
    assert os.listdir(path.parent) == [path.name]


def test_per_frame_figure(tmp_path):
    results = {p: evaluate(relaxations(), p) for p in ("model", "nothing", "composition")}
    results["implicit"] = results["model"]
    path = tmp_path / "new" / "per_frame.png"
    per_frame_figure(results, path, "Synthetic data set, 6 structures. " * 5)
    check(path)
    with pytest.raises(InputError, match="no metrics"):
        per_frame_figure({"composition": results["composition"]}, path, "")


@pytest.mark.parametrize("frames", [1, 5, 300])
def test_parity_figure(tmp_path, frames):
    path = tmp_path / "parity.png"
    parity_figure(relaxations(n=frames), path, "Cost $5 of a $name")  # no mathematics in captions
    check(path)


def test_parity_figure_of_constant_or_diverged_energies(tmp_path):
    path = tmp_path / "parity.png"
    parity_figure(relaxations(count=1, n=1), path, "one point")
    check(path)
    broken = relaxations(count=1)
    broken[0].pred_energies[:] = np.nan
    with pytest.raises(InputError, match="finite"):
        parity_figure(broken, path, "")


def test_trajectory_figure(tmp_path):
    one, other = relaxations(count=2)
    path = tmp_path / "trajectory.png"
    times = np.linspace(0, 1, len(one.slots)) ** 2
    trajectory_figure(trajectory(one, "true"), trajectory(one, "pred", times), path)
    check(path)
    frozen = trajectory(one, "true")
    frozen.fixed_mask = np.ones(4, bool)
    trajectory_figure(frozen, trajectory(one, "pred"), path, "nothing may move")
    check(path)
    wrong = trajectory(other, "pred")
    wrong.atomic_numbers = np.full(4, 30)
    with pytest.raises(InputError, match="different atoms"):
        trajectory_figure(trajectory(one, "true"), wrong, path)


def test_failure_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "parity.png"
    path.write_bytes(b"old")

    def half(self, target, **_):
        target.write_bytes(b"half")
        raise RuntimeError("power cut")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(RuntimeError, match="power cut"):
        parity_figure(relaxations(), path, "")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["parity.png"]


def test_no_pyplot():
    code = (
        "import sys, relaxnet_jax.evaluate, relaxnet_jax.metrics\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
