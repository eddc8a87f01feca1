"""Padded batches of structures, in a small number of shapes ("buckets")."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence
from typing import Any

import jraph
import numpy as np

from relaxnet_jax.graph import Structure, masses_of
from relaxnet_jax.typing import Graph

# An already compiled shape is reused if it costs at most this many times what is needed: `WASTE` for
# programs that run hundreds of times in one shape, `REUSE` for those that run once.
WASTE = 2.0
REUSE = 4.0


@dataclasses.dataclass(frozen=True, order=True)
class BatchShape:
    """The static shape of a batch, including padding.

    Attributes:
      n_graphs: G, number of structures, including one of padding.
      n_atoms: N.
      n_edges: E.
      n_bonds: B.
      n_slots: K, bond slots per atom; 0 where triplets are not listed one by one.
    """

    n_graphs: int
    n_atoms: int
    n_edges: int
    n_bonds: int
    n_slots: int = 0

    @property
    def cost(self) -> int:
        """The cost of a batch of this shape: its total number of edges, bonds and triplets."""
        return self.n_edges + self.n_bonds + self.n_atoms * self.n_slots**2

    def holds(self, other: BatchShape) -> bool:
        """Whether a batch of another shape fits into this one."""
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return all(a >= b for a, b in zip(mine, others))


def structure_cost(structure: Structure) -> int:
    """A structure's total number of edges, bonds and triplets, comparable with `BatchShape.cost`."""
    n = structure.neighbors
    per_atom = np.bincount(n.receivers[n.bond], minlength=1)
    return n.n_edges + n.n_bonds + (int((per_atom**2).sum()) if n.n_slots else 0)


def round_up(value: int) -> int:
    """Rounds up to a multiple of 4 on a geometric scale: few sizes, and (from 6 on) at most a quarter wasted."""
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
    if rounded:  # limits the combinations of the two; typically a quarter of the edges are bonds
        n_bonds = max(n_bonds, up(n_edges) // 4)
    # A device without structures gets an empty batch, but some kernels cannot handle zero edges.
    return BatchShape(
        n_graphs=len(structures) + 1,
        n_atoms=up(max(1, sum(s.n_atoms for s in structures))),
        n_edges=up(max(1, n_edges)),
        n_bonds=up(max(1, n_bonds)),
        n_slots=up(n_slots) if n_slots else 0,
    )


def shape_of(graph: Graph) -> BatchShape:
    """The shape of a padded graph made by `collate`."""
    return BatchShape(
        n_graphs=graph.n_node.shape[0],
        n_atoms=graph.nodes["mask"].shape[0],
        n_edges=graph.receivers.shape[0],
        n_bonds=graph.edges["bonds"]["mask"].shape[0],
        n_slots=graph.nodes["bond_slots"].shape[1],
    )


def pack(costs: Sequence[int], batch_size: int) -> list[list[int]]:
    """Packs indices into as few batches as possible, with costs as equal as possible.

    Starting with the most expensive, each index goes to the cheapest batch that has room. The batches
    then have similar shapes, rather than one for every size of crystal.

    Args:
      costs: cost of each index.
      batch_size: largest number of indices in a batch.
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
    """The smallest shape that holds each of these shapes, of which there is at least one."""
    return BatchShape(*map(max, zip(*map(dataclasses.astuple, shapes))))


def shared_shapes(shapes: Sequence[BatchShape]) -> list[BatchShape]:
    """Enlarges shapes so that there are few different ones.

    Shapes whose costs differ by at most a factor of `WASTE` share one that is large enough for all of
    them. Tracing a further shape, and compiling it or reading it from the cache, costs more than that.
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


# The shapes in which each kind of program has run, and which are thus known to fit in memory. A kind
# is the program's name together with all arguments that are not arrays of the batch's shape.
_known: dict[tuple[Any, ...], list[BatchShape]] = {}


def known_shape(
    kind: tuple[Any, ...], structures: Sequence[Structure], shape: BatchShape, reuse: float
) -> BatchShape:
    """The cheapest shape in which this kind of program has run and that suits these structures.

    It has to hold the structures and to cost at most ``reuse`` times ``shape``; if there is none,
    returns ``shape``. Without this reuse, a loop over structures would compile a shape for nearly every
    one of them.

    Args:
      kind: the program's name, and all of its arguments that are not arrays of the batch's shape.
      structures: the structures of the batch.
      shape: a shape that holds them.
      reuse: the largest factor in cost, `WASTE` or `REUSE`.
    """
    needed = fitting_shape(structures)
    roomy = [s for s in _known.get(kind, ()) if s.holds(needed) and s.cost <= reuse * shape.cost]
    return min(roomy, key=lambda s: s.cost, default=shape)


def remember_shape(kind: tuple[Any, ...], shape: BatchShape) -> None:
    """Records that this kind of program has run in a shape, for `known_shape`."""
    known = _known.setdefault(kind, [])
    if shape not in known:
        known.append(shape)


def collate(structures: Sequence[Structure], shape: BatchShape, dtype=np.float32) -> Graph:
    """One padded graph (NumPy) of the given shape; see `relaxnet_jax.graph` for its fields.

    Positions are used as they are, neither wrapped nor centred. Padding atoms belong to the last
    structure, which is padding, and sit at the origin.

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
    """Arrays of E edges, filled structure by structure; the remaining edges stay at the last atom."""

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
    """Groups edges and their reverses into P = E/2 pairs, at least one; see `relaxnet_jax.graph`."""
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
    """Distributes each atom's bonds, which are contiguous, over K slots; unused slots point to bond 0."""
    count = np.bincount(receivers, minlength=n_atoms)[:n_atoms, None]
    first = np.cumsum(count)[:, None] - count
    slots = np.arange(n_slots, dtype=np.int32)
    mask = slots < count
    return {
        "bond_slots": np.where(mask, first + slots, 0).astype(np.int32),
        "bond_slot_mask": mask,
    }


def split_nodes(values: np.ndarray, graph: Graph) -> list[np.ndarray]:
    """Splits a node array, (n, N, 3) or (N,), into one array per structure, along the atom axis."""
    axis = 0 if values.ndim == 1 else values.ndim - 2
    counts = np.asarray(graph.n_node)[np.asarray(graph.globals["mask"])]
    ends = np.cumsum(counts)
    return [np.take(values, np.arange(e - c, e), axis=axis) for c, e in zip(counts, ends)]
