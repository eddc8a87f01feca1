"""The ASE calculator: the model's own energies and forces, and a neighbour list that lasts."""

import jax
import numpy as np
import pytest
from ase import units
from ase.calculators.calculator import PropertyNotImplementedError
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from tiny import crystal, molecule, slab, tiny_config, tiny_model

from relaxnet_jax import calculator
from relaxnet_jax.calculator import RelaxNetCalculator
from relaxnet_jax.errors import InputError
from relaxnet_jax.lbfgs import minimise
from relaxnet_jax.potential import compiled_shapes

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module")
def model(x64):
    """An implicit model with an energy of its own for each element."""
    table = np.zeros(119)
    table[[1, 8, 78]] = -3.0, -5.0, -2.0
    return tiny_model(tiny_config("implicit", model__layers=1)).replace(element_energies=table)


@pytest.fixture(scope="module")
def explicit(x64):
    return tiny_model(tiny_config("explicit", model__layers=1))


def attached(atoms, model, **options):
    atoms.calc = RelaxNetCalculator(model, **options)
    return atoms


def test_energy_and_forces_are_the_models(model):
    """Also far from where the list was made, and FixAtoms is ASE's business."""
    atoms = attached(slab(), model)
    rng = np.random.default_rng(0)
    for step in range(3):
        atoms.positions[2:] += rng.normal(0, 0.05 + step, (4, 3)) * (step < 2)
        energy, forces = model.energy_and_forces(atoms)
        assert atoms.get_potential_energy() == pytest.approx(energy, rel=1e-10)
        assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
        raw = atoms.get_forces(apply_constraint=False)
        np.testing.assert_allclose(raw, forces, atol=1e-9 * np.abs(forces).max())
        held = atoms.get_forces()
        assert np.abs(raw[:2]).max() > 1e-6 and not held[:2].any()
        np.testing.assert_array_equal(held[2:], raw[2:])
    assert atoms.calc.lists_built == 2  # the second move was a long one, the third none


def test_forces_are_the_gradient_of_the_energy(model):
    atoms = attached(crystal(), model)
    forces, step = atoms.get_forces(), 1e-4
    for k in range(len(atoms)):
        for axis in range(3):
            energies = []
            for sign in (1, -1):
                moved = atoms.copy()
                moved.calc = atoms.calc
                moved.positions[k, axis] += sign * step
                energies.append(moved.get_potential_energy())
            numeric = -(energies[0] - energies[1]) / (2 * step)
            assert forces[k, axis] == pytest.approx(numeric, abs=1e-5 * np.abs(forces).max())
    assert atoms.calc.lists_built == 1


def test_list_lasts_until_atoms_may_have_approached_by_the_skin(model):
    """And what it gives between does not depend on when it was made."""
    atoms = attached(slab(), model)
    fresh = RelaxNetCalculator(model, skin=0.0)
    start = atoms.positions.copy()
    shapes = []
    for shift, built in ((0.0, 1), (0.2, 1), (0.49, 1), (0.51, 2), (0.9, 2), (0.0, 3)):
        atoms.positions[-1] = start[-1] + [shift, 0.0, 0.0]
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        assert atoms.calc.lists_built == built, shift
        copy = atoms.copy()
        copy.calc = fresh
        assert energy == pytest.approx(copy.get_potential_energy(), abs=1e-9)
        np.testing.assert_allclose(forces, copy.get_forces(), atol=1e-9)
        shapes.append(atoms.calc._shape)
    assert fresh.lists_built == 6
    assert len(set(shapes)) <= 2
    atoms.set_cell(atoms.cell * [1.0, 1.0, 1.01])
    before = atoms.calc.lists_built
    atoms.get_potential_energy()
    assert atoms.calc.lists_built == before + 1
    atoms.set_initial_magnetic_moments(np.ones(len(atoms)))
    atoms.get_potential_energy()
    assert atoms.calc.lists_built == before + 1


def test_few_programs_while_atoms_move(model):
    """Shapes are rounded and only grow: hundreds of lists, a handful of programs."""
    atoms, rng = attached(slab(), model), np.random.default_rng(3)
    before = compiled_shapes()
    start = atoms.positions.copy()
    for _ in range(40):
        atoms.positions[2:] = start[2:] + rng.normal(0, 0.3, (4, 3)) + [0.0, 0.0, 0.4]
        atoms.get_potential_energy()
    assert atoms.calc.lists_built >= 30
    assert compiled_shapes() - before <= 2


def test_optimiser_descends_and_holds_fixed_atoms(model):
    atoms = attached(slab(), model)
    start, energies = atoms.positions.copy(), [atoms.get_potential_energy()]
    for _ in BFGS(atoms, logfile=None, maxstep=0.05).irun(fmax=1e-3, steps=8):
        energies.append(atoms.get_potential_energy())
    np.testing.assert_array_equal(atoms.positions[:2], start[:2])
    assert np.abs(atoms.positions[2:] - start[2:]).max() > 0.01
    assert energies[-1] < energies[0] - 1e-4


def test_energy_is_conserved(model):
    """Velocity Verlet across several neighbour lists: the error falls as the step squared."""
    errors = []
    for step in (0.5, 0.25):
        atoms = attached(slab(), model, skin=0.1)
        rng = np.random.default_rng(1)
        atoms.set_velocities(rng.normal(0, 0.3, (6, 3)) / np.sqrt(atoms.get_masses()[:, None]))
        dynamics = VelocityVerlet(atoms, timestep=step * units.fs)
        total = []
        for _ in range(round(10 / step)):
            dynamics.run(1)
            total.append(atoms.get_total_energy())
        errors.append(np.ptp(total))
        exchanged = atoms.get_kinetic_energy()
        assert atoms.calc.lists_built > 1
    assert errors[0] < 0.02 * exchanged
    assert errors[1] < errors[0] / 3


