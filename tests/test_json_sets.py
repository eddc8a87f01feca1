"""JSON of the ALIGNN-FF set and of MPtrj, as their files are laid out."""

import dataclasses
import functools
import gzip
import io
import json
import random
import tracemalloc
import zipfile
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

from relaxnet_jax.data import RelaxationTrajectory, SkippedRelaxation, import_files, json_stream
from relaxnet_jax.data import read_relaxations as read_file
from relaxnet_jax.data.json_sets import json_layout
from relaxnet_jax.data.json_stream import JsonDamageError, items
from relaxnet_jax.data.quality.checks import Limits, check_store
from relaxnet_jax.data.store import TrajectoryStore
from relaxnet_jax.errors import InputError

KILOBAR = 0.1 / 160.21766208  # eV/Å³


@functools.cache
def steps(seed, n=3):
    """A compressed, rattled crystal with EMT's labels: n ionic steps."""
    rng, images = np.random.default_rng(seed), []
    for k in range(n):
        atoms = bulk("Cu", a=3.4 + 0.05 * k, cubic=True)
        atoms.symbols[1] = "Au"
        atoms.positions += 0.05 / (k + 1) * rng.normal(size=(4, 3))
        atoms.calc = EMT()
        labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(),
                  "stress": atoms.get_stress()}  # fmt: skip
        atoms.calc = SinglePointCalculator(atoms, **labels)
        images.append(atoms)
    return images


def kilobars(atoms):
    """Stress as VASP prints it: kB, (3, 3), pressure positive."""
    return (-atoms.get_stress(voigt=False) / KILOBAR).tolist()


def alignn(jid, atoms, /, cartesian=False, **changes):
    coords = atoms.positions if cartesian else atoms.get_scaled_positions(wrap=True)
    record = {
        "jid": jid,
        "atoms": {"lattice_mat": atoms.cell.tolist(), "coords": coords.tolist(),
                  "elements": list(atoms.symbols), "abc": [0, 0, 0], "angles": [90, 90, 90],
                  "cartesian": cartesian, "props": [""] * len(atoms)},
        "total_energy": atoms.get_potential_energy() / len(atoms),
        "forces": atoms.get_forces().tolist(),
        "stresses": kilobars(atoms),
    }  # fmt: skip
    return {key: value for key, value in (record | changes).items() if value is not ...}


def mptrj(atoms, **changes):
    sites = [
        {"species": [{"element": s, "occu": 1}], "abc": abc.tolist(), "xyz": xyz.tolist(),
         "label": s, "properties": {"magmom": -0.0}}
        for s, abc, xyz in zip(atoms.symbols, atoms.get_scaled_positions(wrap=True), atoms.positions)
    ]  # fmt: skip
    energy = atoms.get_potential_energy()
    record = {
        "structure": {"@module": "pymatgen.core.structure", "@class": "Structure", "charge": 0,
                      "lattice": {"matrix": atoms.cell.tolist(), "a": 3.4}, "sites": sites},
        "uncorrected_total_energy": energy, "corrected_total_energy": energy - 2.0,
        "energy_per_atom": energy / len(atoms), "ef_per_atom": 0.1, "magmom": None, "bandgap": 0.0,
        "force": atoms.get_forces().tolist(), "stress": kilobars(atoms), "mp_id": "mp-1",
    }  # fmt: skip
    return {key: value for key, value in (record | changes).items() if value is not ...}


def save(path, content):
    data = json.dumps(content).encode()
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as out:
            out.writestr("id_prop.json", data)
    else:
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(path):
    return list(read_file(path))


def same(trajectory, images, id):
    assert isinstance(trajectory, RelaxationTrajectory), trajectory
    assert (trajectory.id, trajectory.group, trajectory.formula) == (id, "AuCu3", "AuCu3")
    np.testing.assert_array_equal(trajectory.atomic_numbers, images[0].numbers)
    close = {"rtol": 0, "atol": 1e-12}
    np.testing.assert_allclose(trajectory.cells, [a.cell.array for a in images], **close)
    energies = [a.get_potential_energy() for a in images]
    np.testing.assert_allclose(trajectory.energies, energies, **close)
    np.testing.assert_allclose(trajectory.forces, [a.get_forces() for a in images], **close)
    np.testing.assert_allclose(trajectory.stresses, [a.get_stress() for a in images], **close)
    shifts = (trajectory.positions - [a.positions for a in images]) @ np.linalg.inv(
        trajectory.cells
    )
    np.testing.assert_allclose(shifts, np.round(shifts), atol=1e-9)
    # Unwrapped, though atoms near 0 were wrapped into the cell.
    np.testing.assert_array_equal(np.round(shifts), np.round(shifts[:1]).repeat(len(images), 0))
    assert not trajectory.fixed_mask.any() and trajectory.pbc.all()


