"""Data sets made by relaxing structures: work in pieces, and one store in the end."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import threadpoolctl

from relaxnet_jax.data.ase_io import SkippedRelaxation
from relaxnet_jax.data.files import remove_leftovers
from relaxnet_jax.data.generation.calculators import (
    Calculator,
    check_calculator,
    load_calculator,
)
from relaxnet_jax.data.generation.elements import family_formula
from relaxnet_jax.data.generation.parents import Parent, Parents, read_parents, sift
from relaxnet_jax.data.generation.relaxing import relax
from relaxnet_jax.data.generation.settings import GENERATOR_VERSION, Settings
from relaxnet_jax.data.generation.start import MIN_CONTACT, draw_start
from relaxnet_jax.data.parts import PartResult, run_parts
from relaxnet_jax.data.store import TrajectoryStore
from relaxnet_jax.data.store_write import SUFFIXES, write_store
from relaxnet_jax.data.trajectory import UNCONVERGED, RelaxationTrajectory, reduced_formula
from relaxnet_jax.errors import InputError
from relaxnet_jax.runtime import usable_cores

if TYPE_CHECKING:
    from ase import Atoms

# Relaxations in a part: what a kill loses at most. Not dependent on the number of jobs, so that
# parts made with one number serve with another.
CHUNK = 8
SHOWN = 20  # refused structures named one by one; prototypes come by the thousand
_ORDER = 0x6F726465  # keeps the draws of the parents' order apart from all others
_ATTEMPT = ", attempt "
MISSING = "missing"  # in a store's metadata: relaxations whose process failed


class Chunk(NamedTuple):
    """Relaxations made in one go: ``indices`` of the data set, with the parent of each, and the
    ``version`` of the calculator."""

    settings: Settings
    version: str
    indices: tuple[int, ...]
    parents: tuple[Parent, ...]


@dataclasses.dataclass(frozen=True)
class GenerationReport:
    """What became of a data set.

    Attributes:
      made: number of relaxations in the store. frames: of their ionic steps.
      unconverged: number of those made that are not converged.
      failed: number of failed attempts by kind of failure.
      lost: (id, reason) of each relaxation left out as all its attempts failed.
      broken: (indices, reason) of the parts whose process failed; the same call tries them again.
      refused: (name, reason) of each structure that could not be used.
    """

    made: int
    frames: int
    unconverged: int
    failed: dict[str, int]
    lost: list[tuple[str, str]]
    broken: list[tuple[str, str]]
    refused: list[tuple[str, str]]


def generate_set(
    structures: Sequence[str],
    n: int,
    out: str | os.PathLike[str],
    settings: Settings,
    *,
    jobs: int | None = 1,
    scheduler: str | None = None,
    progress: Callable[[int], None] | None = None,
    report: Callable[[str], None] | None = None,
) -> GenerationReport:
    """Makes ``n`` relaxations and puts them into a store.

    They are made in parts that lie in the folder "OUT.parts" until the store is complete: after
    an interruption the same call goes on where it was. The store has the same bytes whatever
    the number of jobs and the interruptions.

    Args:
      structures: files ASE reads, and "prototypes" (see `parents.read_parents`).
      n: number of relaxations; one all of whose attempts fail is left out.
      out: the store to write, ending in .h5; an existing one is replaced (the command refuses that
        without --overwrite, see `standing`).
      settings: how each is made.
      jobs: processes that work at once, None for as many as there are usable cores.
      scheduler: address of a Dask scheduler instead.
      progress: called with the number of relaxations done.
      report: called with a line for each of the first structures refused.

    Raises:
      InputError: a setting, the calculator or a file is wrong, no structure is usable, or no
        relaxation came of them.
    """
    jobs = usable_cores() if jobs is None else jobs
    if jobs < 1:
        raise InputError(f"--jobs {jobs}: give 1 or more processes")
    target = Path(out)
    if target.suffix not in SUFFIXES:
        raise InputError(f"{target}: unknown suffix {target.suffix!r}: end the store in .h5")
    plan = _plan(structures, n, settings, report)
    folder = target.with_name(f"{target.name}.parts")
    if folder.exists():
        remove_leftovers(target)
    results = run_parts(
        plan.chunks,
        make_chunk,
        folder,
        key=chunk_key,
        jobs=jobs,
        scheduler=scheduler,
        progress=None if progress is None else lambda done, _: progress(min(n, done * CHUNK)),
    )
    tally = _Tally(plan.chunks)

    def facts() -> dict[str, Any]:
        broken = [indices for indices, _ in tally.broken]
        made = _facts(structures, n, settings, plan.calculator)
        return made | ({MISSING: broken} if broken else {})

    try:
        write_store(target, tally.through(results), metadata=facts)
        if not tally.broken:
            _remove(folder)
    except _NothingMadeError as error:
        # Failures that a repaired calculator would not repeat must not be found again.
        _remove(folder)
        raise InputError(
            f"{target}: not one of {n} relaxations succeeded ({error}): change the settings, the "
            "structures or the calculator"
        ) from None
    return tally.report(plan.parents)


def standing(
    out: str | os.PathLike[str], structures: Sequence[str], n: int, settings: Settings
) -> Literal["absent", "unfinished", "complete", "other"]:
    """What `generate_set` with these arguments would find in the place of its store.

    Returns:
      "complete": the store it would make, by its metadata and by what its relaxations start from;
      "unfinished": the same, but without some relaxations whose process failed; "other": anything else.

    Raises:
      InputError: as `generate_set`, of its arguments.
    """
    if not Path(out).exists():
        return "absent"
    plan = _plan(structures, n, settings)
    expected = json.loads(json.dumps(_facts(structures, n, settings, plan.calculator)))
    try:
        with TrajectoryStore(out) as store:
            found = store.metadata
            missing = found.pop(MISSING, None)
            relaxations = (store[i] for i in range(len(store)))
            if found != expected or not plan.began(relaxations, settings):
                return "other"
    except InputError:
        return "other"
    return "complete" if missing is None else "unfinished"


class _Plan(NamedTuple):
    """All that is to be made, and of what."""

    calculator: Calculator
    parents: Parents
    chunks: list[Chunk]

    def began(self, relaxations: Iterable[RelaxationTrajectory], settings: Settings) -> bool:
        """Whether each of the relaxations is of this plan, by its name, its calculator and its start."""
        planned = {
            relaxation_id(self.calculator, settings, index, parent): (index, parent)
            for chunk in self.chunks
            for index, parent in zip(chunk.indices, chunk.parents)
        }

        def starts(index: int, parent: Parent) -> Iterator[Atoms]:
            for attempt in range(settings.attempts):
                start = attempt_start(settings, self.calculator, index, parent, attempt)
                if start is not None:
                    yield start

        return all(
            t.id in planned
            and t.family == self.calculator.source
            and any(
                np.array_equal(start.numbers, t.atomic_numbers)
                and np.allclose(start.positions, t.positions[0], atol=1e-6)
                and np.allclose(start.cell.array, t.cells[0], atol=1e-6)
                for start in starts(*planned[t.id])
            )
            for t in relaxations
        )


def _plan(
    structures: Sequence[str],
    n: int,
    settings: Settings,
    report: Callable[[str], None] | None = None,
) -> _Plan:
    """The plan of `generate_set`, which has the arguments and what is raised."""
    settings.check()
    if n < 1:
        raise InputError(f"--n {n}: give 1 or more relaxations")
    calculator = check_calculator(settings.calculator, settings.relax_cell)
    parents = sift(read_parents(structures), settings, calculator.elements)
    if report is not None:
        for name, reason in parents.refused[:SHOWN]:
            report(f"refused {name}: {reason}")
        if len(parents.refused) > SHOWN:
            report(f"refused {len(parents.refused) - SHOWN} others as well")
    if not parents.usable:
        name, reason = parents.refused[0]
        raise InputError(
            f"{', '.join(structures)}: none of {len(parents.refused)} structures can be used "
            f"({name}: {reason}): give others"
        )
    chunks = _chunks(parents.usable, n, settings, calculator.version)
    return _Plan(calculator, parents, chunks)


def _facts(
    structures: Sequence[str], n: int, settings: Settings, calculator: Calculator
) -> dict[str, Any]:
    """The store's metadata."""
    facts: dict[str, Any] = {"generator": "relaxations", "version": GENERATOR_VERSION, "n": n}
    facts |= {"structures": [Path(s).name for s in structures], **dataclasses.asdict(settings)}
    if ":" in settings.calculator:  # the user's own, whose source does not tell the version
        facts |= {"calculator_version": calculator.version}
    return facts


