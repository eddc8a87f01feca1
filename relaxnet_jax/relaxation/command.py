"""``relaxnet-jax relax``, from the parsed arguments to the exit code."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relaxnet_jax.config import PRETRAINED
from relaxnet_jax.console import COMPILING, bar, note, result_console, say
from relaxnet_jax.errors import InputError
from relaxnet_jax.model_folders import checksum
from relaxnet_jax.relaxation import inputs as reading
from relaxnet_jax.relaxation import outputs as writing
from relaxnet_jax.relaxation import summary
from relaxnet_jax.relaxation.existing import Existing, existing
from relaxnet_jax.relaxation.inputs import Hold, Input
from relaxnet_jax.relaxation.outputs import Target
from relaxnet_jax.runtime import enable_compilation_cache, share_cores
from relaxnet_jax.structure_files import (
    Failure,
    Options,
    Predicted,
    sorted_out,
    write_trajectories,
)

if TYPE_CHECKING:
    from ase import Atoms

    from relaxnet_jax.data.generation.calculators import Calculator
    from relaxnet_jax.model import RelaxNet
    from relaxnet_jax.relaxation.refine import Refined

SOME_FAILED = 1
PAUSE = 60.0  # s, between two writes of refined structures
CHUNK = 200  # structures predicted and written together; an interruption loses at most one chunk


def relax(args: argparse.Namespace, load_members: Callable[[str], dict[str, RelaxNet]]) -> int:
    """Predicts relaxations, refines them if asked to, writes the results and reports on them.

    Args:
      args: the parsed arguments; see ``relaxnet-jax relax --help``.
      load_members: returns the models that a name given as ``--model`` stands for, by their names.

    Returns:
      The exit code: `SOME_FAILED` if anything failed, else 0.

    Raises:
      InputError: the arguments are wrong, or no structure could be relaxed.
    """
    begin = time.perf_counter()
    args.model = args.model or [PRETRAINED]  # argparse would append to a default
    _check(args)
    out, failures = Path(args.out), _Failures()
    hold = Hold(reading.parse_indices(args.fixed) if args.fixed else (), args.fix_below)
    files, missing = reading.find_files(args.files, out, note)
    failures.add(missing)
    found, unreadable = reading.read_inputs(files, hold)
    failures.add(unreadable)
    if not found and not args.json:
        raise _nothing(failures)
    if args.html and len(found) > 1:
        raise InputError(f"--html {args.html}: shows one structure, {len(found)} were given")
    html = Path(args.html) if args.html else None
    by = summary.Models(", ".join(args.model), checksum(args.model))
    names = {one.place: one.name for one in found}
    told = _Told(summary.Summary(out), names, args.refine, by, failures)
    found, targets, before = _planned(found, args, by, failures)
    if not found and not args.json:
        if before.names:
            return SOME_FAILED if failures.all else 0
        raise _nothing(failures)
    writing.check_free([html], args.overwrite)
    calculator = _calculator(args.refine)
    enable_compilation_cache()
    share_cores()
    from relaxnet_jax.committee import check_members

    named = [item for folder in args.model for item in load_members(folder).items()]
    if len(named) > 1:
        check_members([model for _, model in named])
    models = dict(named)
    if calculator is not None and _cells_relax(models, found, args):
        calculator = _calculator(args.refine, relax_cell=True)
    by_name = dict(zip((i.name for i in found), targets))
    results = _Results(by_name, before.frames, html, failures, told)
    done = _relaxed(found, results, models, args, failures)
    if calculator is not None:
        _refine(results, calculator, args, failures)
    records = [one.record for one in done if one.written]
    total = time.perf_counter() - begin
    if args.json:
        say(_json(records, failures.all, args, total, list(models), len(before.names)))
    if not records and not before.names:
        raise _nothing(failures)
    if records and not args.json:
        _print(records, failures, args, total, out, html)
    return SOME_FAILED if failures.all else 0


def _planned(
    found: Sequence[Input], args: argparse.Namespace, by: summary.Models, failures: _Failures
) -> tuple[list[Input], list[Target], Existing]:
    """The inputs left to relax, their output files, and the results that ``--skip-existing`` found.

    Raises:
      InputError: an output file exists, holds results of another structure or model, or cannot be
        read or written.
    """
    out = Path(args.out)
    targets = writing.plan(found, out, args.format, args.plot)
    unfit = [writing.without_cell(t, i.atoms) for t, i in zip(targets, found)]
    failures.add([Failure(i.place, reason) for i, reason in zip(found, unfit) if reason])
    left = [(i, t) for i, t, reason in zip(found, targets, unfit) if not reason]
    before = Existing(set(), {})
    if args.skip_existing:
        before = existing(left, summary.read(out), by, args.refine)
    left = [(one, target) for one, target in left if one.name not in before.names]
    if before.names:
        note(f"{len(before.names)} inputs skipped: their results are in {out} (--skip-existing)")
    taken = [file for _, t in left for file in (t.relaxed, t.path, t.figure)]
    writing.check_free(list(dict.fromkeys(taken)), args.overwrite or args.skip_existing)
    return [one for one, _ in left], [target for _, target in left], before


def _relaxed(
    found: Sequence[Input],
    results: _Results,
    models: Mapping[str, RelaxNet],
    args: argparse.Namespace,
    failures: _Failures,
) -> list[_Done]:
    """Predicts and writes chunks of `CHUNK` inputs; returns the structures with a usable prediction."""
    options = Options(not args.keep_cell, args.fmax, args.steps, args.batch_size)
    done: list[_Done] = []
    with bar("structures", len(found), COMPILING) as advance:
        for first in range(0, len(found), CHUNK):
            part = found[first : first + CHUNK]

            def progress(count: int, first: int = first) -> None:
                advance(first + count)

            predicted, seconds = _predict(models, part, args.frames, options, failures, progress)
            chunk = [_Done(one, result, args.fmax, seconds) for one, result in predicted]
            results.write(chunk)
            done += chunk
    return done


def _nothing(failures: _Failures) -> InputError:
    count = len(failures.all)
    return InputError(f"relax: nothing could be relaxed; {count} failed, the reasons are above")


def _check(args: argparse.Namespace) -> None:
    if args.frames < 2:
        raise InputError(f"--frames {args.frames}: give at least 2, the first and the last")
    if not args.fmax > 0:
        raise InputError(f"--fmax {args.fmax}: give a positive force in eV/Å")
    if args.batch_size is not None and args.batch_size < 1:
        raise InputError(f"--batch-size {args.batch_size}: give at least 1")
    if args.steps < 1:
        raise InputError(f"--steps {args.steps}: give at least 1")
    if args.compare and args.refine is None:
        raise InputError("--compare: compares refinements; give --refine NAME too")
    if args.skip_existing and args.overwrite:
        raise InputError("--skip-existing, --overwrite: give only one of them")
    if Path(args.out).is_file():
        raise InputError(f"--out {args.out}: is a file; give a folder")


def _cells_relax(
    models: Mapping[str, RelaxNet], found: Sequence[Input], args: argparse.Namespace
) -> bool:
    """Whether the cell of any input may relax."""
    variable = any(model.config.dynamics.cell == "variable" for model in models.values())
    return variable and not args.keep_cell and any(one.atoms.pbc.any() for one in found)


def _calculator(name: str | None, relax_cell: bool = False) -> Calculator | None:
    if name is None:
        return None
    from relaxnet_jax.relaxation import refine

    return refine.load(name, relax_cell)


class _Failures:
    """The failures so far, each reported on stderr as it occurs."""

    def __init__(self) -> None:
        self.all: list[Failure] = []

    def add(self, more: Sequence[Failure]) -> None:
        for failure in more:
            self.all.append(failure)
            note(f"failed: {failure}")


class _Done:
    """The results for one structure: its prediction and, later, its refinement."""

    def __init__(self, one: Input, result: Predicted, fmax: float, seconds: float) -> None:
        self.input, self.result, self.fmax, self.seconds = one, result, fmax, seconds
        self.refined: Refined | None = None
        self.files: dict[str, str] = {}
        self.written = False

    @property
    def record(self) -> dict[str, Any]:
        """What is reported about the structure: `report.record`, with its input and output files."""
        from relaxnet_jax.relaxation.report import record

        values = record(self.result, self.fmax, self.seconds, self.refined)
        return values | {"input": self.input.place} | self.files

    def atoms(self) -> Atoms:
        """The relaxed structure as it is written."""
        result = self.result
        return writing.relaxed_atoms(self.input, result.path, result.flags, self.refined)


def _predict(
    models: Mapping[str, RelaxNet],
    found: Sequence[Input],
    frames: int,
    options: Options,
    failures: _Failures,
    progress: Callable[[int], None],
) -> tuple[list[tuple[Input, Predicted]], float]:
    """The inputs with a usable prediction, paired with it, and the prediction time per structure (s).

    Args:
      models: the models by name; if there are several, the prediction is their mean.
      progress: called with the number of structures done.
    """
    from relaxnet_jax.committee import predict_members

    by_place = {one.place: one for one in found}
    named = [(i.place, i.atoms) for i in found]
    begin = time.perf_counter()
    results, failed = predict_members(models, named, frames, progress, options)
    seconds = (time.perf_counter() - begin) / max(len(results), 1)
    failures.add(failed)
    results, useless = sorted_out(results)
    failures.add(useless)
    kept = []
    for result in results:
        one = by_place[result.path.id]
        path = dataclasses.replace(result.path, id=one.name)
        kept.append((one, result._replace(path=path)))
    return kept, seconds


class _Told:
    """Keeps the summary in the output folder up to date."""

    def __init__(
        self,
        file: summary.Summary,
        names: Mapping[str, str],
        refine: str | None,
        by: summary.Models,
        failures: _Failures,
    ) -> None:
        """Writes nothing yet.

        Args:
          file: the summary.
          names: names of the inputs, keyed by what messages call them (`Input.place`).
          refine: name of the calculator that refines; None for no refinement.
          by: the models that predict.
          failures: all failures so far; later ones are added to it.
        """
        self.file, self.names, self.failures = file, names, failures
        self.refine, self.by = refine, by
        self.count = 0  # failures that are in the summary already

    def tell(self, members: Sequence[_Done]) -> None:
        """Adds these structures and all new failures; a summary that cannot be written stops nothing."""
        news = {f.name: f.reason for f in self.failures.all[self.count :]}
        self.count = len(self.failures.all)
        rows = []
        for one in members:
            if one.written:
                reason = news.pop(one.input.place, "")
                rows.append(summary.row(one.record, self.refine, reason, self.by))
        rows += [
            summary.failed(self.names.get(place, ""), place, reason)
            for place, reason in news.items()
        ]
        try:
            self.file.add(rows)
        except InputError as error:
            note(str(error))


class _Results:
    """The output files, written chunk by chunk.

    Attributes:
      groups: for each file of relaxed structures, its format and the structures in it.
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        before: Mapping[Path, list[Atoms]],
        html: Path | None,
        failures: _Failures,
        told: _Told,
    ) -> None:
        """Writes nothing yet.

        Args:
          targets: output files by the name of the input.
          before: for each file that exists, the frames to keep besides the new ones.
          html: the page with a 3D view, or None.
        """
        self.targets, self.before, self.html, self.failures = targets, before, html, failures
        self.told = told
        self.groups: dict[Path, tuple[str, list[_Done]]] = {}
        self.paths: set[Path] = set()

    def write(self, chunk: Sequence[_Done]) -> None:
        """Writes predictions; a structure with a file that cannot be written becomes a failure."""
        by_file: dict[Path, list[_Done]] = {}
        for one in chunk:
            target = self.targets[one.input.name]
            lost = writing.lost_constraints(one.input.atoms, target.form)
            if lost:
                note(f"{one.input.place}: {target.form} cannot hold {', '.join(lost)}; left out")
            by_file.setdefault(target.relaxed, []).append(one)
            one.files |= {"relaxed_file": str(target.relaxed), "path_file": str(target.path)}
        paths: dict[Path, list[_Done]] = {}
        for file, members in by_file.items():
            if self._tried(members, self._write_relaxed, file):
                for one in members:
                    paths.setdefault(self.targets[one.input.name].path, []).append(one)
        for file, members in paths.items():
            if self._tried(members, self._write_paths, file):
                for one in members:
                    form = self.targets[one.input.name].form
                    self.groups.setdefault(self.file_of(one), (form, []))[1].append(one)
                    one.written = True
                    self._draw(one)
        self.told.tell(chunk)

    def rewrite(self, file: Path) -> None:
        """Rewrites a file of relaxed structures, now with the refined ones. Raises InputError."""
        form, members = self.groups[file]
        images = [*self.before.get(file, ()), *(one.atoms() for one in members)]
        writing.write_relaxed(images, file, form)

    def file_of(self, one: _Done) -> Path:
        """The file that holds its relaxed structure."""
        return self.targets[one.input.name].relaxed

    def _tried(
        self,
        members: Sequence[_Done],
        write: Callable[[Sequence[_Done], Path], None],
        file: Path,
    ) -> bool:
        try:
            write(members, file)
        except InputError as error:
            self.failures.add([Failure(one.input.place, str(error)) for one in members])
            return False
        return True

    def _write_relaxed(self, members: Sequence[_Done], file: Path) -> None:
        images = [one.atoms() for one in members]
        form = self.targets[members[0].input.name].form
        if file in self.groups:
            writing.write_relaxed(images, file, form, append=True)
        else:
            writing.write_relaxed([*self.before.get(file, ()), *images], file, form)

    def _write_paths(self, members: Sequence[_Done], file: Path) -> None:
        found, known = [one.result.path for one in members], file in self.paths
        write_trajectories(found, file, known, () if known else self.before.get(file, ()))
        self.paths.add(file)

    def _draw(self, one: _Done) -> None:
        figure = self.targets[one.input.name].figure
        if figure is not None:
            from relaxnet_jax.evaluate.path_figure import path_figure

            path_figure(one.result.path, figure, one.fmax)
            one.files["figure_file"] = str(figure)
        if self.html is not None:
            from relaxnet_jax.evaluate.viewer import write_viewer

            write_viewer(one.result.path, self.html, one.result.flags)
            one.files["html_file"] = str(self.html)


