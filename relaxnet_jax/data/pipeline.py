"""From stored relaxations to padded training batches (NumPy; prefetched by grain)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from relaxnet_jax.batching import BatchShape, collate, structure_cost
from relaxnet_jax.config import Config
from relaxnet_jax.data.frames import select_frames
from relaxnet_jax.data.trajectory import RelaxationTrajectory
from relaxnet_jax.graph import Structure, build_structure, masses_of
from relaxnet_jax.losses import Targets
from relaxnet_jax.typing import Graph


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """One relaxation ready for training: its initial structure and the chosen frames.

    Arrays over the n frame slots: positions (n, N, 3) Å, forces (n, N, 3) eV/Å, energies (n,) eV
    relative to the composition energy, frame_mask (n,), times (n,); absent slots are zero.
    """

    id: str
    structure: Structure
    positions: np.ndarray
    forces: np.ndarray
    energies: np.ndarray
    frame_mask: np.ndarray
    times: np.ndarray


def frame_slots(config: Config) -> int:
    """n, the number of frame slots of a batch."""
    return (
        config.dynamics.frames
        if config.data.frame_selection == "equidistant"
        else config.data.max_frames
    )


def without_drift(positions: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Frames (n, N, 3) translated rigidly so that their weighted centre stays where it began."""
    centre = np.average(positions, axis=1, weights=weights)
    return positions - (centre - centre[:1])[:, None]


def make_sample(
    trajectory: RelaxationTrajectory, config: Config, element_energies: np.ndarray
) -> Sample:
    """Chooses the frames of a relaxation and builds the graph of its first one.

    The dynamics conserve momentum; so in a structure without fixed atoms the frames'
    rigid translation, which has no physical meaning, is removed (about the centre of mass, or
    the centroid with unit masses).

    Raises:
      InputError: see `graph.build_structure`.
    """
    t, n = trajectory, frame_slots(config)
    structure = build_structure(
        t.atomic_numbers,
        t.positions[0],
        t.cells[0],
        t.pbc,
        config,
        fixed_mask=t.fixed_mask,
        charges=t.charges,
        name=t.id,
    )
    chosen = select_frames(t.n_frames, n, config.data.frame_selection)
    positions = t.positions[chosen.indices]
    if not t.fixed_mask.any():
        atomic = config.dynamics.mass == "atomic"
        weights = masses_of(t.atomic_numbers) if atomic else np.ones(t.n_atoms)
        positions = without_drift(positions, weights)

    def slots(values):
        out = np.zeros((n, *values.shape[1:]))
        out[chosen.slots] = values
        return out

    return Sample(
        id=t.id,
        structure=structure,
        positions=slots(positions),
        forces=slots(t.forces[chosen.indices]),
        energies=slots(t.energies[chosen.indices] - element_energies[t.atomic_numbers].sum()),
        frame_mask=slots(np.ones(len(chosen.slots))) > 0,
        times=slots(chosen.times),
    )


