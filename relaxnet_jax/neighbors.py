"""Periodic neighbour lists (NumPy; built once per trajectory).

A list contains ordered pairs, sorted by receiver and then by distance. Pairs within the triplet
cutoff are called bonds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from relaxnet_jax.errors import InputError
from relaxnet_jax.strain import deformations

Frames = Sequence[tuple[np.ndarray, np.ndarray]]

MAX_SPREAD = 2000.0  # Å along open directions; the time of the search grows with its square
CLOSED_UP = 100.0  # extent, in units of the reach, beyond which gaps are closed
MIN_DISTANCE = 0.05  # Å; no bonded atoms are closer, and bases divide by the distance


@dataclasses.dataclass(frozen=True, eq=False)
class Neighbors:
    """Neighbour list of one structure.

    Attributes:
      receivers: (E,) int32, the central atom i of each pair; ascending.
      senders: (E,) int32, its neighbour j.
      shifts: (E, 3) int32, lattice shifts: vector = positions[j] + shifts @ cell - positions[i].
      reverse: (E,) int32, index of the pair with i and j exchanged.
      bond: (E,) bool, whether the pair is within the triplet range.
      n_slots: K, the largest number of bonds of any atom; 0 where triplets are not listed one by one.
      reach: Å, distance up to which the list is complete in the structure it was built for.
    """

    receivers: np.ndarray
    senders: np.ndarray
    shifts: np.ndarray
    reverse: np.ndarray
    bond: np.ndarray
    n_slots: int
    reach: float

    @property
    def n_edges(self) -> int:
        """E, the number of ordered pairs."""
        return len(self.receivers)

    @property
    def n_bonds(self) -> int:
        """B, the number of bonds among the pairs."""
        return int(self.bond.sum())


def pairs_within(positions, cell, pbc, reach: float):
    """Finds all ordered pairs closer than ``reach``, including all periodic images.

    Args:
      positions: (N, 3) Å.
      cell: (3, 3) Å.
      pbc: (3,) bool.
      reach: largest distance, Å.

    Returns:
      receivers (P,), senders (P,), shifts (P, 3) int and distances (P,) Å. An atom also pairs with
      its own images.

    Raises:
      InputError: a degenerate cell, or atoms spread over more than `MAX_SPREAD` along an open
        direction.
    """
    import vesin  # imported late: it imports PyTorch where that is installed, perhaps for nothing

    pbc = np.asarray(pbc, dtype=bool)
    positions = _closed_up(positions, cell, pbc, reach)
    finder = vesin.NeighborList(cutoff=float(reach), full_list=True)
    i, j, shifts, distances = finder.compute(
        points=np.ascontiguousarray(positions, dtype=np.float64),
        box=_complete_cell(cell, positions, pbc, reach),
        periodic=pbc,
        quantities="ijSd",
    )
    return i.astype(np.int64), j.astype(np.int64), shifts.astype(np.int64), distances


def build_neighbors(
    positions,
    cell,
    pbc,
    cutoff: float,
    triplet_cutoff: float,
    skin: float,
    triplet_skin: float,
    slots: bool = True,
    later: Frames = (),
) -> Neighbors:
    """Builds the list of pairs within ``cutoff + skin``; bonds are within ``triplet_cutoff + triplet_skin``.

    Args:
      positions: (N, 3) Å.
      cell: (3, 3) Å.
      pbc: (3,) bool.
      cutoff: range of pairs, Å.
      triplet_cutoff: range of bonds, Å.
      skin: margin added to the range of pairs, Å.
      triplet_skin: margin added to the range of bonds, Å; 0 where triplets are visited only at ``positions``.
      slots: whether to determine the number K of bond slots; otherwise it is 0.
      later: unwrapped positions (N, 3) Å and cells (3, 3) Å of known later frames. Pairs within the
        cutoffs there are listed as well, even if they are out of reach at ``positions``.

    Raises:
      InputError: two atoms at (almost) the same point, a degenerate cell, or atoms spread too far
        apart, see `pairs_within`.
    """
    reach = cutoff + skin
    i, j, shifts, distances = pairs_within(positions, cell, pbc, reach)
    if len(distances) and distances.min() < MIN_DISTANCE:
        worst = int(distances.argmin())
        raise InputError(
            f"atoms {i[worst]} and {j[worst]} are {distances[worst]:.3g} Å apart (closest allowed "
            f"{MIN_DISTANCE} Å); remove the duplicate atom"
        )
    nearest = distances  # determines whether a pair is a bond
    if later:
        pairs = np.column_stack([i, j, shifts])
        pairs, nearest = _with_later(pairs, distances, pbc, later, cutoff, triplet_skin)
        i, j, shifts = pairs[:, 0], pairs[:, 1], pairs[:, 2:]
        vectors = positions[j] + shifts @ np.asarray(cell, np.float64) - positions[i]
        distances = np.linalg.norm(vectors, axis=1)
    order, back = _ordered(len(positions), i, j, shifts, distances)
    i, j, shifts, nearest = i[order], j[order], shifts[order], nearest[order]
    # The reverse of a bond is a bond, even if rounding puts one of the two beyond the range.
    bond = np.minimum(nearest, nearest[back]) < triplet_cutoff + triplet_skin
    most = int(np.bincount(i[bond], minlength=1).max())
    return Neighbors(
        receivers=i.astype(np.int32),
        senders=j.astype(np.int32),
        shifts=shifts.astype(np.int32),
        reverse=back.astype(np.int32),
        bond=bond,
        n_slots=max(1, most) if slots else 0,
        reach=reach,
    )


def _with_later(
    pairs: np.ndarray,
    distances: np.ndarray,
    pbc: np.ndarray,
    later: Frames,
    cutoff: float,
    triplet_skin: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Merges the pairs of the first frame with those of later frames.

    Returns:
      The pairs (E, 5) as rows i, j, S, and for each the distance (E,) Å to compare with the triplet
      cutoff plus skin. It is the smallest over the frames, where those of later frames, which need no
      skin, count with the skin added. Without a skin, triplets are visited in the first frame only,
      and later distances do not count.
    """
    rows, ranges = [pairs], [distances]
    for positions, cell in later:
        i, j, shifts, far = pairs_within(positions, cell, pbc, cutoff)
        rows.append(np.column_stack([i, j, shifts]))
        ranges.append(far + triplet_skin if triplet_skin else np.full(len(far), np.inf))
    every, place = np.unique(np.concatenate(rows), axis=0, return_inverse=True)
    nearest = np.full(len(every), np.inf)
    np.minimum.at(nearest, place.ravel(), np.concatenate(ranges))
    return every, nearest


