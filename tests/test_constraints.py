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
    FixScaled,
)

from relaxnet_jax.constraints import held_atoms
from relaxnet_jax.data.ase_io import fixed_atoms
from relaxnet_jax.errors import InputError

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
