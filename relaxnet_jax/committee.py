"""Committees: the mean of several models' paths, and how far they disagree.

The members are trained alike from different seeds (``--set train.seed=…``). Their mean is nearer
to the truth than each of them on average. What they have in
common, the errors of the data and of the architecture among it, does not show in their spread:
``relaxnet-jax eval --committee`` measures how much of the true error it is.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from relaxnet_jax.data.trajectory import CELL_TOLERANCE, RelaxationTrajectory
from relaxnet_jax.errors import InputError
from relaxnet_jax.strain import deformations, from_reference, to_reference
from relaxnet_jax.structure_files import (
    DEFAULT,
    Failure,
    Options,
    Predicted,
    predict_all,
    usable_structures,
)
from relaxnet_jax.trust import Flag, trust_flags, unusable

if TYPE_CHECKING:
    from ase import Atoms

    from relaxnet_jax.model import RelaxNet


class Spread(NamedTuple):
    """Standard deviations (n - 1) of what the members say of the final frame.

    Attributes:
      members: how many.
      energy_per_atom: eV/atom.
      positions: Å, root mean square over the free atoms of the deviation of an atom (a vector);
        of the internal displacements where the cell relaxes.
      largest: Å, that of the atom on which they disagree most.
      volume: relative; None where the cell stays.
    """

    members: int
    energy_per_atom: float
    positions: float
    largest: float
    volume: float | None


class CommitteePath(NamedTuple):
    """A relaxation predicted by a committee.

    Attributes:
      path: the mean of the members' (`mean_path`). flags: what speaks against it.
      spread: of the members; None where only one has a usable path.
      paths: each member's.
    """

    path: RelaxationTrajectory
    flags: tuple[Flag, ...]
    spread: Spread | None
    paths: tuple[RelaxationTrajectory, ...]


def relax_committee(
    models: Sequence[RelaxNet],
    atoms: Atoms,
    n_frames: int = 5,
    relax_cell: bool = True,
) -> CommitteePath:
    """The mean of what the members predict (see `relax`), and how far they disagree.

    A member whose prediction is unusable does not count, and a flag names it.

    Args:
      models: two or more, e.g. from `load_committee`.
      atoms, n_frames, relax_cell: see `relax`.

    Raises:
      InputError: fewer than two models, or as `relax`. A warning names a structure of which no
        member's prediction should be used.
    """
    from relaxnet_jax.predict import judge

    check_members(models)
    if n_frames < 2:
        raise InputError(
            f"n_frames={n_frames}: a trajectory has at least 2 frames, the first and the last"
        )
    name = str(atoms.info.get("traj_id") or atoms.get_chemical_formula())
    found = {}
    for k, model in enumerate(models):
        structure = model.structure(atoms, name, relax_cell)
        (one,) = judge(_alike(model, models[0]), [(name, structure)], n_frames)
        found[f"models[{k}]"] = Predicted(one.path, one.flags)
    joined = join(found, {}, models[0])
    if unusable(joined.flags):
        grave = joined.flags[0]
        text = f"{name}: not to be used, {grave.name}: {grave.detail}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    paths = tuple(one.path for one in found.values())
    return CommitteePath(joined.path, joined.flags, joined.spread, paths)


def check_members(models: Sequence[RelaxNet]) -> None:
    """Raises InputError unless there are two models or more, and no two are the same."""
    if len(models) < 2:
        raise InputError(f"a committee has at least 2 members, {len(models)} given")
    for k, model in enumerate(models):
        for other in models[:k]:
            if _same(model, other):
                raise InputError(
                    "a committee's members must differ: the same model is given twice; train "
                    "others with --set train.seed=…"
                )


def _same(one: RelaxNet, other: RelaxNet) -> bool:
    """Whether all parameters are equal."""
    import jax

    a, b = jax.tree.leaves(one.params), jax.tree.leaves(other.params)
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


def mean_path(paths: Sequence[RelaxationTrajectory]) -> RelaxationTrajectory:
    """The mean of paths of one structure, frame by frame.

    Deformations of the cell and reference positions (`relaxnet_jax.strain`) are averaged, so that
    atoms go along with the mean cell; energies, forces and stresses are the means of the members',
    each of which is at its own member's frame.
    """
    first = paths[0]
    steps = np.mean([deformations(p.cells) for p in paths], axis=0)
    reference = np.mean([_references(p) for p in paths], axis=0)
    stresses = [p.stresses for p in paths if p.stresses is not None]
    return dataclasses.replace(
        first,
        positions=_kept(from_reference(reference, steps), [p.positions for p in paths]),
        cells=_kept(from_reference(first.cells[0], steps), [p.cells for p in paths]),
        energies=np.mean([p.energies for p in paths], axis=0),
        forces=np.mean([p.forces for p in paths], axis=0),
        stresses=np.mean(stresses, axis=0) if len(stresses) == len(paths) else None,
    )


def _references(path: RelaxationTrajectory) -> np.ndarray:
    return to_reference(path.positions, deformations(path.cells))


def _kept(mean: np.ndarray, members: Sequence[np.ndarray]) -> np.ndarray:
    """The mean, but exactly the members' value where they agree: what is held stays held."""
    return np.where(np.all([m == members[0] for m in members], axis=0), members[0], mean)


