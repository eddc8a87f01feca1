"""Relaxations that make no physical sense are found, and sound ones are not."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS

from relaxnet_jax.cli import main
from relaxnet_jax.data import (
    RelaxationTrajectory,
    SkippedRelaxation,
    TrajectoryStore,
    import_files,
    read_relaxations,
    write_store,
)
from relaxnet_jax.data.quality.checks import (
    REASONS,
    Limits,
    check_relaxation,
    check_store,
    report_lines,
    write_clean,
)
from relaxnet_jax.data.quality.work import cell_jumps, displacements, step_works
from relaxnet_jax.data.shards import write_shards
from relaxnet_jax.errors import InputError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def relaxation(seed=0, cell=False, name="a", symbols="Cu3Au", fixed=()):
    """A rattled alloy relaxed with EMT, every step kept."""
    rng = np.random.default_rng(seed)
    atoms = bulk("Cu", cubic=True, a=3.8)
    atoms.symbols = symbols
    atoms.rattle(0.15, rng=rng)
    if cell:
        atoms.set_cell(atoms.cell @ (np.eye(3) + 0.03 * rng.normal(size=(3, 3))), True)
    atoms.calc = EMT()
    frames = []

    def keep():
        frames.append(
            (atoms.positions.copy(), atoms.cell.array.copy(), atoms.get_potential_energy(),
             atoms.get_forces(apply_constraint=False), atoms.get_stress())
        )  # fmt: skip

    optimiser = BFGS(FrechetCellFilter(atoms) if cell else atoms, logfile=None, maxstep=0.1)
    optimiser.attach(keep)
    optimiser.run(fmax=0.02, steps=60)
    x, cells, e, f, s = (np.array(v) for v in zip(*frames))
    mask = np.zeros(len(atoms), bool)
    mask[list(fixed)] = True
    return RelaxationTrajectory(
        id=name, atomic_numbers=atoms.numbers, positions=x, cells=cells, pbc=atoms.pbc,
        energies=e, forces=f, stresses=s, fixed_mask=mask, source="EMT",
    )  # fmt: skip


GOOD = relaxation()


def changed(t=GOOD, **fields):
    return dataclasses.replace(t, **fields)


def energies(k, by, t=GOOD):
    """``t`` with energies raised by ``by`` from the frames ``k`` on."""
    e = t.energies.copy()
    e[k] += by
    return changed(t, energies=e)


def reasons(t, **limits):
    return [f.reason for f in check_relaxation(t, Limits(**limits))]


@pytest.mark.parametrize("cell", [False, True])
def test_work_is_the_energy_change(cell):
    t = relaxation(1, cell)
    assert t.variable_cell == cell
    works = step_works(t)
    change = np.diff(t.energies)
    # Trapezoid: the error is of third order, so far below the difference of its two ends.
    ends = np.abs(works[0] - works[1])
    assert ends.max() > 0.05
    assert np.all(np.abs(change + works.mean(0)) < 0.1 * ends + 1e-4)
    assert np.abs(change + works[0]).max() > 0.02
    assert reasons(t) == []


def test_stress_counts_in_a_variable_cell():
    t = relaxation(1, cell=True)
    assert step_works(changed(t, stresses=None)) is None
    assert "work" in reasons(changed(t, stresses=-t.stresses))


def test_numbers_of_findings(tmp_path):
    bad = energies(slice(3, None), -0.5)
    (one,) = check_relaxation(bad, Limits())
    assert (one.reason, one.id, one.frame) == ("discontinuity", "a", 3)
    work = step_works(bad)[:, 2]
    np.testing.assert_allclose(one.value, (bad.energies[3] - bad.energies[2] + work.mean()) / 4)
    np.testing.assert_allclose(one.bound, 2e-3 + 0.25 * np.abs(work).sum() / 4)
    assert abs(one.value + 0.125) < 0.005


def test_kinds_of_contradiction():
    n = GOOD.n_frames
    assert n > 6
    assert reasons(energies(3, 0.3)) == ["outlier"]
    assert reasons(energies(slice(3, None), -0.3)) == ["discontinuity"]
    assert reasons(energies(slice(3, None), -0.3, energies(slice(5, None), -0.3))) == ["work"] * 2
    late = np.append(GOOD.energies[1:], GOOD.energies[-1])
    early = np.insert(GOOD.energies[:-1], 0, GOOD.energies[0] + 0.5)
    for moved, place in ((late, "previous"), (early, "next")):
        (one,) = check_relaxation(changed(energies=moved), Limits())
        assert one.reason == "shifted" and f"{place} frame agree" in one.text


def test_order():
    back = slice(None, None, -1)
    fields = {k: getattr(GOOD, k)[back] for k in ("positions", "energies", "forces", "stresses")}
    # Honest frames in another order agree with their forces all the same.
    assert reasons(changed(**fields), converged=9) == ["rising"]
    order = [0, 1, GOOD.n_frames - 1, *range(2, GOOD.n_frames - 1)]
    order[-1], order[2] = 1, order[-1]
    fields = {k: v[order] for k, v in ((k, getattr(GOOD, k)) for k in fields)}
    assert "order" in reasons(changed(**fields), converged=9)


def test_bounds():
    f = GOOD.forces.copy()
    f[0, 2] = [0, 60.0, 80.0]
    (one,) = [x for x in check_relaxation(changed(forces=f), Limits()) if x.reason == "force"]
    assert (one.frame, one.atom, one.value, one.bound) == (0, 2, 100.0, 50.0)
    assert "force" not in reasons(changed(forces=f), max_force=101)
    mask = np.array([False, False, True, False])
    assert "force" not in reasons(changed(forces=f, fixed_mask=mask))
    assert reasons(changed(), converged=1e-4) == ["unconverged"]
    assert "energy-change" in reasons(energies(0, 9.0))
    assert "energy-change" not in reasons(energies(0, 7.0))
    with pytest.raises(InputError, match=r"--max-force nan: give a number above 0"):
        Limits(max_force=np.nan)


def test_positive_energy():
    """JVASP-42538 of the JARVIS database: +40,076 eV for 12 atoms."""
    (one,) = check_relaxation(energies(slice(None), 40000.0), Limits())
    assert one.reason == "energy" and one.value > 9999 and "positive" in one.text


def test_jump():
    x = GOOD.positions.copy()
    x[4:, 1] += GOOD.cells[0, 0] + GOOD.cells[0, 2]
    found = cell_jumps(changed(positions=x))
    assert [(frame, atom) for frame, atom, _, _ in found] == [(4, 1)]
    np.testing.assert_allclose(found[0][3], 1.9)
    assert "jump" in reasons(changed(positions=x))
    x = GOOD.positions.copy()
    x[4:] += [2.5, 0, 0]  # all of them: a drift
    assert cell_jumps(changed(positions=x)) == []
    x[4:, 0] += [0, 2.4, 0]
    assert [found[1] for found in cell_jumps(changed(positions=x))] == [0]
    pair = {"atomic_numbers": GOOD.atomic_numbers[:2], "fixed_mask": GOOD.fixed_mask[:2]}
    pair |= {"forces": GOOD.forces[:, :2], "positions": x[:, :2]}
    assert len(cell_jumps(changed(**pair))) == 1
    assert cell_jumps(changed(positions=x, pbc=np.zeros(3, bool))) == []


def test_displacements_without_drift_and_strain():
    x = GOOD.positions + np.linspace(0, 1, GOOD.n_frames)[:, None, None]
    ends = np.array([0]), np.array([GOOD.n_frames - 1])
    plain = displacements(GOOD, *ends)
    np.testing.assert_allclose(displacements(changed(positions=x), *ends), plain, atol=1e-12)
    pinned = changed(positions=x, fixed_mask=np.array([True, False, False, False]))
    np.testing.assert_allclose(displacements(pinned, *ends)[0], x[-1] - x[0])
    strained = np.array(GOOD.cells)
    strained[-1] *= 1.1
    x = np.repeat(GOOD.positions[:1], GOOD.n_frames, axis=0)
    x[-1] *= 1.1
    still = displacements(changed(positions=x, cells=strained), *ends)
    np.testing.assert_allclose(still, 0, atol=1e-12)


def family(n=40):
    """Short relaxations of alloys whose energies are those of their elements, nearly."""
    rng = np.random.default_rng(3)
    for k in range(n):
        symbols = rng.choice(["Cu", "Au", "Ag"], size=4)
        t = dataclasses.replace(GOOD, id=f"r{k}", atomic_numbers=Atoms(symbols).numbers)
        own = {29: -3.0, 79: -300.0, 47: -40.0}
        total = sum(own[z] for z in t.atomic_numbers) + 0.1 * rng.normal()
        yield dataclasses.replace(t, energies=t.energies - t.energies[-1] + total)


def checked(path, trajectories, **limits):
    write_store(path, trajectories)
    with TrajectoryStore(path) as store:
        return check_store(store, Limits(**limits))


def test_energy_out_of_family(tmp_path):
    all_of_them = list(family())
    assert checked(tmp_path / "a.h5", all_of_them).findings == []
    for k, by in ((5, 8.0), (11, -4.0), (30, -16000.0)):
        t = all_of_them[k]
        all_of_them[k] = dataclasses.replace(t, energies=t.energies + by)
    report = checked(tmp_path / "b.h5", all_of_them)
    assert [(f.reason, f.id) for f in report.findings] == [
        ("energy", "r5"), ("energy", "r11"), ("energy", "r30"),
    ]  # fmt: skip
    np.testing.assert_allclose([f.value for f in report.findings], [2, -1, -4000], atol=0.06)
    assert report.energy_unjudged == 0 and report.counts()["energy"] == 3


def test_energies_are_compared_within_a_source_only(tmp_path):
    here = list(family())
    there = [
        dataclasses.replace(t, id=f"other {t.id}", source="other", energies=t.energies - 900)
        for t in family()
    ]
    few = [dataclasses.replace(t, id=f"few {t.id}", source="few") for t in here[:4]]
    lone = dataclasses.replace(here[0], id="lone", atomic_numbers=np.array([29, 29, 29, 13]))
    report = checked(tmp_path / "a.h5", [*here, *there, *few, lone])
    assert report.findings == []
    # Four relaxations do not tell three elements; nor does one tell aluminium's energy.
    assert report.energy_unjudged == 5
    assert "5 relaxations have no composition energy" in report_lines(report)[-1]


def test_charges(tmp_path):
    rng = np.random.default_rng(4)
    charged = []
    for k, t in enumerate(family(20)):
        q = np.where(t.atomic_numbers == 79, -0.8, 0.3) + 0.02 * rng.normal(size=4)
        q[2] += 3.0 * (k == 7)
        charged.append(dataclasses.replace(t, charges=q))
    (one,) = checked(tmp_path / "a.h5", charged).findings
    assert (one.reason, one.id, one.frame, one.atom) == ("charge", "r7", None, 2)
    assert abs(one.value - 3.0) < 0.1 and one.bound == 0.5


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "set.h5"
    items = list(family(12))
    items[2] = energies(3, 0.3, items[2])
    items[4] = changed(items[4], forces=1e4 * items[4].forces)
    write_store(path, items, metadata={"files": ["x"]})
    return path


def test_command(store, capsys):
    assert main(["data", "check", str(store)]) == 0
    text = capsys.readouterr().out
    assert "12 relaxations checked, 2 with findings" in text
    assert "outlier             1  8.3 %" in text and "r2, frame 3: energy" in text
    assert main(["data", "check", str(store), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["counts"]["force"] == 1 and result["flagged"] == 2
    assert set(result["counts"]) == set(REASONS)
    assert {f["id"] for f in result["findings"]} == {"r2", "r4"}
    assert result["limits"]["max_force"] == 50


def test_dropping(store, tmp_path, capsys):
    clean = tmp_path / "clean.h5"
    command = ["data", "check", str(store), "--out", str(clean), "--drop"]
    assert main([*command, "outlier", "jump"]) == 0
    assert "11 relaxations written, 1 dropped for outlier, jump" in capsys.readouterr().out
    with TrajectoryStore(clean) as kept, TrajectoryStore(store) as whole:
        assert kept.ids == [f"r{k}" for k in range(12) if k != 2]
        np.testing.assert_array_equal(kept[2].forces, whole[3].forces)
        assert kept.metadata == {
            "files": ["x"], "dropped": {"relaxations": 1, "reasons": {"outlier": 1}},
        }  # fmt: skip
    before = clean.read_bytes()
    assert main([*command, "all", "--json"]) == 2
    assert "clean.h5: exists; give another --out, or --overwrite" in capsys.readouterr().err
    assert clean.read_bytes() == before
    assert main([*command, "all", "--json", "--overwrite"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["written"], result["dropped"]) == (10, 2)
    with TrajectoryStore(clean) as kept:
        assert check_store(kept, Limits()).findings == []


def test_dropping_from_a_sharded_set(store, tmp_path, capsys):
    """What is written is complete, as one file and as shards again."""
    with TrajectoryStore(store) as whole:
        write_shards(tmp_path / "set", [whole[i] for i in range(12)], 5, metadata={"files": ["x"]})
    for name in ("clean.h5", "clean"):
        command = ["data", "check", str(tmp_path / "set"), "--drop", "all", "--out"]
        assert main([*command, str(tmp_path / name)]) == 0
        assert "10 relaxations written, 2 dropped for all" in capsys.readouterr().out
        with TrajectoryStore(tmp_path / name) as kept:
            assert len(kept) == 10 and not kept.incomplete
            assert kept.metadata["files"] == ["x"]
            assert kept.metadata["dropped"]["relaxations"] == 2
    assert [p.name for p in (tmp_path / "clean").iterdir()] == ["shard-00000.h5"]
    for name in ("clean", "set"):
        assert main([*command, str(tmp_path / name)]) == 2
        assert f"{name}: exists; give another --out" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "set"), "--overwrite"]) == 2
    assert "set: is also read: choose another output path" in capsys.readouterr().err
    with TrajectoryStore(tmp_path / "set") as whole:
        assert len(whole) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--drop", "all"], "--drop: also give --out"),
        (["--out", "c.h5"], "--out: also give --drop"),
        (["--out", "c.h5", "--drop", "ugly"], "--drop ugly: no such reason: use all, or some of"),
        (["--out", "c.h5", "--drop", "all", "--max-force", "1e-9"], "every relaxation would be"),
        (["--out", "set.h5", "--drop", "all"], "set.h5: exists; give another --out"),
        (["--out", "set.h5", "--drop", "all", "--overwrite"], "set.h5: is also read"),
        (["--overwrite"], "--overwrite: also give --out"),
        (["--max-force", "-1"], "--max-force -1.0: give a number above 0"),
    ],
)
def test_bad_input(store, arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(store.parent)
    before = store.read_bytes()
    assert main(["data", "check", "set.h5", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert [p.name for p in store.parent.iterdir()] == ["set.h5"]
    assert store.read_bytes() == before


def test_unknown_reason_from_python(store, tmp_path):
    with TrajectoryStore(store) as opened:
        report = check_store(opened, Limits())
        with pytest.raises(InputError, match="--drop typo: no such reason"):
            write_clean(opened, report, ["typo"], tmp_path / "c.h5")


@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not here")
def test_real_relaxations_pass_mostly(tmp_path):
    import_files(DATA / "dft_adsorbates.extxyz", tmp_path / "a.h5")
    with TrajectoryStore(tmp_path / "a.h5") as store:
        report = check_store(store, Limits())
    counts = {reason: n for reason, n in report.counts().items() if n}
    assert counts == {"outlier": 4, "discontinuity": 1, "unconverged": 6}
    assert (report.steps_inconsistent, report.steps) == (9, 11056)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not here")
def test_absurd_energy_is_skipped_by_the_import(tmp_path):
    """A single ionic step is no relaxation, whatever its energy."""
    path = DATA / "vasp" / "JVASP-42538.vasprun.xml.gz"
    with pytest.raises(InputError, match="a single ionic step"):
        assert not [x for x in read_relaxations(path) if not isinstance(x, SkippedRelaxation)]
