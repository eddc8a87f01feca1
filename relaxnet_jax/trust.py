"""Trust in a predicted path: flags that warn about it, derived from the path and the model alone.

No flag says how large the error is; each reports something that does not occur in a good
prediction. Flags need no second model, and their cost is negligible beside that of a prediction.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ase.data import chemical_symbols, covalent_radii

from relaxnet_jax.config import Config
from relaxnet_jax.constraints import held_atoms, move_to_end
from relaxnet_jax.data.trajectory import CELL_TOLERANCE, RelaxationTrajectory
from relaxnet_jax.errors import InputError
from relaxnet_jax.model import RelaxNet
from relaxnet_jax.neighbors import approach, pairs_within
from relaxnet_jax.strain import deformations

if TYPE_CHECKING:
    from ase import Atoms

# As a fraction of the sum of two covalent radii. The shortest existing bonds, multiple bonds to
# oxygen and nitrogen, have 0.67 (uranyl) and more.
MIN_CONTACT = 0.6
MAX_RISE = 2e-3  # eV/atom; the energy of a relaxation only falls
# By how much the means below may leave the range of the training data, as a fraction of its ends.
MARGIN = 0.1
# Of a cell along any direction, or its inverse; strains in training are far smaller.
MAX_STRETCH = 2.0
VACUUM = 6.0  # Å without an atom along a lattice direction
AT_REST = 0.05  # eV/Å; forces below this need not fall any further
# Fraction of doing nothing's position error, at or above which a model has learned nothing about positions.
NOTHING = 0.95


class Flag(NamedTuple):
    """One warning about a prediction.

    Attributes:
      name: one of "untrained", "unseen element", "not finite", "skin exceeded",
        "cell strained too far", "atoms too close", "atoms fly apart", "energy rises",
        "forces do not fall", "density", "coordination", "all atoms fixed", "vacuum strained",
        "constraints ignored", "constraints fail", "no forces", "cell force unknown", "no charges",
        "not converged", "no better than nothing"; for a committee also "members disagree",
        "member lost".
      detail: one line with the numbers.
      unusable: whether the final geometry should not be used, not even as a starting point.
    """

    name: str
    detail: str
    unusable: bool = False


def trust_flags(
    path: RelaxationTrajectory, model: RelaxNet, skin: float | None = None, approached: float = 0.0
) -> tuple[Flag, ...]:
    """All flags of a predicted path, the most severe first; empty if there is nothing to warn about.

    Args:
      path: predicted path of n frames.
      model: the model that predicted it.
      skin: Å, of the neighbour list that was used for the prediction; None where it is unknown, as
        for paths that `relax` has already checked with it and for means of several paths.
      approached: Å, by how much two atoms have approached each other, where this is known for more
        than the frames of the path, i.e. for the stages of the solver.
    """
    flags = [*_elements(path, model), *_score(model)]
    values = (path.positions, path.energies, path.forces)
    if not all(np.isfinite(v).all() for v in values):
        text = "positions, energies or forces of the path are not finite"
        return (Flag("not finite", text, True), *flags)
    missed = None if skin is None else _skin(path, model, skin, approached)
    around: list[Flag] = []
    try:
        close, around = contact_flag(path), list(_surroundings(path, model))
    except InputError as error:  # no neighbours can be found for atoms that fly apart
        close = Flag("atoms fly apart", str(error), True)
    for found in (missed, _stretch(path), close, _rise(path), _forces(path), *around):
        if found is not None:
            flags.append(found)
    if model.config.model.charges and path.charges is None:
        text = "the model uses atomic charges, but the structure has none: they are taken as zero"
        flags.append(Flag("no charges", text))
    if model.config.dynamics.latent == "direct":
        flags.append(
            Flag(
                "no forces", "the model predicts none: it is unknown whether the atoms are at rest"
            )
        )
    elif path.variable_cell and path.stresses is None:
        text = (
            "a stress needs a volume, i.e. a cell periodic in all directions: it is unknown whether the "
            "cell is at rest"
        )
        flags.append(Flag("cell force unknown", text))
    if path.fixed_mask.all():
        moves = "only the cell relaxes" if path.variable_cell else "nothing can move"
        flags.append(Flag("all atoms fixed", moves))
    flags += _vacuum(path)
    return tuple(sorted(flags, key=lambda flag: not flag.unusable))


NOT_CONVERGED = "not converged"  # a static model's minimisation ended above fmax
# With these flags it is unknown whether a structure is at rest.
UNKNOWN_FORCES = ("no forces", "cell force unknown")


def constraint_flags(atoms: Atoms, path: RelaxationTrajectory) -> tuple[Flag, ...]:
    """Flags for constraints of the atoms that the model does not handle, the most severe first.

    ASE applies the constraints when the atoms are moved to the end of the path. If it cannot, or if
    they bring atoms too close together, the prediction is unusable.
    """
    fixed, _ = held_atoms(atoms)
    ignored = set()
    for constraint in atoms.constraints:
        index = getattr(constraint, "index", None)
        if index is None or not fixed[index].all():
            ignored.add(type(constraint).__name__)
    if not ignored:
        return ()
    names = ", ".join(sorted(ignored))
    told = Flag("constraints ignored", f"the path ignores {names}; the final structure does not")
    if not np.isfinite(path.positions[-1]).all() or not np.isfinite(path.cells[-1]).all():
        return (told,)
    moved, failure = atoms.copy(), None
    try:
        with np.errstate(invalid="ignore"):
            move_to_end(moved, path)
    except (RuntimeError, ValueError, ArithmeticError) as error:  # ASE's constraints raise any
        failure = str(error) or type(error).__name__
    else:
        if not np.isfinite(moved.positions).all():
            failure = "positions are not finite"
    if failure is not None:
        return (Flag("constraints fail", f"{names} cannot be satisfied: {failure}", True), told)
    try:
        close = _contact(path.atomic_numbers, moved.positions, moved.cell.array, path.pbc)
    except InputError:  # `trust_flags` reports this for the path
        close = None
    return (close, told) if close else (told,)


def unusable(flags: tuple[Flag, ...]) -> bool:
    """Whether any of the flags rules out using the final geometry."""
    return any(flag.unusable for flag in flags)


def _score(model: RelaxNet) -> Iterator[Flag]:
    """A flag for models whose positions on their own validation split are no better than doing nothing."""
    score = json.loads(model.statistics).get("validation", {}).get("positions_over_nothing", 0.0)
    if score >= NOTHING:
        text = f"on its validation split the model's position error was {score:.2f} of that of doing nothing"
        yield Flag("no better than nothing", text)


def _elements(path: RelaxationTrajectory, model: RelaxNet) -> Iterator[Flag]:
    if not model.elements:
        yield Flag("untrained", "the model's parameters are random")
        return
    unseen = sorted({int(z) for z in path.atomic_numbers} - set(model.elements))
    if unseen:
        symbols = ", ".join(chemical_symbols[z] for z in unseen)
        yield Flag("unseen element", f"the model never saw {symbols}", True)


def _skin(
    path: RelaxationTrajectory, model: RelaxNet, skin: float, approached: float
) -> Flag | None:
    needed = approach(path.positions, path.cells, model.config.graph.cutoff + skin)
    needed = max(needed, approached)
    if needed <= skin:
        return None
    text = f"atoms may have approached by {needed:.2f} Å, but the neighbour list allows only {skin:g} Å"
    return Flag("skin exceeded", text, True)


def _stretch(path: RelaxationTrajectory) -> Flag | None:
    found = np.linalg.svd(deformations(path.cells[[0, -1]])[1], compute_uv=False)
    worst = max(found, key=lambda stretch: abs(np.log(max(stretch, 1e-300))))
    if 1 / MAX_STRETCH <= worst <= MAX_STRETCH:
        return None
    text = f"along one direction the cell ends at {worst:.2g} times its length"
    return Flag("cell strained too far", text, True)


def contact_flag(path: RelaxationTrajectory) -> Flag | None:
    """A flag if two atoms of the last frame, or their periodic images, are too close; else None.

    Too close means nearer than `MIN_CONTACT` times the sum of their covalent radii.
    """
    return _contact(path.atomic_numbers, path.positions[-1], path.cells[-1], path.pbc)


def _contact(numbers, positions, cell, pbc) -> Flag | None:
    radii = np.asarray(covalent_radii)[numbers]
    i, j, _, distances = pairs_within(positions, cell, pbc, 2 * MIN_CONTACT * radii.max())
    if not len(distances):
        return None
    ratio = distances / (radii[i] + radii[j])
    worst = int(ratio.argmin())
    if ratio[worst] >= MIN_CONTACT:
        return None
    a, b = (chemical_symbols[numbers[k[worst]]] + str(k[worst]) for k in (i, j))
    text = f"{a} and {b} end {distances[worst]:.2f} Å apart"
    return Flag("atoms too close", text, True)


def _rise(path: RelaxationTrajectory) -> Flag | None:
    above = (path.energies - np.minimum.accumulate(path.energies)) / path.n_atoms
    frame = int(above.argmax())
    if above[frame] <= MAX_RISE:
        return None
    text = f"frame {frame} lies {1e3 * above[frame]:.1f} meV/atom above an earlier one"
    return Flag("energy rises", text)


def _forces(path: RelaxationTrajectory) -> Flag | None:
    first, last = path.fmax[0], path.fmax[-1]
    if last < first or last <= AT_REST:
        return None
    return Flag("forces do not fall", f"fmax goes from {first:.3f} to {last:.3f} eV/Å")


def surroundings(positions, cell, pbc, config: Config) -> dict[str, float]:
    """Numbers of neighbours per atom, averaged over the atoms of a structure.

    Args:
      positions: (N, 3) Å.
      cell: (3, 3) Å.
      pbc: (3,) bool.
      config: configuration whose cutoffs, with their skins, are the ranges.

    Returns:
      "density": neighbours within the range of pairs; "coordination": within the range of triplets.
    """
    graph = config.graph
    _, _, _, lengths = pairs_within(positions, cell, pbc, graph.cutoff + graph.skin)
    near = lengths < graph.triplet_cutoff + config.triplet_skin
    return {
        "density": len(lengths) / len(positions),
        "coordination": int(near.sum()) / len(positions),
    }


def _vacuum(path: RelaxationTrajectory) -> Iterator[Flag]:
    """A flag if the cell has relaxed along directions that contain vacuum."""
    if not path.variable_cell:
        return
    inverse, found = np.linalg.pinv(path.cells[0]), []
    for k in np.flatnonzero(path.pbc):
        height = 1.0 / np.linalg.norm(inverse[:, k])
        places = np.sort((path.positions[0] @ inverse)[:, k] % 1.0)
        gap = height * np.diff(places, append=places[0] + 1.0).max()
        now = 1.0 / np.linalg.norm(np.linalg.pinv(path.cells[-1])[:, k])
        if gap > VACUUM and abs(now - height) > CELL_TOLERANCE:
            found.append(f"{'abc'[k]} ({gap:.1f} Å of vacuum)")
    if found:
        yield Flag(
            "vacuum strained",
            f"the cell relaxed along {', '.join(found)}: keep the cell (relax_cell=False, --keep-cell), or "
            "make that direction non-periodic",
        )


def _surroundings(path: RelaxationTrajectory, model: RelaxNet) -> Iterator[Flag]:
    """Flags for a density or coordination outside the range of the first frames of the training data.

    Models without that range, trained before these flags existed, get none.
    """
    known = json.loads(model.statistics).get("surroundings")
    if not known:
        return
    ends = [surroundings(path.positions[k], path.cells[k], path.pbc, model.config) for k in (0, -1)]
    for name, (low, high) in known.items():
        for where, found in zip(("first", "last"), ends):
            if not (1 - MARGIN) * low <= found[name] <= (1 + MARGIN) * high:
                text = (
                    f"{found[name]:.1f} neighbours per atom in the {where} frame, "
                    "outside the training range "
                )
                yield Flag(name, f"{text}{low:.1f} to {high:.1f}")
                break
