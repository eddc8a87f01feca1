"""Clocks: repeated runs, and compilation with and without a cache."""

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

LEAST, MOST = 3, 30  # repetitions


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of repeated runs."""

    median: float
    fastest: float
    slowest: float
    repeats: int


def measure(run: Callable[[], Any], seconds: float = 3.0) -> Timing:
    """Times ``run`` after one run that is not counted; see `measure_alternating`."""
    return summary(measure_alternating({"": run}, seconds)[""])


def measure_alternating(
    runs: Mapping[str, Callable[[], Any]], seconds: float, least: int = LEAST
) -> dict[str, list[float]]:
    """Seconds of every run of several functions that take turns, so that all see the same machine.

    Args:
      runs: functions that return what they computed; JAX arrays in it are waited for.
      seconds: rounds begin until this time is over, at least ``least`` and at most `MOST`; one
        is enough where the uncounted one took longer than four times this.
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
    """Median and extremes."""
    return Timing(statistics.median(times), min(times), max(times), len(times))


@dataclasses.dataclass(frozen=True)
class Step:
    """A function to compile and run again and again.

    Attributes:
      function, arguments: pure function, and what it is called with.
      donate: arguments whose buffers it may reuse.
      advance: the arguments of the next call, from this call's result and arguments.
      plain: the same without parts that are kept on disk, into which nothing can look; None where
        there are none.
    """

    function: Callable
    arguments: tuple
    donate: tuple[int, ...] = ()
    advance: Callable[[Any, tuple], tuple] = lambda _, arguments: arguments
    plain: Callable | None = None

    def runner(self, compiled: Callable) -> Callable[[], Any]:
        """The compiled function without arguments, each call going on from the last."""
        arguments = tuple(  # what is donated is copied: its buffers are lost
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
      trace: Python to a jaxpr and to StableHLO. compile: XLA, with nothing in its cache.
      cached_trace, cached_compile: both once more, with the traced and the compiled program on disk
        and all that is remembered in memory forgotten: what the next process will need.
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
    """As a new process, which has nothing but what is on disk."""
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
    """JAX's compilation cache in a folder of its own that is empty, and gone afterwards."""
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
