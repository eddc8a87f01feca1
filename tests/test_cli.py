"""The command line, end to end and on bad input. One tiny training run serves all tests."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ase.io
import jax
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from relaxnet_jax import __version__, cli, structure_files
from relaxnet_jax.config import load_config
from relaxnet_jax.data import default_dataset, read_relaxations
from relaxnet_jax.errors import InputError

ROOT = Path(__file__).parents[1]
MODEL_FILES = ("config.json", "model.json", "parameters.npz")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of its own for generated data."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RELAXNET_JAX_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def quickstart(cache, tmp_path_factory):
    """bin/quickstart --fast without its virtual environment: (workdir, what it printed)."""
    folder = tmp_path_factory.mktemp("cli")
    environment = os.environ | {
        "PYTHON": sys.executable,
        "JAX_PLATFORMS": "cpu",
        "EQX_ON_ERROR": "nan",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or str(cache / "xla"),
    }
    done = subprocess.run(
        ["bash", ROOT / "bin/quickstart", "--fast", "--no-install", "--workdir", "run"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout


@pytest.fixture(scope="module")
def workdir(quickstart):
    """A finished run of two epochs."""
    return quickstart[0]


@pytest.fixture
def fail(tmp_path, monkeypatch, capsys):
    """Runs a command that must fail on one line and leave nothing behind; returns the line."""
    monkeypatch.chdir(tmp_path)

    def run(*argv, words=()):
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert cli.main([str(a) for a in argv]) == 2
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("relaxnet-jax: error: ")]
        assert len(lines) == 1 and err.endswith(lines[0] + "\n"), err
        assert "Traceback" not in err and not out
        for word in words:
            assert str(word) in lines[0]
        assert sorted(tmp_path.rglob("*")) == before
        return lines[0]

    return run


def structure(symbols="CuAu", **changes):
    """An unrelaxed two-atom cell."""
    atoms = Atoms(
        symbols, scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.52]], cell=[2.8, 2.8, 3.7], pbc=True
    )
    for name, value in changes.items():
        setattr(atoms, name, value)
    return atoms


def relaxation(name, n=3, symbols="CuAu"):
    """Labelled frames of a relaxation."""
    frames = []
    for k in range(n):
        atoms = structure(symbols)
        atoms.positions[0] += 0.05 * k
        results = {"energy": -3.0 - k, "forces": np.full((len(atoms), 3), 0.1 / (k + 1))}
        atoms.calc = SinglePointCalculator(atoms, **results)
        atoms.info = {"traj_id": name, "frame": k}
        frames.append(atoms)
    return frames


def save(path, frames):
    ase.io.write(path, frames)
    return path


def train(*settings, workdir="run", config="explicit.py", extra=()):
    settings = ["train.epochs=1", *settings]
    return ["train", "--config", config, "--workdir", workdir, *extra, "--set", *settings]


# Everything works


def test_quickstart(quickstart):
    workdir, printed = quickstart
    assert "coordinate MAE" in printed and "doing nothing" in printed
    assert {p.name for p in (workdir / "model").iterdir()} == set(MODEL_FILES)
    assert {"config.json", "splits.json", "metrics.jsonl"} <= {p.name for p in workdir.iterdir()}
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) == 2
    metrics = json.loads((workdir / "eval-test" / "metrics.json").read_text())
    assert set(metrics["results"]) == {"model", "nothing", "composition"}
    for name in ("eval-test/per_frame.png", "eval-test/parity.png", "demo/trajectory.png"):
        assert (workdir / name).read_bytes().startswith(b"\x89PNG")
    for name in ("predicted", "true"):
        assert len(ase.io.read(workdir / "demo" / f"{name}.extxyz", index=":")) >= 3
    # Every command it ends with exists.
    hints = re.findall(r"^  .* (?:-m relaxnet_jax.cli) (\w+)", printed, re.M)
    assert hints == ["predict", "data"]


def test_eval_on_another_file(workdir, tmp_path, capsys):
    file = tmp_path / "mine.extxyz"
    ase.io.write(file, relaxation("a"))
    copy = shutil.copytree(workdir / "model", tmp_path / "run" / "model")
    assert cli.main(["eval", "--workdir", str(copy.parent), "--data", str(file)]) == 0
    assert (copy.parent / "eval-mine" / "metrics.json").is_file()


def test_the_data_of_a_run_have_moved(workdir, tmp_path, monkeypatch, capsys):
    """Where the run's config.json says, or --set; the model keeps the config it was exported with."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(workdir, "run", ignore=shutil.ignore_patterns("checkpoints", "eval-*", "demo"))
    shutil.copy(default_dataset(24), "staged.h5")
    config = Path("run/config.json")
    recorded = json.loads(config.read_text())

    def record(path):
        config.write_text(json.dumps(recorded | {"data": recorded["data"] | {"path": path}}))

    record("staged.h5")
    for command in ("eval", "demo"):
        assert cli.main([command, "--workdir", "run"]) == 0
        assert "has changed" not in capsys.readouterr().err
    name = json.loads(Path("run/eval-test/metrics.json").read_text())["data"]
    assert name == "staged.h5, test split"
    record("old/mine.h5")
    moved = ["--set", "data.path=staged.h5"]
    for command in ("eval", "demo"):
        assert cli.main([command, "--workdir", "run"]) == 2
        err = capsys.readouterr().err
        assert "old/mine.h5: no such data (data.path of run)" in err and "--set data.path=FILE" in err
        assert cli.main([command, "--workdir", "run", *moved]) == 0
        assert cli.main([command, "--workdir", "run", *moved, "train.epochs=3"]) == 2
        assert "--set train.epochs: the settings of a trained run are fixed" in capsys.readouterr().err
    assert cli.main(["eval", "--workdir", "run", "--data", "staged.h5", *moved]) == 2
    assert "leave it out with --data" in capsys.readouterr().err
    # Of the same ids, but not what the run began with.
    beginning = Path("run/beginning.json")
    beginning.write_text(json.dumps(json.loads(beginning.read_text()) | {"checksum": "0" * 64}))
    assert cli.main(["demo", "--workdir", "run", *moved]) == 2
    assert "staged.h5: its content is not what run started with" in capsys.readouterr().err
    record("staged.h5")
    assert cli.main(["demo", "--workdir", "run"]) == 0
    assert "staged.h5: its content has changed since the run began" in capsys.readouterr().err
    assert cli.main(["data", "emt", "--n", "3", "--seed", "5", "--out", "other.h5"]) == 0
    beginning.unlink()  # as runs of before it was written
    assert cli.main(["demo", "--workdir", "run", "--set", "data.path=other.h5"]) == 2
    assert "other.h5: has none of the" in capsys.readouterr().err


