"""An error estimate for each structure: how far models of one committee disagree.

The members are trained alike from different seeds (``--set train.seed=…``). What they have in
common, the errors of the data and of the architecture among it, does not show in their spread:
``relaxnet-jax eval --committee`` measures how much of the true error it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from relaxnet_jax.data.trajectory import CELL_TOLERANCE, RelaxationTrajectory
from relaxnet_jax.errors import InputError
from relaxnet_jax.strain import deformations
from relaxnet_jax.structure_files import DEFAULT, Options, predict_all, usable_structures
from relaxnet_jax.trust import Flag

if TYPE_CHECKING:
    from ase import Atoms

    from relaxnet_jax.model import RelaxNet
    from relaxnet_jax.structure_files import Predicted


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
      path: the first member's. spread: of all. paths: each member's.
    """

    path: RelaxationTrajectory
    spread: Spread
    paths: tuple[RelaxationTrajectory, ...]


def relax_committee(
    models: Sequence[RelaxNet],
    atoms: Atoms,
    n_frames: int = 5,
    relax_cell: bool = True,
) -> CommitteePath:
    """`relax` by every member, and how far they disagree.

    Args:
      models: two or more, the one to be believed first.
      atoms, n_frames, relax_cell: see `relax`.

    Raises:
      InputError: fewer than two models, or as `predict.relax`.
    """
    from relaxnet_jax.predict import relax

    check_members(models)
    paths = tuple(relax(model, atoms, n_frames, relax_cell=relax_cell) for model in models)
    return CommitteePath(paths[0], spread(paths), paths)


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


def spread(paths: Sequence[RelaxationTrajectory]) -> Spread:
    """Of the final frames of paths of one structure; NaN where a path is."""
    first = paths[0]
    energies = np.array([p.energies[-1] for p in paths]) / first.n_atoms
    initial = first.cells[0]
    relaxes = any(np.abs(p.cells[-1] - initial).max() > CELL_TOLERANCE for p in paths)
    positions, volume = np.stack([p.positions[-1] for p in paths]), None
    if relaxes:
        steps = [deformations(p.cells[[0, -1]])[1] for p in paths]
        positions = np.stack([p.positions[-1] @ np.linalg.inv(d).T for p, d in zip(paths, steps)])
        volumes = np.array([np.linalg.det(d) for d in steps])
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


def add_spreads(
    results: Sequence[Predicted],
    others: Mapping[str, RelaxNet],
    structures: Mapping[str, Atoms],
    first: RelaxNet,
    progress: Callable[[int], None] = lambda _: None,
    options: Options = DEFAULT,
) -> list[Predicted]:
    """Predictions of the first member, with the spread of all and what it flags.

    Where another member has no usable path there is no spread, and a flag says why.

    Args:
      others: the other members by name. structures: by the ids of the results' paths.
      options: with which the results were predicted.
    """
    from relaxnet_jax.trust import unusable

    if not results:
        return []
    frames = results[0].path.n_frames
    paths: dict[str, list[RelaxationTrajectory]] = {r.path.id: [r.path] for r in results}
    lost: dict[str, str] = {}
    for count, (name, model) in enumerate(others.items(), 1):
        named = [(r.path.id, structures[r.path.id]) for r in results]
        usable, unfit = usable_structures(model, named, lambda _: None, options)
        found, failed = predict_all(
            _alike(model, first), usable, frames, lambda _: None, lambda _: None, options
        )
        lost |= {f.name: f"{name}: {f.reason}" for f in (*unfit, *failed)}
        for result in found:
            if unusable(result.flags):
                grave = result.flags[0]
                lost[result.path.id] = f"{name}: {grave.name}: {grave.detail}"
            paths[result.path.id].append(result.path)
        progress(count)
    done = []
    for result in results:
        key = result.path.id
        if key in lost:
            flag = Flag("no spread", f"a member has no usable path, {lost[key]}")
            done.append(result._replace(flags=(*result.flags, flag)))
            continue
        value = spread(paths[key])
        more = disagreement(result.path, value)
        flags = result.flags if more is None else (*result.flags, more)
        done.append(result._replace(flags=flags, spread=value))
    return done


def _alike(model: RelaxNet, first: RelaxNet) -> RelaxNet:
    """The model with the first one's facts where only those of training differ, so that one
    compiled program serves both."""
    ours, theirs = model.config, first.config
    if (ours.graph, ours.model, ours.dynamics) != (theirs.graph, theirs.model, theirs.dynamics):
        return model
    return dataclasses.replace(
        model, config=theirs, elements=first.elements, statistics=first.statistics
    )
