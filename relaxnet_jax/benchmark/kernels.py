"""Which kernels of a compiled program take the time on a GPU, according to JAX's profiler."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

RUNS = 3  # runs of the program under the profiler
MOST = 12  # kinds of kernels listed separately; the others are added up
# E.g. loop_add_fusion_12 is the same kind as loop_add_fusion_11.
_NUMBERED = re.compile(r"(?:[._]\d+)+$")


class Kernel(NamedTuple):
    """One execution of a kernel: start, from the beginning of the profile, and duration, in ns."""

    name: str
    start: float
    duration: float


def device_kernels(run: Callable[[], Any]) -> dict[str, Any]:
    """Time on the device by kind of kernel, for one run of a program (mean over `RUNS`).

    Args:
      run: runs the program once and returns its arrays, which are waited for. It must have run before.

    Returns:
      See `summary`. Empty on a CPU, whose kernels are not looked at: they are so many and so short that
      profiling makes them take half as long again.
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
    """The kernels and copies in a profile: whatever ran in the streams of its devices."""
    for plane in planes:
        if plane.name.startswith("/device:"):
            for line in plane.lines:
                if "Stream" in (line.name or ""):
                    yield from (Kernel(e.name, e.start_ns, e.duration_ns) for e in line.events)


def summary(kernels: Iterable[Kernel], runs: int = RUNS, most: int = MOST) -> dict[str, Any]:
    """Time taken by the kernels of ``runs`` runs, per run.

    Returns:
      busy_s: seconds in which any kernel ran.
      calls: number of kernels that ran.
      kinds: {name: {"seconds", "calls", "share" of the seconds of all}}, the most expensive kinds
        first, all others as "others". Names omit the numbers that XLA gives to kernels of one kind.

      Empty without any kernel.
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
