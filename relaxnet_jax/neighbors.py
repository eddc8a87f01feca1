"""Periodic neighbour lists (NumPy; built once per trajectory).

The pairs are a flat list sorted by receiver, and by distance within each. Those within the triplet
cutoff are the bonds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from relaxnet_jax.errors import InputError
from relaxnet_jax.strain import deformations

Frames = Sequence[tuple[np.ndarray, np.ndarray]]

MAX_SPREAD = 2000.0  # Å along open directions; the search's time grows with the square
CLOSED_UP = 100.0  # reaches; from there on gaps are taken out
MIN_DISTANCE = 0.05  # Å; nothing bound is closer, and bases divide by the distance


@dataclasses.dataclass(frozen=True, eq=False)
class Neighbors:
    """Neighbour list of one structure.

    Attributes:
      receivers, senders: (E,) int32, the centre i and its neighbour j; receivers ascend.
      shifts: (E, 3) int32, vector = positions[j] + shifts @ cell - positions[i].
      reverse: (E,) int32, the pair with i and j exchanged.
      bond: (E,) bool, whether the pair is within the triplet range.
      n_slots: K, most bonds of any atom; 0 where triplets are not listed one by one.
      reach: Å, the distance up to which the list is complete in the structure it was made for.
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
        """B, the number of bonds among them."""
        return int(self.bond.sum())


def pairs_within(positions, cell, pbc, reach: float):
    """All ordered pairs closer than ``reach``, every periodic image counted.

    Args:
      positions: (N, 3) Å. cell: (3, 3) Å. pbc: (3,) bool. reach: Å.

    Returns:
      receivers (P,), senders (P,), shifts (P, 3) int, distances (P,) Å; an atom pairs
      with its own images.

    Raises:
      InputError: a degenerate cell, or atoms strewn over more than `MAX_SPREAD` along an open
        direction.
    """
    import vesin  # where PyTorch is installed it imports that, for what may never be called

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
    """The pairs within ``cutoff + skin``.

    Bonds are those within ``triplet_cutoff + triplet_skin``. ``slots``: whether to count K.

    Args:
      later: positions (N, 3) Å, unwrapped, and cell (3, 3) Å of frames that are known to come: pairs
        within the cutoffs there are listed too, though they be out of reach at first.

    Raises:
      InputError: two atoms at (almost) one point, or a degenerate cell.
    """
    reach = cutoff + skin
    i, j, shifts, distances = pairs_within(positions, cell, pbc, reach)
    if len(distances) and distances.min() < MIN_DISTANCE:
        worst = int(distances.argmin())
        raise InputError(
            f"atoms {i[worst]} and {j[worst]} are {distances[worst]:.3g} Å apart (closest allowed "
            f"{MIN_DISTANCE} Å); remove the duplicate atom"
        )
    nearest = distances  # what says whether a pair is a bond
    if later:
        pairs = np.column_stack([i, j, shifts])
        pairs, nearest = _with_later(pairs, distances, pbc, later, cutoff, triplet_skin)
        i, j, shifts = pairs[:, 0], pairs[:, 1], pairs[:, 2:]
        vectors = positions[j] + shifts @ np.asarray(cell, np.float64) - positions[i]
        distances = np.linalg.norm(vectors, axis=1)
    order, back = _ordered(len(positions), i, j, shifts, distances)
    i, j, shifts, nearest = i[order], j[order], shifts[order], nearest[order]
    # The reverse of a bond is a bond, also where rounding puts one of them beyond the range.
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
    """Pairs (E, 5) i, j, S at first or later, and what to hold against the triplets' range and skin:
    the distance at first, or later, where the skin has no further use, that plus the skin.

    Without a skin triplets are visited at first only.
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
    """Å: the most two atoms can have approached each other on a path.

    The sum of the two largest displacements, and what a shrinking cell takes off the length of
    the longest pairs of interest.

    Args:
      positions: (n, N, 3) Å. cells: (n, 3, 3) Å. reach: Å, of the neighbour list.
    """
    if not (np.isfinite(positions).all() and np.isfinite(cells).all()):
        return np.inf
    still, steps = positions[:1], None
    if (cells != cells[:1]).any():
        steps = deformations(cells)
        still = positions[0] @ np.swapaxes(steps, -1, -2)
    return approach_of(np.linalg.norm(positions - still, axis=-1).max(0), steps, reach)


def approach_of(moved: np.ndarray, steps: np.ndarray | None, reach: float) -> float:
    """`approach`, Å, from how far atoms moved and how the cell was deformed.

    Args:
      moved: (N,) Å, the furthest each atom was from where the deformed first structure has it.
      steps: (n, 3, 3) deformations of the cell; None where it stays. reach: Å, of the neighbour list.
    """
    shrunk = 0.0
    if steps is not None:
        if not np.isfinite(steps).all():
            return np.inf
        smallest = np.linalg.svd(steps, compute_uv=False).min()
        shrunk = max(0.0, 1.0 - float(smallest)) * reach
    if not np.isfinite(moved).all():
        return np.inf
    # An atom also neighbours its own images, which move with it; hence the two largest.
    return shrunk + (float(np.sort(moved)[-2:].sum()) if len(moved) > 1 else 0.0)


def skin_for(positions: np.ndarray, cells: np.ndarray, cutoff: float) -> float:
    """Å: the skin with which the list of a path's first frame has all pairs within ``cutoff`` of every frame.

    `approach` counts what a shrinking cell takes off the list's reach, skin included: with the motion
    m and the shrinkage s, skin = m + s (cutoff + skin).

    Args:
      positions: (n, N, 3) Å. cells: (n, 3, 3) Å. cutoff: Å.

    Returns:
      Infinite where there is none: values that are not finite, or a cell that shrinks to nothing.
    """
    moved = approach(positions, cells, 0.0)
    if not np.isfinite(moved):
        return np.inf
    shrunk = approach(positions, cells, 1.0) - moved
    if shrunk > 1 - 1e-6:
        return np.inf
    # The margin is for rounding: what was found is exactly on the edge.
    return (moved + shrunk * cutoff) / (1 - shrunk) * (1 + 1e-9)


def _ordered(
    n_atoms: int, i: np.ndarray, j: np.ndarray, shifts: np.ndarray, distances: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which edges (i, j, S), each given once, to take in which order: by i, distance, j and S; and the
    place of each one's reverse in that order. Edges without a reverse are left out."""
    forward, backward = _edge_keys(n_atoms, i, j, shifts)
    rows = np.argsort(forward)
    keys, wanted = forward[rows], backward[rows]
    back = np.minimum(np.searchsorted(keys, wanted), max(0, len(keys) - 1))
    paired = keys[back] == wanted
    if not paired.all():  # rounding can list a pair at the very edge of the reach once only
        rows, back = rows[paired], (np.cumsum(paired) - 1)[back[paired]]
    nearer = np.lexsort((distances[rows], i[rows]))  # stable: equal distances stay in order of j, S
    place = np.empty(len(rows), np.int64)
    place[nearer] = np.arange(len(rows))
    return rows[nearer], place[back[nearer]]