def test_predict_goes_on_past_bad_structures(workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good, later = structure(), structure("PdPt")
    bad = structure("CuO")
    ase.io.write("mixed.extxyz", [good, bad, later])
    command = ["predict", "mixed.extxyz", "--model", str(workdir), "--frames", "4"]
    assert cli.main(command) == 1
    captured = capsys.readouterr()
    assert "mixed-1" in captured.err and "never saw O" in captured.err
    assert "1 structures left out" in captured.out
    frames = ase.io.read("mixed-path.extxyz", index=":")
    assert [(f.info["traj_id"], f.info["frame"]) for f in frames] == [
        (name, k) for name in ("mixed-0", "mixed-2") for k in range(4)
    ]
    np.testing.assert_allclose(frames[0].positions, good.positions, atol=1e-7)
    assert np.isfinite(frames[-1].get_potential_energy())
    assert cli.main(command) == 2
    assert "mixed-path.extxyz: exists" in capsys.readouterr().err
    # A prediction is no label: nobody trains on it by mistake.
    assert cli.main(["data", "import", "mixed-path.extxyz", "--out", "a.h5"]) == 2
    assert "predicted by this package" in capsys.readouterr().err and not Path("a.h5").exists()


def test_write_one_structure_as_poscar(tmp_path):
    path = next(iter(read_relaxations(save(tmp_path / "a.extxyz", relaxation("a")))))
    structure_files.write_trajectories([path], tmp_path / "POSCAR.relaxed")
    final = ase.io.read(tmp_path / "POSCAR.relaxed", format="vasp")
    np.testing.assert_allclose(final.positions, path.positions[-1], atol=1e-6)


def test_import_then_train_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ase.io.write("a.extxyz", relaxation("a") + relaxation("b", n=1))
    Path("groups.csv").write_text("id,group\na,mine\n")
    assert (
        cli.main(["data", "import", "a.extxyz", "--out", "all.h5", "--groups", "groups.csv"]) == 0
    )
    captured = capsys.readouterr()
    assert "1 relaxations with 3 ionic steps; 1 skipped" in captured.out
    assert "skipped a.extxyz, b: a single frame" in captured.out
    assert "relaxnet-jax train --config explicit.py --set data.path=all.h5" in captured.out


def test_data_emt_to_a_file(tmp_path, capsys):
    out = tmp_path / "emt.h5"
    assert cli.main(["data", "emt", "--n", "3", "--seed", "5", "--out", str(out)]) == 0
    assert "3 relaxations" in capsys.readouterr().out and out.is_file()
    before = out.read_bytes()
    assert cli.main(["data", "emt", "--n", "2", "--out", str(out)]) == 2
    assert "emt.h5: exists; give another --out, or --overwrite" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert cli.main(["data", "emt", "--n", "2", "--out", str(out), "--overwrite"]) == 0
    assert "2 relaxations" in capsys.readouterr().out
    assert cli.main(["data", "emt", "--n", "2", "--overwrite"]) == 2
    assert "--overwrite: also give --out" in capsys.readouterr().err


def test_resume(workdir, tmp_path, capsys):
    run = shutil.copytree(workdir, tmp_path / "run")
    assert cli.main(["train", "--resume", "--workdir", str(run), "--set", "train.epochs=3"]) == 0
    assert "resuming after epoch 1" in capsys.readouterr().err
    epochs = [json.loads(x)["epoch"] for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert epochs == [0, 1, 2]


def test_interrupt(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("relaxnet_jax.commands.evaluate", interrupted)
    assert cli.main(["eval", "--workdir", "x"]) == 130


def test_version_and_help(capsys):
    for argv, text in ((["--version"], __version__), (["train", "--help"], "--resume")):
        with pytest.raises(SystemExit) as end:
            cli.main(argv)
        assert end.value.code == 0 and text in capsys.readouterr().out


def test_help_starts_without_jax():
    code = "import sys, relaxnet_jax.cli as c; c.build_parser(); sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_module_is_the_command():
    argv = [sys.executable, "-m", "relaxnet_jax", "--version"]
    said = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    assert said.split() == ["relaxnet-jax", __version__]


# Bad input: one line that names culprit and remedy, and nothing left behind


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train"], ["--config"]),
        (["train", "--resume"], ["--workdir"]),
        (["eval"], ["--workdir", "--help"]),
        (["nonsense"], ["nonsense", "eval"]),
        (["predict", "absent.cif", "--model", "m"], ["absent.cif", "no such file"]),
        (["data", "emt", "--n", "0"], ["--n 0"]),
        (["data", "emt", "--n", "x"], ["--n", "'x'"]),
        (train("model.feature=8"), ["model.feature", "model.features"]),
        (train("train.epochs=many"), ["train.epochs", "int"]),
        (train("train.epochs"), ["section.field=value"]),
        (train(config="absent.py"), ["absent.py", "explicit.py"]),
        (train("data.path=absent.h5"), ["absent.h5", "data import"]),
        (train("data.splits=(0.9,0.1,0.1)"), ["data.splits"]),
        (train(extra=["--devices", "99"]), ["--devices 99", "leave"]),
        (["train", "--resume", "--workdir", "absent"], ["absent", "--resume"]),
        (["eval", "--workdir", "absent"], ["absent", "train"]),
        (["demo", "--workdir", "absent"], ["absent"]),
        (["data", "import", "absent.extxyz", "--out", "x.h5"], ["absent.extxyz", "no such file"]),
    ],
)
def test_bad_arguments(fail, argv, words):
    fail(*argv, words=words)


def test_damaged_store(fail, tmp_path):
    (tmp_path / "bad.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + b"x" * 500)
    fail(*train("data.path=bad.h5"), words=["bad.h5", "damaged", "data import"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda r: [structure() for _ in r], ["no frame has energy and forces"]),
        (lambda r: r[:1], ["single frame"]),
        (
            lambda r: [r[0], *relaxation("a", symbols="CuAu")[1:2], _longer(r[2])],
            ["keep the number"],
        ),
        (lambda r: [_together(a) for a in r], ["atoms 0 and 1", "one point"]),
        (lambda r: [_flat(a) for a in r], ["volume", "lattice vectors"]),
    ],
)
def test_import_of_unsound_files(fail, tmp_path, make, words):
    ase.io.write(tmp_path / "bad.traj", make(relaxation("a")))
    fail("data", "import", "bad.traj", "--out", "x.h5", words=["bad.traj", *words])


def test_import_of_coordinates_that_are_no_numbers(fail, tmp_path):
    file = save(tmp_path / "bad.extxyz", relaxation("a"))
    file.write_text(re.sub(r"^Au +\S+", "Au nan", file.read_text(), flags=re.M))
    fail("data", "import", "bad.extxyz", "--out", "x.h5", words=["bad.extxyz", "not a finite"])


def _labelled(atoms, like):
    forces = np.resize(like.get_forces(), (len(atoms), 3))
    atoms.calc = SinglePointCalculator(atoms, energy=like.get_potential_energy(), forces=forces)
    atoms.info = dict(like.info)
    return atoms


def _longer(atoms):
    return _labelled(atoms + Atoms("Cu", [[1.0, 0, 0]]), atoms)


def _together(atoms):
    copy = atoms.copy()
    copy.positions[1] = copy.positions[0]
    return _labelled(copy, atoms)


def _flat(atoms):
    copy = atoms.copy()
    copy.cell[2] = copy.cell[1]
    return _labelled(copy, atoms)


def _nan(atoms):
    atoms.positions[1, 2] = np.nan
    return atoms


def _coincident(atoms):
    atoms.positions[1] = atoms.positions[0]
    return atoms


@pytest.mark.parametrize(
    ("atoms", "words"),
    [
        (structure("CuO"), ["never saw O"]),
        (_nan(structure()), ["atom 1", "finite"]),
        (_coincident(structure()), ["Å apart"]),
        (structure(cell=[[1, 0, 0], [0, 1, 0], [1, 1, 0]]), ["zero volume"]),
    ],
)
def test_predict_of_bad_structures(fail, workdir, tmp_path, atoms, words):
    ase.io.write(tmp_path / "bad.traj", atoms)
    fail("predict", "bad.traj", "--model", workdir, words=["bad.traj", "bad-0", *words])


def test_predict_of_a_file_that_is_none(fail, workdir, tmp_path):
    (tmp_path / "text.extxyz").write_text("this is no structure\n")
    fail("predict", "text.extxyz", "--model", workdir, words=["text.extxyz", "ASE"])


def test_predict_to_unusable_outputs(fail, workdir, tmp_path):
    ase.io.write(tmp_path / "two.extxyz", [structure(), structure()])
    fail("predict", "two.extxyz", "--model", workdir, "--out", "two.cif", words=["one structure"])
    fail("predict", "two.extxyz", "--model", workdir, "--out", "two.pdf", words=[".pdf", ".cif"])
    fail("predict", "two.extxyz", "--model", workdir, "--out", "two.extxyz", words=["also read"])
    fail("predict", "two.extxyz", "--model", workdir, "--frames", "1", words=["--frames 1"])


def test_predict_to_a_file_of_one_frame(workdir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ase.io.write("one.extxyz", structure())
    command = ["predict", "one.extxyz", "--model", str(workdir), "--frames", "4", "--out"]
    assert cli.main([*command, "one.cif"]) == 0
    assert "one.cif: the final frame\n" in capsys.readouterr().out
    monkeypatch.setattr("relaxnet_jax.committee.predict_members", None)  # not after the work
    ase.io.write("one.extxyz", [structure()] * 2)
    assert cli.main([*command, "two.cif"]) == 2 and "only one structure" in capsys.readouterr().err


def test_workdir_in_use(fail, workdir):
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    fail(*train(workdir=str(workdir)), words=[workdir, "--resume", "--workdir"])
    fail(
        *train("model.features=16", workdir=str(workdir), extra=["--resume"]),
        words=[workdir, "is a run of another config", "--workdir"],
    )
    assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == before


def test_resume_from_a_damaged_checkpoint(fail, workdir, tmp_path):
    run = shutil.copytree(workdir, tmp_path / "run")
    for file in (run / "checkpoints" / "latest").rglob("*"):
        if file.is_file():
            file.write_bytes(b"damaged")
    fail("train", "--resume", "--workdir", "run", words=["checkpoint", "delete"])


@pytest.mark.parametrize("name", MODEL_FILES)
def test_damaged_model(fail, workdir, tmp_path, name):
    shutil.copytree(workdir / "model", tmp_path / "model")
    structure().write(tmp_path / "a.cif")
    (tmp_path / "model" / name).write_bytes(b"damaged")
    fail("predict", "a.cif", "--model", "model", words=[name, "damaged"])
    (tmp_path / "model" / name).unlink()
    fail("predict", "a.cif", "--model", "model", words=[name, "missing"])


@pytest.mark.parametrize("error", [RuntimeError("no such backend"), AssertionError()])
def test_devices_that_do_not_start(fail, monkeypatch, error):
    """JAX_PLATFORMS=cuda without a plugin is an assertion in JAX."""

    def broken():
        raise error

    monkeypatch.setattr("jax.local_device_count", broken)
    fail("eval", "--workdir", "run", words=["JAX cannot start", "unset JAX_PLATFORMS"])


def test_info_and_config(tmp_path, capsys):
    assert cli.main(["info"]) == 0
    told = capsys.readouterr().out
    assert told.count("83: H Li Be") == 3 and "2981 relaxations" in told and "relax\n" in told
    assert cli.main(["config", "explicit.py", "--set", "train.seed=7"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["train"]["seed"] == 7 and told["loss"]["errors"] == "norm"
    assert cli.main(["info", str(tmp_path)]) == 2
    assert "not a model folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ("train.seed=-1", "train.seed"),
        ("data.seed=-1", "data.seed"),
        ("data.limit=-5", "data.limit"),
        ("train.plateau_factor=0.0", "train.plateau_factor"),
        ("train.plateau_factor=2.0", "train.plateau_factor"),
        ("train.plateau_patience=-1", "train.plateau_patience"),
        ("train.weight_decay=-1.0", "train.weight_decay"),
        ("train.learning_rate=1e999", "train.learning_rate"),
        ("train.max_minutes=-1.0", "train.max_minutes"),
        ("train.early_stop_patience=0", "train.early_stop_patience"),
        ("loss.forces=-3.0", "loss.forces"),
        ("loss.stress=1e999", "loss.stress"),
        ("dynamics.rtol=0.0", "dynamics.rtol"),
        ("dynamics.atol=-1.0", "dynamics.atol"),
        ("dynamics.max_steps=0", "dynamics.max_steps"),
        ("train=5 train.epochs=3", "train.epochs: 'train' is also given as the value 5"),
        ("train.epochs=3 train.epochs={'x':1}", "train.epochs: 'epochs' is also given as the value 3"),
    ],
)
def test_values_that_make_no_sense(settings, field):
    with pytest.raises(InputError, match=re.escape(field)):
        load_config("explicit.py", settings.split())
