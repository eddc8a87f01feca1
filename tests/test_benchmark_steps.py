"""``benchmark steps``: what is counted, what counts as a failure, and what is not done twice."""

import csv
import json
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.optimize import LBFGS
from tiny import alloy, tiny_config, tiny_model

from relaxnet_jax import cli
from relaxnet_jax.benchmark import cases as cases_module
from relaxnet_jax.benchmark import starts, steps
from relaxnet_jax.benchmark.cases import Case, find_cases
from relaxnet_jax.benchmark.ledger import Ledger, fingerprint
from relaxnet_jax.benchmark.oracles import load_oracle
from relaxnet_jax.benchmark.starts import Kind, Start
from relaxnet_jax.benchmark.steps import Limits, run_steps
from relaxnet_jax.benchmark.steps_report import judged, summaries
from relaxnet_jax.config import load_config, to_json
from relaxnet_jax.data.store_write import write_store
from relaxnet_jax.data.trajectory import RelaxationTrajectory
from relaxnet_jax.errors import InputError
from relaxnet_jax.model import save_model
from relaxnet_jax.relaxation.refine import descend, strain_mask

LIGHT = {"model__layers": 1, "model__attention": False, "model__vector_messages": False}


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model with a path of its own, and an EGNN potential, both hardly moving atoms."""
    made = {}
    for name, latent, extra in (
        ("model", "explicit", {}), ("egnn", "static", {"model__architecture": "egnn"}),
    ):  # fmt: skip
        config = tiny_config(latent, **LIGHT, **extra)
        model = tiny_model(config, dtype=np.float32, factor=1.0)
        model = model.replace(elements=(26, 29, 79), energy_scale=np.asarray(1e-3, np.float32))
        made[name] = save_model(model, tmp_path_factory.mktemp(name) / "model")
    return made


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_command(folders, tmp_path, monkeypatch, capsys):
    """Two cells are relaxed from three starts, one is not the oracle's; nothing is done twice."""
    monkeypatch.chdir(tmp_path)
    ase.io.write("cells.extxyz", [alloy(), alloy("Fe"), alloy("Cu", seed=2), alloy("O")])
    argv = ["benchmark", "steps", "--oracle", "emt", "--model", str(folders["model"]),
            "--egnn", str(folders["egnn"]), "--structures", "cells.extxyz", "absent.cif",
            "--out", "out"]  # fmt: skip
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert "absent.cif: no such file" in err and "emt does not know Fe" in err
    rows = read_rows("out/steps.csv")
    assert [(r["structure"], r["start"]) for r in rows] == [
        (f"cells-{k}", start) for k in range(4) for start in ("initial", "model", "egnn")
    ]
    assert [r["status"] for r in rows] == [
        *["converged"] * 3, *["failed"] * 3, *["converged"] * 3, "skipped", *["no start"] * 2
    ]  # fmt: skip
    assert "never saw O" in rows[10]["remark"] and not rows[10]["steps"]
    check = alloy()
    check.calc = EMT()
    optimizer = LBFGS(check, logfile=None)
    optimizer.run(fmax=0.05)
    assert int(rows[0]["steps"]) == optimizer.nsteps + 1 > 2
    assert float(rows[0]["energy"]) == pytest.approx(check.get_potential_energy(), abs=1e-6)
    assert {r["result"] for r in rows if r["status"] == "converged"} == {"same minimum"}
    document = json.loads(Path("out/steps.json").read_text())
    initial, model, egnn = document["summary"]
    assert initial["n"] == 2 and egnn["label"] == "EGNN + LBFGS"
    # The one they never saw the element of counts against them, though nothing else starts there.
    assert model["n"] == egnn["n"] == 3 and model["relaxed"] == egnn["relaxed"] == 2
    saved = [1 - int(rows[k + 1]["steps"]) / int(rows[k]["steps"]) for k in (0, 6)]
    assert model["saved_mean"] == pytest.approx(np.mean(saved))
    assert document["oracle"]["source"].startswith("ASE EMT")
    lines = Path("out/steps.md").read_text().splitlines()
    assert len(lines) == 7 and lines[4].startswith("| initial structure | 2 | 2 | – |")
    assert "RelaxNet" in out and "out/steps.md" in out

    # What is there is kept, the rest is tried again; a line that was cut off is made anew.
    lines = Path("out/steps.jsonl").read_text().splitlines()
    assert len(lines) == 6
    Path("out/steps.jsonl").write_text("\n".join([*lines[:5], lines[5][:40]]))
    relaxed = []
    monkeypatch.setattr(
        steps, "descend", lambda atoms, *a: relaxed.append(str(atoms.symbols)) or descend(atoms, *a)
    )
    assert cli.main(argv) == 0
    assert sorted(set(relaxed)) == ["Cu4", "CuFeCu2"] and len(relaxed) == 4
    again = read_rows("out/steps.csv")
    same = ("structure", "start", "status", "steps", "energy")
    assert [[r[k] for k in same] for r in again] == [[r[k] for k in same] for r in rows]
    assert again[0]["seconds"] == rows[0]["seconds"] and again[6:8] != rows[6:8]


