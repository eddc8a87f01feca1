"""Committees: the spread of their predictions, what it flags, and how it is held against errors."""

import csv
import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace

import ase.io
import numpy as np
import pytest
from ase.constraints import FixAtoms
from rich.console import Console
from scipy.stats import spearmanr
from tiny import alloy, tiny_config, tiny_model

from relaxnet_jax import cli, graph, solving
from relaxnet_jax.calibration import Errors, calibrate, calibration_table, committee_errors
from relaxnet_jax.committee import (
    Said,
    check_members,
    disagreement,
    join,
    mean_path,
    predict_members,
    relax_by,
    relax_committee,
    spread,
)
from relaxnet_jax.data.store_write import write_store
from relaxnet_jax.data.trajectory import RelaxationTrajectory
from relaxnet_jax.errors import InputError
from relaxnet_jax.evaluate import run
from relaxnet_jax.metrics import Comparison, averaged, evaluate
from relaxnet_jax.model import load_committee, save_model
from relaxnet_jax.predict import Judged
from relaxnet_jax.starting import head_start
from relaxnet_jax.strain import internal_displacements
from relaxnet_jax.trust import Flag

LIGHT = {"model__layers": 1, "model__attention": False, "model__vector_messages": False}


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def models():
    """Three models from different seeds, the last one without gold."""
    made = []
    for seed in range(3):
        config = tiny_config("explicit", **LIGHT, train__seed=seed)
        model = tiny_model(config, seed=seed, dtype=np.float32, factor=3.0)
        made.append(model.replace(elements=(29, 79)[: 1 if seed == 2 else 2]))
    return made


def paths(shifts, fixed=(), cells=None):
    """Paths of two frames whose final frames differ by these (members, 4, 3) Å."""
    start, n = alloy().positions, len(shifts)
    cell = alloy().cell.array
    cells = [cell] * n if cells is None else cells
    return [
        RelaxationTrajectory(
            id="a",
            atomic_numbers=alloy().numbers,
            positions=np.stack([start, start + shift]),
            cells=np.stack([cell, last]),
            pbc=np.ones(3, bool),
            energies=np.array([0.0, -0.1 * k]),
            forces=np.zeros((2, 4, 3)),
            fixed_mask=np.isin(np.arange(4), fixed),
        )
        for k, (shift, last) in enumerate(zip(shifts, cells))
    ]


def test_spread():
    """Standard deviations over the members, by NumPy's own words; translations are none."""
    shifts = np.random.default_rng(0).normal(0, 0.1, (3, 4, 3))
    found = spread(paths(shifts, fixed=[0]))
    variance = shifts[:, 1:].var(axis=0, ddof=1).sum(-1)
    assert found.positions == pytest.approx(np.sqrt(variance.mean()))
    assert found.largest == pytest.approx(np.sqrt(variance.max())) and found.members == 3
    assert found.energy_per_atom == pytest.approx(0.1 / 4) and found.volume is None
    moved = np.tile(np.array([[[0.0] * 3], [[1.0] * 3]]), (1, 4, 1))
    assert spread(paths(moved)).positions == pytest.approx(0, abs=1e-12)
    assert spread(paths(moved, fixed=[0])).positions > 0.5
    assert spread(paths(shifts, fixed=range(4))).positions == 0


def test_mean_path():
    """Cells by their deformations, atoms along with them; what all members hold is held exactly."""
    start, cell = alloy().positions, alloy().cell.array
    shifts = np.random.default_rng(0).normal(0, 0.1, (3, 4, 3))
    shifts[:, 0] = 0.0
    made = paths(shifts, fixed=[0])
    found = mean_path(made)
    np.testing.assert_allclose(found.positions[-1], start + shifts.mean(0))
    np.testing.assert_array_equal(found.positions[:, 0], made[0].positions[:, 0])
    np.testing.assert_array_equal(found.cells, made[0].cells)
    np.testing.assert_allclose(found.energies, [0.0, -0.1])
    assert found.stresses is None
    shear = np.array([[0.0, 0.02, 0], [0.02, 0, 0], [0, 0, 0]])
    changes = np.eye(3) + np.array([1, 3])[:, None, None] * shear
    # Atoms that go along with their cells, with displacements of opposite sign besides.
    ends = [(start + s) @ d.T - start for s, d in zip((shifts[0], -shifts[0]), changes)]
    found = mean_path(paths(ends, cells=[cell @ d.T for d in changes]))
    np.testing.assert_allclose(found.cells[-1], cell @ changes.mean(0).T)
    np.testing.assert_allclose(found.positions[-1], start @ changes.mean(0).T)
    assert found.positions[0].tolist() == start.tolist()


