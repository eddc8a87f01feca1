"""vasprun.xml, and the folders and archives it comes in."""

import bz2
import gzip
import io
import lzma
import os
import re
import tarfile
import warnings
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from test_data_import import frames, save

from relaxnet_jax.cli import main
from relaxnet_jax.console import printable
from relaxnet_jax.data import (
    SkippedRelaxation,
    TrajectoryStore,
    import_files,
    read_relaxations,
    sources,
)
from relaxnet_jax.data.sources import find_sources, relaxation_id
from relaxnet_jax.data.vasp import vasprun as reader
from relaxnet_jax.data.vasp.vasprun import read_vasprun
from relaxnet_jax.errors import InputError

KILOBAR = 0.1 / 160.21766208  # eV/Å³
SYMBOLS = ["Cu", "r ", "O "]  # VASP cuts zirconium's symbol


def varray(name, rows):
    lines = "\n".join("<v> " + " ".join(f"{x:.8f}" for x in row) + " </v>" for row in rows)
    return f'<varray name="{name}" >\n{lines}\n</varray>\n'


def energies(free, sigma0, internal):
    names = zip(("e_fr_energy", "e_wo_entrp", "e_0_energy"), (free, internal, sigma0))
    return (
        "<energy>\n" + "".join(f'<i name="{n}"> {x:.8f} </i>\n' for n, x in names) + "</energy>\n"
    )


def steps(n=3):
    """Cells, fractional positions, forces, stresses (kB), free energies of a small run."""
    rng = np.random.default_rng(2)
    cells = np.diag([4.0, 4.5, 5.0]) + 0.1 * rng.normal(size=(n, 3, 3))
    fractional = np.array([[0.02, 0, 0], [0.5, 0.5, 0], [0, 0.5, 0.5]]) + 0.005 * rng.normal(
        size=(n, 3, 3)
    )
    fractional %= 1.0  # the first atom crosses the cell's face
    return (
        cells,
        fractional,
        rng.normal(size=(n, 3, 3)),
        rng.normal(size=(n, 3, 3)),
        -10.0 - np.arange(n),
    )


def vasprun(n=3, ibrion=2, selective=None, big=10):
    """Text of a vasprun.xml laid out as VASP writes it."""
    cells, fractional, forces, stresses, free = steps(n)
    atoms = "".join(f"<rc><c>{s}</c><c>   {k}</c></rc>\n" for k, s in enumerate(SYMBOLS))
    types = "".join(
        f"<rc><c>   1</c><c>{s}</c><c> 1.0</c><c> 1.0</c><c> PAW</c></rc>\n" for s in SYMBOLS
    )
    held = ""
    if selective:
        rows = "\n".join(f'<v type="logical" > {" ".join(row)} </v>' for row in selective)
        held = f'<varray type="logical" name="selective" >\n{rows}\n</varray>\n'

    def structure(k, name=""):
        crystal = varray("basis", cells[k]) + varray("rec_basis", np.linalg.inv(cells[k]).T)
        return (f"<structure{name}>\n<crystal>\n{crystal}</crystal>\n"
                + varray("positions", fractional[k]) + held + "</structure>\n")  # fmt: skip

    calculations = ""
    for k in range(n):
        scf = f"<scstep>\n{energies(1.0, 1.0, 1.0)}</scstep>\n" + (
            f"<scstep>\n{energies(free[k] + 0.5, free[k] + 0.6, free[k] + 0.8)}</scstep>\n"
        )
        # As VASP before 5.4 has it: the other energies of the final block are not what they say.
        final = energies(free[k], -0.01, -0.02)
        eigenvalues = "<eigenvalues>\n" + "<r> 1.0 1.0 </r>\n" * big + "</eigenvalues>\n"
        calculations += (
            f"<calculation>\n{scf}{structure(k)}{varray('forces', forces[k])}"
            f'{varray("stress", stresses[k])}{final}{eigenvalues}<dos>\n<i name="efermi"> 1 </i>'
            f"\n</dos>\n</calculation>\n"
        )
    initial, last = structure(0, ' name="initialpos"'), structure(n - 1, ' name="finalpos"')
    return (
        '<?xml version="1.0" encoding="ISO-8859-1"?>\n<modeling>\n<incar>\n'
        f'<i type="int" name="IBRION">     {ibrion}</i>\n</incar>\n<atominfo>\n'
        f'<array name="atoms" >\n<set>\n{atoms}</set>\n</array>\n<array name="atomtypes" >\n<set>\n'
        f"{types}</set>\n</array>\n</atominfo>\n{initial}{calculations}{last}</modeling>\n"
    ).encode()


