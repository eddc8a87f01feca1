"""Random perturbations of the starts of a batch, drawn anew at every step (pure functions).

A relaxation ends in the same structure from any start nearby, so the true frames are kept. Only the
first frame no longer belongs to a perturbed start: it is masked.

The neighbour list of pairs has a skin. The bonds of the explicit scheme have none, and those that
come within the triplet cutoff are missing: for copper, with noise of 0.1 Å and strains of 2 %, they
have 1e-5 of the total weight (envelope) of all bonds, and 1e-3 with twice the noise and strain.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from relaxnet_jax.config import Config
from relaxnet_jax.dynamics import constrain_velocity, inertia, strainable
from relaxnet_jax.graph import deform
from relaxnet_jax.losses import Targets
from relaxnet_jax.models.energy import RelaxNetwork
from relaxnet_jax.strain import deform_positions, symmetric
from relaxnet_jax.typing import Graph

ROUNDING = 1e-6  # Å; a lone atom is moved back to its centre with this accuracy


def perturbed(
    config: Config, network: RelaxNetwork, graph: Graph, targets: Targets, key: Array
) -> tuple[Graph, Targets]:
    """Perturbs the starts of a random share (``train.noise_share``) of the structures in a batch.

    Free atoms are moved by Gaussian noise of standard deviation ``train.noise`` (Å). Structures
    without fixed atoms keep their centre, which the dynamics could not bring back. Cells that relax
    are strained, and their atoms with them, by an isotropic symmetric Gaussian matrix: its standard
    deviation is ``train.strain_noise`` for diagonal components and 1/√2 of that for the others. It is
    projected on the directions in which the cell may be strained.

    Returns:
      The graph at the new start, and the targets: the same frames with reference positions and
      deformations relative to the new cell (`relaxnet_jax.strain`), and with the first frame masked
      where the start has changed.
    """
    t, node = config.train, graph.nodes["graph"]
    chosen_key, atom_key, cell_key = jax.random.split(key, 3)
    before = positions = jnp.asarray(graph.nodes["positions"])
    n_graphs, dtype = graph.n_node.shape[0], positions.dtype
    chosen = jax.random.uniform(chosen_key, (n_graphs,)) < t.noise_share
    strained = jnp.zeros(n_graphs, bool)
    if t.noise:
        noise = t.noise * jax.random.normal(atom_key, positions.shape, dtype)
        noise = jnp.where(chosen[node, None], noise, 0.0)
        positions = positions + constrain_velocity(graph, noise, inertia(network, graph))
    if t.strain_noise and targets.cells is not None:
        strain = t.strain_noise * symmetric(jax.random.normal(cell_key, (n_graphs, 3, 3), dtype))
        strain = strainable(graph, jnp.where(chosen[:, None, None], strain, 0.0))
        strained = (strain != 0).any((-1, -2))
        change = jnp.eye(3, dtype=dtype) + strain
        positions = deform_positions(change, positions, node)
        cell = jnp.asarray(graph.globals["cell"]) @ jnp.swapaxes(change, -1, -2)
        graph = deform(graph, change)._replace(globals=graph.globals | {"cell": cell})
        targets = _from_other_cell(targets, change, node)
    graph = graph._replace(nodes=graph.nodes | {"positions": positions})
    # Where nothing may move, as for a lone atom in a fixed cell, the start is still the first frame.
    changed = (jnp.abs(positions - before) > ROUNDING).any(-1) & graph.nodes["mask"]
    elsewhere = strained | (jax.ops.segment_max(changed.astype(jnp.int32), node, n_graphs) > 0)
    frames = jnp.arange(targets.frame_mask.shape[0])[:, None]
    mask = jnp.asarray(targets.frame_mask) & ~(elsewhere & (frames == 0))
    return graph, targets._replace(frame_mask=mask)


def _from_other_cell(targets: Targets, change: Array, node: Array) -> Targets:
    """Frames x = D y relative to initial cells changed by C (G, 3, 3): y' = C y, D' = D C⁻¹."""
    cells = targets.cells
    assert cells is not None
    return targets._replace(
        positions=deform_positions(change, jnp.asarray(targets.positions), node),
        cells=cells._replace(
            deformation=jnp.asarray(cells.deformation) @ jnp.linalg.inv(change),
            inverse=change @ jnp.asarray(cells.inverse),
        ),
    )
