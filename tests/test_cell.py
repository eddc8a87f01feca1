"""Cells that relax: stress, the laws a strained crystal obeys, and what may not be strained."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase.build import make_supercell
from tiny import (
    SCHEMES,
    atom_slices,
    batch,
    compiled,
    crystal,
    no_weights,
    random_rotation,
    slab,
    split,
    systems,
    tiny_config,
    tiny_model,
)

from relaxnet_jax import potential, solver, strain
from relaxnet_jax.batching import collate, fitting_shape
from relaxnet_jax.graph import structure_from_atoms
from relaxnet_jax.model import network_of
from relaxnet_jax.predict import relax

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module", params=SCHEMES)
def case(request, x64):
    config = tiny_config(
        request.param, dynamics__cell="variable", dynamics__friction=True, dynamics__time_scale=True,
        dynamics__mass="learned" if request.param == "explicit" else "unit")  # fmt: skip
    model = tiny_model(config)
    if request.param == "explicit":  # masses within reason
        heads = {k: jax.tree.map(lambda leaf: 0.1 * leaf, model.params[k])
                 for k in ("mobility_head", "compliance_head")}  # fmt: skip
        model = model.replace(params=model.params | heads)
    if request.param == "implicit":  # strains within the skin
        gate = jax.tree.map(lambda leaf: 0.2 * leaf, model.params["strain_gate"])
        model = model.replace(params=model.params | {"strain_gate": gate})
    case = types.SimpleNamespace(config=config, model=model, latent=request.param)
    case.paths = solve(case, systems())
    return case


def solve(case, atoms):
    """[positions (n, N, 3), energies (n,), forces, cells (n, 3, 3), stresses] of each structure."""
    graph = batch(atoms, case.config)
    r = compiled(case.config).trajectory(case.model, graph)
    vectors = [split(v, atoms) for v in (r.positions, r.forces)]
    return [
        types.SimpleNamespace(
            positions=x, forces=f, **{k: np.asarray(getattr(r, k))[:, i]
                                      for k in ("energies", "cells", "stresses")})
        for i, (x, f) in enumerate(zip(*vectors))
    ]  # fmt: skip


def strains(path):
    return np.asarray(strain.log_strain(jnp.asarray(strain.deformations(path.cells))))


def test_there_is_something_to_test(case):
    assert np.abs(strains(case.paths[2])[-1]).max() > 5e-3
    assert np.abs(strains(case.paths[1])[-1]).max() > 1e-3
    for path in case.paths[1:]:
        assert np.abs(path.stresses).max() > 1e-4
        np.testing.assert_allclose(path.stresses, np.swapaxes(path.stresses, 1, 2), atol=1e-12)


def test_learned_masses_matter_and_keep_the_centroid(case):
    """Other atoms, other mobilities, other compliances; what nothing holds does not drift."""
    molecule = case.paths[0].positions
    np.testing.assert_allclose(
        molecule.mean(1), molecule[:1].mean(1).repeat(len(molecule), 0), atol=1e-9
    )
    if case.latent != "explicit":
        return
    for head in ("mobility_head", "compliance_head"):
        none = jax.tree.map(lambda leaf: 0.0 * leaf, case.model.params[head])
        others = solve(types.SimpleNamespace(
            config=case.config, model=case.model.replace(params=case.model.params | {head: none})),
            systems())  # fmt: skip
        moved = [np.abs(a.positions - b.positions).max() for a, b in zip(case.paths, others)]
        assert moved[2] > 1e-5
        assert (moved[0] > 1e-5) == (head == "mobility_head")  # the molecule has no cell


def test_virial_is_the_strain_derivative(case):
    """Every component by central differences, atoms and lattice strained together, at D != 1."""
    atoms, config = systems(), case.config
    graph, network = batch(atoms, config), network_of(config)
    x = graph.nodes["positions"]
    latent = compiled(config).start(case.model, graph, x).latent
    start = np.eye(3) + np.array([[0.02, 0.01, 0], [-0.005, -0.01, 0.02], [0, 0.01, 0.015]])

    @jax.jit
    def evaluate(change):
        deformation = jnp.broadcast_to(change @ start, (graph.n_node.shape[0], 3, 3))
        return potential.energies_and_forces(
            network, case.model.params, case.model.energy_scale, graph,
            x @ (change @ start).T, latent, deformation)  # fmt: skip

    found, numeric, h = evaluate(np.eye(3)), np.zeros((3, 3, 3)), 1e-5
    for a in range(3):
        for b in range(3):
            e = np.zeros((3, 3))
            e[a, b] += h / 2
            e[b, a] += h / 2
            up, down = (evaluate(np.eye(3) + s * e).energies[:3] for s in (1, -1))
            numeric[:, a, b] = (up - down) / (2 * h)
    assert np.abs(numeric).max() > 0.05
    np.testing.assert_allclose(found.virial[:3], numeric, atol=1e-7 * np.abs(numeric).max() + 1e-9)
    plain = potential.energies_and_forces(
        network, case.model.params, case.model.energy_scale, graph, x, latent)  # fmt: skip
    still = evaluate(np.linalg.inv(start))  # the same lattice: the same energies and forces
    np.testing.assert_allclose(still.energies, plain.energies, atol=1e-11)
    np.testing.assert_allclose(still.forces, plain.forces, atol=1e-11)


def test_a_direct_prediction_strains_the_cell_along_the_path():
    """Log strains grow evenly, turn with the crystal, and stay away from what may not be strained."""
    config = tiny_config("direct", dynamics__cell="variable", loss__forces=0.0, loss__stress=0.0)
    model = tiny_model(config)
    gate = jax.tree.map(lambda leaf: 0.1 * leaf, model.params["strain_gate"])
    model = model.replace(params=model.params | {"strain_gate": gate})
    case = types.SimpleNamespace(config=config, model=model)
    paths = solve(case, systems())
    times = np.linspace(0, 1, config.dynamics.frames)[:, None, None]
    for path in paths[1:]:
        grown = strains(path)
        assert np.abs(grown[-1]).max() > 1e-3
        np.testing.assert_allclose(grown, times * grown[-1], atol=2e-5)
        assert not path.stresses.any()
    assert np.ptp(paths[0].cells, axis=0).max() == 0  # the molecule has none
    q, turned = random_rotation(3, -1), systems()
    for a in turned:
        a.set_cell(a.cell.array @ q.T)
        a.positions = a.positions @ q.T
    for path, reference in zip(solve(case, turned), paths):
        close(path.positions, reference.positions @ q.T)
        close(path.cells, reference.cells @ q.T)
    still = [structure_from_atoms(a, config, relax_cell=False) for a in systems()]
    held = collate(still, fitting_shape(still), np.float64)
    found = solver.solve_trajectory(
        network_of(config), model.params, model.energy_scale, jax.tree.map(jnp.asarray, held))  # fmt: skip
    np.testing.assert_array_equal(
        found.deformation, np.broadcast_to(np.eye(3), found.deformation.shape)
    )
    np.testing.assert_array_equal(found.positions, found.reference)


def test_exponential_is_the_inverse_of_the_logarithm():
    rng = np.random.default_rng(0)
    tensor = strain.symmetric(jnp.asarray(rng.uniform(-0.1, 0.1, (20, 3, 3))))
    deformation = strain.exponential(tensor)
    np.testing.assert_allclose(deformation, jax.vmap(jax.scipy.linalg.expm)(tensor), atol=2e-6)
    np.testing.assert_allclose(strain.log_strain(deformation), tensor, atol=2e-4)


@pytest.mark.parametrize("determinant", [1, -1], ids=["rotation", "reflection"])
def test_the_cell_turns_with_the_crystal(case, determinant):
    q = random_rotation(3, determinant)
    turned = systems()
    for a in turned:
        a.set_cell(a.cell.array @ q.T)
        a.positions = a.positions @ q.T
    for path, reference in zip(solve(case, turned), case.paths):
        close(path.positions, reference.positions @ q.T)
        close(path.cells, reference.cells @ q.T)
        close(path.energies, reference.energies)
        close(path.stresses, q @ reference.stresses @ q.T)


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-8 * max(1.0, np.abs(theirs).max()))


def test_translation_wrapping_permutation(case):
    """Atoms shifted together, wrapped, and in another order: the same lattice coordinates."""
    moved, order, images = crystal(), [2, 0, 1], np.array([[1, 0, -2], [0, 0, 0], [3, 1, 0]])
    moved = moved[order]
    shift = np.array([0.4, -0.3, 0.9])
    moved.positions += shift + images @ moved.cell.array
    path, reference = solve(case, [moved])[0], case.paths[2]
    close(path.cells, reference.cells)
    close(path.energies, reference.energies)
    close(path.forces, reference.forces[:, order])
    steps = strain.deformations(reference.cells)
    expected = reference.positions[:, order] + images @ reference.cells
    close(path.positions, expected + np.einsum("nab,b->na", steps, shift)[:, None])


def test_supercell_and_choice_of_cell(case):
    """Another cell of the same crystal, and two cells of it: the same strain, twice the energy."""
    same = make_supercell(crystal(), [[1, 0, 0], [1, 1, 0], [0, 0, 1]])
    double = make_supercell(crystal(), [[1, 0, 0], [0, 2, 0], [0, 0, 1]])
    reference = case.paths[2]
    for atoms, factor in ((same, 1), (double, 2)):
        path = solve(case, [atoms])[0]
        close(path.energies, factor * reference.energies)
        close(strain.deformations(path.cells), strain.deformations(reference.cells))
        close(path.stresses, reference.stresses)


def test_what_may_not_be_strained(case):
    """Molecules keep their (absent) cell, slabs their vacuum, and fixed cells stay to the bit."""
    molecule, plane, bulk = case.paths
    assert (molecule.cells == molecule.cells[:1]).all()
    step = strain.deformations(plane.cells)
    np.testing.assert_allclose(step[:, 2], np.broadcast_to([0, 0, 1.0], (3, 3)), atol=1e-12)
    np.testing.assert_allclose(step[:, :, 2], np.broadcast_to([0, 0, 1.0], (3, 3)), atol=1e-12)
    assert (np.linalg.norm(plane.cells[:, 2] - plane.cells[0, 2], axis=-1) < 1e-12).all()
    lower = slab().constraints[0].index  # fixed atoms keep their lattice coordinates
    scaled = plane.positions @ np.linalg.inv(plane.cells)
    np.testing.assert_allclose(scaled[:, lower], np.broadcast_to(
        scaled[:1, lower], scaled[:, lower].shape), atol=1e-12)  # fmt: skip

    atoms = [slab(), crystal()]
    held = relax(case.model, atoms, n_frames=3, relax_cell=False)
    free = relax(case.model, atoms, n_frames=3)
    for path, reference in zip(held, (plane, bulk)):
        assert (path.cells == path.cells[:1]).all()
        assert np.abs(path.positions - reference.positions).max() > 1e-4
    for path, reference in zip(free, (plane, bulk)):
        close(path.cells, reference.cells)
        close(path.positions, reference.positions)
    close(free[1].stresses, strain.to_voigt(bulk.stresses))
    assert free[0].stresses is None  # a slab's volume is a matter of taste


def test_held_cells_share_a_batch_and_are_untouched(case):
    """A structure whose cell is held does not notice that its neighbour in the batch is strained."""
    structures = [
        structure_from_atoms(crystal(), case.config, relax_cell=r) for r in (False, True)]  # fmt: skip
    predict = compiled(case.config).trajectory
    found = []
    for members in (structures, structures[:1]):
        shape = fitting_shape(structures)
        graph = jax.tree.map(jnp.asarray, collate(members, shape, np.float64))
        r = predict(case.model, graph)
        found.append((r.positions[:, :3], r.energies[:, 0], r.cells[:, 0], r.stresses[:, 0]))
    for ours, alone in zip(*found):
        np.testing.assert_allclose(ours, alone, rtol=0, atol=1e-12)
    assert (found[0][2] == found[0][2][:1]).all()


def test_gradients_through_the_cell(case):
    """Of a function of final cells and energies: against differences along a random direction."""
    atoms = systems()
    graph, functions = batch(atoms, case.config), compiled(case.config)
    rng = np.random.default_rng(0)
    weights = no_weights(graph)
    weights[2][-1, :3] = 1.0
    weights[0][-1] = rng.normal(size=weights[0][-1].shape)
    weights = [*weights, rng.normal(size=(3, graph.n_node.shape[0], 3, 3))]
    weights[4][:, 3:] = 0
    x = graph.nodes["positions"]
    (_, _), (gradient, by_positions) = functions.weighted(case.model, x, graph, weights)
    leaves, tree = jax.tree.flatten(case.model.params)
    direction = [rng.normal(size=leaf.shape) for leaf in leaves]
    predicted = sum(
        float(np.vdot(d, g)) for d, g in zip(direction, jax.tree.leaves(gradient.params)))  # fmt: skip
    values = []
    for s in (1e-6, -1e-6):
        moved = [leaf + s * d for leaf, d in zip(leaves, direction)]
        model = case.model.replace(params=jax.tree.unflatten(tree, moved))
        values.append(float(functions.weighted(model, x, graph, weights)[0][0]))
    numeric = (values[0] - values[1]) / 2e-6
    np.testing.assert_allclose(predicted, numeric, rtol=1e-5, atol=1e-6 * abs(values[0]))
    for name in ("strain_gate", "log_cell_mass", "log_cell_friction"):
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient.params[name])) > 1e-6
    assert all(np.isfinite(by_positions[rows]).all() for rows in atom_slices(atoms))


def test_log_strain():
    """½ log(DᵀD) of a stretch is its logarithm, of a rotation zero; finite gradient at D = 1."""
    axes = random_rotation(1)
    for stretches, tolerance in (([1.03, 0.98, 1.01], 1e-7), ([1.3, 0.77, 1.1], 1e-3)):
        stretch = axes @ np.diag(stretches) @ axes.T
        expected = axes @ np.diag(np.log(stretches)) @ axes.T
        for rotation in (np.eye(3), random_rotation(2)):
            found = strain.log_strain(jnp.asarray(rotation @ stretch))
            np.testing.assert_allclose(found, expected, atol=tolerance)
            np.testing.assert_allclose(found, np.swapaxes(found, -1, -2), atol=1e-7)
    gradient = jax.grad(lambda d: jnp.sum(strain.log_strain(d) ** 2))(jnp.eye(3))
    assert (np.asarray(gradient) == 0).all()
    voigt = np.arange(6.0)
    np.testing.assert_array_equal(strain.to_voigt(strain.from_voigt(voigt)), voigt)
    matrix = strain.from_voigt(voigt)
    assert matrix[1, 2] == matrix[2, 1] == 3 and matrix[0, 2] == 4 and matrix[0, 1] == 5
