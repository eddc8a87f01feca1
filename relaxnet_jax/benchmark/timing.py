"""Timing of repeated runs, and of compilation with and without a cache."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from relaxnet_jax import programs

LEAST, MOST = 3, 30  # repetitions, fewest and most


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs: their median, extremes and number."""

    median: float
    fastest: float
    slowest: float
    repeats: int


def measure(run: Callable[[], Any], seconds: float = 3.0) -> Timing:
    """Times repeated runs after one that is not counted; see `measure_alternating`."""
    return summary(measure_alternating({"": run}, seconds)[""])


def measure_alternating(
    runs: Mapping[str, Callable[[], Any]], seconds: float, least: int = LEAST
) -> dict[str, list[float]]:
    """Seconds of every run of several functions, which take turns so that all see the same machine.

    Args:
      runs: functions that return what they computed; JAX arrays in it are waited for.
      seconds: rounds begin until this time is over.
      least: fewest rounds; one is enough if the uncounted round took longer than four times
        ``seconds``. There are at most `MOST`.
    """
    begin = time.perf_counter()
    for run in runs.values():
        jax.block_until_ready(run())
    if time.perf_counter() - begin > 4 * max(seconds, 0.01):
        least = 1
    times: dict[str, list[float]] = {name: [] for name in runs}
    begin, rounds = time.perf_counter(), 0
    while rounds < least or (rounds < MOST and time.perf_counter() - begin < seconds):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return times


def summary(times: list[float]) -> Timing:
    """Median and extremes of times."""
    return Timing(statistics.median(times), min(times), max(times), len(times))


@dataclasses.dataclass(frozen=True)
class Step:
    """A function to compile and run again and again.

    Attributes:
      function, arguments: a pure function, and what it is called with.
      donate: indices of the arguments whose buffers it may reuse.
      advance: makes the arguments of the next call from this call's result and arguments.
      plain: the same function without parts that are kept on disk, which cannot be looked into; None if
        it has none.
    """

    function: Callable
    arguments: tuple
    donate: tuple[int, ...] = ()
    advance: Callable[[Any, tuple], tuple] = lambda _, arguments: arguments
    plain: Callable | None = None

    def runner(self, compiled: Callable) -> Callable[[], Any]:
        """The compiled function without arguments; each call continues from the last."""
        arguments = tuple(  # donated ones are copied, since their buffers are lost
            jax.tree.map(jnp.array, a) if k in self.donate else a
            for k, a in enumerate(self.arguments)
        )

        def run():
            nonlocal arguments
            result = compiled(*arguments)
            arguments = self.advance(result, arguments)
            return result

        return run


@dataclasses.dataclass(frozen=True)
class Compilation:
    """Seconds from a Python function to a program that can run.

    Attributes:
      trace: from Python to a jaxpr and to StableHLO.
      compile: XLA, with nothing in its cache.
      cached_trace, cached_compile: both once more, with the traced and the compiled program on disk but
        nothing in memory, as the next process will find them.
    """

    trace: float
    compile: float
    cached_trace: float
    cached_compile: float


def compile_twice(step: Step) -> tuple[Any, Any, Compilation]:
    """The closed jaxpr, the compiled program, and how long it took cold and cached."""
    with _empty_cache():
        _forget()
        cold, traced, compiled = _compile(step.function, step.arguments, step.donate)
        _forget()
        cached, _, _ = _compile(step.function, step.arguments, step.donate)
    if step.plain is not None:
        traced = jax.jit(step.plain).trace(*step.arguments)
    return traced.jaxpr, compiled, Compilation(*cold, *cached)


def _forget() -> None:
    """Leaves only what is on disk, as for a new process."""
    jax.clear_caches()
    programs.forget()


def compile_once(
    function: Callable, arguments: tuple, donate: tuple[int, ...] = ()
) -> tuple[Any, Any, float]:
    """The closed jaxpr, the compiled program and the seconds, with the user's own cache."""
    (trace, build), traced, compiled = _compile(function, arguments, donate)
    return traced.jaxpr, compiled, trace + build


def _compile(function: Callable, arguments: tuple, donate: tuple[int, ...]):
    start = time.perf_counter()
    traced = jax.jit(function, donate_argnums=donate).trace(*arguments)
    lowered = traced.lower()
    middle = time.perf_counter()
    compiled = lowered.compile()
    return (middle - start, time.perf_counter() - middle), traced, compiled


@contextlib.contextmanager
def _empty_cache() -> Iterator[None]:
    """JAX's compilation cache in an empty folder of its own, which is removed afterwards."""
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_enable_compilation_cache",
    )
    before = {name: getattr(jax.config, name) for name in names}
    with tempfile.TemporaryDirectory(prefix="relaxnet_jax-") as folder:
        try:
            for name, value in zip(names, (folder, 0.0, True)):
                jax.config.update(name, value)
            reset_cache()
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            reset_cache()
