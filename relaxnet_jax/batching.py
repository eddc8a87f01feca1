"""Padded batches of structures, and the few shapes ("buckets") they come in."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence
from typing import Any

import jraph
import numpy as np

from relaxnet_jax.graph import Structure, masses_of
from relaxnet_jax.typing import Graph

WASTE = 2.0
# What runs once takes a shape that is compiled already up to so many times as expensive; what runs in one
# shape hundreds of times, up to `WASTE` times.
REUSE = 4.0


@dataclasses.dataclass(frozen=True, order=True)
class BatchShape:
    """The static shape of a batch, padding structure included in ``n_graphs``.

    Attributes:
      n_graphs, n_atoms, n_edges, n_bonds: G, N, E, B.
      n_slots: K, bonds per atom where triplets are listed one by one, else 0.
    """

    n_graphs: int
    n_atoms: int
    n_edges: int
    n_bonds: int
    n_slots: int = 0

    @property
    def cost(self) -> int:
        """Edges, bonds and triplets: what a batch of this shape costs."""
        return self.n_edges + self.n_bonds + self.n_atoms * self.n_slots**2

    def holds(self, other: BatchShape) -> bool:
        """Whether a batch of another shape has room in this one."""
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return all(a >= b for a, b in zip(mine, others))


def structure_cost(structure: Structure) -> int:
    """Edges, bonds and triplets a structure really has, comparable with `BatchShape.cost`."""
    n = structure.neighbors
    per_atom = np.bincount(n.receivers[n.bond], minlength=1)
    return n.n_edges + n.n_bonds + (int((per_atom**2).sum()) if n.n_slots else 0)


def round_up(value: int) -> int:
    """Next size on a geometric ladder of multiples of 4: few shapes, at most a quarter wasted."""
    size = 4
    while size < value:
        size = max(size + 4, int(size * 1.25) // 4 * 4)
    return size


def fitting_shape(structures: Sequence[Structure], rounded: bool = False) -> BatchShape:
    """The smallest shape that holds these structures in one batch, optionally rounded up."""
    up = round_up if rounded else (lambda value: value)
    n_slots = max((s.neighbors.n_slots for s in structures), default=0)
    n_edges = sum(s.neighbors.n_edges for s in structures)
    n_bonds = sum(s.neighbors.n_bonds for s in structures)
    if rounded:  # few combinations of the two: a quarter of the edges are bonds as a rule
        n_bonds = max(n_bonds, up(n_edges) // 4)
    # A device without structures gets an empty batch; arrays of no edges trouble some kernels.
    return BatchShape(
        n_graphs=len(structures) + 1,
        n_atoms=up(max(1, sum(s.n_atoms for s in structures))),
        n_edges=up(max(1, n_edges)),
        n_bonds=up(max(1, n_bonds)),
        n_slots=up(n_slots) if n_slots else 0,
    )


def shape_of(graph: Graph) -> BatchShape:
    """The shape of a padded graph, as `collate` makes it."""
    return BatchShape(
        n_graphs=graph.n_node.shape[0],
        n_atoms=graph.nodes["mask"].shape[0],
        n_edges=graph.receivers.shape[0],
        n_bonds=graph.edges["bonds"]["mask"].shape[0],
        n_slots=graph.nodes["bond_slots"].shape[1],
    )


def pack(costs: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in as few batches as there must be, of costs as equal as can be.

    The most expensive first, each goes to the cheapest batch that has room: batches of one shape
    come out, not one for every size of crystal.
    """
    room = [(0, k) for k in range(-(-len(costs) // batch_size))]
    batches: list[list[int]] = [[] for _ in room]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, k = heapq.heappop(room)
        batches[k].append(i)
        if len(batches[k]) < batch_size:
            heapq.heappush(room, (total + costs[i], k))
    return [sorted(batch) for batch in batches]


def largest_shape(shapes: Sequence[BatchShape]) -> BatchShape:
    """The smallest in which all of these have room; there is at least one."""
    return BatchShape(*map(max, zip(*map(dataclasses.astuple, shapes))))


def shared_shapes(shapes: Sequence[BatchShape]) -> list[BatchShape]:
    """For each of these shapes one as large or larger; few different ones.

    Shapes share one, the largest of every size, with those up to `WASTE` times their cost: a
    shape has to be traced, and compiled or read from the cache, which costs more than that.
    """
    result = list(shapes)
    order = sorted(range(len(shapes)), key=lambda i: -shapes[i].cost)
    while order:
        least = shapes[order[0]].cost / WASTE
        group = [i for i in order if shapes[i].cost >= least]
        largest = largest_shape([shapes[i] for i in group])
        for i in group:
            result[i] = largest
        order = order[len(group) :]
    return result


# What shapes a kind of program has run in, so that they are known to fit in memory. A kind: the
# program's name, and all of its arguments that are no arrays of the batch's shape.
_known: dict[tuple[Any, ...], list[BatchShape]] = {}


def known_shape(
    kind: tuple[Any, ...], structures: Sequence[Structure], shape: BatchShape, reuse: float
) -> BatchShape:
    """A shape that such a program has run in, if it has room for these structures and costs at most
    ``reuse`` times ``shape``; else ``shape``. In a loop over structures nearly every one would have its
    own, and compiled."""
    needed = fitting_shape(structures)
    roomy = [s for s in _known.get(kind, ()) if s.holds(needed) and s.cost <= reuse * shape.cost]
    return min(roomy, key=lambda s: s.cost, default=shape)


def remember_shape(kind: tuple[Any, ...], shape: BatchShape) -> None:
    """Says that such a program has run in a shape."""
    known = _known.setdefault(kind, [])
    if shape not in known:
        known.append(shape)


def collate(structures: Sequence[Structure], shape: BatchShape, dtype=np.float32) -> Graph:
    """One padded graph (NumPy) of the given shape; see `relaxnet_jax.graph` for its fields.

    Positions are given relative to each structure's first atom's cell as they are: nothing is
    wrapped or centred. Padding atoms belong to the last structure and sit at the origin.

    Raises:
      ValueError: the structures do not fit (a programming error, not bad input).
    """
    N, G = shape.n_atoms, shape.n_graphs
    need = fitting_shape(structures)
    if not shape.holds(need):
        raise ValueError(f"structures needing {need} do not fit {shape}")
    nodes = {
        "positions": np.zeros((N, 3), dtype),
        "atomic_numbers": np.zeros(N, np.int32),
        "masses": np.ones(N, dtype),
        "charges": np.zeros(N, dtype),
        "fixed": np.zeros(N, bool),
        "mask": np.zeros(N, bool),
        "graph": np.full(N, G - 1, np.int32),
    }
    n_node, n_edge = np.zeros(G, np.int32), np.zeros(G, np.int32)
    cell = np.repeat(np.eye(3, dtype=dtype)[None], G, axis=0)
    strain = np.zeros((G, 3, 3), dtype)
    pairs, bonds = _PaddedEdges(shape.n_edges, N, dtype), _PaddedEdges(shape.n_bonds, N, dtype)
    offset = 0
    for index, s in enumerate(structures):
        rows, n = slice(offset, offset + s.n_atoms), s.neighbors
        nodes["positions"][rows] = s.positions
        nodes["atomic_numbers"][rows] = s.atomic_numbers
        nodes["masses"][rows] = masses_of(s.atomic_numbers)
        nodes["charges"][rows] = s.charges
        nodes["fixed"][rows] = s.fixed_mask
        nodes["mask"][rows] = True
        nodes["graph"][rows] = index
        n_node[index], n_edge[index], cell[index] = s.n_atoms, n.n_edges, s.cell
        strain[index] = s.strain
        shifts = n.shifts @ np.asarray(s.cell, np.float64)
        pairs.add(offset, n.receivers, n.senders, n.reverse, shifts)
        among_bonds = np.cumsum(n.bond) - 1
        back = among_bonds[n.reverse[n.bond]]
        bonds.add(offset, n.receivers[n.bond], n.senders[n.bond], back, shifts[n.bond])
        offset += s.n_atoms
    n_node[-1], n_edge[-1] = N - offset, shape.n_edges - pairs.used
    nodes |= _bond_slots(bonds.arrays["receivers"][: bonds.used], N, shape.n_slots)
    edges = pairs.arrays
    return jraph.GraphsTuple(
        nodes=nodes,
        edges={name: edges[name] for name in ("offsets", "mask", "reverse")}
        | _pairs(edges, N)
        | {"bonds": bonds.arrays},
        senders=edges["senders"],
        receivers=edges["receivers"],
        globals={"cell": cell, "mask": np.arange(G) < len(structures), "strain": strain},
        n_node=n_node,
        n_edge=n_edge,
    )


class _PaddedEdges:
    """Arrays of E edges, filled structure by structure; the rest stay at the last atom."""

    def __init__(self, size: int, n_atoms: int, dtype) -> None:
        self.used = 0
        self.arrays: dict[str, np.ndarray] = {
            "receivers": np.full(size, n_atoms - 1, np.int32),
            "senders": np.full(size, n_atoms - 1, np.int32),
            "reverse": np.arange(size, dtype=np.int32),
            "offsets": np.zeros((size, 3), dtype),
            "mask": np.zeros(size, bool),
        }

    def add(self, first_atom: int, receivers, senders, reverse, offsets) -> None:
        rows = slice(self.used, self.used + len(receivers))
        self.arrays["receivers"][rows] = receivers + first_atom
        self.arrays["senders"][rows] = senders + first_atom
        self.arrays["reverse"][rows] = reverse + self.used
        self.arrays["offsets"][rows] = offsets
        self.arrays["mask"][rows] = True
        self.used = rows.stop


def _pairs(edges: dict[str, np.ndarray], n_atoms: int) -> dict[str, Any]:
    """Edges and their reverses as pairs, P = E/2 and at least one; see `relaxnet_jax.graph`."""
    reverse = edges["reverse"]
    size = len(reverse)
    count = max(size // 2, 1)
    first = np.flatnonzero(np.arange(size) < reverse)
    both = np.stack([first, reverse[first]], axis=1)
    index, pair_edges = np.full(size, count, np.int32), np.full((count, 2), size, np.int32)
    index[both] = np.arange(len(both))[:, None]
    pair_edges[: len(both)] = both
    padded = _PaddedEdges(count, n_atoms, edges["offsets"].dtype).arrays
    pairs = {name: padded[name] for name in ("receivers", "senders", "offsets", "mask")}
    for name, values in pairs.items():
        values[: len(first)] = edges[name][first]
    return {"pair_index": index, "pair_edges": pair_edges, "pairs": pairs}


def _bond_slots(receivers: np.ndarray, n_atoms: int, n_slots: int) -> dict[str, np.ndarray]:
    """Each atom's bonds, which follow one another, in K slots; unused ones point at bond 0."""
    count = np.bincount(receivers, minlength=n_atoms)[:n_atoms, None]
    first = np.cumsum(count)[:, None] - count
    slots = np.arange(n_slots, dtype=np.int32)
    mask = slots < count
    return {
        "bond_slots": np.where(mask, first + slots, 0).astype(np.int32),
        "bond_slot_mask": mask,
    }


def split_nodes(values: np.ndarray, graph: Graph) -> list[np.ndarray]:
    """Per-structure pieces of a node array whose atom axis is axis -2 (n, N, 3) or 0 (N,)."""
    axis = 0 if values.ndim == 1 else values.ndim - 2
    counts = np.asarray(graph.n_node)[np.asarray(graph.globals["mask"])]
    ends = np.cumsum(counts)
    return [np.take(values, np.arange(e - c, e), axis=axis) for c, e in zip(counts, ends)]