@pytest.mark.parametrize("name", ["db.json", "db.json.gz", "db.json.zip"])
@pytest.mark.parametrize("chunk", [1 << 20, 50])
def test_alignn(tmp_path, monkeypatch, name, chunk):
    """Records in any order; per atom times atoms; kB with VASP's sign."""
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    sets = {"JVASP-39_main": steps(0), "JVASP-7_main": steps(1, 12)}
    records = [
        alignn(f"{run}-{3 * k}", atoms, cartesian=k % 2 == 1)
        for run, images in sets.items()
        for k, atoms in enumerate(images)
    ]
    random.Random(0).shuffle(records)
    path = save(tmp_path / name, records)
    found = {trajectory.id: trajectory for trajectory in read(path)}
    assert sorted(found) == sorted(sets)
    for run, images in sets.items():
        same(found[run], images, run)
    # Compressed: ASE's stress is negative.
    assert found["JVASP-39_main"].stresses[0, 0] < -0.05


@pytest.mark.parametrize(
    "ids",
    [
        [{"jid": "JVASP-39-1"}, {"jid": "JVASP-39-2"}, {"jid": "JVASP-39-10"}],
        [{"jid": "JVASP-39"}] * 3,
        [{"jid": "JVASP-39", "step": k} for k in range(3)],
        [{"jid": "JVASP-39", "id": f"JVASP-39-{k}"} for k in range(3)],
    ],
)
def test_alignn_ids(tmp_path, ids):
    """A plain jid is a material, not step 39 of "JVASP"."""
    images = steps(2)
    records = [alignn("", a, **id) for id, a in zip(ids, images)]
    (trajectory,) = read(save(tmp_path / "a.json", records))
    same(trajectory, images, "JVASP-39")


@pytest.mark.parametrize("name", ["MPtrj.json", "MPtrj.json.gz"])
@pytest.mark.parametrize("chunk", [1 << 20, 50])
def test_mptrj(tmp_path, monkeypatch, name, chunk):
    """Calculations of a material apart, steps in numerical order, gaps allowed."""
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    first, second, third = steps(3, 12), steps(4), steps(5)
    frames = {f"mp-1-1-{k}": mptrj(a) for k, a in enumerate(second)}
    frames |= {f"mp-1-0-{7 * k}": mptrj(a) for k, a in reversed(list(enumerate(first)))}
    other = {f"mvc-2-0-{k}": mptrj(a, stress=None if k else kilobars(a))
             for k, a in enumerate(third)}  # fmt: skip
    a, b, c = read(save(tmp_path / name, {"mp-1": frames, "mvc-2": other}))
    same(a, second, "mp-1-1")
    same(b, first, "mp-1-0")
    assert {t.source for t in (a, b, c)} == {name} and (c.id, c.n_frames, c.stresses) == ("mvc-2-0", 3, None)


def test_mptrj_names_the_material(tmp_path):
    """Where it is another task than the one that was run."""
    content = {"mp-1": {f"mp-12-0-{k}": mptrj(a) for k, a in enumerate(steps(4))}}
    (found,) = read(save(tmp_path / "a.json", content))
    same(found, steps(4), "mp-1/mp-12-0")


@pytest.mark.parametrize("layout", ["mptrj", "alexandria"])
def test_energies_of_different_materials_are_compared(tmp_path, layout):
    """Of one collection, whose materials do not tell what an energy is: one that is wrong is found."""
    content = {}
    for k in range(8):
        images = []
        for atoms in steps(k):
            labels = atoms.calc.results | {"energy": atoms.get_potential_energy() - 80.0 * (k == 5)}
            images.append(atoms.copy())
            images[-1].calc = SinglePointCalculator(images[-1], **labels)
        runs = {f"mp-{k}-0-{i}": mptrj(a) for i, a in enumerate(images)}
        content[f"mp-{k}"] = runs if layout == "mptrj" else [alexandria(images)]
    path = save(tmp_path / "a.json", content)
    import_files([path], tmp_path / "out.h5")
    with TrajectoryStore(tmp_path / "out.h5") as store:
        report = check_store(store, Limits())
    assert report.energy_unjudged == 0
    assert [f.id for f in report.findings if f.reason == "energy"] == ["mp-5-0"]


