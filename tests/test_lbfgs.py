"""L-BFGS in batches: ASE's, structure by structure; and static models, which have no other path."""

import dataclasses

import jax
import numpy as np
import pytest
from ase.build import bulk
from ase.filters import UnitCellFilter
from ase.optimize import LBFGS
from tiny import crystal, molecule, slab, tiny_config, tiny_model

import relaxnet_jax
from relaxnet_jax import batching, calculator, lbfgs
from relaxnet_jax.batching import fitting_shape, shape_of
from relaxnet_jax.calculator import RelaxNetCalculator
from relaxnet_jax.errors import InputError
from relaxnet_jax.lbfgs import inverse_hessian_times, minimise
from relaxnet_jax.potential import Evaluation, compiled_shapes
from relaxnet_jax.predict import judge, predict_structures, relax
from relaxnet_jax.relaxation.report import cell_force

pytestmark = pytest.mark.usefixtures("x64")
FMAX = 0.02


@pytest.fixture(scope="module")
def model(x64):
    """EGNN layers: the quickest to compile."""
    config = tiny_config(
        "static", model__architecture="egnn", model__layers=1, model__attention=False
    )
    table = np.zeros(119)
    table[[1, 8, 78]] = -3.0, -5.0, -2.0
    return tiny_model(config).replace(element_energies=table)


def test_a_loop_over_structures_has_few_shapes(model, monkeypatch):
    """A program is compiled for every shape: calculators, minimisations and single energies share them."""
    tried = {"evaluate": [], "_evaluate": []}

    def fake(name):
        def nothing(network, params, scale, graph, positions, *others):
            tried[name].append(shape_of(graph))
            energies = np.zeros(graph.n_node.shape[0])
            return Evaluation(energies, np.zeros_like(positions), None, None)

        return nothing

    monkeypatch.setattr(batching, "_known", {})
    for module in (calculator, lbfgs):
        monkeypatch.setattr(module, "evaluate", fake("evaluate"))
    monkeypatch.setattr(relaxnet_jax.model, "_evaluate", fake("_evaluate"))
    rng = np.random.default_rng(0)
    own = set()
    for _ in range(30):
        n = int(rng.integers(1, 9))
        atoms = bulk("Cu", "fcc", a=rng.uniform(3.4, 4.4)) * (n, 1, 1)
        atoms.rattle(0.05, seed=int(rng.integers(1000)))
        own.add(fitting_shape([model.structure(atoms)], rounded=True))
        atoms.calc = RelaxNetCalculator(model)
        atoms.get_potential_energy()
        model.energy_and_forces(atoms)
    assert [len(t) for t in tried.values()] == [30, 30] and len(own) > 12
    assert all(2 * len(set(t)) <= len(own) for t in tried.values())
    tried["evaluate"].clear()
    for _ in range(30):
        atoms = bulk("Cu", "fcc", a=rng.uniform(3.4, 4.4)) * (int(rng.integers(1, 9)), 1, 1)
        atoms.rattle(0.05, seed=int(rng.integers(1000)))
        minimise(model, [model.structure(atoms)], batch_size=2)
    assert len(tried["evaluate"]) == 30 and 2 * len(set(tried["evaluate"])) <= len(own)


def test_two_loop_recursion_is_bfgs():
    """Against the inverse Hessian updated as a full matrix."""
    rng = np.random.default_rng(0)
    pairs, dense = [], np.eye(6) / 70
    for _ in range(4):
        s = rng.normal(size=6)
        y = 3 * s + 0.1 * rng.normal(size=6)
        left = np.eye(6) - np.outer(s, y) / (s @ y)
        dense = left @ dense @ left.T + np.outer(s, s) / (s @ y)
        pairs.append((s.reshape(2, 3), y.reshape(2, 3)))
    force = rng.normal(size=(2, 3))
    np.testing.assert_allclose(
        inverse_hessian_times(force, pairs).ravel(), dense @ force.ravel(), rtol=1e-12
    )


@pytest.fixture(scope="module")
def systems():
    rattled = crystal()
    rattled.positions += np.random.default_rng(1).normal(0, 0.05, (3, 3))
    return [slab(), rattled, molecule()]


@pytest.fixture(scope="module")
def found(model, systems):
    """All of them, two at a time."""
    before = compiled_shapes()
    structures = [model.structure(a) for a in systems]
    result = minimise(model, structures, fmax=FMAX, steps=80, batch_size=2)
    assert compiled_shapes() - before <= 3
    return result


def ase_energies(model, atoms, fmax, steps=80):
    """Energies of every step of ASE's LBFGS, and whether it converged."""
    atoms, energies = atoms.copy(), []
    atoms.calc = RelaxNetCalculator(model)
    optimiser = LBFGS(atoms, logfile=None, maxstep=0.2, memory=100)
    optimiser.attach(lambda: energies.append(atoms.get_potential_energy()))
    return bool(optimiser.run(fmax=fmax, steps=steps)), np.array(energies)


