"""Scores: one number for each structure and seed, their means and the spread of these."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from scipy.stats import t as student

from relaxnet_jax.metrics import Comparison, Predictor, structure_errors

Frames = Literal["final", "all"]


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """One number for each structure (M columns) and seed (S rows); NaN where there is none.

    Attributes:
      ids: names of the columns.
      values: (S, M).
      exact: whether one row is enough, as other seeds would not change it: either no training of
        ours is behind the numbers (doing nothing, an outside potential, a bound), or each column is
        a training of its own (folds).
    """

    ids: tuple[str, ...]
    values: np.ndarray
    exact: bool = False

    @property
    def by_seed(self) -> np.ndarray:
        """(S,) means over the structures that have the number; NaN where none has."""
        return np.array([_mean(row) for row in self.values])

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return _mean(self.by_seed)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds (n - 1); None for fewer than two."""
        found = self.by_seed[np.isfinite(self.by_seed)]
        return float(found.std(ddof=1)) if len(found) > 1 else None

    @property
    def seeds(self) -> int:
        """Number of seeds that have a mean."""
        return int(np.isfinite(self.by_seed).sum())

    @property
    def structures(self) -> int:
        """Number of structures that have the number with at least one seed."""
        return int(np.isfinite(self.values).any(0).sum())

    @property
    def missing(self) -> int:
        """How many numbers are missing, over all seeds."""
        return int(self.values.size - np.isfinite(self.values).sum())


def _mean(values: np.ndarray) -> float:
    kept = values[np.isfinite(values)]
    return float(kept.mean()) if len(kept) else math.nan


EMPTY = Score((), np.zeros((0, 0)))


def score(rows: Sequence[dict[str, float]], exact: bool = False) -> Score:
    """The score of one {structure: number} per seed, structures in order of first appearance."""
    ids = tuple(dict.fromkeys(name for row in rows for name in row))
    values = [[row.get(name, math.nan) for name in ids] for row in rows]
    return Score(ids, np.array(values, float).reshape(len(rows), len(ids)), exact)


def bound(value: float, like: Score) -> Score:
    """An exact value for every structure that has a number in another score."""
    return Score(like.ids, np.where(np.isfinite(like.values), value, math.nan), exact=True)


def numbers(values: Sequence[float | None]) -> Score:
    """The score of one number per seed, e.g. seconds."""
    return score([{} if v is None else {"": v} for v in values])


def errors(
    predicted: Sequence[Sequence[Comparison]],
    metric: str,
    frames: Frames = "final",
    predictor: Predictor = "model",
) -> Score:
    """A metric of `FrameMetrics` for each structure, by seed.

    With "all", it is averaged over a structure's frames. Where a prediction is not finite, the
    model has no number.
    """
    rows = []
    for comparisons in predicted:
        row = {}
        for c in comparisons:
            if predictor == "model" and not c.finite:
                row[c.id] = math.nan
                continue
            found = structure_errors(c, predictor).get(metric)
            if found is not None:
                row[c.id] = float(found[-1] if frames == "final" else found.mean())
        rows.append(row)
    return score(rows, exact=predictor != "model")


def measured(
    predicted: Sequence[Sequence[Comparison]], measure: Callable[[Comparison], float]
) -> Score:
    """Any number computed from each structure's comparison, by seed."""
    return score([{c.id: measure(c) for c in comparisons} for comparisons in predicted])


def final_fmax(c: Comparison) -> float:
    """Largest predicted force on a free atom of the final frame, eV/Å."""
    return float(np.linalg.norm(c.pred_forces[-1][c.free_mask], axis=-1).max(initial=0.0))