class _NothingMadeError(Exception):
    """No relaxation succeeded; the message is the first reason."""


def _remove(folder: Path) -> None:
    """Deletes the parts, and the folder if nothing else is in it."""
    for part in folder.glob("part-*"):
        part.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


class _Tally:
    """Counts what goes by on its way into the store."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self.chunks = chunks
        self.made = self.frames = self.unconverged = 0
        self.failed: collections.Counter[str] = collections.Counter()
        self.lost: list[tuple[str, str]] = []
        self.broken: list[tuple[str, str]] = []

    def through(self, results: Iterable[PartResult]) -> Iterator[RelaxationTrajectory]:
        """The relaxations; _NothingMadeError if there are none."""
        for result in results:
            if result.error:
                indices = self.chunks[result.number].indices
                self.broken.append((f"{indices[0]} to {indices[-1]}", result.error))
            for item in result.items():
                if isinstance(item, RelaxationTrajectory):
                    self.made += 1
                    self.frames += item.n_frames
                    self.unconverged += item.source.endswith(UNCONVERGED)
                    yield item
                elif isinstance(item, SkippedRelaxation) and _ATTEMPT in item.id:
                    self.failed[item.reason.partition(":")[0]] += 1
                elif isinstance(item, SkippedRelaxation):
                    self.lost.append((item.id, item.reason))
        if not self.made:
            name, reason = (self.broken + self.lost)[0]
            raise _NothingMadeError(f"{name}: {reason}")

    def report(self, parents: Parents) -> GenerationReport:
        return GenerationReport(
            self.made,
            self.frames,
            self.unconverged,
            dict(self.failed.most_common()),
            self.lost,
            self.broken,
            parents.refused,
        )


def _chunks(parents: Sequence[Parent], n: int, settings: Settings, version: str) -> list[Chunk]:
    """All work, in order; each round of as many relaxations as parents takes every one once."""
    rounds = -(-n // len(parents))
    order = [
        int(k)
        for r in range(rounds)
        for k in np.random.default_rng((settings.seed, r, _ORDER)).permutation(len(parents))
    ]
    return [
        Chunk(settings, version, tuple(ks), tuple(parents[order[k]] for k in ks))
        for ks in (range(start, min(n, start + CHUNK)) for start in range(0, n, CHUNK))
    ]


def chunk_key(chunk: Chunk) -> str:
    """A hash of all that the chunk's relaxations depend on."""
    digest = hashlib.sha256()
    text = [GENERATOR_VERSION, chunk.version, dataclasses.asdict(chunk.settings), chunk.indices]
    digest.update(json.dumps(text, sort_keys=True).encode())
    for name, atoms, group in chunk.parents:
        digest.update(json.dumps([name, group, len(atoms), repr(atoms.constraints)]).encode())
        for key in sorted(atoms.arrays):
            digest.update(np.ascontiguousarray(atoms.arrays[key]).tobytes())
        digest.update(atoms.cell.array.tobytes() + atoms.pbc.tobytes())
    return digest.hexdigest()


