"""Relaxations whose cell changes: samples, targets, losses, and a run from data to prediction."""

import dataclasses
import json

import ase.io
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.filters import FrechetCellFilter
from ase.optimize import LBFGS
from tiny import TINY, crystal, slab, tiny_config, tiny_model

from relaxnet_jax.batching import fitting_shape
from relaxnet_jax.calculator import RelaxNetCalculator
from relaxnet_jax.cli import main
from relaxnet_jax.commands import _middle
from relaxnet_jax.config import LossConfig, load_config
from relaxnet_jax.data.dataset import read_trajectories
from relaxnet_jax.data.pipeline import collate_samples
from relaxnet_jax.data.quality.work import step_works
from relaxnet_jax.data.sample import driftless, make_sample
from relaxnet_jax.data.store_write import write_store
from relaxnet_jax.data.trajectory import RelaxationTrajectory
from relaxnet_jax.errors import InputError
from relaxnet_jax.evaluate.run import compare, read_any
from relaxnet_jax.losses import loss_terms, strain_error
from relaxnet_jax.metrics import averaged, structure_errors
from relaxnet_jax.model import create_model, load_model
from relaxnet_jax.predict import Path, relax
from relaxnet_jax.solver import Trajectory
from relaxnet_jax.strain import deformations, from_voigt, log_strain, stress, to_voigt
from relaxnet_jax.train.state import initial_train_state
from relaxnet_jax.train.step import make_train_step

VARIABLE = tiny_config(dynamics__cell="variable", dynamics__mass="unit")


def relaxation(atoms, name, grow=(0.03, -0.01, 0.02), n=3, stresses=True):
    """The cell grows evenly and shears a little; atoms also move within it."""
    rng = np.random.default_rng(len(name))
    steps = np.linspace(0, 1, n)[:, None, None]
    growth = np.eye(3) + steps * (np.diag(grow) + 0.01 * np.ones((3, 3)))
    cells = atoms.cell.array @ growth
    scaled = np.linalg.solve(atoms.cell.array.T, atoms.positions.T).T
    inside = rng.normal(0, 0.01, (len(atoms), 3)) * steps
    return RelaxationTrajectory(
        id=name, atomic_numbers=atoms.numbers, positions=(scaled + inside) @ cells, cells=cells,
        pbc=atoms.pbc, energies=np.linspace(-3, -4, n), forces=rng.normal(size=(n, len(atoms), 3)),
        fixed_mask=np.zeros(len(atoms), bool),
        stresses=rng.normal(0, 0.01, (n, 6)) if stresses else None)  # fmt: skip


def test_samples_and_targets():
    """Reference positions hold the internal displacement, deformations the cell's; nothing is lost."""
    moving, still = relaxation(crystal(), "a"), relaxation(crystal(), "bb", n=3, stresses=False)
    still = type(still)(**{**still.__dict__, "cells": np.repeat(still.cells[:1], 3, 0)})
    samples = [make_sample(t, VARIABLE) for t in (moving, still)]
    np.testing.assert_allclose(samples[0].structure.strain, np.eye(3), atol=1e-12)
    assert not samples[1].structure.strain.any() and (samples[1].deformations == np.eye(3)).all()
    shape = fitting_shape([s.structure for s in samples])
    graph, targets = collate_samples(samples, shape, VARIABLE, np.float64)
    back = targets.positions[:, :3] @ np.swapaxes(targets.cells.deformation[:, 0], 1, 2)
    drift = (back - moving.positions) @ np.linalg.inv(moving.cells)
    np.testing.assert_allclose(drift, np.broadcast_to(drift[:, :1], drift.shape), atol=1e-12)
    centre = targets.positions[:, :3].mean(1)
    np.testing.assert_allclose(centre, np.broadcast_to(centre[:1], (3, 3)), atol=1e-12)
    cells = graph.globals["cell"][0] @ np.swapaxes(targets.cells.deformation[:, 0], 1, 2)
    np.testing.assert_allclose(cells, moving.cells, atol=1e-12)
    np.testing.assert_allclose(to_voigt(targets.cells.stress[:, 0]), moving.stresses)
    assert targets.cells.stress_mask.tolist() == [[True, False, False]] * 3
    product = targets.cells.deformation @ targets.cells.inverse
    np.testing.assert_allclose(product, np.broadcast_to(np.eye(3), product.shape), atol=1e-12)
    # Models with fixed cells see neither.
    _, plain = collate_samples([make_sample(still, tiny_config())], shape,
                               tiny_config())  # fmt: skip
    assert plain.cells is None