def _refine(
    results: _Results,
    calculator: Calculator,
    args: argparse.Namespace,
    failures: _Failures,
) -> None:
    """Refines the predictions.

    Results are written every `PAUSE` seconds, at the end, and if the loop is interrupted.
    """
    fresh: list[_Done] = []
    saved = time.monotonic()

    def save() -> None:
        for file in dict.fromkeys(results.file_of(one) for one in fresh if one.refined):
            results.rewrite(file)
        results.told.tell(fresh)
        fresh.clear()

    waiting = [one for _, members in results.groups.values() for one in members]
    with bar("refined", len(waiting)) as advance:
        try:
            for count, one in enumerate(waiting, 1):
                _refine_one(one, calculator, args, failures)
                fresh.append(one)
                advance(count)
                if time.monotonic() - saved > PAUSE:
                    save()
                    saved = time.monotonic()
        finally:
            save()


def _refine_one(
    one: _Done, calculator: Calculator, args: argparse.Namespace, failures: _Failures
) -> None:
    from relaxnet_jax.constraints import move_to_end
    from relaxnet_jax.relaxation.refine import refine

    start = one.input.atoms.copy()
    move_to_end(start, one.result.path)
    try:
        one.refined = refine(
            one.input.atoms, start, calculator, args.fmax, args.steps, args.compare
        )
    except InputError as error:
        failures.add([Failure(one.input.place, str(error))])
    else:
        if one.refined.failure:
            note(f"{one.input.place}: --refine: {one.refined.failure}")


