"""Gradient-safe norms and divisions, and the two linear maps between atoms and edges.

Edges live in *slots*: atom i owns ``M`` consecutive edges, those it receives
(``receivers = repeat(arange(N), M)``), unused slots masked. A sum over the
neighbours of each atom is then a reshape and a dense reduction instead of a
scatter-add, and so is the transpose of the gather from neighbours, through the
index of each edge's reverse edge. XLA runs scatters serially on a CPU: on 384 atoms
with 18 bonds each (117,504 triplets, 32 features, 2 cores) the gradient of a
triplet sum took 135 ms by gather and segment sum and 25 ms by slots.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def safe_norm(x: Array, axis: int = -1, keepdims: bool = False) -> Array:
    """Euclidean norm whose gradient is zero, not NaN, at the zero vector."""
    square = jnp.sum(x * x, axis=axis, keepdims=keepdims)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def safe_divide(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, zero (value and gradient) where the denominator is zero."""
    nonzero = denominator != 0
    return jnp.where(nonzero, numerator / jnp.where(nonzero, denominator, 1.0), 0.0)


def sum_slots(edge_values: Array, n_atoms: int) -> Array:
    """Sum over each receiver's edges: (N·M, ...) -> (N, ...)."""
    return edge_values.reshape((n_atoms, -1, *edge_values.shape[1:])).sum(1)


def spread_slots(node_values: Array, n_slots: int) -> Array:
    """Each receiver's value on its edges: (N, ...) -> (N·M, ...). Transpose of `sum_slots`."""
    shape = (node_values.shape[0], n_slots, *node_values.shape[1:])
    return jnp.broadcast_to(node_values[:, None], shape).reshape((-1, *shape[2:]))


@jax.custom_vjp
def gather_senders(node_values: Array, senders: Array, reverse: Array) -> Array:
    """Each sender's value on its edges: (N, ...), (E,), (E,) -> (E, ...).

    ``reverse[e]`` is the edge with sender and receiver of e exchanged (e itself for an
    unused slot, whose sender is its receiver). So the edges *sent* by atom j are the
    reverses of those it *receives*, and the transpose is a gather and a slot sum.
    Reverse-mode differentiable to any order.
    """
    return node_values[senders]


@jax.custom_vjp
def _scatter_senders(edge_values: Array, senders: Array, reverse: Array, template: Array) -> Array:
    """Transpose of `gather_senders`: sums (E, ...) to the senders; template (N, 0) gives N."""
    return sum_slots(edge_values[reverse], template.shape[0])


def _gather_fwd(node_values, senders, reverse):
    template = jnp.zeros((node_values.shape[0], 0), node_values.dtype)
    return gather_senders(node_values, senders, reverse), (senders, reverse, template)


def _gather_bwd(residuals, cotangent):
    senders, reverse, template = residuals
    return _scatter_senders(cotangent, senders, reverse, template), None, None


def _scatter_fwd(edge_values, senders, reverse, template):
    return _scatter_senders(edge_values, senders, reverse, template), (senders, reverse)


def _scatter_bwd(residuals, cotangent):
    senders, reverse = residuals
    return gather_senders(cotangent, senders, reverse), None, None, None


gather_senders.defvjp(_gather_fwd, _gather_bwd)
_scatter_senders.defvjp(_scatter_fwd, _scatter_bwd)


def masked_mean(values: Array, mask: Array) -> Array:
    """Mean over the true entries of a mask of the same shape; zero if there are none."""
    mask = mask.astype(values.dtype)
    return safe_divide(jnp.sum(jnp.where(mask > 0, values, 0.0)), jnp.sum(mask))
