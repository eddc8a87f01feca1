"""The five terms of the loss of equation (7), a term for energy changes, and two terms for cells.

Every term is kept as a numerator and a denominator, so that several devices can add up both
and obtain exactly the loss of one large batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import jraph
from jax import Array

from relaxnet_jax.config import LossConfig
from relaxnet_jax.graph import relaxing_cells
from relaxnet_jax.ops import safe_divide, safe_norm
from relaxnet_jax.programs import storable
from relaxnet_jax.solver import Trajectory
from relaxnet_jax.strain import log_strain, stress
from relaxnet_jax.typing import AnyArray, Graph

TERMS = ("energy", "energy_change", "monotonicity", "forces", "positions", "direction")
CELL_TERMS = ("stress", "cell")  # only for models whose cells relax


class CellTargets(NamedTuple):
    """The true cells of a padded batch, for models whose cells relax.

    Attributes:
      deformation: (n, G, 3, 3), deformation gradient of each frame's cell.
      inverse: (n, G, 3, 3), its inverse.
      stress: (n, G, 3, 3) eV/Å³, tension positive.
      stress_mask: (n, G) bool, where the stress is known and meaningful: for crystals and for other
        structures whose cell relaxes.
    """

    deformation: AnyArray
    inverse: AnyArray
    stress: AnyArray
    stress_mask: AnyArray


class Targets(NamedTuple):
    """The true frames of a padded batch.

    Attributes:
      positions: (n, N, 3) Å.
      forces: (n, N, 3) eV/Å.
      energies: (n, G) eV, relative to the composition energies.
      frame_mask: (n, G) bool, which frames exist.
      last: (G,) int, index of each structure's final frame.
      times: (n, G) pseudotimes; None for the frame grid.
      cells: the true cells; None for models with fixed cells.
    """

    positions: AnyArray
    forces: AnyArray
    energies: AnyArray
    frame_mask: AnyArray
    last: AnyArray
    times: AnyArray | None = None
    cells: CellTargets | None = None


@storable
class Term(NamedTuple):
    """A loss term as a sum and the number of summands (both scalar arrays)."""

    total: Any
    number: Any

    def mean(self) -> Array:
        """total / number; zero if there are no summands."""
        return safe_divide(self.total, self.number)


def loss_terms(
    prediction: Trajectory, targets: Targets, graph: Graph, config: LossConfig
) -> dict[str, Term]:
    """The unweighted loss terms of one batch: equation (7), energy changes, and cells that relax.

    A hat marks predictions.

    energy: |E - Ê| per structure and frame (per atom with energy_per="atom").
    energy_change: likewise |(E - E_last) - (Ê - Ê_last)|, over the frames before the final one, in
      which the paths from all starts end.
    monotonicity: ReLU(Ê_{t+1} - Ê_t) over consecutive frames that both exist (per atom as above).
    forces: (F - F̂)² per component over free atoms; |F - F̂| per free atom with errors="norm"; or the
      pseudo-Huber loss √(d² + |F - F̂|²) - d per free atom with huber_forces=d.
    positions: likewise (x - x̂)² or |x - x̂|, over all frames but the first, which is given.
    direction: the sum of (1 - cos theta_i) |Δx_i| divided by the sum of |Δx_i|, with Δx_i the true
      total displacement of free atom i and theta_i its angle to the predicted one. Atoms that do
      not move contribute nothing, and an atom predicted not to move has cos theta = 0.
    stress: (s - ŝ)² per component, or the Frobenius norm |s - ŝ|, for crystals and for structures
      whose cell relaxes, projected onto the directions in which it may relax.
    cell: likewise for the logarithmic strain between the true and the predicted cell, over all frames
      but the first, for structures whose cell relaxes.

    Where cells relax, positions are reference positions, and strain enters through the cell term only.
    """
    positions = prediction.positions if prediction.reference is None else prediction.reference
    mask = targets.frame_mask & graph.globals["mask"]
    size = (
        jnp.maximum(graph.n_node, 1) if config.energy_per == "atom" else jnp.ones_like(graph.n_node)
    )
    node = graph.nodes["graph"]
    free = graph.nodes["mask"] & ~graph.nodes["fixed"]
    atom_mask = _free_atoms(targets, graph)

    error = prediction.energies - targets.energies
    energy = jnp.abs(error) / size
    frames, structures = jnp.arange(mask.shape[0]), jnp.arange(mask.shape[1])
    change = jnp.abs(error - error[targets.last, structures]) / size
    before_last = frames[:, None] < jnp.asarray(targets.last)
    rise = jnp.maximum(prediction.energies[1:] - prediction.energies[:-1], 0.0) / size
    pairs = mask[1:] & mask[:-1]
    squared = config.errors == "squared"
    size_of, components = (_square, lambda n: n) if squared else (safe_norm, lambda n: 1)
    off = prediction.forces - targets.forces
    d = config.huber_forces
    forces = jnp.sqrt(d**2 + _square(off)) - d if d else size_of(off)
    moved = size_of(positions - targets.positions)[1:]

    atoms = jnp.arange(node.shape[0])
    last = targets.last[node]
    start = graph.nodes["positions"]
    true = jnp.where(free[:, None], targets.positions[last, atoms] - start, 0.0)
    ours = jnp.where(free[:, None], positions[last, atoms] - start, 0.0)
    length = safe_norm(true)
    cosine = safe_divide(jnp.sum(true * ours, -1), length * safe_norm(ours))

    def term(values, where, number=1):
        values = jnp.where(where, values, 0.0)
        return Term(jnp.sum(values), number * jnp.sum(where).astype(values.dtype))

    terms = {
        "energy": term(energy, mask),
        "energy_change": term(change, mask & before_last),
        "monotonicity": term(rise, pairs),
        "forces": term(forces, atom_mask, 1 if d else components(3)),
        "positions": term(moved, atom_mask[1:], components(3)),
        "direction": Term(jnp.sum((1.0 - cosine) * length), jnp.sum(length)),
    }
    if prediction.deformation is None:
        return terms
    cells = targets.cells
    assert cells is not None and prediction.virial is not None
    relaxes = relaxing_cells(graph)
    # The stress of a fixed cell is as informative about the energy as that of a relaxing one.
    identity = jnp.eye(3, dtype=prediction.deformation.dtype)
    projector = jnp.where(relaxes[:, None, None], graph.globals["strain"], identity)
    found = stress(prediction.virial, graph.globals["cell"], prediction.deformation)
    difference = size_of(_flat(projector @ (found - cells.stress) @ projector))
    strain = size_of(_flat(strain_between(prediction, cells)))[1:]
    return terms | {
        "stress": term(difference, mask & cells.stress_mask, components(9)),
        "cell": term(strain, mask[1:] & relaxes, components(9)),
    }


def _free_atoms(targets: Targets, graph: Graph) -> Array:
    """Mask (n, N) bool of the free atoms of frames that exist."""
    mask = targets.frame_mask & graph.globals["mask"]
    return mask[:, graph.nodes["graph"]] & graph.nodes["mask"] & ~graph.nodes["fixed"]


def _square(vectors: Array) -> Array:
    return jnp.sum(vectors**2, -1)


def _flat(tensors: Array) -> Array:
    return tensors.reshape(*tensors.shape[:-2], 9)


def strain_between(prediction: Trajectory, cells: CellTargets) -> Array:
    """Logarithmic strain from the true to the predicted cells: (n, G, 3, 3)."""
    assert prediction.deformation is not None
    return log_strain(prediction.deformation @ jnp.asarray(cells.inverse))


def weighted_loss(terms: dict[str, Term], config: LossConfig) -> tuple[Array, dict[str, Array]]:
    """The loss sum_k lambda_k total_k/number_k, and the unweighted means by name."""
    means = {name: term.mean() for name, term in terms.items()}
    counted = (name for name in (*TERMS, *CELL_TERMS) if name in means)
    return sum(getattr(config, name) * means[name] for name in counted), means


def force_error(prediction: Trajectory, targets: Targets, graph: Graph) -> Term:
    """|F - F̂| per component over free atoms and all frames, eV/Å, whatever the loss uses for forces."""
    where = _free_atoms(targets, graph)
    off = jnp.sum(jnp.abs(prediction.forces - targets.forces), -1)
    off = jnp.where(where, off, 0.0)
    return Term(jnp.sum(off), 3 * jnp.sum(where).astype(off.dtype))


def coordinate_error(prediction: Trajectory, targets: Targets, graph: Graph) -> tuple[Term, Term]:
    """Errors of the final positions, of the model, |x - x̂|, and of doing nothing, |x - x(0)|, in Å.

    Averaged over the coordinates of each structure's free atoms, then over structures. Where cells
    relax, the errors are those of the reference positions.
    """
    positions = prediction.positions if prediction.reference is None else prediction.reference
    node, n_graphs = graph.nodes["graph"], graph.n_node.shape[0]
    free = (graph.nodes["mask"] & ~graph.nodes["fixed"]).astype(targets.positions.dtype)
    last, atoms = targets.last[node], jnp.arange(node.shape[0])
    true = targets.positions[last, atoms]
    count = jraph.segment_sum(free, node, n_graphs)
    present = (count > 0) & graph.globals["mask"]

    def per_structure(final):
        error = jnp.sum(jnp.abs(final - true), -1) / 3 * free
        mean = safe_divide(jraph.segment_sum(error, node, n_graphs), count)
        return Term(jnp.sum(jnp.where(present, mean, 0.0)), jnp.sum(present).astype(mean.dtype))

    return per_structure(positions[last, atoms]), per_structure(graph.nodes["positions"])


def strain_error(prediction: Trajectory, targets: Targets, graph: Graph) -> tuple[Term, Term]:
    """Errors of the final cell, of the model and of doing nothing: mean |logarithmic strain|.

    The strain is that between the true and the predicted (or initial) cell. Averaged over
    components, then over structures whose cell relaxes.
    """
    cells, relaxes = targets.cells, relaxing_cells(graph)
    assert cells is not None
    count = jnp.sum(relaxes).astype(targets.positions.dtype)
    structures = jnp.arange(relaxes.shape[0])

    def mean(strain):
        size = jnp.mean(jnp.abs(strain[targets.last, structures]), (-2, -1))
        return Term(jnp.sum(jnp.where(relaxes, size, 0.0)), count)

    return mean(strain_between(prediction, cells)), mean(log_strain(jnp.asarray(cells.inverse)))