def approach(positions: np.ndarray, cells: np.ndarray, reach: float) -> float:
    """Upper bound (Å) on how far two atoms have approached each other on a path.

    It is the sum of the two largest displacements, plus the amount by which a shrinking cell shortens
    pairs of length ``reach``.

    Args:
      positions: (n, N, 3) Å.
      cells: (n, 3, 3) Å.
      reach: reach of the neighbour list, Å.

    Returns:
      The bound; infinite where positions or cells are not finite.
    """
    if not (np.isfinite(positions).all() and np.isfinite(cells).all()):
        return np.inf
    still, steps = positions[:1], None
    if (cells != cells[:1]).any():
        steps = deformations(cells)
        still = positions[0] @ np.swapaxes(steps, -1, -2)
    return approach_of(np.linalg.norm(positions - still, axis=-1).max(0), steps, reach)


def approach_of(moved: np.ndarray, steps: np.ndarray | None, reach: float) -> float:
    """`approach` (Å), computed from the atoms' displacements and the cell's deformations.

    Args:
      moved: (N,) Å, largest distance of each atom from its position in the deformed first structure.
      steps: (n, 3, 3), deformation gradients of the cell; None for a fixed cell.
      reach: reach of the neighbour list, Å.
    """
    shrunk = 0.0
    if steps is not None:
        if not np.isfinite(steps).all():
            return np.inf
        smallest = np.linalg.svd(steps, compute_uv=False).min()
        shrunk = max(0.0, 1.0 - float(smallest)) * reach
    if not np.isfinite(moved).all():
        return np.inf
    # An atom and its own images move alike, so only two different atoms can approach each other.
    return shrunk + (float(np.sort(moved)[-2:].sum()) if len(moved) > 1 else 0.0)


def skin_for(positions: np.ndarray, cells: np.ndarray, cutoff: float) -> float:
    """The skin (Å) with which a list built for the first frame of a path suffices for all frames.

    The list then contains all pairs within ``cutoff`` in every frame. Since `approach` includes the
    shortening of the list's whole reach by a shrinking cell, skin = m + s (cutoff + skin) for atomic
    motion m and shrinkage s.

    Args:
      positions: (n, N, 3) Å.
      cells: (n, 3, 3) Å.
      cutoff: range of pairs, Å.

    Returns:
      The skin; infinite if there is none, i.e. for non-finite values or a cell that shrinks to
      nothing.
    """
    moved = approach(positions, cells, 0.0)
    if not np.isfinite(moved):
        return np.inf
    shrunk = approach(positions, cells, 1.0) - moved
    if shrunk > 1 - 1e-6:
        return np.inf
    # A margin for rounding, without which the list would only just reach the pairs.
    return (moved + shrunk * cutoff) / (1 - shrunk) * (1 + 1e-9)


