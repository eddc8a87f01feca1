"""Padded batches of structures, and the few shapes ("buckets") they come in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jraph
import numpy as np

from relaxnet_jax.graph import Structure, masses_of
from relaxnet_jax.typing import Graph


@dataclasses.dataclass(frozen=True, order=True)
class BatchShape:
    """The static shape of a batch, padding structure included in ``n_graphs``."""

    n_graphs: int
    n_atoms: int
    n_slots: int
    n_bonds: int

    @property
    def cost(self) -> int:
        """Slots of edges and triplets: what a batch of this shape costs."""
        return self.n_atoms * (self.n_slots + self.n_bonds**2)


def structure_cost(structure: Structure) -> int:
    """Edges and triplets a structure really has, comparable with `BatchShape.cost`."""
    mask = structure.neighbors.mask
    bonds = mask[:, : structure.neighbors.n_bonds].sum(1)
    return int(mask.sum() + (bonds**2).sum())


def round_up(value: int) -> int:
    """Next size on a geometric ladder of multiples of 4: few shapes, at most a quarter wasted."""
    size = 4
    while size < value:
        size = max(size + 4, int(size * 1.25) // 4 * 4)
    return size


def fitting_shape(structures: Sequence[Structure], rounded: bool = False) -> BatchShape:
    """The smallest shape that holds these structures in one batch, optionally rounded up."""
    up = round_up if rounded else (lambda value: value)
    # A device without structures gets an empty batch.
    n_slots = max((s.neighbors.n_slots for s in structures), default=1)
    n_bonds = max((s.neighbors.n_bonds for s in structures), default=1)
    return BatchShape(
        n_graphs=len(structures) + 1,
        n_atoms=up(sum(s.n_atoms for s in structures)),
        n_slots=up(n_slots),
        n_bonds=min(up(n_bonds), up(n_slots)),
    )


def collate(structures: Sequence[Structure], shape: BatchShape, dtype=np.float32) -> Graph:
    """One padded graph (NumPy) of the given shape; see `relaxnet_jax.graph` for its fields.

    Positions are given relative to each structure's first atom's cell as they are: nothing is
    wrapped or centred. Padding atoms belong to the last structure, sit at the origin, and
    have no edges.

    Raises:
      ValueError: the structures do not fit (a programming error, not bad input).
    """
    N, M, K, G = shape.n_atoms, shape.n_slots, shape.n_bonds, shape.n_graphs
    need = fitting_shape(structures)
    if need.n_graphs > G or need.n_atoms > N or need.n_slots > M or need.n_bonds > K:
        raise ValueError(f"structures needing {need} do not fit {shape}")
    senders = np.repeat(np.arange(N, dtype=np.int32)[:, None], M, axis=1)
    reverse_slot = np.repeat(np.arange(M, dtype=np.int32)[None], N, axis=0)
    shifts, mask = np.zeros((N, M, 3), np.int32), np.zeros((N, M), bool)
    nodes = {
        "positions": np.zeros((N, 3), dtype),
        "atomic_numbers": np.zeros(N, np.int32),
        "masses": np.ones(N, dtype),
        "charges": np.zeros(N, dtype),
        "fixed": np.zeros(N, bool),
        "mask": np.zeros(N, bool),
        "graph": np.full(N, G - 1, np.int32),
    }
    n_node = np.zeros(G, np.int32)
    cell = np.repeat(np.eye(3, dtype=dtype)[None], G, axis=0)
    offset = 0
    for index, s in enumerate(structures):
        rows, m = slice(offset, offset + s.n_atoms), s.neighbors.n_slots
        senders[rows, :m] = s.neighbors.senders + offset
        shifts[rows, :m], mask[rows, :m] = s.neighbors.shifts, s.neighbors.mask
        reverse_slot[rows, :m] = s.neighbors.reverse_slot
        nodes["positions"][rows] = s.positions
        nodes["atomic_numbers"][rows] = s.atomic_numbers
        nodes["masses"][rows] = masses_of(s.atomic_numbers)
        nodes["charges"][rows] = s.charges
        nodes["fixed"][rows] = s.fixed_mask
        nodes["mask"][rows] = True
        nodes["graph"][rows] = index
        n_node[index], cell[index] = s.n_atoms, s.cell
        offset += s.n_atoms
    n_node[-1] = N - offset
    nodes["bond_mask"] = mask[:, :K].copy()
    return jraph.GraphsTuple(
        nodes=nodes,
        edges={
            "shifts": shifts.reshape(-1, 3),
            "mask": mask.reshape(-1),
            "reverse": (senders * M + reverse_slot).reshape(-1),
        },
        senders=senders.reshape(-1),
        receivers=np.repeat(np.arange(N, dtype=np.int32), M),
        globals={"cell": cell, "mask": np.arange(G) < len(structures)},
        n_node=n_node,
        n_edge=n_node * M,
    )


def split_nodes(values: np.ndarray, graph: Graph) -> list[np.ndarray]:
    """Per-structure pieces of a node array whose atom axis is axis -2 (n, N, 3) or 0 (N,)."""
    axis = 0 if values.ndim == 1 else values.ndim - 2
    counts = np.asarray(graph.n_node)[np.asarray(graph.globals["mask"])]
    ends = np.cumsum(counts)
    return [np.take(values, np.arange(e - c, e), axis=axis) for c, e in zip(counts, ends)]
