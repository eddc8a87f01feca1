"""Training data made by relaxing structures."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase.build import bulk, fcc111, molecule
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms, FixBondLength
from ase.neighborlist import neighbor_list

from relaxnet_jax import cli
from relaxnet_jax.data import TrajectoryStore
from relaxnet_jax.data.generation import (
    Settings,
    generate_set,
    load_calculator,
    making,
    mineral_prototypes,
    read_parents,
)
from relaxnet_jax.data.generation.elements import family_formula, group_of, substituted
from relaxnet_jax.data.generation.parents import sift
from relaxnet_jax.data.generation.relaxing import relax
from relaxnet_jax.data.generation.start import draw_start, too_close
from relaxnet_jax.data.store_write import write_store
from relaxnet_jax.errors import InputError


def alloy(symbols="Cu3Au", a=3.8):
    atoms = bulk("Cu", "fcc", a=a, cubic=True)
    atoms.symbols = symbols
    return atoms


@pytest.fixture(scope="module")
def alloys(tmp_path_factory):
    """Three alloys in one file."""
    path = tmp_path_factory.mktemp("structures") / "alloys.extxyz"
    ase.io.write(path, [alloy(), alloy("AgPd3", 3.95), alloy("Ni2Al2", 3.8)])
    return str(path)


def make(structures, out, n=4, jobs=1, report=None, **settings):
    settings = Settings(**({"calculator": "emt"} | settings))
    given = [str(structures)] if isinstance(structures, str | os.PathLike) else structures
    return generate_set(given, n, out, settings, jobs=jobs, report=report)


def stored(path):
    with TrajectoryStore(path) as store:
        store.verify()
        return list(store)


@pytest.fixture(scope="module")
def made(alloys, tmp_path_factory):
    """(the relaxations, the report, the store) of ten small EMT relaxations."""
    path = tmp_path_factory.mktemp("made") / "set.h5"
    return (report := make(alloys, path, 10, substitute=0.5)) and (stored(path), report, path)


def test_every_step_has_its_own_labels(made):
    relaxations, report, path = made
    assert report.made == len(relaxations) == 10 and not report.lost
    assert report.frames == sum(t.n_frames for t in relaxations)
    assert not path.with_name("set.h5.parts").exists()
    for traj in relaxations:
        assert traj.source == "ASE EMT (not DFT)"
        assert traj.fmax[-1] < 0.03 < traj.fmax[0] and not traj.variable_cell
        assert traj.energies[-1] < traj.energies[0]
        for k in {0, 1, traj.n_frames - 1}:
            atoms = traj.atoms(k)
            atoms.calc = EMT()
            np.testing.assert_allclose(traj.energies[k], atoms.get_potential_energy(), atol=1e-9)
            np.testing.assert_allclose(traj.forces[k], atoms.get_forces(), atol=1e-9)
            np.testing.assert_allclose(traj.stresses[k], atoms.get_stress(), atol=1e-9)


def test_each_depends_on_seed_and_index_only(made, alloys, tmp_path):
    make(alloys, tmp_path / "a.h5", 3, substitute=0.5)
    for one, other in zip(stored(tmp_path / "a.h5"), made[0]):
        assert one.id == other.id
        np.testing.assert_array_equal(one.positions, other.positions)
        np.testing.assert_array_equal(one.energies, other.energies)
    make(alloys, tmp_path / "b.h5", 1, substitute=0.5, seed=1)
    assert stored(tmp_path / "b.h5")[0].energies[0] not in [t.energies[0] for t in made[0]]


def test_two_jobs_write_the_same_bytes(made, alloys, tmp_path):
    make(alloys, tmp_path / "set.h5", 10, jobs=2, substitute=0.5)
    assert (tmp_path / "set.h5").read_bytes() == made[2].read_bytes()


def test_every_parent_has_its_turn(made):
    parents = [t.id.split("-", 3)[3] for t in made[0]]
    for start in (0, 3, 6):
        assert {f"alloys-{k}" for k in range(3)} == set(parents[start : start + 3])


def test_a_killed_run_goes_on(alloys, tmp_path):
    """SIGKILL after the first part; the rest, and no more, is made by the next call."""
    slow = tmp_path / "slow_emt.py"
    slow.write_text(
        textwrap.dedent("""
        import pathlib, time
        from ase.calculators.emt import EMT
        def factory():
            here = pathlib.Path(__file__).parent
            with (here / "calls").open("a") as file:
                file.write("x")
            if (here / "slowly").exists():
                time.sleep(0.1)
            return EMT()
        """)
    )
    out = tmp_path / "set.h5"
    argv = ["data", "generate", "--calculator", "slow_emt:factory", "--structures", alloys]
    argv += ["--n", "12", "--jobs", "1", "--out"]
    (tmp_path / "slowly").touch()
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = [sys.executable, "-m", "relaxnet_jax.cli", *argv]
    parts = tmp_path / "set.h5.parts"
    process = subprocess.Popen([*run, str(out)], cwd=tmp_path, env=environment)
    limit = time.monotonic() + 60
    while not list(parts.glob("part-*.h5")) and time.monotonic() < limit:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    assert len(list(parts.glob("part-*.h5"))) == 1

    def calls(target):
        (tmp_path / "calls").write_text("")
        subprocess.run([*run, str(target)], cwd=tmp_path, env=environment, check=True)
        return len((tmp_path / "calls").read_text())

    (tmp_path / "slowly").unlink()
    resumed = calls(out)
    whole = calls(tmp_path / "whole.h5")
    assert out.read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert resumed <= whole - making.CHUNK
    assert not parts.exists() and not list(tmp_path.glob(".set.*"))  # of the killed process


def test_relaxed_cells(alloys, tmp_path):
    make(alloys, tmp_path / "a.h5", 3, relax_cell=True, strain=0.04, optimizer="fire")
    for traj in stored(tmp_path / "a.h5"):
        assert traj.variable_cell
        assert np.abs(traj.stresses[-1]).max() < 0.2 * np.abs(traj.stresses[0]).max()
        k = traj.n_frames // 2
        atoms = traj.atoms(k)
        atoms.calc = EMT()
        # The atoms' own forces, not the filter's, in the frame's own cell.
        np.testing.assert_allclose(traj.forces[k], atoms.get_forces(), atol=1e-9)
        np.testing.assert_allclose(traj.stresses[k], atoms.get_stress(), atol=1e-9)


def test_substitution_stays_in_the_group():
    rng = np.random.default_rng(0)
    numbers = np.array([11, 11, 19, 17, 17, 17, 1, 92])
    seen = set()
    for _ in range(200):
        new = substituted(numbers, 0.7, None, rng)
        assert all(group_of(a) == group_of(b) for a, b in zip(numbers, new))
        # All atoms of an element together, and never two elements into one.
        assert len(set(zip(numbers, new))) == len(set(numbers.tolist())) == len(set(new.tolist()))
        assert new[-1] == 92 and new[-2] == 1
        assert family_formula(new) == family_formula(numbers)
        seen |= {int(z) for z in new}
    assert seen == {3, 11, 19, 37, 55, 9, 17, 35, 53, 1, 92}
    only = substituted(np.array([29, 28]), 1.0, {29, 47, 28}, rng)
    assert only.tolist() == [47, 28]
    np.testing.assert_array_equal(substituted(numbers, 0.0, None, rng), numbers)


def test_f_elements_stand_in_for_each_other():
    rng = np.random.default_rng(0)
    numbers = np.array([39, 92, 72, 8])
    seen = set()
    for _ in range(300):
        new = substituted(numbers, 0.7, None, rng, f_elements=True)
        assert family_formula(new, True) == family_formula(numbers, True)
        seen |= {int(z) for z in new}
    # Hafnium is of titanium's group, whichever elements come before it in the table.
    assert seen == {21, 39, *range(57, 72), *range(89, 95), 22, 40, 72, 8, 16, 34, 52}
    cerium = alloy()
    cerium.numbers[:] = 58
    cerium.set_cell(1.5 * cerium.cell.array, scale_atoms=True)
    starts = [
        draw_start(
            cerium,
            Settings("emt", substitute=1.0, f_elements=f_elements),
            None,
            np.random.default_rng(0),
        )
        for f_elements in (False, True)
    ]
    assert set(starts[0].numbers) == {58} and 58 not in starts[1].numbers
    with pytest.raises(InputError, match="--f-elements: nothing is replaced: give --substitute"):
        Settings("emt", f_elements=True).check()


def test_start():
    """Volume follows the radii; fixed atoms stay; the noise is that asked for."""
    salt = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
    still = Settings("emt", rattle=(0, 0), strain=0, substitute=1.0)
    start = draw_start(salt, still, {3, 9, 11, 17}, np.random.default_rng(0))
    assert set(start.symbols) == {"Li", "F"}
    # (1.28 + 0.57) / (1.66 + 1.02), the covalent radii; the experiment says 4.03 Å.
    np.testing.assert_allclose(start.cell.lengths(), 5.64 * 1.85 / 2.68)
    np.testing.assert_allclose(start.get_scaled_positions(), salt.get_scaled_positions())
    rattled = Settings("emt", rattle=(0.1, 0.1), strain=0, supercell=(4, 4, 4))
    big = draw_start(salt, rattled, None, np.random.default_rng(0))
    assert len(big) == 64 * 8
    assert abs(np.std(big.positions - salt.repeat(4).positions) - 0.1) < 0.005
    strained = draw_start(salt, Settings("emt", strain=0.1), None, np.random.default_rng(0))
    change = np.linalg.solve(salt.cell.array, strained.cell.array) - np.eye(3)
    np.testing.assert_allclose(change, change.T, atol=1e-12)
    assert 0.01 < np.abs(change).max() <= 0.1
    salt.set_constraint(FixAtoms([0, 5]))
    fixed = draw_start(salt, Settings("emt", strain=0), None, np.random.default_rng(0))
    moved = np.linalg.norm(fixed.positions - salt.positions, axis=1)
    assert np.all((moved == 0) == [k in (0, 5) for k in range(8)])


def test_starts_with_close_atoms_are_drawn_again():
    squeezed = alloy(a=3.0)  # 2.12 Å between neighbours of 2.64 and 2.68 Å: 0.79
    still = Settings("emt", rattle=(0.01, 0.01), strain=0)
    assert draw_start(squeezed, still, None, np.random.default_rng(0)) is not None
    wild = dataclasses.replace(still, rattle=(0.12, 0.12))
    starts = [draw_start(squeezed, wild, None, np.random.default_rng(k)) for k in range(10)]
    assert not any(too_close(s, 0.7) for s in starts if s is not None)
    assert draw_start(alloy(a=2.5), still, None, np.random.default_rng(0)) is None


def test_prototypes():
    parents = mineral_prototypes()
    assert len(parents) > 1000
    by_group = {}
    for parent in parents:
        by_group.setdefault(parent.group, set()).add(parent.atoms.get_chemical_formula())
    # Rock salt, whichever atom is at the origin.
    assert {"MgO", "ClNa"} & by_group["AB_225_8"]
    assert {"Cu", "Pd", "Au"} <= by_group["A_225_4"]
    (halite,) = [p for p in parents if p.name == "JVASP-23862"][:1] or [None]
    if halite is not None:
        assert halite.atoms.get_chemical_formula() == "ClNa"


def test_prototype_is_the_group(tmp_path):
    report = make(["prototypes"], tmp_path / "a.h5", 6, substitute=0.5, max_atoms=8)
    assert len(report.refused) > 1000
    assert ("JVASP-113", "elements unknown to emt: O, Zr") in report.refused
    groups = {p.name: p.group for p in mineral_prototypes()}
    for traj in stored(tmp_path / "a.h5"):
        assert traj.group == groups[traj.id.split("-", 3)[3]]
    make(["prototypes"], tmp_path / "b.h5", 2, max_atoms=8, group_by="formula")
    assert all(t.group == t.formula for t in stored(tmp_path / "b.h5"))


def test_groups_of_files(made, tmp_path):
    """Without names: the formula that all substitutions of a parent share."""
    groups = {t.id.split("-", 3)[3]: t.group for t in made[0]}
    assert groups == {
        "alloys-0": family_formula(alloy().numbers),
        "alloys-1": family_formula(alloy("AgPd3").numbers),
        "alloys-2": family_formula(alloy("Ni2Al2").numbers),
    }
    assert len({t.formula for t in made[0]}) > 3
    assert all(family_formula(t.atomic_numbers) == t.group for t in made[0])
    named = alloy()
    named.info["parent"] = "mine"
    ase.io.write(tmp_path / "named.extxyz", [named, alloy("AgPd3")])
    make(tmp_path / "named.extxyz", tmp_path / "a.h5", 2)
    assert {t.group for t in stored(tmp_path / "a.h5")} == {"mine", "AgPd3"}


def test_refused_by_name(tmp_path, capsys):
    slab = fcc111("Cu", (1, 1, 3), vacuum=6)
    slab.set_constraint(FixAtoms([0]))
    bonded = alloy()
    bonded.set_constraint(FixBondLength(0, 1))
    lone = bulk("Cu")
    oxide = bulk("MgO", "rocksalt", a=4.2)
    ase.io.write(tmp_path / "a.traj", [alloy(), oxide, bonded, lone, slab, alloy() * (4, 4, 1)])
    said = []
    report = make(tmp_path / "a.traj", tmp_path / "a.h5", 2, report=said.append)
    reasons = dict(report.refused)
    assert set(reasons) == {"a-1", "a-2", "a-3", "a-5"} and report.made == 2
    assert reasons["a-1"] == "elements unknown to emt: O, Mg"
    assert "FixBondLength" in reasons["a-2"] and "one atom" in reasons["a-3"]
    assert reasons["a-5"] == "more than 40 atoms: raise --max-atoms"
    assert "refused a-1: elements unknown to emt: O, Mg" in said
    (surface,) = [t for t in stored(tmp_path / "a.h5") if t.id.endswith("a-4")]
    assert surface.fixed_mask.tolist() == [True, False, False]
    assert np.all(surface.positions[:, 0] == surface.positions[0, 0])
    cells = sift(read_parents([str(tmp_path / "a.traj")]), Settings("emt", relax_cell=True), None)
    assert dict(cells.refused)["a-4"].startswith("not periodic")
    ase.io.write(tmp_path / "b.xyz", oxide)
    with pytest.raises(InputError, match=r"b\.xyz: none of 1 structures can be used \(b-0: elem"):
        make(tmp_path / "b.xyz", tmp_path / "b.h5")
    assert not (tmp_path / "b.h5").exists()


def test_failures_are_counted_and_replaced(alloys, tmp_path):
    out = tmp_path / "a.h5"
    report = make(alloys, out, 8, max_steps=8, attempts=4)
    assert report.failed.keys() == {"not converged"} and report.failed["not converged"] > 3
    assert report.made + len(report.lost) == 8 and report.made >= 1
    assert report.failed["not converged"] >= 4 * len(report.lost)
    for _, reason in report.lost:
        assert reason == "4 attempts failed, the last: not converged: after 8 steps"
    assert all(t.fmax[-1] < 0.03 for t in stored(out))
    kept = make(alloys, out, 8, max_steps=8, keep_unconverged=True)
    assert kept.made == 8 and not kept.failed and kept.unconverged > 0
    marked = [t for t in stored(out) if t.source.endswith(", not converged")]
    assert len(marked) == kept.unconverged
    assert all(t.n_frames == 9 and t.fmax[-1] >= 0.03 for t in marked)


class Broken(EMT):
    """EMT with a fault from the third step on."""

    def __init__(self, fault):
        super().__init__()
        self.fault, self.calls = fault, 0

    def calculate(self, *args, **kwargs):
        super().calculate(*args, **kwargs)
        self.calls += 1
        if self.calls > 2:
            self.fault(self.results)


def crash(results):
    raise ZeroDivisionError("SCF lost")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (crash, "calculator failed: ZeroDivisionError: SCF lost"),
        (
            lambda r: r.update(free_energy=np.nan),
            "unphysical: energy, forces or stress not finite at",
        ),
        (lambda r: r.update(forces=500 * np.ones((4, 3))), "unphysical: force of 866 eV/Å at"),
        (lambda r: r.update(free_energy=1e3), "unphysical: energy 250 eV/atom above the start at"),
    ],
)
def test_unphysical_relaxations(fault, reason):
    start = draw_start(alloy(), Settings("emt"), None, np.random.default_rng(1))
    made = relax(start, Broken(fault), Settings("emt"), "a", "g", "s")
    assert isinstance(made, str) and made.startswith(reason)


def factory_of_emt():
    """A calculator of the user's own."""
    return EMT()


