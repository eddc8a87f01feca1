"""Neighbour lists against matscipy, their slots, and the gathers that rely on them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from matscipy.neighbours import neighbour_list
from tiny import perfect, systems, tiny_config

from relaxnet_jax import neighbors as neighborlists
from relaxnet_jax.batching import collate, fitting_shape
from relaxnet_jax.errors import InputError
from relaxnet_jax.graph import (
    FAR,
    bond_vectors,
    build_structure,
    once_per_pair,
    pair_list,
    pair_map,
    pair_vectors,
    unordered_pairs,
)
from relaxnet_jax.neighbors import MAX_SPREAD, build_neighbors, pairs_within
from relaxnet_jax.ops import (
    both_ways,
    convolve_pairs,
    gather_senders,
    safe_divide,
    safe_norm,
    spread,
    sum_edges,
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
        i, j, shifts = neighbors.receivers, neighbors.senders, neighbors.shifts
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


@pytest.mark.parametrize("triplet_skin", [0.0, 0.2])
def test_frames_that_are_known_to_come(triplet_skin):
    """Their pairs and bonds are listed, beside those of the first frame, in the same order; a pair
    that neither has is not."""
    rng = np.random.default_rng(1)
    grown = bonds = 0
    for atoms in systems():
        later = atoms.copy()
        strain = np.eye(3) - 0.12 * np.diag(atoms.pbc)
        later.set_cell(later.cell.array @ strain, scale_atoms=True)
        later.positions += rng.normal(0, 0.5, (len(atoms), 3))

        def listed(atoms, skin=0.0, triplet_skin=0.0, later=()):
            args = (atoms.positions, atoms.cell.array, atoms.pbc, CUTOFF, TRIPLET)
            return build_neighbors(*args, skin, triplet_skin, later=later)

        def rows(found, only=None):
            every = np.column_stack([found.receivers, found.senders, found.shifts])
            return set(map(tuple, every if only is None else every[only]))

        first, then = listed(atoms, SKIN, triplet_skin), listed(later)
        both = listed(atoms, SKIN, triplet_skin, [(later.positions, later.cell.array)])
        assert rows(both) == rows(first) | rows(then)
        also = rows(then, then.bond) if triplet_skin else set()
        assert rows(both, both.bond) == rows(first, first.bond) | also
        assert (np.diff(both.receivers) >= 0).all() and both.bond[both.reverse].tolist() == both.bond.tolist()
        np.testing.assert_array_equal(both.senders[both.reverse], both.receivers)
        assert both.n_slots == np.bincount(both.receivers[both.bond]).max()
        grown += len(rows(both)) - len(rows(first))
        bonds += len(rows(both, both.bond)) - len(rows(first, first.bond))
    assert grown > 20 and (bonds > 5 or not triplet_skin)


def test_order():
    """By receiver, then distance; all bonds are marked; reversal is an involution."""
    for atoms in all_structures():
        neighbors = build(atoms)
        if neighbors is None:
            continue
        i, j, shifts, back = (
            getattr(neighbors, k) for k in ("receivers", "senders", "shifts", "reverse"))  # fmt: skip
        vectors = atoms.positions[j] + shifts @ atoms.cell.array - atoms.positions[i]
        lengths = np.linalg.norm(vectors, axis=1)
        assert (np.diff(i) >= 0).all() and (np.diff(lengths)[np.diff(i) == 0] > -1e-9).all()
        assert (i[back] == j).all() and (j[back] == i).all()
        assert (shifts[back] == -shifts).all() and (back[back] == np.arange(len(i))).all()
        bond = lengths < TRIPLET + 0.2
        doubtful = np.abs(lengths - TRIPLET - 0.2) < 1e-9
        assert ((neighbors.bond == bond) | doubtful).all()
        assert (neighbors.bond[back] == neighbors.bond).all()
        most = max(1, np.bincount(i[neighbors.bond], minlength=1).max())
        assert neighbors.n_slots == most and neighbors.n_bonds == neighbors.bond.sum()


def test_edges_are_ordered_and_reversed_by_one_integer_each():
    """As sorting rows would have them, also where the integer would not fit without ranks; an edge
    without a reverse goes."""
    for atoms in all_structures():
        for away in (0, 2**30):
            i, j, shifts, far = pairs_within(atoms.positions, atoms.cell.array, atoms.pbc, CUTOFF)
            jump = np.zeros((len(atoms), 3), int)
            jump[0] = away * np.where(atoms.pbc, [1, -1, 1], 0)  # the first atom, cells away
            shifts = shifts - jump[j] + jump[i]
            far = np.round(far, 6)  # so that equal ones are
            forward = neighborlists._edge_keys(len(atoms), i, j, shifts)[0]
            rows = np.lexsort((shifts[:, 2], shifts[:, 1], shifts[:, 0], j, i))
            assert (np.diff(forward[rows]) > 0).all()
            order, back = neighborlists._ordered(len(atoms), i, j, shifts, far)
            expected = np.lexsort((shifts[:, 2], shifts[:, 1], shifts[:, 0], j, far, i))
            np.testing.assert_array_equal(order, expected)
            edges = np.column_stack([i, j, shifts])[order]
            mirrored = edges[:, [1, 0, 2, 3, 4]] * [1, 1, -1, -1, -1]
            np.testing.assert_array_equal(edges[back], mirrored)
            if len(i) == 0:
                continue
            without = [column[1:] for column in (i, j, shifts, far)]  # the first edge's reverse is alone
            order, back = neighborlists._ordered(len(atoms), *without)
            left = np.column_stack(without[:3])[order]
            assert len(left) == len(i) - 2
            np.testing.assert_array_equal(left[back], left[:, [1, 0, 2, 3, 4]] * [1, 1, -1, -1, -1])


@pytest.mark.parametrize("open_axes", [(0, 1, 2), (2,)])
def test_atoms_far_apart_change_no_pair(open_axes):
    """vesin kills the process or hangs where they are: those that are near find each other."""
    rng, reach = np.random.default_rng(0), 5.6
    pbc = np.array([k not in open_axes for k in range(3)])
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    cell = np.array([[5.0, 0, 0], [1.0, 6.0, 0], [2.0, 1.0, 12.0]]) @ turn
    near = rng.uniform(0, 6, (12, 3)) @ turn
    out = np.linalg.svd(np.where(pbc[:, None], cell, 0.0))[2][-1]
    apart = near + np.repeat([0.0, 2e6, -3e5], 4)[:, None] * out
    expected = set()
    for k in range(3):
        group = slice(4 * k, 4 * k + 4)
        i, j, shifts, _ = pairs_within(near[group], cell, pbc, reach)
        expected |= {(a + 4 * k, b + 4 * k, *s) for a, b, s in zip(i, j, shifts.tolist())}
    order = rng.permutation(12)
    i, j, shifts, lengths = pairs_within(apart[order], cell, pbc, reach)
    found = {(order[a], order[b], *s) for a, b, s in zip(i, j, shifts.tolist())}
    assert found == expected and len(i) == len(expected) > 0
    direct = np.linalg.norm(apart[order][j] + shifts @ cell - apart[order][i], axis=1)
    np.testing.assert_allclose(lengths, direct, atol=1e-8)


def test_atoms_strewn_too_far_are_refused():
    line = np.outer(np.arange(0.0, 1.5 * MAX_SPREAD, 2.0), [0, 0, 1.0])
    with pytest.raises(InputError, match=r"span 3e\+03 Å .* bring them together"):
        pairs_within(line, np.diag([5.0, 5, 0]), [True, True, False], 5.6)


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
    shape = type(shape)(6, shape.n_atoms + 3, shape.n_edges + 2, shape.n_bonds + 1)
    return jax.tree.map(jnp.asarray, collate(structures, shape, np.float64))


def test_edge_vectors(graph):
    """positions[sender] + offset - positions[receiver]; antisymmetric; far in unused ones."""
    x = graph.nodes["positions"]
    bonds = graph.edges["bonds"]
    for vectors, senders, receivers, edges in (
        (pair_vectors(graph, x), graph.senders, graph.receivers, graph.edges),
        (bond_vectors(graph, x), bonds["senders"], bonds["receivers"], bonds),
    ):
        vectors, used, reverse = (np.asarray(v) for v in (vectors, edges["mask"], edges["reverse"]))
        expected = np.asarray(x)[senders] + edges["offsets"] - np.asarray(x)[receivers]
        np.testing.assert_allclose(vectors[used], expected[used], atol=1e-12)
        np.testing.assert_allclose(vectors[used], -vectors[reverse][used], atol=1e-12)
        assert used.any() and not used.all()
        assert (np.linalg.norm(vectors[~used], axis=1) == FAR).all()
    # Offsets are lattice vectors (the molecule and the padding have none).
    cell = np.asarray(graph.globals["cell"])[np.asarray(graph.nodes["graph"])]
    whole = np.einsum("ea,eab->eb", graph.edges["offsets"], np.linalg.pinv(cell)[graph.receivers])
    molecule = np.asarray(graph.nodes["graph"])[graph.receivers] == 0
    np.testing.assert_allclose(whole[~molecule], np.round(whole[~molecule]), atol=1e-9)
    assert np.abs(whole).max() > 0.9


def test_gather_senders(graph):
    """Value, first and second derivatives equal those of plain indexing."""
    edges, senders = pair_list(graph), graph.senders
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

    ours = function(lambda x: gather_senders(x, edges))(x)
    plain = function(lambda x: x[senders])(x)
    for a, b in zip(ours, plain):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, atol=1e-10)


def test_pairs(graph):
    """Every real edge is in one pair, with its reverse; what is done by pairs, and all its derivatives, is what
    plain indexing of the edges gives, and of `both_ways` what stands in padding reaches nothing."""
    pairs, x = pair_map(graph), graph.nodes["positions"]
    used, n = np.asarray(graph.edges["mask"]), len(graph.senders)
    both = np.asarray(pairs.edges)
    real = both[:, 0] < n
    assert real.any() and not real.all() and (both[~real] == n).all()
    assert sorted(both[real].ravel()) == np.flatnonzero(used).tolist()
    assert (both[real, 1] == np.asarray(graph.edges["reverse"])[both[real, 0]]).all()
    assert (graph.edges["pairs"]["mask"] == real).all()
    once = once_per_pair(graph, x)
    np.testing.assert_array_equal(once[real], pair_vectors(graph, x)[both[real, 0]])
    assert (np.linalg.norm(once[~real], axis=1) == FAR).all()

    rng = np.random.default_rng(0)
    index = np.where(used, np.asarray(pairs.of_edge), 0)
    ends, n_atoms = unordered_pairs(graph), len(x)
    first = np.where(real, both[:, 0], 0)
    i, j = np.asarray(graph.receivers), np.asarray(graph.senders)
    values, filters = (jnp.asarray(rng.normal(size=(k, 2))) for k in (n_atoms, len(both)))
    filters = jnp.where(real[:, None], filters, 0.0)

    def on_edges(w):
        return jnp.where(used[:, None], w[index], 0.0)

    def plain_sum(w, v):
        return jax.ops.segment_sum(on_edges(w) * v[j], i, n_atoms)

    for ours, plain, rows in (
        (lambda w: both_ways(w, pairs), on_edges, len(both)),
        (lambda v: ends.difference(v)[real], lambda v: (v[j] - v[i])[first[real]], n_atoms),
        (lambda v: convolve_pairs(filters, v, ends), lambda v: plain_sum(filters, v), n_atoms),
        (
            lambda w: convolve_pairs(jnp.where(real[:, None], w, 0.0), values, ends),
            lambda w: plain_sum(w, values),
            len(both),
        ),
    ):
        y, v = (jnp.asarray(rng.normal(size=(rows, 2))) for _ in range(2))
        w = jnp.asarray(rng.normal(size=ours(y).shape))

        def results(gather, y=y, v=v, w=w):
            def f(y):
                z = gather(y)
                return jnp.sum(w * z**3) + jnp.sum(jnp.sin(z[:, 0]) * z[:, 1] ** 2)

            def second(y):
                return jnp.vdot(jax.grad(f)(y), v)

            def third(y):
                return jnp.vdot(jax.grad(second)(y), v)

            return jax.jit(lambda y: (gather(y), *(jax.grad(g)(y) for g in (f, second, third))))(y)

        for a, b in zip(results(ours), results(plain)):
            assert np.abs(b).max() > 0.1
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-10)


def test_edge_sums():
    values, receivers = jnp.arange(24.0).reshape(6, 4), jnp.array([0, 0, 0, 2, 2, 3])
    total = sum_edges(values, receivers, 5)
    expected = [values[:3].sum(0), 0 * values[0], values[3:5].sum(0), values[5], 0 * values[0]]
    np.testing.assert_array_equal(total, expected)
    np.testing.assert_array_equal(spread(total, receivers), np.asarray(expected)[receivers])


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
