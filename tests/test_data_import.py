"""Reading relaxations through ASE, and importing files into a store."""

import csv
import dataclasses
import gzip
import itertools
from pathlib import Path

import ase.io
import h5py
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, fcc111
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixCartesian
from ase.md.verlet import VelocityVerlet
from ase.mep import NEB
from ase.optimize import BFGS, FIRE, LBFGS, BFGSLineSearch, MDMin, QuasiNewton
from test_data_store import assert_same, random_trajectory
from tiny import tiny_config

from relaxnet_jax.data import (
    RelaxationTrajectory,
    SkippedRelaxation,
    TrajectoryStore,
    import_files,
    read_groups,
    read_relaxations,
    write_store,
)
from relaxnet_jax.data.quality.checks import Limits, check_relaxation
from relaxnet_jax.data.quality.duplicates import first_frame, same_structure
from relaxnet_jax.data.sample import make_sample
from relaxnet_jax.data.shards import write_shards
from relaxnet_jax.data.trajectory import CALCULATOR, PREDICTED, REFINED, sound_and_unwrapped
from relaxnet_jax.errors import InputError

DATA = Path(__file__).parents[2] / "shared" / "data"


def frames(name=None, n=3, symbols="Cu3Au", labels=("energy", "forces"), **info):
    """``n`` frames of a relaxation called ``name``."""
    images = []
    for k in range(n):
        x = np.array([[0, 0, 0], [2, 2, 0], [2, 0, 2], [0, 2, 2]], float)
        x = np.resize(x, (len(Atoms(symbols)), 3)) + 0.1 * k
        atoms = Atoms(symbols, positions=x, cell=[4, 4, 4], pbc=True)
        results = {"energy": -1.0 - k, "forces": np.full(x.shape, 0.5 / (k + 1))}
        atoms.calc = SinglePointCalculator(atoms, **{key: results[key] for key in labels})
        atoms.info = {} if name is None else {"traj_id": name, "frame": k, **info}
        images.append(atoms)
    return images


def save(path, *relaxations):
    ase.io.write(path, list(itertools.chain(*relaxations)))
    return path


def read(path):
    return list(read_relaxations(path))


def test_fields(tmp_path):
    images = frames("a-1", code="QE", functional="PBE sol")
    for k, atoms in enumerate(images):
        atoms.set_constraint(FixAtoms([1, 2]))
        atoms.calc.results["stress"] = np.arange(6) + k / 2
    (traj,) = read(save(tmp_path / "a.extxyz", images))
    assert isinstance(traj, RelaxationTrajectory)
    assert (traj.id, traj.group, traj.source) == ("a-1", "AuCu3", "QE PBE sol")
    np.testing.assert_array_equal(traj.atomic_numbers, images[0].numbers)
    np.testing.assert_allclose(traj.positions, [atoms.positions for atoms in images])
    np.testing.assert_array_equal(traj.cells, np.repeat(4 * np.eye(3)[None], 3, axis=0))
    np.testing.assert_array_equal(traj.energies, [-1, -2, -3])
    # Raw: those on the fixed atoms are there.
    np.testing.assert_allclose(traj.forces[1], np.full((4, 3), 0.25))
    np.testing.assert_array_equal(traj.fixed_mask, [False, True, True, False])
    np.testing.assert_allclose(traj.stresses, [np.arange(6), np.arange(6) + 0.5, np.arange(6) + 1])
    assert traj.charges is None


@pytest.mark.parametrize("name", ["whole.extxyz", "whole.traj", "whole.xyz", "whole.db"])
def test_without_traj_id_the_file_is_one_relaxation(tmp_path, name):
    (traj,) = read(save(tmp_path / name, frames()))
    assert (traj.id, traj.n_frames, traj.source) == ("whole", 3, name)
    np.testing.assert_allclose(traj.energies, [-1, -2, -3])


def test_group_and_charges(tmp_path):
    named, parented = frames("a", group="g 1", parent="p"), frames("b", parent="p")
    for atoms in parented:
        atoms.set_initial_charges([1, -1, 0, 0])
    a, b = read(save(tmp_path / "a.extxyz", named, parented))
    assert (a.group, b.group) == ("g 1", "p")
    np.testing.assert_array_equal(b.charges, [1, -1, 0, 0])


