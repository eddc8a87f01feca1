"""OUTCAR, and what lies beside a vasprun.xml: charges, fixed atoms, the initial CIF."""

import gzip
import io
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_vasp import KILOBAR, steps, vasprun

from relaxnet_jax.cli import main
from relaxnet_jax.data import TrajectoryStore, import_files, read_relaxations
from relaxnet_jax.data.sources import find_sources
from relaxnet_jax.data.vasp import outcar_lines
from relaxnet_jax.data.vasp.outcar import Outcar, read_outcar
from relaxnet_jax.errors import InputError

RULE = b" " + b"-" * 83 + b"\n"
ELECTRONS = np.array([10.123, 2.5, 4.875])
CHARGES = np.array([17.0, 12.0, 6.0]) - ELECTRONS  # of the spheres


def table(values=ELECTRONS):
    rows = "".join(
        f"{k + 1:5d}     {1:8.3f}{1:8.3f}{q - 2:8.3f}{q:8.3f}\n" for k, q in enumerate(values)
    )
    return (f" total charge     \n \n# of ion       s       p       d       tot\n{'-' * 42}\n{rows}"
            f"{'-' * 50}\ntot          1.0   1.0   1.0   {sum(values):.3f}\n \n").encode()  # fmt: skip


def vectors(cell):
    rows = np.hstack([cell, np.linalg.inv(cell).T])
    text = "      direct lattice vectors                 reciprocal lattice vectors\n"
    for row in rows:
        left, right = ("".join(f"{x:13.9f}" for x in part) for part in (row[:3], row[3:]))
        text += f" {left}  {right}\n"
    return text.encode() + b"\n  length of vectors\n"


def head(ibrion=2, selective=False):
    text = b" vasp.5.4.4 complex\n POTCAR:    PAW_PBE Cu 05Jan2001\n"
    for title, valence in (("Cu_pv 06Sep2000", "Cu: d10"), ("Zr_sv 04Jan2005", "r : 4s4p5s4d"),
                           ("O 08Apr2002", "O: s2p4")):  # fmt: skip
        text += f"   VRHFIN ={valence}      \n   TITEL  = PAW_PBE {title}      \n".encode()
    text += (b"   number of dos      NEDOS =    301   number of ions     NIONS =      3\n"
             b"   ions per type =               1   1   1\n NGX,Y,Z is equivalent\n"
             b" SYSTEM =  in kB\n  Ionic Valenz\n   ZVAL   =  17.00 12.00  6.00\n"
             b"   POMASS =   63.546; ZVAL   =   99.000    mass and valenz\n"
             b"   IBRION = %6d    ionic relax: 0-MD 1-quasi-New 2-CG\n" % ibrion)  # fmt: skip
    text += (b"   METAGGA=      F    non-selfconsistent MetaGGA calc.\n   GGA_COMPAT  = T    GGA\n"
             b"   GGA     =    PS    GGA type\n   LHFCALC =     F    Hartree Fock is set to\n"
             b"   LUSE_VDW   =     F    switch on vdW DFT\n")  # fmt: skip
    if selective:
        text += b"   using selective dynamics as specified on POSCAR\n"
    return text + vectors(steps()[0][0])


def step(k, n=3, charges=True):
    """Text of an ionic step, as VASP lays it out."""
    cells, fractional, forces, stresses, free = steps(n)
    symmetric = stresses[k] + stresses[k].T
    six = symmetric.reshape(9)[[0, 4, 8, 1, 5, 2]]  # xx yy zz xy yz zx
    text = f"{'-' * 40} Iteration {k + 1:6d}(   1)  {'-' * 39}\n".encode()
    text += b"  free energy    TOTEN  =       123.0 eV\n  energy without entropy =  123.0\n"
    text += f"{'-' * 40} Iteration {k + 1:6d}(   2)  {'-' * 39}\n".encode()
    text += b" total charge-density along one line\n" + (table(ELECTRONS - 0.5) if charges else b"")
    text += ("  in kB  " + "".join(f"{x:12.5f}" for x in six) + "\n").encode()
    text += b" VOLUME and BASIS-vectors are now :\n" + vectors(cells[k])
    text += b" POSITION                                       TOTAL-FORCE (eV/Angst)\n" + RULE
    for x, f in zip(fractional[k] @ cells[k], forces[k]):
        left, right = "".join(f"{a:13.5f}" for a in x), "".join(f"{a:14.6f}" for a in f)
        text += f"{left}    {right}\n".encode()
    text += RULE + b"    total drift:    0.0 0.0 0.0\n"
    text += (f"  FREE ENERGIE OF THE ION-ELECTRON SYSTEM (eV)\n  {'-' * 40}\n"
             f"  free  energy   TOTEN  = {free[k]:18.8f} eV\n\n"
             f"  energy  without entropy={free[k] + 0.3:18.8f}  energy(sigma->0) ="
             f"{free[k] + 0.1:18.8f}\n").encode()  # fmt: skip
    return text


