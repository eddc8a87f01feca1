"""What a trajectory may not depend on, and what it must turn with."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from tiny import (
    SCHEMES,
    SHAPE,
    atom_slices,
    batch,
    bigger,
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

from relaxnet_jax import dynamics

CASES = [(latent, dtype) for latent in SCHEMES for dtype in (np.float64, np.float32)]
CASES += [("triplets", np.float64), ("egnn", np.float64)]


def solve(case, atoms, shape=SHAPE):
    """[(positions, velocities, energies, forces) of each structure]."""
    graph = batch(atoms, case.config, shape, case.dtype)
    result = compiled(case.config).trajectory(case.model, graph)
    vectors = [split(v, atoms) for v in (result.positions, result.velocities, result.forces)]
    energies = np.asarray(result.energies)
    return [
        types.SimpleNamespace(
            positions=x, velocities=u, forces=f, energies=energies[:, k], start=a.positions)
        for k, (x, u, f, a) in enumerate(zip(*vectors, atoms))
    ]  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c[0]}-{np.dtype(c[1]).name}")
def case(request):
    latent, dtype = request.param
    with jax.enable_x64(dtype == np.float64):
        config = tiny_config(latent)
        case = types.SimpleNamespace(
            config=config, model=tiny_model(config, dtype=dtype), dtype=dtype, latent=latent,
            tolerance=1e-9 if dtype == np.float64 else 1e-4)  # fmt: skip
        case.paths = solve(case, systems())
        yield case


def check(case, path, reference, turn=lambda v: v, order=slice(None), energy=1.0):
    """``path`` is ``reference`` with its vectors turned and its atoms in another order."""
    tolerance = case.tolerance

    def close(ours, theirs):
        scale = np.abs(theirs).max()
        assert scale > 0
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * scale)

    # Displacements: the positions' own rounding is not the model's.
    rounding = 0.0 if case.dtype == np.float64 else 2e-6
    moved, expected = path.positions - path.start, turn(reference.positions - reference.start)
    np.testing.assert_allclose(
        moved, expected[:, order], rtol=0, atol=tolerance * np.abs(expected).max() + rounding)
    close(path.velocities, turn(reference.velocities)[:, order])
    close(path.forces, turn(reference.forces)[:, order])
    close(path.energies, energy * reference.energies)


def test_there_is_something_to_test(case):
    """Atoms move, forces are there, and energies change along the path."""
    for path in case.paths:
        assert 0.03 < np.abs(path.positions[-1] - path.start).max() < 1.5
        assert np.abs(path.velocities[0]).max() > 0.03
        assert 0.05 < np.abs(path.forces).max() < 50
        assert np.ptp(path.energies) > 1e-3


@pytest.mark.parametrize("determinant", [1, -1], ids=["rotation", "reflection"])
def test_rotation_reflection_translation(case, determinant):
    """E(3), reflections included: the molecule is chiral, and axial vectors stay apart."""
    q = random_rotation(3, determinant)
    moved = systems()
    for a, shift in zip(moved, np.random.default_rng(0).normal(0, 3, (3, 3))):
        a.set_cell(a.cell.array @ q.T)
        a.positions = a.positions @ q.T + shift
    for path, reference in zip(solve(case, moved), case.paths):
        check(case, path, reference, turn=lambda v: v @ q.T)


def test_inversion(case):
    mirrored = systems()
    for a in mirrored:
        a.set_cell(-a.cell.array)
        a.positions = -a.positions
    for path, reference in zip(solve(case, mirrored), case.paths):
        check(case, path, reference, turn=lambda v: -v)


def test_permutation(case):
    """The order of atoms, and that of structures in the batch, means nothing."""
    orders = [np.random.default_rng(k).permutation(len(a)) for k, a in enumerate(systems())]
    shuffled = [a[order] for a, order in zip(systems(), orders)]
    paths = solve(case, shuffled[::-1])[::-1]
    for path, reference, order in zip(paths, case.paths, orders):
        assert (order != np.arange(len(order))).any()
        check(case, path, reference, order=order)


def test_lattice_translations(case):
    """Atoms moved by lattice vectors, or wrapped into the cell, are the same crystal."""
    rng, moved = np.random.default_rng(1), systems()[1:]
    for a in moved:
        a.positions += (rng.integers(-2, 3, (len(a), 3)) * a.pbc) @ a.cell.array
    wrapped = [a.copy() for a in moved]
    for a in wrapped:
        a.wrap()
        assert np.abs(a.positions - systems()[1 + (len(a) == 3)].positions).max() > 1
    for atoms in (moved, wrapped):
        for path, reference in zip(solve(case, atoms), case.paths[1:]):
            check(case, path, reference)


def test_choice_of_cell(case):
    """a' = a + b (and c' = c - 2a + b in the crystal) spans the same lattice."""
    other = [slab(), crystal()]
    for a, change in zip(other, ([[1, 1, 0], [0, 1, 0], [0, 0, 1]],
                                 [[1, 1, 0], [0, 1, 0], [-2, 1, 1]])):  # fmt: skip
        a.set_cell(np.array(change) @ a.cell.array)
    for path, reference in zip(solve(case, other), case.paths[1:]):
        check(case, path, reference)


@pytest.mark.parametrize("make", [crystal, slab])
def test_supercell(case, make):
    """Twice the cell: twice the energy, the same forces and paths; attention is on."""
    assert case.config.model.attention
    repeats = [(2, 1, 1), (2, 2, 1)] if make is crystal else [(1, 2, 1)]
    unit = make()
    atoms = [unit, *(unit.repeat(r) for r in repeats)]
    single, *larger = solve(case, atoms)
    for path, r in zip(larger, repeats):
        copies = int(np.prod(r))
        check(case, path, single, turn=lambda v, n=copies: np.tile(v, (1, n, 1)), energy=copies)


def test_company(case):
    """Alone or in company: the same path."""
    for index in range(3):
        (alone,) = solve(case, [systems()[index]])
        check(case, alone, case.paths[index])


@pytest.mark.parametrize("latent", SCHEMES)
def test_padding(latent):
    """More room in every dimension of the batch: the same initial state and vector field, and the same
    gradients of energies and forces by the parameters."""
    with jax.enable_x64(True):
        config, atoms = tiny_config(latent), systems()
        model, functions = tiny_model(config), compiled(config)
        found, gradients = [], []

        @jax.grad
        def of_parameters(params, graph, state):
            result = dynamics.evaluate(model.network, params, 1.0, graph, state)
            return jnp.sum(result.energies**2) + jnp.sum(result.forces**2)

        for shape in (SHAPE, bigger(SHAPE, n_graphs=3, n_atoms=9, n_edges=50, n_bonds=30)):
            graph = batch(atoms, config, shape)
            state = functions.start(model, graph, graph.nodes["positions"])
            rate = functions.field(model, graph, state)
            leaves = jax.tree.leaves((state, rate))
            found.append([v for leaf in leaves for v in split(leaf, atoms)])
            gradients.append(jax.jit(of_parameters)(model.params, graph, state))
        assert len(found[0]) == 18
        for snug, roomy in zip(*map(jax.tree.leaves, gradients)):
            np.testing.assert_allclose(roomy, snug, rtol=1e-9, atol=1e-11 * np.abs(snug).max())
        for snug, roomy in zip(*found):
            np.testing.assert_allclose(roomy, snug, rtol=1e-9, atol=1e-11)


def test_fixed_atoms_do_not_move_at_all(case):
    path, atoms = case.paths[1], slab()
    fixed = atoms.constraints[0].index
    start = atoms.positions.astype(case.dtype)
    assert (path.positions[:, fixed] == start[fixed]).all()
    assert (path.velocities[:, fixed] == 0).all()
    assert np.abs(path.forces[:, fixed]).max() > 1e-3  # raw forces act on them all the same


def test_momentum(case):
    """Without fixed atoms sum m u = 0 all along, and the centre of mass stays."""
    for index in (0, 2):
        path, masses = case.paths[index], systems()[index].get_masses()
        largest = np.abs(masses[:, None] * path.velocities).max()
        momentum = np.einsum("i,nia->na", masses, path.velocities)
        assert np.abs(momentum).max() < case.tolerance * largest
        drift = np.einsum("i,nia->na", masses, path.positions - path.start) / masses.sum()
        assert np.abs(drift).max() < case.tolerance * 0.1


@pytest.fixture(scope="module", params=SCHEMES)
def gradient_case(request):
    with jax.enable_x64(True):
        config = tiny_config(request.param, model__layers=1)
        yield config, tiny_model(config)


def test_no_gradient_across_structures(gradient_case):
    """One structure's path does not depend on another's positions: gradients exactly zero."""
    config, model = gradient_case
    atoms = systems()
    graph = batch(atoms, config)
    for index, own in enumerate(atom_slices(atoms)):
        weights = no_weights(graph)
        weights[0][-1, own], weights[2][-1, index] = 1.0 + np.arange(3), 1.0
        _, (_, gradient) = compiled(config).weighted(
            model, graph.nodes["positions"], graph, weights)
        gradient = np.array(gradient)
        assert np.abs(gradient[own]).max() > 0.1
        gradient[own] = 0
        assert (gradient == 0).all()


def test_paths_differ_where_they_should():
    """A guard on the tests above: structures that differ have different energies."""
    with jax.enable_x64(True):
        config = tiny_config("explicit")
        case = types.SimpleNamespace(config=config, model=tiny_model(config), dtype=np.float64)
        a, b = crystal(), crystal()
        b.positions[0] += 0.01
        c = Atoms(b.numbers[[1, 0, 2]], a.positions, cell=a.cell, pbc=True)
        first, moved, swapped = solve(case, [a, b, c])
        assert np.abs(moved.energies - first.energies).max() > 1e-4
        assert np.abs(swapped.energies - first.energies).max() > 1e-2