def test_join(models):
    """The mean of the usable predictions; who is missing is told."""
    shifts = np.random.default_rng(1).normal(0, 0.02, (3, 4, 3))
    members = {f"m{k}": model for k, model in enumerate(models)}
    own = {f"m{k}": Judged(p, ()) for k, p in enumerate(paths(shifts))}
    grave = (Flag("atoms too close", "Cu0 and Cu1 end 0.10 Å apart", True),)
    all_three = join(Said(own, {}), members)
    np.testing.assert_array_equal(
        all_three.path.positions, mean_path([p.path for p in own.values()]).positions
    )
    assert all_three.spread.members == 3 and "member lost" not in str(all_three.flags)
    two = join(Said(own | {"m0": own["m0"]._replace(flags=grave)}, {}), members)
    np.testing.assert_array_equal(
        two.path.positions, mean_path([own[k].path for k in ("m1", "m2")]).positions
    )
    assert two.spread.members == 2
    assert "m0: atoms too close: Cu0 and Cu1 end" in two.flags[-1].detail
    alone = join(Said({"m1": own["m1"]}, {"m0": "no", "m2": "nor this"}), members)
    assert alone.path is own["m1"].path and alone.spread is None
    assert alone.flags[-1].detail == "no usable prediction of m0: no; m2: nor this"
    lost = join(Said({k: p._replace(flags=grave) for k, p in own.items()}, {}), members)
    assert lost.flags == grave


def test_members_that_did_not_converge_are_named(models):
    """Only their own predictions know; the mean has no minimisation."""
    members = dict(zip(("m0", "m1", "m2"), models))
    late = (Flag("not converged", "1 LBFGS steps did not reach fmax"),)
    own = {f"m{k}": Judged(p, late if k == 1 else ()) for k, p in enumerate(paths((0.1, 0.2, 0.3)))}
    flags = {flag.name: flag for flag in join(Said(own, {}), members).flags}
    assert flags["not converged"].detail == "m1: 1 LBFGS steps did not reach fmax"
    assert not flags["not converged"].unusable
    without = {k: one._replace(flags=()) for k, one in own.items()}
    assert "not converged" not in {f.name for f in join(Said(without, {}), members).flags}


def test_no_structure_hangs_on_the_order_of_members(models):
    """A member that lacks an element is passed over, first or last, and judges nobody else."""
    members = {f"m{k}": model for k, model in enumerate(models)}
    backwards = dict(reversed(members.items()))
    named = [("a", alloy("Cu")), ("b", alloy("Au", 1))]
    for order in (members, backwards):
        found, failed = predict_members(order, named, 3)
        assert [p.path.id for p in found] == ["a", "b"] and not failed
        assert [p.spread.members for p in found] == [3, 2]
        (flag,) = [f for f in found[1].flags if f.name == "member lost"]
        assert flag.detail.startswith("no usable prediction of m2: the model never saw Au")
        assert not any(f.unusable for p in found for f in p.flags)
    _, failed = predict_members(members, [("c", alloy("Fe"))], 3)
    assert str(failed[0]).startswith("c: the model never saw Fe")
    nan = models[1].replace(energy_scale=np.asarray(np.nan, np.float32))
    found, failed = predict_members({"m1": nan, "m0": models[0]}, named, 3)
    assert [p.spread for p in found] == [None, None] and not failed
    _, failed = predict_members({"m1": nan}, named, 3)
    assert [f.name for f in failed] == ["a", "b"] and "not finite" in failed[0].reason


def test_members_are_of_one_kind(models):
    direct = tiny_model(tiny_config("direct", **LIGHT, loss__forces=0.0), dtype=np.float32)
    with pytest.raises(InputError, match=r"dynamics\.latent is direct and explicit"):
        check_members([models[0], direct])


class Unsatisfiable:
    """A constraint that ASE cannot apply."""

    def adjust_positions(self, atoms, new):
        raise RuntimeError("no way")

    def adjust_forces(self, atoms, forces):
        pass

    def get_removed_dof(self, atoms):
        return 0

    def copy(self):
        return self