def factory_that_fails():
    raise OSError("no licence")


def factory_of_nothing():
    return 3


def test_factory(alloys, tmp_path):
    name = f"{__name__}:factory_of_emt"
    report = make(alloys, tmp_path / "a.h5", 2, calculator=name)
    make(alloys, tmp_path / "b.h5", 2)
    assert report.made == 2
    for mine, emt in zip(stored(tmp_path / "a.h5"), stored(tmp_path / "b.h5")):
        assert mine.source == f"calculator {name}" and mine.id.startswith("factory_of_emt-0-0000")
        np.testing.assert_array_equal(mine.energies, emt.energies)
    assert load_calculator(name).elements is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vasp", "unknown: give emt, chgnet or MODULE:FACTORY"),
        ("./calc.py:make", "unknown"),
        ("no_such_module:make", "module no_such_module cannot be imported"),
        ("math:no_such", "math has no function no_such"),
        (f"{__name__}:factory_that_fails", r"the factory fails \(OSError: no licence\)"),
        (f"{__name__}:factory_of_nothing", "returns int, not an ASE calculator"),
    ],
)
def test_wrong_calculators(name, words, alloys, tmp_path):
    with pytest.raises(InputError, match=f"--calculator {name}: {words}"):
        make(alloys, tmp_path / "a.h5", calculator=name)
    assert not list(tmp_path.iterdir())