def test_no_stress(model):
    with pytest.raises(PropertyNotImplementedError):
        attached(crystal(), model).get_stress()


def test_explicit_models_need_a_reference(model, explicit):
    """Held there, energy and forces are consistent and the model's; further away, refused."""
    with pytest.raises(InputError, match="not a potential"):
        RelaxNetCalculator(explicit)
    with pytest.raises(InputError, match="reference"):
        RelaxNetCalculator(model, reference=slab())
    with pytest.raises(InputError, match="skin"):
        RelaxNetCalculator(model, skin=-0.1)
    with pytest.raises(InputError, match="is of type list, not RelaxNet: give one of them"):
        RelaxNetCalculator([model, model])
    reference = slab()
    atoms = attached(slab(), explicit, reference=reference)
    reference.positions += 1.0  # what was given is copied
    rng = np.random.default_rng(0)
    atoms.positions[2:] += rng.normal(0, 0.05, (4, 3))
    energy, forces = explicit.energy_and_forces(atoms, reference=slab())
    assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-9)
    np.testing.assert_allclose(
        atoms.get_forces(apply_constraint=False), forces, atol=1e-9 * np.abs(forces).max()
    )
    step, found = 1e-4, []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.calc = atoms.calc
        moved.positions[-1, 0] += sign * step
        found.append(moved.get_potential_energy())
    numeric = -(found[0] - found[1]) / (2 * step)
    assert forces[-1, 0] == pytest.approx(numeric, abs=1e-5 * np.abs(forces).max())
    atoms.positions[-1, 2] += 0.5
    for _ in range(2):  # a failure is not forgotten
        with pytest.raises(InputError, match="more than half the skin"):
            atoms.get_potential_energy()
    atoms.set_cell(1.1 * atoms.cell)
    with pytest.raises(InputError, match="cell"):
        atoms.get_forces()
    assert atoms.calc.lists_built == 1


def test_the_reference_may_be_wrapped(explicit):
    """An atom that left through one side of the cell is where it was."""
    calculator = RelaxNetCalculator(explicit, reference=slab())
    atoms = slab()
    atoms.positions[2:] += 0.05
    wrapped = atoms.copy()
    wrapped.positions[3] += atoms.cell[0] - 2 * atoms.cell[1]
    at = calculator._near_reference(wrapped, slab())
    np.testing.assert_allclose(at, atoms.positions, atol=1e-12)
    np.testing.assert_array_equal(calculator._near_reference(atoms, slab()), atoms.positions)
    wrapped.positions[3] += atoms.cell[2]  # not periodic along that
    with pytest.raises(InputError, match="more than half the skin"):
        calculator._near_reference(wrapped, slab())
    results = []
    for one in (atoms, wrapped):
        one.positions[3] = atoms.positions[3] if one is atoms else atoms.positions[3] + atoms.cell[0]
        one.calc = calculator
        results.append((one.get_potential_energy(), one.get_forces()))
    assert results[1][0] == pytest.approx(results[0][0], abs=1e-9)
    np.testing.assert_allclose(results[1][1], results[0][1], atol=1e-9)


def test_bad_structures(model):
    trained = model.replace(elements=(1, 8, 78))
    with pytest.raises(InputError, match="never saw"):
        attached(molecule(), trained).get_potential_energy()
    atoms = attached(slab(), trained)
    atoms.get_potential_energy()
    atoms.positions[-1] = np.nan
    for _ in range(2):
        with pytest.raises(InputError, match="not finite"):
            atoms.get_potential_energy()


def test_far_from_the_origin(model):
    """1000 Å away, where the next float32 is 6e-5 Å further; also of a list that was made elsewhere."""
    single = model.replace(params=jax.tree.map(lambda a: a.astype(np.float32), model.params))
    near, away = attached(slab(), single), attached(slab(), single)
    away.positions += [1000.0, 1000.0, 0.0]
    for _ in range(2):
        forces, others = (a.get_forces(apply_constraint=False) for a in (near, away))
        np.testing.assert_allclose(others, forces, atol=2e-5 * np.abs(forces).max())
        for atoms in (near, away):
            atoms.positions[-1] += [0.05, 0.1, -0.05]
    assert away.calc.lists_built == 1
    found = minimise(single, [single.structure(a) for a in (near, away)], steps=1).paths
    forces, others = (m.forces for m in found)
    np.testing.assert_allclose(others, forces, atol=2e-5 * np.abs(forces).max())


def test_single_precision(model, monkeypatch):
    """The dtype is that of the parameters."""
    evaluate, kinds = calculator.evaluate, set()

    def told(network, params, scale, graph, positions, *others):
        found = evaluate(network, params, scale, graph, positions, *others)
        kinds.update(np.dtype(x.dtype) for x in (graph.nodes["positions"], positions, found.forces))
        return found

    monkeypatch.setattr(calculator, "evaluate", told)
    single = model.replace(params=jax.tree.map(lambda a: a.astype(np.float32), model.params))
    atoms = attached(slab(), single)
    energy, forces = model.energy_and_forces(slab())
    assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-3)
    np.testing.assert_allclose(
        atoms.get_forces(apply_constraint=False), forces, atol=1e-3 * np.abs(forces).max()
    )
    assert kinds == {np.dtype(np.float32)}