def test_head_start_of_a_committee(models):
    atoms = alloy("Cu")
    expected = relax_committee(models, alloy("Cu"), 3)
    start = head_start(atoms, models, n_frames=3)
    assert start.moved
    np.testing.assert_array_equal(atoms.positions, expected.path.positions[-1])
    alone = [head_start(alloy("Cu"), m, n_frames=3).path for m in (models[:1], models[0])]
    np.testing.assert_array_equal(alone[0].positions, alone[1].positions)
    some = head_start(alloy("Au"), models, n_frames=3)
    assert some.moved and "models[2]: the model never saw Au" in some.flags[-1].detail
    with pytest.raises(InputError, match="never saw Fe"):
        head_start(alloy("Fe"), models, n_frames=3)
    lost = models[0].replace(energy_scale=np.asarray(np.nan, np.float32))
    for members in ([lost, models[1].replace(energy_scale=lost.energy_scale)], [lost]):
        with pytest.warns(UserWarning, match="Cu4: no head start, not finite") as told:
            assert not head_start(alloy("Cu"), members, 3).moved
        assert len(told) == 1
    # A failure of the first member is not why the mean of the others cannot be used.
    held = alloy("Cu")
    held.set_constraint(Unsatisfiable())
    with pytest.warns(UserWarning, match="no head start, constraints fail"):
        assert not head_start(held, [lost, models[1]], 3).moved
    with pytest.raises(InputError, match="at least 2 members, 0 given"):
        head_start(alloy("Cu"), [])


def test_spread_of_sheets():
    """Cells without a third vector that stretch: no disagreement about where atoms are in them."""
    flat, made = alloy().cell.array.copy(), []
    flat[2] = 0.0
    for k, stretch in enumerate((1.01, 1.03)):
        change = np.diag([stretch, stretch, 1.0])
        (one,) = paths([np.zeros((4, 3))])
        ends = one.positions.copy()
        ends[1] = ends[0] @ change
        made.append(
            dataclasses.replace(
                one,
                cells=np.stack([flat, flat @ change]),
                positions=ends,
                pbc=np.array([True, True, False]),
                energies=np.array([0.0, -0.1 * k]),
            )
        )
    found = spread(made)
    areas = np.array([1.01, 1.03]) ** 2
    assert found.positions == pytest.approx(0, abs=1e-9)
    assert found.volume == pytest.approx(areas.std(ddof=1) / areas.mean())


def test_spread_of_cells():
    """A strained cell is a spread of the volume, not of the internal displacements."""
    start, cell = alloy().positions, alloy().cell.array
    scales = (1.0, 1.02)
    found = spread(paths([start * (s - 1) for s in scales], cells=[cell * s for s in scales]))
    assert found.positions == pytest.approx(0, abs=1e-12)
    assert found.volume == pytest.approx(np.std([1, 1.02**3], ddof=1) / np.mean([1, 1.02**3]))


def test_disagreement():
    """Flagged where members differ by more than atoms move."""
    shifts = np.full((2, 4, 3), 0.1)
    shifts[0, :2] -= 0.05
    path, other = paths(shifts, fixed=[3])
    found = spread([path, other])
    assert disagreement(path, found) is None
    wide = found._replace(positions=0.2)
    assert disagreement(path, wide).name == "members disagree"
    # Held by symmetry, atoms rest but for rounding.
    rest, same = paths(np.array([[[0.0, 0, 0]] * 4, [[1e-7, 0, 0]] * 4]), fixed=[3])
    assert spread([rest, same]).positions > 0 and disagreement(rest, spread([rest, same])) is None
    assert "0.200" in disagreement(path, wide).detail


def test_what_the_cell_moves_is_no_displacement():
    """Members disagree about places in the lattice; a strain moves atoms far from the origin further."""
    shifts = np.full((2, 4, 3), 0.1)
    shifts[0, :2] -= 0.05
    path, other = paths(shifts, fixed=[3])
    size = np.linalg.norm(internal_displacements(path.positions, path.cells), axis=1)
    wide = spread([path, other])._replace(positions=float(size.max()) + 0.01)
    assert disagreement(path, wide) is not None
    for shift in (0.0, 50.0):
        strained = strain_end(path, 1.05, shift)
        found = internal_displacements(strained.positions, strained.cells)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), size, atol=1e-9)
        assert np.abs(strained.positions[-1] - strained.positions[0]).max() > size.max()
        assert disagreement(strained, wide) is not None


