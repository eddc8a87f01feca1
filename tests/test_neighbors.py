"""Neighbour lists against matscipy, their slots, and the gathers that rely on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from matscipy.neighbours import neighbour_list
from tiny import perfect, systems, tiny_config

from relaxnet_jax.batching import collate, fitting_shape
from relaxnet_jax.errors import InputError
from relaxnet_jax.graph import FAR, build_structure, edge_vectors, shift_vectors
from relaxnet_jax.neighbors import build_neighbors
from relaxnet_jax.ops import (
    gather_senders,
    masked_mean,
    safe_divide,
    safe_norm,
    spread_slots,
    sum_slots,
)

CUTOFF, TRIPLET, SKIN = 3.4, 2.6, 0.4


def random_cells():
    """Skewed cells of 1 to 6 atoms, far smaller than the cutoff to twice its size."""
    rng = np.random.default_rng(0)
    for k in range(40):
        size = rng.uniform(1.6, 7.0)
        cell = size * (np.eye(3) + rng.uniform(-0.6, 0.6, (3, 3)))
        if abs(np.linalg.det(cell)) < 0.3 * size**3:
            continue
        n = int(rng.integers(1, 7)) if size > 3.5 else 1
        pbc = rng.random(3) < 0.8 if k % 2 else True
        # Positions outside the cell too.
        yield Atoms(
            f"C{n}", scaled_positions=rng.uniform(-1.5, 2.5, (n, 3)), cell=cell, pbc=pbc
        )


def edges_of(neighbors):
    """{(i, j, S)} of the used slots, and the vectors' rows in the same order."""
    i, slot = np.nonzero(neighbors.mask)
    return i, neighbors.senders[i, slot], neighbors.shifts[i, slot], slot


def build(atoms):
    try:
        return build_neighbors(
            atoms.positions, atoms.cell.array, atoms.pbc, CUTOFF, TRIPLET, SKIN, 0.2)
    except InputError:
        return None  # random atoms that happen to coincide


def all_structures():
    return [*random_cells(), *systems(), *perfect().values()]


def test_same_pairs_as_matscipy():
    sizes = []
    for atoms in all_structures():
        neighbors = build(atoms)
        if neighbors is None:
            continue
        i, j, shifts, _ = edges_of(neighbors)
        reference = atoms.copy()
        if reference.cell.rank < 3:  # matscipy wants a cell, whatever is not periodic
            reference.cell[:] = np.where(reference.pbc[:, None], reference.cell, 1e3 * np.eye(3))
        expected = neighbour_list("ijS", reference, CUTOFF + SKIN)
        found = {(a, b, *s) for a, b, s in zip(i.tolist(), j.tolist(), shifts.tolist())}
        wanted = {(a, b, *s) for a, b, s in zip(*(v.tolist() for v in expected))}
        assert found == wanted
        assert len(i) == len(found)  # each once
        vectors = atoms.positions[j] + shifts @ atoms.cell.array - atoms.positions[i]
        assert (np.linalg.norm(vectors, axis=1) < CUTOFF + SKIN).all()
        sizes.append(len(found))
    assert len(sizes) > 30 and max(sizes) > 100 and 0 in sizes


def test_slots():
    """Sorted by distance; bonds come first and all of them; reversal is an involution."""
    for atoms in all_structures():
        neighbors = build(atoms)
        if neighbors is None:
            continue
        i, j, shifts, slot = edges_of(neighbors)
        vectors = atoms.positions[j] + shifts @ atoms.cell.array - atoms.positions[i]
        lengths = np.full(neighbors.mask.shape, np.inf)
        lengths[i, slot] = np.linalg.norm(vectors, axis=1)
        np.testing.assert_allclose(np.sort(lengths, 1), lengths, atol=1e-9)
        bonds = lengths < TRIPLET + 0.2
        assert neighbors.n_bonds == max(1, bonds.sum(1).max())
        assert not bonds[:, neighbors.n_bonds :].any()
        assert neighbors.n_slots == max(1, neighbors.mask.sum(1).max())
        back = neighbors.reverse_slot[i, slot]
        assert (neighbors.senders[j, back] == i).all()
        assert (neighbors.shifts[j, back] == -shifts).all()
        assert (neighbors.reverse_slot[j, back] == slot).all()
        unused = ~neighbors.mask
        own = np.broadcast_to(np.arange(len(atoms))[:, None], unused.shape)
        assert (neighbors.senders[unused] == own[unused]).all()
        assert (neighbors.shifts[unused] == 0).all()


def test_two_atoms_at_one_point():
    config = tiny_config()
    for positions, cell in (([[0, 0, 0], [0, 0, 0.01]], np.zeros((3, 3))),
                            ([[0, 0, 0], [0, 0, 3.995]], 4 * np.eye(3))):  # fmt: skip
        with pytest.raises(InputError, match=r"here: atoms . and . are 0\.0.* duplicate"):
            build_structure([1, 1], positions, cell, cell.any(), config, name="here")