def test_no_stress_without_a_volume():
    """Of a slab whose cell has no third vector; its plane is strained all the same."""
    tall = relaxation(slab(), "a")
    flat = dataclasses.replace(tall, cells=tall.cells * np.array([[1], [1], [0]])).validate()
    assert make_sample(tall, VARIABLE).stress_mask.all()
    sample = make_sample(flat, VARIABLE)
    assert not sample.stress_mask.any()
    np.testing.assert_allclose(np.linalg.matrix_rank(sample.structure.strain), 2)
    back = flat.cells[0] @ np.swapaxes(sample.deformations, 1, 2)
    np.testing.assert_allclose(back, flat.cells, atol=1e-12)
    assert step_works(flat) is None and step_works(tall) is not None


def test_loss_terms_by_hand():
    moving, still = relaxation(crystal(), "a"), relaxation(crystal(), "bb")
    still = type(still)(**{**still.__dict__, "cells": np.repeat(still.cells[:1], 3, 0)})
    samples = [make_sample(t, VARIABLE) for t in (moving, still)]
    shape = fitting_shape([s.structure for s in samples])
    graph, targets = collate_samples(samples, shape, VARIABLE, np.float32)
    identity = jnp.broadcast_to(jnp.eye(3), (3, 3, 3, 3))
    virial = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 3, 3)))
    virial = virial + jnp.swapaxes(virial, 2, 3)
    zeros = jnp.zeros_like(targets.positions)
    prediction = Trajectory(zeros, zeros, jnp.zeros((3, 3)), zeros,
                            jnp.asarray(targets.positions), identity, virial)  # fmt: skip
    terms = loss_terms(prediction, targets, graph, LossConfig())
    assert float(terms["positions"].total) == 0  # reference positions agree, whatever the cell
    volume = abs(np.linalg.det(moving.cells[0]))
    difference = np.asarray(virial)[:, 0] / volume - from_voigt(moving.stresses)
    # The held crystal's stress counts as well, in all directions.
    held = np.asarray(virial)[:, 1] / volume - from_voigt(still.stresses)
    total = (difference**2).sum() + (held**2).sum()
    np.testing.assert_allclose(terms["stress"], (total, 2 * 3 * 9), rtol=1e-4)
    expected = -np.stack([
        np.asarray(log_strain(jnp.asarray(d))) for d in targets.cells.deformation[1:, 0]])  # fmt: skip
    np.testing.assert_allclose(terms["cell"].total, (expected**2).sum(), rtol=0.1)
    assert float(terms["cell"].number) == 2 * 9
    norms = loss_terms(prediction, targets, graph, LossConfig(errors="norm"))
    sizes = np.linalg.norm([difference, held], axis=(2, 3))
    np.testing.assert_allclose(norms["stress"], (sizes.sum(), 2 * 3), rtol=1e-4)
    sizes = np.linalg.norm(expected, axis=(1, 2))
    np.testing.assert_allclose(norms["cell"], (sizes.sum(), 2), rtol=0.1)
    ours, nothing = strain_error(prediction, targets, graph)
    np.testing.assert_allclose(ours.mean(), nothing.mean(), rtol=1e-5)
    np.testing.assert_allclose(ours.mean(), np.abs(expected[-1]).mean(), rtol=0.1)
    # A slab's would depend on its vacuum.
    flat = type(still)(**{**still.__dict__, "pbc": np.array([True, True, False])})
    assert samples[1].stress_mask.all() and not make_sample(flat, VARIABLE).stress_mask.any()
    perfect = prediction._replace(deformation=jnp.asarray(targets.cells.deformation))
    terms = loss_terms(perfect, targets, graph, LossConfig())
    assert float(terms["cell"].total) < 1e-10
    found = stress(perfect.virial, graph.globals["cell"], perfect.deformation)
    assert np.isfinite(found).all()


