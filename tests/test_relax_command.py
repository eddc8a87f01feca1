"""``relaxnet-jax relax``: what goes in, what comes out, and what is said when something fails."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixScaled
from rich.console import Console
from tiny import alloy, tiny_config, tiny_model

from relaxnet_jax import cli, structure_files
from relaxnet_jax.benchmark.steps import CONVERGED
from relaxnet_jax.benchmark.steps_report import judged
from relaxnet_jax.committee import Spread
from relaxnet_jax.console import WIDE, bar, result_console
from relaxnet_jax.data.files import is_poscar
from relaxnet_jax.data.generation.calculators import load_calculator
from relaxnet_jax.data.trajectory import RelaxationTrajectory
from relaxnet_jax.errors import InputError
from relaxnet_jax.evaluate.path_figure import path_curves
from relaxnet_jax.model import save_model
from relaxnet_jax.predict import relax
from relaxnet_jax.relaxation.inputs import (
    Hold,
    Input,
    distinct_stems,
    find_files,
    held,
    parse_indices,
    read_inputs,
)
from relaxnet_jax.relaxation.minima import same_minimum_within
from relaxnet_jax.relaxation.outputs import lost_constraints, relaxed_atoms
from relaxnet_jax.relaxation.refine import Leg, Refined, refine
from relaxnet_jax.relaxation.report import MAX_ROWS, flag_lines, record, tables, totals
from relaxnet_jax.structure_files import Predicted
from relaxnet_jax.trust import Flag

ELEMENTS = (29, 46, 78, 79)


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that knows copper, palladium, platinum and gold, and its folder."""
    config = tiny_config(
        "explicit", model__layers=1, model__attention=False, model__vector_messages=False
    )
    made = tiny_model(config, dtype=np.float32, factor=3.0).replace(elements=ELEMENTS)
    return made, save_model(made, tmp_path_factory.mktemp("trained") / "model")


def slab():
    atoms = fcc111("Pt", (2, 1, 3), vacuum=4.0, periodic=True)
    atoms.rattle(0.05, seed=2)
    atoms.info.clear()
    return atoms


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys):
    """Runs relax in a folder of its own: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        code = cli.main(["relax", "--model", str(model[1]), "--frames", "3", *map(str, argv)])
        return (code, *capsys.readouterr())

    return call


def test_many_files_some_bad(run, model):
    """A folder, an image file, a damaged one, an unknown element and a missing file: the good ones
    are done, each of the others is one line, and all the formats keep to their input's."""
    Path("in/sub").mkdir(parents=True)
    held_slab = slab()
    held_slab.set_constraint([FixAtoms([0, 1]), FixScaled([2], (True, True, False))])
    ase.io.write("in/POSCAR", held_slab)
    ase.io.write("in/sub/POSCAR", alloy())
    ase.io.write("in/sub/cell.cif", alloy("Pd"))
    ase.io.write("in/many.extxyz", [alloy(seed=1), alloy("O"), alloy("Pt", seed=3)])
    Path("in/bad.cif").write_text("nothing\n")
    code, out, err = run("in", "in/sub/POSCAR", "absent.cif", "--plot")
    assert code == 1
    failed = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 3 and "Traceback" not in err
    for line, words in zip(
        failed,
        (("absent.cif", "no such file"), ("in/bad.cif", "cannot be read"),
         ("in/many.extxyz, image 1", "never saw O")),
    ):  # fmt: skip
        assert all(word in line for word in words), line
    assert "5 relaxed" in out and "3 failed" in out
    expected = {f"{n}-relaxed.{s}" for n, s in (
        ("in", "vasp"), ("sub", "vasp"), ("cell", "cif"), ("many", "extxyz"))}  # fmt: skip
    expected |= {f"{n}-path.extxyz" for n in ("in", "sub", "cell", "many")} | {"summary.csv"}
    drawn = {f"{n}-path.png" for n in ("in", "sub", "cell", "many-0", "many-2")}
    assert {p.name for p in Path("relaxed").iterdir()} == expected | drawn
    assert all(Path("relaxed", n).read_bytes().startswith(b"\x89PNG") for n in drawn)
    # The relaxed slab: atoms in order, where the path ends, held as before.
    final = ase.io.read("relaxed/in-relaxed.vasp")
    path = ase.io.read("relaxed/in-path.extxyz", index=":")
    read_back = ase.io.read("in/POSCAR")
    with pytest.warns(UserWarning, match="the path ignores FixScaled"):
        reference = relax(model[0], read_back, n_frames=3)
    assert len(path) == 3
    np.testing.assert_allclose(path[-1].positions, reference.positions[-1], atol=1e-5)
    np.testing.assert_allclose(final.positions[:2], held_slab.positions[:2], atol=1e-8)
    np.testing.assert_allclose(final.positions[3:], path[-1].positions[3:], atol=1e-6)
    assert np.abs(final.positions[3:] - held_slab.positions[3:]).max() > 1e-3
    moved = final.get_scaled_positions(wrap=False) - held_slab.get_scaled_positions(wrap=False)
    np.testing.assert_allclose(moved[2, :2], 0, atol=1e-9)
    kinds = {type(c).__name__: c.index.tolist() for c in final.constraints}
    assert kinds == {"FixAtoms": [0, 1], "FixScaled": [2]}
    assert "constraints ignored: the path ignores FixScaled" in err
    images = ase.io.read("relaxed/many-relaxed.extxyz", index=":")
    assert [a.info["traj_id"] for a in images] == ["many-0", "many-2"]
    assert all(np.isfinite(a.get_potential_energy()) for a in images)
    frames = ase.io.read("relaxed/many-path.extxyz", index=":")
    assert [(f.info["traj_id"], f.info["frame"]) for f in frames] == [
        (name, k) for name in ("many-0", "many-2") for k in range(3)
    ]
    # The paths begin at the structures in the files, whatever these hold.
    code, _, err = run("in", "in/sub/POSCAR", "--plot", "--skip-existing")
    assert code == 1 and "5 inputs skipped" in err