def test_steps_are_ases_until_curvature_is_negative(model, systems, found):
    compared = 0
    for atoms, ours in zip(systems, found.paths):
        free = np.ones(len(atoms), bool)
        if atoms.constraints:
            free[atoms.constraints[0].index] = False
        s, y = np.diff(ours.positions, axis=0), -np.diff(ours.forces, axis=0)
        curvature = (s * y)[:, free].sum((1, 2))
        n = min(10, (curvature <= 0).argmax() if (curvature <= 0).any() else 10) + 2
        _, energies = ase_energies(model, atoms, FMAX, n - 1)
        np.testing.assert_allclose(ours.energies[:n], energies, rtol=0, atol=1e-9)
        compared += n - 2
    assert compared >= 5


def test_the_minima_are_ases(model, systems, found):
    """From somewhere near each minimum: the same one in as many steps."""
    near = []
    for k, (atoms, m) in enumerate(zip(systems, found.paths)):
        if m.converged:
            near.append(atoms.copy())
            noise = np.random.default_rng(k).normal(0, 0.02, m.positions[-1].shape)
            near[-1].positions = m.positions[-1] + noise
    ours = minimise(model, [model.structure(a) for a in near], fmax=5e-3, steps=80, batch_size=2)
    compared = 0
    for atoms, m in zip(near, ours.paths):
        converged, energies = ase_energies(model, atoms, 5e-3)
        assert converged == m.converged
        if converged:  # the slab's minimum is a flat one that noise leaves
            assert m.energies[-1] == pytest.approx(energies[-1], abs=1e-4)
            assert abs(m.steps - (len(energies) - 1)) <= 2
            compared += 1
    assert compared >= 2


def test_paths(systems, found):
    """Fall, end below fmax, hold what is fixed, and move nothing by more than the longest step."""
    assert sum(m.converged for m in found.paths) >= 2 and found.seconds > 0
    for atoms, m in zip(systems, found.paths):
        assert (m.positions[0] == atoms.positions).all() and len(m.forces) == m.steps + 1
        steps = np.linalg.norm(np.diff(m.positions, axis=0), axis=-1)
        assert steps.max() < 0.2 + 1e-9
        assert m.energies[-1] < m.energies[0] - 1e-3 and m.stresses is None
        free = np.ones(len(atoms), bool)
        if atoms.constraints:
            free[atoms.constraints[0].index] = False
            assert (m.positions[:, ~free] == atoms.positions[~free]).all()
        if m.converged:
            assert np.linalg.norm(m.forces[-1][free], axis=1).max() < FMAX


def test_lists_follow_the_atoms(model, systems, found):
    """The last energy of each path is that of the structure there, with a list of its own."""
    for atoms, m in zip(systems, found.paths):
        atoms = atoms.copy()
        atoms.positions = m.positions[-1]
        atoms.calc = RelaxNetCalculator(model)
        assert m.energies[-1] == pytest.approx(atoms.get_potential_energy(), abs=1e-8)
        forces = atoms.get_forces(apply_constraint=False)
        np.testing.assert_allclose(m.forces[-1], forces, atol=1e-7)


def test_static_models_predict_by_minimisation(model, systems):
    structure = model.structure(systems[1])
    (path,) = predict_structures(model, [structure], np.array([0.0, 0.5, 1.0]))
    (whole,) = minimise(model, [structure], batch_size=1).paths
    middle = round(0.5 * whole.steps)
    np.testing.assert_allclose(path.positions, whole.positions[[0, middle, -1]], atol=1e-9)
    np.testing.assert_allclose(path.energies, whole.energies[[0, middle, -1]], atol=1e-9)


def test_only_potentials_are_minimised(model):
    explicit = model.replace(config=tiny_config("explicit"))
    with pytest.raises(InputError, match=r"dynamics\.latent"):
        minimise(explicit, [])
    assert relax(model, []) == []


def test_what_does_not_fit_in_memory_is_evaluated_in_parts(model, systems, monkeypatch):
    """Batches are halved, what failed once is not tried again, and a structure that never fits is named."""
    structures = [model.structure(a) for a in systems]
    whole = minimise(model, structures, steps=3)
    largest = max(s.n_atoms for s in structures)
    real, tried = lbfgs.evaluate, []

    def small_device(network, params, scale, graph, *args):
        tried.append(int(graph.n_node[np.asarray(graph.globals["mask"])].sum()))
        if tried[-1] > room:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
        return real(network, params, scale, graph, *args)

    monkeypatch.setattr(lbfgs, "evaluate", small_device)
    room, done = largest, []
    found = minimise(model, structures, steps=3, progress=done.append)
    assert done[-1] == len(structures) and sum(n > room for n in tried) <= 3  # all, and pairs
    for one, other in zip(found.paths, whole.paths):
        np.testing.assert_allclose(one.positions, other.positions, atol=1e-9)
        np.testing.assert_allclose(one.energies, other.energies, atol=1e-9)
    room = largest - 1
    with pytest.warns(RuntimeWarning, match=f"its {largest} atoms do not fit"):
        paths = relax(model, systems, n_frames=3, steps=3)
    lost = [s.n_atoms == largest for s in structures]
    assert [bool(np.isnan(path.energies).all()) for path in paths] == lost