def spread(paths: Sequence[RelaxationTrajectory]) -> Spread:
    """Of the final frames of paths of one structure; NaN where a path is."""
    first = paths[0]
    energies = np.array([p.energies[-1] for p in paths]) / first.n_atoms
    initial = first.cells[0]
    relaxes = any(np.abs(p.cells[-1] - initial).max() > CELL_TOLERANCE for p in paths)
    positions, volume = np.stack([p.positions[-1] for p in paths]), None
    if relaxes:
        steps = np.stack([deformations(p.cells[[0, -1]])[1] for p in paths])
        positions = to_reference(positions, steps)
        volumes = np.linalg.det(steps)
        volume = float(volumes.std(ddof=1) / volumes.mean())
    atoms = deviations(positions, first.fixed_mask)
    return Spread(
        members=len(paths),
        energy_per_atom=float(energies.std(ddof=1)),
        positions=float(np.sqrt(np.mean(atoms**2))) if len(atoms) else 0.0,
        largest=float(atoms.max(initial=0.0)),
        volume=volume,
    )


def deviations(positions: np.ndarray, fixed_mask: np.ndarray) -> np.ndarray:
    """Å, standard deviation (n - 1) of each free atom's position over the members.

    Args:
      positions: (members, N, 3) Å. A rigid translation is no disagreement where no atom is fixed.
      fixed_mask: (N,) bool.
    """
    if not fixed_mask.any():
        positions = positions - positions.mean(axis=1, keepdims=True)
    away = (positions - positions.mean(axis=0))[:, ~fixed_mask]
    return np.sqrt((away**2).sum(axis=(0, 2)) / (len(positions) - 1))


def disagreement(path: RelaxationTrajectory, found: Spread) -> Flag | None:
    """A flag where the members disagree about more than they move atoms: a prediction that by its
    own estimate is no better than doing nothing."""
    free = ~path.fixed_mask
    moved = (path.positions[-1] - path.positions[0])[free]
    size = float(np.sqrt((moved**2).sum(-1).mean())) if len(moved) else 0.0
    if not found.positions > size:
        return None
    text = f"about the final positions by {found.positions:.3f} Å, which move by {size:.3f} Å"
    return Flag("members disagree", text)


def join(found: Mapping[str, Predicted], lost: Mapping[str, str], model: RelaxNet) -> Predicted:
    """What the members predict of one structure as one prediction: `mean_path` of those that are
    usable, its flags, and the `spread`.

    Args:
      found: by member, at least one. lost: why others have no path, by member.
      model: by whose facts the mean is judged.
    """
    graves = {k: p.flags[0] for k, p in found.items() if unusable(p.flags)}
    lost = {**lost, **{k: f"{flag.name}: {flag.detail}" for k, flag in graves.items()}}
    usable = [p for k, p in found.items() if k not in graves]
    if not usable:
        return next(iter(found.values()))
    named = "; ".join(f"{k}: {reason}" for k, reason in lost.items())
    gap = (Flag("member lost", f"no usable prediction of {named}"),) if lost else ()
    if len(usable) == 1:
        return usable[0]._replace(flags=(*usable[0].flags, *gap))
    paths = [p.path for p in usable]
    path, value = mean_path(paths), spread(paths)
    apart = disagreement(path, value)
    # Whether a pair was missed has been judged member by member; the mean has no neighbour list.
    flags = trust_flags(path, model, None) + ((apart,) if apart else ()) + gap
    return Predicted(path, flags, value)


def predict_members(
    members: Mapping[str, RelaxNet],
    structures: Sequence[tuple[str, Atoms]],
    frames: int,
    progress: Callable[[int], None] = lambda _: None,
    options: Options = DEFAULT,
) -> tuple[list[Predicted], list[Failure]]:
    """What one model or a committee predicts, in the order given, and complaints about what no
    member can take.

    Args:
      members: by name. structures: by distinct names.
      progress: called with the number of structures done, by all members.
    """
    first = next(iter(members.values()))
    found: dict[str, dict[str, Predicted]] = {name: {} for name, _ in structures}
    lost: dict[str, dict[str, str]] = {name: {} for name, _ in structures}
    for count, (member, model) in enumerate(members.items()):
        usable, unfit = usable_structures(model, structures, lambda _: None, options)

        def advance(done: int, count: int = count) -> None:
            progress((count * len(structures) + done) // len(members))

        results, failed = predict_all(
            _alike(model, first), usable, frames, advance, lambda _: None, options
        )
        for result in results:
            found[result.path.id][member] = result
        for failure in (*unfit, *failed):
            lost[failure.name][member] = failure.reason
    done = [join(found[name], lost[name], first) for name, _ in structures if found[name]]
    bad = [
        Failure(name, next(iter(lost[name].values()))) for name, _ in structures if not found[name]
    ]
    return done, bad


def _alike(model: RelaxNet, first: RelaxNet) -> RelaxNet:
    """The model with the first one's facts where only those of training differ, so that one
    compiled program serves both."""
    ours, theirs = model.config, first.config
    if (ours.graph, ours.model, ours.dynamics) != (theirs.graph, theirs.model, theirs.dynamics):
        return model
    return dataclasses.replace(
        model, config=theirs, elements=first.elements, statistics=first.statistics
    )