def test_json_refine_and_fixed_atoms(run, tmp_path):
    """JSON says what the table says; --compare runs both ways; --fixed and --fix-below add up."""
    atoms = slab()
    atoms.set_constraint(FixAtoms([5]))
    ase.io.write("a.traj", atoms)
    z = np.sort(atoms.positions[:, 2])
    below = (z[1] + z[2]) / 2
    options = ("--fixed", "2", "--fix-below", below, "--format", "traj", "--refine", "emt", "--compare")
    code, out, err = run("a.traj", *options, "--fmax", "0.1", "--json")
    assert code == 0, err
    document = json.loads(out)
    (one,) = document["structures"]
    assert document["failed"] == [] and document["fmax"] == 0.1 and document["refine"] == "emt"
    final, path = ase.io.read("relaxed/a-relaxed.traj"), ase.io.read("relaxed/a-path.traj", ":")
    (constraint,) = final.constraints
    assert sorted(constraint.index) == [0, 1, 2, 5] and one["fixed_atoms"] == 4
    np.testing.assert_array_equal(path[-1].positions[[0, 1, 2, 5]], atoms.positions[[0, 1, 2, 5]])
    np.testing.assert_array_equal(final.positions[[0, 1, 2, 5]], atoms.positions[[0, 1, 2, 5]])
    free = path[-1].positions[[3, 4]] - atoms.positions[[3, 4]]
    assert one["largest_displacement"] == pytest.approx(np.linalg.norm(free, axis=1).max())
    assert one["energy_last"] == pytest.approx(path[-1].get_potential_energy())
    assert one["converged"] == (one["fmax_last"] < 0.1)
    # What is written is EMT's minimum, and both ways lead there.
    refined = one["refined"]
    assert refined["kept"] == "with" and refined["wrong_minimum"] is False
    check = final.copy()
    check.calc = EMT()
    assert np.linalg.norm(check.get_forces(), axis=1).max() < 0.1
    assert check.get_potential_energy() == pytest.approx(
        refined["with_head_start"]["energy"], abs=1e-6
    )
    assert final.get_potential_energy() == pytest.approx(check.get_potential_energy(), abs=1e-6)
    for leg in ("with_head_start", "without_head_start"):
        assert refined[leg]["converged"] and refined[leg]["fmax"] < 0.1
        assert refined[leg]["steps"] > 1
    # Nothing is overwritten without being told to.
    before = {p: p.read_bytes() for p in Path("relaxed").iterdir()}
    code, out, err = run("a.traj", *options)
    assert code == 2 and "exists" in err and "--overwrite" in err
    assert {p: p.read_bytes() for p in Path("relaxed").iterdir()} == before
    again = ("--format", "traj", "--overwrite", *options[-3:], "--html", "a.html")
    code, out, err = run("a.traj", *again)
    assert code == 0 and "a.html" in out
    (shown,) = re.findall(r'id="data">(.*?)</script>', Path("a.html").read_text(encoding="utf-8"), re.S)
    assert json.loads(shown)["fixed"] == [False] * 5 + [True]
    assert "refined with emt" in out and "ionic steps" in out
    assert Path("relaxed/a-relaxed.traj").read_bytes() != before[Path("relaxed/a-relaxed.traj")]


