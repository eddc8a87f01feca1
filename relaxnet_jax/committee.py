"""Committees: the mean of the paths of several models, and how far the models disagree.

The members are trained alike from different seeds (``--set train.seed=…``). Their mean is closer
to the truth than the members are on average. Errors that the members share, among them those of
the data and of the architecture, do not show in their spread: ``relaxnet-jax eval --committee``
measures how much of the true error the spread accounts for.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from relaxnet_jax.data.trajectory import CELL_TOLERANCE, RelaxationTrajectory
from relaxnet_jax.errors import InputError
from relaxnet_jax.strain import (
    deformations,
    from_reference,
    internal_displacements,
    mean_deformed,
    to_reference,
)
from relaxnet_jax.structure_files import (
    DEFAULT,
    Failure,
    Options,
    Predicted,
    no_numbers,
    usable_structures,
)
from relaxnet_jax.trust import NOT_CONVERGED, Flag, constraint_flags, trust_flags, unusable

if TYPE_CHECKING:
    from ase import Atoms

    from relaxnet_jax.graph import Structure
    from relaxnet_jax.model import RelaxNet
    from relaxnet_jax.predict import Judged


AT_ONE = 1e-3  # Å; where symmetry holds the atoms in place, members differ by rounding only


class Spread(NamedTuple):
    """Standard deviations (n - 1) of the members' predictions of the final frame.

    Attributes:
      members: number of members.
      energy_per_atom: eV/atom.
      positions: Å, root mean square over the free atoms of each atom's deviation (a vector);
        where the cell relaxes, the deviation of its internal displacement.
      largest: Å, the deviation of the atom about which the members disagree most.
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
      path: mean of the members' paths (`mean_path`).
      flags: warnings about the mean path (see `trust.trust_flags`).
      spread: disagreement of the members; None where only one has a usable path.
      paths: the path of each member.
    """

    path: RelaxationTrajectory
    flags: tuple[Flag, ...]
    spread: Spread | None
    paths: tuple[RelaxationTrajectory, ...]


@overload
def relax_committee(
    models: Sequence[RelaxNet], atoms: Atoms, n_frames: int = 5, relax_cell: bool = True
) -> CommitteePath: ...
@overload
def relax_committee(
    models: Sequence[RelaxNet], atoms: Sequence[Atoms], n_frames: int = 5, relax_cell: bool = True
) -> list[CommitteePath]: ...


def relax_committee(models, atoms, n_frames=5, relax_cell=True):
    """Predicts the mean of the members' relaxations (see `relax`), and how far they disagree.

    Members that cannot take a structure, or whose prediction is unusable, are left out of the
    mean and named by a flag.

    Args:
      models: two or more, e.g. from `load_committee`.
      atoms: ASE Atoms, or a sequence of them, which are predicted in batches.
      n_frames, relax_cell: see `relax`.

    Returns:
      A `CommitteePath` (a list of them for a sequence). A warning names every structure whose
      prediction should not be used.

    Raises:
      InputError: fewer than two models, models of different kinds or one given twice;
        n_frames < 2, or a structure that no member can take.
    """
    check_members(models)
    judged = relax_by(models, atoms, n_frames, relax_cell)
    for found, reason in judged:
        if reason:
            text = f"{found.path.id}: the prediction is unusable, {reason}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
    paths = [found for found, _ in judged]
    return paths[0] if hasattr(atoms, "numbers") else paths


def relax_by(
    models: Sequence[RelaxNet], atoms: Atoms | Sequence[Atoms], n_frames: int, relax_cell: bool
) -> list[tuple[CommitteePath, str]]:
    """Predictions of one or several models for each structure, and why they should not be used.

    Returns:
      For each structure, the prediction and the reason against using it, empty if there is none.

    Raises:
      InputError: n_frames < 2, or a structure that no member can take.
    """
    from relaxnet_jax.model import atoms_list

    if n_frames < 2:
        raise InputError(
            f"n_frames={n_frames}: a path has at least 2 frames, the first and the last"
        )
    many = atoms_list(atoms)
    names = [str(a.info.get("traj_id") or a.get_chemical_formula()) for a in many]
    if len(set(names)) < len(names):
        names = [f"{place}-{name}" for place, name in enumerate(names)]
    members = {f"models[{k}]": model for k, model in enumerate(models)}
    options = Options(relax_cell)
    asked = _ask(members, list(zip(names, many)), n_frames, lambda _: None, options)
    for name, said in zip(names, asked):
        if not said.found:
            raise InputError(f"{name}: {next(iter(said.lost.values()))}")
    return [_judged(said, members, one) for said, one in zip(asked, many)]


def _judged(said: Said, members: Mapping[str, RelaxNet], atoms: Atoms) -> tuple[CommitteePath, str]:
    path, flags, apart = join(said, members)
    flags = _gravest_first(flags + constraint_flags(atoms, path))
    every = tuple(said.found.values())
    found = CommitteePath(path, flags, apart, tuple(one.path for one in every))
    if not unusable(flags):
        return found, ""
    # A path that is not finite is that of the first member, whose failure is more specific than the flag.
    failure = every[0].failure if flags[0].name == "not finite" else ""
    return found, failure or f"{flags[0].name}: {flags[0].detail}"


def check_members(models: Sequence[RelaxNet]) -> None:
    """Raises InputError unless there are at least two models, all of one kind and no two the same."""
    if len(models) < 2:
        raise InputError(f"a committee needs at least 2 members, {len(models)} given")
    for field in ("latent", "cell"):
        kinds = {getattr(model.config.dynamics, field) for model in models}
        if len(kinds) > 1:
            raise InputError(
                f"a committee's members must be of one kind, but their dynamics.{field} is "
                f"{' and '.join(sorted(kinds))}: their predictions cannot be averaged"
            )
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
    """The mean of several paths of one structure, frame by frame.

    Cells and positions are averaged as deformations and reference positions
    (`relaxnet_jax.strain`), so that the atoms follow the mean cell. Energies, forces and stresses
    are averages of the members' values, each evaluated at its own member's frame.
    """
    first = paths[0]
    own = [p.positions for p in paths]
    positions, steps = mean_deformed(own, [deformations(p.cells) for p in paths])
    stresses = [p.stresses for p in paths if p.stresses is not None]
    return dataclasses.replace(
        first,
        positions=_kept(positions, own),
        cells=_kept(from_reference(first.cells[0], steps), [p.cells for p in paths]),
        energies=np.mean([p.energies for p in paths], axis=0),
        forces=np.mean([p.forces for p in paths], axis=0),
        stresses=np.mean(stresses, axis=0) if len(stresses) == len(paths) else None,
    )


def _kept(mean: np.ndarray, members: Sequence[np.ndarray]) -> np.ndarray:
    """The mean, but exactly the members' value where they agree, so that what is fixed stays fixed."""
    return np.where(np.all([m == members[0] for m in members], axis=0), members[0], mean)