NO_MATCH = "number, order or species of atoms change"
ALIGNN_FAULTS = {
    "energy": ({"total_energy": ...}, "-1: no total_energy: add it"),
    "null": ({"total_energy": None}, "-1: float() argument"),
    "per cell": ({"total_energy": -250.0}, "-250 eV per atom is impossible"),
    "nan": ({"total_energy": float("nan")}, "frame 1, energies: not a finite number"),
    "jump": ({"total_energy": 50.0}, "energies: 2"),
    "forces": ({"forces": [[0, 0, 0]]}, "-1: forces: shape (1, 3) instead of (4, 3)"),
    "ragged": ({"forces": [[0, 0], [0]]}, "-1: forces: not all numbers"),
    "text": ({"forces": "none"}, "-1: forces: not all numbers"),
    "stress": ({"stresses": [1, 2, 3]}, "-1: stresses: shape (3,) instead of (3, 3)"),
    "atoms": ({"atoms": 5}, "-1: no elements: add it"),
    "inf": ({"forces": [[float("inf"), 0, 0]] * 4}, "frame 1, forces: not a finite number"),
    "twin": ({"jid": "JVASP-2-0"}, "JVASP-2-0: ionic step occurs twice"),
    "lone": ({"jid": "JVASP-3-0"}, "a single frame"),
}  # fmt: skip


@pytest.mark.parametrize("fault", ALIGNN_FAULTS)
def test_bad_record_of_alignn(tmp_path, fault):
    """It costs its own relaxation, by name and reason; the rest goes on."""
    changes, reason = ALIGNN_FAULTS[fault]
    records = [alignn(f"JVASP-1-{k}", a) for k, a in enumerate(steps(0))]
    records += [alignn("JVASP-2-0", steps(1)[0]), alignn("JVASP-2-1", steps(1)[1], **changes)]
    records += [alignn(f"JVASP-9-{k}", a) for k, a in enumerate(steps(2))]
    found = read(save(tmp_path / "a.json", records))
    same(found[0], steps(0), "JVASP-1")
    same(found[-1], steps(2), "JVASP-9")
    skipped = [item for item in found if isinstance(item, SkippedRelaxation)]
    assert skipped[0].id == "JVASP-2" and len(found) == 2 + len(skipped)
    assert any(reason in item.reason for item in skipped), skipped
    assert all("\n" not in item.reason for item in skipped)


def test_bad_atoms(tmp_path):
    images = steps(1)
    for field, value, reason in (
        ("elements", ["Cu", "Qq", "Cu", "X"], "elements Qq, X: unknown"),
        ("elements", ["Au", "Cu", "Cu", "Cu"], NO_MATCH),
        ("elements", [], "no atoms"),
        ("cartesian", "no", "cartesian: 'no': give true or false"),
        ("lattice_mat", np.zeros((3, 3)).tolist(), "frame 1, cells: volume 0"),
        ("coords", [[0, 0, 0]] * 4, "at one point"),
    ):
        bad = alignn("JVASP-2-1", images[1])
        bad["atoms"][field] = value
        good = [alignn(f"JVASP-1-{k}", a) for k, a in enumerate(images)]
        path = save(tmp_path / "a.json", [*good, alignn("JVASP-2-0", images[0]), bad, 7, {}])
        first, second, kept, skipped = read(path)
        assert (first.id, second.id) == ("record 5", "record 6") and "no jid" in first.reason
        assert kept.n_frames == 3 and skipped.id == "JVASP-2" and reason in skipped.reason


MPTRJ_FAULTS = {
    "energy": ({"uncorrected_total_energy": ...}, "no uncorrected_total_energy: add it"),
    "force": ({"force": None}, "force: shape () instead of (4, 3)"),
    "stress": ({"stress": [[1, 2, 3]]}, "stress: shape (1, 3) instead of (3, 3)"),
    "structure": ({"structure": None}, "no lattice: add it"),
    "sites": ({"structure": {"lattice": {"matrix": []}, "sites": [{}]}}, "no species: add it"),
    "empty": ({"structure": {"lattice": {"matrix": []}, "sites": []}}, "no atoms"),
    "shared": ({"structure": {"lattice": {}, "sites": [{"species": [{"element": "Cu", "occu": 0.5}]}]}},
               "a site is shared or empty"),
}  # fmt: skip