def test_formats_that_cannot_hold_everything(run):
    """A molecule is no POSCAR: the other structure is written, the failure named."""
    pair = Atoms("Cu2", [[0, 0, 0], [0.3, 0, 2.3]])
    ase.io.write("pair.xyz", pair)
    ase.io.write("cell.cif", alloy())
    code, _, err = run("pair.xyz", "cell.cif", "--format", "poscar")
    assert code == 1 and "failed: pair.xyz" in err and "no cell" in err
    assert {p.name for p in Path("relaxed").iterdir()} == {
        "cell-relaxed.vasp", "cell-path.extxyz", "summary.csv"}  # fmt: skip
    code, _, err = run("cell.cif", "--fixed", "0", "--format", "cif", "--out", "other")
    assert code == 0 and "cif cannot hold FixAtoms" in err
    atoms = slab()
    atoms.set_constraint([FixAtoms([0]), FixScaled([1], (True, False, False))])
    assert lost_constraints(atoms, "poscar") == lost_constraints(atoms, "traj") == []
    assert lost_constraints(atoms, "extxyz") == ["FixScaled"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["a.cif", "--frames", "1"], ["--frames 1"]),
        (["a.cif", "--fmax", "0"], ["--fmax 0"]),
        (["a.cif", "--steps", "0"], ["--steps 0"]),
        (["a.cif", "--batch-size", "0"], ["--batch-size 0: give at least 1"]),
        (["a.cif", "--fixed", "0,x"], ["--fixed 0,x", "0,3,8-11"]),
        (["a.cif", "--refine", "dft"], ["--refine dft", "emt, chgnet"]),
        (["a.cif", "--compare"], ["--compare", "--refine NAME"]),
        (["a.cif", "--out", "a.cif"], ["--out a.cif", "is a file"]),
        (["a.cif", "--html", "."], ["folder"]),
        (["two.extxyz", "--html", "x.html"], ["--html", "one structure", "2 were"]),
        (["absent.cif"], ["nothing could be relaxed", "absent.cif", "no such file"]),
        (["oxide.cif"], ["nothing could be relaxed", "never saw O"]),
        (["a.cif", "--fixed", "4"], ["nothing could be relaxed", "--fixed 4", "0 to 3"]),
        (["empty"], ["nothing could be relaxed", "empty", "name the files"]),
        (["v4/POSCAR"], ["nothing could be relaxed", "v4/POSCAR", "element symbols"]),
    ],
)
def test_bad_arguments(run, argv, words):
    ase.io.write("a.cif", alloy())
    ase.io.write("oxide.cif", alloy("O"))
    ase.io.write("two.extxyz", [alloy(), alloy()])
    Path("empty").mkdir()
    Path("v4").mkdir()
    Path("v4/POSCAR").write_text("x\n1.0\n4 0 0\n0 4 0\n0 0 4\n1\nDirect\n0 0 0\n")
    code, out, err = run(*argv)
    lines = [line for line in err.splitlines() if line.startswith("relaxnet-jax: error: ")]
    assert code == 2 and len(lines) == 1 and not out and "Traceback" not in err
    assert all(word in err for word in words), err
    assert all(err.count(word) == 1 for word in words[1:]), err  # the reason is not told twice
    assert not Path("relaxed").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("notes.txt", "hello\nworld\n", "(unknown format); give a structure file"),
        ("bad.cif", "nothing\n", "(not a valid CIF)"),
        ("x.dat", "1 2 3\n", "(unknown or damaged format)"),
        ("e.extxyz", "nonsense\n", "(not a valid extxyz: it does not begin with the number of atoms)"),
        ("empty.cif", "", "(Empty file"),
        ("gen.h5", "", "gen.h5: is a data store, not a structure file; train on it with data.path"),
    ],
)
def test_unreadable_files_say_what_is_wrong(tmp_path, name, content, words):
    """ASE says AssertionError, or the suffix alone."""
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as error:
        structure_files.read_images(tmp_path / name)
    assert words in str(error.value)


def test_without_arguments_there_is_help(capsys):
    assert cli.main([]) == 2
    assert "usage: relaxnet-jax" in (err := capsys.readouterr().err) and "relax structure files" in err