class Counting:
    """EMT's factory that counts."""

    def __init__(self):
        self.made = 0

    def __call__(self):
        self.made += 1
        return EMT()


def pairs():
    """Four copper atoms, and the same as two dimers far apart: a minimum of higher energy."""
    near = Atoms("Cu4", [[0, 0, 0], [2.4, 0, 0], [1.2, 2.1, 0], [1.2, 0.7, 1.9]])
    far = near.copy()
    far.positions[2:] += [0, 30, 0]
    far.positions[3] = far.positions[2] + [0, 0, 2.3]
    return near, far


def test_wrong_and_lower_minima(tmp_path):
    """A start that ends higher is a failure, one that ends lower is not, and both are told."""
    near, far = pairs()
    emt = load_oracle("emt", False)._replace(make=Counting())
    both = Kind("both", "other", "x", lambda cases: [
        Start((far if c.name == "near" else near).copy(), 0.5) for c in cases])  # fmt: skip
    none = Kind("none", "none", "x", lambda cases: [Start(None, 0.5, "why") for _ in cases])
    cases = [Case("near", near, False), Case("far", far, False)]
    ledger, limits = Ledger(tmp_path / "a" / "l.jsonl"), Limits(fmax=0.01)
    said = []
    rows = judged(run_steps(cases, emt, [both, none], limits, ledger, said.append), 0.01)
    results = {(r["structure"], r["start"]): r for r in rows}
    assert results["near", "both"]["result"] == "wrong minimum"
    assert results["far", "both"]["result"] == "lower minimum"
    difference = results["near", "both"]["energy_difference_per_atom"]
    assert difference > 0.01
    assert results["far", "both"]["energy_difference_per_atom"] == pytest.approx(-difference)
    labels = {"initial": "initial structure", "both": "other", "none": "none"}
    first, other, nothing = summaries(rows, labels)
    assert (first["n"], first["relaxed"]) == (2, 2)
    assert (other["n"], other["relaxed"], other["wrong_minimum"], other["lower_minimum"]) == (
        2, 1, 1, 1)  # fmt: skip
    assert other["wrong_minimum_rate"] == 0.5 and other["start_seconds"] == 0.5
    saved = 1 - results["far", "both"]["steps"] / results["far", "initial"]["steps"]
    assert other["saved_median"] == other["saved_mean"] == pytest.approx(saved)
    assert other["saved_with_failures"] == pytest.approx(saved / 2)
    assert (nothing["n"], nothing["relaxed"], nothing["saved_with_failures"]) == (2, 0, 0)
    assert nothing["saved_mean"] is None and "near, none: no start: why" in said
    wide = judged(rows, 10.0, 40.0)
    assert {r["result"] for r in wide} == {"same minimum", None}
    # All of it is kept, also for another process; other limits are another question.
    made, kept = emt.make.made, Ledger(tmp_path / "a" / "l.jsonl")
    assert made == 4 and len(kept) == 4
    assert judged(run_steps(cases, emt, [both, none], limits, kept), 0.01) == rows
    assert emt.make.made == made
    few = run_steps(cases[:1], emt, [both], Limits(fmax=0.01, max_steps=1), kept, said.append)
    assert [r["status"] for r in few] == ["not converged", "not converged"]
    assert emt.make.made == made + 2 and "after 2 steps" in said[-1]
    late = run_steps(cases, emt, [both], Limits(fmax=0.02, minutes=-1.0), kept)
    assert {r["status"] for r in late} == {"skipped"} and emt.make.made == made + 2
    # Another model, for which no time is left: nothing is known of it, least of all a failure.
    other = both._replace(key="later", identity="y")
    late = run_steps(cases, emt, [both, other], Limits(fmax=0.01, minutes=-1.0), kept)
    labels = {"initial": "initial structure", "both": "other", "later": "later"}
    assert [s["n"] for s in summaries(judged(late, 0.01), labels)] == [2, 2, 0]