def read(text, **options):
    return read_vasprun(io.BytesIO(text), "run", **options)


def refused(text):
    with pytest.raises(InputError) as caught:
        read(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("chunk", [1 << 20, 700])
def test_fields(chunk, monkeypatch):
    """All of it in one chunk, and with every tag across a boundary somewhere."""
    monkeypatch.setattr(reader, "_CHUNK", chunk)
    monkeypatch.setattr(reader, "_LONGEST_TAG", 100)
    cells, fractional, forces, stresses, free = steps()
    found = read(vasprun(big=200), source="here")
    assert (found.id, found.formula, found.source, found.n_frames) == ("run", "CuOZr", "here", 3)
    np.testing.assert_allclose(found.cells, cells, atol=1e-8)
    np.testing.assert_allclose(found.forces, forces, atol=1e-8)
    np.testing.assert_allclose(found.energies, free, atol=1e-12)
    voigt = -KILOBAR * stresses.reshape(3, 9)[:, [0, 4, 8, 5, 2, 1]]
    np.testing.assert_allclose(found.stresses, voigt, atol=1e-10)
    assert not found.fixed_mask.any() and found.pbc.all()
    inside = found.positions @ np.linalg.inv(cells)
    np.testing.assert_allclose((inside - fractional + 0.5) % 1, 0.5, atol=1e-7)
    assert np.abs(np.diff(inside, axis=0)).max() < 0.1  # unwrapped


def test_energies():
    """Of the last electronic step, moved by what VASP adds to the free energy afterwards."""
    free = steps()[-1]
    np.testing.assert_allclose(read(vasprun(), energy="sigma0").energies, free + 0.1, atol=1e-7)
    np.testing.assert_allclose(read(vasprun(), energy="internal").energies, free + 0.3, atol=1e-7)


def test_selective_dynamics():
    found = read(vasprun(selective=["FFF", "TTT", "TTT"]))
    assert found.fixed_mask.tolist() == [True, False, False]
    assert "some directions only" in refused(vasprun(selective=["FFF", "TTF", "TTT"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((b'"IBRION">     2', b'"IBRION">     0'), "IBRION=0, molecular dynamics"),
        ((b'"IBRION">     2', b'"IBRION">     6'), "IBRION=6, finite differences"),
        ((b"</incar>", b'<i type="int" name="ISIF">     4</i></incar>'), "ISIF=4 held the volume: "),
        ((b"</incar>", b'<i type="int" name="ISIF">     7</i></incar>'), "give one with ISIF 2 or 3"),
        ((b"</incar>", b'<i name="PSTRESS"> 100.0</i></incar>'), "PSTRESS=100 kB"),
        ((b"</incar>", b'<i type="int" name="IMAGES"> 4</i></incar>'), "IMAGES, a path of images"),
        ((b"</incar>", b'<i type="logical" name="ML_LMLFF"> T  </i></incar>'), "machine-learned force"),
        ((b"</incar>", b'<i type="logical" name="ML_FF_LMLFF">T</i></incar>'), "give a run with DFT only"),
        ((b"<c>Cu</c>", b"<c>Qq</c>"), "<atominfo>: elements Qq"),
        ((b"<atominfo>", b""), "no <atominfo> before the first structure"),
        ((b"</calculation>", b""), "ionic step 0: <calculation> and </calculation> do not match"),
        ((b"<calculation>", b""), "ionic step 0: <calculation> and </calculation> do not match"),
        ((b'name="forces" >\n<v>', b'name="forces" >\n'), "forces: 6 numbers in 2 rows instead of 3"),
        ((b'name="forces" >\n<v>', b'name="forces" >\n<v> 1'), "forces: 10 numbers in 3 rows"),
        ((b"</eigenvalues>", b""), "no </eigenvalues> before the next ionic step"),
        ((b"</energy>", b""), "ionic step 0: <energy> inside <energy>"),
        ((b"</structure>\n</modeling>", b"</modeling>"), "no </structure> before the end"),
    ],
)  # fmt: skip
def test_damage(change, message):
    assert message in refused(vasprun().replace(*change, 1))


@pytest.mark.parametrize("isif", range(4))
def test_isif_of_relaxations(isif):
    tag = f'<i type="int" name="ISIF">     {isif}</i></incar>'.encode()
    assert read(vasprun().replace(b"</incar>", tag)).n_frames == 3


@pytest.mark.parametrize("isif_first", [True, False])
def test_lattice_constraints(isif_first):
    """They hold a part of a cell that relaxes, and nothing of one that stays."""

    def settings(isif, flags):
        tags = [f'<i type="int" name="ISIF">     {isif}</i>',
                f'<v type="logical" name="LATTICE_CONSTRAINTS"> {flags} </v>']  # fmt: skip
        tags = "\n".join(tags if isif_first else reversed(tags))
        return vasprun().replace(b"</incar>", f"{tags}\n</incar>".encode())

    for flags in ("F F T", "T T F"):
        message = refused(settings(3, flags))
        assert message.startswith(f"LATTICE_CONSTRAINTS={flags} held part of the cell: ")
        assert read(settings(2, flags)).n_frames == 3
    assert read(settings(3, "T T T")).n_frames == 3


def test_force_field_that_is_off():
    tag = b'<i type="logical" name="ML_LMLFF"> F  </i></incar>'
    assert read(vasprun().replace(b"</incar>", tag)).n_frames == 3


def with_nelm(nelm, counts):
    """A run with so many electronic steps in its ionic steps, and NELM as VASP has it twice."""
    first, *calculations = vasprun(n=len(counts)).split(b"<calculation>")
    first = first.replace(b"</incar>", b'<i type="int" name="NELM">   %d</i></incar>' % nelm)
    first = first.replace(
        b"<atominfo>", b'<separator name="response functions" ><i type="int" name="NELM">     1</i>'
        b"</separator><atominfo>")  # fmt: skip
    for count, text in zip(counts, calculations):
        more = f"<scstep>\n{energies(1.0, 1.0, 1.0)}</scstep>\n".encode() * (count - 2)
        first += b"<calculation>" + more + text
    return first


def test_electronically_unconverged(tmp_path, capsys):
    """Noted and counted where others follow; after the last ionic step there is no minimum."""
    notes = []
    assert read(with_nelm(5, [4, 3, 4]), note=notes.append).source == "VASP" and not notes
    found = read(with_nelm(4, [4, 4, 3]), source="here", note=notes.append)
    assert notes == ["2 of 3 ionic steps ended at NELM (electronically unconverged)"]
    assert (found.n_frames, found.source, found.family) == (3, "here, steps at NELM", "here")
    message = refused(with_nelm(4, [3, 3, 4]))
    assert "the last ionic step ended at NELM (electronically unconverged)" in message
    assert "a larger NELM or another ALGO" in message
    cut = with_nelm(4, [4, 3, 3])
    for name, text in (("a", cut), ("b", cut[: cut.rindex(b"forces")]), ("c", with_nelm(4, [3, 4]))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vasprun.xml").write_bytes(text)
    out = tmp_path / "set.h5"
    assert main(["data", "import", str(tmp_path), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "2 relaxations with 5 ionic steps; 1 skipped; 1 unfinished, with their" in said.out
    assert "; 2 with electronically unconverged ionic steps (see their source)" in said.out
    assert "1 of 3 ionic steps ended at NELM" in said.err
    with TrajectoryStore(out) as store:
        assert [store[i].source for i in range(2)] == [
            "VASP, steps at NELM", "VASP, steps at NELM, unfinished",
        ]  # fmt: skip
        assert {store[i].family for i in range(2)} == {"VASP"}


def test_overflow_and_nan():
    text = vasprun()
    at = text.index(b"<v> ", text.index(b'name="forces"')) + 4
    end = text.index(b" ", at)  # of the first number
    for token, told in (
        (b"**********", "forces: '**********' is not a number"),
        (b"nan", "frame 0, forces: not a finite number"),
    ):
        assert told in refused(text[:at] + token + text[end:])


@pytest.mark.parametrize("chunk", [1 << 20, 700])
def test_cut_anywhere(chunk, monkeypatch):
    """However a file is cut: the complete steps, and a remark; or one line, if they are none."""
    monkeypatch.setattr(reader, "_CHUNK", chunk)
    monkeypatch.setattr(reader, "_LONGEST_TAG", 100)
    text = vasprun()
    whole, counts = read(text), set()
    for length in np.linspace(0, len(text) - 12, 60).astype(int):
        complete = text[:length].count(b"</calculation>")
        notes = []
        if complete < 2:
            message = refused(text[:length])
            assert message.startswith("ends ") and f"after {complete} complete ionic" in message
            continue
        found = read(text[:length], source="here", note=notes.append)
        assert found.n_frames == complete and found.source == "here, unfinished"
        assert found.family == "here" and f"truncated: {complete} complete ionic steps kept" in notes[0]
        np.testing.assert_array_equal(found.positions, whole.positions[:complete])
        np.testing.assert_array_equal(found.energies, whole.energies[:complete])
        counts.add(complete)
    assert counts == {2, 3} and whole.family == whole.source
    assert "a single ionic step" in refused(vasprun(n=1))


def test_mutations():
    """Bytes cut, doubled or changed: a relaxation or one line, never anything else."""
    rng, text = np.random.default_rng(0), vasprun()
    outcomes = set()
    for _ in range(300):
        i, length = rng.integers(len(text)), rng.choice([1, 5, 50, 500])
        middle = [b"", text[i : i + length] * 2, rng.bytes(length)][rng.integers(3)]
        try:
            found = read(text[:i] + middle + text[i + length :])
            assert np.isfinite(found.positions).all() and found.n_frames in (2, 3, 4)
            outcomes.add("read")
        except InputError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress),
                                              (".xz", lzma.compress), (".bz2", bz2.compress)])  # fmt: skip
def test_compressed(tmp_path, suffix, pack):
    folder = tmp_path / "Cu-1"
    folder.mkdir()
    file = folder / f"vasprun.xml{suffix}"
    file.write_bytes(pack(vasprun()))
    (found,) = read_relaxations(file)
    assert (found.id, found.source, found.n_frames) == ("Cu-1", "VASP", 3)
    if suffix:
        file.write_bytes(file.read_bytes()[:-20])
        with pytest.raises(InputError, match=f"damaged {suffix[1:]} file"):
            list(read_relaxations(file))


def fill(root):
    """A tree of runs: names by VASP, by a database, and by a workflow of two relaxations."""
    for name in ("a/vasprun.xml", "a/OUTCAR", "b/x/JVASP-1.vasprun.xml", "b/x/vasprun.xml.relax2",
                 "b/notes.txt"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(vasprun() if "vasprun" in name else b"text")


def test_folders(tmp_path):
    """Searched recursively; ids are paths; the OUTCAR of a run with a vasprun.xml is not read."""
    fill(tmp_path)
    found = find_sources([tmp_path])
    assert [s.id for s in found.sources] == ["a", "b/x/JVASP-1", "b/x/relax2"]
    assert found.others == 2
    lines = []
    result = import_files([tmp_path], tmp_path / "out.h5", lines.append)
    assert (result.read, result.frames, result.skipped) == (3, 9, [])
    assert lines[0].startswith("2 files in the folders ignored: not relaxation files")
    with TrajectoryStore(tmp_path / "out.h5") as store:
        assert store.ids == ["a", "b/x/JVASP-1", "b/x/relax2"]
    # Two files of one name, named one by one.
    found = find_sources(
        [tmp_path / "a" / "vasprun.xml", tmp_path / "b" / "x" / "vasprun.xml.relax2"]
    )
    assert [s.id for s in found.sources] == ["a", "b/x/relax2"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: holds no vasprun"):
        find_sources([tmp_path / "empty"])


def test_failed_attempts(tmp_path):
    """Custodian keeps them in archives beside the run: read only where they are named."""
    run = tmp_path / "runs" / "launch"
    run.mkdir(parents=True)
    (run / "vasprun.xml").write_bytes(vasprun())
    (tmp_path / "vasprun.xml").write_bytes(vasprun()[: vasprun().rindex(b"forces")])
    for name in ("error.1.tar.gz", "error.12.tar", "my_error.1.tar.gz"):
        with tarfile.open(run / name, "w:gz" if name.endswith("gz") else "w") as out:
            out.add(tmp_path / "vasprun.xml", "vasprun.xml")
    lines = []
    import_files([tmp_path / "runs"], tmp_path / "out.h5", lines.append)
    assert lines[0].startswith("2 archives of custodian's failed attempts (error.N.tar.gz) in the ")
    assert not any("not relaxation files" in line for line in lines)
    with TrajectoryStore(tmp_path / "out.h5") as store:
        assert sorted(store.ids) == ["launch", "launch/my_error.1"]
    found = find_sources([run / "error.1.tar.gz"])
    assert (len(found.sources), found.attempts) == (1, 0)
    import_files([run / "error.1.tar.gz"], tmp_path / "out.h5")
    with TrajectoryStore(tmp_path / "out.h5") as store:
        assert store[0].source == "VASP, unfinished"
    (run / "vasprun.xml").unlink()
    (run / "my_error.1.tar.gz").unlink()
    with pytest.raises(InputError, match="runs: holds no vasprun"):
        find_sources([tmp_path / "runs"])


def test_links_are_followed_and_each_folder_searched_once(tmp_path):
    fill(tmp_path / "away")
    fill(tmp_path / "runs" / "own")
    # To another place, to a folder of the tree, to one above, to itself, and to nothing.
    for name, target in (("0link", "../away"), ("1again", "own"), ("own/up", "../../runs"),
                         ("self", "self"), ("dangling", "gone")):  # fmt: skip
        (tmp_path / "runs" / name).symlink_to(target)
    found = find_sources([tmp_path / "runs"])
    ids = ["a", "b/x/JVASP-1", "b/x/relax2"]
    assert [s.id for s in found.sources] == [f"{top}/{id}" for top in ("0link", "own") for id in ids]
    assert found.closed == []


def test_folders_that_cannot_be_searched_are_named(tmp_path, monkeypatch):
    fill(tmp_path / "runs")
    real = os.scandir

    def scandir(path):
        if Path(path).name in closed:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    closed, lines = {"x"}, []
    reason = "cannot be searched (Permission denied): grant access, or name the files in it"
    result = import_files([tmp_path / "runs"], tmp_path / "out.h5", lines.append)
    assert (result.read, result.skipped) == (1, [(str(tmp_path / "runs/b/x"), "", reason)])
    assert f"{tmp_path / 'runs/b/x'}: skipped: {reason}" in lines
    closed = {"runs"}
    with pytest.raises(InputError, match=r"runs: holds no vasprun.*runs: cannot be searched \(Perm"):
        find_sources([tmp_path / "runs"])


def test_no_run_is_compared_with_all_others():
    """What there is beside each of ten thousands is looked up."""

    class Unwalkable(dict):
        def items(self):
            raise AssertionError

        __iter__ = keys = values = items

    names = [PurePosixPath(f"{name}.vasprun.xml") for name in ("1/a", "1/b", "2/a")]
    cif = PurePosixPath("2/start.cif")
    companions = sources.Companions([*names, cif, PurePosixPath("1/start.cif")])
    companions._found = {kind: Unwalkable(files) for kind, files in companions._found.items()}
    assert [companions.of(name).cif for name in names] == [None, None, cif]


@pytest.mark.parametrize(
    ("name", "id"),
    [("Au/run2/vasprun.xml.gz", "Au/run2"), ("JVASP-39.vasprun.xml", "JVASP-39"),
     ("vasprun_7.xml", "7"), ("set.tar.gz", "set"), ("x/slabs.extxyz.xz", "x/slabs")],
)  # fmt: skip
def test_ids(name, id):
    assert relaxation_id(PurePosixPath(name)) == id


def test_names_that_are_not_utf8(tmp_path, capsys):
    """Of a folder, of files and in an archive: they are told as bytes, and stored so."""
    names = [os.fsdecode(name) for name in (b"M\xfcller", b"run\xe9.traj", b"bad\xe8.vasprun.xml")]
    try:
        (tmp_path / names[0]).mkdir()
    except OSError:
        pytest.skip("file names are UTF-8 here")
    (tmp_path / names[0] / "vasprun.xml").write_bytes(vasprun())
    (tmp_path / names[2]).write_bytes(b"<modeling>")
    with tarfile.open(tmp_path / "set.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as out:
        out.add(tmp_path / names[0], arcname="Köln")
    save(tmp_path / "run.traj", frames())
    (tmp_path / "run.traj").rename(tmp_path / names[1])
    assert main(["data", "import", str(tmp_path), "--out", str(tmp_path / "out.h5")]) == 0
    said = capsys.readouterr()
    assert r"bad\xe8.vasprun.xml: skipped" in said.err and r"/bad\xe8.vasprun.xml: " in said.out
    with TrajectoryStore(tmp_path / "out.h5") as store:
        assert sorted(store.ids) == [r"M\xfcller", r"run\xe9", r"set/K\xf6ln"]
        assert r"run\xe9.traj" in [store[i].source for i in range(3)]
        assert r"run\xe9.traj" in store.metadata["files"]
        store.verify()
    assert printable("half a character: \ud83d") == r"half a character: \ud83d"


@pytest.mark.parametrize("suffix", [".zip", ".ZIP", ".tar", ".tar.gz", ".tar.xz", ".tgz", ".tbz2"])
def test_archives(tmp_path, suffix):
    tree = tmp_path / "tree"
    fill(tree)
    (tree / "a/vasprun.xml").write_bytes(vasprun()[:2000])
    (tree / "a/OUTCAR").unlink()
    archive = tmp_path / f"runs{suffix}"
    if suffix.lower() == ".zip":
        with zipfile.ZipFile(archive, "w") as out:
            for file in tree.rglob("*"):
                out.write(file, file.relative_to(tree))
    else:
        packing = {".tgz": ":gz", ".tbz2": ":bz2"}.get(suffix, suffix[4:].replace(".", ":"))
        with tarfile.open(archive, "w" + packing) as out:
            out.add(tree, arcname=".")
    cut, *whole = read_relaxations(archive)
    assert isinstance(cut, SkippedRelaxation) and cut.id == "runs/a" and "ends inside" in cut.reason
    assert [found.id for found in whole] == ["runs/b/x/JVASP-1", "runs/b/x/relax2"]
    archive.write_bytes(archive.read_bytes()[:700])
    with pytest.raises(InputError, match=r"damaged (archive|\w+ file)|holds no"):
        list(read_relaxations(archive))


def test_a_compressed_tar_is_decompressed_once(tmp_path, monkeypatch):
    """However its members lie: going back in it is beginning again."""
    names = [f"{k}/{name}" for k in (3, 1, 2, 0) for name in ("OUTCAR", "vasprun.xml", "POSCAR")]
    archive = archived(tmp_path / "runs.tgz", {name: vasprun() for name in names})
    real, backwards = gzip.GzipFile.seek, []

    def seek(file, offset, whence=0):
        backwards.append(whence == 0 and offset < real(file, 0, 1))
        return real(file, offset, whence)

    monkeypatch.setattr(gzip.GzipFile, "seek", seek)
    assert [found.id for found in read_relaxations(archive)] == [f"runs/{k}" for k in range(4)]
    assert not any(backwards)


@pytest.fixture
def small_disk():
    """No file may be longer than 64 kB."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def archived(archive, members):
    """A zip of files, or a tar, compressed as its name says."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
            for name, content in members.items():
                out.writestr(name, content)
    else:
        with tarfile.open(archive, "w:gz") as out:
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                out.addfile(member, io.BytesIO(content))
    return archive


def test_no_room_is_no_damage(tmp_path, small_disk):
    """Of the file, of the OUTCAR beside it, of the archive as a whole."""
    big, reason = bytes(1 << 20), r"no room to unpack it in .*: set TMPDIR to a larger folder"
    (tmp_path / "a.extxyz.gz").write_bytes(gzip.compress(big))
    with pytest.raises(InputError, match=rf"a\.extxyz\.gz: {reason}"):
        list(read_relaxations(tmp_path / "a.extxyz.gz"))
    runs = {"a/vasprun.xml": vasprun(), "a/OUTCAR": big, "b/vasprun.xml": vasprun()}
    skipped, whole = read_relaxations(archived(tmp_path / "runs.zip", runs))
    assert (skipped.id, whole.id) == ("runs/a", "runs/b")
    assert re.fullmatch(reason, skipped.reason)
    with pytest.raises(InputError, match=rf"runs\.tgz: {reason}"):
        list(read_relaxations(archived(tmp_path / "runs.tgz", runs)))


def test_a_refusal_of_the_system_is_no_damage(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.extxyz.gz").touch()
    monkeypatch.setitem(sources._COMPRESSED, ".gz", refuse)
    with pytest.raises(InputError, match=r"gz: cannot be read \(Permission denied\): check its perm"):
        list(read_relaxations(tmp_path / "a.extxyz.gz"))


def test_archives_in_archives_are_named(tmp_path):
    """They are not opened, and not passed over in silence."""
    inner, outer, only = (tmp_path / f"{name}.zip" for name in ("inner", "outer", "only"))
    with zipfile.ZipFile(inner, "w") as out:
        out.writestr("vasprun.xml", vasprun())
    for archive, more in ((outer, {"a/vasprun.xml": vasprun()}), (only, {})):
        with zipfile.ZipFile(archive, "w") as out:
            out.write(inner, "b/inner.zip")
            for name, content in more.items():
                out.writestr(name, content)
    skipped, read = read_relaxations(outer)
    assert skipped.id == "outer/b/inner" and "archive inside an archive: unpack it" in skipped.reason
    assert read.id == "outer/a"
    (skipped,) = read_relaxations(only)
    assert skipped.id == "only/b/inner"


def test_command(tmp_path, capsys):
    fill(tmp_path)
    out = tmp_path / "set.h5"
    (tmp_path / "b/x/vasprun.xml.relax2").write_bytes(vasprun()[: vasprun().rindex(b"forces")])
    assert main(["data", "import", str(tmp_path), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "3 relaxations with 8 ionic steps; 0 skipped; 1 unfinished, with their" in said.out
    assert "relax2: the run was killed or is still running, or its file is truncated: 2 complete" in said.err
    with TrajectoryStore(out) as store:
        assert [store[i].source for i in range(3)] == [
            "VASP", "VASP", "VASP, unfinished",
        ]  # fmt: skip
    fill(tmp_path)
    assert main(["data", "import", str(tmp_path), "--out", str(out), "--energy", "sigma0", "--overwrite"]) == 0
    assert "3 relaxations with 9 ionic steps; 0 skipped" in capsys.readouterr().out
    with TrajectoryStore(out) as store:
        np.testing.assert_allclose(store[0].energies, steps()[-1] + 0.1, atol=1e-7)


DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "vasp"
@pytest.mark.parametrize(
    "tags, source",
    [
        ({"GGA": "Pe", "LHFCALC": " T  ", "LDAU": " F  "}, "VASP GGA=PE LHFCALC"),
        ({"GGA": "--", "LDAU": ".TRUE."}, "VASP LDAU"),
        ({"METAGGA": "R2SCAN", "LUSE_VDW": "T"}, "VASP METAGGA=R2SCAN LUSE_VDW"),
        ({"METAGGA": " None"}, "VASP"),
        ({"IVDW": "  12", "PSTRESS": "  0.00000000"}, "VASP IVDW=12"),
        ({"IVDW": "   0", "IMAGES": "   0"}, "VASP"),
        ({"LSORBIT": " T  ", "GGA": "PS"}, "VASP GGA=PS LSORBIT"),
    ],
)
def test_functional(tags, source):
    """What changes the energy, of the INCAR and of the parameters VASP made of it."""
    lines = "".join(f'  <i type="string" name="{k}">{v}</i>\n' for k, v in tags.items())
    used = "".join(f'  <i type="string" name="{k}">0</i>\n' for k in tags)
    text = vasprun().replace(b"</incar>", f"{lines}</incar>\n<parameters>\n{used}</parameters>".encode())
    assert read(text).source == source


@pytest.mark.parametrize(
    "tags, source",
    [
        ({"LHFCALC": "T", "AEXX": "0.25000000", "HFSCREEN": "0.00000000"}, "VASP LHFCALC"),
        ({"LHFCALC": "T", "AEXX": "0.25000000", "HFSCREEN": "0.20000000"}, "VASP LHFCALC HFSCREEN=0.2"),
        ({"LHFCALC": "T", "AEXX": "0.33333333", "HFSCREEN": "0.20700000", "LDAU": "T"},
         "VASP LHFCALC AEXX=0.3333 HFSCREEN=0.207 LDAU"),
        ({"LHFCALC": "T", "AEXX": "********"}, "VASP LHFCALC"),
        ({"LHFCALC": "F", "AEXX": "1.00000000", "HFSCREEN": "0.20000000"}, "VASP"),
        ({"ISPIN": "     1"}, "VASP"),
        ({"ISPIN": "     2", "GGA": "PS"}, "VASP GGA=PS ISPIN=2"),
    ],
)  # fmt: skip
def test_hybrids_and_spins(tags, source):
    """By what VASP used; the mixing of hybrid functionals where it is not that of PBE0."""
    lines = "".join(f'  <i name="{k}"> {v}</i>\n' for k, v in tags.items())
    text = vasprun().replace(b"</incar>", f"</incar>\n<parameters>\n{lines}</parameters>".encode())
    found = read(text[: text.index(b"</modeling>")])
    assert found.source == source + ", unfinished"
    # Energies of what has no moments do not depend on it.
    assert found.family == source.removesuffix(" ISPIN=2")


REAL = sorted(DATA.glob("*.xml.gz"))


@pytest.mark.skipif(not REAL, reason=f"{DATA} is not here")
@pytest.mark.parametrize("file", REAL, ids=lambda f: f.name.split(".")[0])
def test_same_as_ase(file, tmp_path):
    """Every number of every ionic step, bit for bit."""
    import ase.io

    if file.name.startswith(("JVASP-39", "JVASP-42538")):
        with pytest.raises(InputError, match=r"IBRION=8|single ionic step"):
            list(read_relaxations(file))
        return
    if file.stat().st_size > 1e6:
        pytest.skip("large: ASE takes too long")
    (ours,) = read_relaxations(file)
    plain = tmp_path / "vasprun.xml"
    plain.write_bytes(gzip.decompress(file.read_bytes()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = ase.io.read(plain, index=":")
    assert len(theirs) == ours.n_frames
    for k, atoms in enumerate(theirs):
        np.testing.assert_array_equal(ours.cells[k], atoms.cell.array)
        np.testing.assert_array_equal(ours.forces[k], atoms.get_forces(apply_constraint=False))
        assert ours.energies[k] == atoms.calc.results["free_energy"]
        if ours.stresses is not None:
            np.testing.assert_array_equal(ours.stresses[k], atoms.calc.results["stress"])
        shift = (ours.positions[k] - atoms.positions) @ np.linalg.inv(atoms.cell.array)
        np.testing.assert_allclose(shift, np.round(shift), atol=1e-9)
    fixed = [i for constraint in theirs[0].constraints for i in constraint.index]
    assert np.flatnonzero(ours.fixed_mask).tolist() == sorted(fixed)


EVERY = sorted(DATA.glob("*.gz"))


def mutated(text, rng):
    """A copy with bytes cut, swapped or doubled, or with a line or a tag taken out."""
    i, j = np.sort(rng.integers(len(text), size=2))
    length = int(rng.choice([1, 10, 200, 5000]))
    kind = rng.integers(6)
    if kind == 0:
        return text[:i] + text[i + length :]
    if kind == 1:
        a, b = text[i : i + length], text[j : j + length]
        return text[:i] + b + text[i + len(a) : j] + a + text[j + len(b) :]
    if kind == 2:
        return text[: i + length] + text[i:]
    if kind == 3:
        return text[:i]
    mark = rng.choice([b"<calculation>", b"</varray>", b"<energy>", b"</modeling>", b"POSITION",
                       b"TOTEN", b"in kB", b"direct lattice", b"total charge", b"\n"])  # fmt: skip
    at = text.find(mark, i)
    at = text.find(mark) if at < 0 else at
    if at < 0:
        return text[:i] + rng.bytes(length) + text[i + length :]
    end = at + len(mark) if kind == 4 else text.find(b"\n", at + 1)
    return text[:at] + text[end:]


@pytest.mark.heavy
@pytest.mark.skipif(not EVERY, reason=f"{DATA} is not here")
@pytest.mark.parametrize("file", EVERY, ids=lambda f: f.name.removesuffix(".gz"))
def test_mutations_of_real_files(file, tmp_path):
    """100 damaged copies of each: a relaxation or one line; and no other result changes."""
    rng, text = np.random.default_rng(list(file.name.encode())), gzip.decompress(file.read_bytes())
    kind = "vasprun.xml" if "vasprun" in file.name else "OUTCAR"
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "vasprun.xml").write_bytes(vasprun())
    import_files([tmp_path], tmp_path / "alone.h5")
    with TrajectoryStore(tmp_path / "alone.h5") as store:
        alone = store[0]
    counts = {"read": 0, "refused": 0}
    for batch in range(20):
        for k in range(5):
            folder = tmp_path / f"mutant-{k}"
            folder.mkdir(exist_ok=True)
            (folder / kind).write_bytes(mutated(text, rng))
        report = import_files([tmp_path], tmp_path / "all.h5")
        assert report.read + len(report.skipped) == 6, batch
        for _, _, reason in report.skipped:
            assert "\n" not in reason and "report this" not in reason, reason
        with TrajectoryStore(tmp_path / "all.h5") as store:
            good = store[store.ids.index("good")]
            for trajectory in (store[i] for i in range(len(store))):
                trajectory.validate()
        for field in ("atomic_numbers", "positions", "cells", "energies", "forces", "stresses"):
            np.testing.assert_array_equal(getattr(good, field), getattr(alone, field))
        assert good.charges is None
        counts["read"] += report.read - 1
        counts["refused"] += len(report.skipped)
    print(file.name, counts)
    assert sum(counts.values()) == 100