def test_without_chgnet(monkeypatch):
    monkeypatch.setitem(sys.modules, "chgnet", None)
    from relaxnet_jax.data.generation import calculators

    calculators._loaded_chgnet.cache_clear()
    with pytest.raises(InputError, match=r"chgnet: .*pip install 'relaxnet-jax\[chgnet\]'"):
        load_calculator("chgnet")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--n", "0"], "--n 0"),
        (["--rattle", "0.2", "0.1"], "--rattle 0.2 0.1"),
        (["--strain", "0.7"], "--strain 0.7"),
        (["--substitute", "2"], "--substitute 2.0"),
        (["--supercell", "1", "0", "1"], "--supercell 1 0 1"),
        (["--seed", "-1"], "--seed -1"),
        (["--jobs", "0"], "--jobs 0"),
        (["--structures", "none.cif"], "none.cif: no such file"),
        (["--out", "a.zip"], "a.zip: unknown suffix"),
    ],
)
def test_bad_arguments(arguments, words, alloys, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["data", "generate", "--calculator", "emt", "--structures", alloys, "--n", "1"]
    assert cli.main([*argv, "--out", "a.h5", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("relaxnet-jax: error: ") and words in error[0]
    assert not list(tmp_path.iterdir())


def test_command(alloys, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ase.io.write("h2o.xyz", molecule("H2O"))
    argv = ["data", "generate", "--calculator", "emt", "--structures", alloys, "h2o.xyz"]
    assert cli.main([*argv, "--n", "3", "--out", "a.h5", "--rattle", "0.02", "0.05"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("a.h5: 3 relaxations with ")
    assert lines[1] == "  1 structures refused: elements unknown to emt"
    assert lines[-1].endswith("train --config explicit.py --set data.path=a.h5")
    assert "refused h2o-0: elements unknown to emt: H, O" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5", "h2o.xyz"]


def test_a_finished_set_is_not_replaced_unasked(alloys, tmp_path, monkeypatch, capsys):
    """Of the very same request it is complete already; by structures, not by their file's name."""
    monkeypatch.chdir(tmp_path)
    ase.io.write("own.extxyz", ase.io.read(alloys, ":2"))
    argv = ["data", "generate", "--calculator", "emt", "--structures", "own.extxyz", "--out", "a.h5"]

    def run(*more, made=True):
        before = Path("a.h5").read_bytes() if Path("a.h5").exists() else b""
        code = cli.main([*argv, *more])
        assert (Path("a.h5").read_bytes() != before) == made
        return code, "".join(capsys.readouterr())

    assert run("--n", "3")[0] == 0
    monkeypatch.setattr(making, "make_relaxation", None)  # nothing is made
    code, said = run("--n", "3", "--jobs", "2", made=False)
    assert code == 0 and "a.h5: already complete" in said and "data.path=a.h5" in said
    for other in (["--n", "4"], ["--n", "3", "--seed", "1"]):
        code, said = run(*other, made=False)
        assert code == 2 and "a.h5: exists; give another --out, or --overwrite" in said
    ase.io.write("own.extxyz", ase.io.read(alloys, "1:"))
    assert run("--n", "3", made=False)[0] == 2
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert run("--n", "3", "--overwrite")[0] == 0
    # A calculator of one's own, by the content of its module.
    own = "from ase.calculators.emt import EMT\n"
    Path("own_emt.py").write_text(own)
    monkeypatch.syspath_prepend(str(tmp_path))
    given = ["--n", "3", "--calculator", "own_emt:EMT"]
    assert run(*given, made=False)[0] == 2
    assert run(*given, "--overwrite")[0] == 0
    assert "already complete" in run(*given, made=False)[1]
    Path("own_emt.py").write_text(own + "# of another functional\n")
    assert run(*given, made=False)[0] == 2
    assert run("--n", "3", "--overwrite")[0] == 0
    write_store("a.h5", stored("a.h5"))  # of whatever origin
    assert run("--n", "3", made=False)[0] == 2


def test_a_set_with_broken_parts_is_gone_on_with(alloys, tmp_path, monkeypatch, capsys):
    """By the same command, as it says; a part may break for want of memory."""
    monkeypatch.chdir(tmp_path)
    argv = ["data", "generate", "--calculator", "emt", "--structures", alloys]
    argv += ["--n", "10", "--jobs", "1", "--out", "a.h5"]
    original = making.make_relaxation

    def breaking(settings, calculator, index, parent):
        if index == 9:
            raise MemoryError("none left")
        return original(settings, calculator, index, parent)

    monkeypatch.setattr(making, "make_relaxation", breaking)
    assert cli.main(argv) == 0
    assert "missing 8 to 9: MemoryError: none left; run the command again" in capsys.readouterr().out
    assert len(stored("a.h5")) == 8
    assert cli.main([*argv, "--seed", "1"]) == 2
    monkeypatch.setattr(making, "make_relaxation", original)
    assert cli.main(argv) == 0
    assert len(stored("a.h5")) == 10 and not Path("a.h5.parts").exists()
    assert cli.main([*argv[:-1], "b.h5"]) == 0
    assert Path("a.h5").read_bytes() == Path("b.h5").read_bytes()


def make_slabs(*arguments):
    script = Path(__file__).parents[1] / "bin/make_slabs"
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)


def test_slabs_of_alloys(tmp_path):
    """Three layers of four atoms of every order of two metals, at lattices that the calculator has at rest."""
    out = tmp_path / "starts.extxyz"
    arguments = ["--calculator", "emt", "--metals", "Cu", "Au", "--out", str(out)]
    made = make_slabs(*arguments)
    assert made.returncode == 0, made.stderr
    assert f"--structures {out} --n 5 " in made.stdout
    slabs = ase.io.read(out, ":")
    formulas = [atoms.get_chemical_formula() for atoms in slabs]
    assert formulas == ["Au9Cu3", "Au3Cu9", "Au6Cu6", "Au12", "Cu12"]
    for atoms in slabs:
        heights, counts = np.unique(atoms.positions[:, 2].round(3), return_counts=True)
        assert counts.tolist() == [4, 4, 4]
        fixed = atoms.constraints[0].index
        assert len(fixed) == 8 and atoms.positions[fixed, 2].max() < heights[2] - 1.0
        assert atoms.cell[2, 2] - np.ptp(heights) == pytest.approx(20.0, abs=0.01)
        # As on fcc (111): three of twelve neighbours are missing outside, none in the middle.
        nearest = atoms.get_all_distances(mic=True)[0, 1:].min()
        count = np.bincount(neighbor_list("i", atoms, 1.1 * nearest), minlength=12)
        assert count.tolist() == [9] * 4 + [12] * 4 + [9] * 4
    assert nearest == pytest.approx(2.54, abs=0.02)  # of EMT's copper
    parents = read_parents([str(out)])
    assert len(parents.usable) == 5 and not parents.refused
    again = make_slabs(*arguments)
    assert again.returncode == 1 and again.stderr == f"bin/make_slabs: error: {out}: exists; give another --out\n"
    other = make_slabs(*arguments[:3], "Cu", "W", "--out", str(tmp_path / "b.extxyz"))
    assert other.returncode == 1 and "--metals W: unknown to emt; leave it out" in other.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["starts.extxyz"]
