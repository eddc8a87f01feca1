"""From relaxations to padded batches: buckets, epochs, frames, element energies."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from tiny import molecule, slab, systems, tiny_config

from relaxnet_jax.batching import BatchShape, collate, fitting_shape, round_up, split_nodes
from relaxnet_jax.constraints import held_atoms
from relaxnet_jax.data.buckets import pack_epoch, plan_buckets, sizes_of
from relaxnet_jax.data.pipeline import collate_samples, epoch_iterator
from relaxnet_jax.data.references import fit_element_energies
from relaxnet_jax.data.sample import frame_slots, make_sample
from relaxnet_jax.data.trajectory import RelaxationTrajectory
from relaxnet_jax.graph import structure_from_atoms

CONFIG = tiny_config(dynamics__frames=5)


def relaxation(atoms, n=7, drift=0.0, name="a", seed=0):
    """Random small steps; every frame also moves as a whole by ``drift`` along y."""
    rng = np.random.default_rng(seed)
    fixed, _ = held_atoms(atoms)
    steps = np.cumsum(rng.normal(0, 0.02, (n, len(atoms), 3)), 0)
    steps = (steps - steps[:1]) * ~fixed[:, None]
    steps[:, :, 1] += drift * np.arange(n)[:, None]
    return RelaxationTrajectory(
        id=name, atomic_numbers=atoms.numbers, positions=atoms.positions + steps,
        cells=np.repeat(atoms.cell.array[None], n, 0), pbc=atoms.pbc,
        energies=np.linspace(-3.0, -4.0, n), forces=rng.normal(size=(n, len(atoms), 3)),
        fixed_mask=fixed)  # fmt: skip


@pytest.fixture(scope="module")
def structures():
    """50 of mixed sizes and densities, in random order."""
    rng = np.random.default_rng(0)
    made = []
    for k in range(50):
        if k % 2:
            a = bulk("Cu", "fcc", a=3.4 + rng.uniform(), cubic=True).repeat(
                (int(rng.integers(1, 3)), 1, 1))  # fmt: skip
        else:
            n = int(rng.integers(1, 9))
            a = Atoms(f"H{n}", np.arange(n)[:, None] * [1.0, 0.3, 0.0])
        made.append(structure_from_atoms(a, CONFIG))
    return [made[k] for k in rng.permutation(50)]


@pytest.mark.parametrize("batch_size, max_buckets", [(1, 1), (4, 3), (16, 3), (64, 5)])
def test_plan_buckets(structures, batch_size, max_buckets):
    buckets = plan_buckets(sizes_of(structures), batch_size, max_buckets, 0.0)
    assert 1 <= len(buckets.shapes) <= max_buckets
    assert buckets.assignment.shape == (50,)
    used, room, seen = 0, 0, []
    for bucket, members in pack_epoch(buckets, sizes_of(structures), None):
        shape = buckets.shapes[bucket]
        graph = collate([structures[i] for i in members], shape)  # raises if they do not fit
        room += shape.n_edges + shape.n_bonds
        used += graph.edges["mask"].sum() + graph.edges["bonds"]["mask"].sum()
        seen += members
        assert len(members) <= 1.5 * batch_size
    assert sorted(seen) == list(range(50))
    np.testing.assert_allclose(buckets.padding, 1 - used / room, rtol=1e-12)
    single = plan_buckets(sizes_of(structures), batch_size, 1, 0.0)
    assert buckets.padding <= single.padding
    if batch_size == 1:  # nothing to fill a batch up with: as many shapes as help
        assert plan_buckets(sizes_of(structures), 1, 4, 0.0).padding < 0.7 * single.padding
    if batch_size == 16:
        assert single.padding < 0.3  # 50 structures in four batches of 16


def test_no_more_buckets_than_needed(structures):
    assert len(plan_buckets(sizes_of(structures), 8, 5, 0.99).shapes) == 1
    same = [structures[0]] * 20
    assert len(plan_buckets(sizes_of(same), 4, 3, 0.5).shapes) == 1


@pytest.mark.parametrize("group", [1, 3])
def test_pack_epoch(structures, group):
    """Every member exactly once; runs of one bucket; seeded."""
    buckets = plan_buckets(sizes_of(structures), 4, 3, 0.0)
    members = np.arange(3, 45)

    def plan(seed):
        rng = None if seed is None else np.random.default_rng(seed)
        return pack_epoch(buckets, sizes_of(structures), rng, members, group)

    for seed in (None, 0, 1):
        packed = plan(seed)
        assert sorted(i for _, batch in packed for i in batch) == members.tolist()
        assert all(buckets.assignment[i] == bucket for bucket, batch in packed for i in batch)
        assert len(packed) % group == 0
        runs = [packed[k : k + group] for k in range(0, len(packed), group)]
        assert all(len({bucket for bucket, _ in run}) == 1 for run in runs)
        assert all(run[0][1] for run in runs)  # no run is all empty
        assert packed == plan(seed)
    assert plan(0) != plan(1)
    empty = sum(not batch for _, batch in plan(0))
    assert (empty > 0) == (group > 1)


@pytest.mark.parametrize("threads", [1, 3])
def test_epoch_iterator(threads):
    """Batches in the plan's order, empty ones included, as `collate_samples` makes them."""
    relaxations = [relaxation(a, name=str(k), seed=k) for k, a in enumerate(systems() * 2)]
    samples = [make_sample(t, CONFIG) for t in relaxations]
    found = [s.structure for s in samples]
    buckets = plan_buckets(sizes_of(found), 2, 2, 0.0)
    plan = pack_epoch(buckets, sizes_of(found), np.random.default_rng(0), group=2)
    count = 0
    for (bucket, indices), (b, i, (graph, targets)) in zip(
        plan, epoch_iterator(plan, samples, buckets, CONFIG, threads), strict=True
    ):
        assert (bucket, indices) == (b, i)
        assert graph.globals["mask"].sum() == len(indices)
        assert targets.frame_mask.any(0).sum() == len(indices)
        pieces = split_nodes(targets.positions, graph)
        for k, piece in zip(indices, pieces, strict=True):
            own = samples[k].positions - samples[k].structure.origin
            np.testing.assert_allclose(piece, own, atol=1e-5)
            count += 1
    assert count == 6


