"""The metrics against values worked out by hand."""

import csv
import dataclasses
import io
import itertools
import json

import numpy as np
import pytest
from rich.console import Console

from relaxnet_jax.errors import InputError
from relaxnet_jax.evaluate.origin import foreign_origin
from relaxnet_jax.evaluate.tables import metrics_table, write_metrics, write_structures
from relaxnet_jax.metrics import (
    AT_REST,
    Comparison,
    aligned_rmsd,
    coordinate_errors,
    evaluate,
    falls,
    finite_ids,
    pearson,
)
from relaxnet_jax.reproduce import ablation
from relaxnet_jax.work import work

CUBE = 4.0 * np.eye(3)
PERIODIC, MOLECULE = np.ones(3, bool), np.zeros(3, bool)
FREE = np.ones(2, bool)
X0 = np.array([[0.0, 0, 0], [2, 2, 2]])


def rotation(axis, angle):
    k = np.cross(np.eye(3), np.asarray(axis, float) / np.linalg.norm(axis))
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k


def comparison(**changes):
    """Two atoms, frames 0 and 1 of 2: atom 1 moves by 0.6 Å along x, the prediction by 0.3 Å."""
    true = np.stack([X0, X0])
    true[1, 1, 0] += 0.6
    pred = np.stack([X0, X0])
    pred[1, 1, 0] += 0.3
    forces = np.zeros((2, 2, 3))
    forces[0, 1, 0] = 0.6
    fields = {
        "id": "a", "atomic_numbers": [29, 29], "cell": CUBE, "pbc": PERIODIC,
        "fixed_mask": [False, False], "true_positions": true, "true_energies": [-1.0, -2.0],
        "true_forces": forces, "pred_positions": pred, "pred_energies": [-1.2, -1.6],
        "pred_forces": forces / 2, "composition_energy": -1.5, "slots": [0, 1], "n_frames": 2,
    }  # fmt: skip
    return Comparison(**fields | changes)


def alloys(n, error):
    """n structures of 2 to 5 atoms of copper and gold, whose final energies are off by ``error(numbers)`` eV."""
    rng, made = np.random.default_rng(0), []
    for k in range(n):
        numbers = rng.choice([29, 79], size=rng.integers(2, 6))
        shape = (2, len(numbers), 3)
        made.append(comparison(
            id=f"s{k}", atomic_numbers=numbers, fixed_mask=np.zeros(len(numbers), bool),
            true_positions=np.zeros(shape), pred_positions=np.zeros(shape), true_forces=np.zeros(shape),
            pred_forces=np.zeros(shape), pred_energies=[-1.0, -2.0 + error(numbers)],
        ))  # fmt: skip
    return made


def test_energies_of_another_origin():
    """Each element's shifted by its own eV are told; errors of structures, however large, are not, nor
    small ones, nor those of so few structures that energies of the elements fit anything."""
    noise = np.random.default_rng(1)

    def shifted(numbers):
        return 1.5 * (numbers == 29).sum() - 4.0 * (numbers == 79).sum() + 0.05 * noise.normal()

    made = alloys(20, shifted)
    said = foreign_origin(made)
    off = [abs(c.pred_energies[-1] + 2.0) / len(c.atomic_numbers) for c in made]
    assert said.startswith("final energies are ") and "from another code" in said
    assert float(said.split()[5]) == pytest.approx(np.mean(off), rel=0.01)
    assert foreign_origin(alloys(5, shifted)) == ""
    # A wrong energy of one composition, however often it occurs, is the model's.
    same = [dataclasses.replace(made[0], id=str(k)) for k in range(12)]
    assert foreign_origin(same) == ""
    assert foreign_origin(alloys(20, lambda numbers: 0.01 * shifted(numbers))) == ""
    assert foreign_origin(alloys(20, lambda numbers: 3.0 * noise.normal())) == ""
    broken = [dataclasses.replace(c, pred_energies=np.array([0.0, np.nan])) for c in alloys(3, shifted)]
    assert foreign_origin([*made, *broken]) == said
    assert foreign_origin([]) == foreign_origin(broken) == ""


