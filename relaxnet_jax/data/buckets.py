"""The few shapes batches come in, and which structures go into which batch (NumPy)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from relaxnet_jax.batching import BatchShape, structure_cost
from relaxnet_jax.graph import Structure


class Sizes(NamedTuple):
    """What a plan needs to know of S structures, (S,) int each.

    Attributes:
      atoms, slots, bonds: numbers N of atoms, M of neighbour slots, K of bond slots.
      cost: edges and triplets really there, see `batching.structure_cost`.
    """

    atoms: np.ndarray
    slots: np.ndarray
    bonds: np.ndarray
    cost: np.ndarray


def sizes_of(structures: Sequence[Structure]) -> Sizes:
    """The sizes of these structures."""
    rows = [
        (s.n_atoms, s.neighbors.n_slots, s.neighbors.n_bonds, structure_cost(s)) for s in structures
    ]
    return Sizes(*np.array(rows, np.int64).reshape(-1, 4).T)


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


def plan_buckets(sizes: Sizes, batch_size: int, max_buckets: int, max_padding: float) -> Buckets:
    """The fewest shapes whose padding is at most ``max_padding``, or ``max_buckets`` of them.

    Structures are ordered by cost per atom; the cuts between buckets minimise the padded
    cost exactly (dynamic programming over up to 200 candidate cuts).
    """
    atoms, slots, bonds = sizes.atoms, sizes.slots, sizes.bonds
    order = np.argsort(slots + bonds**2, kind="stable")
    best: Buckets | None = None
    for count in range(1, max_buckets + 1):
        shapes: list[BatchShape] = []
        assignment = np.zeros(len(atoms), np.int64)
        for members in _cut(order, atoms, slots, bonds, count):
            assignment[members] = len(shapes)
            shapes.append(_bucket_shape(atoms[members], slots[members], bonds[members], batch_size))
        buckets = Buckets(tuple(shapes), assignment, 0.0)
        plan = pack_epoch(buckets, sizes, batch_size, None)
        padded = sum(shapes[bucket].cost for bucket, _ in plan)
        padding = 1.0 - sizes.cost.sum() / padded
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
    sizes: Sizes,
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
    members = np.arange(len(sizes.atoms)) if members is None else np.asarray(members)
    runs: list[list[tuple[int, list[int]]]] = []
    for bucket, shape in enumerate(buckets.shapes):
        inside = members[buckets.assignment[members] == bucket]
        if rng is not None:
            inside = rng.permutation(inside)
        batches: list[list[int]] = []
        room_graphs = room_atoms = 0
        for index in inside:
            size = int(sizes.atoms[index])
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