def test_arguments_and_files_are_looked_at_before_jax_starts():
    """Mistakes are told at once, and XLA's log is quiet only if it is told so before it starts."""
    code = (
        "import sys, pathlib\n"
        "from relaxnet_jax.relaxation import command, inputs, outputs, refine, report\n"
        "inputs.read_inputs({}, inputs.Hold()); refine.load('emt')\n"
        "sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unusable_predictions_are_failures(run, model, monkeypatch):
    """Atoms that end in each other are not handed on as a relaxed structure."""
    ase.io.write("a.cif", alloy())
    monkeypatch.setattr("relaxnet_jax.trust.MIN_CONTACT", 1.2)
    code, _, err = run("a.cif")
    assert code == 2 and "unusable, atoms too close" in err and not Path("relaxed").exists()


def test_parse_indices():
    assert parse_indices("0, 3,8-11,9") == (0, 3, 8, 9, 10, 11)
    for text in ("", "a", "-1", "3-", "5-3", "1,,2", "1.5"):
        with pytest.raises(InputError, match="--fixed"):
            parse_indices(text)


def test_names_never_meet():
    """Nor does ASE take a path for a POSCAR by its name."""
    given = {
        "/x/a/POSCAR": "x-a",
        "/y/a/POSCAR": "y-a",
        "/x/b/poscar.vasp": "b",
        "/x/b/POSCAR.mp-1": "mp-1",
        "/x/POSCARs/c.cif": "x-s-c",
        "/x/b/C.xyz": "b-C",
        "/x/b/c.vasp": "b-c",
        "/x/POSCAR_7": "7",
        "/x/d/one.cif": "one",
        "/x/d/one.xyz": "one-2",  # in one folder no folder tells them apart
        "/z/POSCAR.gz": "z",
        "/z/two.vasp.gz": "two",
        "/POSCAR": "structure",
        "/CONTCAR": "structure-2",
        os.fsdecode(b"/M\xfcller.cif"): r"M\xfcller",
    }
    names = distinct_stems([Path(path) for path in given])
    assert len({name.casefold() for name in names}) == len(names)
    found = dict(zip(given, names))
    assert found.pop("/x/b/C.xyz") == "b-C" and found.pop("/x/b/c.vasp") == "b-c-2"
    assert found.pop("/x/POSCARs/c.cif") == "s-c"
    assert found == {k: v for k, v in given.items() if k in found}


def test_images_and_files_do_not_meet(tmp_path, monkeypatch):
    """The second image of a.extxyz is not a-1.cif."""
    monkeypatch.chdir(tmp_path)
    ase.io.write("a.extxyz", [alloy(), alloy()])
    ase.io.write("a-1.cif", alloy())
    files, failures = find_files(["a.extxyz", "a-1.cif", "./a.extxyz"], Path("relaxed"))
    found, unreadable = read_inputs(files, Hold())
    assert [i.name for i in found] == ["a-0", "a-1", "a-1-2"] and not failures + unreadable
    assert [i.place for i in found] == ["a.extxyz, image 0", "a.extxyz, image 1", "a-1.cif"]


@pytest.mark.parametrize(
    "index, wanted", [("", [0, 1, 2]), ("@-1", [2]), ("@0", [0]), ("@1:", [1, 2]), ("@::2", [0, 2])]
)
def test_some_images_of_a_file(tmp_path, monkeypatch, index, wanted):
    """Chosen as ASE does; a file that has an @ in its own name is that file."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.traj", "b@1.traj"):
        ase.io.write("plain.traj", [alloy(seed=k) for k in range(3)])
        Path("plain.traj").rename(name)
        files, failures = find_files([name + index], Path("relaxed"))
        found, unreadable = read_inputs(files, Hold())
        assert not failures + unreadable
        assert [i.place for i in found] == [f"{name}, image {k}" for k in wanted]
        for one, k in zip(found, wanted):
            np.testing.assert_allclose(one.atoms.positions, alloy(seed=k).positions)
    files, _ = find_files(["a.traj@7"], Path("relaxed"))
    found, (failure,) = read_inputs(files, Hold())
    assert not found and "has 3 image(s)" in failure.reason
    _, (failure,) = find_files(["a.traj@last"], Path("relaxed"))
    assert "no such file" in failure.reason


def test_sites_with_several_elements_are_refused(run):
    """ASE takes the likeliest element; the user must."""
    ase.io.write("a.cif", alloy())
    before, row, after = re.split(r"(  Cu +Cu1 .*)", Path("a.cif").read_text())
    Path("a.cif").write_text(before + re.sub(r"1\.0+$", "0.6", row) + after)
    code, _, err = run("a.cif")
    assert code == 2 and "partial occupancies (site 0: Cu 0.6)" in err
    assert structure_files.disorder(alloy()) == ""
    whole = alloy()
    whole.info["occupancy"] = {"0": {"Cu": 1.0}}
    assert structure_files.disorder(whole) == ""


def test_results_are_no_inputs(tmp_path, monkeypatch):
    """Of an earlier call, under whatever --out; a file that only has such a name is one."""
    monkeypatch.chdir(tmp_path)
    for name in ("POSCAR", "old/x-relaxed.vasp", "old/x-path.extxyz", "old/x-0-relaxed.cif",
                 "mine/dft-relaxed.vasp", "mine/y-path.cif"):  # fmt: skip
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    images = [alloy(), alloy()]
    for k, atoms in enumerate(images):
        atoms.info |= {"traj_id": "a", "frame": k, "source": "RelaxNet"}  # as predict --out says it
    for name in ("mine/guess.extxyz", "mine/guess.traj", "mine/guess.xyz", "mine/end.traj"):
        said = images[1:] if "end" in name else images
        ase.io.write(name, said, format="traj" if name.endswith("j") else "extxyz")
    for k, atoms in enumerate(images):
        atoms.info = {"traj_id": str(k), "source": "RelaxNet"}  # as relax does
    ase.io.write("mine/several.extxyz", images)
    for atoms in images:  # as an optimiser's frames do that begins at a prediction
        atoms.info = {"traj_id": "a", "frame": 1, "source": "RelaxNet"}
    ase.io.write("mine/dft.extxyz", images)
    ase.io.write("mine/dft.traj", images)
    images[0].info["source"] = "RelaxNet, refined"
    ase.io.write("mine/good.extxyz", images[0])
    said = []
    files, failures = find_files([".", "mine/guess.xyz"], Path("relaxed"), said.append)
    assert not failures
    assert [str(f) for f in files] == [
        "POSCAR", "mine/dft-relaxed.vasp", "mine/dft.extxyz", "mine/dft.traj", "mine/good.extxyz",
        "mine/y-path.cif", "mine/guess.xyz"]  # fmt: skip
    (line,) = said
    assert line.startswith(".: 8 results of this package skipped")


def test_cells_that_relax(tmp_path, monkeypatch, capsys):
    """Without a model named: volume and stress are told, vacuum flagged, and --keep-cell keeps it."""
    monkeypatch.chdir(tmp_path)
    ase.io.write("iron.cif", bulk("Fe", a=3.1, cubic=True))
    ase.io.write("slab.vasp", fcc111("Cu", (1, 1, 3), vacuum=5.0, periodic=True))
    assert cli.main(["relax", "iron.cif", "slab.vasp", "--json"]) == 0
    one, other = json.loads(capsys.readouterr().out)["structures"]
    assert one["cell_relaxed"] and one["volume_last"] < 0.95 * one["volume_first"]
    final = ase.io.read("relaxed/iron-path.extxyz", index=-1)
    virial = final.get_stress(voigt=False) * final.get_volume()
    assert one["cell_force_last"] == pytest.approx(
        np.linalg.norm(virial, axis=1).max() / 2, rel=1e-4
    )
    assert one["fmax_last"] < 1e-3
    assert one["converged"] == (one["cell_force_last"] < 0.05)
    assert "vacuum strained" in [flag["name"] for flag in other["flags"]]
    again = ["relax", "iron.cif", "slab.vasp", "--keep-cell", "--overwrite"]
    assert cli.main([*again, "--json"]) == 0
    for found in json.loads(capsys.readouterr().out)["structures"]:
        assert not found["cell_relaxed"] and found["stress_last"] is None
        assert found["volume_last"] == found["volume_first"]
        assert "vacuum strained" not in [flag["name"] for flag in found["flags"]]
    for name in ("iron.cif", "slab.vasp"):
        made = ase.io.read(f"relaxed/{Path(name).stem}-relaxed{Path(name).suffix}")
        np.testing.assert_allclose(made.cell.array, ase.io.read(name).cell.array, atol=1e-5)


def test_static_models_stop_where_they_are_told(tmp_path, monkeypatch, capsys):
    """--fmax and --steps reach the minimisation with a model that has no path of its own."""
    monkeypatch.chdir(tmp_path)
    config = tiny_config("static", model__layers=1, model__attention=False, dynamics__mass="unit")
    static = tiny_model(config, dtype=np.float32, factor=3.0).replace(elements=ELEMENTS)
    folder = str(save_model(static, tmp_path / "static"))
    ase.io.write("a.extxyz", alloy())
    found = []
    for more in (
        ["--fmax", "1e3"],
        ["--fmax", "1e-9", "--steps", "2"],
        ["--fmax", "1e-9", "--steps", "1"],
    ):
        command = ["relax", "a.extxyz", "--model", folder, "--json", "--overwrite", *more]
        cli.main(command)
        found.append(json.loads(capsys.readouterr().out)["structures"][0])
    assert found[0]["converged"] and found[0]["largest_displacement"] == 0
    assert not found[1]["converged"] and found[1]["largest_displacement"] > 0
    assert found[2]["largest_displacement"] != found[1]["largest_displacement"]


def test_predictions_not_to_be_used_are_warned_of(model, monkeypatch):
    monkeypatch.setattr("relaxnet_jax.trust.MIN_CONTACT", 1.2)
    with pytest.warns(RuntimeWarning, match="the prediction is unusable, atoms too close"):
        relax(model[0], alloy(), n_frames=3)


def test_folders_without_results_and_hidden_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("POSCAR", "b.CIF", "CONTCAR", "notes.txt", ".hidden.cif", "out/c.cif",
                 ".git/d.cif", "deep/er/e.xyz"):  # fmt: skip
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    files, failures = find_files(["."], Path("out"))
    assert [str(f) for f in files] == ["POSCAR", "b.CIF", "deep/er/e.xyz"] and not failures


def test_held_atoms_add_up():
    atoms = slab()
    atoms.set_constraint([FixAtoms([3]), FixScaled([4], (True, False, False))])
    before = atoms.copy()
    result = held(atoms, Hold((1,), atoms.positions[:, 2].min() + 0.5))
    scaled, fixed = result.constraints
    low = np.flatnonzero(atoms.positions[:, 2] < atoms.positions[:, 2].min() + 0.5)
    assert isinstance(scaled, FixScaled) and sorted(fixed.index) == sorted({1, 3, *low})
    assert [c.index.tolist() for c in atoms.constraints] == [
        c.index.tolist() for c in before.constraints
    ]
    assert len(held(atoms, Hold()).constraints) == 2


class Double:
    """An ASE calculator's factory: EMT whose first relaxation, the predicted structure's, ends
    ``lift`` eV higher."""

    def __init__(self, lift):
        self.lift, self.made = lift, 0

    def __call__(self):
        self.made += 1
        made = EMT()
        if self.made == 1:
            original, lift = made.calculate, self.lift

            def calculate(*args, **kwargs):
                original(*args, **kwargs)
                for name in ("energy", "free_energy"):
                    made.results[name] += lift

            made.calculate = calculate
        return made


@pytest.mark.parametrize(("lift", "wrong"), [(0.0, False), (0.016, False), (0.024, True)])
def test_wrong_minimum(lift, wrong):
    """4 atoms: 5 meV/atom are 20 meV. Then the other end is kept."""
    atoms = alloy()
    calculator = load_calculator("emt")._replace(make=Double(lift))
    result = refine(atoms, atoms, calculator, 0.05, 100, True)
    assert result.wrong_minimum is wrong and result.kept == ("without" if wrong else "with")
    assert result.without.steps == result.with_start.steps > 1
    assert result.with_start.energy - result.without.energy == pytest.approx(lift, abs=1e-9)
    kept = result.without if wrong else result.with_start
    assert result.atoms.get_potential_energy() == kept.energy


def test_one_atom_elsewhere_in_a_large_cell_is_a_wrong_minimum():
    """80 atoms: 0.15 eV are 2 meV/atom. The stricter of two limits counts, for both commands."""
    assert same_minimum_within(4) == pytest.approx(0.02)
    assert same_minimum_within(80) == pytest.approx(0.1)
    assert same_minimum_within(80, 1e-3) == pytest.approx(0.08)
    rows = [
        {"structure": "a", "start": start, "status": CONVERGED, "energy": energy, "atoms": 80}
        for start, energy in (("initial", -99.0), ("model", -98.85), ("egnn", -98.95), ("b", -99.15))
    ]
    assert [r["result"] for r in judged(rows)] == [
        "same minimum", "wrong minimum", "same minimum", "lower minimum"]  # fmt: skip
    assert judged(rows, whole=1.0)[1]["result"] == "same minimum"
    atoms = alloy().repeat((5, 2, 2))
    assert len(atoms) == 80
    for lift, wrong in ((0.09, False), (0.15, True)):
        calculator = load_calculator("emt")._replace(make=Double(lift))
        assert refine(atoms, atoms, calculator, 10.0, 1, True).wrong_minimum is wrong


def test_refining_counts_what_it_computes():
    """From a minimum one step is needed; a limit that is too low is not called converged."""
    emt = load_calculator("emt")
    atoms = alloy()
    done = refine(atoms, atoms, emt, 0.05, 200, True)
    again = refine(atoms, done.atoms, emt, 0.05, 200, True)
    assert again.with_start.steps == 1 and again.without == done.without._replace(
        seconds=again.without.seconds
    )
    short = refine(atoms, done.atoms, emt, 0.05, 2, True)
    assert not short.without.converged and short.without.steps == 3
    assert short.wrong_minimum is None and short.kept == "with"
    with pytest.raises(InputError, match="does not know O"):
        refine(alloy("O"), alloy("O"), emt, 0.05, 2)
    broken = emt._replace(make=lambda: 1 / 0)
    with pytest.raises(InputError, match=r"failed \(ZeroDivisionError"):
        refine(atoms, atoms, broken, 0.05, 2)


def test_the_initial_structure_is_relaxed_only_to_compare():
    """A user's DFT is not paid for twice; where it does not converge, it begins anew as before."""
    atoms, emt = alloy(), load_calculator("emt")
    end = refine(atoms, atoms, emt, 0.05, 200).atoms
    result = refine(atoms, end, emt, 0.05, 200)
    assert result.without is None and result.kept == "with" and result.failure == ""
    assert result.wrong_minimum is None and result.with_start.converged
    values = record(Predicted(trajectory(), ()), 0.05, 0.1, result)
    assert values["refined"]["without_head_start"] is None
    again = refine(atoms, atoms, emt, 1e-6, 2)
    assert again.without is not None and not again.with_start.converged
    begun_again = record(Predicted(trajectory("b"), ()), 0.05, 0.1, again)
    console = Console(file=io.StringIO(), width=80)
    console.print(tables([values, begun_again], 0.05, "emt", 80)[1])
    one, other = [line for line in console.file.getvalue().splitlines() if line.strip()[:2] in ("a ", "b ")]
    assert "→" not in one and "failed" not in one and one.rstrip().endswith(" converged")
    assert "3 → 3" in other and other.rstrip().endswith("not converged")
    assert totals([values, begun_again], 0, 1.0, True)[1] == (
        "ionic steps: 4 from 2 predictions, 3 more from 1 initial structures where the prediction "
        "failed or did not converge")  # fmt: skip


def test_refining_the_cell_where_the_prediction_changed_it():
    """Both ways relax the cell and come to the same one; otherwise it stays."""
    emt, atoms = load_calculator("emt"), alloy()
    strained = atoms.copy()
    strained.set_cell(1.02 * atoms.cell.array, scale_atoms=True)
    result = refine(atoms, strained, emt, 0.01, 200, True)
    assert result.wrong_minimum is False and result.without.fmax < 0.01
    assert result.with_start.energy == pytest.approx(result.without.energy, abs=1e-3)
    assert np.abs(result.atoms.get_stress()).max() * atoms.get_volume() < 0.02
    assert type(result.atoms.calc) is SinglePointCalculator  # no model is kept for each structure
    one = Input("a", "a", Path("a"), "a", atoms)
    written = relaxed_atoms(one, trajectory(), (), result)
    np.testing.assert_array_equal(written.get_stress(), result.atoms.get_stress())
    assert np.abs(result.atoms.cell.array - atoms.cell.array).max() > 0.01
    kept = refine(atoms, atoms, emt, 0.05, 200, True)
    np.testing.assert_array_equal(kept.atoms.cell.array, atoms.cell.array)
    assert kept.without.energy > result.without.energy + 1e-3


def trajectory(name="a", n=3):
    positions = np.cumsum(np.full((n, 4, 3), 0.1), 0) + alloy().positions
    return RelaxationTrajectory(
        id=name,
        atomic_numbers=alloy().numbers,
        positions=positions,
        cells=np.repeat(alloy().cell.array[None], n, 0),
        pbc=np.ones(3, bool),
        energies=-np.arange(n, dtype=float),
        forces=np.full((n, 4, 3), 0.02),
        fixed_mask=np.array([True, False, False, False]),
    )


def test_record_and_tables():
    """Converged only below fmax; tables stay short; JSON holds no NaN."""
    path = trajectory()
    fmax = 0.02 * np.sqrt(3)
    flags = (Flag("energy rises", "by 3 meV/atom"),)
    assert record(Predicted(path, ()), fmax + 1e-9, 0.1, None)["converged"]
    assert not record(Predicted(path, ()), fmax - 1e-9, 0.1, None)["converged"]
    legs = Leg(9, -1.0, 0.01, True, 0.3), Leg(3, -1.0, 0.01, True, 0.1)
    values = record(Predicted(path, flags), 0.05, 0.1, Refined(*legs, False, alloy(), "with"))
    assert values["energy_change_per_atom"] == -0.5
    assert values["largest_displacement"] == pytest.approx(0.2 * np.sqrt(3))
    json.dumps(values, allow_nan=False)
    many = [values | {"name": f"s{k}"} for k in range(MAX_ROWS + 7)]
    first, second = tables(many, 0.05, "emt")
    assert first.row_count == second.row_count == MAX_ROWS
    assert len(tables(many, 0.05, None)) == 1
    assert all(column.header != "seconds" for column in first.columns)
    lines = totals(many, 2, 3.0, True, True)
    assert "(0.10 s each to predict, compiling included)" in lines[0]
    assert "2 failed" in lines[0] and "7 of them not shown" in lines[0]
    unrefined = [values, {k: v for k, v in values.items() if k != "refined"}]
    assert "1 of them could not be refined; 1 failed" in totals(unrefined, 2, 3.0, True)[0]
    n = len(many)
    assert f"{9 * n} without and {3 * n} with" in lines[1] and "+67 %" in lines[1]
    assert "wrong minima: 0" in lines[1]
    assert flag_lines(many) == [f"{n} structures: energy rises: by 3 meV/atom"]
    assert flag_lines(many[:1]) == ["s0: energy rises: by 3 meV/atom"]


@pytest.mark.parametrize("committee", [False, True])
@pytest.mark.parametrize("width", [80, 100, 200])
def test_tables_keep_names_and_flags(width, committee):
    """Of a terminal of 80 columns, too, where flags go below names."""
    flags = tuple(Flag(name, "so") for name in ("forces do not fall", "constraints ignored", "density"))
    path = dataclasses.replace(trajectory(), energies=np.array([0.0, -1.0, -2000.0]))
    spread = Spread(3, 0.0041, 0.012, 0.1, 0.01) if committee else None
    long = "candidate-of-a-screening-with-a-name-of-many-words"
    records = [
        record(Predicted(path, found, spread), 0.05, 0.1, None)
        | {"name": name, "cell_relaxed": True, "volume_first": 9.0, "volume_last": 10.0}
        for name, found in (("mp-1234567-slab-111", flags), ("mp-1234567-slab-100", flags[:1]), ("b", ()))
    ]
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(*tables(records, 0.05, None, width))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    for word, count in (("mp-1234567-slab-111", 1), ("mp-1234567-slab-100", 1), ("density", 1),
                        ("constraints ignored", 1), ("forces do not fall", 2)):  # fmt: skip
        assert text.count(word) == count, text
    assert "+11.1" in text and "yes" in text and "-500000.0" in text
    assert ("± 4.1" in text or "± E" in text) == committee
    # A name too long for that is on several lines, whole.
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(*tables([records[0] | {"name": long}], 0.05, None, width))
    assert long in "".join(line.split()[0] for line in console.file.getvalue().splitlines() if line.strip())


def test_pipes_are_wide(capsys):
    """In a SLURM log no column loses its numbers."""
    assert result_console().width == WIDE


def test_the_bar_says_what_it_waits_for(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with bar("structures", 3, "compiling…") as advance:
        before = capsys.readouterr().err
        advance(1)
    assert "compiling…" in before and "structures" not in before
    assert "structures" in capsys.readouterr().err


def test_path_curves():
    path = trajectory()
    curves = path_curves(path)
    assert curves["times"].tolist() == [0, 0.5, 1]
    np.testing.assert_allclose(curves["energies"], [0, -250, -500])
    np.testing.assert_allclose(curves["largest"], np.array([0, 0.1, 0.2]) * np.sqrt(3))
    np.testing.assert_allclose(curves["mean"], curves["largest"])
    held_all = path_curves(dataclasses.replace(path, fixed_mask=np.ones(4, bool)))
    assert held_all["largest"].tolist() == held_all["mean"].tolist() == [0, 0, 0]


def test_predict_names_the_flags(model, tmp_path, monkeypatch, capsys):
    """What relax flags, predict does not keep to itself."""
    monkeypatch.chdir(tmp_path)
    ase.io.write("a.extxyz", alloy())
    monkeypatch.setattr("relaxnet_jax.trust.MIN_CONTACT", 1.2)
    command = ["predict", "a.extxyz", "--model", str(model[1]), "--frames", "3"]
    assert cli.main(command) == 2 and not Path("a-path.extxyz").exists()
    assert "unusable, atoms too close: " in capsys.readouterr().err
    monkeypatch.setattr("relaxnet_jax.trust.MIN_CONTACT", 0.1)
    monkeypatch.setattr("relaxnet_jax.trust.MAX_RISE", -10.0)
    assert cli.main(command) == 0
    assert "energy rises: " in capsys.readouterr().out
    # ASE would read POSCAR-relaxed.extxyz as a POSCAR: the path is called by its folder.
    ase.io.write("POSCAR", alloy(), format="vasp")
    assert cli.main(["predict", "POSCAR", *command[2:]]) == 0
    assert len(ase.io.read(f"{tmp_path.name}-path.extxyz", ":")) == 3
    assert is_poscar(Path("x/CONTCAR-3")) and not is_poscar(Path("a"))
