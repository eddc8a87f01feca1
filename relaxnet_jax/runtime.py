"""Process settings that must be made before JAX starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relaxnet_jax.errors import InputError

if TYPE_CHECKING:
    from relaxnet_jax.config import Config

CACHE_VARIABLE = "RELAXNET_JAX_CACHE"
LEAST_SHARE = 4  # structures of a batch per core; with fewer, a step takes about as long
MIN_COMPILE_SECONDS = 1.0  # programs that compile faster are not worth a file
MOST_SHARES = 8  # maximum number of CPU cores over which batches of predictions are spread
# XLA's options where each core of a CPU is a device: threads of programs that also spread their
# operations over several threads would wait for each other.
ONE_THREAD = {"xla_cpu_multi_thread_eigen": False}


def cache_folder() -> Path:
    """The user's cache folder for this package; the variable RELAXNET_JAX_CACHE overrides it."""
    import platformdirs

    return Path(os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("relaxnet_jax"))


def usable_cores() -> int:
    """Number of cores this process may use, given its affinity and the limits of its container."""
    import joblib

    return joblib.cpu_count()


def enable_compilation_cache() -> Path | None:
    """Quiets XLA's log and stores compiled programs on disk for later processes.

    Call it before anything else imports JAX or diffrax, which read their environment variables on
    import. Existing settings (``TF_CPP_MIN_LOG_LEVEL``, ``EQX_ON_ERROR``,
    ``JAX_COMPILATION_CACHE_DIR``) are respected.

    Returns:
      The folder of compiled programs; None if it cannot be written (JAX then works without it).
    """
    # Level 2 still prints two screenfuls for every program loaded from the cache on a CPU, about
    # tuning hints that it mistakes for missing features; real errors reach Python as exceptions.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # By default diffrax raises from inside a compiled program through a Python callback, and
    # JAX caches no program that contains one. With "nan", a failed solve gives NaN, which
    # training skips and reports and which prediction leaves out.
    os.environ.setdefault("EQX_ON_ERROR", "nan")
    import jax

    folder = cache_folder() / "xla"
    settings: Any = jax.config
    if settings.jax_compilation_cache_dir:
        folder = Path(settings.jax_compilation_cache_dir)
    else:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(folder, os.W_OK)
        except OSError:
            writable = False
        if not writable:
            return None
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    return folder


def batch_shares(config: Config, devices: int | None = None) -> int:
    """Number of parts in which the cores of a CPU share a training batch; starts JAX's devices.

    Makes JAX see the CPU as this many devices, each a core for single-threaded programs: a small
    program cannot keep two cores busy, but several of them can.

    Args:
      config: the configuration of the run.
      devices: number of devices asked for; they are made from a CPU's cores as well, but each has
        its own batches instead of a share.

    Returns:
      The number of parts; 1 if ``devices`` is given, if the solver is not rk4, or if JAX runs on
      something else, has already started, or was told the number of devices by XLA_FLAGS.

    Raises:
      InputError: see `check_devices`.
    """
    import jax

    shared = False
    if config.dynamics.solver == "rk4":  # other solvers run on one device
        cores = usable_cores()
        wanted = min(cores, config.train.batch_size // LEAST_SHARE) if devices is None else devices
        shared = wanted <= cores and _split_cpu(wanted)
    check_devices(devices)
    if devices is not None or not shared or jax.default_backend() != "cpu":
        return 1
    return jax.local_device_count()


def share_cores() -> None:
    """Starts JAX's devices; a CPU is split into several (see `batch_shares`), each with its own batches.

    Raises:
      InputError: see `check_devices`.
    """
    _split_cpu(min(usable_cores(), MOST_SHARES))
    check_devices(None)


def _split_cpu(parts: int) -> bool:
    """Makes JAX, if not yet started, see the CPU as ``parts`` devices.

    Returns:
      Whether it will, with at least two devices.
    """
    import jax

    if parts < 2 or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return False
    try:
        jax.config.update("jax_num_cpu_devices", parts)
    except RuntimeError:  # JAX has already started
        return False
    return True


def check_devices(n: int | None) -> None:
    """Starts JAX's devices.

    Args:
      n: number of local devices wanted; None for those available.

    Raises:
      InputError: there are fewer, or the platform named by JAX_PLATFORMS is not available.
    """
    import jax

    try:
        found = jax.local_device_count()
    # JAX raises an AssertionError if JAX_PLATFORMS is just cuda and no plugin is installed.
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split()) or "none for JAX_PLATFORMS"
        raise InputError(
            f"JAX cannot start its devices ({reason[:200]}); unset JAX_PLATFORMS or install "
            "the relaxnet-jax[cuda] extra"
        ) from None
    if n is not None and not 1 <= n <= found:
        platform = jax.devices()[0].platform
        raise InputError(
            f"--devices {n}: this machine has {found} ({platform}); give 1 to {found}, or leave "
            "the option out to use all"
        )
