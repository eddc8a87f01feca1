"""The machine that figures were measured on, and the most it can do."""

from __future__ import annotations

import functools
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from relaxnet_jax.benchmark.timing import measure
from relaxnet_jax.runtime import usable_cores

PACKAGES = ("relaxnet-jax", "jax", "jaxlib", "flax", "e3nn-jax", "diffrax", "numpy")
ENOUGH = 0.05  # s; a matrix product that takes this long is large enough to be a ceiling
LARGEST = 8192  # at twice that size, XLA for a GPU tries its algorithms for half a minute
ROOM = 0.9  # fraction of the free memory that a program may need
# Files that hold the limit on memory and what is used of it, for control groups of version 2 and 1.
CONTROL_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def describe(packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """Device, cores, memory, load and versions."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind if device.platform != "cpu" else processor(),
        "devices": jax.local_device_count(),
        "processor": processor(),
        "cores": usable_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in packages},
    }


def processor() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def available_bytes() -> int | None:
    """Free memory in bytes, of the device or, for a CPU, of the host; None if unknown."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        return None if limit is None else int(limit) - int(stats.get("bytes_in_use", 0))
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = (1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    return min((x for x in (next(free, None), _group_bytes()) if x is not None), default=None)


def no_room(need: int) -> str:
    """Why a program that needs so many bytes should not be run; empty if it fits, or nothing is known."""
    free = available_bytes()
    if free is None or need <= ROOM * free:
        return ""
    return f"needs {need / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB is free"


def _group_bytes() -> int | None:
    """Bytes that this process's control group (a container's, say) may still take; None without a limit."""
    for limit, used in CONTROL_GROUPS:
        try:
            return int(Path(limit).read_text()) - int(Path(used).read_text())
        except (OSError, ValueError):  # no such group, or "max" for no limit
            continue
    return None


def device_peak_bytes() -> int | None:
    """Largest memory in use on the device since the process began, in bytes; None if it is not counted."""
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return None if peak is None else int(peak)


def ceilings(seconds: float = 2.0) -> dict[str, float]:
    """FLOP/s of a large matrix product in full float32, and bytes/s of copies.

    The size of the product is doubled until it takes `ENOUGH` seconds or reaches `LARGEST`. One copy
    reads and writes more than any cache holds, 256 MiB (1 GiB on accelerators). The other one goes over
    1 MiB (16 MiB) again and again, which fits in the cache nearest to all cores (L2).
    """
    # Accelerators multiply in lower precision by default, which the network does not (except with
    # model.matmul="bfloat16").
    size, product = 1024, jax.jit(functools.partial(jnp.matmul, precision="float32"))
    while True:
        x = jnp.full((size, size), 0.5, jnp.float32)
        timing = measure(lambda x=x: product(x, x), seconds)  # type: ignore[misc]
        if timing.median >= ENOUGH or 2 * size > LARGEST:
            break
        size *= 2
    accelerator = jax.devices()[0].platform != "cpu"
    return {
        "matmul_size": size,
        "matmul_flops_per_s": 2.0 * size**3 / timing.median,
        "copy_bytes_per_s": _copy_rate(2**28 if accelerator else 2**26, 1, seconds),
        "cache_copy_bytes_per_s": _copy_rate(2**22 if accelerator else 2**18, 200, seconds),
    }


def _copy_rate(length: int, times: int, seconds: float) -> float:
    """Bytes/s of reading and writing ``length`` float32 numbers, ``times`` times in one program."""

    def move(x):
        return jax.lax.fori_loop(0, times, lambda _, x: x + 1.0, x)

    # With a new array for every result, the system would have to provide pages, which takes far longer.
    compiled, numbers = jax.jit(move, donate_argnums=0), jnp.zeros(length, jnp.float32)

    def run():
        nonlocal numbers
        numbers = compiled(numbers)
        return numbers

    return 2 * 4 * length * times / measure(run, seconds).median


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "not installed"
