"""Whether a claim of the paper holds for what was measured: words computed from numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from relaxnet_jax.reproduce.formats import number
from relaxnet_jax.reproduce.scores import Score, difference

Verdict = Literal["holds", "does not hold", "cannot be tested"]
HOLDS: Verdict = "holds"
FAILS: Verdict = "does not hold"
OPEN: Verdict = "cannot be tested"
SIGMAS = 2.0
SHOWN = 4  # cases of a claim whose numbers are told
RULE = (
    f"A is lower than B if the difference of their means exceeds {SIGMAS:g} standard errors (of the "
    "seeds, and of the structures' paired differences, in quadrature); B than A likewise; "
    "otherwise the data cannot tell, and the claim cannot be tested. Nor can it where A or B was "
    "trained with one seed: the spread between trainings is unknown. What no training is behind "
    "(doing nothing, an outside potential, a bound) has no such spread; of two such numbers the sign "
    "decides. A claim about several cases holds if it holds in all, and does not if "
    "it does not hold in one."
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A verdict and the numbers it follows from, in words."""

    verdict: Verdict
    reason: str


@dataclasses.dataclass(frozen=True)
class Claim:
    """Something the paper says.

    Attributes:
      text: what. outcome: see there. rule: when it holds, where it is not `RULE` alone.
      ours: the claim is no claim of the paper, but a target of this project.
    """

    text: str
    outcome: Outcome
    rule: str = ""
    ours: bool = False


def lower(
    a: Score, b: Score, names: tuple[str, str], unit: str = "", factor: float = 1.0
) -> Outcome:
    """Whether A is lower than ``factor`` times B; see `RULE`."""
    scaled = dataclasses.replace(b, values=factor * b.values)
    found = difference(a, scaled)
    times = f"{factor:g} × " if factor != 1.0 else ""
    what = (
        f"{names[0]} {number(a.mean)}, {times}{names[1]} {number(factor * b.mean)} {unit}".strip()
    )
    if found is None:
        absent = [n for n, s in zip(names, (a, b)) if not s.seeds]
        return Outcome(OPEN, f"no numbers of {' and '.join(absent) or 'both on one structure'}")
    if found.one_seed:
        return Outcome(OPEN, f"{what}; one seed: the spread between trainings is unknown")
    if found.error is None:
        verdict: Verdict = HOLDS if found.value > 0 else FAILS
        return Outcome(verdict, f"{what}; one measurement of each")
    what += f"; difference {number(found.value)} ± {number(found.error)}"
    if found.structures < max(a.structures, b.structures):
        what += f" on the {found.structures} structures of both"
    if abs(found.value) <= SIGMAS * found.error:
        return Outcome(OPEN, f"{what}: not told apart")
    return Outcome(HOLDS if found.value > 0 else FAILS, what)


def all_of(outcomes: Sequence[Outcome]) -> Outcome:
    """Of a claim about several cases."""
    if not outcomes:
        return Outcome(OPEN, "no case was measured")
    verdicts = [o.verdict for o in outcomes]
    verdict: Verdict = HOLDS
    if FAILS in verdicts:
        verdict = FAILS
    elif OPEN in verdicts:
        verdict = OPEN
    if len(outcomes) == 1:
        return Outcome(verdict, outcomes[0].reason)
    count = verdicts.count(verdict)
    shown = [o.reason for o in outcomes if o.verdict == verdict]
    more = [f"… and {count - SHOWN} more"] if count > SHOWN else []
    return Outcome(verdict, f"{count} of {len(outcomes)}: " + "; ".join(shown[:SHOWN] + more))


def decided(holds: bool | None, reason: str) -> Outcome:
    """Of a rule of its own; None where it cannot be applied."""
    verdict: Verdict = OPEN if holds is None else HOLDS if holds else FAILS
    return Outcome(verdict, reason)