def spread(paths: Sequence[RelaxationTrajectory]) -> Spread:
    """`Spread` of the final frames of several paths of one structure; NaN where a path is NaN."""
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
    """Standard deviation (n - 1) of each free atom's position over the members, Å.

    Args:
      positions: (members, N, 3) Å. Rigid translations do not count as disagreement where no atom
        is fixed.
      fixed_mask: (N,) bool.
    """
    if not fixed_mask.any():
        positions = positions - positions.mean(axis=1, keepdims=True)
    away = (positions - positions.mean(axis=0))[:, ~fixed_mask]
    return np.sqrt((away**2).sum(axis=(0, 2)) / (len(positions) - 1))


def disagreement(path: RelaxationTrajectory, found: Spread) -> Flag | None:
    """Flags a path whose atoms move by less than the members disagree; None otherwise.

    By its own error estimate, such a prediction is no better than doing nothing.
    """
    moved = internal_displacements(path.positions, path.cells)[~path.fixed_mask]
    size = float(np.sqrt((moved**2).sum(-1).mean())) if len(moved) else 0.0
    if not found.positions > max(size, AT_ONE):
        return None
    text = f"on the final positions by {found.positions:.3f} Å, while atoms move by {size:.3f} Å"
    return Flag("members disagree", text)


class Said(NamedTuple):
    """Predictions of the members for one structure.

    Attributes:
      found: predictions by member, unusable ones included.
      lost: reasons why the other members have none, by member.
    """

    found: dict[str, Judged]
    lost: dict[str, str]