def test_collate():
    """Padding has no edges and belongs to the last structure; senders stay at home."""
    config = tiny_config("triplets")
    found = [structure_from_atoms(a, config) for a in systems()]
    graph = collate(found, BatchShape(6, 22, 600, 250, 25))
    owner = graph.nodes["graph"]
    assert (owner[graph.senders] == owner[graph.receivers]).all()
    assert (owner[16:] == 5).all() and not graph.nodes["mask"][16:].any()
    bonds = graph.edges["bonds"]
    for edges, senders, receivers in (
        (graph.edges, graph.senders, graph.receivers), (bonds, bonds["senders"], bonds["receivers"])
    ):  # fmt: skip
        assert (np.diff(receivers) >= 0).all()
        unused = ~edges["mask"]
        assert unused.any() and (senders[unused] == 21).all() and (receivers[unused] == 21).all()
        assert (edges["reverse"][unused] == np.flatnonzero(unused)).all()
        back = edges["reverse"]
        assert (senders[back] == receivers).all() and (receivers[back] == senders).all()
        np.testing.assert_allclose(edges["offsets"][back], -edges["offsets"], atol=1e-6)
    assert bonds["mask"].sum() < graph.edges["mask"].sum() == graph.n_edge[:-1].sum()
    pairs = graph.edges["pairs"]
    unused = ~pairs["mask"]
    assert (np.diff(pairs["receivers"]) >= 0).all() and unused.any()
    assert (pairs["receivers"][unused] == 21).all() and (pairs["senders"][unused] == 21).all()
    assert 2 * pairs["mask"].sum() == graph.edges["mask"].sum()
    assert graph.n_edge.sum() == 600
    assert graph.n_node.tolist() == [7, 6, 3, 0, 0, 6] and graph.n_node.sum() == 22
    assert graph.nodes["fixed"].sum() == 2
    # The slots hold every bond once, at its own atom.
    slots, used = graph.nodes["bond_slots"], graph.nodes["bond_slot_mask"]
    assert sorted(slots[used]) == np.flatnonzero(bonds["mask"]).tolist()
    assert (bonds["receivers"][slots[used]] == np.nonzero(used)[0]).all()
    for k, (a, x) in enumerate(zip(systems(), split_nodes(graph.nodes["positions"], graph))):
        np.testing.assert_allclose(x, a.positions, atol=1e-6)
        np.testing.assert_allclose(graph.globals["cell"][k], a.cell.array, atol=1e-6)
    np.testing.assert_allclose(graph.nodes["masses"][:7], molecule().get_masses(), rtol=1e-6)
    with pytest.raises(ValueError, match="do not fit"):
        collate(found, BatchShape(6, 15, 600, 250, 25))


def test_round_up():
    sizes = [round_up(k) for k in range(1, 3000)]
    assert all(a >= k for k, a in enumerate(sizes, 1))
    assert all(a <= max(4, 1.25 * k + 4) for k, a in enumerate(sizes, 1))
    assert len(set(sizes)) < 40
    shape = fitting_shape([structure_from_atoms(molecule(), CONFIG)], rounded=True)
    assert shape.n_bonds <= shape.n_edges and shape.n_slots == 0


@pytest.mark.parametrize("mass", ["atomic", "unit"])
def test_make_sample_removes_drift(mass):
    """Of structures without fixed atoms only, and rigidly."""
    config = tiny_config(dynamics__frames=5, dynamics__mass=mass)
    weights = molecule().get_masses() if mass == "atomic" else np.ones(7)
    trajectory = relaxation(molecule(), drift=0.3)
    sample = make_sample(trajectory, config)
    centre = np.average(sample.positions, axis=1, weights=weights)
    np.testing.assert_allclose(centre, np.broadcast_to(centre[:1], centre.shape), atol=1e-10)
    np.testing.assert_array_equal(sample.positions[0], trajectory.positions[0])
    shift = sample.positions - trajectory.positions[[0, 2, 3, 4, 6]]
    np.testing.assert_allclose(shift, np.broadcast_to(shift[:, :1], shift.shape), atol=1e-10)
    assert abs(shift[-1, 0, 1]) > 1
    held = relaxation(slab(), drift=0.3)
    sample = make_sample(held, config)
    np.testing.assert_array_equal(sample.positions[-1], held.positions[-1])


