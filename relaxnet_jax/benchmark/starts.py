"""Where an oracle's relaxation may begin: at the initial structure, or where another method leads."""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from relaxnet_jax.benchmark.cases import Case
from relaxnet_jax.data.generation.calculators import Calculator
from relaxnet_jax.errors import InputError
from relaxnet_jax.relaxation.refine import descend

if TYPE_CHECKING:
    from ase import Atoms

    from relaxnet_jax.graph import Structure
    from relaxnet_jax.model import RelaxNet
    from relaxnet_jax.structure_files import Predicted


class Start(NamedTuple):
    """The start of one relaxation.

    Attributes:
      atoms: the structure, with the constraints of the initial one; None if there is no usable start.
      seconds: time it took to find the start.
      remark: why there is no start, or a caveat about it; else empty.
    """

    atoms: Atoms | None
    seconds: float
    remark: str = ""


class Kind(NamedTuple):
    """A kind of start.

    Attributes:
      key: its name in files.
      label: its name in tables.
      identity: what its result depends on.
      find: finds the starts of structures, in their order.
      one_by_one: whether finding a start takes so long that it waits for the structure's turn.
    """

    key: str
    label: str
    identity: str
    find: Callable[[Sequence[Case]], list[Start]]
    one_by_one: bool = False


INITIAL = Kind(
    "initial", "initial structure", "", lambda cases: [Start(c.atoms.copy(), 0.0) for c in cases]
)


def shaken_start(noise: float) -> Kind:
    """The initial structure with Gaussian noise on its atoms (standard deviation in Å).

    It shows what any nearby start achieves by chance, however it was found.
    """

    def find(cases: Sequence[Case]) -> list[Start]:
        starts = []
        for case in cases:
            rng = np.random.default_rng(zlib.crc32(case.name.encode()))
            atoms = case.atoms.copy()  # set_positions respects constraints
            atoms.set_positions(atoms.positions + rng.normal(0.0, noise, (len(atoms), 3)))
            starts.append(Start(atoms, 0.0))
        return starts

    return Kind("shaken", f"initial structure, shaken by {noise:g} Å", f"{noise}", find)


def predicted_start(models: Mapping[str, RelaxNet], identity: str) -> Kind:
    """The end of the path that a model, or the mean of a committee, predicts."""
    from relaxnet_jax.committee import predict_members
    from relaxnet_jax.structure_files import Options

    first = next(iter(models.values()))
    frames = max(first.config.dynamics.frames, 2)

    def find(cases: Sequence[Case]) -> list[Start]:
        begin = time.perf_counter()
        found: dict[str, Predicted | str] = {}
        for relax_cell in (False, True):
            own = [(c.name, c.atoms) for c in cases if c.relax_cell == relax_cell]
            results, failed = predict_members(models, own, frames, options=Options(relax_cell))
            found |= {r.path.id: r for r in results} | {f.name: f.reason for f in failed}
        seconds = (time.perf_counter() - begin) / max(len(cases), 1)
        return [_end(case, found[case.name], seconds) for case in cases]

    return Kind("model", "RelaxNet", identity, find)


def minimised_start(model: RelaxNet, identity: str, fmax: float, steps: int) -> Kind:
    """The end of a model's own L-BFGS relaxation. Raises InputError if the model is not a potential."""
    from relaxnet_jax.lbfgs import minimise
    from relaxnet_jax.predict import as_trajectory, minimised_path
    from relaxnet_jax.structure_files import Predicted
    from relaxnet_jax.trust import NOT_CONVERGED, Flag, trust_flags

    if not model.config.is_potential:
        minimise(model, [])  # raises the InputError

    def predict(usable: Sequence[tuple[str, Structure]]) -> list[Predicted | str]:
        found: list[Predicted | str] = []
        for (name, structure), m in zip(
            usable, minimise(model, [s for _, s in usable], fmax, steps).paths
        ):
            if m.failure:
                found.append(m.failure)
                continue
            solved = minimised_path(m, np.linspace(0.0, 1.0, max(m.steps + 1, 2)))
            path = as_trajectory(name, structure, solved)
            flags = trust_flags(path, model, solved.skin)
            if not m.converged:
                text = f"its own relaxation, after {m.steps} steps"
                flags = (*flags, Flag(NOT_CONVERGED, text))
            found.append(Predicted(path, flags))
        return found

    name = "EGNN" if model.config.model.architecture == "egnn" else "MLIP"
    kind = f"{identity} {fmax} {steps}"
    return Kind("egnn", f"{name} + LBFGS", kind, lambda cases: _with_model(model, cases, predict))


def relaxed_start(calculator: Calculator, fmax: float, steps: int) -> Kind:
    """The end of an LBFGS relaxation with another calculator."""

    def find(cases: Sequence[Case]) -> list[Start]:
        starts = []
        for case in cases:
            begin, atoms = time.perf_counter(), case.atoms.copy()
            try:
                leg = descend(atoms, calculator, fmax, steps, case.relax_cell)
            except InputError as error:
                starts.append(Start(None, time.perf_counter() - begin, str(error)))
                continue
            remark = "" if leg.converged else f"not converged after {leg.steps} steps"
            atoms.calc = None
            starts.append(Start(atoms, leg.seconds, remark))
        return starts

    identity = f"{calculator.version} {fmax} {steps}"
    name = "CHGNet" if calculator.label == "chgnet" else calculator.label
    return Kind(calculator.label, f"{name} + LBFGS", identity, find, True)


def model_identity(folders: Sequence[Path]) -> str:
    """A hash of the parameters and configurations in model folders."""
    digest = hashlib.sha256()
    for folder in folders:
        for name in ("config.json", "parameters.npz"):
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def _with_model(
    model: RelaxNet,
    cases: Sequence[Case],
    predict: Callable[[Sequence[tuple[str, Structure]]], list[Predicted | str]],
) -> list[Start]:
    """The ends of predicted paths; ``seconds`` is the mean over all, compilation included."""
    begin = time.perf_counter()
    starts: dict[str, Start] = {}
    usable: list[tuple[str, Structure]] = []
    for case in cases:
        try:
            usable.append((case.name, model.structure(case.atoms, case.name, case.relax_cell)))
        except InputError as error:
            starts[case.name] = Start(None, 0.0, str(error).removeprefix(f"{case.name}: "))
    results = predict(usable)
    seconds = (time.perf_counter() - begin) / max(len(usable), 1)
    by_name = {case.name: case for case in cases}
    for (name, _), result in zip(usable, results):
        starts[name] = _end(by_name[name], result, seconds)
    return [starts[case.name] for case in cases]


def _end(case: Case, result: Predicted | str, seconds: float) -> Start:
    """The start at the end of a predicted path; none if it is unusable or failed for the reason given."""
    from relaxnet_jax.constraints import move_to_end
    from relaxnet_jax.trust import unusable

    if isinstance(result, str):
        return Start(None, seconds, result)
    said = "; ".join(f"{flag.name}: {flag.detail}" for flag in result.flags)
    if unusable(result.flags):
        return Start(None, seconds, said)
    atoms = case.atoms.copy()
    move_to_end(atoms, result.path)
    return Start(atoms, seconds, said)
