"""Structures and the schema of their padded graphs.

A batch is one `jraph.GraphsTuple` of G structures, the last of which is padding:

  nodes:   positions (N, 3) Å; atomic_numbers (N,); masses (N,) amu; charges (N,) e;
           fixed (N,) bool; mask (N,) bool; graph (N,), index of the structure;
           bond_slots (N, K), indices of each atom's bonds, padded to K slots per atom, with
           bond_slot_mask (N, K) bool; K = 0 where triplets are not listed.
  edges:   offsets (E, 3) Å, lattice shift of the sender; mask (E,) bool; reverse (E,), index of the
           reversed edge; pair_index (E,) and pair_edges (P, 2), see `ops.PairMap`;
           ``pairs``, the first edge of each pair, P = E/2, with receivers, senders, offsets and mask
           (P, ...) of its own; ``bonds``, the nodes of the bond graph, i.e. the edges within the
           triplet range, with receivers, senders, reverse, offsets and mask (B, ...) of their own.
  globals: cell (G, 3, 3) Å; mask (G,) bool; strain (G, 3, 3), projector onto the directions in
           which the cell may be strained: the identity, a plane, or zero for a fixed cell.

Receivers ascend. Padding edges and pairs connect the last atom to itself; a padding edge is its own
reverse. The triplets, which are the edges of the bond graph, need no arrays: they are the ordered
pairs of bonds at one atom.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from ase.data import atomic_masses
from jax import Array

from relaxnet_jax.config import Config
from relaxnet_jax.constraints import held_atoms
from relaxnet_jax.errors import InputError
from relaxnet_jax.neighbors import Frames, Neighbors, build_neighbors
from relaxnet_jax.ops import EdgeList, PairList, PairMap, gather_senders, spread
from relaxnet_jax.typing import AnyArray, Graph, Positions

if TYPE_CHECKING:
    from ase import Atoms

MAX_ATOMIC_NUMBER = 118
# Length (Å) of the vectors of padding edges. Beyond any cutoff, it gives finite values in every basis
# and zero, with zero gradient, in every envelope.
FAR = 1.0e3


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """One structure with its neighbour list (NumPy), ready to be put in a batch.

    Attributes:
      atomic_numbers: (N,).
      positions: (N, 3) Å.
      cell: (3, 3) Å.
      pbc: (3,) bool.
      fixed_mask: (N,) bool.
      charges: (N,) e.
      strain: (3, 3), see `strain_projector`; zero for a fixed cell.
      neighbors: the neighbour list.
    """

    atomic_numbers: np.ndarray
    positions: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray
    fixed_mask: np.ndarray
    charges: np.ndarray
    strain: np.ndarray
    neighbors: Neighbors

    @property
    def n_atoms(self) -> int:
        """N, the number of atoms."""
        return len(self.atomic_numbers)

    @property
    def origin(self) -> np.ndarray:
        """The centroid of the atoms, (3,) Å; on a device, positions are relative to it."""
        return self.positions.mean(axis=0)

    def centred(self) -> Structure:
        """The structure shifted to the coordinate origin, far from which float32 would round distances.

        Other positions that are used with its neighbour list have to be shifted by `origin` as well.
        """
        return dataclasses.replace(self, positions=self.positions - self.origin)


def build_structure(
    atomic_numbers,
    positions,
    cell,
    pbc,
    config: Config,
    fixed_mask=None,
    charges=None,
    name: str = "structure",
    relax_cell: bool = True,
    later: Frames = (),
    bond_skin: float | None = None,
) -> Structure:
    """Checks a structure and finds its neighbours.

    Args:
      atomic_numbers: (N,).
      positions: (N, 3) Å.
      cell: (3, 3) Å.
      pbc: (3,) bool.
      config: determines the cutoffs, skins and kind of neighbour list, and whether cells relax.
      fixed_mask: (N,) bool; None for no fixed atoms.
      charges: (N,) e; None for zero charges.
      name: for error messages.
      relax_cell: whether the cell relaxes along its periodic directions, provided that
        dynamics.cell="variable".
      later: known later frames of the path, see `neighbors.build_neighbors`.
      bond_skin: skin of the list of bonds, Å. By default `Config.triplet_skin`, which is zero for
        models that visit triplets only at the initial positions.

    Raises:
      InputError: no atoms, positions of the wrong shape, an unknown atomic number, non-finite
        positions, cell or charges, a periodic cell without volume, or two atoms at one point. The
        message begins with ``name``.
    """
    numbers = np.asarray(atomic_numbers, np.int32)
    positions, cell = np.asarray(positions, np.float64), np.asarray(cell, np.float64)
    pbc = np.broadcast_to(np.asarray(pbc, bool), (3,))
    if len(numbers) == 0:
        raise InputError(f"{name}: has no atoms")
    if positions.shape != (len(numbers), 3):
        raise InputError(
            f"{name}: positions have shape {positions.shape}, expected {(len(numbers), 3)}"
        )
    if numbers.min() < 1 or numbers.max() > MAX_ATOMIC_NUMBER:
        bad = numbers[(numbers < 1) | (numbers > MAX_ATOMIC_NUMBER)][0]
        raise InputError(f"{name}: atomic number {bad} is not an element (1..{MAX_ATOMIC_NUMBER})")
    if not np.isfinite(positions).all():
        atom = int(np.argwhere(~np.isfinite(positions))[0, 0])
        raise InputError(
            f"{name}: position of atom {atom} is not finite; repair or drop the structure"
        )
    if not np.isfinite(cell).all():
        raise InputError(f"{name}: the cell is not finite; repair or drop the structure")
    if pbc.all() and abs(np.linalg.det(cell)) < 1e-6:
        raise InputError(
            f"{name}: the cell has zero volume; give three independent lattice vectors "
            "or set pbc=False for a molecule"
        )
    if charges is not None and not np.isfinite(np.asarray(charges, np.float64)).all():
        raise InputError(f"{name}: charges are not finite; repair or drop the structure")
    try:
        g = config.graph
        neighbors = build_neighbors(
            positions,
            cell,
            pbc,
            g.cutoff,
            g.triplet_cutoff,
            g.skin,
            config.triplet_skin if bond_skin is None else bond_skin,
            slots=config.model.interaction == "triplets",
            later=later,
        )
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return Structure(
        atomic_numbers=numbers,
        positions=positions,
        cell=cell,
        pbc=pbc.copy(),
        fixed_mask=np.zeros(len(numbers), bool)
        if fixed_mask is None
        else np.asarray(fixed_mask, bool),
        charges=np.zeros(len(numbers)) if charges is None else np.asarray(charges, np.float64),
        strain=strain_projector(cell, pbc)
        if relax_cell and config.dynamics.cell == "variable"
        else np.zeros((3, 3)),
        neighbors=neighbors,
    )


def strain_projector(cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """Projector (3, 3) onto the space spanned by the periodic lattice vectors.

    It is the identity for a bulk crystal, the projector onto the plane of a slab, and zero for a
    molecule.
    """
    periodic = np.asarray(cell, np.float64)[np.asarray(pbc, bool)]
    return np.linalg.pinv(periodic) @ periodic if len(periodic) else np.zeros((3, 3))


def structure_from_atoms(
    atoms: Atoms,
    config: Config,
    name: str | None = None,
    relax_cell: bool = True,
    bond_skin: float | None = None,
) -> Structure:
    """Builds a `Structure` from ASE Atoms, see `build_structure`.

    Atoms that cannot move at all (see `held_atoms`) are fixed; those constrained in some directions
    only are free.

    Raises:
      InputError: as `build_structure`.
    """
    charges = atoms.get_initial_charges()
    return build_structure(
        atoms.numbers,
        atoms.positions,
        atoms.cell.array,
        atoms.pbc,
        config,
        fixed_mask=held_atoms(atoms)[0],
        charges=charges,
        name=name or atoms.get_chemical_formula(),
        relax_cell=relax_cell,
        bond_skin=bond_skin,
    )


def masses_of(atomic_numbers: np.ndarray) -> np.ndarray:
    """Standard atomic masses in amu."""
    return atomic_masses[atomic_numbers]


def pair_list(graph: Graph) -> EdgeList:
    """The edges of the atom graph, i.e. all ordered pairs of neighbours."""
    return EdgeList(graph.receivers, graph.senders, graph.edges["reverse"])


def pair_map(graph: Graph) -> PairMap:
    """The map between edges and the pairs they form."""
    return PairMap(graph.edges["pair_index"], graph.edges["pair_edges"])


def unordered_pairs(graph: Graph) -> PairList:
    """The receivers and senders of the first edge of each pair."""
    pairs = graph.edges["pairs"]
    return PairList(pairs["receivers"], pairs["senders"])


def bond_list(graph: Graph) -> EdgeList:
    """The nodes of the bond graph, as edges between atoms."""
    bonds = graph.edges["bonds"]
    return EdgeList(bonds["receivers"], bonds["senders"], bonds["reverse"])


def edge_vectors(edges: EdgeList, offsets: AnyArray, mask: AnyArray, positions: Positions) -> Array:
    """positions[sender] + offset - positions[receiver]: (E, 3) Å; FAR along x for padding edges."""
    vectors = gather_senders(positions, edges) - spread(positions, edges.receivers)
    return _shifted(vectors, offsets, mask)


def _shifted(vectors: Array, offsets: AnyArray, mask: AnyArray) -> Array:
    """Adds the lattice offsets to vectors; FAR along x where masked."""
    vectors = vectors + jnp.asarray(offsets, vectors.dtype)
    return jnp.where(mask[:, None], vectors, jnp.array([FAR, 0.0, 0.0], vectors.dtype))


def pair_vectors(graph: Graph, positions: Positions) -> Array:
    """The vectors of all edges: (E, 3) Å."""
    edges = graph.edges
    return edge_vectors(pair_list(graph), edges["offsets"], edges["mask"], positions)


def once_per_pair(graph: Graph, positions: Positions) -> Array:
    """The vector of the first edge of each pair: (P, 3) Å; FAR along x for padding."""
    pairs = graph.edges["pairs"]
    vectors = unordered_pairs(graph).difference(positions)
    return _shifted(vectors, pairs["offsets"], pairs["mask"])


def bond_vectors(graph: Graph, positions: Positions) -> Array:
    """The vectors of the bonds: (B, 3) Å."""
    bonds = graph.edges["bonds"]
    return edge_vectors(bond_list(graph), bonds["offsets"], bonds["mask"], positions)


def relaxing_cells(graph: Graph) -> Array:
    """Mask (G,) bool of structures whose cell may change."""
    return jnp.any(graph.globals["strain"] != 0, axis=(-2, -1))


def deform(graph: Graph, deformation: Array) -> Graph:
    """The graph with its lattices deformed: each offset is replaced by D·offset.

    Positions are not deformed, since functions of a graph take them as a separate argument.

    Args:
      graph: a padded batch.
      deformation: (G, 3, 3), the deformation gradient D of each structure.
    """
    of_atom = deformation[graph.nodes["graph"]]

    def mapped(receivers: AnyArray, offsets: AnyArray) -> Array:
        return jnp.einsum("eab,eb->ea", spread(of_atom, receivers), offsets)

    bonds, pairs = graph.edges["bonds"], graph.edges["pairs"]
    return graph._replace(
        edges=graph.edges
        | {
            "offsets": mapped(graph.receivers, graph.edges["offsets"]),
            "pairs": pairs | {"offsets": mapped(pairs["receivers"], pairs["offsets"])},
            "bonds": bonds | {"offsets": mapped(bonds["receivers"], bonds["offsets"])},
        }
    )