def strain_end(path, factor, shift):
    """The path from positions shifted along the diagonal, its last frame and cell stretched."""
    positions, cells = path.positions + shift, path.cells.copy()
    cells[-1] *= factor
    positions[-1] *= factor
    return dataclasses.replace(path, positions=positions, cells=cells)


def test_relax_command(models, tmp_path, monkeypatch, capsys):
    """One program for members of one kind; spreads in table and JSON; why there is none is told."""
    monkeypatch.chdir(tmp_path)
    for k, model in enumerate(models):
        save_model(model, f"m{k}")
    ase.io.write("cells.extxyz", [alloy("Cu"), alloy("Au", 1)])
    before = solving.compiled_shapes()
    argv = ["relax", "cells.extxyz", "--model", "m0", "--model", "m1", "--frames", "3", "--json"]
    assert cli.main(argv) == 0
    assert solving.compiled_shapes() <= before + 1
    document = json.loads(capsys.readouterr().out)
    assert document["models"] == ["m0", "m1"]
    expected = relax_committee(models[:2], alloy("Cu"), 3)
    one, two = document["structures"]
    assert one["spread"]["positions"] == pytest.approx(expected.spread.positions, rel=1e-3)
    assert one["spread"]["energy_per_atom"] == pytest.approx(
        expected.spread.energy_per_atom, rel=1e-3
    )
    assert 0 < two["spread"]["positions"] <= two["spread"]["largest"]
    final = ase.io.read("relaxed/cells-path.extxyz", "2").positions
    np.testing.assert_allclose(final, expected.path.positions[-1], atol=1e-5)
    ends = np.stack([path.positions[-1] for path in expected.paths])
    np.testing.assert_allclose(final, ends.mean(0), atol=1e-5)
    assert np.abs(ends - final).max() > 1e-4

    assert cli.main([*argv[:-1], "--model", "m2", "--overwrite"]) == 0
    out, err = capsys.readouterr()
    assert "± positions" in out and "spread of 3 models" in out
    assert "member lost: no usable prediction of m2: the model never saw Au" in err
    assert cli.main([*argv[:-3], "--model", "m0", "--overwrite"]) == 2
    assert "given twice" in capsys.readouterr().err
    with pytest.raises(InputError, match="at least 2"):
        check_members(models[:1])


def comparison(name, true, predicted, energy, fixed=(0,)):
    atoms = alloy()
    return Comparison(
        id=name,
        atomic_numbers=atoms.numbers,
        cell=atoms.cell.array,
        pbc=np.ones(3, bool),
        fixed_mask=np.isin(np.arange(4), fixed),
        true_positions=np.stack([atoms.positions, atoms.positions + true]),
        true_energies=np.zeros(2),
        true_forces=np.zeros((2, 4, 3)),
        pred_positions=np.stack([atoms.positions, atoms.positions + predicted]),
        pred_energies=np.array([0.0, energy]),
        pred_forces=np.zeros((2, 4, 3)),
        composition_energy=0.0,
        slots=np.arange(2),
        n_frames=2,
    )


def test_a_calibrated_committee_is_found_to_be_one():
    """Members and truth drawn from one normal distribution, whose width differs by structure."""
    rng = np.random.default_rng(0)
    members = [[] for _ in range(5)]
    for k in range(400):
        width = 10 ** rng.uniform(-3, -1)
        true = rng.normal(0, width, (4, 3))
        for own in members:
            shift, energy = rng.normal(0, width, (4, 3)), rng.normal(0, width)
            own.append(comparison(f"s{k}", true, shift, energy))
    errors = committee_errors([members[0], *(m[::-1] for m in members[1:])])
    assert errors.ids[:2] == ["s0", "s1"] and len(errors.ids) == 400
    mean = np.mean([{c.id: c for c in m}["s3"].pred_energies[-1] for m in members])
    assert errors.error["energy"][3] == pytest.approx(abs(mean) / 4)
    found = calibrate(errors)["positions"]
    # A draw and the mean of five others differ by √(1 + 1/5) widths.
    assert found.ratio == pytest.approx(np.sqrt(1.2), rel=0.1)
    assert found.within_two > 0.9 > 0.5 > found.within_one
    assert found.spearman > 0.9
    expected = spearmanr(errors.spread["positions"], errors.error["positions"]).statistic
    assert found.spearman == pytest.approx(expected)
    # Spreads a tenth as wide are overconfident.
    narrow = errors._replace(spread={k: v / 10 for k, v in errors.spread.items()})
    assert calibrate(narrow)["positions"].within_two < 0.01
    same = errors._replace(spread={k: np.ones(400) for k in errors.spread})
    assert calibrate(same)["energy"].spearman is None
    assert calibration_table(calibrate(same), 5).row_count == 9
    assert found.n == 400 and found.at_rest == 0


