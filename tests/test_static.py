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
from relaxnet_jax.evaluate.run import evaluate_workdir, write_evaluation
from relaxnet_jax.evaluate.tables import metrics_table
from relaxnet_jax.losses import Targets
from relaxnet_jax.model import load_model, predict_trajectory
from relaxnet_jax.train.loop import train
from relaxnet_jax.train.report import ConsoleReport
from relaxnet_jax.train.state import initial_train_state
from relaxnet_jax.train.step import make_train_step


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
    state = initial_train_state(model.params, config.train)
    step = make_train_step(config, scale, static=True)
    _, means = step(state, (graph, targets), 0.0, jax.random.key(3))
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
    np.testing.assert_allclose(means["loss"], expected, rtol=1e-12)


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
    state = initial_train_state(tiny_model(config).params, config.train)
    step = jax.jit(make_train_step(config, 1.0, static=True))
    found = [
        float(step(state, (graph, targets), 0.0, jax.random.key(k))[1]["energy"]) for k in range(60)
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


BASELINE = {
    "model": {"architecture": "egnn", "layers": 1, "attention": False},
    "data": {"n_emt": 24, "splits": [0.7, 0.15, 0.15], "seed": 2},
    "train": {"batch_size": 4, "epochs": 2, "max_buckets": 1},
}


def test_static_models_solve_nothing(tmp_path, monkeypatch):
    """Trained, validated and exported on energies and forces alone; evaluated by minimisation."""
    monkeypatch.setenv("RELAXNET_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("relaxnet_jax.train.step.solve_trajectory", None)
    shared = {"dynamics.latent": "static", "data.frame_selection": "all", "data.max_frames": 6}
    config = load_config(TINY, BASELINE | shared)
    text = io.StringIO()
    report = ConsoleReport(Console(file=text, width=1000))
    result = train(config, tmp_path / "run", report=report, devices=1)
    assert result.compilations == {"training step": 1, "validation step": 1}
    records = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    weights = config.loss
    assert len(records) == 2
    for record in records:
        found = record["validation"]
        assert set(found) == {"loss", "energy", "forces", "force_error"}
        expected = weights.energy * found["energy"] + weights.forces * found["forces"]
        assert found["loss"] == pytest.approx(expected, rel=1e-6)
    assert "doing nothing" not in text.getvalue()
    with pytest.raises(InputError, match="potential without a path"):
        model = load_model(tmp_path / "run" / "model")
        predict_trajectory(model, batch([molecule()], config, dtype=np.float32))

    evaluation = evaluate_workdir(tmp_path / "run", report=lambda _: None, fmax=1e-5)
    assert list(evaluation.results) == ["lbfgs", "nothing", "composition"]
    costs = evaluation.costs["lbfgs"]
    assert 0 < costs["steps"] <= 500 and 0 <= costs["converged"] <= 1 and costs["seconds"] > 0
    console = Console(file=(table := io.StringIO()), width=200)
    console.print(metrics_table(evaluation.results, "test", evaluation.costs))
    assert "MLIP + LBFGS" in table.getvalue() and "optimiser steps" in table.getvalue()


def test_direct_models_learn_the_final_frame_only(tmp_path, monkeypatch):
    monkeypatch.setenv("RELAXNET_JAX_CACHE", str(tmp_path / "cache"))
    # Unit masses: else training keeps the centre of mass where evaluation keeps the centroid.
    changes = {"dynamics.latent": "direct", "dynamics.mass": "unit", "loss.forces": 0.0}
    config = load_config(TINY, BASELINE | changes)
    train(config, tmp_path / "run", report=ConsoleReport(Console(file=io.StringIO())), devices=1)
    model = load_model(tmp_path / "run" / "model")
    evaluation = evaluate_workdir(tmp_path / "run", report=lambda _: None)
    for c in evaluation.comparisons:
        fraction = (c.slots / (c.n_frames - 1))[:, None, None]
        first, last = c.pred_positions[:1], c.pred_positions[-1:]
        np.testing.assert_allclose(c.pred_positions, first + fraction * (last - first), atol=1e-5)
        assert np.ptp(c.pred_energies) == 0 and not c.pred_forces.any() and c.final_only
        assert np.abs(last - first).max() > 1e-6
    found = evaluation.results["model"]
    assert found.monotone_fraction is None and found.final.forces_mae is None
    assert found.all_frames.energy_mae is None and found.final.energy_mae > 0
    write_evaluation(evaluation, tmp_path / "eval")
    assert (tmp_path / "eval" / "parity.png").is_file()
    records = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    # Validation is evaluation: of the final frame.
    valid = evaluate_workdir(tmp_path / "run", "validation", report=lambda _: None).results["model"]
    best = min((r["validation"] for r in records), key=lambda v: v["loss"])
    assert 1e3 * best["energy"] == pytest.approx(valid.final.energy_mae_per_atom, rel=1e-3)
    assert best["coordinates"] == pytest.approx(valid.final.positions_mae, rel=1e-3)
    assert best["monotonicity"] == 0
    with pytest.raises(InputError, match="direct"):
        model.energy_and_forces(molecule())
    with pytest.raises(InputError, match=r"loss\.forces=0"):
        tiny_config("direct")
    with pytest.raises(InputError, match=r"loss\.stress=0"):
        tiny_config("direct", loss__forces=0.0, dynamics__cell="variable")