def collate_samples(
    samples: Sequence[Sample], shape: BatchShape, config: Config, dtype=np.float32
) -> tuple[Graph, Targets]:
    """A padded batch and its targets."""
    n, N, G = frame_slots(config), shape.n_atoms, shape.n_graphs
    positions, forces = np.zeros((n, N, 3), dtype), np.zeros((n, N, 3), dtype)
    energies, times = np.zeros((n, G), dtype), np.zeros((n, G), dtype)
    frame_mask, last = np.zeros((n, G), bool), np.zeros(G, np.int32)
    offset = 0
    for index, s in enumerate(samples):
        rows = slice(offset, offset + s.structure.n_atoms)
        positions[:, rows], forces[:, rows] = s.positions, s.forces
        energies[:, index], times[:, index], frame_mask[:, index] = (
            s.energies,
            s.times,
            s.frame_mask,
        )
        last[index] = np.flatnonzero(s.frame_mask)[-1]
        offset = rows.stop
    own_times = times if config.data.frame_selection == "all" else None
    graph = collate([s.structure for s in samples], shape, dtype)
    return graph, Targets(positions, forces, energies, frame_mask, last, own_times)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Batch shapes, and the bucket of each sample.

    Attributes:
      shapes: one per bucket, cheapest first.
      assignment: (S,) bucket of each sample.
      padding: fraction of edge and triplet slots left unused, measured on one epoch.
    """

    shapes: tuple[BatchShape, ...]
    assignment: np.ndarray
    padding: float


def plan_buckets(
    structures: Sequence[Structure], batch_size: int, max_buckets: int, max_padding: float
) -> Buckets:
    """The fewest shapes whose padding is at most ``max_padding``, or ``max_buckets`` of them.

    Structures are ordered by cost per atom; the cuts between buckets minimise the padded
    cost exactly (dynamic programming over up to 200 candidate cuts).
    """
    slots = np.array([s.neighbors.n_slots for s in structures])
    bonds = np.array([s.neighbors.n_bonds for s in structures])
    atoms = np.array([s.n_atoms for s in structures])
    order = np.argsort(slots + bonds**2, kind="stable")
    best: Buckets | None = None
    for count in range(1, max_buckets + 1):
        shapes: list[BatchShape] = []
        assignment = np.zeros(len(structures), np.int64)
        for members in _cut(order, atoms, slots, bonds, count):
            assignment[members] = len(shapes)
            shapes.append(_bucket_shape(atoms[members], slots[members], bonds[members], batch_size))
        buckets = Buckets(tuple(shapes), assignment, 0.0)
        plan = pack_epoch(buckets, structures, batch_size, None)
        padded = sum(shapes[bucket].cost for bucket, _ in plan)
        padding = 1.0 - sum(structure_cost(s) for s in structures) / padded
        if best is None or padding < best.padding:
            best = dataclasses.replace(buckets, padding=padding)
        if best.padding <= max_padding:
            break
    assert best is not None
    return best


def _bucket_shape(atoms, slots, bonds, batch_size: int) -> BatchShape:
    n_graphs = min(batch_size, len(atoms))
    budget = int(np.ceil(atoms.mean() * n_graphs))
    return BatchShape(
        n_graphs + 1, max(budget, int(atoms.max())), int(slots.max()), int(bonds.max())
    )


def _cut(order, atoms, slots, bonds, count: int) -> list[np.ndarray]:
    """Contiguous pieces of ``order``, at most ``count``, of least padded cost."""
    edges = np.unique(np.linspace(0, len(order), min(len(order), 200) + 1).astype(int))
    pieces = len(edges) - 1
    cost = np.full((pieces + 1, pieces + 1), np.inf)
    for right in range(1, pieces + 1):
        members = order[: edges[right]]
        top_slots = np.maximum.accumulate(slots[members][::-1])[::-1]
        top_bonds = np.maximum.accumulate(bonds[members][::-1])[::-1]
        total = np.cumsum(atoms[members][::-1])[::-1]
        starts = edges[:right]
        cost[:right, right] = total[starts] * (top_slots[starts] + top_bonds[starts] ** 2.0)
    np.fill_diagonal(cost, 0.0)  # an empty piece: fewer than ``count`` are allowed
    best, choice = cost[0], []
    for _ in range(1, count):
        candidates = best[:, None] + cost
        choice.append(candidates.argmin(0))
        best = candidates.min(0)
    cuts = [pieces]
    for lefts in reversed(choice):
        cuts.append(int(lefts[cuts[-1]]))
    cuts = sorted({*cuts, 0})
    return [order[edges[a] : edges[b]] for a, b in itertools.pairwise(cuts)]


def pack_epoch(
    buckets: Buckets,
    structures: Sequence[Structure],
    batch_size: int,
    rng: np.random.Generator | None,
    members: np.ndarray | None = None,
    group: int = 1,
) -> list[tuple[int, list[int]]]:
    """(bucket, sample indices) of every batch of an epoch; shuffled when a generator is given.

    Args:
      members: samples to visit, all by default.
      group: batches of one bucket come in runs of this many (one per device); the last run
        of a bucket may end in empty batches.
    """
    members = np.arange(len(structures)) if members is None else np.asarray(members)
    runs: list[list[tuple[int, list[int]]]] = []
    for bucket, shape in enumerate(buckets.shapes):
        inside = members[buckets.assignment[members] == bucket]
        if rng is not None:
            inside = rng.permutation(inside)
        batches: list[list[int]] = []
        room_graphs = room_atoms = 0
        for index in inside:
            size = structures[index].n_atoms
            if room_graphs == 0 or size > room_atoms:
                batches.append([])
                room_graphs, room_atoms = min(shape.n_graphs - 1, batch_size), shape.n_atoms
            batches[-1].append(int(index))
            room_graphs, room_atoms = room_graphs - 1, room_atoms - size
        batches += [[]] * (-len(batches) % group)
        runs += [
            [(bucket, b) for b in batches[k : k + group]] for k in range(0, len(batches), group)
        ]
    if rng is not None:
        runs = [runs[k] for k in rng.permutation(len(runs))]
    return [batch for run in runs for batch in run]


def epoch_iterator(
    plan: Sequence[tuple[int, list[int]]],
    samples: Sequence[Sample],
    buckets: Buckets,
    config: Config,
    threads: int = 1,
) -> Iterator[tuple[int, list[int], tuple[Graph, Targets]]]:
    """Yields (bucket, sample indices, batch) in the plan's order, collated ahead in threads."""

    def load(entry):
        bucket, indices = entry
        chosen = [samples[i] for i in indices]
        return bucket, indices, collate_samples(chosen, buckets.shapes[bucket], config)

    dataset = grain.MapDataset.source(list(plan)).map(load)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * max(threads, 1))
    return iter(dataset.to_iter_dataset(options))


def fit_element_energies(trajectories: Sequence[RelaxationTrajectory], n_elements: int):
    """Least-squares composition energies of the final frames, and the spread about them.

    Minimises sum_s (E_s - sum_i eps(Z_i))² / N_s², by minimum-norm least squares: where
    compositions do not determine an element alone, the combination that occurs is right.

    Returns:
      element_energies (n_elements,) eV, zero for elements that do not occur; the standard
      deviation per atom over all frames, eV (at least 1 meV); and (n_elements,) bool, seen.
    """
    counts = np.stack([np.bincount(t.atomic_numbers, minlength=n_elements) for t in trajectories])
    sizes = counts.sum(1)
    fractions = counts / sizes[:, None]
    final = np.array([t.energies[-1] for t in trajectories]) / sizes
    seen = counts.any(0)
    solution = np.zeros(n_elements)
    solution[seen] = np.linalg.lstsq(fractions[:, seen], final, rcond=1e-10)[0]
    residuals = np.concatenate(
        [(t.energies / n) - f @ solution for t, n, f in zip(trajectories, sizes, fractions)]
    )
    return solution, float(max(residuals.std(), 1e-3)), seen