def test_committee_errors_compare_like_with_like():
    shift = np.full((4, 3), 0.1)
    good = [comparison("a", shift, shift, 1.0), comparison("b", shift, 0 * shift, 1.0)]
    other = [dataclasses.replace(c, pred_energies=np.array([0, 3.0])) for c in good]
    found = committee_errors([good, other])
    assert found.error["positions"] == pytest.approx([0, np.sqrt(3) * 0.1])
    assert found.spread["energy"] == pytest.approx([np.sqrt(2) / 4] * 2)
    # A translation is no error where nothing is fixed.
    free = comparison("c", shift, 0 * shift, 1.0, fixed=())
    assert committee_errors([[free], [free]]).error["positions"] == pytest.approx([0])
    lost = dataclasses.replace(good[0], pred_positions=np.full((2, 4, 3), np.nan))
    partly = committee_errors([good, [lost, other[1]]])
    assert partly.ids == ["b"] and partly.left_out == 1 and found.left_out == 0
    assert {c.left_out for c in calibrate(partly).values()} == {1}
    with pytest.raises(InputError, match="same structures"):
        committee_errors([good, other[:1]])
    longer = [dataclasses.replace(c, n_frames=3) for c in good]
    with pytest.raises(InputError, match="not have the same frames"):
        committee_errors([good, longer])
    # Of three members those count that are finite and usable: what the committee predicts.
    away = dataclasses.replace(good[0], usable=False, pred_energies=np.array([0, 100.0]))
    for third in (lost, away):
        three = committee_errors([good[:1], other[:1], [third]])
        assert three.spread["energy"] == pytest.approx([np.sqrt(2) / 4])
        mean = averaged([good[0], other[0], third]).pred_energies[-1]
        assert three.error["energy"] == pytest.approx([mean / 4])
    with pytest.raises(InputError, match="usable predictions from two members"):
        committee_errors([good[:1], [away]])
    held = comparison("d", shift, shift, 1.0, fixed=range(4))
    with pytest.raises(InputError, match="no structure"):
        committee_errors([[held], [held]])


def test_structures_at_rest_say_nothing_of_positions():
    """Rounding is neither spread nor error; the energies of these structures count."""
    spread = {"positions": np.array([1e-16, 9e-4, 2e-3, 0.1]), "energy": np.full(4, 1e-5)}
    error = {"positions": np.array([1e-8, 9e-4, 1e-4, 0.2]), "energy": np.full(4, 2e-5)}
    found = calibrate(Errors(list("abcd"), spread, error))
    assert (found["positions"].n, found["positions"].at_rest) == (2, 2)
    assert found["positions"].within_one == 0.5
    assert found["positions"].ratio == pytest.approx((0.05 + 2) / 2)
    assert (found["energy"].n, found["energy"].at_rest, found["energy"].within_two) == (4, 0, 1)
    rest = {k: v[:2] for k, v in spread.items()}
    none = calibrate(Errors(list("ab"), rest, {k: v[:2] for k, v in error.items()}))
    assert none["positions"]._asdict() == {
        "n": 0, "at_rest": 2, "spearman": None, "within_one": None, "within_two": None,
        "ratio": None, "spread": None, "error": None, "left_out": 0,
    }  # fmt: skip
    stream = io.StringIO()
    fewer = {name: c._replace(left_out=3) for name, c in none.items()}
    Console(file=stream, width=100).print(calibration_table(fewer, 2))
    lines = {line[:25].strip(): line[25:].split() for line in stream.getvalue().splitlines()}
    assert lines["median error"] == ["–", "0.02"]
    assert lines["errors within 2 spreads"] == ["–", "100", "%"]
    assert lines["… at rest, left out"] == ["2", "0"]
    assert lines["… not usable, left out"] == ["3", "3"]


def evaluation(*comparisons):
    """As `evaluate_workdir` makes it of one model."""
    own = list(comparisons)
    results = {p: evaluate(own, p) for p in run.PREDICTORS}
    return run.Evaluation(results, own, [], "set")