def make_chunk(chunk: Chunk) -> Iterator[RelaxationTrajectory | SkippedRelaxation]:
    """The chunk's relaxations in order, between them its failed attempts.

    A failed attempt is called "ID, attempt K" and its reason begins with a kind and a colon; a
    relaxation that is left out as all of them failed goes by its own id.
    """
    try:
        calculator = load_calculator(chunk.settings.calculator)
    except InputError as error:
        # It did load where the work began; a part keeps an InputError, but this may be mended.
        raise RuntimeError(str(error)) from error
    # Threads for matrices of 3 x 3 cost many times what they gain, and how many there are may
    # change how sums round.
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        for index, parent in zip(chunk.indices, chunk.parents, strict=True):
            yield from make_relaxation(chunk.settings, calculator, index, parent)


def make_relaxation(
    settings: Settings, calculator: Calculator, index: int, parent: Parent
) -> Iterator[RelaxationTrajectory | SkippedRelaxation]:
    """Relaxation ``index`` of the data set, after its failed attempts."""
    name = relaxation_id(calculator, settings, index, parent)
    reason = ""
    for attempt in range(settings.attempts):
        start = attempt_start(settings, calculator, index, parent, attempt)
        if start is None:
            made: RelaxationTrajectory | str = (
                f"no start: atoms closer than {MIN_CONTACT} of their covalent radii"
            )
        else:
            try:
                ase_calculator = calculator.make()
            except Exception as error:  # the user's own code
                made = f"calculator failed: {type(error).__name__}: {error}"
            else:
                group = group_label(parent, settings, start.numbers)
                made = relax(start, ase_calculator, settings, name, group, calculator.source)
        if isinstance(made, RelaxationTrajectory):
            yield made
            return
        reason = made
        yield SkippedRelaxation(f"{name}{_ATTEMPT}{attempt}", reason)
    yield SkippedRelaxation(name, f"{settings.attempts} attempts failed, the last: {reason}")


def relaxation_id(calculator: Calculator, settings: Settings, index: int, parent: Parent) -> str:
    """The name of relaxation ``index``."""
    return f"{calculator.label}-{settings.seed}-{index:05d}-{parent.name}"


def attempt_start(
    settings: Settings, calculator: Calculator, index: int, parent: Parent, attempt: int
) -> Atoms | None:
    """What an attempt at relaxation ``index`` starts from; None where no start was found."""
    rng = np.random.default_rng((settings.seed, index, attempt))
    return draw_start(parent.atoms, settings, calculator.elements, rng)


def group_label(parent: Parent, settings: Settings, numbers: np.ndarray) -> str:
    """The group of a relaxation.

    That of the parent, or else, as materials made from two parents may be the same, the formula
    that all of them share (see `elements.family_formula`).

    Args:
      parent: of the relaxation. settings: of the data set.
      numbers: (N,) atomic numbers of the relaxation's own structure.
    """
    if settings.group_by == "formula":
        return reduced_formula(numbers)
    if parent.group:
        return parent.group
    if settings.substitute:
        return family_formula(parent.atoms.numbers, settings.f_elements)
    return reduced_formula(parent.atoms.numbers)