def test_without_another_start_nothing_is_relaxed(tmp_path):
    """But with no other kind of start asked for, it is."""
    none = Kind("none", "none", "x", lambda cases: [Start(None, 0.5, "why") for _ in cases])
    emt, cases = load_oracle("emt", False), [Case("a", alloy(), False)]
    ledger = Ledger(tmp_path / "l.jsonl")
    first, _ = run_steps(cases, emt, [none], Limits(), ledger)
    assert first["status"] == "skipped" and "no other start" in first["remark"]
    # The only start there was has failed, and counts.
    good = Kind("none", "none", "y", lambda cases: [Start(c.atoms.copy(), 0.5, "") for c in cases])
    rows = run_steps(cases, emt, [none], Limits(), ledger)
    rows += run_steps([Case("b", alloy(), False)], emt, [good], Limits(), ledger)
    initial, own = summaries(judged(rows, 0.01), {"initial": "initial", "none": "none"})
    assert (initial["n"], own["n"], own["relaxed"]) == (1, 2, 1)
    assert own["saved_with_failures"] == own["saved_mean"] == 0.0
    (only,) = run_steps(cases, emt, [], Limits(), ledger)
    assert only["status"] == "converged"


def test_cells_relax_in_their_periodic_directions():
    """From a strained one a bulk crystal finds its cell again; a slab keeps its vacuum."""
    emt = load_oracle("emt", True)
    strained, cubic = bulk("Cu", cubic=True), bulk("Cu", cubic=True)
    descend(cubic, emt, 0.01, 100, True)
    strained.set_cell(1.03 * strained.cell.array, scale_atoms=True)
    leg = descend(strained, emt, 0.01, 100, True)
    assert leg.converged and leg.energy == pytest.approx(cubic.get_potential_energy(), abs=1e-3)
    slab = fcc111("Cu", (1, 1, 3), a=3.7, vacuum=5.0)
    before = slab.cell.array.copy()
    descend(slab, emt, 0.02, 100, True)
    assert np.abs(slab.cell.array - before)[:2, :2].max() > 0.02
    np.testing.assert_allclose(slab.cell.array[2], before[2], atol=1e-9)
    np.testing.assert_array_equal(strain_mask(bulk("Cu")), np.ones((3, 3)))
    slab.rotate(30, "x", rotate_cell=True)
    with pytest.raises(InputError, match="not along x, y or z"):
        strain_mask(slab)


def test_a_calculators_relaxation_as_start():
    """The same calculator leaves its own relaxation nothing to do."""
    emt, limits = load_oracle("emt", False), (0.05, 100)
    case = Case("a", alloy(), False)
    kind = starts.relaxed_start(emt, *limits)
    (start,) = kind.find([case])
    assert descend(start.atoms.copy(), emt, *limits, False).steps == 1 and start.seconds > 0
    assert not start.remark and start.atoms.calc is None
    (short,) = starts.relaxed_start(emt, 0.05, 1).find([case])
    assert "not converged" in short.remark
    (none,) = kind.find([Case("b", alloy("Fe"), False)])
    assert none.atoms is None and "does not know Fe" in none.remark


def relaxation(name, scale=1.0):
    atoms = alloy()
    return RelaxationTrajectory(
        id=name,
        atomic_numbers=atoms.numbers,
        positions=np.stack([atoms.positions, atoms.positions + 0.01]),
        cells=np.stack([atoms.cell.array, scale * atoms.cell.array]),
        pbc=atoms.pbc,
        energies=np.array([0.0, -0.1]),
        forces=np.zeros((2, 4, 3)),
        fixed_mask=np.array([True, False, False, False]),
    )


def test_shaken_starts():
    """Atoms moved by noise of that width, the same for a structure of the same name; held ones stay."""
    slab = fcc111("Cu", (3, 3, 4), vacuum=6.0)
    slab.set_constraint(FixAtoms(range(9)))
    cases = [Case("a", slab, False), Case("b", slab, False)]
    one, other = (s.atoms for s in starts.shaken_start(0.05).find(cases))
    (again,) = (s.atoms for s in starts.shaken_start(0.05).find(cases[:1]))
    np.testing.assert_array_equal(one.positions, again.positions)
    moved = one.positions - slab.positions
    assert not moved[:9].any() and moved[9:].std() == pytest.approx(0.05, rel=0.25)
    assert np.abs(one.positions - other.positions).max() > 0.05
    assert len(one.constraints) == 1


