"""``relaxnet-jax relax`` when something goes wrong on the way: nothing that is known is lost."""

import csv
import dataclasses
import errno
import io
import os
from pathlib import Path
from types import SimpleNamespace

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import fcc111
from ase.calculators.emt import EMT
from ase.constraints import FixBondLengths, FixedPlane, FixScaled
from rich.console import Console
from tiny import alloy, tiny_config, tiny_model

from relaxnet_jax import cli
from relaxnet_jax.committee import Spread
from relaxnet_jax.console import bar
from relaxnet_jax.constraints import move_to_end
from relaxnet_jax.data.generation.calculators import load_calculator
from relaxnet_jax.data.trajectory import PREDICTED, RelaxationTrajectory
from relaxnet_jax.errors import InputError
from relaxnet_jax.model import save_model
from relaxnet_jax.model_folders import checksum
from relaxnet_jax.predict import as_trajectory, predict_structures, relax
from relaxnet_jax.relaxation import command
from relaxnet_jax.relaxation.refine import descend, refine
from relaxnet_jax.relaxation.report import record, tables, totals
from relaxnet_jax.relaxation.summary import COLUMNS, row
from relaxnet_jax.starting import head_start
from relaxnet_jax.structure_files import Predicted
from relaxnet_jax.trust import Flag, constraint_flags

pytestmark = pytest.mark.usefixtures("own_cache")
SYMBOLS = (29, 46, 78, 79)


def made(**changes):
    config = tiny_config(
        "explicit", model__layers=1, model__attention=False, model__vector_messages=False, **changes
    )
    return tiny_model(config, dtype=np.float32, factor=3.0).replace(elements=SYMBOLS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = made()
    return model, save_model(model, tmp_path_factory.mktemp("trained") / "model")


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys):
    """Runs relax in a folder of its own: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        code = cli.main(["relax", "--model", str(model[1]), "--frames", "3", *map(str, argv)])
        return (code, *capsys.readouterr())

    return call


class Makes:
    """An ASE calculator's factory that gives EMT, but an error for some of the relaxations."""

    def __init__(self, *errors):
        self.errors, self.count = errors, 0

    def __call__(self):
        self.count += 1
        if self.count - 1 < len(self.errors) and self.errors[self.count - 1]:
            raise self.errors[self.count - 1]
        return EMT()


BROKEN = ValueError("no convergence")


@pytest.mark.parametrize("lost", ["with", "without"])
def test_a_relaxation_that_fails_leaves_the_other(lost, model):
    errors = {"with": (BROKEN,), "without": (None, BROKEN)}[lost]
    emt = load_calculator("emt")._replace(make=Makes(*errors))
    result = refine(alloy(), alloy(), emt, 0.05, 200, compare=True)
    assert result.kept == {"with": "without", "without": "with"}[lost]
    assert result.wrong_minimum is None and result.atoms.get_potential_energy() < 1.0
    assert (result.with_start is None) == (lost == "with") != (result.without is None)
    place = {"with": "from the prediction", "without": "from the initial structure"}
    assert result.failure.startswith(f"{place[lost]}: ") and "no convergence" in result.failure
    values = record(Predicted(relax(model[0], alloy(), 3), ()), 0.05, 0.1, result)
    assert values["refined"]["failure"] == result.failure
    console = Console(file=io.StringIO(), width=200)
    console.print(tables([values], 0.05, "emt", compare=True)[1])
    other = {"with": "initial structure", "without": "prediction"}[lost]
    assert f"converged only from the {other}" in console.file.getvalue()
    lines = totals([values], 0, 1.0, True, True)
    if lost == "without":
        assert len(lines) == 1  # nothing to compare
    else:
        assert "(+0 % saved, 1 structures, none where" in lines[1] and lines[1].endswith("prediction: 1")


class Magnetic(EMT):
    """EMT with moments."""

    implemented_properties = (*EMT.implemented_properties, "magmom", "magmoms")

    def calculate(self, *args):
        super().calculate(*args)
        self.results |= {"magmom": 2.0, "magmoms": np.arange(4.0), "free_energy": -1.5}


