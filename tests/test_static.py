"""The static first epochs: energies and forces at the data's own frames, without the ODE."""

import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console
from tiny import SHAPE, TINY, batch, crystal, molecule, tiny_config, tiny_model

from relaxnet_jax.config import load_config
from relaxnet_jax.errors import InputError
from relaxnet_jax.losses import Targets
from relaxnet_jax.train.loop import train
from relaxnet_jax.train.report import ConsoleReport
from relaxnet_jax.train.step import make_static_loss


@pytest.mark.usefixtures("x64")
def test_static_loss_is_that_of_the_chosen_frames():
    """Where each structure has one frame, energies and forces are compared there, and only there."""
    config = tiny_config("implicit")
    model = tiny_model(config)
    atoms = [molecule(), crystal()]
    graph = batch(atoms, config)
    rng = np.random.default_rng(0)
    n, N, G = 3, SHAPE.n_atoms, SHAPE.n_graphs
    positions = np.asarray(graph.nodes["positions"]) + rng.normal(0, 0.05, (n, N, 3))
    forces, energies = rng.normal(size=(n, N, 3)), rng.normal(size=(n, G))
    mask = np.zeros((n, G), bool)
    mask[2, 0] = mask[1, 1] = True
    targets = Targets(positions, forces, energies, mask, mask.argmax(0).astype(np.int32))
    scale = float(model.energy_scale)
    loss, means = make_static_loss(config, scale, None)(
        model.params, (graph, targets), jax.random.key(3)
    )
    energy_errors, force_errors, row = [], [], 0
    for index, (one, frame) in enumerate(zip(atoms, (2, 1))):
        rows = slice(row, row + len(one))
        row = rows.stop
        moved = one.copy()
        moved.positions = positions[frame, rows]
        energy, force = model.energy_and_forces(moved)
        energy_errors.append(abs(energy - energies[frame, index]) / len(one))
        force_errors.append(((force - forces[frame, rows]) ** 2).ravel())
    per_atom = config.loss.energy_per == "atom"
    assert per_atom
    np.testing.assert_allclose(means["energy"], np.mean(energy_errors), rtol=1e-9)
    np.testing.assert_allclose(means["forces"], np.concatenate(force_errors).mean(), rtol=1e-9)
    weights = config.loss
    expected = weights.energy * means["energy"] + weights.forces * means["forces"]
    np.testing.assert_allclose(loss, expected, rtol=1e-12)


def test_frames_are_drawn_evenly():
    """Every frame that exists is visited, none that does not."""
    config = tiny_config("implicit")
    graph = batch([molecule()], config)
    n, N, G = 4, SHAPE.n_atoms, SHAPE.n_graphs
    mask = np.zeros((n, G), bool)
    mask[:3, 0] = True
    energies = np.zeros((n, G))
    energies[:, 0] = [1e3, 2e3, 3e3, np.nan]
    positions = np.broadcast_to(np.asarray(graph.nodes["positions"]), (n, N, 3))
    targets = Targets(positions, np.zeros((n, N, 3)), energies, mask, np.full(G, 2, np.int32))
    params = tiny_model(config).params
    loss = jax.jit(make_static_loss(config, 1.0, None))
    found = [
        float(loss(params, (graph, targets), jax.random.key(k))[1]["energy"]) for k in range(60)
    ]
    counts = np.bincount(np.rint(np.array(found) * 7 / 1e3).astype(int), minlength=4)
    assert counts[0] == 0 and counts[1:].sum() == 60 and counts[1:4].min() >= 8


def test_training_begins_statically(tmp_path, monkeypatch):
    """The first epochs run the static step, the others the solve; both leave a usable model."""
    monkeypatch.setenv("RELAXNET_JAX_CACHE", str(tmp_path / "cache"))
    config = load_config(
        TINY,
        {
            "dynamics.latent": "implicit",
            "model.layers": 1,
            "data": {"n_emt": 24, "splits": [0.7, 0.15, 0.15], "seed": 2},
            "train": {"batch_size": 4, "epochs": 3, "max_buckets": 1, "static_epochs": 2},
        },
    )
    text = io.StringIO()
    report = ConsoleReport(Console(file=text, width=1000))
    result = train(config, tmp_path / "run", report=report, devices=1)
    assert result.compilations == {
        "static training step": 1, "training step": 1, "validation step": 1,
    }  # fmt: skip
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["train"]["positions"] == 0 for r in records] == [True, True, False]
    assert all(r["train"]["forces"] > 0 and r["validation"]["positions"] > 0 for r in records)
    assert all(r["best"] for r in records[:2])
    assert result.best == min(r["validation"]["loss"] for r in records[1:])
    assert (tmp_path / "run" / "model" / "model.json").is_file()


def test_explicit_scheme_has_no_static_loss():
    with pytest.raises(InputError, match=r"train\.static_epochs"):
        tiny_config("explicit", train__static_epochs=3)
    with pytest.raises(InputError, match=r"train\.static_epochs"):
        tiny_config("implicit", train__static_epochs=-1)