def relative(a: Score, b: Score) -> Score:
    """a over b: each seed's mean of a over the mean of b, on the structures that both have.

    Where a model fails on the hardest structures, they are left out of both means.
    """
    known = {name: _mean(column) for name, column in zip(b.ids, b.values.T)}
    theirs = np.array([known.get(name, math.nan) for name in a.ids])
    found: list[float | None] = []
    for row in a.values:
        both = np.isfinite(row) & np.isfinite(theirs)
        below = _mean(theirs[both])
        found.append(_mean(row[both]) / below if below else None)
    return numbers(found)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Difference of the means of two scores, over the structures that both have.

    Attributes:
      value: b - a.
      parts: the contributions to the error, from the structures' paired differences and from the
        means of the seeds: for n values, the variance of their mean, and n - 1. Empty where there
        is neither a second seed nor a second structure.
      structures: number of structures compared.
      one_seed: whether one of the two was trained only once, so that the error lacks its spread.
      missing: how many numbers a and b lack, out of ``could``.
      could: how many numbers a and b could have for the structures that both have.
    """

    value: float
    parts: tuple[tuple[float, int], ...]
    structures: int
    one_seed: bool
    missing: tuple[int, int] = (0, 0)
    could: tuple[int, int] = (1, 1)

    @property
    def more_missing(self) -> bool:
        """Whether a lacks a larger fraction of its numbers than b."""
        return self.missing[0] * self.could[1] > self.missing[1] * self.could[0]

    @property
    def error(self) -> float | None:
        """Standard error: the parts added in quadrature; None without parts."""
        return math.sqrt(math.fsum(v for v, _ in self.parts)) if self.parts else None

    @property
    def degrees(self) -> float:
        """Degrees of freedom of the error (Welch and Satterthwaite); infinite if nothing varies."""
        below = math.fsum(v * v / n for v, n in self.parts)
        return math.fsum(v for v, _ in self.parts) ** 2 / below if below else math.inf

    @property
    def p(self) -> float | None:
        """Two-sided p of a difference this large by chance (Student's t); None without an error."""
        if self.error is None:
            return None
        if not self.error or not self.value:
            return 0.0 if self.value else 1.0
        return float(2 * student.sf(abs(self.value) / self.error, self.degrees))


def difference(a: Score, b: Score, paired: bool = False) -> Difference | None:
    """b - a; None where there is nothing to compare.

    Args:
      a: the first score.
      b: the second score.
      paired: whether each row of a and b comes from the same training. What makes a seed good then
        does so for both, and the seeds' spread is that of the rows' differences.

    Raises:
      ValueError: paired scores have different numbers of rows.
    """
    if paired and len(a.values) != len(b.values):
        raise ValueError(f"paired scores of {len(a.values)} and {len(b.values)} runs")
    if not np.isfinite(a.mean) or not np.isfinite(b.mean):
        return None
    theirs = {name: k for k, name in enumerate(b.ids)}
    own = [k for k, name in enumerate(a.ids) if name in theirs]
    pairs = [a.values[:, own], b.values[:, [theirs[a.ids[k]] for k in own]]]
    columns = [np.array([_mean(column) for column in values.T]) for values in pairs]
    apart = columns[1] - columns[0]
    kept = np.isfinite(apart)
    apart = apart[kept]
    if not len(apart):
        return None
    parts = [_variance_of_mean(apart)] if len(apart) > 1 else []
    one_seed = False
    for values in _trained(a, b, pairs, paired):
        means = np.array([_mean(row) for row in values[:, kept]])
        means = means[np.isfinite(means)]
        if len(means) > 1:
            parts.append(_variance_of_mean(means))
        else:
            one_seed = True
    absent, whole = zip(*((int((~np.isfinite(v)).sum()), v.size) for v in pairs))
    return Difference(float(apart.mean()), tuple(parts), len(apart), one_seed, absent, whole)


def _trained(a: Score, b: Score, pairs: Sequence[np.ndarray], paired: bool) -> Sequence[np.ndarray]:
    """Values (S, M) that vary between trainings: the scores not `exact` or, if paired, b - a."""
    if paired:
        return [pairs[1] - pairs[0]]
    return [values for s, values in zip((a, b), pairs) if not s.exact]


def _variance_of_mean(values: np.ndarray) -> tuple[float, int]:
    """The variance of the mean, and its degrees of freedom."""
    return float(values.var(ddof=1) / len(values)), len(values) - 1