def test_which_data_a_model_takes(tmp_path):
    write_store(tmp_path / "set.h5", [relaxation(crystal(), "a")])
    path = str(tmp_path / "set.h5")
    with pytest.raises(InputError, match=r"explicit_cell\.py.*data\.variable_cell=drop"):
        read_trajectories(path, load_config("explicit.py"), print)
    # Nothing to be set where a file is only evaluated: what the model cannot follow is told.
    moving = relaxation(crystal(), "b")
    held = dataclasses.replace(moving, cells=np.repeat(moving.cells[:1], moving.n_frames, 0))
    write_store(tmp_path / "both.h5", [relaxation(crystal(), "a"), held])
    notes, fixed = [], create_model(tiny_config("explicit"))
    (kept,) = read_any(str(tmp_path / "both.h5"), fixed, notes.append)
    assert kept.id == "b" and "1 relaxations left out: the cell changes" in notes[0]
    found, left_out = read_trajectories(path, load_config("explicit_cell.py"), print)
    assert len(found) == 1 and not left_out
    with pytest.raises(InputError, match=r"model\.l_max"):
        load_config("explicit_cell.py", ["model.l_max=1"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Copper alloys under pressure and a fixed-cell slab, relaxed with EMT; a tiny model of them."""
    folder = tmp_path_factory.mktemp("cells")
    frames = []
    for k in range(12):
        rng = np.random.default_rng(k)
        atoms = bulk("Cu", a=3.8, cubic=True)
        atoms.numbers[: k % 5] = 79
        atoms.set_cell(atoms.cell.array * rng.uniform(0.96, 1.06), scale_atoms=True)
        atoms.rattle(0.05, seed=k)
        atoms.calc = EMT()
        moving = FrechetCellFilter(atoms) if k % 3 else atoms
        for i, _ in enumerate(LBFGS(moving, logfile=None).irun(fmax=0.05, steps=12)):
            copy = atoms.copy()
            copy.calc = atoms.calc
            copy.info = {"traj_id": f"r{k}"}
            frames.append((copy, atoms.get_potential_energy(), atoms.get_forces().copy(),
                           atoms.get_stress().copy(), i))  # fmt: skip
    images = []
    for atoms, energy, forces, s, _ in frames:
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces, stress=s)
        images.append(atoms)
    ase.io.write(folder / "data.extxyz", images)
    assert main(["data", "import", str(folder / "data.extxyz"), "--out", str(folder / "s.h5")]) == 0
    settings = [f"{a}.{b}={v!r}" for a, part in TINY.items() for b, v in part.items()]
    settings += [f"data.path={folder / 's.h5'}", "train.epochs=2", "train.batch_size=4",
                 "model.layers=1", "data.splits=(0.6,0.2,0.2)"]  # fmt: skip
    out = folder / "run"
    assert main(["train", "--config", "explicit_cell.py", "--workdir", str(out), "--set", *settings,
                 "dynamics.frames=3"]) == 0  # fmt: skip
    return out


def test_train_evaluate_predict(run, capsys):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2 and all(r["skipped"] == 0 for r in records)
    assert records[0]["train"]["stress"] > 0 and records[1]["validation"]["cell"] > 0
    assert records[1]["train"]["strain"] > 0 and records[1]["validation"]["nothing_strain"] > 0.005
    assert main(["eval", "--workdir", str(run), "--split", "train"]) == 0
    assert "volume error" in capsys.readouterr().out
    report = json.loads((run / "eval-train" / "metrics.json").read_text())
    final = {k: v["final"] for k, v in report["results"].items()}
    assert final["nothing"]["volume"] > 1 and final["model"]["lengths"] > 0
    model = load_model(run / "model")
    path = relax(model, bulk("Cu", cubic=True), n_frames=4)
    assert path.stresses.shape == (4, 6) and np.abs(path.cells[-1] - path.cells[0]).max() > 1e-5
    path.validate()
    # The demonstration relaxes the cell where the data's does, and only there.
    assert main(["demo", "--workdir", str(run)]) == 0
    true, predicted = (ase.io.read(run / "demo" / f"{name}.extxyz", ":") for name in ("true", "predicted"))
    moved = [not np.allclose(p[-1].cell, p[0].cell, atol=1e-9) for p in (true, predicted)]
    assert moved[0] == moved[1] and len(predicted) == 3
    np.testing.assert_allclose(predicted[0].positions, true[0].positions, atol=1e-5)


@pytest.mark.parametrize("cell", ["fixed", "variable"])
def test_errors_do_not_depend_on_what_the_dynamics_conserve(cell):
    """A drift is in no error, whichever atoms it comes from: not of the truth, not of predictions."""
    grow = (0, 0, 0) if cell == "fixed" else (0.03, -0.01, 0.02)
    t = relaxation(crystal(), "a", grow)
    if cell == "fixed":
        t = dataclasses.replace(t, cells=np.repeat(t.cells[:1], 3, 0), stresses=None)
    drift = np.linspace(0, 0.3, 3)[:, None, None] * np.array([1.0, -2, 0.5])
    path = Path(np.linspace(0, 1, 3), t.positions + drift @ np.swapaxes(
        deformations(t.cells), -1, -2), 0 * t.positions, t.energies, t.forces, t.cells, 1.0)  # fmt: skip
    for mass in ("unit", "atomic"):
        config = tiny_config(dynamics__cell=cell, dynamics__mass=mass)
        model = create_model(config)
        (found,), _ = compare(model, [t], print, predict=lambda _: [path], n_frames=3)
        errors = structure_errors(found)["positions_mae"]
        assert errors.max() < 1e-9
        assert structure_errors(found, "nothing")["positions_mae"][-1] > 1e-3


def test_cells_that_run_away_are_not_to_be_used():
    """As `relax` sees it, so a committee's evaluation leaves the same members out."""
    t, told = relaxation(crystal(), "a", (0.03, -0.01, 0.02)), []
    cells = t.cells * np.array([1.0, 1.5, 3.0])[:, None, None]
    paths = [
        Path(np.linspace(0, 1, 3), t.positions, 0 * t.positions, t.energies, t.forces, c, 100.0)
        for c in (t.cells, cells)
    ]
    model = create_model(tiny_config(dynamics__cell="variable"))
    good, bad = (
        compare(model, [t], told.append, predict=lambda _: [path], n_frames=3)[0][0]  # noqa: B023
        for path in paths
    )
    assert good.usable and bad.finite and not bad.usable
    (line,) = told
    assert line.startswith("a: included, though flagged as unusable (cell strained too far: ")
    np.testing.assert_allclose(averaged([bad, good]).pred_cells, good.pred_cells)


def test_driftless_frames_keep_their_cells():
    """Translation that strain alone makes of a shifted origin is no drift; a rigid shift is."""
    config = tiny_config("explicit", dynamics__cell="variable", dynamics__mass="unit")
    t = relaxation(crystal(), "a", grow=(0.2, 0.0, 0.0))
    shift = np.linspace(0, 1, t.n_frames)[:, None, None] * np.array([0.3, -0.1, 0.2])
    shifted = dataclasses.replace(t, positions=t.positions + shift)
    plain, again = (driftless(x, True, config) for x in (t, shifted))
    np.testing.assert_allclose(plain.positions, again.positions, atol=1e-9)
    np.testing.assert_array_equal(again.cells, t.cells)
    fractional = [np.linalg.solve(c.T, (p - p.mean(0)).T).T for c, p in zip(t.cells, t.positions)]
    ours = [np.linalg.solve(c.T, (p - p.mean(0)).T).T for c, p in zip(again.cells, again.positions)]
    np.testing.assert_allclose(ours, fractional, atol=1e-9)


def test_demo_shows_the_median_displacement_within_the_cell():
    """Strain, which moves atoms the farther the farther they are from the origin, does not count."""
    base = relaxation(crystal(), "a", (0, 0, 0))
    ways = base.positions - base.positions[:1]
    made = []
    for name, size, stretch in (("far", 3.0, 1.0), ("middle", 1.0, 1.0), ("strained", 0.1, 1.3)):
        growth = np.linspace(1, stretch, base.n_frames)[:, None, None]
        places = base.positions[:1] + size * ways + 20.0
        made.append(dataclasses.replace(
            base, id=name, positions=places * growth, cells=base.cells[:1] * growth))  # fmt: skip
    assert _middle(made).id == "middle"


def test_static_loss_looks_at_strained_frames():
    """The first epochs of the implicit scheme: true frames in their true cells."""
    config = tiny_config("implicit", dynamics__cell="variable", model__layers=1)
    sample = make_sample(relaxation(crystal(), "a", grow=(0.2, 0.0, 0.0)), config)
    shape = fitting_shape([sample.structure])
    graph, targets = collate_samples([sample], shape, config)
    model = tiny_model(config, dtype=np.float32)
    state = initial_train_state(model.params, config.train)
    step = jax.jit(make_train_step(config, float(model.energy_scale), static=True))
    seen = set()
    for seed in range(12):
        _, means = step(state, (graph, targets), 0.0, jax.random.key(seed))
        assert means["stress"] > 0 and means["cell"] < 1e-10 and means["positions"] == 0
        seen.add(round(float(means["energy"]), 5))
    assert len(seen) == 3  # frames differ: in their cells too
    alone = model.energy_and_forces(crystal())[0]
    energies = {round(abs(alone - e) / 3, 5) for e in targets.energies[:1, 0].tolist()}
    assert min(abs(a - b) for a in seen for b in energies) < 1e-4  # the first is the undeformed one


def test_calculator_stress():
    """ASE's numerical stress of an implicit model's potential."""
    config = tiny_config("implicit", dynamics__cell="variable", model__layers=1)
    model = tiny_model(config, dtype=np.float32)
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=1)
    atoms.numbers[0] = 79
    atoms.calc = RelaxNetCalculator(model)
    ours = atoms.get_stress()
    assert np.abs(ours).max() > 1e-4
    numeric = []
    for a, b in ((0, 0), (1, 1), (2, 2), (1, 2)):
        energies = []
        for h in (2e-3, -2e-3):
            change = np.eye(3)
            change[a, b] += h / 2
            change[b, a] += h / 2
            strained = atoms.copy()
            strained.set_cell(atoms.cell.array @ change, scale_atoms=True)
            strained.calc = atoms.calc
            energies.append(strained.get_potential_energy())
        numeric.append((energies[0] - energies[1]) / 4e-3 / atoms.get_volume())
    scale = np.abs(ours).max()
    np.testing.assert_allclose(numeric, ours[:4], atol=0.03 * scale + 2e-5)
    # The list goes along with the lattice, until the cell has shrunk by too much.
    assert atoms.calc.lists_built == 1
    for strain, lists in ((0.96, 1), (0.8, 2)):
        strained = atoms.copy()
        strained.set_cell(atoms.cell.array * [strain, 1.0, 1.02], scale_atoms=True)
        strained.calc, fresh = atoms.calc, strained.copy()
        fresh.calc = RelaxNetCalculator(model)
        for quantity in ("get_potential_energy", "get_forces", "get_stress"):
            kept, new = (getattr(a, quantity)() for a in (strained, fresh))
            np.testing.assert_allclose(kept, new, rtol=1e-4, atol=1e-5)
        assert atoms.calc.lists_built == lists
    fixed = create_model(tiny_config("implicit", model__layers=1))
    other = slab()
    other.calc = RelaxNetCalculator(fixed)
    with pytest.raises(PropertyNotImplementedError, match="stress"):
        other.get_stress()
