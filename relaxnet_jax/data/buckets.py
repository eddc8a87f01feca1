"""A small number of batch shapes, and which structures go into which batch (NumPy)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from relaxnet_jax.batching import BatchShape, structure_cost
from relaxnet_jax.graph import Structure

OPEN = 32  # batches filled at the same time
CUTS = 12  # positions tried for each further cut between buckets
SAMPLE = 2000  # structures on which the cuts are tried
# Room relative to the mean: atoms and bonds get some slack, so that a batch is full when its
# edges, which are most of the cost, are.
ROOM = {"n_atoms": 1.15, "n_edges": 1.0, "n_bonds": 1.08}


class Sizes(NamedTuple):
    """Sizes of S structures that a plan depends on, each an (S,) int array.

    Attributes:
      atoms, edges, bonds, slots: N, E, B and K of each structure (see `Neighbors`).
      cost: cost of each structure, see `batching.structure_cost`.
    """

    atoms: np.ndarray
    edges: np.ndarray
    bonds: np.ndarray
    slots: np.ndarray
    cost: np.ndarray


def size_of(s: Structure) -> tuple[int, int, int, int, int]:
    """The row of `Sizes` for one structure."""
    n = s.neighbors
    return s.n_atoms, n.n_edges, n.n_bonds, n.n_slots, structure_cost(s)


def sizes_of(structures: Sequence[Structure]) -> Sizes:
    """The sizes of the given structures."""
    rows = [size_of(s) for s in structures]
    return Sizes(*np.array(rows, np.int64).reshape(-1, len(Sizes._fields)).T)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Batch shapes, and the bucket of each sample.

    Attributes:
      shapes: one per bucket, cheapest first.
      assignment: (S,) bucket of each sample.
      padding: fraction of the batches' cost (edges, bonds, triplets) that is left unused, measured
        on one epoch.
    """

    shapes: tuple[BatchShape, ...]
    assignment: np.ndarray
    padding: float


def plan_buckets(sizes: Sizes, batch_size: int, max_buckets: int, max_padding: float) -> Buckets:
    """Finds the fewest shapes with at most ``max_padding``, but no more than ``max_buckets``.

    A batch holds ``batch_size`` structures of its bucket's mean size, and up to half as many more if
    they are small. Buckets are ranges of cost; each further cut is placed where it saves the most
    padding.
    """
    cost = sizes.cost
    levels = np.unique(np.quantile(cost, np.linspace(0, 1, CUTS + 2)[1:-1], method="higher"))
    rng = np.random.default_rng(0)
    few = np.sort(rng.choice(len(cost), min(SAMPLE, len(cost)), replace=False))
    cuts: list[int] = []
    best = _with_cuts(sizes, batch_size, cuts, few)
    for _ in range(max_buckets - 1):
        if best.padding <= max_padding:
            break
        trials = [(_with_cuts(sizes, batch_size, [*cuts, c], few), c) for c in levels.tolist()]
        trial, cut = min(trials, key=lambda pair: pair[0].padding)
        if trial.padding >= best.padding:
            break
        best, cuts = trial, [*cuts, cut]
    return dataclasses.replace(best, padding=_padding(best, sizes, None))


def _with_cuts(sizes: Sizes, batch_size: int, cuts: list[int], few: np.ndarray) -> Buckets:
    """Buckets separated at the costs ``cuts``, with the padding measured on the structures ``few``.

    A cost equal to a cut belongs to the upper bucket.
    """
    level = np.searchsorted(np.sort(cuts), sizes.cost, side="right")
    found = np.unique(level)
    assignment = np.searchsorted(found, level)
    shapes = tuple(
        _bucket_shape(Sizes(*(v[assignment == b] for v in sizes)), batch_size)
        for b in range(len(found))
    )
    buckets = Buckets(shapes, assignment, 0.0)
    return dataclasses.replace(buckets, padding=_padding(buckets, sizes, few))


def _padding(buckets: Buckets, sizes: Sizes, members: np.ndarray | None) -> float:
    plan = pack_epoch(buckets, sizes, None, members)
    used = sizes.cost.sum() if members is None else sizes.cost[members].sum()
    return 1.0 - used / sum(buckets.shapes[bucket].cost for bucket, _ in plan)


def _bucket_shape(sizes: Sizes, batch_size: int) -> BatchShape:
    n = min(batch_size, len(sizes.atoms))

    def budget(name: str, values: np.ndarray) -> int:
        return max(1, int(np.ceil(ROOM[name] * values.mean() * n)), int(values.max()))

    # If there is only one batch, it gets no more room than its structures need.
    most = {"n_atoms": sizes.atoms, "n_edges": sizes.edges, "n_bonds": sizes.bonds}
    room = {name: min(budget(name, v), max(1, int(v.sum()))) for name, v in most.items()}
    return BatchShape(
        n_graphs=min(batch_size + batch_size // 2, len(sizes.atoms)) + 1,
        n_slots=int(sizes.slots.max()),
        **room,
    )


def pack_epoch(
    buckets: Buckets,
    sizes: Sizes,
    rng: np.random.Generator | None,
    members: np.ndarray | None = None,
    group: int = 1,
) -> list[tuple[int, list[int]]]:
    """(bucket, sample indices) of every batch of an epoch, shuffled if ``rng`` is given.

    Args:
      members: samples to visit, all by default.
      group: batches of one bucket come in runs of this length (one per device); the last run
        of a bucket may end in empty batches.
    """
    members = np.arange(len(sizes.atoms)) if members is None else np.asarray(members)
    runs: list[list[tuple[int, list[int]]]] = []
    for bucket, shape in enumerate(buckets.shapes):
        inside = members[buckets.assignment[members] == bucket]
        if rng is not None:
            inside = rng.permutation(inside)
        batches = _pack(inside, sizes, shape)
        batches += [[]] * (-len(batches) % group)
        runs += [
            [(bucket, b) for b in batches[k : k + group]] for k in range(0, len(batches), group)
        ]
    if rng is not None:
        runs = [runs[k] for k in rng.permutation(len(runs))]
    return [batch for run in runs for batch in run]


def _pack(order: np.ndarray, sizes: Sizes, shape: BatchShape) -> list[list[int]]:
    """First fit into a few open batches: each structure goes into the oldest one with room for it."""
    need = np.stack([np.ones_like(sizes.atoms), sizes.atoms, sizes.edges, sizes.bonds], 1)
    capacity = np.array([shape.n_graphs - 1, shape.n_atoms, shape.n_edges, shape.n_bonds])
    done: list[list[int]] = []
    filling: list[list[int]] = []
    room = np.zeros((0, 4), np.int64)
    for index in order:
        fits = (room >= need[index]).all(1)
        k = int(fits.argmax()) if fits.any() else len(filling)
        if k == len(filling):
            if k == OPEN:  # close the fullest one
                fullest = int(room[:, 2].argmin())
                done.append(filling.pop(fullest))
                room, k = np.delete(room, fullest, 0), k - 1
            filling.append([])
            room = np.concatenate([room, capacity[None]])
        filling[k].append(int(index))
        room[k] -= need[index]
    return done + filling


__all__ = ["Buckets", "Sizes", "pack_epoch", "plan_buckets", "size_of", "sizes_of"]