def test_model_by_hand():
    m = evaluate([comparison()])
    assert m.final.energy_mae == pytest.approx(0.4)
    assert m.final.energy_mae_per_atom == pytest.approx(200)
    assert m.all_frames.energy_mae == pytest.approx(0.3)
    assert m.all_frames.energy_mae_per_atom == pytest.approx(150)
    assert m.final.relaxation_energy_mae_per_atom == pytest.approx(300)  # -0.4 for -1 eV
    assert m.all_frames.relaxation_energy_mae_per_atom == pytest.approx(150)
    # Half of 0.3 and 0 eV/Å on average along 0.3 Å: -0.045 eV, for -1 eV.
    assert m.final.work_mae_per_atom == pytest.approx(1000 * (1 - 0.045) / 2)
    assert m.final.forces_mae == 0
    assert m.all_frames.forces_mae == pytest.approx(1000 * 0.3 / 6 / 2)
    assert m.final.positions_mae == pytest.approx(0.3 / 6)
    assert m.all_frames.positions_mae == pytest.approx(0.3 / 6 / 2)
    assert m.final.rmsd == pytest.approx(0.15)  # centred: -0.15 and 0.15 Å
    assert m.final_ratio == pytest.approx(0.5)
    assert (m.improved_fraction, m.monotone_fraction, m.n_structures) == (1, 1, 1)
    assert m.final.pearson is None  # one point
    assert m.all_frames.pearson == pytest.approx(1)


def test_baselines_by_hand():
    nothing = evaluate([comparison()], "nothing")
    assert nothing.final.energy_mae == pytest.approx(1)
    assert nothing.all_frames.energy_mae == pytest.approx(0.5)
    assert nothing.per_frame.forces_mae == pytest.approx([0, 100])
    assert nothing.final.positions_mae == pytest.approx(0.1)
    assert nothing.final.relaxation_energy_mae_per_atom == nothing.final.energy_mae_per_atom
    assert nothing.final.work_mae_per_atom == nothing.final.energy_mae_per_atom
    assert (nothing.final_ratio, nothing.improved_fraction) == (1, 0)
    composition = evaluate([comparison()], "composition")
    assert composition.per_frame.energy_mae_per_atom == pytest.approx([250, 250])
    assert composition.per_frame.forces_mae == pytest.approx([100, 0])
    assert composition.final.positions_mae == nothing.final.positions_mae
    assert composition.all_frames.pearson is None  # constant


def test_every_structure_counts_once():
    """Means over atoms, then frames, then structures; the ratio is one of means."""
    still = comparison(true_positions=np.stack([X0, X0]), true_energies=[-1.2, -1.6])
    big = comparison(
        atomic_numbers=[29] * 4,
        fixed_mask=[False] * 4,
        **{k: np.zeros((2, 4, 3)) for k in ("true_forces", "pred_forces", "pred_positions")},
        true_positions=np.full((2, 4, 3), 0.1) * np.array([0, 1])[:, None, None],
    )
    m = evaluate([comparison(), still, big])
    assert m.final.positions_mae == pytest.approx((0.05 + 0.05 + 0.1) / 3)
    assert m.final_ratio == pytest.approx(0.2 / (0.1 + 0 + 0.1))
    assert m.median_ratio == pytest.approx(0.75)  # of 0.5 and 1; one does not move
    assert m.improved_fraction == pytest.approx(1 / 3)  # neither one at rest nor a tie improves
    assert m.final.energy_mae_per_atom == pytest.approx((200 + 0 + 100) / 3)
    alone = evaluate([still])
    assert alone.final_ratio is None and alone.improved_fraction == 0


@pytest.mark.parametrize("noise", [0.0, 1e-16, 1e-8, AT_REST])
def test_round_off_is_no_motion(noise):
    """Structures at rest count as not improved, in no ratio; to six coordinates 6 times the mean."""
    true = np.stack([X0, X0])
    true[1, 1, 0] = 2.0 + 6 * 0.99 * noise
    exact = {"true_positions": true, "pred_positions": np.array(true)}
    still = comparison(id="still", **exact)
    away = comparison(id="away", **exact | {"pred_positions": true + 0.1})
    m = evaluate([still, away])
    assert m.final_ratio is None and m.median_ratio is None and m.improved_fraction == 0
    moving = evaluate([still, comparison(), comparison(id="b")])
    assert moving.median_ratio == pytest.approx(0.5)
    assert moving.improved_fraction == pytest.approx(2 / 3)
    assert evaluate([still], "nothing").final_ratio is None


