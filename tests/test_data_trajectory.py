"""RelaxationTrajectory: derived quantities, validation, writing, unwrapping."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest

from relaxnet_jax.data import RelaxationTrajectory, unwrap_positions
from relaxnet_jax.errors import InputError


def make(n=3, **changes):
    """Rocksalt-like MgO pair plus two atoms in a 4 Å box, drifting by 0.1 Å per frame."""
    x = np.array([[0, 0, 0], [2, 2, 2], [2, 0, 0], [0, 2, 2]], dtype=float)
    steps = np.arange(n)[:, None, None] * np.array([0.1, 0, 0])
    forces = np.zeros((n, 4, 3))
    forces[:, 0, 0] = 9.0
    forces[:, 1, :2] = [3.0, 4.0]
    fields = {
        "id": "a-1",
        "atomic_numbers": np.array([12, 8, 12, 12]),
        "positions": x + steps,
        "cells": np.repeat(4 * np.eye(3)[None], n, axis=0),
        "pbc": np.array([True, True, True]),
        "energies": -1.0 - np.arange(n),
        "forces": forces,
        "fixed_mask": np.array([True, False, False, False]),
    }
    return RelaxationTrajectory(**(fields | changes))


def test_derived_quantities():
    traj = make()
    assert (traj.n_frames, traj.n_atoms, traj.formula) == (3, 4, "Mg3O")
    # The 9 eV/Å on the fixed atom do not count.
    np.testing.assert_allclose(traj.fmax, [5.0, 5.0, 5.0])
    np.testing.assert_array_equal(make(fixed_mask=np.ones(4, bool)).fmax, np.zeros(3))


def test_work():
    """Of the free atoms from frame to frame; where the cell changes too it is not all there is."""
    traj = make()
    steps, forces = np.diff(traj.positions, axis=0)[:, 1:], traj.forces[:, 1:]
    first, second = (-(0.5 * (forces[k] + forces[k + 1]) * steps[k]).sum() for k in (0, 1))
    np.testing.assert_allclose(traj.work(), [0, first, first + second])
    assert abs(first) > 0.1 and abs(second) > 0.1
    cells = np.repeat(4 * np.eye(3)[None], 3, axis=0)
    cells[2] *= 1.01
    with pytest.raises(InputError, match="the cell changes"):
        make(cells=cells).work()


def test_formula_is_reduced_hill():
    assert make(atomic_numbers=np.array([6, 1, 1, 6])).formula == "CH"
    assert make(atomic_numbers=np.array([29, 29, 79, 29])).formula == "AuCu3"


@pytest.mark.parametrize(("change", "variable"), [(5e-5, False), (2e-4, True)])
def test_variable_cell(change, variable):
    cells = np.repeat(4 * np.eye(3)[None], 3, axis=0)
    cells[2, 0, 1] += change
    assert make(cells=cells).variable_cell is variable


def test_atoms_carry_labels_and_constraint():
    stresses = np.arange(18.0).reshape(3, 6)
    traj = make(stresses=stresses, charges=np.array([1.0, -1, 0, 0]), group="g", source="s")
    atoms = traj.atoms(1)
    assert atoms.get_potential_energy() == -2.0
    np.testing.assert_array_equal(atoms.get_forces(apply_constraint=False), traj.forces[1])
    np.testing.assert_array_equal(atoms.get_forces()[0], 0)
    np.testing.assert_array_equal(atoms.get_stress(), stresses[1])
    np.testing.assert_array_equal(atoms.get_initial_charges(), traj.charges)
    assert atoms.info == {"traj_id": "a-1", "frame": 1, "group": "g", "source": "s"}
    assert traj.atoms(-1).info["frame"] == 2
    assert make(fixed_mask=np.zeros(4, bool)).atoms(0).constraints == []
    with pytest.raises(IndexError):
        traj.atoms(3)


@pytest.mark.parametrize("name", ["a.extxyz", "a.traj"])
def test_write_all_frames(tmp_path, name):
    traj = make(stresses=np.arange(18.0).reshape(3, 6))
    traj.write(tmp_path / name)
    images = ase.io.read(tmp_path / name, index=":")
    assert len(images) == 3
    for i, atoms in enumerate(images):
        np.testing.assert_allclose(atoms.positions, traj.positions[i], atol=1e-8)
        np.testing.assert_allclose(atoms.get_forces(apply_constraint=False), traj.forces[i])
        np.testing.assert_allclose(atoms.get_stress(), traj.stresses[i])
        assert atoms.get_potential_energy() == traj.energies[i]
        np.testing.assert_array_equal(atoms.constraints[0].index, [0])
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "name", ["CONTCAR", "POSCAR_x", "contcar.vasp", "a.VASP", "a.poscar", "a.cif"]
)
def test_write_final_frame(tmp_path, name):
    traj = make()
    traj.write(tmp_path / name)
    atoms = ase.io.read(tmp_path / name, format="cif" if name == "a.cif" else "vasp")
    np.testing.assert_array_equal(atoms.numbers, traj.atomic_numbers)
    np.testing.assert_allclose(atoms.positions, traj.positions[-1], atol=1e-6)
    if name != "a.cif":
        np.testing.assert_array_equal(atoms.constraints[0].index, [0])


def test_the_suffix_counts_before_the_word(tmp_path):
    """Of a path called POSCAR-….extxyz every frame is written."""
    traj = make()
    traj.write(tmp_path / "POSCAR-relaxed.extxyz")
    frames = ase.io.read(tmp_path / "POSCAR-relaxed.extxyz", ":", format="extxyz")
    assert len(frames) == traj.n_frames > 1


def test_write_refuses(tmp_path):
    (tmp_path / "a.xsf").write_text("mine")
    with pytest.raises(InputError, match=r"a\.xsf: unknown suffix '\.xsf': use one of \.extxyz"):
        make().write(tmp_path / "a.xsf")
    assert (tmp_path / "a.xsf").read_text() == "mine"
    molecule = make(cells=np.zeros((3, 3, 3)), pbc=np.zeros(3, bool))
    with pytest.raises(InputError, match=r"POSCAR: a-1 has no cell: write \.extxyz"):
        molecule.write(tmp_path / "POSCAR")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="choose another output path"):
        make().write(tmp_path / "file" / "a.traj")


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.extxyz"
    make().write(path)
    old = path.read_bytes()

    def fail(name, *_, **__):
        name.write_text("half")
        raise RuntimeError("disk\nfull")

    monkeypatch.setattr(ase.io, "write", fail)
    with pytest.raises(InputError, match=r"a\.extxyz: ASE cannot write a-1 .*\(disk full\)"):
        make().write(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def with_entry(name, index, value):
    array = np.array(getattr(make(stresses=np.zeros((3, 6)), charges=np.zeros(4)), name))
    array[index] = value
    return {name: array}


BAD = [
    ({"positions": np.zeros((3, 4))}, r"positions: shape \(3, 4\)"),
    ({"positions": np.zeros((0, 4, 3))}, r"positions: shape \(0, 4, 3\)"),
    ({"energies": np.zeros(2)}, r"energies: shape \(2,\): positions imply \(3,\)"),
    ({"forces": np.zeros((3, 5, 3))}, r"forces: shape .* imply \(3, 4, 3\)"),
    ({"cells": np.eye(3)}, r"cells: shape \(3, 3\)"),
    ({"stresses": np.zeros((3, 9))}, "stresses: shape"),
    ({"times": np.zeros(2)}, "times: shape"),
    ({"times": np.array([0, 0.6, 0.5])}, "times: not ascending"),
    ({"times": np.array([0, 0.5, 1.5])}, "times: not ascending within"),
    ({"atomic_numbers": np.array([12, 8, 0, 12])}, "atomic_numbers: not all within 1 to 118"),
    ({"atomic_numbers": np.array([12, 8, 119, 12])}, "atomic_numbers: not all within"),
    ({"atomic_numbers": np.array([12.0, 8, 1, 12])}, "atomic_numbers: not all within"),
    (with_entry("positions", (1, 2, 0), np.nan), "frame 1, positions: not a finite"),
    (with_entry("forces", (2, 0, 0), np.inf), "frame 2, forces: not a finite"),
    (with_entry("energies", 2, np.nan), "frame 2, energies: not a finite"),
    (with_entry("stresses", (1, 0), np.nan), "frame 1, stresses: not a finite"),
    (with_entry("charges", 3, np.nan), "atom 3, charges: not a finite"),
    (with_entry("energies", 0, 500.0), "frame 0, energies: 126 eV/atom from the other"),
    (with_entry("cells", (1, 2), [4.0, 4, 0]), "frame 1, cells: volume .* independent"),
    ({"pbc": np.array([True, True, False]), **with_entry("cells", (1, 2), [4.0, 4, 0])},
     "frame 1, cells: volume .* independent"),
    (with_entry("cells", (slice(None), 2), 0.0), "frame 0, cells: volume 0 .* needs none, but pbc F"),
    ({"pbc": np.array([True, True, False]),
      "cells": np.tile([[4.0, 0, 0], [8, 0, 0], [0, 0, 0]], (3, 1, 1))}, "frame 0, cells: area 0 Å²"),
    ({"pbc": np.array([True, False, False]), "cells": np.zeros((3, 3, 3))}, "frame 0, cells: length 0 Å"),
    ({"cells": np.zeros((3, 3, 3))}, "frame 0, cells: volume 0"),
    (with_entry("positions", (1, 2), [2.1, 2, 2.0005]), "frame 1, .* atoms 1 and 2 at one"),
    # The same place in the next cell.
    (with_entry("positions", (2, 3), [6.2, -2, 2]), "frame 2, .* atoms 1 and 3 at one"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_validate_names_the_fault(changes, message):
    with pytest.raises(InputError, match=f"^relaxation 'a-1', .*{message}") as caught:
        make(**changes).validate()
    assert "\n" not in str(caught.value)


def test_validate_accepts():
    traj = make(times=np.array([0, 0.5, 1.0]), stresses=np.zeros((3, 6)))
    assert traj.validate() is traj
    make(n=1).validate()
    # A molecule needs no cell, and its atoms have no images.
    molecule = make(cells=np.zeros((3, 3, 3)), pbc=np.zeros(3, bool))
    molecule.validate()
    make(pbc=np.zeros(3, bool), **with_entry("positions", (2, 3), [6.2, -2, 2])).validate()


@pytest.mark.parametrize("k", range(3))
def test_validate_slab_without_its_third_vector(k):
    """Atoms that are images of each other along the others are found, and none along what is missing."""
    cells = np.repeat(4 * np.eye(3)[None], 3, axis=0) + 0.3 * np.eye(3)[::-1]
    cells[:, k] = 0.0
    slab = make(cells=cells, pbc=np.arange(3) != k)
    assert slab.validate() is slab
    for j in range(3):
        moved = slab.positions.copy()
        moved[1, 3] = moved[1, 1] + (cells[1, j] if j != k else 4.0 * np.eye(3)[k])
        if j == k:
            make(cells=cells, pbc=slab.pbc, positions=moved).validate()
            continue
        with pytest.raises(InputError, match="frame 1, positions: atoms 1 and 3 at one point"):
            make(cells=cells, pbc=slab.pbc, positions=moved).validate()


def test_validate_large_structure():
    rng = np.random.default_rng(0)
    n_atoms = 1500
    grid = np.stack(np.unravel_index(np.arange(n_atoms), (12, 12, 12)), axis=1) * 2.5
    x = np.repeat(grid[None], 2, axis=0) + rng.normal(0, 0.1, (2, n_atoms, 3))
    fields = {
        "atomic_numbers": np.full(n_atoms, 29),
        "positions": x,
        "forces": np.zeros_like(x),
        "fixed_mask": np.zeros(n_atoms, bool),
        "cells": np.repeat(30 * np.eye(3)[None], 2, axis=0),
    }
    make(n=2, **fields).validate()
    x[1, 1499] = x[1, 3] + [30, 0, -30]
    with pytest.raises(InputError, match="frame 1, positions: atoms 3 and 1499 at one point"):
        make(n=2, **fields).validate()


def test_unwrap_undoes_wrapping():
    rng = np.random.default_rng(1)
    cells = np.eye(3) * 5 + rng.normal(0, 0.5, (3, 3))
    cells = cells + rng.normal(0, 0.01, (6, 3, 3))
    start = rng.random((1, 7, 3)) @ cells[0]
    smooth = start + np.cumsum(rng.normal(0, 0.4, (6, 7, 3)), axis=0)
    fractional = smooth @ np.linalg.inv(cells)
    pbc = np.array([True, True, False])
    wrapped = (fractional - np.floor(fractional) * pbc) @ cells
    unwrapped = unwrap_positions(wrapped, cells, pbc)
    assert np.abs(np.diff(wrapped, axis=0)).max() > 3
    # Up to the lattice vectors of the first frame, carried along with the cell.
    shift = (np.floor(fractional[:1]) * pbc) @ cells
    np.testing.assert_allclose(unwrapped, smooth - shift, atol=1e-12)


def test_unwrap_leaves_the_rest_alone():
    traj = make()
    same = unwrap_positions(traj.positions, traj.cells, traj.pbc)
    np.testing.assert_array_equal(same, traj.positions)
    far = traj.positions + np.arange(3)[:, None, None] * 4.0
    np.testing.assert_array_equal(unwrap_positions(far, traj.cells, np.zeros(3, bool)), far)
    np.testing.assert_allclose(unwrap_positions(far, traj.cells, traj.pbc), traj.positions)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().id = "b"


def test_data_layer_does_not_import_jax():
    code = "import sys, relaxnet_jax.data; sys.exit('jax' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=root).returncode == 0