def _edge_keys(
    n_atoms: int, i: np.ndarray, j: np.ndarray, shifts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """An integer for each edge (i, j, S), in the order of such rows, and that of its reverse."""
    largest = np.abs(shifts).max(axis=0, initial=0)
    digits, widths = shifts + largest, 2 * largest + 1
    if n_atoms**2 * math.prod(widths.tolist()) >= 2**63:  # atoms very far outside their cell
        # Shifts and their negatives by rank: the reverse still counts from the other end.
        ranked = [np.unique(np.concatenate([s, -s]), return_inverse=True) for s in shifts.T]
        digits = np.column_stack([ranks.ravel()[: len(i)] for _, ranks in ranked])
        widths = np.array([len(values) for values, _ in ranked])
    forward, backward = i * n_atoms + j, j * n_atoms + i
    for digit, width in zip(digits.T, widths):
        forward, backward = forward * width + digit, backward * width + (width - 1 - digit)
    return forward, backward


def _closed_up(positions, cell, pbc: np.ndarray, reach: float) -> np.ndarray:
    """The positions, without most of every gap wider than the reach along open directions.

    No pair within reach spans such a gap, whatever its image: periodic vectors are orthogonal to
    these directions. vesin hangs or kills the process on atoms that are too far apart.
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
                f"the atoms are strewn over {spread:.3g} Å along a direction that is not periodic, "
                f"at most {MAX_SPREAD:g} Å is searched for neighbours; bring them together, or split "
                "the structure"
            )
    return positions


def _complete_cell(cell, positions, pbc, reach: float) -> np.ndarray:
    """The cell with vectors supplied along aperiodic directions that have none."""
    cell = np.array(cell, dtype=np.float64)
    if abs(np.linalg.det(cell)) > 1e-9:
        return cell
    if pbc.any() and np.linalg.matrix_rank(cell[pbc], tol=1e-6) < pbc.sum():
        raise InputError(
            "the cell has zero volume along a periodic direction; give its lattice vectors"
        )
    # Orthogonal complement of the periodic vectors: any vectors do, nothing repeats along them.
    _, _, rows = np.linalg.svd(np.where(pbc[:, None], cell, 0.0))
    free = rows[int(pbc.sum()) :]
    cell[~pbc] = free * (np.ptp(positions, axis=0).max() + 2 * reach + 1.0)
    return cell
