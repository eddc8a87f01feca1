"""Finds relaxations that make no physical sense, each with id, frame and numbers.

The reasons for a finding are (see `Limits` for the bounds):

- ``energy``: a final energy far from the composition energies of its source (see `composition`), or
  a positive energy, since no code places a structure above its separated atoms.
- ``energy-change``: energies of one relaxation that are too far apart.
- ``force``: a force on a free atom above the bound.
- ``shifted``: energies that contradict the forces as they are, but agree with them if all are moved
  by one frame: labels of the neighbouring frame.
- ``outlier``: the energy of one frame contradicts the forces, while those before and after agree.
- ``discontinuity``: the energy change of one step contradicts the forces, those around it do not:
  another spin state, basis or setting from there on.
- ``work``: steps that contradict the forces in no such pattern.
- ``order``: the last frame is higher in energy than an earlier one; ``rising``: higher than the first.
- ``jump``: an atom crosses much of the cell in one step (see `work.cell_jumps`).
- ``charge``: an atomic charge far from the median of its element.
- ``unconverged``: the last fmax is above the bound.

A step contradicts the forces if |dE + W| > 2 meV/atom + (|W0| + |W1|)/4, where W0 and W1 are the work
along it by the forces at either end, and W is their mean (see `work.step_works`). Correctly labelled
frames in a wrong order still agree with their forces; only ``order`` and ``rising`` can reveal them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from relaxnet_jax.data.quality.charges import Charges
from relaxnet_jax.data.quality.composition import Compositions
from relaxnet_jax.data.quality.reasons import REASONS, chosen
from relaxnet_jax.data.quality.work import cell_jumps, step_works
from relaxnet_jax.data.shards import is_sharded, write_shards
from relaxnet_jax.data.store import TrajectoryStore
from relaxnet_jax.data.store_write import write_store
from relaxnet_jax.data.trajectory import RelaxationTrajectory
from relaxnet_jax.errors import InputError

# eV/atom, and fraction of the works; these flag about 1 % of real DFT relaxations.
WORK_TOLERANCE = 2e-3
WORK_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds beyond which a relaxation is reported.

    Attributes:
      max_force: eV/Å, force on any free atom in any frame.
      max_energy_change: eV/atom, energy of any frame relative to the first.
      converged: eV/Å, largest force on a free atom in the last frame.
      rise: eV/atom, last energy relative to the first or the lowest.
      energy_deviations: distance from the composition energies in robust standard deviations.
      positive_energy: eV/atom, highest energy.
      charge_deviations: distance from the element's median charge in robust standard deviations.
      min_charge_deviation: e, least value of the bound on this distance.
    """

    max_force: float = 50.0
    max_energy_change: float = 2.0
    converged: float = 0.1
    rise: float = 2e-3
    energy_deviations: float = 10.0
    positive_energy: float = 10.0
    charge_deviations: float = 10.0
    min_charge_deviation: float = 0.5

    def __post_init__(self) -> None:
        """Raises InputError unless all are positive numbers."""
        for name, value in dataclasses.asdict(self).items():
            if not value > 0 or not np.isfinite(value):
                raise InputError(f"--{name.replace('_', '-')} {value}: give a number above 0")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One problem of one relaxation.

    Attributes:
      reason: one of REASONS.
      id: id of the relaxation.
      frame: number of the frame, from 0; None if the relaxation as a whole is concerned.
      atom: number of the atom, from 0; None if no single atom is concerned.
      value, bound: the value found and the bound it exceeds, in ``unit``.
      unit: unit of both.
      text: the same in words.
    """

    reason: str
    id: str
    frame: int | None
    atom: int | None
    value: float
    bound: float
    unit: str
    text: str


@dataclasses.dataclass(frozen=True)
class QualityReport:
    """What a check of a store found.

    Attributes:
      n: number of relaxations.
      findings: all findings, by relaxation in the order of the store.
      energy_unjudged: number of relaxations without composition energies, because their source holds
        too few relaxations with their elements.
      work_unjudged: number of relaxations with a variable cell but without stresses.
      steps: number of steps compared with the forces.
      steps_inconsistent: number of steps that contradict them.
    """

    n: int
    findings: list[Finding]
    energy_unjudged: int
    work_unjudged: int
    steps: int
    steps_inconsistent: int

    def counts(self) -> dict[str, int]:
        """Number of relaxations with a finding, for each of REASONS."""
        found = Counter(reason for reason, _ in {(f.reason, f.id) for f in self.findings})
        return {reason: found[reason] for reason in REASONS}

    def ids(self, reasons: Collection[str] = REASONS) -> set[str]:
        """Ids of the relaxations with a finding for one of the reasons."""
        return {f.id for f in self.findings if f.reason in reasons}

    def to_dict(self) -> dict[str, Any]:
        """The report ready for JSON: energies in eV/atom or eV, forces eV/Å, lengths Å, charges e."""
        return dataclasses.asdict(self) | {"counts": self.counts(), "flagged": len(self.ids())}


def check_relaxation(trajectory: RelaxationTrajectory, limits: Limits) -> list[Finding]:
    """Finds all problems that show in one relaxation alone.

    These are all reasons but charges, and energies relative to those of the same source.
    """
    return [*_check_labels(trajectory, limits), *_check_steps(trajectory)[0]]


def check_store(
    store: TrajectoryStore, limits: Limits, advance: Callable[[int], None] = lambda _: None
) -> QualityReport:
    """Checks all relaxations, reading one at a time (twice if it has charges).

    Args:
      store: the open store.
      limits: the bounds.
      advance: called with the number of relaxations checked.
    """
    found: dict[int, list[Finding]] = {}
    n_frames = store.n_frames
    compositions, charges = Compositions(len(store)), Charges()
    unjudged = steps = inconsistent = 0
    for i in range(len(store)):
        trajectory = store[i]
        of_steps, n_steps, n_bad = _check_steps(trajectory)
        findings = [*_check_labels(trajectory, limits), *of_steps]
        if findings:
            found[i] = findings
        unjudged += n_steps < trajectory.n_frames - 1
        steps, inconsistent = steps + n_steps, inconsistent + n_bad
        compositions.add(
            i, trajectory.atomic_numbers, float(trajectory.energies[-1]), trajectory.family
        )
        if trajectory.charges is not None:
            charges.add(i, trajectory.atomic_numbers, trajectory.charges)
        advance(i + 1)
    residuals, scales = compositions.deviations()
    far = np.abs(residuals) > limits.energy_deviations * scales
    for i in np.flatnonzero(far).tolist():
        if not any(f.reason == "energy" for f in found.get(i, [])):
            value, bound = float(residuals[i]), float(limits.energy_deviations * scales[i])
            text = f"{value:+.4g} eV/atom from the composition energies of its source"
            last = int(n_frames[i]) - 1
            one = Finding("energy", store[i].id, last, None, value, bound, "eV/atom", text)
            found.setdefault(i, []).insert(0, one)
    for i in charges.rows:
        found.setdefault(i, []).extend(_check_charges(store[i], charges, limits))
    return QualityReport(
        n=len(store),
        findings=[finding for i in sorted(found) for finding in found[i]],
        energy_unjudged=int(np.isnan(residuals).sum()),
        work_unjudged=unjudged,
        steps=steps,
        steps_inconsistent=inconsistent,
    )


def write_clean(
    store: TrajectoryStore, report: QualityReport, reasons: Collection[str], out: str | Path
) -> tuple[int, int]:
    """Writes the relaxations without a finding for any of ``reasons``.

    The metadata of the new store state how many were dropped, and why.

    Args:
      out: a store, ending in .h5, or without suffix a folder of shards (see `write_shards`); an
        existing one is replaced (the command refuses that without --overwrite).

    Returns:
      The numbers of relaxations written and dropped.

    Raises:
      InputError: a reason is unknown; ``out`` is one of the store's own files or their folder, or
        cannot be written; or nothing would be left.
    """
    reasons, out = chosen(list(reasons)), Path(out)
    read = [path.resolve() for path in store.paths]
    if out.resolve() in (*read, *(path.parent for path in read if out.is_dir())):
        raise InputError(f"{out}: is also read: choose another output path")
    dropped = report.ids(reasons)
    if len(dropped) == len(store):
        raise InputError(f"{out}: every relaxation would be dropped: drop fewer reasons")

    def kept() -> Iterator[RelaxationTrajectory]:
        for i in range(len(store)):
            trajectory = store[i]
            if trajectory.id not in dropped:
                yield trajectory

    counts = {reason: n for reason, n in report.counts().items() if n and reason in reasons}
    metadata = store.metadata | {"dropped": {"relaxations": len(dropped), "reasons": counts}}
    # The position of the first file in its set does not apply to the new store.
    metadata.pop("shard", None)
    write = write_shards if is_sharded(out) else write_store
    return write(out, kept(), metadata=metadata), len(dropped)


def _check_labels(t: RelaxationTrajectory, limits: Limits) -> list[Finding]:
    """Findings from energies, forces and positions, without comparing them with each other."""
    found = []

    def add(reason, frame, value, bound, unit, text, atom=None):
        found.append(Finding(reason, t.id, frame, atom, float(value), float(bound), unit, text))

    e = t.energies / t.n_atoms
    top = int(e.argmax())
    if e[top] > limits.positive_energy:
        text = f"energy {e[top]:+.4g} eV/atom: positive, too high for a bound structure"
        add("energy", top, e[top], limits.positive_energy, "eV/atom", text)
    far = int(np.abs(e - e[0]).argmax())
    if abs(e[far] - e[0]) > limits.max_energy_change:
        text = f"energy {e[far] - e[0]:+.4g} eV/atom from the first frame"
        add("energy-change", far, e[far] - e[0], limits.max_energy_change, "eV/atom", text)
    norms = np.where(t.fixed_mask, 0.0, np.linalg.norm(t.forces, axis=-1))
    frame, atom = (int(k) for k in np.unravel_index(norms.argmax(), norms.shape))
    if norms[frame, atom] > limits.max_force:
        text = f"force {norms[frame, atom]:.4g} eV/Å on atom {atom}"
        add("force", frame, norms[frame, atom], limits.max_force, "eV/Å", text, atom)
    low = int(e.argmin())
    if e[-1] - e[0] > limits.rise:
        text = f"last energy {1e3 * (e[-1] - e[0]):.4g} meV/atom above the first"
        add("rising", t.n_frames - 1, e[-1] - e[0], limits.rise, "eV/atom", text)
    elif e[-1] - e[low] > limits.rise:
        text = f"last energy {1e3 * (e[-1] - e[low]):.4g} meV/atom above that of frame {low}"
        add("order", t.n_frames - 1, e[-1] - e[low], limits.rise, "eV/atom", text)
    for frame, atom, length, bound in cell_jumps(t):
        text = f"atom {atom} moves {length:.4g} Å in one step"
        add("jump", frame, length, bound, "Å", text, atom)
    last = float(norms[-1].max())
    if last > limits.converged:
        text = f"last fmax {last:.4g} eV/Å"
        add("unconverged", t.n_frames - 1, last, limits.converged, "eV/Å", text)
    return found


def _check_steps(t: RelaxationTrajectory) -> tuple[list[Finding], int, int]:
    """Findings from energy changes and the work of forces; numbers of steps compared and bad."""
    works = step_works(t)
    if works is None:
        return [], 0, 0
    change, work = np.diff(t.energies), works.mean(axis=0)
    tolerance = t.n_atoms * WORK_TOLERANCE + WORK_SHARE * np.abs(works).sum(axis=0)
    residual = change + work
    bad = np.abs(residual) > tolerance
    steps = np.flatnonzero(bad)

    def finding(reason: str, k: int, frame: int, text: str) -> Finding:
        value, bound = float(residual[k]) / t.n_atoms, float(tolerance[k]) / t.n_atoms
        return Finding(reason, t.id, frame, None, value, bound, "eV/atom", text)

    if len(steps) > 1:
        for by, place in ((1, "next"), (-1, "previous")):
            at = np.arange(max(0, -by), len(change) - max(0, by))
            moved = np.abs(change[at + by] + work[at]) > tolerance[at]
            if len(at) > 2 and not moved.any() and bad[at].any():
                k = int(np.abs(residual).argmax())
                text = f"{len(steps)} steps contradict the forces; energies of the {place} frame"
                return [finding("shifted", k, k + 1, text + " agree")], len(bad), len(steps)
    found, done = [], -1
    for k in steps.tolist():
        if k <= done:
            continue
        by_forces = -work[k] / t.n_atoms
        numbers = f"energy {change[k] / t.n_atoms:+.4g} eV/atom, the forces give {by_forces:+.4g}"
        together = residual[k] + residual[k + 1] if k + 1 < len(bad) else np.inf
        if k + 1 < len(bad) and bad[k + 1] and abs(together) <= tolerance[k] + tolerance[k + 1]:
            found.append(finding("outlier", k, k + 1, f"{numbers}, undone by the next step"))
            done = k + 1
        elif len(steps) == 1 and len(bad) > 2:
            found.append(finding("discontinuity", k, k + 1, f"{numbers}, all other steps agree"))
        else:
            found.append(finding("work", k, k + 1, numbers))
    return found, len(bad), len(steps)


def _check_charges(t: RelaxationTrajectory, charges: Charges, limits: Limits) -> list[Finding]:
    """Finding for the atom whose charge is furthest beyond its bound, if there is one."""
    assert t.charges is not None
    medians, spreads = charges.centres(t.atomic_numbers)
    bounds = np.maximum(limits.charge_deviations * spreads, limits.min_charge_deviation)
    away = t.charges - medians
    atom = int((np.abs(away) - bounds).argmax())
    if abs(away[atom]) <= bounds[atom]:
        return []
    text = (
        f"charge {t.charges[atom]:+.3g} e on atom {atom}, its element's median {medians[atom]:+.3g}"
    )
    away, bound = float(away[atom]), float(bounds[atom])
    return [Finding("charge", t.id, None, atom, away, bound, "e", text)]


def report_lines(report: QualityReport, examples: int = 3) -> list[str]:
    """The report as text: counts by reason, and the first few findings of each."""
    counts = report.counts()
    lines = [f"{report.n} relaxations checked, {len(report.ids())} with findings"]
    for reason, count in counts.items():
        if not count:
            continue
        lines.append(f"{reason:14}{count:7d}  {100 * count / report.n:.2g} %")
        shown = [f for f in report.findings if f.reason == reason]
        for f in shown[:examples]:
            where = "" if f.frame is None else f", frame {f.frame}"
            lines.append(f"    {f.id}{where}: {f.text} (bound {f.bound:.3g} {f.unit})")
        if len(shown) > examples:
            lines.append(f"    … {len(shown) - examples} more (--json lists all)")
    clear = [reason for reason, count in counts.items() if not count]
    if clear:
        lines.append(f"none of: {', '.join(clear)}")
    if report.steps:
        lines.append(
            f"{report.steps_inconsistent} of {report.steps} steps contradict the forces; "
            f"{report.work_unjudged} variable-cell relaxations without stresses not compared"
        )
    if report.energy_unjudged:
        lines.append(
            f"{report.energy_unjudged} relaxations have no composition energy to compare with: "
            "too few relaxations of their source and elements"
        )
    return lines