@pytest.mark.parametrize("fault", MPTRJ_FAULTS)
def test_bad_frame_of_mptrj(tmp_path, fault):
    changes, reason = MPTRJ_FAULTS[fault]
    bad = {f"mp-2-0-{k}": mptrj(a, **(changes if k else {})) for k, a in enumerate(steps(1))}
    bad |= {"mp-2": mptrj(steps(1)[0])}
    good = {f"mp-3-0-{k}": mptrj(a) for k, a in enumerate(steps(2))}
    content = {"mp-1": {"mp-1-0-0": mptrj(steps(0)[0])}, "mp-2": bad, "mp-4": {}, "mp-3": good}
    lone, nameless, skipped, none, kept = read(save(tmp_path / "a.json", content))
    assert lone == ("mp-1-0", "a single frame: a relaxation needs two or more")
    assert nameless == ("mp-2", "no ionic step in its name: name it mp-1234-0-3")
    assert skipped.id == "mp-2-0" and skipped.reason.startswith("mp-2-0-1: ")
    assert reason in skipped.reason
    assert none == ("mp-4", "no frames: remove it")
    same(kept, steps(2), "mp-3-0")


def alexandria(images, **changes):
    """A run, laid out as public converters read it; ``changes`` are of its second step."""
    records = []
    for k, atoms in enumerate(images):
        record = {"structure": mptrj(atoms)["structure"], "energy": atoms.get_potential_energy(),
                  "forces": atoms.get_forces().tolist(), "stress": kilobars(atoms)} | (
                      changes if k == 1 else {})  # fmt: skip
        records.append({key: value for key, value in record.items() if value is not ...})
    return {"functional": "PBE", "steps": records}


@pytest.mark.parametrize("name", ["pbe_0000.json", "pbe_0000.json.gz"])
def test_alexandria(tmp_path, name):
    """Each run of a material is a relaxation, without stresses."""
    content = {"agm1": [alexandria(steps(1, 12)), alexandria(steps(2))], "agm2": [alexandria(steps(3))]}
    found = read(save(tmp_path / name, content))
    for trajectory, (id, images) in zip(
        found, {"agm1-0": steps(1, 12), "agm1-1": steps(2), "agm2-0": steps(3)}.items(), strict=True
    ):
        assert trajectory.stresses is None and trajectory.source == f"{name} PBE"
        stresses = np.array([atoms.get_stress() for atoms in images])
        same(dataclasses.replace(trajectory, stresses=stresses), images, id)


ALEXANDRIA_FAULTS = {
    "null": ({"forces": [[None, 0, 0]] * 4}, "frame 1, forces: not a finite number"),
    "forces": ({"forces": ...}, "step 1: no forces: add it"),
    "energy": ({"energy": None}, "step 1: float() argument"),
}


@pytest.mark.parametrize("fault", ALEXANDRIA_FAULTS)
def test_bad_run_of_alexandria(tmp_path, fault):
    changes, reason = ALEXANDRIA_FAULTS[fault]
    bad = [alexandria(steps(1), **changes), {"functional": "PBE"}, 5, {"steps": 3}]
    content = {"agm1": [alexandria(steps(0))], "agm2": bad, "agm3": [], "agm4": 7}
    kept, *skipped = read(save(tmp_path / "a.json", content))
    assert kept.id == "agm1-0" and skipped[0].id == "agm2-0" and reason in skipped[0].reason
    assert [s.id for s in skipped[1:]] == ["agm2-1", "agm2-2", "agm2-3", "agm3", "agm4"]
    unlabelled = {"agm1": [alexandria(steps(0), forces=...)]}
    with pytest.raises(InputError, match=r"a\.json: no record has forces and energy: give a file"):
        read(save(tmp_path / "a.json", unlabelled))


