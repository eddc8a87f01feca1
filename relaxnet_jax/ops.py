"""Gradient-safe norms and divisions, and the linear maps between atoms and edges.

Edges are sorted by receiver, so sums over neighbours are sorted segment sums. The transpose of
the gather from senders would be an unsorted scatter; with the index of each edge's reverse, it
becomes a gather and a sorted segment sum as well. The gradient of a pair convolution's forces took
2.1 ms this way, 2.5 ms with plain indexing, and 2.9 ms with every atom's neighbours padded to equal
numbers and summed as a dense axis (5,632 edges, 2 cores, jax 0.10.1).

Functions of the distance are computed once for the two edges of a pair (`PairMap`). Where a message
depends on the edge through the distance alone, sums run over pairs, which are half as many rows as
edges (`convolve_pairs`). Each pair contributes to both of its atoms, one of the two in an unsorted
scatter; on a CPU this is faster still.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jraph
from jax import Array

from relaxnet_jax.typing import AnyArray


class EdgeList(NamedTuple):
    """Directed edges, each with its reverse; padding edges connect an atom to itself.

    Attributes:
      receivers: (E,), the central atom of each edge; ascending.
      senders: (E,), the neighbour.
      reverse: (E,), index of the edge with the two exchanged; a padding edge is its own reverse.
    """

    receivers: AnyArray
    senders: AnyArray
    reverse: AnyArray


def safe_norm(x: Array, axis: int = -1, keepdims: bool = False) -> Array:
    """Euclidean norm whose gradient is zero, not NaN, at the zero vector."""
    square = jnp.sum(x * x, axis=axis, keepdims=keepdims)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def safe_divide(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, zero (value and gradient) where the denominator is zero."""
    nonzero = denominator != 0
    return jnp.where(nonzero, numerator / jnp.where(nonzero, denominator, 1.0), 0.0)


def sum_edges(edge_values: Array, receivers: AnyArray, n_atoms: int) -> Array:
    """Sum over each receiver's edges: (E, ...), (E,) ascending -> (N, ...)."""
    return jraph.segment_sum(edge_values, receivers, n_atoms, indices_are_sorted=True)


def spread(node_values: Array, receivers: AnyArray) -> Array:
    """Each receiver's value on its edges: (N, ...), (E,) ascending -> (E, ...)."""
    return node_values.at[receivers].get(indices_are_sorted=True, mode="promise_in_bounds")


def _at(node_values: Array, atoms: AnyArray) -> Array:
    """As `spread`, for atoms in any order."""
    return node_values.at[atoms].get(mode="promise_in_bounds")


@jax.custom_vjp
def gather_senders(node_values: Array, edges: EdgeList) -> Array:
    """Each sender's value on its edges: (N, ...) -> (E, ...).

    The edges *sent* by atom j are the reverses of those it *receives*, so the transpose is a
    gather and a sorted sum. The function is reverse-mode differentiable to any order.
    """
    return _at(node_values, edges.senders)


@jax.custom_vjp
def _scatter_senders(edge_values: Array, edges: EdgeList, template: Array) -> Array:
    """Transpose of `gather_senders`: sums (E, ...) onto the senders; ``template`` (N, 0) gives N."""
    reverse = edge_values.at[edges.reverse].get(mode="promise_in_bounds", unique_indices=True)
    return sum_edges(reverse, edges.receivers, template.shape[0])


def _gather_fwd(node_values, edges):
    template = jnp.zeros((node_values.shape[0], 0), node_values.dtype)
    return gather_senders(node_values, edges), (edges, template)


def _gather_bwd(residuals, cotangent):
    edges, template = residuals
    return _scatter_senders(cotangent, edges, template), None


def _scatter_fwd(edge_values, edges, template):
    return _scatter_senders(edge_values, edges, template), edges


def _scatter_bwd(edges, cotangent):
    return gather_senders(cotangent, edges), None, None


gather_senders.defvjp(_gather_fwd, _gather_bwd)
_scatter_senders.defvjp(_scatter_fwd, _scatter_bwd)


class PairMap(NamedTuple):
    """Maps edges to pairs and back.

    An edge and its reverse form a pair: whatever depends on the distance alone is the same for both.

    Attributes:
      of_edge: (E,), index of each edge's pair; P, which is out of range, for padding edges.
      edges: (P, 2), indices of the two edges of each pair, the lower one first; E, which is out of
        range, for padding pairs.
    """

    of_edge: AnyArray
    edges: AnyArray


def _rows(values: Array, index: AnyArray) -> Array:
    """values[index], with zeros where the index is out of range."""
    return values.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def both_ways(pair_values: Array, pairs: PairMap) -> Array:
    """Each pair's value on its two edges, zeros on padding edges: (P, ...) -> (E, ...).

    Both this function and its transpose are gathers, reverse-mode differentiable to any order.
    """
    return _rows(pair_values, pairs.of_edge)


@jax.custom_vjp
def _sum_ways(edge_values: Array, pairs: PairMap) -> Array:
    """Transpose of `both_ways`: the sum over each pair's two edges, (E, ...) -> (P, ...)."""
    return _rows(edge_values, pairs.edges[:, 0]) + _rows(edge_values, pairs.edges[:, 1])


both_ways.defvjp(
    lambda values, pairs: (both_ways(values, pairs), pairs),
    lambda pairs, cotangent: (_sum_ways(cotangent, pairs), None),
)
_sum_ways.defvjp(
    lambda values, pairs: (_sum_ways(values, pairs), pairs),
    lambda pairs, cotangent: (both_ways(cotangent, pairs), None),
)


class PairList(NamedTuple):
    """The atoms of each pair; padding pairs connect an atom to itself.

    Attributes:
      receivers: (P,), receiver of the first of the pair's two edges; ascending.
      senders: (P,), sender of that edge.
    """

    receivers: AnyArray
    senders: AnyArray

    def difference(self, node_values: Array) -> Array:
        """The sender's value minus the receiver's: (N, ...) -> (P, ...)."""
        return _at(node_values, self.senders) - spread(node_values, self.receivers)


def convolve_pairs(filters: Array, values: Array, pairs: PairList) -> Array:
    """sum_j W_ij * v_j over the neighbours j of each atom i, where W_ij = W_ji: (N, F).

    Neither the function nor its derivatives use arrays with one row per edge. On a CPU, scattering
    rows onto the few atoms costs less than permuting the edges.

    Args:
      filters: W (P, F), zero for padding pairs.
      values: v (N, F).
      pairs: the atoms of each pair.
    """
    i, j = pairs
    total = sum_edges(filters * _at(values, j), i, values.shape[0])
    return total.at[j].add(filters * spread(values, i), mode="promise_in_bounds")
