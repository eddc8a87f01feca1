"""Settings of the process that must stand before JAX starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relaxnet_jax.errors import InputError

if TYPE_CHECKING:
    from relaxnet_jax.config import Config

CACHE_VARIABLE = "RELAXNET_JAX_CACHE"
LEAST_SHARE = 4  # structures of a batch on a core; with fewer a step takes about as long
MIN_COMPILE_SECONDS = 1.0  # what compiles faster is not worth a file
MOST_SHARES = 8  # cores of a CPU that batches of predictions are spread over
# XLA's options where a CPU's cores are devices of their own: a program that also spreads its operations
# over threads would have them wait for each other.
ONE_THREAD = {"xla_cpu_multi_thread_eigen": False}


def cache_folder() -> Path:
    """The user's cache folder of this package; the variable RELAXNET_JAX_CACHE overrides it."""
    import platformdirs

    return Path(os.environ.get(CACHE_VARIABLE) or platformdirs.user_cache_dir("relaxnet_jax"))


def usable_cores() -> int:
    """Cores this process may use, by affinity and by the limits of its container."""
    import joblib

    return joblib.cpu_count()


def enable_compilation_cache() -> Path | None:
    """Quiets XLA's log and keeps what it compiles on disk for the next process.

    Call it before anything else imports JAX or diffrax, which read their variables then.
    Settings already there (``TF_CPP_MIN_LOG_LEVEL``, ``EQX_ON_ERROR``,
    ``JAX_COMPILATION_CACHE_DIR``) are respected.

    Returns:
      The folder of compiled programs, None if it cannot be written (JAX then does without).
    """
    # Level 2 still prints two screenfuls for every program loaded from the cache on a CPU, about
    # tuning hints that it takes for missing features; what matters reaches Python as exceptions.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # By default diffrax raises from inside a compiled program, through a Python callback, and
    # JAX caches no program that holds one. A solve that fails gives NaN instead, which
    # training skips and reports and prediction leaves out.
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
    """In how many parts the cores of a CPU share a batch of a training run; starts JAX's devices.

    Has JAX see the CPU as so many devices, each a core for programs of one thread: small programs
    keep no two cores busy, but several of them do. 1 where JAX runs on something else, has started
    already, or was told by XLA_FLAGS how many to see.

    Args:
      devices: how many are asked for, which are made of a CPU's cores, but have batches of their own.

    Raises:
      InputError: see `check_devices`.
    """
    import jax

    shared = False
    if config.dynamics.solver == "rk4":  # others run on one device
        cores = usable_cores()
        wanted = min(cores, config.train.batch_size // LEAST_SHARE) if devices is None else devices
        shared = wanted <= cores and _split_cpu(wanted)
    check_devices(devices)
    if devices is not None or not shared or jax.default_backend() != "cpu":
        return 1
    return jax.local_device_count()


def share_cores() -> None:
    """Starts JAX's devices; of a CPU several, see `batch_shares`, to which predictions go batch by batch.

    Raises:
      InputError: see `check_devices`.
    """
    _split_cpu(min(usable_cores(), MOST_SHARES))
    check_devices(None)


def _split_cpu(parts: int) -> bool:
    """Whether JAX, which must not have started, will see the CPU as so many devices, two or more."""
    import jax

    if parts < 2 or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return False
    try:
        jax.config.update("jax_num_cpu_devices", parts)
    except RuntimeError:  # it has started
        return False
    return True


def check_devices(n: int | None) -> None:
    """Starts JAX's devices.

    Args:
      n: how many local devices are wanted; None takes what there is.

    Raises:
      InputError: there are fewer, or the platform JAX_PLATFORMS names is not there.
    """
    import jax

    try:
        found = jax.local_device_count()
    # JAX itself asserts where JAX_PLATFORMS is cuda alone and no plugin is installed.
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