@pytest.mark.parametrize("form", ["extxyz", "traj"])
def test_moments_free_energy_and_stress_of_the_calculator_are_kept(form, tmp_path):
    made = load_calculator("emt")._replace(make=Magnetic)
    refined = refine(alloy(), alloy(), made, 0.05, 200)
    one = command.reading.Input("a", "a", Path("a"), "a", alloy())
    command.writing.write_relaxed(
        [command.writing.relaxed_atoms(one, still(one), (), refined)], tmp_path / f"a.{form}", form
    )
    found = ase.io.read(tmp_path / f"a.{form}")
    assert found.get_magnetic_moment() == 2.0 and found.calc.results["free_energy"] == -1.5
    np.testing.assert_array_equal(found.get_magnetic_moments(), np.arange(4.0))
    check = refined.atoms.copy()
    check.calc = EMT()
    np.testing.assert_allclose(found.get_stress(), check.get_stress(), atol=1e-7)
    assert found.get_potential_energy() == pytest.approx(check.get_potential_energy(), abs=1e-6)


def test_cells_need_a_stress_to_be_refined(tmp_path, monkeypatch, capsys):
    """Said before anything is predicted; a kept cell, or none, needs none."""
    folder = save_model(made(dynamics__cell="variable"), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stressless.py").write_text(
        "from ase.calculators.calculator import Calculator\n"
        "class Forces(Calculator):\n    implemented_properties = ('energy', 'forces')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    alloy().write("a.cif")
    asked = []

    def predict(found, *_):
        asked.append(len(found))
        raise InputError("predicts")

    monkeypatch.setattr(command, "_relaxed", predict)
    call = ["relax", "a.cif", "--model", str(folder), "--refine", "stressless:Forces"]
    assert cli.main(call) != 0 and not asked
    assert "has no stress" in (said := capsys.readouterr().err) and "--keep-cell" in said
    assert cli.main([*call, "--keep-cell"]) != 0 and asked == [1]
    flat = alloy()
    flat.pbc, flat.cell[2] = (True, True, False), 0
    with pytest.raises(InputError, match=r"no volume.*--keep-cell"):
        descend(flat, load_calculator("emt"), 0.05, 2, relax_cell=True)


def test_totals_count_what_saves_nothing():
    """A wrong minimum costs the relaxation from the initial structure too."""

    def refined(steps, wrong, converged=True):
        leg = {"steps": steps, "converged": converged}
        without = {"steps": 10, "converged": True}
        return {"wrong_minimum": wrong, "with_head_start": leg, "without_head_start": without}

    several = [refined(5, False), refined(2, True), refined(20, None, False), refined(7, False)]
    records = [{"converged": True, "flags": [], "seconds": 0.1, "refined": r} for r in several]
    told = totals(records, 0, 1.0, True, True)[1]
    assert told.startswith("ionic steps: 40 without and 32 with the head start (+20 % saved, 4 structures")
    assert told.endswith("wrong minima: 1; failed or unconverged from the prediction: 1")


def test_an_interruption_leaves_predictions_and_what_is_refined(run, monkeypatch):
    """The third structure is interrupted: the first is refined, of the others the prediction is there."""
    ase.io.write("many.extxyz", [alloy(), alloy(), alloy()])
    for name in ("b.cif", "c.cif"):
        ase.io.write(name, alloy())
    makes = Makes(None, None, None, None, KeyboardInterrupt())
    emt = load_calculator("emt")._replace(make=makes)
    monkeypatch.setattr(command, "_calculator", lambda name: emt)
    assert run("many.extxyz", "b.cif", "c.cif", "--refine", "emt", "--compare")[0] == 130
    images = ase.io.read("relaxed/many-relaxed.extxyz", ":")
    sources = [atoms.info["source"] for atoms in images]
    assert ["refined" in text for text in sources] == [True, True, False]
    assert len({round(a.get_potential_energy(), 6) for a in images[:2]}) == 1
    assert sorted(p.name for p in Path("relaxed").iterdir()) == [
        "b-path.extxyz", "b-relaxed.cif", "c-path.extxyz", "c-relaxed.cif",
        "many-path.extxyz", "many-relaxed.extxyz", "summary.csv"]  # fmt: skip
    # What is left to refine is known, also where the format does not say it.
    said = {row["name"]: row["refined"] for row in rows()}
    assert said == {"many-0": "emt", "many-1": "emt", "many-2": "", "b": "", "c": ""}


MODEL = SimpleNamespace(config=tiny_config())  # of fixed cells, and all that is asked of it here


class Predicts:
    """In place of `command._predict`: paths of two frames, without a model; interrupted at a chunk."""

    def __init__(self, stop=None):
        self.stop, self.chunks = stop, []

    def __call__(self, models, part, frames, options, failures, progress):
        if len(self.chunks) == self.stop:
            raise KeyboardInterrupt
        self.chunks.append([one.name for one in part])
        progress(len(part))
        return [(one, Predicted(still(one), ())) for one in part], 0.1


def still(one):
    n = len(one.atoms)
    return RelaxationTrajectory(
        id=one.name,
        atomic_numbers=one.atoms.numbers,
        positions=np.repeat(one.atoms.positions[None], 2, 0),
        cells=np.repeat(one.atoms.cell.array[None], 2, 0),
        pbc=one.atoms.pbc,
        energies=np.array([0.0, -1.0]),
        forces=np.zeros((2, n, 3)),
        fixed_mask=np.zeros(n, bool),
        source=PREDICTED,
    )


@pytest.fixture
def screen(tmp_path, monkeypatch, capsys):
    """Runs relax with `Predicts` in chunks of two: (exit code, the chunks it predicted, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "CHUNK", 2)

    def call(*argv, stop=None):
        predicts = Predicts(stop)
        monkeypatch.setattr(command, "_predict", predicts)
        monkeypatch.setattr("relaxnet_jax.commands._load_members", lambda _: {"m": MODEL})
        code = cli.main(["relax", *map(str, argv)])
        return code, predicts.chunks, capsys.readouterr().err

    return call


def ids(file):
    return [atoms.info["traj_id"] for atoms in ase.io.read(file, ":")]


def rows(folder="relaxed"):
    with Path(folder, "summary.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_summary_says_how_far_to_trust_results(screen):
    """Of formats that cannot; what earlier commands said of others stays, of the same is replaced."""
    ase.io.write("m.extxyz", [alloy(seed=k) for k in range(3)])
    ase.io.write("z.cif", alloy())
    Path("bad.cif").write_text("nothing")
    assert screen("bad.cif", "m.extxyz", "--format", "cif", stop=1)[0] == 130
    first, _, bad = found = rows()
    assert [row["name"] for row in found] == ["m-0", "m-1", ""]
    assert bad["input"] == "bad.cif" and "cannot be read" in bad["failure"] and not bad["relaxed file"]
    assert first["input"] == "m.extxyz, image 0" and first["path file"] == "relaxed/m-path.extxyz"
    assert first["energy change (meV/atom)"] == "-250" and first["volume change (%)"] == ""
    assert first["converged"] == "yes" and first["failure"] == first["refined"] == ""
    ase.io.write("bad.cif", alloy())
    assert screen("z.cif", "bad.cif", "m.extxyz@0", "--refine", "emt", "--format", "cif", "--overwrite")[0] == 0
    assert [(row["name"], row["refined"]) for row in rows()] == [
        ("m-0", "emt"), ("m-1", ""), ("z", "emt"), ("bad", "emt")]  # fmt: skip
    # What is predicted, but not refined, is to be done where that is asked for.
    argv = "z.cif", "m.extxyz", "--format", "cif", "--skip-existing"
    assert screen(*argv, "--refine", "emt")[1] == [["m-1", "m-2"]]
    Path("mine").mkdir()
    Path("mine/summary.csv").write_text("x,y\n1,2\n")
    code, chunks, err = screen("z.cif", "--out", "mine")
    assert code == 2 and not chunks and "mine/summary.csv: is not a summary of this command" in err


def test_the_summary_has_spreads_and_flags():
    one = command.reading.Input("a", "a.cif", Path("a.cif"), "a", alloy())
    spread = Spread(3, 0.0041, 0.012, 0.1, 0.01)
    flags = Flag("density", "low"), Flag("energy rises", "by 3")
    values = record(Predicted(still(one), flags, spread), 0.05, 0.1, None)
    files = {"input": "a.cif", "relaxed_file": "r", "path_file": "p"}
    changed = {"cell_relaxed": True, "volume_first": 8.0, "volume_last": 10.0, "converged": False}
    found = row(values | files | changed, "emt", "--refine: broken")
    assert list(found) == list(COLUMNS)
    assert found["spread of energy (meV/atom)"] == "4.1" and found["spread of positions (Å)"] == "0.012"
    assert found["flags"] == "density, energy rises" and found["volume change (%)"] == "25"
    assert found["converged"] == "no" and found["refined"] == ""
    assert found["failure"] == "--refine: broken"


@pytest.mark.parametrize("form", ["extxyz", "traj"])
def test_an_interrupted_screening_goes_on(screen, form):
    """What was predicted is there, in whole files, and only the rest is done the next time."""
    ase.io.write("m.extxyz", [alloy(seed=k) for k in range(5)])
    ase.io.write("z.cif", alloy())
    argv = "m.extxyz", "z.cif", "--format", form
    code, chunks, _ = screen(*argv, stop=2)
    assert code == 130 and chunks == [["m-0", "m-1"], ["m-2", "m-3"]]
    relaxed, path = f"relaxed/m-relaxed.{form}", f"relaxed/m-path.{form}"
    assert ids(relaxed) == ["m-0", "m-1", "m-2", "m-3"]
    assert ids(path) == [name for name in ids(relaxed) for _ in range(2)]
    # Killed between the two files of a chunk: it is done again, not twice in a file.
    ase.io.write(path, ase.io.read(path, ":")[:6])
    assert screen(*argv)[0] == 2  # exists
    code, chunks, err = screen(*argv, "--skip-existing")
    assert code == 0 and chunks == [["m-3", "m-4"], ["z"]] and "3 inputs skipped" in err
    assert ids(relaxed) == [f"m-{k}" for k in range(5)]
    frames = ase.io.read(path, ":")
    assert [a.info["traj_id"] for a in frames] == [f"m-{k}" for k in range(5) for _ in range(2)]
    assert [a.get_potential_energy() for a in frames] == [0.0, -1.0] * 5
    assert ids(f"relaxed/z-relaxed.{form}") == ["z"]
    assert screen(*argv, "--skip-existing")[:2] == (0, [])
    assert screen(*argv, "--skip-existing", "--overwrite")[0] == 2


def test_other_structures_of_a_name_are_not_taken_for_done(screen):
    """Nor lost: whatever the file is called, the path has to begin at the structure in it."""
    for name in ("x", "y"):
        Path(name).mkdir()
        ase.io.write(f"{name}/s.cif", alloy(seed=ord(name)))
        ase.io.write(f"{name}/m.extxyz", [alloy(seed=ord(name)), alloy()])
    assert screen("x/s.cif", "x/m.extxyz")[0] == 0
    before = {p: p.read_bytes() for p in Path("relaxed").iterdir()}
    for argv in (("y/s.cif",), ("y/m.extxyz",), ("y/s.cif", "--refine", "emt")):
        code, chunks, err = screen(*argv, "--skip-existing")
        assert code == 2 and not chunks and {p: p.read_bytes() for p in before} == before
        place = "s.cif" if "y/s.cif" in argv else "m.extxyz, image 0"
        assert f"-path.extxyz: is the path of x/{place}, not of y/{place} as it is now (positions " in err
        assert "give another --out, or replace it with --overwrite instead of --skip-existing" in err
    # The same one elsewhere is the same; what was edited, or is held otherwise, is not.
    Path("x/s.cif").rename("y/s.cif")
    assert screen("y/s.cif", "--skip-existing")[:2] == (0, [])
    assert "(fixed atoms differ)" in screen("y/s.cif", "--fixed", "0", "--skip-existing")[2]
    ase.io.write("y/s.cif", alloy("Pd"))
    Path("relaxed/summary.csv").unlink()
    assert "is the path of another structure, not of y/s.cif" in screen("y/s.cif", "--skip-existing")[2]
    Path("relaxed/s-path.extxyz").write_text("4\nnothing\n")
    assert "--skip-existing cannot read it" in screen("y/s.cif", "--skip-existing")[2]


def test_results_of_other_models_are_not_taken_for_done(screen, model):
    """Where the summary says what predicted them, which those of earlier versions do not."""
    ase.io.write("s.cif", alloy())
    assert screen("s.cif")[0] == 0
    assert rows()[0]["model"] == "pretrained" and len(rows()[0]["model checksum"]) == 16
    own = str(model[1])
    code, chunks, err = screen("s.cif", "--skip-existing", "--model", own)
    assert code == 2 and not chunks and "--overwrite instead of --skip-existing" in err
    assert "s was predicted by the model pretrained (checksum" in err and f"not by {own} (" in err
    assert checksum([own, "pretrained"]) == checksum(["pretrained", own]) != checksum([own])
    assert checksum(["absent"]) == ""
    file = Path("relaxed/summary.csv")
    lines = [line.split(",") for line in file.read_text().splitlines()]
    file.write_text("".join(",".join(line[:-2]) + "\n" for line in lines))
    assert "model" not in rows()[0]
    assert screen("s.cif", "--skip-existing", "--model", own)[:2] == (0, [])


def test_refining_the_rest_keeps_what_was_there(screen):
    """The images an earlier command left in a file are in it when what is new is refined."""
    ase.io.write("m.extxyz", [alloy(seed=k) for k in range(3)])
    assert screen("m.extxyz@:2", "--refine", "emt")[0] == 0
    code, chunks, _ = screen("m.extxyz", "--skip-existing", "--refine", "emt")
    assert code == 0 and chunks == [["m-2"]]
    images = ase.io.read("relaxed/m-relaxed.extxyz", ":")
    assert [a.info["traj_id"] for a in images] == ["m-0", "m-1", "m-2"]
    assert all("refined" in a.info["source"] and a.get_forces().any() for a in images)


def test_a_full_disk_costs_what_does_not_fit(screen, monkeypatch):
    """A path that cannot be written is a failure, named; the others go on."""
    for name in ("a", "b"):
        ase.io.write(f"{name}.cif", alloy())
    original = ase.io.write

    def write(file, *args, **kwargs):
        if ".a-path" in str(file):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(file, *args, **kwargs)

    monkeypatch.setattr(ase.io, "write", write)
    code, _, err = screen("a.cif", "b.cif")
    assert code == 1 and "failed: a.cif: relaxed/a-path.extxyz: cannot be written (No space left" in err
    assert "free space" in err and ids("relaxed/b-path.extxyz") == ["b", "b"]


def test_progress_in_a_log(capsys, monkeypatch):
    clock = iter([0.0, 10.0, 31.0, 40.0, 90.0, 1000.0])
    monkeypatch.setattr("relaxnet_jax.console.time.monotonic", lambda: next(clock))
    with bar("structures", 100) as advance:
        for done in (10, 20, 30, 60, 100):
            advance(done)
    assert capsys.readouterr().err.splitlines() == [
        "20/100 structures, 2.1 min left", "60/100 structures, 1.0 min left"]  # fmt: skip


def test_what_cannot_be_written_is_told_before_anything_is_computed(run, monkeypatch):
    monkeypatch.setattr(command, "_predict", lambda *_: pytest.fail("it predicts"))
    ase.io.write("molecule.xyz", Atoms("Cu2", [[0, 0, 0], [0, 0, 2.3]]))
    code, _, err = run("molecule.xyz", "--format", "poscar")
    assert code == 2 and "a POSCAR needs one" in err
    if os.geteuid() == 0:
        monkeypatch.setattr(os, "access", lambda *_: False)
    else:
        Path("closed").mkdir(mode=0o500)
    code, _, err = run("molecule.xyz", "--out", "closed/out")
    assert code == 2 and "cannot be written to" in err


def test_several_selections_of_a_file(run):
    ase.io.write("m.extxyz", [alloy("Cu"), alloy("Pd"), alloy("Pt")])
    assert run("m.extxyz@0", "m.extxyz@-1", "m.extxyz@:1")[0] == 0
    found = ase.io.read("relaxed/m-relaxed.extxyz", ":")
    assert [a.symbols[0] for a in found] == [alloy(s).symbols[0] for s in ("Cu", "Pt")]
    code, _, err = run("m.extxyz@0", "m.extxyz@7", "--out", "other")
    assert code == 1 and "none of those asked for" in err


def test_an_occupancy_that_is_not_a_cifs(run):
    first = alloy()
    first.info["occupancy"] = 0.5
    ase.io.write("a.extxyz", [first, alloy()])
    assert run("a.extxyz")[0] == 0
    assert len(ase.io.read("relaxed/a-relaxed.extxyz", ":")) == 2


def pulled(model, atoms, n=3):
    """A path whose last frame lies 0.3 Å further along x and z."""
    free = atoms.copy()
    free.set_constraint()
    path = relax(model, free, n)
    positions = path.positions.copy()
    positions[-1] += [0.3, 0.0, 0.3]
    return dataclasses.replace(path, positions=positions)


def test_constraints_that_move_the_end(model):
    """Energy and forces are the path's end's, so they are not told of another geometry."""
    atoms = fcc111("Pt", (2, 1, 3), vacuum=4.0, periodic=True)
    path = pulled(model[0], atoms)
    assert constraint_flags(atoms, path) == ()
    one = command.reading.Input("a", "a", Path("a.cif"), "a", atoms)
    free = command.writing.relaxed_atoms(one, path, (), None)
    assert free.get_potential_energy() == path.energies[-1]
    atoms.set_constraint(FixedPlane(5, [0, 0, 1.0]))
    bound = command.writing.relaxed_atoms(one, path, (), None)
    assert bound.calc is None and bound.positions[5, 2] == pytest.approx(atoms.positions[5, 2])
    # The others have come upon the atom that is held.
    close = pulled(model[0], atoms)
    close.positions[-1, 4] = atoms.positions[5] + [0.3, 0.0, 0.2]
    close.positions[-1, 5] = atoms.positions[5] + [0.0, 0.0, 4.0]
    assert [f.name for f in constraint_flags(atoms, close)] == [
        "atoms too close", "constraints ignored"]  # fmt: skip


def test_rigid_bonds_keep_their_length_whatever_the_cell_does(model):
    atoms = Atoms("Cu3", [[0, 0, 0], [2.4, 0, 0], [0, 3.0, 0]], cell=[8.0, 8.0, 8.0], pbc=True)
    length, path = atoms.get_distance(0, 1), relax(model[0], atoms, 3)
    atoms.set_constraint(FixBondLengths([(0, 1)]))
    cells = path.cells.copy()
    cells[-1] *= 1.04
    move_to_end(atoms, dataclasses.replace(path, cells=cells))
    assert atoms.get_distance(0, 1) == pytest.approx(length, abs=1e-6)


def test_partial_constraints_are_told(model):
    atoms = alloy()
    atoms.set_constraint(FixScaled(1, (False, False, True)))
    with pytest.warns(UserWarning, match="constraints ignored"):
        relax(model[0], atoms, 3)
    assert "constraints ignored" in {f.name for f in head_start(atoms, model[0], 3).flags}


def test_charges_go_along():
    model = made(model__charges=True)
    atoms = alloy()
    atoms.set_initial_charges([0.5, -0.5, 0.25, -0.25])
    structure = model.structure(atoms)
    (path,) = predict_structures(model, [structure], np.linspace(0, 1, 3))
    last = as_trajectory("a", structure, path).atoms(-1)
    np.testing.assert_array_equal(last.get_initial_charges(), atoms.get_initial_charges())


def test_cells_without_a_volume_are_not_called_converged():
    """A slab that is not periodic along its normal strains in its plane, without a stress."""
    model = made(dynamics__cell="variable")
    atoms = fcc111("Pt", (1, 1, 3), vacuum=4.0, periodic=False)
    start = head_start(atoms, model, 3)
    assert start.path.variable_cell and start.path.stresses is None
    assert "cell force unknown" in {f.name for f in start.flags}
    assert not record(Predicted(start.path, start.flags), 1e3, 0.1, None)["converged"]
    assert record(Predicted(start.path, ()), 1e3, 0.1, None)["converged"]