def test_columns_of_a_committee_are_over_the_same_structures():
    """The first member fails on the hard structure, of which the mean is finite."""
    shift = np.full((4, 3), 0.1)
    easy, hard = comparison("easy", shift, 0 * shift, 1.0), comparison("hard", shift, 0 * shift, 9.0)
    lost = dataclasses.replace(hard, pred_energies=np.array([0.0, np.nan]))
    both = run.mean_evaluation([evaluation(easy, lost), evaluation(easy, hard)])
    found = both.results
    assert list(found) == ["model", "first member", "nothing", "composition"]
    assert {name: m.n_averaged for name, m in found.items()} == dict.fromkeys(found, 1)
    assert both.among == {"easy"}  # the figure's too
    for name in ("model", "first member"):
        assert found[name].final.energy_mae == pytest.approx(1.0)
    assert found["first member"].n_nonfinite == 1 and found["model"].n_nonfinite == 0


def test_columns_of_minimised_energies_are_over_the_same_structures(tmp_path, monkeypatch):
    """RelaxNet and doing nothing are shown without what L-BFGS fails on."""
    shift = np.full((4, 3), 0.1)
    easy, hard = comparison("easy", shift, 0 * shift, 1.0), comparison("hard", shift, 0 * shift, 9.0)
    lost = dataclasses.replace(hard, pred_energies=np.array([0.0, np.nan]))

    class Minimiser:
        def __init__(self, model, fmax):
            self.costs = {"seconds": 0.0}

    def compare(model, trajectories, report, predict=None):
        return [easy, lost if isinstance(predict, Minimiser) else hard], []

    monkeypatch.setattr(run, "compare", compare)
    monkeypatch.setattr(run, "_Minimiser", Minimiser)
    monkeypatch.setattr(run, "read_any", lambda *_: [SimpleNamespace(id="x")])
    monkeypatch.setattr(run, "_seen", lambda *_: 0)
    monkeypatch.setattr(run, "graph_seconds", lambda *_: 0.0)
    model = tiny_model(tiny_config("implicit", **LIGHT), dtype=np.float32)
    found = run.evaluate_workdir(tmp_path, data="x", report=lambda _: None, fmax=0.1, model=model)
    assert list(found.results) == ["model", "lbfgs", "nothing", "composition"]
    assert {m.n_averaged for m in found.results.values()} == {1}
    assert found.results["model"].final.energy_mae == pytest.approx(1.0)
    assert found.results["lbfgs"].n_nonfinite == 1


def test_eval_reads_some_relaxations_at_a_time(tmp_path, monkeypatch):
    """Every one once; and what cannot be minimised is said before anything is predicted."""
    shift, seen = np.full((4, 3), 0.1), []

    def compare(model, trajectories, report, predict=None):
        seen.append([t.id for t in trajectories])
        left_out = [t.id for t in trajectories if t.id == "1"]
        return [comparison(t.id, shift, shift, 1.0) for t in trajectories if t.id != "1"], left_out

    monkeypatch.setattr(run, "BLOCK", 2)
    monkeypatch.setattr(run, "compare", compare)
    monkeypatch.setattr(run, "read_any", lambda *_: [SimpleNamespace(id=str(k)) for k in range(5)])
    monkeypatch.setattr(run, "_seen", lambda *_: 0)
    model = tiny_model(tiny_config(**LIGHT), dtype=np.float32)
    found = run.evaluate_workdir(tmp_path, data="x", report=lambda _: None, model=model)
    assert seen == [["0", "1"], ["2", "3"], ["4"]]
    assert [c.id for c in found.comparisons] == ["0", "2", "3", "4"] and found.left_out == ["1"]
    with pytest.raises(InputError, match="cannot be minimised"):
        run.evaluate_workdir(tmp_path, data="x", report=lambda _: None, model=model, fmax=0.1)
    assert len(seen) == 3


def test_nothing_finite_is_a_table_without_parity(tmp_path):
    """An older figure would be of another model."""
    shift = np.full((4, 3), 0.1)
    good = comparison("a", shift, shift, 1.0)
    lost = dataclasses.replace(good, pred_energies=np.array([0.0, np.nan]))
    told = []
    files = run.write_evaluation(evaluation(good), tmp_path, told.append)
    names = ["metrics.json", "structures.csv", "per_frame.png", "parity.png"]
    assert [f.name for f in files] == names and not told
    files = run.write_evaluation(evaluation(lost), tmp_path, told.append)
    assert told == [f"{tmp_path / name}: not drawn, no prediction is finite" for name in names[2:]]
    assert sorted(files) == sorted(tmp_path.iterdir()) == [tmp_path / name for name in names[:2]]