@pytest.mark.parametrize("changes, message", [
    ({"numbers": []}, "no atoms"),
    ({"numbers": [0, 1]}, "atomic number 0"),
    ({"positions": [[0, 0, 0], [np.nan, 0, 1]]}, "atom 1 is not finite"),
    ({"cell": np.full((3, 3), np.inf)}, "cell is not finite"),
    ({"cell": np.ones((3, 3)), "pbc": True}, "zero volume"),
    ({"cell": np.diag([0.0, 5, 5]), "pbc": [True, False, False]}, "zero volume"),
])  # fmt: skip
def test_unusable_structures(changes, message):
    values = {"numbers": [1, 8], "positions": [[0, 0, 0], [0, 0, 1.0]],
              "cell": np.zeros((3, 3)), "pbc": False} | changes  # fmt: skip
    if not values["numbers"]:
        values["positions"] = np.zeros((0, 3))
    with pytest.raises(InputError, match=message) as error:
        build_structure(values["numbers"], values["positions"], values["cell"], values["pbc"],
                        tiny_config(), name="file.cif")  # fmt: skip
    assert str(error.value).startswith("file.cif: ")


@pytest.fixture(scope="module")
def graph(x64):
    structures = [build_structure(a.numbers, a.positions, a.cell.array, a.pbc, tiny_config())
                  for a in systems()]  # fmt: skip
    shape = fitting_shape(structures)
    shape = type(shape)(6, shape.n_atoms + 3, shape.n_slots + 2, shape.n_bonds + 1)
    return jax.tree.map(jnp.asarray, collate(structures, shape, np.float64))


def test_edge_vectors(graph):
    """positions[sender] + shift - positions[receiver]; antisymmetric; far in unused slots."""
    x = graph.nodes["positions"]
    vectors = np.asarray(edge_vectors(graph, x, shift_vectors(graph)))
    used, reverse = np.asarray(graph.edges["mask"]), np.asarray(graph.edges["reverse"])
    cell = np.asarray(graph.globals["cell"])[np.asarray(graph.nodes["graph"])]
    shifts = np.einsum("ea,eab->eb", graph.edges["shifts"], cell[graph.receivers])
    expected = np.asarray(x)[graph.senders] + shifts - np.asarray(x)[graph.receivers]
    np.testing.assert_allclose(vectors[used], expected[used], atol=1e-12)
    np.testing.assert_allclose(vectors[used], -vectors[reverse][used], atol=1e-12)
    assert (np.linalg.norm(vectors[~used], axis=1) == FAR).all()
    assert (reverse[reverse] == np.arange(len(reverse))).all()
    assert (used[reverse] == used).all()


def test_gather_senders(graph):
    """Value, first and second derivatives equal those of plain indexing."""
    senders, reverse = graph.senders, graph.edges["reverse"]
    n = graph.nodes["mask"].shape[0]
    rng = np.random.default_rng(0)
    x, w, v = (jnp.asarray(rng.normal(size=(k, 2))) for k in (n, len(senders), n))

    def function(gather):
        def f(x):
            y = gather(x)
            return jnp.sum(w * y**3) + jnp.sum(jnp.sin(y[:, 0]) * y[:, 1] ** 2)

        def second(x):
            return jnp.vdot(jax.grad(f)(x), v)

        def third(x):
            return jnp.vdot(jax.grad(second)(x), v)

        return jax.jit(lambda x: (gather(x), f(x), jax.grad(f)(x), jax.grad(second)(x),
                                  jax.grad(third)(x)))  # fmt: skip

    ours = function(lambda x: gather_senders(x, senders, reverse))(x)
    plain = function(lambda x: x[senders])(x)
    for a, b in zip(ours, plain):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=1e-10)


def test_slot_sums():
    values = jnp.arange(24.0).reshape(6, 4)
    np.testing.assert_array_equal(sum_slots(values, 3), values.reshape(3, 2, 4).sum(1))
    np.testing.assert_array_equal(spread_slots(values, 2), np.repeat(values, 2, axis=0))


def test_safe_operations():
    """Zero, with zero gradient, where the plain ones divide by zero."""
    x = jnp.asarray([[0.0, 0, 0], [3, 0, 4]])
    np.testing.assert_allclose(safe_norm(x), [0, 5])
    np.testing.assert_allclose(jax.grad(lambda x: safe_norm(x).sum())(x), x / 5)
    a, b = jnp.asarray([1.0, 6]), jnp.asarray([0.0, 3])
    np.testing.assert_allclose(safe_divide(a, b), [0, 2])
    by_a, by_b = jax.grad(lambda a, b: safe_divide(a, b).sum(), argnums=(0, 1))(a, b)
    np.testing.assert_allclose(by_a, [0, 1 / 3])
    np.testing.assert_allclose(by_b, [0, -2 / 3])
    mask = jnp.asarray([True, False])
    assert masked_mean(jnp.asarray([4.0, jnp.nan]), mask) == 4
    assert masked_mean(jnp.asarray([4.0, 5.0]), mask & False) == 0