def test_round_off_of_cells_is_no_motion():
    """One atom that keeps its place in a cell that relaxes."""
    cell = np.array([[2.1, 0.3, 0.1], [0.2, 1.9, 0.4], [0.3, 0.2, 2.3]])
    cells = np.stack([cell, cell @ np.diag([1.03, 0.98, 1.01])])
    place = (np.array([[0.3, 0.7, 0.1]]) @ cells).round(8)  # as in a file
    one = comparison(
        atomic_numbers=[29], fixed_mask=[False], cell=cell, true_cells=cells, pred_cells=cells[[0, 0]],
        true_positions=place, pred_positions=place[[0, 0]],
        true_forces=np.zeros((2, 1, 3)), pred_forces=np.zeros((2, 1, 3)))  # fmt: skip
    nothing = evaluate([one], "nothing").final.positions_mae
    assert 0 < nothing < 1e-7
    m = evaluate([one])
    assert (m.final_ratio, m.median_ratio, m.improved_fraction) == (None, None, 0)


def test_absent_frames_are_ignored():
    partial = comparison(slots=[0, 3], n_frames=4)
    full = comparison(
        slots=np.arange(4), n_frames=4, true_energies=[0, 0, 0, 0], pred_energies=[0, 1, 2, 3],
        **{k: np.stack([X0] * 4) for k in ("true_positions", "pred_positions")},
        **{k: np.zeros((4, 2, 3)) for k in ("true_forces", "pred_forces")},
    )  # fmt: skip
    m = evaluate([partial, full])
    assert m.per_frame.counts.tolist() == [2, 1, 1, 2]
    assert m.per_frame.energy_mae_per_atom == pytest.approx([50, 500, 1000, 850])
    assert m.all_frames.energy_mae_per_atom == pytest.approx((150 + 750) / 2)
    assert m.monotone_fraction == 0.5
    lonely = evaluate([partial]).to_dict()["per_frame"]
    assert lonely["energy_mae_per_atom"][1:3] == [None, None] and lonely["counts"] == [1, 0, 0, 1]


def test_monotone_tolerance_and_single_frame():
    within = comparison(pred_energies=[-1.0, -1.0 + 9e-7])
    beyond = comparison(pred_energies=[-1.0, -1.0 + 2e-6])
    one = comparison(
        slots=[1], true_energies=[0.0], pred_energies=[0.0],
        **{f"{k}_{v}": X0[None] for k in ("true", "pred") for v in ("positions", "forces")},
    )  # fmt: skip
    assert evaluate([within, beyond, one]).monotone_fraction == 0.5
    assert evaluate([one]).monotone_fraction is None
    assert falls(within) and not falls(beyond)
    # Of large cells four units in the last place of float32: 400 eV, 1.2e-4 eV.
    large = comparison(pred_energies=[-1000.0, -1000.0 + 1e-4], composition_energy=-600.0)
    assert falls(large) and evaluate([large]).monotone_fraction == ablation._falls(large) == 1
    assert not falls(dataclasses.replace(large, composition_energy=-990.0))
    assert not falls(dataclasses.replace(large, pred_energies=[-1000.0, -1000.0 + 2e-4]))


def test_fixed_atoms_do_not_count():
    fixed = comparison(fixed_mask=[True, False])
    m = evaluate([fixed])
    assert m.final.positions_mae == pytest.approx(0.3 / 3)
    assert m.per_frame.forces_mae == pytest.approx([100, 0])
    assert m.final.rmsd == pytest.approx(0.3)  # pinned: no translation
    frozen = evaluate([comparison(fixed_mask=[True, True])])
    assert frozen.final.positions_mae is None and frozen.final.energy_mae == pytest.approx(0.4)
    assert frozen.final_ratio is None and frozen.improved_fraction is None
    assert evaluate([fixed, comparison(fixed_mask=[True, True])]).final.rmsd == pytest.approx(0.3)