def test_only_unseen_structures(tmp_path):
    """Those in the test split of every model; the first frames, with what is held."""
    store = tmp_path / "set.h5"
    write_store(store, [relaxation(n, 1.02 if n == "d" else 1.0) for n in "abcde"])
    runs = {"one": ("a", "b", "cde"), "two": ("ab", "c", "de"), "other": ("x", "y", "z"), "tuned": "pqr"}
    for run, splits in runs.items():
        (tmp_path / run / "model").mkdir(parents=True)
        # The last is one on other data, but begun with the second.
        begun = {"train.start_from": str(tmp_path / "two")} if run == "tuned" else {}
        (tmp_path / run / "model/config.json").write_text(to_json(load_config("explicit.py", begun)))
        facts = {"sha256": run, "statistics": {"started_from": "two"} if begun else {}}
        (tmp_path / run / "model/model.json").write_text(json.dumps(facts))
        named = dict(zip(("train", "validation", "test"), map(list, splits)))
        (tmp_path / run / "splits.json").write_text(json.dumps(named))

    def names(*given, limit=None):
        said = []
        found, failed = find_cases(
            [str(store)], [str(tmp_path / run) for run in given], True, limit, said.append
        )
        assert not failed
        return "".join(case.name for case in found), found, " ".join(said)

    assert names()[0] == "abcde"
    assert names("one")[0] == names("one/model")[0] == "cde"
    kept, _, said = names("tuned")
    assert kept == "cde" and "2 of" in said and "other data" not in said
    kept, found, said = names("one", "two", "other")
    assert kept == "de" and "other data" in said
    assert [case.relax_cell for case in found] == [True, False]
    np.testing.assert_array_equal(found[0].atoms.positions, relaxation("d").positions[0])
    assert found[0].atoms.constraints[0].index.tolist() == [0] and found[0].atoms.calc is None
    few = names(limit=2)[0]
    assert len(few) == 2 and set(few) < set(names(limit=4)[0])
    (tmp_path / "one" / "splits.json").write_text("{}")
    with pytest.raises(InputError, match=r"splits\.json: damaged"):
        names("one")
    (tmp_path / "two" / "splits.json").write_text('{"train": ["a"], "validation": [], "test": []}')
    with pytest.raises(InputError, match="test split of all models"):
        names("two")
    (tmp_path / "two" / "splits.json").unlink()
    assert "training data unknown" in names("two")[2]
    assert not cases_module._is_store(str(tmp_path / "one")) and cases_module._is_store(
        str(tmp_path)
    )


def test_keys_depend_on_every_bit():
    facts = {"x": np.array([1.0, 2.0]), "y": ("a", 1)}
    other = {"x": np.nextafter(facts["x"], 9), "y": ("a", 1)}
    assert fingerprint(facts) == fingerprint(dict(reversed(facts.items()))) != fingerprint(other)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--oracle", "dft"], ["--oracle dft", "emt, chgnet, gpaw or MODULE:FACTORY"]),
        (["--oracle", "emt", "--cutoff", "500"], ["--cutoff 500", "gpaw"]),
        (["--oracle", "emt", "--fmax", "0"], ["--fmax 0", "positive"]),
        (["--oracle", "emt", "--max-steps", "0"], ["--max-steps 0"]),
        (["--oracle", "emt", "--model", "absent"], ["absent", "no such folder"]),
        (["--oracle", "chgnet", "--chgnet"], ["--chgnet", "already"]),
        (["--oracle", "emt"], ["no structure", "absent.cif"]),
    ],
)
def test_bad_arguments(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["benchmark", "steps", "--structures", "absent.cif", *argv]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in err for word in words), err
    assert not Path("benchmark").exists()


def test_a_path_cannot_be_minimised(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--oracle", "emt", "--structures", "a.cif", "--egnn", str(folders["model"])]
    assert cli.main(["benchmark", "steps", *argv]) == 2
    assert "cannot be minimised" in capsys.readouterr().err


def test_gpaw_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "gpaw", None)
    with pytest.raises(InputError, match="bin/setup_gpaw"):
        load_oracle("gpaw", False)


@pytest.mark.heavy
def test_gpaw():
    """Two atoms, where GPAW is installed: forces that are the energy's, and the settings asked for."""
    pytest.importorskip("gpaw", reason="GPAW is not installed (bin/setup_gpaw)")
    oracle = load_oracle("gpaw", True, 300.0, 1.0)
    assert "300 eV, 1 k-points" in oracle.version
    atoms = bulk("MgO", "rocksalt", a=4.25)
    atoms.positions[1] += [0.1, 0, 0]
    atoms.calc = oracle.make()
    force = atoms.get_forces()[1, 0]
    energies = []
    for step in (-0.02, 0.02):
        moved = atoms.copy()
        moved.positions[1, 0] += step
        moved.calc = atoms.calc
        energies.append(moved.get_potential_energy(force_consistent=True))
    assert force < -0.5
    assert -(energies[1] - energies[0]) / 0.04 == pytest.approx(force, abs=0.03)
    for option in ({"cutoff": -1.0}, {"density": -1.0}):
        with pytest.raises(InputError, match="must be positive"):
            load_oracle("gpaw", True, **option)