def join(said: Said, members: Mapping[str, RelaxNet]) -> Predicted:
    """Joins the members' predictions of one structure into one.

    Returns:
      The `mean_path` of the usable predictions, with their `spread` and with the flags of the mean
      path as judged by the first usable member, followed by flags for members that did not
      converge, that disagree or that were lost. If no prediction is usable, the first one.
    """
    lost, usable = dict(said.lost), {}
    for member, one in said.found.items():
        grave = next((flag for flag in one.flags if flag.unusable), None)
        if grave is None:
            usable[member] = one
        else:
            lost[member] = one.failure or f"{grave.name}: {grave.detail}"
    if not usable:
        first = next(iter(said.found.values()))
        return Predicted(first.path, first.flags)
    named = "; ".join(f"{member}: {lost[member]}" for member in members if member in lost)
    gap = (Flag("member lost", f"no usable prediction of {named}"),) if lost else ()
    first, *others = usable.values()
    if not others:
        return Predicted(first.path, (*first.flags, *gap))
    paths = [one.path for one in usable.values()]
    path, value = mean_path(paths), spread(paths)
    apart = disagreement(path, value)
    # Missed pairs have been checked for each member; the mean has no neighbour list.
    flags = trust_flags(path, members[next(iter(usable))], None) + _late(usable)
    return Predicted(path, flags + ((apart,) if apart else ()) + gap, value)


def _late(usable: Mapping[str, Judged]) -> tuple[Flag, ...]:
    """A flag that names the members whose minimisation ended above fmax, as the mean path cannot tell."""
    text = "; ".join(
        f"{member}: {flag.detail}"
        for member, one in usable.items()
        for flag in one.flags
        if flag.name == NOT_CONVERGED
    )
    return (Flag(NOT_CONVERGED, text),) if text else ()


def predict_members(
    members: Mapping[str, RelaxNet],
    structures: Sequence[tuple[str, Atoms]],
    frames: int,
    progress: Callable[[int], None] = lambda _: None,
    options: Options = DEFAULT,
) -> tuple[list[Predicted], list[Failure]]:
    """Predictions of one model or a committee, in the order of the structures, and failures.

    Args:
      members: models by name.
      structures: name and atoms of each; the names are distinct.
      frames: number of frames of each path.
      progress: called with the number of structures done, averaged over the members.
      options: how structures are predicted.

    Returns:
      The predictions, and a failure for each structure that no member can take or predict.
    """
    done, bad = [], []
    asked = _ask(members, structures, frames, progress, options)
    for (name, atoms), said in zip(structures, asked):
        reasons = [no_numbers(one) for one in said.found.values()]
        if all(reasons):
            bad.append(Failure(name, [*reasons, *said.lost.values()][0]))
        else:
            one = join(said, members)
            flags = _gravest_first(one.flags + constraint_flags(atoms, one.path))
            done.append(one._replace(flags=flags))
    return done, bad


def _gravest_first(flags: tuple[Flag, ...]) -> tuple[Flag, ...]:
    return tuple(sorted(flags, key=lambda flag: not flag.unusable))


def _ask(
    members: Mapping[str, RelaxNet],
    structures: Sequence[tuple[str, Atoms]],
    frames: int,
    progress: Callable[[int], None],
    options: Options,
) -> list[Said]:
    """Predictions of every member for each structure."""
    from relaxnet_jax.predict import judge

    said = {name: Said({}, {}) for name, _ in structures}
    known: dict[Any, tuple[list[tuple[str, Structure]], list[Failure]]] = {}
    for count, (member, model) in enumerate(members.items()):
        # Members usually have the same neighbour lists, and their atoms exceed the same skins.
        alike = model.config.graph, model.config.dynamics.cell, model.config.model, model.elements
        if alike not in known:
            known[alike] = usable_structures(model, structures, lambda _: None, options)
        usable, unfit = known[alike]

        def advance(done: int, count: int = count) -> None:
            progress((count * len(structures) + done) // len(members))

        names = ("fmax", "steps", "batch_size")
        solver = {"progress": advance} | {name: getattr(options, name) for name in names}
        judged = judge(model, usable, frames, **solver) if usable else []
        for one in judged:
            said[one.path.id].found[member] = one._replace(listed=None)
        listed = [(name, one.listed or first) for (name, first), one in zip(usable, judged)]
        known[alike] = listed, unfit
        for failure in unfit:
            said[failure.name].lost[member] = failure.reason
    return list(said.values())