def test_diverged_predictions_leave_all_predictors_and_fail():
    bad = comparison(pred_energies=[-1.0, np.nan], true_energies=[0.0, -9.0])
    m = evaluate([comparison(), bad])
    assert (m.n_structures, m.n_nonfinite) == (2, 1)
    assert m.final.energy_mae == pytest.approx(0.4)
    assert (m.monotone_fraction, m.improved_fraction) == (0.5, 0.5)
    assert evaluate([comparison(), bad], "nothing").final.energy_mae == pytest.approx(1)
    assert m.median_ratio is None and evaluate(
        [comparison()] * 2 + [bad]
    ).median_ratio == pytest.approx(0.5)
    only = evaluate([bad])
    assert only.final.energy_mae is None and only.improved_fraction == 0
    json.dumps(only.to_dict(), allow_nan=False)


def test_columns_are_over_the_same_structures():
    """What one method fails on leaves the means of all; fractions and medians count failures."""
    hard = comparison(id="hard", true_energies=[-1.0, -9.0])
    lost = dataclasses.replace(hard, pred_energies=[-1.0, np.nan])
    ours, theirs = [comparison(), hard], [lost, comparison()]
    among = finite_ids(ours, theirs)
    assert among == {"a"} and finite_ids(ours) == {"a", "hard"}
    columns = {
        "model": evaluate(ours, among=among),
        "lbfgs": evaluate(theirs, among=among),
        "nothing": evaluate(ours, "nothing", among),
    }
    assert [m.n_averaged for m in columns.values()] == [1, 1, 1]
    assert [m.n_nonfinite for m in columns.values()] == [0, 1, 0]
    assert columns["model"].final == columns["lbfgs"].final
    assert columns["nothing"].final.energy_mae == pytest.approx(1)
    assert columns["model"].per_frame.counts.tolist() == [1, 1]
    assert columns["model"].improved_fraction == 1 and columns["lbfgs"].improved_fraction == 0.5
    assert columns["model"].all_frames.pearson == pytest.approx(1)
    stream = io.StringIO()
    Console(width=120, file=stream).print(metrics_table(columns, "two"))
    text = " ".join(stream.getvalue().split())
    assert "1 left out of the means in every column: prediction not finite" in text
    assert "structures without a finite prediction 0 1 –" in text


def test_direct_models_predict_no_energies_on_the_way():
    """Dashes for what they do not predict, numbers for what they do."""
    direct = comparison(final_only=True, pred_energies=[-1.6, -1.6], pred_forces=np.zeros((2, 2, 3)))
    m = evaluate([direct, direct])
    assert m.final.energy_mae == pytest.approx(0.4) and m.all_frames.energy_mae is None
    assert m.final.forces_mae is None and m.all_frames.forces_mae is None
    assert m.all_frames.pearson is None and m.monotone_fraction is None
    assert m.final.positions_mae == pytest.approx(0.05) and m.improved_fraction == 1
    np.testing.assert_allclose(m.per_frame.energy_mae_per_atom, [np.nan, 200])
    assert np.isnan(m.per_frame.forces_mae).all()
    nothing = evaluate([direct], "nothing")
    assert nothing.all_frames.energy_mae == pytest.approx(0.5)
    assert nothing.all_frames.forces_mae == pytest.approx(50)
    lost = dataclasses.replace(direct, pred_energies=[np.nan, np.nan])
    assert evaluate([direct, lost]).monotone_fraction is None
    stream = io.StringIO()
    Console(width=120, file=stream).print(metrics_table({"model": m}, "direct"))
    rows = {row.rsplit(None, 1)[0].strip(): row.split()[-1] for row in stream.getvalue().splitlines() if row.split()}
    for name in (
        "energy MAE (meV/atom), all frames", "energy/atom, Pearson r, all frames",
        "force MAE (meV/Å), final frame", "force MAE (meV/Å), all frames",
        "structures with falling energy", "E(t) - E(0) MAE (meV/atom), final frame",
        "… by work of forces, final frame",
    ):  # fmt: skip
        assert rows[name] == "–", name
    assert rows["energy MAE (meV/atom), final frame"] == "200"
    json.dumps(m.to_dict(), allow_nan=False)


