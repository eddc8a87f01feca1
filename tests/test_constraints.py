"""Atoms that ASE's constraints hold."""

import numpy as np
import pytest
from ase import Atoms
from ase.constraints import (
    FixAtoms,
    FixBondLength,
    FixCartesian,
    FixedLine,
    FixedPlane,
    FixInternals,
    FixLinearTriatomic,
    FixScaled,
)

from relaxnet_jax.constraints import held_atoms, move_to_end
from relaxnet_jax.data.ase_io import fixed_atoms
from relaxnet_jax.data.trajectory import RelaxationTrajectory
from relaxnet_jax.errors import InputError
from relaxnet_jax.trust import constraint_flags

UP = [0, 0, 1]
CASES = {
    "none": ([], [], []),
    "atoms": ([FixAtoms([0, 2])], [0, 2], []),
    "all directions": ([FixCartesian([1], [1, 1, 1]), FixScaled(0, [True] * 3)], [0, 1], []),
    "no direction": ([FixCartesian([1], [0, 0, 0])], [], []),
    "some": ([FixCartesian([1], [1, 0, 0]), FixScaled([0], [False, True, True])], [], [0, 1]),
    "line and plane": ([FixedLine([2], UP), FixedPlane([1], UP)], [], [1, 2]),
    "both": ([FixedPlane([0, 1], UP), FixAtoms([0])], [0], [1]),
    "bond": ([FixBondLength(0, 1)], [], []),
}


@pytest.mark.parametrize("case", CASES)
def test_held_atoms(case):
    constraints, fixed, partly = CASES[case]
    atoms = Atoms("CuAuPt", np.eye(3), cell=4 * np.eye(3), constraint=constraints)
    found = held_atoms(atoms)
    assert [np.flatnonzero(mask).tolist() for mask in found] == [fixed, partly]
    if partly:
        with pytest.raises(InputError, match="held in some directions only: fix or free it"):
            fixed_atoms(atoms)
    else:
        np.testing.assert_array_equal(fixed_atoms(atoms), found[0])


def to(atoms, positions, stretch=1.0):
    """A path from the atoms to other positions, in a cell that grows."""
    cells = np.stack([atoms.cell.array, stretch * atoms.cell.array])
    n = len(atoms)
    return RelaxationTrajectory(
        id="a", atomic_numbers=atoms.numbers, positions=np.stack([atoms.positions, positions]),
        cells=cells, pbc=atoms.pbc, energies=np.array([0.0, -1.0]), forces=np.zeros((2, n, 3)),
        fixed_mask=np.zeros(n, bool))  # fmt: skip


def molecule(symbols, angle):
    """Three atoms, the middle one first bound to both others at 1.2 Å."""
    turn = np.radians(angle)
    positions = [[1.2, 0, 0], [0, 0, 0], [1.2 * np.cos(turn), 1.2 * np.sin(turn), 0]]
    return Atoms(symbols, np.array(positions) + 4.0, cell=12 * np.eye(3), pbc=True)


def test_a_rigid_linear_molecule():
    """It keeps the lengths from before the cell changes, wherever the path moves its atoms."""
    atoms = molecule("OCO", 180)
    atoms.set_constraint(FixLinearTriatomic([(0, 1, 2)]))
    away = np.array([[0.1, 0.05, 0], [0, 0.02, 0.1], [-0.1, 0, 0.03]])
    path = to(atoms, atoms.positions + away, 1.02)
    flags = constraint_flags(atoms, path)
    assert [flag.name for flag in flags] == ["constraints ignored"]
    move_to_end(atoms, path)
    for pair in ((0, 1), (1, 2)):
        assert atoms.get_distance(*pair, mic=True) == pytest.approx(1.2, abs=1e-6)
    assert np.abs(atoms.positions - path.positions[0]).max() > 0.01
    far = path.positions + np.array([[0, 0, 0], [0, 3.0, 0], [5.0, 5.0, 5.0]])[None]
    (fail, ignored) = constraint_flags(atoms, to(atoms, far[1]))
    assert fail.name == "constraints fail" and fail.unusable
    assert ignored.name == "constraints ignored"


@pytest.mark.parametrize("angle, far", [(105, True), (180, False), (105, False)])
def test_internal_coordinates_that_cannot_be_kept(angle, far):
    """ASE's ValueError and ZeroDivisionError are flags of this structure, no error."""
    atoms = molecule("HOH", angle)
    atoms.set_constraint(FixInternals(bonds=[(None, [0, 1])], angles_deg=[(None, [0, 1, 2])]))
    away = np.zeros((3, 3))
    away[0] = [-1.2, 0, 0] if far else [0, 0.02, 0.01]  # onto the middle atom: no direction is left
    path = to(atoms, atoms.positions + away)
    names = [flag.name for flag in constraint_flags(atoms, path)]
    if angle == 105 and not far:
        assert names == ["constraints ignored"]
        return
    assert names == ["constraints fail", "constraints ignored"]
    assert constraint_flags(atoms, path)[0].unusable