def _json(
    records: list[dict[str, Any]],
    failures: Sequence[Failure],
    args: argparse.Namespace,
    seconds: float,
    members: Sequence[str],
    skipped: int,
) -> str:
    from relaxnet_jax.relaxation.minima import WRONG_MINIMUM, WRONG_MINIMUM_WHOLE
    from relaxnet_jax.relaxation.report import UNITS

    document = {
        "models": members,
        "fmax": args.fmax,
        "refine": args.refine,
        "compare": args.compare,
        "wrong_minimum_per_atom": WRONG_MINIMUM,
        "wrong_minimum_whole": WRONG_MINIMUM_WHOLE,
        "units": UNITS,
        "seconds": seconds,
        "structures": records,
        "skipped": skipped,
        "failed": [{"input": f.name, "reason": f.reason} for f in failures],
    }
    return json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False)


def _print(
    records: list[dict[str, Any]],
    failures: _Failures,
    args: argparse.Namespace,
    seconds: float,
    out: Path,
    html: Path | None,
) -> None:
    from relaxnet_jax.relaxation.report import flag_lines, tables, totals

    console = result_console()
    for table in tables(records, args.fmax, args.refine, console.width, args.compare):
        console.print(table)
    for line in flag_lines(records):
        note(line)
    for line in totals(records, len(failures.all), seconds, args.refine is not None, args.compare):
        say(line)
    kinds = ("relaxed_file", "path_file", "figure_file")
    files = {r[kind] for r in records for kind in kinds if kind in r}
    files.add(str(out / summary.NAME))
    say(f"{out}: {len(files)} files" + (f"; {html}" if html else ""))
