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
from relaxnet_jax.evaluate import (
    data_figure,
    figures,
    parity_figure,
    per_frame_figure,
    trajectory_figure,
)
from relaxnet_jax.evaluate.figures import trajectory_curves
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
        cells=np.repeat(c.cell[None], len(c.slots), 0),
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


def test_parity_figure_is_of_the_structures_of_its_table(monkeypatch):
    """Of a committee and its first member, those of which both are finite."""
    compared = relaxations(count=3)
    compared[1].pred_energies[:] += 1.0
    among = {compared[0].id, compared[2].id}
    kept = drawn(monkeypatch, figures)
    parity_figure(compared, "x", "two of three", among)
    axis = kept[0].axes[0]
    mae = evaluate(compared, among=among).all_frames.energy_mae_per_atom
    frames = sum(len(c.slots) for c in compared if c.id in among)
    assert f"MAE {mae:.3g} meV/atom\n2 structures, {frames} frames" in axis.texts[0].get_text()
    assert f"{mae:.3g}" != f"{evaluate(compared).all_frames.energy_mae_per_atom:.3g}"
    with pytest.raises(InputError, match="finite"):
        parity_figure(compared, "x", "none of three", set())


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


def drawn(monkeypatch, module):
    """Figures that are saved, instead of files."""
    kept = []
    monkeypatch.setattr(module, "save_figure", lambda figure, path: kept.append(figure))
    return kept


def test_parity_of_final_energies_only(monkeypatch):
    """What direct models do not predict is not drawn, nor in the MAE."""
    direct = relaxations(count=2)
    for c in direct:
        c.pred_energies[:] = c.true_energies[-1] + 0.04
        object.__setattr__(c, "final_only", True)
    kept = drawn(monkeypatch, figures)
    parity_figure(direct, "x", "direct")
    axis = kept[0].axes[0]
    (points,) = axis.collections
    assert len(points.get_offsets()) == 2
    assert "MAE 10 meV/atom\n2 structures, 2 frames" in axis.texts[0].get_text()


@pytest.mark.parametrize("stretch", [1.0, 1.1])
def test_trajectory_curves_by_hand(stretch):
    """Two free atoms and a held one: the strain of the cell, wherever its origin, is no displacement."""
    start = np.array([[0.0, 0, 0], [2, 2, 2], [7, 8, 9]])
    true, pred = np.stack([start] * 3), np.stack([start] * 2)
    true[2, 0, 0], true[2, 1, 1] = 0.3, 2.4
    pred[1, 0, 0] = 0.3
    growth = np.linspace(1, stretch, 3)[:, None, None]
    forces = np.zeros((3, 3, 3))
    forces[0, 0], forces[0, 1], forces[0, 2] = [3, 4, 0], [1, 0, 0], [99, 0, 0]
    one = {"id": "a", "source": "", "atomic_numbers": np.full(3, 29), "fixed_mask": np.array([0, 0, 1]) > 0}
    found = trajectory_curves(
        SimpleNamespace(**one, times=None, positions=true * growth, cells=5 * np.eye(3) * growth,
                        energies=np.array([-3.0, -3.3, -3.6]), forces=forces),
        SimpleNamespace(**one, times=np.array([0.0, 0.9]), positions=pred * growth[[0, 2]],
                        cells=5 * np.eye(3) * growth[[0, 2]],
                        energies=np.array([-2.97, -3.57]), forces=0.5 * forces[:2]),
    )  # fmt: skip
    expected = (
        ([0, 0.5, 1], [0, -100, -200], [5, 0, 0], [0, 0, 0.5 / np.sqrt(2)]),
        ([0, 0.9], [10, -190], [2.5, 0], [0, 0.3 / np.sqrt(2)]),
    )
    for curves, numbers in zip(found, expected, strict=True):
        for curve, values in zip(curves, numbers, strict=True):
            np.testing.assert_allclose(curve, values, atol=1e-9)


def test_trajectory_figure_draws_its_curves(monkeypatch):
    kept = drawn(monkeypatch, figures)
    (one,) = relaxations(count=1)
    pair = trajectory(one, "true"), trajectory(one, "pred")
    trajectory_figure(*pair, "x")
    for number, curves in enumerate(trajectory_curves(*pair)):
        for axis, curve in zip(kept[0].axes, curves[1:], strict=True):
            np.testing.assert_array_equal(axis.lines[number].get_xdata(), curves[0])
            np.testing.assert_array_equal(axis.lines[number].get_ydata(), curve)


def test_relaxations_at_rest_span_no_decades(monkeypatch):
    """Round-off is counted once for each relaxation, and does not stretch the axis."""
    kept = drawn(monkeypatch, data_figure)
    values = {
        "atoms": np.array([2.0, 4, 4, 4]), "first_energy": -np.ones(4), "last_energy": -2 * np.ones(4),
        "displacement": np.array([0.0, 1e-16, 0.01, 0.1]),
        "max_displacement": np.array([0.0, 2e-16, 0.02, 0.3]),
    }  # fmt: skip
    data_figure.distribution_figure(SimpleNamespace(values=values, elements={"Cu": (4, 14)}), "x")
    axis = next(a for a in kept[0].axes if "displacement" in a.get_xlabel())
    assert axis.get_xlabel().endswith("\n2 at rest, not drawn")
    low, high = axis.get_xlim()
    assert 1e-3 < low <= 0.01 and 0.3 <= high < 3
    values["displacement"] = values["max_displacement"] = np.zeros(4)
    data_figure.distribution_figure(SimpleNamespace(values=values, elements={"Cu": (4, 14)}), "x")
    assert "4 at rest" in next(a for a in kept[1].axes if "rest" in a.get_xlabel()).get_xlabel()


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