def test_force_consistent_energy(tmp_path):
    images = frames("a")
    for atoms in images:
        atoms.calc.results["free_energy"] = atoms.calc.results["energy"] - 0.125
    (traj,) = read(save(tmp_path / "a.traj", images))
    np.testing.assert_array_equal(traj.energies, [-1.125, -2.125, -3.125])


def test_streams(tmp_path, monkeypatch):
    """The first relaxation is there before the second has been parsed."""
    path = save(tmp_path / "a.extxyz", *(frames(f"a-{k}") for k in range(5)))
    parsed = []
    real = ase.io.extxyz.read_xyz
    monkeypatch.setattr(ase.io.extxyz, "read_xyz", lambda *a: parsed.append(1) or real(*a))
    assert next(read_relaxations(path)).id == "a-0"
    assert len(parsed) == 4


def test_positions_are_unwrapped(tmp_path):
    images = frames("a")
    images[1].positions[2] += [4, 0, -4]
    images[2].positions[2] += [0, 8, 0]
    (traj,) = read(save(tmp_path / "a.extxyz", images))
    np.testing.assert_allclose(np.diff(traj.positions, axis=0), np.full((2, 4, 3), 0.1))


@pytest.mark.parametrize("name", ["slab.traj", "slab.extxyz"])
def test_slab_without_a_third_vector(tmp_path, name):
    """As ASE makes them (c = 0, pbc T T F): the same as in vacuum, to its neighbours and its checks."""
    slab = fcc111("Cu", (2, 2, 3))
    assert not slab.cell[2].any() and slab.pbc.tolist() == [True, True, False]
    slab.info.clear()
    slab.rattle(0.1, seed=0)
    slab.calc = EMT()
    BFGS(slab, trajectory=str(tmp_path / "run.traj"), logfile=None).run(fmax=0, steps=4)
    found = []
    for file, height in ((name, 0.0), ("tall.traj", 40.0)):
        images = ase.io.read(tmp_path / "run.traj", index=":")
        for k, atoms in enumerate(images):
            atoms.cell[2, 2] = height
            atoms.positions[k] += atoms.cell[0] - 2 * atoms.cell[1]
            atoms.calc = SinglePointCalculator(atoms, **atoms.calc.results)
        import_files([save(tmp_path / file, images)], tmp_path / "out.h5")
        with TrajectoryStore(tmp_path / "out.h5") as store:
            found.append(store[0])
    flat, tall = found
    np.testing.assert_array_equal(flat.cells[:, :2], tall.cells[:, :2])
    assert not flat.cells[:, 2].any() and flat.stresses is None
    np.testing.assert_allclose(flat.positions, tall.positions, atol=1e-7)
    assert np.linalg.norm(np.diff(flat.positions, axis=0), axis=-1).max() < 0.3  # unwrapped
    same = dataclasses.replace(flat, cells=tall.cells)
    assert check_relaxation(flat, Limits()) == check_relaxation(same, Limits()) != []
    assert same_structure(first_frame(flat), first_frame(tall))
    for relax_cell in (False, True):
        one, other = (make_sample(t, tiny_config(dynamics__cell="variable", dynamics__mass="unit"),
                                  relax_cell) for t in found)  # fmt: skip
        for field in ("receivers", "senders", "shifts", "reverse", "bond"):
            mine, its = (getattr(sample.structure.neighbors, field) for sample in (one, other))
            np.testing.assert_array_equal(mine, its)
        np.testing.assert_allclose(one.structure.strain, other.structure.strain, atol=1e-12)
        np.testing.assert_allclose(one.positions, other.positions, atol=1e-7)
        assert not one.stress_mask.any()


@pytest.mark.parametrize("name", ["a.extxyz", "a.traj"])
def test_gzip(tmp_path, name):
    plain = save(tmp_path / name, frames("a"), frames("b"))
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    for one, other in zip(read(plain), read(packed), strict=True):
        assert one.id == other.id
        np.testing.assert_array_equal(one.positions, other.positions)
    packed.write_bytes(packed.read_bytes()[:-30])
    with pytest.raises(InputError, match=rf"{name}\.gz: damaged gz file .*: fetch it again"):
        read(packed)


