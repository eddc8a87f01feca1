"""Which kernels of a compiled program take the time on a GPU, from JAX's profiler."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

RUNS = 3  # of the program, under the profiler
MOST = 12  # kinds of kernels that are told apart; the others are added up
_NUMBERED = re.compile(r"(?:[._]\d+)+$")  # loop_add_fusion_12: the same kind of kernel as _11


class Kernel(NamedTuple):
    """A kernel that ran: nanoseconds since the profile began."""

    name: str
    start: float
    duration: float


def device_kernels(run: Callable[[], Any]) -> dict[str, Any]:
    """Time on the device by kind of kernel, of one run of a program (the mean of `RUNS`).

    Args:
      run: runs it once and returns its arrays, which are waited for. It has run before.

    Returns:
      See `summary`. Empty on a CPU, whose kernels are not looked at: many and short, they take half as
      long again when profiled.
    """
    with tempfile.TemporaryDirectory(prefix="relaxnet_jax-") as folder:
        with jax.profiler.trace(folder):
            for _ in range(RUNS):
                jax.block_until_ready(run())
        files = Path(folder).rglob("*.xplane.pb")
        return summary(
            k for f in files for k in kernels_of(jax.profiler.ProfileData.from_file(str(f)).planes)
        )


def kernels_of(planes: Iterable[Any]) -> Iterator[Kernel]:
    """The kernels in a profile, and copies: what ran in the streams of its devices."""
    for plane in planes:
        if plane.name.startswith("/device:"):
            for line in plane.lines:
                if "Stream" in (line.name or ""):
                    yield from (Kernel(e.name, e.start_ns, e.duration_ns) for e in line.events)


def summary(kernels: Iterable[Kernel], runs: int = RUNS, most: int = MOST) -> dict[str, Any]:
    """What the kernels of ``runs`` runs took, for one run.

    Returns:
      busy_s: seconds in which any kernel ran; calls: how many did; kinds, the most expensive first,
      all others as "others": {name: {"seconds", "calls", "share" of the seconds of all}}, names
      without the numbers that XLA gives to kernels of one kind. Empty without a kernel.
    """
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    busy = until = 0.0
    for k in sorted(kernels, key=lambda k: k.start):
        kind = _NUMBERED.sub("", k.name) or k.name
        seconds[kind] += 1e-9 * k.duration / runs
        calls[kind] += 1
        end = k.start + k.duration
        busy += max(end - max(k.start, until), 0.0)
        until = max(until, end)
    if not calls:
        return {}
    order = sorted(seconds, key=lambda kind: -seconds[kind])
    groups = [(kind, [kind]) for kind in order[:most]]
    if order[most:]:
        groups.append(("others", order[most:]))
    total = sum(seconds.values())
    kinds = {}
    for name, members in groups:
        own = sum(seconds[m] for m in members)
        n = sum(calls[m] for m in members) / runs
        kinds[name] = {"seconds": own, "calls": n, "share": own / total}
    return {"busy_s": 1e-9 * busy / runs, "calls": sum(calls.values()) / runs, "kinds": kinds}