def test_work_is_the_change_of_energy():
    """Along a path in a harmonic potential, where the trapezoid rule is exact; fixed atoms do none."""
    rng = np.random.default_rng(0)
    positions, stiffness = rng.normal(size=(7, 3, 3)), rng.normal(size=(9, 9))
    stiffness = stiffness @ stiffness.T
    flat = positions.reshape(7, 9)
    energies = 0.5 * np.einsum("ni,ij,nj->n", flat, stiffness, flat)
    forces = -(flat @ stiffness).reshape(7, 3, 3)
    free = np.zeros(3, bool)
    np.testing.assert_allclose(work(positions, forces, free), energies - energies[0], atol=1e-10)
    held = np.array([True, False, False])
    shaken = positions.copy()
    shaken[:, 0] += 1.0 * rng.normal(size=(7, 3))
    np.testing.assert_array_equal(work(shaken, forces, held), work(positions, forces, held))
    assert not work(positions, forces, ~free).any()


def test_structures_by_hand(tmp_path):
    """A row for each, in the units of the means; empty where there is nothing to say."""
    found = [
        comparison(id="a, b"),
        comparison(id="c", pred_energies=[np.nan, 0.0], usable=False),
        comparison(id="d", fixed_mask=[True, True], atomic_numbers=[8, 12]),
    ]
    write_structures(tmp_path / "structures.csv", found)
    with (tmp_path / "structures.csv").open(newline="") as file:
        a, c, d = csv.DictReader(file)
    assert (a["structure"], a["formula"], a["atoms"]) == ("a, b", "Cu2", "2")
    assert (a["finite"], a["usable"], c["finite"], c["usable"]) == ("True", "True", "False", "False")
    assert float(a["energy_mae_per_atom"]) == pytest.approx(200)
    assert float(a["relaxation_energy_mae_per_atom"]) == pytest.approx(300)
    assert float(a["nothing_energy_mae_per_atom"]) == pytest.approx(500)
    assert float(a["positions_mae"]) == pytest.approx(0.05)
    assert float(a["nothing_positions_mae"]) == pytest.approx(0.1)
    assert a["volume"] == "" and c["positions_mae"] == "" and c["nothing_positions_mae"] == "0.1"
    assert d["formula"] == "MgO" and d["positions_mae"] == "" and d["energy_mae_per_atom"] == "200"


def test_bad_input_is_named():
    with pytest.raises(InputError, match="empty"):
        evaluate([])
    with pytest.raises(InputError, match="predictor"):
        evaluate([comparison()], "oracle")
    with pytest.raises(InputError, match="a: pred_forces"):
        comparison(pred_forces=np.zeros((2, 3, 3)))
    with pytest.raises(InputError, match="slots"):
        comparison(slots=[0, 2])
    with pytest.raises(InputError, match="true_energies is not finite"):
        comparison(true_energies=[0.0, np.inf])


def test_coordinate_errors_broadcast():
    pred = np.zeros((5, 2, 3))
    pred[:, 1, 2] = 0.3
    np.testing.assert_allclose(coordinate_errors(pred, 0 * pred, FREE), np.full(5, 0.05))
    np.testing.assert_allclose(
        coordinate_errors(pred, 0 * pred, np.array([False, True])), np.full(5, 0.1)
    )


@pytest.mark.parametrize("shift", [0.1, 1.9, 2.0, 3.3, -7.7])
def test_alignment_removes_translation_and_lattice_jumps(shift):
    rng = np.random.default_rng(3)
    cell = np.array([[4.0, 0, 0], [1.9, 3.5, 0], [-1.7, 1.2, 5]])
    true = rng.uniform(0, 4, (6, 3))
    noise = rng.normal(0, 0.05, (6, 3))
    noise -= noise.mean(axis=0)
    jumps = rng.integers(-2, 3, (6, 3)) @ cell
    pred = true + noise + jumps + shift
    expected = np.sqrt((noise**2).sum(axis=1).mean())
    free = np.ones(6, bool)
    assert aligned_rmsd(pred, true, cell, PERIODIC, free) == pytest.approx(expected)
    stacked = aligned_rmsd(np.stack([pred, true]), np.stack([true, true]), cell, PERIODIC, free)
    np.testing.assert_allclose(stacked, [expected, 0], atol=1e-12)