def test_import(tmp_path):
    """Through the importer, beside a file of another kind, with what was left out."""
    records = [alignn(f"JVASP-{m}-{k}", a) for m in (1, 2) for k, a in enumerate(steps(m))]
    path = save(tmp_path / "a.json.gz", [*records, alignn("JVASP-5-0", steps(0)[0])])
    other = tmp_path / "b.extxyz"
    ase.io.write(other, steps(3))
    report = import_files([path, other], tmp_path / "out.h5")
    assert (report.read, report.frames) == (3, 9)
    assert [(id, why) for _, id, why in report.skipped] == [
        ("JVASP-5", "a single frame: a relaxation needs two or more")]  # fmt: skip
    with TrajectoryStore(tmp_path / "out.h5") as store:
        assert store.ids == ["JVASP-1", "JVASP-2", "b"]
        same(store[1], steps(2), "JVASP-2")


def test_other_json_goes_to_ase(tmp_path):
    """ASE's own database is read as before; what nobody knows is refused in one line."""
    path = tmp_path / "frames.json"
    ase.io.write(path, steps(0))
    assert json_layout(path) is None
    (trajectory,) = read(path)
    assert (trajectory.id, trajectory.n_frames) == ("frames", 3)
    for content in ('{"a": 1}', "[1, 2]", "[]", "{}", "3", "", "[{", '{"a": {"b": {"c": 1}}}'):
        path.write_text(content)
        assert json_layout(path) is None
        with pytest.raises(InputError, match=r"frames\.json: ") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_no_labels(tmp_path):
    """JARVIS's sets of relaxed structures look alike but hold no ionic steps."""
    records = [
        alignn(f"JVASP-{k}", a, forces=..., total_energy=...) for k, a in enumerate(steps(0))
    ]
    with pytest.raises(InputError, match=r"a\.json: no record has forces and total_energy: give"):
        read(save(tmp_path / "a.json", records))


