"""Which kernels of a compiled program take the time, from JAX's profiler."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

RUNS = 3  # of the program, under the profiler
MOST = 12  # kernels that are told apart; the others are added up
# Lines of a profile on which kernels are: a GPU's streams; on a CPU the threads of XLA's executor.
_STREAM, _THREAD = "Stream", "tf_XLAPjRtCpuClient"
_NUMBERED = re.compile(
    r"(?:[._]\d+)+(?=$|__)"
)  # loop_add_fusion_12: the same kind of kernel as _11


def kernels(run: Callable[[], Any], most: int = MOST) -> dict[str, Any]:
    """Time on the device by kind of kernel, of one run of a program (the mean of `RUNS`).

    Args:
      run: runs it once and returns its arrays, which are waited for. It has run before.
      most: so many kinds, the most expensive ones; the rest is told as "others".

    Returns:
      busy_s: seconds that kernels ran, added up over streams or threads; calls: how many kernels;
      kinds: {name: {"seconds", "calls", "share" of busy_s}}, names without the numbers that XLA
      gives to kernels of one kind. Empty where the profiler saw none.
    """
    with tempfile.TemporaryDirectory(prefix="relaxnet_jax-") as folder:
        with jax.profiler.trace(folder):
            for _ in range(RUNS):
                jax.block_until_ready(run())
        files = list(Path(folder).rglob("*.xplane.pb"))
        events = [e for file in files for e in _events(file)]
    if not events:
        return {}
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for name, duration in events:
        kind = _NUMBERED.sub("", name) or name
        seconds[kind] += 1e-9 * duration / RUNS
        calls[kind] += 1
    busy = sum(seconds.values())
    order = sorted(seconds, key=lambda kind: -seconds[kind])
    kinds = {k: _kind(seconds[k], calls[k], busy) for k in order[:most]}
    if rest := order[most:]:
        kinds["others"] = _kind(sum(seconds[k] for k in rest), sum(calls[k] for k in rest), busy)
    return {"busy_s": busy, "calls": round(len(events) / RUNS), "kinds": kinds}


def _kind(seconds: float, calls: int, busy: float) -> dict[str, Any]:
    return {"seconds": seconds, "calls": round(calls / RUNS), "share": seconds / busy}


def _events(file: Path) -> Iterable[tuple[str, float]]:
    """Name and own nanoseconds of every kernel in a profile."""
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        on_device = plane.name.startswith("/device:")
        for line in plane.lines:
            if on_device and _STREAM in (line.name or ""):
                yield from _own_times(line.events)
            elif not on_device and (line.name or "").startswith(_THREAD):
                # The executor marks other things too: with names of C++, or of ends.
                found = (e for e in line.events if "::" not in e.name and ":" not in e.name)
                yield from _own_times(found)


def _own_times(events: Iterable[Any]) -> Iterable[tuple[str, float]]:
    """Events without the time of those inside them, as of a loop without its body's kernels."""
    spans = sorted((e.start_ns, -e.duration_ns, e.name) for e in events)
    open_: list[list[Any]] = []  # end, name, own time: the events that the next one may be inside
    for start, minus, name in spans:
        duration = -minus
        while open_ and open_[-1][0] <= start:
            _, done, own = open_.pop()
            yield done, own
        if open_:
            open_[-1][2] -= duration
        open_.append([start + duration, name, duration])
    yield from ((name, own) for _, name, own in open_)