def edited(**changes):
    """A relaxation with one fault in its second frame."""
    images = frames("bad")
    for field, value in changes.items():
        if field == "info":
            images[1].info |= value
        elif field == "constraint":
            images[1].set_constraint(value)
        elif field in ("energy", "forces"):
            images[1].calc.results[field] = value
        elif field == "momenta":
            images[1].set_momenta(value)
        else:
            setattr(images[1], field, value)
            # Or ASE would not write the labels of what it takes for another structure.
            images[1].calc.atoms = images[1].copy()
    return images


def band(steps=3):
    """A path of four images, whose inner ones move, written once per step."""
    images = []
    for step in range(steps):
        images += frames("bad", n=4)
        for atoms in images[-3:-1]:
            atoms.positions[1, 0] += 0.01 * step
            atoms.calc.atoms = atoms.copy()
    for k, atoms in enumerate(images):
        atoms.info["frame"] = k
    return images


ORDER = Atoms("CuAuCu2").numbers
TWIN = np.array([[0, 0, 0], [2, 2, 0], [2, 0, 2], [4, 4, 0.0]])
FAULTS = {
    "single": (frames("bad", n=1), "a single frame: a relaxation needs two or more"),
    "atoms": (frames("bad")[:2] + frames("bad", symbols="Cu3")[2:], "frame 2: 3 atoms after 4"),
    "species": (edited(numbers=ORDER), "frame 1, atomic_numbers: order or species change"),
    "pbc": (edited(pbc=[True, True, False]), "frame 1, pbc: changes"),
    "energy": (frames("bad")[:2] + frames("bad", labels=["forces"])[2:], "frame 2: no energy:"),
    "forces": (frames("bad")[:2] + frames("bad", labels=["energy"])[2:], "frame 2: no forces:"),
    "both": (frames("bad")[:2] + frames("bad", labels=[])[2:], "no energy and no forces:"),
    "nan": (edited(energy=np.nan), "frame 1, energies: not a finite number"),
    "inf": (edited(forces=np.full((4, 3), np.inf)), "frame 1, forces: not a finite number"),
    "cell": (edited(cell=np.diag([4.0, 4, 0])), "frame 1, cells: volume 0"),
    "twin": (edited(positions=TWIN), "frame 1, positions: atoms 0 and 3 at one point"),
    "order": (frames("bad")[::-1], "frame 1 after frame 2: sort the frames"),
    "repeat": (edited(info={"frame": 0}), "frame 0 after frame 0: sort"),
    "number": (edited(info={"frame": "x"}), "frame 1, frame: 'x' is not a number"),
    "fixed": (edited(constraint=FixAtoms([0])), "frame 1, constraints: fixed atoms change"),
    "momenta": (edited(momenta=np.eye(4, 3)), "frame 1, momenta: change (molecular dynamics)"),
    "band": (band(), "frames 0 and 3 recur every 4 frames: a path of images (NEB)"),
    "partly": (edited(constraint=FixCartesian([0], (1, 0, 0))), "held in some directions only"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_relaxation_is_skipped_and_the_rest_goes_on(tmp_path, fault):
    bad, reason = FAULTS[fault]
    # .traj keeps what extxyz cannot express (a frame without the columns of the others).
    path = save(tmp_path / "a.traj", frames("a"), bad, frames("z"))
    first, skipped, last = read(path)
    assert (first.id, last.id) == ("a", "z")
    assert isinstance(skipped, SkippedRelaxation) and skipped.id == "bad"
    assert reason in skipped.reason and "\n" not in skipped.reason


def crystal(rattle=0.1):
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(rattle, seed=1)
    atoms.calc = EMT()
    return atoms


def test_molecular_dynamics_is_refused(tmp_path):
    """By what ASE says of the file, and by the momenta where it says nothing."""
    atoms = crystal()
    atoms.set_momenta(np.random.default_rng(0).normal(size=(4, 3)))
    path = tmp_path / "md.traj"
    VelocityVerlet(atoms, 2 * units.fs, trajectory=str(path), logfile=None).run(4)
    packed = tmp_path / "md.traj.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for file in (path, packed):
        with pytest.raises(InputError, match=r"md\.traj.*VelocityVerlet, molecular dynamics: give"):
            read(file)
    (skipped,) = read(save(tmp_path / "md.extxyz", ase.io.read(path, ":")))
    assert "frame 1, momenta: change (molecular dynamics): give a relaxation" in skipped.reason


@pytest.mark.parametrize("optimiser", [BFGS, BFGSLineSearch, FIRE, QuasiNewton, LBFGS])
def test_relaxations_are_no_paths(tmp_path, optimiser):
    """Nor dynamics, though one starts from a snapshot of it and keeps the momenta."""
    atoms = crystal()
    atoms.set_momenta(np.random.default_rng(0).normal(size=(4, 3)))
    path = tmp_path / "run.traj"
    optimiser(atoms, trajectory=str(path), logfile=None).run(fmax=1e-3, steps=60)
    (found,) = read(path)
    assert found.n_frames > 5


def predicted_path():
    """A path as this package predicts it."""
    start = crystal()
    n = len(start)
    return RelaxationTrajectory(
        id="0-Cu4",
        atomic_numbers=start.numbers,
        positions=np.linspace(start.positions, crystal(0.05).positions, 3),
        cells=np.repeat(start.cell.array[None], 3, axis=0),
        pbc=start.pbc,
        energies=np.array([-1.0, -2.0, -3.0]),
        forces=np.full((3, n, 3), 0.1),
        fixed_mask=np.zeros(n, bool),
        source=PREDICTED,
    )


class OwnCalculator(EMT):
    """In place of this package's, by its name."""

    name = CALCULATOR


def relaxed_from(atoms, file, calculator=EMT):
    """ASE's record of a relaxation that begins at a structure and has its ``info`` in every frame."""
    atoms.calc = calculator()
    LBFGS(atoms, trajectory=str(file), logfile=None).run(fmax=0.05)
    return ase.io.read(file, ":")


@pytest.mark.parametrize("form", ["traj", "extxyz"])
def test_predictions_are_left_out_and_what_begins_at_them_is_read(tmp_path, form):
    """By how frames are numbered, so that it is the same with files of earlier versions."""
    path = predicted_path()
    path.write(tmp_path / f"path.{form}")
    (skipped,) = read(tmp_path / f"path.{form}")
    assert skipped.reason == "was predicted by this package, not computed: leave it out"
    relaxed = path.atoms(-1)  # as relax writes it, and as it is read again
    relaxed.info = {"traj_id": "cu", "source": REFINED, "relaxnet_flags": "density"}
    ase.io.write(tmp_path / "cu-relaxed.extxyz", relaxed)
    begun = {"a": path.atoms(-1), "b": path.atoms(1), "c": ase.io.read(tmp_path / "cu-relaxed.extxyz")}
    for name, atoms in begun.items():
        images = relaxed_from(atoms, tmp_path / f"{name}.traj")
        file = tmp_path / f"{name}.{form}"
        if form == "extxyz":
            save(file, images)
        (found,) = read(file)
        assert (found.id, found.source) == (f"{name}/{images[0].info['traj_id']}", file.name)
        np.testing.assert_allclose(found.energies, [a.get_potential_energy() for a in images])
        assert found.n_frames == len(images) > 2
    files = [tmp_path / f"{name}.{form}" for name in ("path", *begun)]
    report = import_files(files, tmp_path / "all.h5")
    assert report.read == 3 and [label for _, label, _ in report.skipped] == ["0-Cu4"]


def test_energies_of_the_own_calculator_are_left_out(tmp_path):
    for name, atoms in (("a", predicted_path().atoms(-1)), ("b", crystal())):
        relaxed_from(atoms, tmp_path / f"{name}.traj", OwnCalculator)
        (skipped,) = read(tmp_path / f"{name}.traj")
        assert "was predicted by this package" in skipped.reason


def test_nudged_elastic_band_is_refused(tmp_path):
    first, path = bulk("Cu", cubic=True) * (2, 1, 1), tmp_path / "neb.traj"
    del first[0]
    last = first.copy()
    last.positions[0] -= [0, 1.8, 1.8]
    images = [first.copy() for _ in range(4)] + [last]
    for image in images:
        image.calc = EMT()
    band = NEB(images, method="improvedtangent")
    band.interpolate()
    MDMin(band, trajectory=str(path), logfile=None).run(fmax=1e-3, steps=3)
    (skipped,) = read(path)
    assert "every 5 frames: a path of images (NEB)" in skipped.reason


def test_back_and_forth_is_no_path(tmp_path):
    """A line search that goes back to where it was, and one that is stuck between two places."""
    for places in ([0, 1, 2, 0, 1.5, 0, 2.5, 3], [0, 1] * 6, [0, 0, 0, 0, 1, 1, 1, 1]):
        images = frames("a", n=len(places))
        for atoms, place in zip(images, places):
            atoms.positions = images[0].positions.copy()
            atoms.positions[1, 0] += 0.01 * place
            atoms.calc.atoms = atoms.copy()
        (found,) = read(save(tmp_path / "a.traj", images))
        assert found.n_frames == len(places)


def test_duplicate_id(tmp_path):
    one, two, again = read(save(tmp_path / "a.extxyz", frames("a"), frames("b"), frames("a")))
    assert (one.id, two.id) == ("a", "b")
    assert again.id == "a" and "id occurs again" in again.reason
    assert one.n_frames == len(frames("a"))


def test_unparsable_frame_costs_its_relaxation_only(tmp_path):
    path = save(tmp_path / "a.extxyz", frames("a"), frames("b"), frames("c"))
    lines = path.read_text().splitlines(keepends=True)
    lines[6 * 4 + 3] = lines[6 * 4 + 3].replace("0.25000000", "**********")
    path.write_text("".join(lines))
    one, skipped, last = read(path)
    assert (one.id, skipped.id, last.id) == ("a", "b", "c")
    assert "frame 4 of the file: unreadable (" in skipped.reason


def damaged(path, *relaxations, frame, comment=None):
    """A file of them with an unreadable frame, whose comment line may be another."""
    lines = save(path, *relaxations).read_text().splitlines(keepends=True)
    start = 6 * frame
    lines[start + 3] = lines[start + 3][:-10] + "**********\n"
    if comment is not None:
        lines[start + 1] = comment(lines[start + 1])
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize(("frame", "bad"), [(3, "b"), (5, "b"), (2, "a"), (0, "a"), (8, "007")])
def test_unparsable_frame_costs_the_relaxation_it_names(tmp_path, frame, bad):
    """Also where it is the first one, and where a name is read as a number."""
    images = [frames("a"), frames("b"), frames("007")]
    found = read(damaged(tmp_path / "a.extxyz", *images, frame=frame))
    assert [item.id for item in found] == ["a", "b", "7"]
    for item in found:
        is_bad = item.id == bad.lstrip("0")
        assert isinstance(item, SkippedRelaxation if is_bad else RelaxationTrajectory)
        assert not is_bad or f"frame {frame} of the file: unreadable (" in item.reason


@pytest.mark.parametrize(
    ("frame", "bad"), [(0, "a"), (1, "a"), (2, "ab"), (3, "ab"), (5, "bc"), (8, "c")]
)
def test_unparsable_frame_without_a_name_costs_both_neighbours(tmp_path, frame, bad):
    def nameless(line):
        return line.replace("traj_id=", "other=")

    images = [frames("a"), frames("b"), frames("c")]
    found = read(damaged(tmp_path / "a.extxyz", *images, frame=frame, comment=nameless))
    assert [item.id for item in found] == ["a", "b", "c"]
    assert "".join(item.id for item in found if isinstance(item, SkippedRelaxation)) == bad


def test_unparsable_frame_of_a_file_without_names(tmp_path):
    for frame in range(3):
        path = damaged(tmp_path / "whole.extxyz", frames(), frame=frame)
        (skipped,) = read(path)
        assert skipped.id == "whole" and f"frame {frame} of the file" in skipped.reason


def test_truncated_file_keeps_the_whole_relaxations(tmp_path):
    path = save(tmp_path / "a.extxyz", frames("a"), frames("b"))
    text = path.read_text()
    path.write_text(text[: text.rindex("Au") + 20])
    whole, skipped = read(path)
    assert (whole.id, skipped.id) == ("a", "b")
    assert "unreadable" in skipped.reason
    path.write_text(text + "\n \nnonsense\n" + text)
    whole, skipped = read(path)
    assert "file damaged after 6 frames" in skipped.reason and skipped.id == "b"


BAD_FILES = {
    "absent.extxyz": (None, "no such file: check the path"),
    "empty.extxyz": ("", "no frames: give a file ASE reads"),
    "words.extxyz": ("hello\nworld\n", "cannot be read"),
    "unknown.abc": ("hello\nworld\n", "cannot be read"),
    "unlabelled.xyz": ("1\n\nH 0 0 0\n1\n\nH 0 0 1\n", "no frame has energy and forces: give"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(tmp_path, name):
    content, message = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=f"{name}: {message}") as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)
    # The only file: the same error, and nothing is left behind.
    with pytest.raises(InputError, match=f"{name}: {message}"):
        import_files([tmp_path / name], tmp_path / "out.h5")
    assert [p.name for p in tmp_path.iterdir()] == ([name] if content is not None else [])


def test_folder_is_no_file(tmp_path):
    with pytest.raises(InputError, match="is a folder: name the files in it"):
        read(tmp_path)


def test_import_reports_and_goes_on(tmp_path):
    good = save(tmp_path / "good.extxyz", frames("a"), frames("short", n=1), frames("b", n=4))
    words = tmp_path / "words.extxyz"
    words.write_text("hello\nworld\n")
    more = save(tmp_path / "more.traj", frames("b"), frames("c"))
    lines = []
    report = import_files([good, words, more], tmp_path / "out.h5", report=lines.append)
    assert (report.read, report.frames) == (3, 10)
    files, ids, reasons = zip(*report.skipped)
    assert files == (str(good), str(words), str(more))
    assert ids == ("short", "", "b")
    assert "single frame" in reasons[0] and "cannot be read" in reasons[1]
    assert reasons[2] == "id occurs in another file: rename it"
    assert lines[1] == f"{good}: 2 relaxations read, 1 skipped"
    with TrajectoryStore(tmp_path / "out.h5") as store:
        assert store.ids == ["a", "b", "c"]
        assert store.n_frames.tolist() == [3, 4, 3]
        store.verify()


def test_import_of_nothing_usable(tmp_path):
    short = save(tmp_path / "short.extxyz", frames("a", n=1), frames("b", n=1))
    out = tmp_path / "out.h5"
    out.write_text("kept")
    with pytest.raises(InputError, match=r"short\.extxyz: a: a single frame.*other 1 be read"):
        import_files([short], out)
    with pytest.raises(InputError, match="no files to import"):
        import_files([], out)
    with pytest.raises(InputError, match=r"out\.h5: is also read"):
        import_files([out], out)
    assert out.read_text() == "kept"
    assert len(list(tmp_path.iterdir())) == 2


def test_groups_from_csv(tmp_path):
    table = tmp_path / "groups.csv"
    table.write_text("id,x,group\na,1,metal\n")
    path = save(tmp_path / "a.extxyz", frames("a"), frames("b"))
    import_files(path, tmp_path / "out.h5", groups=read_groups(table))
    assert TrajectoryStore(tmp_path / "out.h5").groups == ["metal", "AuCu3"]
    told = []
    table.write_text("id,group\na,metal\nzz,other\n")
    import_files(path, tmp_path / "out.h5", told.append, groups=read_groups(table))
    assert any("1 relaxations are not in it" in line for line in told)
    assert any("1 of its ids were not read" in line for line in told)
    table.write_text("id,group\nx/a,metal\n")
    with pytest.raises(InputError, match=r"names none of the 2 relaxations read .* is 'a'"):
        import_files(path, tmp_path / "none.h5", groups=read_groups(table))
    assert not (tmp_path / "none.h5").exists()
    for row in ("b\n", "b,\n", ",metal\n"):
        table.write_text("id,group\na,metal\n" + row)
        with pytest.raises(InputError, match=r"groups\.csv: line 3: no id or no group"):
            read_groups(table)
    table.write_text("id,group\na,metal\nb,metal\na,metal\n", encoding="utf-8-sig")  # as Excel
    assert read_groups(table) == {"a": "metal", "b": "metal"}
    table.write_text("id,group\na,metal\na,other\n")
    with pytest.raises(InputError, match=r"line 3: 'a' is in the groups 'metal' and 'other'"):
        read_groups(table)
    table.write_text("id,x\n")
    with pytest.raises(InputError, match=r"groups\.csv: no column group: add it"):
        read_groups(table)
    with pytest.raises(InputError, match="cannot be read as CSV"):
        read_groups(tmp_path / "absent.csv")


def test_stores_are_put_together(tmp_path):
    """With all they hold; ids that meet are left out as of other files."""
    given = [random_trajectory(k) for k in range(6)]
    write_store(tmp_path / "a.h5", given[:4])
    write_store(tmp_path / "b.h5", given[3:])
    (tmp_path / "b.hdf5.gz").write_bytes(gzip.compress((tmp_path / "b.h5").read_bytes()))
    more = save(tmp_path / "c.extxyz", frames("c"))
    files = [tmp_path / "a.h5", tmp_path / "b.hdf5.gz", more]
    report = import_files(files, tmp_path / "both.h5")
    (skipped,) = report.skipped
    assert skipped[1:] == (given[3].id, "id occurs in another file: rename it")
    with TrajectoryStore(tmp_path / "both.h5") as store:
        assert store.ids == [*(t.id for t in given), "c"]
        for i, trajectory in enumerate(given):
            assert_same(store[i], sound_and_unwrapped(trajectory))
    # Shards are not replaced by what is read from them.
    write_shards(tmp_path / "set", given, 2)
    shards = sorted((tmp_path / "set").iterdir())
    with pytest.raises(InputError, match="set: is also read: choose another output path"):
        import_files(shards, tmp_path / "set")
    assert import_files(shards, tmp_path / "other").read == 6


def test_faults_of_stores(tmp_path):
    good, short, other = random_trajectory(0), random_trajectory(1, n=1), random_trajectory(2)
    write_store(tmp_path / "a.h5", [good, short, other])
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["frames/energies"][-1] = np.nan
    one, single, unsound = read(tmp_path / "a.h5")
    assert one.id == good.id and single == (short.id, "a single frame: a relaxation needs two or more")
    assert unsound.id == other.id and unsound.reason.startswith("frame 3, energies: not a finite")
    with h5py.File(tmp_path / "vaspout.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(InputError, match=r"vaspout\.h5: HDF5, but not a store of relaxations: give an intact"):
        read(tmp_path / "vaspout.h5")


@pytest.mark.parametrize("name", ["dft_slabs", "dft_adsorbates"])
def test_real_relaxations(name):
    path = DATA / f"{name}.extxyz"
    if not path.is_file():
        pytest.skip("the DFT relaxations are not beside this checkout")
    got = list(itertools.islice(read_relaxations(path), 20))
    assert all(isinstance(item, RelaxationTrajectory) for item in got)
    with path.with_suffix(".csv").open() as file:
        rows = {row["id"]: row for row in itertools.islice(csv.DictReader(file), 40)}
    for traj in got:
        row = rows[traj.id]
        assert (traj.n_atoms, traj.n_frames) == (int(row["n_atoms"]), int(row["n_frames"]))
        moved = np.linalg.norm(traj.positions[-1] - traj.positions[0], axis=-1)
        np.testing.assert_allclose(moved.max(), float(row["disp_max"]), atol=2e-4)
        drop = (traj.energies[-1] - traj.energies[0]) / traj.n_atoms
        np.testing.assert_allclose(drop, float(row["dE_per_atom"]), atol=1e-5)
        np.testing.assert_allclose(traj.fmax[-1], float(row["fmax_last"]), atol=1e-3)
        assert traj.fixed_mask.sum() >= 1 and not traj.variable_cell
        assert np.all(moved[traj.fixed_mask] < 1e-3)
