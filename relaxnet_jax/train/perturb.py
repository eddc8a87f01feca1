"""Other starts for the relaxations of a batch, made anew at every step (a pure function).

A relaxation ends where it does from any start nearby. The true frames stay what they are; only
the first one is no longer the start's, and what is known of it does not count.

Pairs keep the skin of their list. Bonds of the explicit scheme have none, and those that come into the
triplet cutoff are missing: of copper 1e-5 of the weight of all (their envelopes) with noise of 0.1 Å and
strains of 2 %, 1e-3 with twice as much.
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

ROUNDING = 1e-6  # Å: a lone atom is put back to its centre as exactly as that


def perturbed(
    config: Config, network: RelaxNetwork, graph: Graph, targets: Targets, key: Array
) -> tuple[Graph, Targets]:
    """The batch with a share of its structures (``train.noise_share``) starting elsewhere.

    Atoms are moved by Gaussian noise of standard deviation ``train.noise`` (Å): free ones only,
    and structures without fixed atoms keep their centre, which the dynamics could not bring
    back. Cells that relax, and the lattice's atoms with them, are strained by a symmetric
    Gaussian, ``train.strain_noise`` for diagonal components and 1/√2 of it for the others (isotropic), in
    the directions in which they may be.

    Returns:
      The graph from the new start, and the targets: reference positions and deformations of the
      same frames from there (`relaxnet_jax.strain`), the first frame masked where it is another.
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
    # Where nothing may move, as in a lone atom's fixed cell, the start is still the frame's.
    changed = (jnp.abs(positions - before) > ROUNDING).any(-1) & graph.nodes["mask"]
    elsewhere = strained | (jax.ops.segment_max(changed.astype(jnp.int32), node, n_graphs) > 0)
    frames = jnp.arange(targets.frame_mask.shape[0])[:, None]
    mask = jnp.asarray(targets.frame_mask) & ~(elsewhere & (frames == 0))
    return graph, targets._replace(frame_mask=mask)


def _from_other_cell(targets: Targets, change: Array, node: Array) -> Targets:
    """Frames x = D y as seen from initial cells strained by (G, 3, 3): y' = C y, D' = D C⁻¹."""
    cells = targets.cells
    assert cells is not None
    return targets._replace(
        positions=deform_positions(change, jnp.asarray(targets.positions), node),
        cells=cells._replace(
            deformation=jnp.asarray(cells.deformation) @ jnp.linalg.inv(change),
            inverse=change @ jnp.asarray(cells.inverse),
        ),
    )