def test_minimum_image_in_a_skewed_cell_and_slab():
    """Against a search over many images; a slab has none along its normal."""
    rng = np.random.default_rng(0)
    cell = np.array([[3.0, 0, 0], [7.9, 3, 0], [-5, 4.2, 3]])
    for pbc in (PERIODIC, np.array([True, True, False])):
        steps = itertools.product(*[range(-20, 21) if p else [0] for p in pbc])
        images = np.array(list(steps)) @ cell
        for d in rng.uniform(-6, 6, (20, 3)):
            pred = np.array([[0.0, 0, 0], d])  # the fixed first atom pins the frame
            got = aligned_rmsd(pred, 0 * pred, cell, pbc, np.array([False, True]))
            assert got == pytest.approx(np.linalg.norm(images + d, axis=1).min())


def test_rotation_only_for_molecules():
    rng = np.random.default_rng(1)
    true = rng.normal(size=(5, 3))
    turned = true @ rotation([1, 2, 3], 0.7).T + 5.0
    free = np.ones(5, bool)
    assert aligned_rmsd(turned, true, CUBE, MOLECULE, free) < 1e-12
    assert aligned_rmsd(turned, true, 100 * np.eye(3), PERIODIC, free) > 0.1
    pinned = free.copy()
    pinned[0] = False
    expected = np.sqrt(((turned - true)[1:] ** 2).sum(axis=1).mean())
    assert aligned_rmsd(turned, true, CUBE, MOLECULE, pinned) == pytest.approx(expected)


def test_kabsch_never_reflects():
    """A chiral arrangement differs from its mirror image; the best proper rotation by search."""
    true = np.array([[1.0, 0, 0], [0, 2, 0], [0, 0, 3], [0, 0, 0]])
    mirror, free = true * [-1, 1, 1], np.ones(4, bool)
    got = aligned_rmsd(mirror, true, CUBE, MOLECULE, free)
    a, b = mirror - mirror.mean(axis=0), true - true.mean(axis=0)
    q = np.random.default_rng(2).normal(size=(20000, 4))
    w, x, y, z = (q / np.linalg.norm(q, axis=1, keepdims=True)).T
    turns = np.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ])  # fmt: skip
    best = np.sqrt(((np.einsum("ijn,aj->nai", turns, a) - b) ** 2).sum(-1).mean(-1)).min()
    assert got > 0.3 and got == pytest.approx(best, rel=0.01) and got <= best
    flat = true * [1, 1, 0]  # a planar molecule is its own mirror image
    assert aligned_rmsd(flat * [-1, 1, 1], flat, CUBE, MOLECULE, free) < 1e-12


def test_dependent_cell_vectors_are_an_error():
    with pytest.raises(InputError, match="linearly dependent"):
        aligned_rmsd(X0, X0, np.zeros((3, 3)), PERIODIC, FREE)


def test_pearson():
    assert pearson(np.array([1, 2, 3]), np.array([2, 4, 6])) == pytest.approx(1)
    assert pearson(np.array([1, 2, 3]), np.array([1, 0, 1])) == pytest.approx(0)
    assert pearson(np.full(3, 0.1), np.array([1, 2, 3])) is None


def test_table_and_json(tmp_path):
    results = {p: evaluate([comparison()], p) for p in ("model", "nothing", "composition")}
    stream = io.StringIO()
    Console(width=100, file=stream).print(metrics_table(results, "two atoms [test]"))
    for expected in ("two atoms [test]", "RelaxNet", "doing nothing", "(meV/atom)", "0.500", "–"):
        assert expected in stream.getvalue()
    bad = dataclasses.replace(results["model"], n_nonfinite=3)
    assert metrics_table({"model": bad}, "").row_count == metrics_table(results, "").row_count + 1
    path = tmp_path / "deep" / "metrics.json"
    write_metrics(path, results, {"data": "test", "seed": np.int64(3)})
    document = json.loads(path.read_text())
    assert document["data"] == "test" and document["seed"] == 3
    assert document["results"]["model"]["final"]["energy_mae"] == pytest.approx(0.4)
    assert document["results"]["model"]["per_frame"]["counts"] == [1, 1]
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]
    with pytest.raises(InputError, match="units"):
        write_metrics(path, results, {"units": {}})
    with pytest.raises(InputError, match="cannot be written"):
        write_metrics(path / "below" / "a_file.json", results)