def test_eval_of_nothing_finite_prints_its_table(models, tmp_path, monkeypatch, capsys):
    """Of one model and of a committee, whose older calibration goes."""
    monkeypatch.chdir(tmp_path)
    shift = np.full((4, 3), 0.1)
    lost = comparison("a", shift, np.nan * shift, np.nan)
    monkeypatch.setattr(run, "evaluate_workdir", lambda *_: evaluation(lost))
    for k, model in enumerate(models[:2]):
        save_model(model, Path(f"run{k}", "model"))
    Path("out").mkdir()
    Path("out/calibration.csv").write_text("old")
    argv = ["eval", "--workdir", "run0", "--data", "set.h5", "--out", "out"]
    for more in ([], ["--committee", "run1"]):
        assert cli.main([*argv, *more]) == 0
        out, err = capsys.readouterr()
        assert "coordinate MAE (Å), final frame" in out and "parity.png" not in out
        assert "parity.png: not drawn" in err
    assert "no calibration: no structure has free atoms" in err
    assert sorted(f.name for f in Path("out").iterdir()) == ["metrics.json", "structures.csv"]


def test_eval_command(models, tmp_path, monkeypatch, capsys):
    """``eval --committee`` on a file: the figures of the table are those of the CSV."""
    monkeypatch.chdir(tmp_path)
    start = [alloy("Cu", k) for k in range(4)]
    for atoms in start:
        atoms.set_constraint(FixAtoms([0]))
    write_store("set.h5", [
        dataclasses.replace(paths(np.full((1, 4, 3), 0.02 * k))[0], id=f"r{k}", fixed_mask=np.eye(4)[0] > 0)
        for k in range(4)])  # fmt: skip
    for k, model in enumerate(models):
        save_model(model, Path(f"run{k}", "model"))
    Path("empty").mkdir()
    argv = ["eval", "--workdir", "run0", "--data", "set.h5", "--out", "out"]
    assert cli.main([*argv, "--committee", "run1"]) == 0
    out = capsys.readouterr().out
    document = json.loads(Path("out/calibration.json").read_text())
    with open("out/calibration.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["structure"] for r in rows] == [f"r{k}" for k in range(4)]
    assert document["members"] == ["run0", "run1"]
    assert set(document["calibration"]) == {"positions", "energy"}
    for name, found in document["calibration"].items():
        error, width = (
            np.array([float(r[f"{name}_{w}"]) for r in rows]) for w in ("error", "spread")
        )
        assert found["error"] == pytest.approx(np.median(error))
        assert found["within_two"] == np.mean(error <= 2 * width) and found["n"] == 4
    assert "Calibration of the committee" in out and "out/calibration.csv" in out
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert {"model", "first member", "nothing", "composition"} <= set(metrics["results"])
    assert "mean of 2 models" in out and "member" in out
    both = load_committee("run0", "run1")
    shipped = Path("shipped")
    for k, model in enumerate(models[:2]):
        save_model(model, shipped / str(k))
    monkeypatch.setattr("relaxnet_jax.model_folders._SHIPPED", shipped)
    of_shipped = ["eval", "--workdir", "pretrained"]
    assert cli.main(of_shipped) == 2 and "give relaxations with --data" in capsys.readouterr().err
    assert cli.main([*of_shipped, "--data", "set.h5"]) == 0
    assert capsys.readouterr().out.endswith("relax FILE --model pretrained\n")
    again = json.loads(Path("pretrained/eval-set-committee/metrics.json").read_text())
    assert again["results"] == metrics["results"]
    assert [m.config.train.seed for m in both] == [0, 1] and len(load_committee()) > 1
    for wrong, words in (
        (["run0"], "must differ"),
        (["run1", "--lbfgs"], "--lbfgs: cannot be used with several models"),
        (["run1", "--fmax", "0.1"], "--fmax: cannot be used with several models"),
        (["run7"], "run7: no such folder"),
        (["empty"], "empty: holds no trained model"),
    ):
        assert cli.main([*argv, "--committee", *wrong]) == 2
        assert words in capsys.readouterr().err


def test_eval_of_a_committee_of_potentials(tmp_path, monkeypatch, capsys):
    """Their mean stands where a single one's L-BFGS would."""
    monkeypatch.chdir(tmp_path)
    write_store("set.h5", [dataclasses.replace(paths(np.full((1, 4, 3), 0.02))[0], id="r")])
    for k in range(2):
        config = tiny_config("static", **LIGHT, train__seed=k)
        model = tiny_model(config, seed=k, dtype=np.float32).replace(elements=(29, 79))
        save_model(model, Path(f"run{k}", "model"))
    read, load, minimised, original = [], run.load_model, [], run.minimise
    monkeypatch.setattr(run, "load_model", lambda path: read.append(str(path)) or load(path))
    monkeypatch.setattr(run, "minimise", lambda *args: minimised.append(args[2]) or original(*args))
    argv = ["eval", "--workdir", "run0", "--data", "set.h5", "--committee", "run1", "--fmax", "0.5"]
    assert cli.main(argv) == 0
    assert read == ["run0/model", "run1/model"] and minimised == [0.5, 0.5]
    found = json.loads(Path("run0/eval-set-committee/metrics.json").read_text())["results"]
    assert list(found) == ["lbfgs", "first member", "nothing", "composition"]
    assert "relax FILE --model run0 --model run1" in capsys.readouterr().out


def test_averages_pass_over_what_is_not_usable():
    shift = np.full((4, 3), 0.1)
    one, other = comparison("a", shift, shift, 1.0), comparison("a", shift, 0 * shift, 2.0)
    lost = dataclasses.replace(one, pred_energies=np.array([0, np.nan]))
    assert averaged([one, other]).pred_energies[-1] == 1.5
    assert averaged([lost, other]).pred_energies[-1] == 2.0
    assert not averaged([lost, lost]).finite
    away = dataclasses.replace(one, usable=False)
    left = averaged([away, other, lost])
    assert left.pred_energies[-1] == 2.0 and left.usable
    none = averaged([away, lost])
    assert none.pred_energies[-1] == 1.0 and not none.usable


def test_many_structures_at_once(models):
    """As one by one, in their order; the same structure twice is two."""
    many = [alloy("Cu"), alloy("Cu", seed=1), alloy("Cu")]
    found = relax_committee(models, many, 3)
    assert [one.path.id for one in found] == ["0-Cu4", "1-Cu4", "2-Cu4"]
    for atoms, one in zip(many, found):
        alone = relax_committee(models, atoms, 3)
        assert alone.path.id == "Cu4" and one.spread.members == 3
        np.testing.assert_allclose(one.path.positions, alone.path.positions, atol=1e-5)
    with pytest.raises(InputError, match=r"structure 1: is of type str, not ase\.Atoms"):
        relax_committee(models, [alloy("Cu"), "POSCAR"], 3)


def test_members_share_their_neighbour_lists(models, monkeypatch):
    """What one member needs is listed once for all that see as far; the others begin with its longer lists."""
    few = tiny_config("explicit", **LIGHT, graph__skin=0.01)
    alike = [model.replace(config=few) for model in models[:2]]
    other = models[1].replace(config=tiny_config("explicit", **LIGHT, graph__skin=0.02))
    cells = [alloy("Cu"), alloy("Au", 1)]
    cells[0].rattle(0.2, seed=1)
    listed = []
    real = graph.build_neighbors
    monkeypatch.setattr(graph, "build_neighbors", lambda *a, **k: listed.append(a[5]) or real(*a, **k))
    alone = relax_by(alike[:1], cells, 3, True)
    first, before = len(listed), list(listed)
    assert max(listed) > 0.01  # solved again with a longer list
    listed.clear()
    both = relax_by(alike, cells, 3, True)
    assert listed.count(0.01) == 2 and listed[:first] == before  # the second member makes only longer ones
    for (one, _), (two, _) in zip(alone, both, strict=True):
        np.testing.assert_allclose(two.paths[0].positions, one.paths[0].positions, atol=1e-6)
    (second,) = [found.paths[0] for found, _ in relax_by(alike[1:], cells[:1], 3, True)]
    np.testing.assert_allclose(both[0][0].paths[1].positions, second.positions, atol=1e-5)
    listed.clear()
    relax_by([*alike, other], cells, 3, True)
    assert listed.count(0.01) == listed.count(0.02) == 2
