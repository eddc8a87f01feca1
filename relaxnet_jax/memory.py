"""How many structures go to a device at once, and what to say and catch where it has no memory left."""

from __future__ import annotations

import jax

from relaxnet_jax.errors import InputError

# What JAX raises there, among other things: see `out_of_memory`.
ERRORS = (jax.errors.JaxRuntimeError, MemoryError)

# Structures of a batch. More gain nothing on a CPU, where a batch no longer fits in its caches; a GPU is
# not busy with as few.
ON_CPU, ON_ACCELERATOR = 16, 128


def batch_size_of(given: int | None) -> int:
    """A batch size as given, or by default what suits JAX's first device.

    Raises:
      InputError: it is below 1.
    """
    if given is None:
        return ON_CPU if jax.default_backend() == "cpu" else ON_ACCELERATOR
    if given < 1:
        raise InputError(f"batch_size={given}: give at least 1")
    return given


def out_of_memory(error: BaseException) -> bool:
    """Whether a program did not fit in the device's (or the host's) memory."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def does_not_fit(n_atoms: int) -> str:
    """Why a structure of so many atoms has no prediction."""
    device = jax.devices()[0].device_kind
    return (
        f"its {n_atoms} atoms do not fit in the memory of one device ({device}); "
        "predict it where there is more"
    )