def outcar(n=3, charges=True, **options):
    text = head(**options) + b"".join(step(k, n, charges) for k in range(n))
    text += b" reached required accuracy\n" + (table() if charges else b"")
    return text + b" General timing and accounting informations for this job:\n  ====\n"


def read(text, **options):
    notes = []
    found = read_outcar(io.BytesIO(text), "run", note=notes.append, **options)
    return found, notes


def refused(text, **options):
    with pytest.raises(InputError) as caught:
        read(text, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("chunk", [1 << 20, 61])
def test_fields(chunk, monkeypatch):
    """All of it in one chunk, and with every line across a boundary somewhere."""
    monkeypatch.setattr(outcar_lines, "_CHUNK", chunk)
    cells, fractional, forces, stresses, free = steps()
    found, notes = read(outcar(), source="here")
    assert notes == []
    assert (found.id, found.formula, found.source, found.n_frames) == ("run", "CuOZr", "here", 3)
    np.testing.assert_allclose(found.cells, cells, atol=1e-9)
    np.testing.assert_allclose(found.forces, forces, atol=6e-7)
    np.testing.assert_allclose(found.energies, free, atol=1e-8)
    symmetric = (stresses + stresses.swapaxes(1, 2)).reshape(3, 9)
    voigt = -KILOBAR * symmetric[:, [0, 4, 8, 5, 2, 1]]
    np.testing.assert_allclose(found.stresses, voigt, atol=1e-8)
    np.testing.assert_allclose(found.charges, CHARGES)
    assert not found.fixed_mask.any() and found.pbc.all()
    inside = found.positions @ np.linalg.inv(cells)
    np.testing.assert_allclose((inside - fractional + 0.5) % 1, 0.5, atol=1e-5)
    assert np.abs(np.diff(inside, axis=0)).max() < 0.1  # unwrapped


def test_energies():
    free = steps()[-1]
    for energy, shift in (("free", 0), ("sigma0", 0.1), ("internal", 0.3)):
        np.testing.assert_allclose(read(outcar(), energy=energy)[0].energies, free + shift)


def test_glued_numbers():
    """Negative numbers that fill their field touch the one before."""
    text = outcar()
    at = text.index(b"TOTAL-FORCE")
    row = text.index(b"\n", text.index(b"\n", at) + 1) + 1
    end = text.index(b"\n", row)
    glued = b"      0.00000      0.00000-1234.00000         0.500000-1000.250000     0.000000"
    found = next(Outcar(io.BytesIO(text[:row] + glued + text[end:])).steps())
    np.testing.assert_array_equal(found.positions[0], [0, 0, -1234])
    np.testing.assert_array_equal(found.forces[0], [0.5, -1000.25, 0])


REACHED = b"\n%s aborting loop because EDIFF is reached %s\n" % (b"-" * 24, b"-" * 40)
MISSED = b"\n%s aborting loop EDIFF was not reached (unconverged)  %s\n" % (b"-" * 24, b"-" * 28)
STOPPED = b"\n%s aborting loop because hard stop was set %s\n" % (b"-" * 24, b"-" * 39)


def saying(*words, nelm=60):
    """A run of two electronic steps in each ionic step, after which VASP says these words."""
    line = b"   NELM   = %6d;   NELMIN=  2; NELMDL= -5     # of ELM steps\n   IBRION" % nelm
    text = head().replace(b"   IBRION", line)
    for k, word in enumerate(words):
        text += step(k).replace(b" VOLUME and", word + b" VOLUME and")
    return text + b" General timing and accounting informations for this job:\n"


@pytest.mark.parametrize(
    ("words", "nelm", "count"),
    [
        ([REACHED, REACHED, REACHED], 60, 0),
        ([b"", b"", b""], 60, 0),  # nothing is said, nothing is claimed
        ([MISSED, REACHED, REACHED], 60, 1),
        ([STOPPED, b"", REACHED], 60, 2),
        ([REACHED, REACHED, MISSED], 60, None),
        ([REACHED, REACHED, b""], 60, None),
        ([REACHED, REACHED, REACHED], 2, None),  # as VASP 5 has it
        ([b"", b"", b""], 2, None),
    ],
)
@pytest.mark.parametrize("chunk", [1 << 20, 61])
def test_electronically_unconverged(words, nelm, count, chunk, monkeypatch):
    monkeypatch.setattr(outcar_lines, "_CHUNK", chunk)
    text = saying(*words, nelm=nelm)
    if count is None:
        assert "the last ionic step ended at NELM" in refused(text)
        return
    found, notes = read(text)
    assert found.source == "VASP GGA=PS" + ", steps at NELM" * bool(count)
    assert notes == [
        f"{count} of 3 ionic steps ended at NELM (electronically unconverged)"
    ] * bool(count)


def test_ionic_step_at_nelm_by_vasp_5():
    """It says that EDIFF is reached; the count of electronic steps tells."""
    text = saying(REACHED, REACHED, REACHED, nelm=3)
    again = f"{'-' * 40} Iteration      2(   3)  {'-' * 39}\n".encode()
    at = text.index(b" VOLUME", text.index(b"Iteration      2"))
    at = text.rindex(REACHED, 0, at)
    found, notes = read(text[:at] + again + text[at:])
    assert notes == ["1 of 3 ionic steps ended at NELM (electronically unconverged)"]
    assert found.family == "VASP GGA=PS"


def test_many_kinds():
    """VASP breaks the numbers of ions after ten kinds."""
    text = head().replace(b"NIONS =      3", b"NIONS =     24")
    text = text.replace(b"1   1   1\n", b"  ".join([b"2"] * 10) + b"\n    2  2\n")
    titles = b"".join(b"   TITEL  = PAW_PBE Cu 1\n" for _ in range(9))
    run = Outcar(io.BytesIO(text.replace(b"   number of dos", titles + b"   number of dos")))
    assert list(run.steps()) == [] and run.numbers.tolist() == [29, 29, 40, 40, 8, 8] + [29] * 18


def test_unfinished():
    """However an OUTCAR is cut: the complete steps, and a remark; or one line, if they are none."""
    text = outcar()
    whole = read(text)[0]
    counts = set()
    for length in np.linspace(0, len(text) - 60, 80).astype(int):
        try:
            found, notes = read(text[:length])
        except InputError as error:
            assert "a relaxation needs two or more" in str(error)
            continue
        assert f"{found.n_frames} complete ionic steps kept" in notes[0]
        assert found.source == "VASP GGA=PS, unfinished" and found.family == "VASP GGA=PS"
        np.testing.assert_array_equal(found.positions, whole.positions[: found.n_frames])
        np.testing.assert_array_equal(found.energies, whole.energies[: found.n_frames])
        np.testing.assert_allclose(found.charges, CHARGES + 0.5)  # of the last complete step
        counts.add(found.n_frames)
    assert counts == {2, 3}
    assert "a single ionic step" in refused(outcar(n=1))


CHAIN = b"""  energy of chain is (eV)         0.000000 for this image        0.000000
  tangential force (eV/A)         0.100000
  left and right image   0.900000  0.900000 A
 TANGENT                                    CHAIN-FORCE (eV/Angst)
"""
VTST = b""" NEB: forces: par spring, perp REAL, dneb     0.006448    0.010138    0.000000
 NEB: distance to prev, next image, angle between     0.067991    0.069281  158.366578
 NEB: projections on to tangent (spring, REAL)     0.006448    0.669386
"""
BROKEN = {
    "md": ((b"IBRION =      2", b"IBRION =      0"), "IBRION=0, molecular dynamics"),
    "pressure": ((b"   GGA_COMPAT", b"   PSTRESS=    100.0 pullay stress\n   GGA_COMPAT"), "PSTRESS=100 kB"),
    "isif": ((b"   GGA_COMPAT", b"   ISIF   =      8    stress and relaxation\n   GGA_COMPAT"),
             "ISIF=8 held the cell's shape"),
    "chain": ((b" POSITION", CHAIN + b" POSITION"), "a path of images (NEB): give a relaxation"),
    "vtst": ((b" POSITION", VTST + b" POSITION"), "a path of images (NEB): give a relaxation"),
    "ions": ((b"1   1   1", b"1   1   2"), "'ions per type' gives 4 atoms, NIONS 3"),
    "element": ((b"PAW_PBE Cu_pv", b"PAW_PBE Qq_pv"), None),
    "elements": ((b"PAW_PBE Cu_pv", b"PAW_PBE Ag_pv"), "TITEL gives Ag Zr O, VRHFIN Cu ? O"),
    "nameless": ((b"PAW_PBE Zr_sv", b"PAW_PBE"), "TITEL gives Cu ? O"),
    "forces": ((b"TOTAL-FORCE", b"TOTAL-FARCE"), "ionic step 0: no positions and forces"),
    "rows": ((RULE, b""), "ionic step 0: positions and forces: not 3 rows"),
    "ml": ((b"TOTAL-FORCE (eV/Angst)", b"TOTAL-FORCE (eV/Angst) (ML)"), "machine-learned"),
    "ml tag": ((b" POTCAR:", b"   ML_LMLFF = .TRUE. # trained\n POTCAR:"), "machine-learned"),
    "lattice": ((b"   GGA_COMPAT", b"   LATTICE_CONSTRAINTS = .TRUE. T .FALSE.  ! 2D\n"
                b"   ISIF   =      3    stress and relaxation\n   GGA_COMPAT"),
                "LATTICE_CONSTRAINTS=.TRUE. T .FALSE. held part of the cell"),
    "energy": ((b"  free  energy", b"  fr"), "ionic step 0: energies"),
    "entropy": ((b"  energy  without", b"  energy"), "ionic step 0: no energy"),
    "step": ((step(1), b""), "ionic step 1: the file counts it as 2"),
    "cell": ((b"direct lattice vectors", b"direct"), "volume|no lattice vectors"),
    "stress": ((b"in kB ", b"in kB *"), "ionic step 0: stress: 7 numbers|is not a number"),
    "twice": ((b" NGX,Y,Z", b"   ions per type =    3\n NGX,Y,Z"), "two runs in one file"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_damage(fault):
    import re

    change, message = BROKEN[fault]
    text = outcar()
    assert change[0] in text
    if fault == "cell":  # not in the head: there it is not needed
        at = text.index(b"VOLUME")
        text = text[:at] + text[at:].replace(*change, 1)
        assert "ionic step 0: no lattice vectors" in refused(text)
        return
    text = text.replace(*change, 1)
    if message is None:
        assert read(text)[0].formula == "CuOZr"  # the other line has it
    else:
        assert re.search(re.escape(message).replace(r"\|", "|"), refused(text))


@pytest.mark.parametrize("isif", range(4))
def test_isif_of_relaxations(isif):
    line = b"   ISIF   = %6d    stress and relaxation\n   GGA_COMPAT" % isif
    assert read(outcar().replace(b"   GGA_COMPAT", line))[0].n_frames == 3


@pytest.mark.parametrize(
    ("incar", "isif"),
    [(b"LATTICE_CONSTRAINTS = F F T", 2), (b"LATTICE_CONSTRAINTS = 3*.TRUE.  # not F", 3),
     (b"ML_LMLFF = .FALSE.  # T", 3)],
)  # fmt: skip
def test_settings_that_hold_nothing(incar, isif):
    line = b"   %s\n   ISIF   = %6d    stress and relaxation\n   GGA_COMPAT" % (incar, isif)
    assert read(outcar().replace(b"   GGA_COMPAT", line))[0].n_frames == 3


def test_relaxation_by_a_build_with_vtst():
    """It says of every run that it runs the NEB, whose parameters it lists."""
    said = b" VTST: version 3.2, (02/03/18)\n CHAIN: Read ICHAIN            0\n" \
           b" CHAIN: Running the NEB\n NEB:        SPRING         -5.000000\n"  # fmt: skip
    assert read(outcar().replace(b" POTCAR:", said + b" POTCAR:", 1))[0].n_frames == 3


def test_overflow_and_reciprocal():
    text = outcar()
    at = text.index(b"TOTAL-FORCE")
    at = text.index(b"\n", text.index(b"\n", at) + 1) + 1
    message = refused(text[:at] + b"*************" + text[at + 13 :])
    assert "positions and forces: '*************' is not a number" in message
    at = text.index(b"direct lattice vectors", text.index(b"VOLUME"))
    at = text.index(b"4.", at)
    assert "reciprocal lattice vectors disagree" in refused(text[:at] + b"5" + text[at + 1 :])


def test_charges_table():
    assert read(outcar(charges=False))[0].charges is None
    text = outcar()
    at = text.rindex(b"10.123")
    found, notes = read(text[:at] + b"******" + text[at + 6 :])
    assert found.charges is None and "charges left out" in notes[0] and "'******'" in notes[0]
    at = text.rindex(b"    2     ")
    found, notes = read(text[:at] + text[text.index(b"\n", at) + 1 :])
    assert found.charges is None and len(notes) == 1
    found, notes = read(text.replace(b" 17.00 12.00", b" 17.00", 1))
    assert found.charges is None and "2 core charges ZVAL for 3 kinds of atoms" in notes[0]


def test_charges_are_net_charges_for_ase():
    """Positive where electrons are missing, in e; VASP's table counts electrons."""
    found = read(outcar())[0]
    np.testing.assert_allclose(found.atoms().get_initial_charges(), [6.877, 9.5, 1.125])


POSCAR = b"""run
1.0
4 0 0
0 4.5 0
0 0 5
Cu Zr O
1 1 1
Selective dynamics
Direct
0 0 0 F F F
0.5 0.5 0 T T T
0 0.5 0.5 T T T
"""


def folder(root, **files):
    root.mkdir(exist_ok=True)
    for name, content in files.items():
        (root / name.replace("__", ".")).write_bytes(content)
    return root


@pytest.mark.parametrize("where", ["folder", "zip", "tar.gz"])
def test_fixed_atoms_from_poscar(tmp_path, where):
    run = folder(tmp_path / "a", OUTCAR=outcar(selective=True), POSCAR=POSCAR)
    path = pack(run, tmp_path / f"a.{where}") if where != "folder" else run / "OUTCAR"
    notes = []
    (found,) = read_relaxations(path, note=notes.append)
    assert found.fixed_mask.tolist() == [True, False, False] and notes == []
    if where != "folder":
        return
    (run / "POSCAR").write_bytes(POSCAR.replace(b"F F F", b"F T F"))
    with pytest.raises(InputError, match="POSCAR: an atom is held in some directions only"):
        list(read_relaxations(path))
    (run / "POSCAR").write_bytes(b"nonsense")
    (found,) = read_relaxations(path, note=notes.append)
    assert not found.fixed_mask.any() and len(notes) == 2
    assert f"{path}: selective dynamics left out: POSCAR: cannot be read" in notes[0]
    assert "none is taken as fixed" in notes[1]


def pack(root, archive):
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as out:
            for file in sorted(root.iterdir()):
                out.write(file, f"{root.name}/{file.name}")
    else:
        with tarfile.open(archive, "w:gz") as out:
            out.add(root, arcname=root.name)
    return archive


@pytest.mark.parametrize("where", ["folder", "zip", "tar.gz"])
def test_charges_beside_a_vasprun(tmp_path, where):
    run = folder(tmp_path / "a", vasprun__xml=vasprun(), OUTCAR=outcar())
    path = pack(run, tmp_path / f"a.{where}") if where != "folder" else run / "vasprun.xml"
    notes = []
    (found,) = read_relaxations(path, note=notes.append)
    np.testing.assert_allclose(found.charges, CHARGES)
    assert notes == [] and found.n_frames == 3
    if where == "folder":
        import_files([run], tmp_path / "out.h5")
        with TrajectoryStore(tmp_path / "out.h5") as store:
            np.testing.assert_allclose(store[0].charges, CHARGES)


@pytest.mark.parametrize(
    ("beside", "reason"),
    [(outcar()[:-4000], "complete ionic steps: fetch it again"), (b"", "'ions per type' gives 0"),
     (outcar(n=2), "it is from another run"), (gzip.compress(b"x", mtime=0)[:9], "gives 0 atoms"),
     (outcar().replace(b"10.123", b"******"), "is not a number")],
)  # fmt: skip
def test_damaged_outcar_does_not_lose_the_run(tmp_path, beside, reason):
    run = folder(tmp_path / "a", vasprun__xml=vasprun(), OUTCAR=beside)
    lines = []
    report = import_files([run], tmp_path / "out.h5", lines.append)
    assert (report.read, report.skipped) == (1, [])
    (line,) = [line for line in lines if "charges left out: OUTCAR: " in line]
    assert reason in line and line.startswith(f"{run / 'vasprun.xml'}: ")
    with TrajectoryStore(tmp_path / "out.h5") as store:
        assert store[0].charges is None


CUT = vasprun()[: vasprun().index(b"forces")]  # within the first ionic step
LEARNED = vasprun().replace(b"</incar>", b'<i type="logical" name="ML_LMLFF"> T  </i></incar>')
TWO_STEPS = vasprun()[: vasprun().rindex(b"forces")]
TWO_STEPS_OUTCAR = outcar()[: outcar().rindex(b"TOTAL-FORCE")]


@pytest.mark.parametrize("chunk", [1 << 20, 61])
def test_functional(chunk, monkeypatch):
    """Of the head only: the same words further on, in a log that is named, are none of it."""
    monkeypatch.setattr(outcar_lines, "_CHUNK", chunk)
    for before, after, source in (
        (b"=    PS ", b"=    -- ", "VASP"),
        (b"LHFCALC =     F", b"LHFCALC =     T", "VASP GGA=PS LHFCALC"),
        (b"METAGGA=      F", b"METAGGA= SCAN   ", "VASP GGA=PS METAGGA=SCAN"),
        (b"  LUSE_VDW   =     F", b"  LUSE_VDW   =     T", "VASP GGA=PS LUSE_VDW"),
        (b"   GGA_COMPAT", b"   IVDW   =     12\n   GGA_COMPAT", "VASP GGA=PS IVDW=12"),
        (b"   GGA_COMPAT", b"   PSTRESS=      0.0 pullay stress\n   GGA_COMPAT", "VASP GGA=PS"),
        (b"   GGA_COMPAT", b"   LSORBIT =      T    spin-orbit\n  GGA", "VASP GGA=PS LSORBIT"),
        (b"   GGA_COMPAT", b"   ISPIN  =      2    spin polarized\n  GGA", "VASP GGA=PS ISPIN=2"),
        (b"   GGA_COMPAT", b"   AEXX    =    1.0000 exact\n   HFSCREEN=    0.2000\n  GGA", "VASP GGA=PS"),
        (b"LHFCALC =     F", b"LHFCALC =     T\n   AEXX    =    0.3000 exact\n   HFSCREEN=    0.2070 scr",
         "VASP GGA=PS LHFCALC AEXX=0.3 HFSCREEN=0.207"),
        (b"   GGA_COMPAT", b" LDA+U is selected, type is set to LDAUTYPE =  2\n  GGA", "VASP GGA=PS LDAU"),
    ):
        text = outcar()
        assert text.count(before) == 1
        assert read(text.replace(before, after))[0].source == source
    late = outcar().replace(b" POSITION  ", b"   LHFCALC =     T    as noted\n POSITION  ")
    if chunk < 100:  # the marks of the head are looked for to the end of the chunk it ends in
        assert read(late)[0].source == "VASP GGA=PS"


@pytest.mark.parametrize("where", ["folder", "zip", "tar.gz"])
def test_outcar_instead_of_an_unusable_vasprun(tmp_path, where):
    run = folder(tmp_path / "a", vasprun__xml=CUT, OUTCAR=outcar(selective=True), POSCAR=POSCAR)
    path = pack(run, tmp_path / f"a.{where}") if where != "folder" else run / "vasprun.xml"
    notes = []
    (found,) = read_relaxations(path, note=notes.append)
    assert (found.source, found.n_frames) == ("VASP GGA=PS", 3)
    np.testing.assert_allclose(found.charges, CHARGES)
    assert found.fixed_mask.tolist() == [True, False, False]
    (line,) = notes
    assert "vasprun.xml: cannot be used (ends without </modeling>, after 0 complete ionic" in line
    assert line.endswith("): OUTCAR is read instead")


def instead(tmp_path, **files):
    """What is read of a vasprun.xml, and the notes with the path cut off."""
    run, notes = folder(tmp_path / "a", **files), []
    (found,) = read_relaxations(run / "vasprun.xml", note=notes.append)
    return found, [note.removeprefix(f"{run / 'vasprun.xml'}: ") for note in notes]


def test_unfinished_outcar_instead(tmp_path):
    found, notes = instead(tmp_path, vasprun__xml=b"", OUTCAR=TWO_STEPS_OUTCAR)
    assert (found.source, found.n_frames) == ("VASP GGA=PS, unfinished", 2)
    assert len(notes) == 2 and notes[1].startswith("OUTCAR: the run was killed")


def test_vasprun_with_its_complete_steps_is_not_replaced(tmp_path):
    """Both files of a run that was killed, and the charges of its last complete step."""
    found, notes = instead(tmp_path, vasprun__xml=TWO_STEPS, OUTCAR=TWO_STEPS_OUTCAR)
    assert (found.source, found.n_frames) == ("VASP, unfinished", 2)
    np.testing.assert_allclose(found.charges, CHARGES + 0.5)
    (line,) = notes
    assert line.startswith("the run was killed")
    found, notes = instead(tmp_path, vasprun__xml=TWO_STEPS, OUTCAR=outcar())
    assert found.charges is None and "from another run or truncated elsewhere" in notes[1]


@pytest.mark.parametrize(
    ("xml", "beside", "message"),
    [
        (CUT, outcar(n=1), r"nor can OUTCAR be used: a single ionic step"),
        (CUT, b"", r"\(nor can OUTCAR be used: 'ions per type' gives 0 atoms|no complete ionic"),
        # What the run is, the OUTCAR would not make better: it does not name the atoms held.
        (vasprun(selective=["FFF", "TTF", "TTT"]), outcar(), "held in some directions only"),
        (vasprun(ibrion=0), outcar(), "IBRION=0"),
        (LEARNED, outcar(), "machine-learned force field"),
        (LEARNED[: LEARNED.index(b"forces")], outcar(), "machine-learned force field"),
        (CUT, outcar().replace(b"(eV/Angst)", b"(eV/Angst) (ML)"), r"nor can OUTCAR be used: made by"),
        (vasprun(n=1), outcar(), "a single ionic step"),
    ],
)
def test_outcar_does_not_help(tmp_path, xml, beside, message):
    run = folder(tmp_path / "a", vasprun__xml=xml, OUTCAR=beside)
    with pytest.raises(InputError, match=message) as caught:
        list(read_relaxations(run / "vasprun.xml"))
    assert str(caught.value).startswith(f"{run / 'vasprun.xml'}: ")
    assert str(caught.value).count(str(run)) == 1


def cif(cell, fractional, symbols=("Cu", "Zr", "O")):
    from ase import Atoms
    from ase.io import write

    atoms = Atoms(symbols, cell=cell, scaled_positions=fractional, pbc=True)
    file = io.BytesIO()
    write(file, atoms, format="cif")
    return file.getvalue()


def test_initial_cif(tmp_path):
    cells, fractional = steps()[:2]
    order = [2, 0, 1]
    good = cif(cells[0], fractional[0][order] + [1, 0, -2], ("O", "Cu", "Zr"))
    moved = fractional[0] + [[0, 0, 0], [0.02, 0, 0], [0, 0, 0]]
    bad = {
        "elements": (cif(cells[0], fractional[0], ("Cu", "Cu", "O")), "Cu2O in the CIF"),
        "cell": (cif(cells[0] * 1.01, fractional[0]), "a, b, c"),
        "moved": (cif(cells[0], moved), "atom 1 of the first frame is 0.08"),
        "words": (b"nonsense", "words.cif: "),
    }
    for name in ("good", *bad, "none"):
        folder(tmp_path / name, vasprun__xml=vasprun(), OUTCAR=outcar())
        if name != "none":
            (tmp_path / name / f"{name}.cif").write_bytes(good if name == "good" else bad[name][0])
    out = tmp_path / "out.h5"
    report = import_files([tmp_path], out, initial="cif")
    assert report.read == 1
    with TrajectoryStore(out) as store:
        assert store.ids == ["good"]
    reasons = {Path(file).parent.name: reason for file, _, reason in report.skipped}
    assert set(reasons) == {*bad, "none"}
    assert all(message in reasons[name] for name, (_, message) in bad.items()), reasons
    assert "no CIF of this run beside it" in reasons["none"]
    assert import_files([tmp_path], out).read == 6  # unless asked for
    out.unlink()
    assert main(["data", "import", str(tmp_path), "--out", str(out), "--initial", "cif"]) == 0


def test_companions(tmp_path):
    """By the name of the run; a single CIF also where the folder holds a single run."""
    for name in ("A.vasprun.xml", "A.OUTCAR.gz", "B.vasprun.xml.gz", "B.cif", "x.cif", "C/OUTCAR",
                 "C/CONTCAR", "C/any.cif", "D/vasprun.xml.relax1", "D/OUTCAR.relax1",
                 "D/POSCAR.relax2", "D/POSCAR.relax1.gz"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = {s.id: [p and p.name for p in s.beside] for s in find_sources([tmp_path]).sources}
    assert found == {
        "A": ["A.OUTCAR.gz", None, None],
        "B": [None, None, "B.cif"],
        "C": [None, "CONTCAR", "any.cif"],
        "D/relax1": ["OUTCAR.relax1", "POSCAR.relax1.gz", None],
    }


DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "vasp"
REAL = sorted(DATA.glob("*OUTCAR.gz"))


@pytest.mark.skipif(not REAL, reason=f"{DATA} is not here")
@pytest.mark.parametrize("file", REAL, ids=lambda f: f.name.split(".")[0])
def test_same_as_ase(file, tmp_path, monkeypatch):
    """Every number of every ionic step; of stresses, the order of two factors differs."""
    import ase.io

    from relaxnet_jax.data.vasp import outcar

    if file.name.startswith("JVASP-39"):
        with pytest.raises(InputError, match="IBRION=8"):
            list(read_relaxations(file))
        monkeypatch.setattr(outcar, "check_ibrion", lambda ibrion: None)
    text = gzip.decompress(file.read_bytes())
    plain = tmp_path / "OUTCAR"
    plain.write_bytes(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = ase.io.read(plain, index=":", format="vasp-out")
    run, other = Outcar(io.BytesIO(text)), Outcar(io.BytesIO(text), "sigma0")
    for ours, sigma0, atoms in zip(run.steps(), other.steps(), theirs, strict=True):
        assert run.numbers.tolist() == atoms.numbers.tolist()
        np.testing.assert_array_equal(ours.cell, atoms.cell.array)
        np.testing.assert_array_equal(ours.positions, atoms.positions)
        np.testing.assert_array_equal(ours.forces, atoms.get_forces(apply_constraint=False))
        assert ours.energy == atoms.calc.results["free_energy"]
        assert sigma0.energy == atoms.calc.results["energy"]
        np.testing.assert_allclose(ours.stress, atoms.calc.results["stress"], rtol=1e-14)
    assert run.finished != file.name.startswith("Si2")