def _ordered(
    n_atoms: int, i: np.ndarray, j: np.ndarray, shifts: np.ndarray, distances: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sorts edges (i, j, S), each given once, by i, distance, j and S; drops those without a reverse.

    Returns:
      The indices of the kept edges in sorted order, and the place of each one's reverse in that order.
    """
    forward, backward = _edge_keys(n_atoms, i, j, shifts)
    rows = np.argsort(forward)
    keys, wanted = forward[rows], backward[rows]
    back = np.minimum(np.searchsorted(keys, wanted), max(0, len(keys) - 1))
    paired = keys[back] == wanted
    if not paired.all():  # at the very edge of the reach, rounding can leave out one of the two
        rows, back = rows[paired], (np.cumsum(paired) - 1)[back[paired]]
    nearer = np.lexsort((distances[rows], i[rows]))  # stable: equal distances stay in order of j, S
    place = np.empty(len(rows), np.int64)
    place[nearer] = np.arange(len(rows))
    return rows[nearer], place[back[nearer]]


def _edge_keys(
    n_atoms: int, i: np.ndarray, j: np.ndarray, shifts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Integer keys that order edges like rows (i, j, S), and the keys of the edges' reverses."""
    largest = np.abs(shifts).max(axis=0, initial=0)
    digits, widths = shifts + largest, 2 * largest + 1
    if n_atoms**2 * math.prod(widths.tolist()) >= 2**63:  # atoms very far outside their cell
        # Use the ranks of the shifts and their negatives: negation still mirrors the range.
        ranked = [np.unique(np.concatenate([s, -s]), return_inverse=True) for s in shifts.T]
        digits = np.column_stack([ranks.ravel()[: len(i)] for _, ranks in ranked])
        widths = np.array([len(values) for values, _ in ranked])
    forward, backward = i * n_atoms + j, j * n_atoms + i
    for digit, width in zip(digits.T, widths):
        forward, backward = forward * width + digit, backward * width + (width - 1 - digit)
    return forward, backward


def _closed_up(positions, cell, pbc: np.ndarray, reach: float) -> np.ndarray:
    """Narrows gaps wider than the reach along open directions, if the atoms are spread very far.

    No pair within reach spans such a gap, in any image, since these directions are orthogonal to the
    periodic vectors. Without this, vesin hangs or kills the process on atoms that are too far apart.

    Raises:
      InputError: atoms spread over more than `MAX_SPREAD` even so.
    """
    positions = np.array(positions, np.float64)
    if pbc.all() or not len(positions):
        return positions
    _, _, rows = np.linalg.svd(np.where(pbc[:, None], np.asarray(cell, np.float64), 0.0))
    for axis in rows[int(pbc.sum()) :]:
        along = positions @ axis
        if np.ptp(along) > CLOSED_UP * reach:
            order = np.argsort(along)
            excess = np.maximum(np.diff(along[order]) - 1.01 * reach, 0.0)
            shift = np.zeros(len(along))
            shift[order[1:]] = np.cumsum(excess)
            positions -= shift[:, None] * axis
        spread = np.ptp(positions @ axis)
        if not spread <= MAX_SPREAD:
            raise InputError(
                f"the atoms span {spread:.3g} Å along a non-periodic direction, more than the "
                f"{MAX_SPREAD:g} Å that can be searched for neighbours; bring them together, or split the structure"
            )
    return positions


def _complete_cell(cell, positions, pbc, reach: float) -> np.ndarray:
    """Supplies missing lattice vectors along aperiodic directions."""
    cell = np.array(cell, dtype=np.float64)
    if abs(np.linalg.det(cell)) > 1e-9:
        return cell
    if pbc.any() and np.linalg.matrix_rank(cell[pbc], tol=1e-6) < pbc.sum():
        raise InputError(
            "the cell has zero volume along a periodic direction; give its lattice vectors"
        )
    # Any vectors in the orthogonal complement of the periodic ones will do: nothing repeats there.
    _, _, rows = np.linalg.svd(np.where(pbc[:, None], cell, 0.0))
    free = rows[int(pbc.sum()) :]
    cell[~pbc] = free * (np.ptp(positions, axis=0).max() + 2 * reach + 1.0)
    return cell
