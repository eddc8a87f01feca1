"""Whether the paper's claims hold for the measured numbers: verdicts computed from scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from relaxnet_jax.reproduce.formats import number
from relaxnet_jax.reproduce.scores import Score, difference

Verdict = Literal["holds", "does not hold", "inconclusive"]
HOLDS: Verdict = "holds"
FAILS: Verdict = "does not hold"
OPEN: Verdict = "inconclusive"
SIGNIFICANT = 0.05  # two-sided p
ONE_SEED = "one seed: the spread between trainings is unknown"
SHOWN = 4  # cases of a claim whose numbers are given
RULE = (
    "the claim that A is lower than B holds if the difference of their means is significant (two-sided "
    f"p < {SIGNIFICANT:g} by Student's t, with the degrees of freedom of Welch and Satterthwaite), and does not "
    "hold if B is lower than A by the same test; otherwise it is inconclusive. The "
    "variance of the difference is the sum of two: that of the paired differences over the test structures, and "
    "that of the means over seeds (of their differences, where both come from the same runs). A claim "
    "is also inconclusive if A or B was trained with one seed only, as the spread "
    "between trainings is then unknown, and if A lacks numbers (diverged predictions) more often than B. Doing "
    "nothing, an outside potential and a bound involve no training and have no such spread; between two such "
    "numbers the sign decides. A claim about several cases holds if it holds in every case, and does not hold if it "
    "fails in one of them with a p that is still significant when multiplied by the number of cases (Bonferroni)."
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A verdict, and in words the numbers it follows from.

    Attributes:
      verdict: one of `HOLDS`, `FAILS` and `OPEN`.
      reason: the numbers.
      p: probability of so clear a verdict by chance; 0 where chance is not considered.
    """

    verdict: Verdict
    reason: str
    p: float = 0.0


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement that the measurements confirm or refute.

    Attributes:
      text: the statement.
      outcome: see `Outcome`.
      rule: when it holds, if that is not decided by `RULE` alone.
      ours: whether the claim is a target of this project rather than a claim of the paper.
    """

    text: str
    outcome: Outcome
    rule: str = ""
    ours: bool = False


def lower(
    a: Score,
    b: Score,
    names: tuple[str, str],
    unit: str = "",
    factor: float = 1.0,
    paired: bool = False,
) -> Outcome:
    """Whether A is lower than ``factor`` times B; see `RULE`, and `difference` for ``paired``."""
    scaled = dataclasses.replace(b, values=factor * b.values)
    found = difference(a, scaled, paired)
    times = f"{factor:g} × " if factor != 1.0 else ""
    what = (
        f"{names[0]} {number(a.mean)}, {times}{names[1]} {number(factor * b.mean)} {unit}".strip()
    )
    if found is None:
        absent = [n for n, s in zip(names, (a, b)) if not s.seeds]
        return Outcome(OPEN, f"no numbers for {' and '.join(absent) or 'both on one structure'}")
    if found.one_seed:
        return Outcome(OPEN, f"{what}; {ONE_SEED}")
    if found.error is None:
        verdict: Verdict = HOLDS if found.value > 0 else FAILS
        return Outcome(verdict, f"{what}; one measurement of each")
    p = found.p or 0.0
    what += f"; difference {number(found.value)} ± {number(found.error)} (p = {number(p, 1)})"
    if found.structures < max(a.structures, b.structures):
        what += f" on the {found.structures} structures of both"
    if not p < SIGNIFICANT:
        return Outcome(OPEN, f"{what}: not significant", p)
    outcome = Outcome(HOLDS if found.value > 0 else FAILS, what, p)
    if not found.more_missing:
        return outcome
    beside = f"; of {names[1]} {found.missing[1]} of {found.could[1]}" if found.missing[1] else ""
    return complete(outcome, found.missing[0], f"of {found.could[0]} of {names[0]}{beside}")


def complete(outcome: Outcome, missing: int, of: str) -> Outcome:
    """Makes a claim that holds inconclusive if numbers are missing.

    The missing numbers may be those of the hardest structures.

    Args:
      outcome: the outcome on the numbers that exist.
      missing: how many numbers are missing.
      of: a phrase "of …" for the reason, saying what they are missing from.
    """
    if not missing or outcome.verdict != HOLDS:
        return outcome
    text = f"{outcome.reason}; but {missing} {of} are missing"
    return dataclasses.replace(outcome, verdict=OPEN, reason=text)


def all_of(outcomes: Sequence[Outcome]) -> Outcome:
    """Combines the outcomes of a claim's cases; see `RULE`.

    Among many cases, one is likelier to fail by chance than a single case is.
    """
    if not outcomes:
        return Outcome(OPEN, "no case was measured")
    if len(outcomes) == 1:
        return outcomes[0]
    verdicts = {o.verdict for o in outcomes}
    verdict = next(v for v in (FAILS, OPEN, HOLDS) if v in verdicts)
    chosen = [o for o in outcomes if o.verdict == verdict]
    more = [f"… and {len(chosen) - SHOWN} more"] if len(chosen) > SHOWN else []
    reasons = "; ".join([o.reason for o in chosen[:SHOWN]] + more)
    text = f"{len(chosen)} of {len(outcomes)}"
    if verdict == FAILS:
        p = min(1.0, len(outcomes) * min(o.p for o in chosen))
        if not p < SIGNIFICANT:
            chance = f"which may be chance in {len(outcomes)} cases (p = {number(p, 1)})"
            return Outcome(OPEN, f"{text} do not hold, {chance}: {reasons}", p)
        return Outcome(FAILS, f"{text}: {reasons}", p)
    # All must hold, so the least certain case sets the certainty.
    return Outcome(verdict, f"{text}: {reasons}", max(o.p for o in chosen))


def decided(holds: bool | None, reason: str, trainings: int = 2) -> Outcome:
    """The outcome of a claim with its own rule; ``holds`` is None where that cannot be applied.

    A single training decides nothing.
    """
    if holds is not None and trainings < 2:
        return Outcome(OPEN, f"{reason}; {ONE_SEED}")
    verdict: Verdict = OPEN if holds is None else HOLDS if holds else FAILS
    return Outcome(verdict, reason)