def test_short_trajectories_leave_slots_empty():
    """Three frames on a grid of five: the first, middle and last slots."""
    trajectory = relaxation(molecule(), n=3)
    sample = make_sample(trajectory, CONFIG)
    assert frame_slots(CONFIG) == 5
    assert sample.frame_mask.tolist() == [True, False, True, False, True]
    np.testing.assert_allclose(sample.times[sample.frame_mask], [0, 0.5, 1])
    np.testing.assert_array_equal(sample.energies[sample.frame_mask], trajectory.energies)
    np.testing.assert_array_equal(sample.forces[[0, 2, 4]], trajectory.forces)
    assert (sample.positions[[1, 3]] == 0).all() and (sample.energies[[1, 3]] == 0).all()
    shape = fitting_shape([sample.structure] * 2)
    graph, targets = collate_samples([sample, sample], shape, CONFIG)
    assert targets.last.tolist() == [4, 4, 0] and targets.times is None
    assert targets.frame_mask[:, :2].sum() == 6 and not targets.frame_mask[:, 2].any()
    assert graph.n_node.tolist() == [7, 7, 0]


def test_far_from_the_origin_distances_are_not_rounded():
    """A molecule 10 km away, in its file's coordinates: in float32 its atoms would be at one point."""
    far = molecule()
    far.positions += 1e6
    near, moved = (make_sample(relaxation(a, seed=1), CONFIG) for a in (molecule(), far))
    shape = fitting_shape([near.structure])
    (graph, targets), (other, theirs) = (collate_samples([s], shape, CONFIG) for s in (near, moved))
    np.testing.assert_allclose(other.nodes["positions"], graph.nodes["positions"], atol=1e-6)
    there = targets.frame_mask[:, 0]
    np.testing.assert_allclose(theirs.positions[there], targets.positions[there], atol=1e-6)
    np.testing.assert_allclose(targets.positions[0], graph.nodes["positions"], atol=1e-6)
    assert np.abs(graph.nodes["positions"].mean(0)).max() < 1e-6


def test_all_frames_at_their_own_times():
    config = tiny_config(data__frame_selection="all", data__max_frames=6)
    assert frame_slots(config) == 6
    short = make_sample(relaxation(molecule(), n=4), config)
    long = make_sample(relaxation(molecule(), n=11), config)
    assert short.frame_mask.tolist() == [True] * 4 + [False] * 2
    np.testing.assert_allclose(short.times[:4], [0, 1 / 3, 2 / 3, 1])
    assert long.frame_mask.all()
    np.testing.assert_allclose(long.times, [0, 0.2, 0.4, 0.6, 0.8, 1])
    shape = fitting_shape([short.structure, long.structure])
    _, targets = collate_samples([short, long], shape, config)
    np.testing.assert_allclose(targets.times[:, 0], short.times, rtol=1e-6)
    assert targets.last.tolist() == [3, 5, 0]


def test_element_energies():
    """Energies that are sums of element energies give them back; the spread is that of the rest."""
    truth = np.zeros(119)
    truth[[1, 8, 29]] = -0.7, -5.0, -3.3
    rng = np.random.default_rng(0)
    relaxations = []
    for k in range(12):
        numbers = rng.choice([1, 8, 29], size=int(rng.integers(2, 9)))
        a = Atoms(numbers, rng.uniform(0, 9, (len(numbers), 3)))
        t = relaxation(a, seed=k)
        # Composition energy at the end, 0.1 eV/atom above it on average along the way.
        energies = truth[numbers].sum() + len(numbers) * np.linspace(0.2, 0, 7)
        relaxations.append(type(t)(**{**t.__dict__, "energies": energies}))
    table, spread, seen = fit_element_energies(
        ((t.atomic_numbers, t.energies) for t in relaxations), 119
    )
    np.testing.assert_allclose(table, truth, atol=1e-9)
    assert np.flatnonzero(seen).tolist() == [1, 8, 29]
    np.testing.assert_allclose(spread, np.linspace(0.2, 0, 7).std(), rtol=1e-9)


def test_element_energies_that_are_not_determined():
    """Only NaCl: the sum is right although no element's own energy is known."""
    rock = relaxation(bulk("NaCl", "rocksalt", a=5.6))
    table, spread, seen = fit_element_energies([(rock.atomic_numbers, rock.energies)] * 2, 119)
    np.testing.assert_allclose(table[[11, 17]].sum(), rock.energies[-1])
    assert seen.sum() == 2 and spread >= 1e-3
