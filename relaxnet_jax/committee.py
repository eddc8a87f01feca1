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


AT_ONE = 1e-3  # Å; where symmetry holds atoms, members differ by rounding


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


@overload
def relax_committee(
    models: Sequence[RelaxNet], atoms: Atoms, n_frames: int = 5, relax_cell: bool = True
) -> CommitteePath: ...
@overload
def relax_committee(
    models: Sequence[RelaxNet], atoms: Sequence[Atoms], n_frames: int = 5, relax_cell: bool = True
) -> list[CommitteePath]: ...


def relax_committee(models, atoms, n_frames=5, relax_cell=True):
    """The mean of what the members predict (see `relax`), and how far they disagree.

    A member that cannot take a structure, or whose prediction is unusable, does not count, and a
    flag names it.

    Args:
      models: two or more, e.g. from `load_committee`.
      atoms: ASE Atoms, or a sequence of them, which are predicted in batches.
      n_frames, relax_cell: see `relax`.

    Returns:
      A `CommitteePath` (a list of them for a sequence). A warning names every structure of which no
      member's prediction should be used.

    Raises:
      InputError: as `check_members` and `relax_by`.
    """
    check_members(models)
    judged = relax_by(models, atoms, n_frames, relax_cell)
    for found, reason in judged:
        if reason:
            text = f"{found.path.id}: not to be used, {reason}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
    paths = [found for found, _ in judged]
    return paths[0] if hasattr(atoms, "numbers") else paths


def relax_by(
    models: Sequence[RelaxNet], atoms: Atoms | Sequence[Atoms], n_frames: int, relax_cell: bool
) -> list[tuple[CommitteePath, str]]:
    """What one model or several predict of each structure, and why it should not be used; empty where
    it may.

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
    # A path that is not finite is the first member's, whose failure says more than the flag.
    failure = every[0].failure if flags[0].name == "not finite" else ""
    return found, failure or f"{flags[0].name}: {flags[0].detail}"


def check_members(models: Sequence[RelaxNet]) -> None:
    """Raises InputError unless there are two models or more, of one kind, and no two the same."""
    if len(models) < 2:
        raise InputError(f"a committee has at least 2 members, {len(models)} given")
    for field in ("latent", "cell"):
        kinds = {getattr(model.config.dynamics, field) for model in models}
        if len(kinds) > 1:
            raise InputError(
                f"a committee's members must be of one kind, their dynamics.{field} is "
                f"{' and '.join(sorted(kinds))}: what they predict cannot be averaged"
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
    """The mean of paths of one structure, frame by frame.

    Deformations of the cell and reference positions (`relaxnet_jax.strain`) are averaged, so that
    atoms go along with the mean cell; energies, forces and stresses are the means of the members',
    each of which is at its own member's frame.
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
    moved = internal_displacements(path.positions, path.cells)[~path.fixed_mask]
    size = float(np.sqrt((moved**2).sum(-1).mean())) if len(moved) else 0.0
    if not found.positions > max(size, AT_ONE):
        return None
    text = f"about the final positions by {found.positions:.3f} Å, which move by {size:.3f} Å"
    return Flag("members disagree", text)


class Said(NamedTuple):
    """What the members say of one structure.

    Attributes:
      found: predictions by member, unusable ones included. lost: why others have none, by member.
    """

    found: dict[str, Judged]
    lost: dict[str, str]


def join(said: Said, members: Mapping[str, RelaxNet]) -> Predicted:
    """What the members predict of one structure as one prediction: `mean_path` of those that are
    usable, its flags by the first of these, who of them did not converge, and the `spread`. Without a
    usable one, the first."""
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
    # Whether a pair was missed has been judged member by member; the mean has no neighbour list.
    flags = trust_flags(path, members[next(iter(usable))], None) + _late(usable)
    return Predicted(path, flags + ((apart,) if apart else ()) + gap, value)


def _late(usable: Mapping[str, Judged]) -> tuple[Flag, ...]:
    """A flag that names the members whose minimisation ended before fmax: only they know."""
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
    """What one model or a committee predicts, in the order given, and complaints about what no
    member can take or predict.

    Args:
      members: by name. structures: by distinct names.
      progress: called with the number of structures done, by all members.
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
    """What every member says of each structure."""
    from relaxnet_jax.predict import judge

    said = {name: Said({}, {}) for name, _ in structures}
    known: dict[Any, tuple[list[tuple[str, Structure]], list[Failure]]] = {}
    for count, (member, model) in enumerate(members.items()):
        # Members see the same neighbours as a rule, and outrun the same skins.
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