@pytest.mark.parametrize("c", [[0, 0, 20.0], [3.0, 0, 20.0], [0, 0, 0]])
def test_the_vector_through_the_vacuum_is_no_result(c):
    """Of a slab only the lattice of its plane counts, wherever the third vector points, or ends up."""
    start = np.array([[4.0, 0, 0], [0, 4.0, 0], c])
    true, pred = np.stack([start, start]), np.stack([start, start])
    true[1, 0] *= 1.03
    pred[1, 0] *= 1.01
    pred[1, 1, 0] = 4.0 * np.tan(np.radians(3.0))  # gamma = 87
    pred[1, 2] *= 1.1
    slab = comparison(cell=start, pbc=[True, True, False], true_cells=true, pred_cells=pred)
    with np.errstate(all="raise"):
        model = evaluate([slab])
    assert model.final.volume == pytest.approx(100 * (1 - 1.01 / 1.03))  # areas
    tilted = 4.0 / np.cos(np.radians(3.0))
    assert model.final.lengths == pytest.approx((0.08 + (tilted - 4.0)) / 2)
    assert model.final.angles == pytest.approx(3.0)
    chain = dataclasses.replace(slab, pbc=[True, False, False])
    final = evaluate([chain]).final
    assert final.lengths == pytest.approx(0.08) and final.angles is None
    assert final.volume == pytest.approx(100 * (1 - 1.01 / 1.03))
    assert evaluate([slab, chain]).final.angles == pytest.approx(3.0)  # of those that have one


def test_cells_by_hand():
    """A cubic cell grows by 3 % along x, the prediction by 1 % and shears; atoms stay in place."""
    true = np.stack([CUBE, CUBE @ np.diag([1.03, 1, 1])])
    pred = np.stack([CUBE, CUBE @ np.diag([1.01, 1, 1])])
    pred[1, 1, 0] = 4.0 * np.tan(np.radians(3.0))  # b tilts by 3 degrees: gamma = 87
    scaled = X0 / 4.0
    moved = scaled + np.array(
        [[0, 0, 0], [0.05, 0, 0]]
    )  # a twentieth of a lattice vector, not predicted
    cells = comparison(
        true_cells=true, pred_cells=pred,
        true_positions=np.stack([X0, moved @ true[1]]), pred_positions=scaled @ pred)  # fmt: skip
    model, nothing = evaluate([cells, comparison()]), evaluate([cells], "nothing")
    assert model.final.volume == pytest.approx(100 * (1 - 1.01 / 1.03))
    assert nothing.final.volume == pytest.approx(100 * (1 - 1 / 1.03))
    tilted = 4.0 / np.cos(np.radians(3.0))
    assert model.final.lengths == pytest.approx((0.08 + (tilted - 4.0)) / 3)
    assert nothing.final.lengths == pytest.approx(0.12 / 3)
    assert model.final.angles == pytest.approx(1.0) and nothing.final.angles == 0
    # The strain is no displacement: what is left is 0.05 of the true lattice vector, 4.12 Å.
    alone = evaluate([cells])
    assert alone.final.positions_mae == pytest.approx(0.05 * 4.12 / 6)
    assert nothing.final.positions_mae == pytest.approx(0.05 * 4.12 / 6)
    assert alone.final.rmsd == pytest.approx(0.05 * 4.12 / 2)
    assert alone.final_ratio == pytest.approx(1)
    assert evaluate([comparison()]).final.volume is None
    table = io.StringIO()
    Console(file=table, width=120).print(metrics_table({"model": alone}, "x"))
    assert "volume error (%), final frame" in table.getvalue()
    table = io.StringIO()
    Console(file=table, width=120).print(metrics_table({"model": evaluate([comparison()])}, "x"))
    assert "volume" not in table.getvalue()
    with pytest.raises(InputError, match="pred_cells"):
        comparison(true_cells=true, pred_cells=pred[:1])
