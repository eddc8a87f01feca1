"""Trust flags, each by what raises it, and the head start that heeds them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms, FixCartesian, FixedLine
from ase.optimize import LBFGS
from tiny import slab, tiny_config, tiny_model

from relaxnet_jax.data.trajectory import RelaxationTrajectory
from relaxnet_jax.errors import InputError
from relaxnet_jax.predict import relax
from relaxnet_jax.starting import head_start
from relaxnet_jax.trust import constraint_flags, surroundings, trust_flags, unusable


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config("explicit", model__layers=1), dtype=np.float32, factor=6.0)


@pytest.fixture(scope="module")
def trained(model):
    return model.replace(elements=(1, 8, 78))


def path(**changes):
    """A sound path: three copper atoms in a row, one comes 0.1 Å nearer, energy and forces fall."""
    x = np.array([[0.0, 0, 0], [2.6, 0, 0], [0.0, 2.6, 0]])
    positions = np.stack([x, x - [[0, 0, 0], [0.05, 0, 0], [0, 0, 0]],
                          x - [[0, 0, 0], [0.1, 0, 0], [0, 0, 0]]])  # fmt: skip
    good = RelaxationTrajectory(
        id="a",
        atomic_numbers=np.full(3, 29),
        positions=positions,
        cells=np.repeat(9.0 * np.eye(3)[None], 3, 0),
        pbc=np.ones(3, bool),
        energies=np.array([-9.0, -9.1, -9.15]),
        forces=np.stack([np.full((3, 3), f) for f in (0.5, 0.2, 0.01)]),
        fixed_mask=np.zeros(3, bool),
    )
    return dataclasses.replace(good, **changes)


def names(trajectory, model, skin=0.5):
    return [flag.name for flag in trust_flags(trajectory, model, skin)]


def test_flags(model):
    copper = model.replace(elements=(29,))
    good = path()
    assert names(good, copper) == []
    assert names(good, copper, skin=0.09) == ["skin exceeded"]
    # Between the frames there are, as far as it is known.
    assert not trust_flags(good, copper, 0.5, 0.4)
    assert [flag.name for flag in trust_flags(good, copper, 0.5, 0.6)] == ["skin exceeded"]
    assert names(good, model) == ["untrained"]
    assert names(good, model.replace(elements=(1,))) == ["unseen element"]
    # A rise counts from the lowest energy before it, and 6 meV of three atoms are none.
    assert names(path(energies=np.array([-9.0, -9.2, -9.1])), copper) == ["energy rises"]
    assert names(path(energies=np.array([-9.0, -9.2, -9.195])), copper) == []
    (rise,) = trust_flags(path(energies=np.array([-9.0, -9.2, -9.05])), copper, 0.5)
    assert "frame 2 lies 50.0 meV/atom" in rise.detail and not rise.unusable
    forces = good.forces * np.array([1.0, 1.0, 60.0])[:, None, None]
    assert names(path(forces=forces), copper) == ["forces do not fall"]
    assert names(path(forces=forces, fixed_mask=np.ones(3, bool)), copper) == ["all atoms fixed"]
    # A structure at rest has nothing to lose.
    assert names(path(forces=good.forces * 0.05), copper) == []
    assert names(path(forces=np.full((3, 3, 3), 0.02)), copper) == []
    broken = good.positions.copy()
    broken[-1, 0, 0] = np.nan
    (flag,) = trust_flags(path(positions=broken), copper, 0.5)
    assert flag.name == "not finite" and unusable((flag,))


def test_models_that_learned_nothing_say_so(model):
    """By their own validation split: what they predict at rest looks relaxed."""
    for score, expected in ((0.94, []), (0.99, ["no better than nothing"])):
        statistics = json.dumps({"validation": {"positions_over_nothing": score}})
        assert names(path(), model.replace(elements=(29,), statistics=statistics)) == expected


def test_cells_that_run_away(model):
    """A direction that ends at half or twice its length is no relaxation; vacuum is named once."""
    copper = model.replace(elements=(29,))
    for stretch, expected in ((1.9, ["vacuum strained"]), (0.6, ["vacuum strained"]),
                              (2.1, ["cell strained too far", "vacuum strained"]),
                              (0.45, ["cell strained too far", "vacuum strained"])):  # fmt: skip
        cells = np.stack([40 * np.eye(3)] * 3)
        cells[-1] = np.diag([40 * stretch, 41, 40])
        found = trust_flags(path(cells=cells, pbc=np.ones(3, bool)), copper, 9.0)
        assert [f.name for f in found if f.name in expected] == expected
        assert unusable(found) == (len(expected) == 2)
    assert f"{stretch:.2g} times its length" in found[0].detail
    (vacuum,) = [f for f in found if f.name == "vacuum strained"]
    assert "along a (" in vacuum.detail and "), b (" in vacuum.detail and "c (" not in vacuum.detail


def test_contacts_count_images(model):
    """0.6 of 2 x 1.32 Å is 1.584 Å."""
    copper = model.replace(elements=(29,))
    for gap, expected in ((1.60, []), (1.57, ["atoms too close"])):
        positions = path().positions.copy()
        positions[-1, 1, 0] = 9.0 - gap  # across the border
        assert names(path(positions=positions), copper, skin=9.0) == expected
    (flag,) = trust_flags(path(positions=positions), copper, 9.0)
    assert flag.detail == "Cu0 and Cu1 end 1.57 Å apart" and flag.unusable
    both = trust_flags(path(positions=positions), copper, 0.5)
    assert [f.name for f in both] == ["skin exceeded", "atoms too close"]
    nitrogen = path(atomic_numbers=np.full(3, 7), positions=path().positions * 1.10 / 2.5)
    assert names(nitrogen, model.replace(elements=(7,))) == []  # as short as N2


@pytest.mark.parametrize("pbc", [(False,) * 3, (True, True, False)])
def test_atoms_that_fly_apart_do_not_end_the_process(model, pbc):
    """Finite, but too far apart for a neighbour search: on a line that has no gaps to take out."""
    copper = model.replace(elements=(29,))
    n = 1500
    start = np.outer(np.arange(float(n)), [0, 0, 2.5])
    values = {
        "atomic_numbers": np.full(n, 29),
        "positions": np.stack([start, start, start * 1e4]),
        "forces": np.zeros((3, n, 3)),
        "fixed_mask": np.zeros(n, bool),
        "pbc": np.array(pbc),
    }
    found = trust_flags(path(**values), copper)
    assert found[0].name == "atoms fly apart" and found[0].unusable
    # Three that leave each other altogether are no contact.
    away = path().positions.copy()
    away[-1, :, 2] *= 1e7
    assert "atoms too close" not in names(path(positions=away, pbc=np.array(pbc)), copper)


def test_density_and_coordination(model):
    """Of fcc copper: 12 nearest neighbours at 2.55 Å, 6 second at 3.6, 24 third at 4.42 Å."""
    config = model.config  # 4.0 + 0.5 Å for pairs, 3.2 Å for triplets
    cell = bulk("Cu", a=3.61)
    found = surroundings(cell.positions, cell.cell.array, cell.pbc, config)
    assert found == {"density": 42, "coordination": 12}
    twice = cell.repeat(2)
    assert surroundings(twice.positions, twice.cell.array, twice.pbc, config) == found
    molecule = path()  # a right angle, 2.6 and 3.68 Å
    assert surroundings(molecule.positions[0], np.eye(3), np.zeros(3, bool), config) == {
        "density": 2, "coordination": pytest.approx(4 / 3)}  # fmt: skip
    copper = model.replace(elements=(29,))
    for density, coordination, expected in (
        ([2, 2], [4 / 3, 4 / 3], []),
        ([2.2, 9], [0.5, 1.22], []),
        ([2.3, 9], [0.5, 4 / 3], ["density"]),
        ([1.0, 1.8], [0.5, 1.2], ["density", "coordination"]),
    ):
        known = {"surroundings": {"density": density, "coordination": coordination}}
        one = copper.replace(statistics=json.dumps(known))
        assert names(path(pbc=np.zeros(3, bool)), one) == expected
    (flag, _) = trust_flags(path(pbc=np.zeros(3, bool)), one, 0.5)
    assert flag.detail == "2.0 neighbours per atom in the first frame, outside the training range 1.0 to 1.8"
    assert not flag.unusable


def test_head_start_moves_atoms_where_the_model_says(trained):
    atoms = slab()
    start = atoms.positions.copy()
    result = head_start(atoms, trained, n_frames=3)
    expected = relax(trained, slab(), n_frames=3)
    assert result.moved
    np.testing.assert_allclose(atoms.positions, expected.positions[-1], atol=1e-6)
    np.testing.assert_array_equal(atoms.positions, result.path.positions[-1])
    np.testing.assert_array_equal(atoms.positions[:2], start[:2])
    assert np.abs(atoms.positions[2:] - start[2:]).max() > 0.01
    assert result.path.n_frames == 3 and "untrained" not in [f.name for f in result.flags]
    with pytest.raises(InputError, match="n_frames=1"):
        head_start(atoms, trained, n_frames=1)
    with pytest.raises(InputError, match="never saw C"):
        head_start(Atoms("CO", [[0, 0, 0], [0, 0, 1.1]]), trained)


def test_head_start_before_an_optimiser(trained):
    """The two lines of the documentation."""
    atoms = slab()
    atoms.calc = EMT()
    head_start(atoms, trained, n_frames=3)
    begun = atoms.positions.copy()
    assert LBFGS(atoms, logfile=None).run(fmax=0.3, steps=100)
    assert np.abs(atoms.positions - begun).max() > 1e-3


def test_other_constraints(trained):
    """ASE applies them; the flag says that the path did not know."""
    atoms = slab()
    atoms.set_constraint([FixAtoms([0, 1]), FixedLine(5, [0, 0, 1.0])])
    start = atoms.positions.copy()
    result = head_start(atoms, trained, n_frames=3)
    np.testing.assert_allclose(atoms.positions[5, :2], start[5, :2], atol=1e-12)
    assert np.abs(result.path.positions[-1, 5, :2] - start[5, :2]).max() > 1e-3
    assert [f.name for f in result.flags][-1] == "constraints ignored"
    assert "FixedLine" in result.flags[-1].detail
    atoms.set_constraint([FixAtoms([0]), FixCartesian([1])])
    assert constraint_flags(atoms, result.path) == ()
    atoms.set_constraint(FixCartesian([1], mask=(True, False, False)))
    assert [f.name for f in constraint_flags(atoms, result.path)] == ["constraints ignored"]


def test_unusable_predictions_move_nothing(trained):
    broken = trained.replace(params=jax.tree.map(lambda a: a * np.nan, trained.params))
    atoms = slab()
    with pytest.warns(UserWarning, match="no head start, not finite") as told:
        result = head_start(atoms, broken, n_frames=3)
    assert len(told) == 1
    assert not result.moved and result.flags[0].name == "not finite"
    np.testing.assert_array_equal(atoms.positions, slab().positions)