def test_a_structure_alone_gets_no_more_room_than_it_needs(model, systems, monkeypatch):
    """Where the rounded shape, or that of a batch before it, does not fit, its own may."""
    structures = sorted(map(model.structure, systems), key=lambda s: fitting_shape([s]).cost)
    whole = minimise(model, structures, steps=3)
    real, tried = lbfgs.evaluate, []

    def small_device(network, params, scale, graph, *args):
        tried.append(shape_of(graph))
        if tried[-1].cost > room:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
        return real(network, params, scale, graph, *args)

    monkeypatch.setattr(lbfgs, "evaluate", small_device)
    room = max(fitting_shape([s]).cost for s in structures)
    assert fitting_shape([structures[-1]], rounded=True).cost > room
    found = minimise(model, structures, steps=3)
    assert not any(m.failure for m in found.paths)
    for one, other in zip(found.paths, whole.paths):
        np.testing.assert_allclose(one.energies, other.energies, atol=1e-9)
    room -= 1
    tried.clear()
    found = minimise(model, structures, steps=3)
    assert [bool(m.failure) for m in found.paths].count(True) == 1
    assert sum(shape.cost > room for shape in tried) <= 5  # rounded or shared, and its own: once


def test_minimisations_that_end_early_are_told(model, systems):
    structure = model.structure(systems[1])
    (early,) = judge(model, [("early", structure)], 3, steps=1)
    assert ("not converged", "1 LBFGS steps did not reach fmax") in [flag[:2] for flag in early.flags]
    with pytest.warns(UserWarning, match="not converged: 1 LBFGS steps did not reach fmax"):
        relax(model, systems[1], n_frames=2, steps=1)
    (late,) = judge(model, [("late", structure)], 3, fmax=100.0)
    assert all(flag.name != "not converged" for flag in late.flags)
    assert len(relax(model, systems[1], n_frames=2, fmax=100.0).energies) == 2


def test_cells_converge_by_what_is_reported(model):
    """The largest force of a strained cell is W/N, as of `cell_force`, and not that of the coordinates."""
    config = dataclasses.replace(
        model.config, dynamics=dataclasses.replace(model.config.dynamics, cell="variable")
    )
    variable = model.replace(config=config)
    descent = lbfgs._Descent(variable, variable.structure(crystal()), 0.2)
    descent.x[descent.size :] = descent.size * np.diag([1.1, 1.0, 0.9])
    virial = np.array([[0.14, 0.01, 0.0], [0.01, 0.02, 0.0], [0.0, 0.0, 0.03]])
    descent.take(-1.0, np.full((descent.size, 3), 1e-3), virial)
    volume = abs(np.linalg.det(descent.cell))
    assert descent.fmax() == pytest.approx(cell_force(descent.path[-1][4], volume, descent.size), rel=1e-9)
    assert descent.fmax() != pytest.approx(np.linalg.norm(descent.force, axis=1).max(), rel=0.01)


def test_cells_take_ases_steps(model, monkeypatch):
    """Of `UnitCellFilter`, until curvature is negative, over new neighbour lists."""
    dynamics = dataclasses.replace(model.config.dynamics, cell="variable")
    graph = dataclasses.replace(model.config.graph, skin=0.05)
    variable = model.replace(
        config=dataclasses.replace(model.config, dynamics=dynamics, graph=graph)
    )
    known, made, product, around = [], [], lbfgs.inverse_hessian_times, lbfgs._Descent._around

    def counted(force, pairs):
        known.append(len(pairs))
        return product(force, pairs)

    def listed(descent):
        made.append(len(descent.path))
        return around(descent)

    monkeypatch.setattr(lbfgs, "inverse_hessian_times", counted)
    monkeypatch.setattr(lbfgs._Descent, "_around", listed)
    atoms, energies = crystal(), []
    atoms.rattle(0.1, seed=1)
    atoms.set_cell(1.04 * atoms.cell.array, scale_atoms=True)
    (ours,) = minimise(variable, [variable.structure(atoms)], fmax=1e-6, steps=8).paths
    # A step that knows fewer pairs than there were steps before has left one out.
    n = next((k for k, pairs in enumerate(known) if pairs < k), len(known)) + 1
    assert n >= 4 and min(made) < n
    atoms.calc = RelaxNetCalculator(variable)
    optimiser = LBFGS(UnitCellFilter(atoms), logfile=None, maxstep=0.2, memory=100)
    optimiser.attach(lambda: energies.append(atoms.get_potential_energy()))
    optimiser.run(fmax=1e-6, steps=n - 1)
    np.testing.assert_allclose(ours.energies[:n], energies, rtol=0, atol=1e-8)
    np.testing.assert_allclose(ours.cells[n - 1], atoms.cell.array, atol=1e-8)
    assert np.abs(ours.cells[n - 1] - ours.cells[0]).max() > 0.01