def test_cut_anywhere(tmp_path):
    """What is whole before the cut is read, the rest named as lost."""
    for layout in ("alignn", "mptrj"):
        if layout == "alignn":
            content = [
                alignn(f"JVASP-{m}-{k}", a) for m in range(3) for k, a in enumerate(steps(m))
            ]
        else:
            content = {f"mp-{m}": {f"mp-{m}-0-{k}": mptrj(a) for k, a in enumerate(steps(m))}
                       for m in range(3)}  # fmt: skip
        data = json.dumps(content).encode()
        path, counts = tmp_path / "a.json", set()
        for length in np.linspace(len(data) // 2, len(data) - 1, 25).astype(int):
            path.write_bytes(data[:length])
            found = read(path)
            whole = [item for item in found if isinstance(item, RelaxationTrajectory)]
            lost = [item for item in found if isinstance(item, SkippedRelaxation)]
            assert len(lost) == 1 and "file damaged after" in lost[0].reason
            for m, trajectory in enumerate(whole):
                same(trajectory, steps(m), f"JVASP-{m}" if layout == "alignn" else f"mp-{m}-0")
            counts.add(len(whole))
        assert counts >= {1, 2}
        packed = tmp_path / "a.json.gz"
        packed.write_bytes(gzip.compress(data)[:-9])
        with pytest.raises(InputError, match="damaged gz file"):
            read(packed)


def test_mutations(tmp_path):
    """Bytes cut, doubled or changed: relaxations, reasons or one line, never anything else."""
    rng, path = np.random.default_rng(0), tmp_path / "a.json"
    contents = (
        [alignn(f"JVASP-{m}-{k}", a) for m in range(2) for k, a in enumerate(steps(m, 2))],
        {f"mp-{m}": {f"mp-{m}-0-{k}": mptrj(a) for k, a in enumerate(steps(m, 2))} for m in (1, 2)},
        {f"agm{m}": [alexandria(steps(m, 2))] for m in (1, 2)},
    )
    outcomes = set()
    for content in contents:
        text = json.dumps(content).encode()
        for _ in range(150):
            i, length = rng.integers(len(text)), rng.choice([1, 5, 50])
            middle = [b"", text[i : i + length] * 2, rng.bytes(length)][rng.integers(3)]
            path.write_bytes(text[:i] + middle + text[i + length :])
            try:
                for item in read(path):
                    if isinstance(item, RelaxationTrajectory):
                        item.validate()
                    else:
                        assert "\n" not in item.reason and item.reason
                    outcomes.add(type(item))
            except InputError as error:
                assert "\n" not in str(error)
                outcomes.add(InputError)
    assert outcomes == {RelaxationTrajectory, SkippedRelaxation, InputError}


def test_one_material_in_memory(tmp_path):
    """A file of 12 MB is read with the memory of a few materials of 0.1 MB."""
    material = {f"mp-0-0-{k}": mptrj(a) for k, a in enumerate(steps(0, 40))}
    text = json.dumps(material)
    path, n = tmp_path / "big.json", 12_000_000 // len(text)
    with path.open("w") as file:
        file.write("{")
        for m in range(n):
            file.write(f'{", " if m else ""}"mp-{m}": {text.replace("mp-0-", f"mp-{m}-")}')
        file.write("}")
    tracemalloc.start()
    count = sum(isinstance(item, RelaxationTrajectory) for item in read_file(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == n and peak < 6_000_000, peak


def test_items():
    def run(text):
        return [tuple(item) for item in items(io.BytesIO(text))]

    text = b'\xef\xbb\xbf [1, "a]\\"" ,\n{"x": [NaN]}]\n'
    values = run(text)
    assert [value for _, value, _, _ in values][:2] == [1, 'a]"']
    assert [text[start : start + length] for _, _, start, length in values] == [
        b"1", b'"a]\\""', b'{"x": [NaN]}']  # fmt: skip
    assert run('{"é": 1}'.encode()) == [("é", 1, 7, 1)]
    assert run(b"[ ]") == run(b" {}") == []
    for bad in (b"", b" ", b"3", b"[1", b"[1,", b"[1,]", b"[1 2]", b"[1}", b'{"a"}', b"{1: 2}",
                b"[1] 2", b"[" + b"9" * 5000 + b"]", b"[" * 100_000):  # fmt: skip
        with pytest.raises(JsonDamageError, match=r"^byte \d+: "):
            run(bad)


@pytest.mark.parametrize("chunk", range(1, 9))
def test_items_across_chunks(monkeypatch, chunk):
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    values = [12345, -1.5e-10, True, 'a"\\b', {"a": [12, None]}, [], 7]
    for text in (json.dumps(values), json.dumps(dict(zip("abcdefg", values)), indent=1)):
        found = list(items(io.BytesIO(text.encode())))
        assert [item.value for item in found] == values
        for item in found:
            assert json.loads(text[item.start : item.start + item.length]) == item.value


VASP = Path(__file__).resolve().parents[2] / "shared" / "data" / "vasp"


@pytest.mark.parametrize("name", ["MoS2_monolayer", "Zr3O", "Li"])
def test_real_run_through_jarvis(tmp_path, name):
    """A real vasprun.xml as jarvis-tools makes records of it, and as our reader reads it."""
    from jarvis.io.vasp.outputs import Vasprun

    packed = VASP / f"{name}.vasprun.xml.gz"
    if not packed.is_file():
        pytest.skip(f"{packed} is not here")
    plain = tmp_path / "vasprun.xml"
    plain.write_bytes(gzip.decompress(packed.read_bytes()))
    (ours,) = read(plain)
    run = Vasprun(str(plain))
    records = [
        {"jid": f"JVASP-1_main-{k}", "atoms": structure.to_dict(), "forces": forces.tolist(),
         "stresses": stress.tolist(), "total_energy": energy / structure.num_atoms}
        for k, (structure, forces, stress, energy) in enumerate(
            zip(run.all_structures, run.all_forces, run.all_stresses, ours.energies))
    ]  # fmt: skip
    (theirs,) = read(save(tmp_path / "a.json", records))
    assert theirs.n_frames == ours.n_frames and theirs.formula == ours.formula
    for field in ("atomic_numbers", "cells", "positions", "energies", "forces", "stresses"):
        np.testing.assert_allclose(
            getattr(theirs, field), getattr(ours, field), atol=1e-9, err_msg=field
        )


def test_malformed_is_noticed_at_once(monkeypatch):
    """Not after the rest of the file, which may be large, has been taken in."""
    monkeypatch.setattr(json_stream, "_CHUNK", 100)

    class Counted(io.BytesIO):
        taken = 0

        def read(self, size=-1):
            Counted.taken += size
            return super().read(size)

    with pytest.raises(JsonDamageError, match="byte 24"):
        list(items(Counted(b'[1, {"aaaaa": [1, 2, 3, ] }' + b", 1" * 100_000 + b"]")))
    assert Counted.taken <= 1000
