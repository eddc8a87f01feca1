"""Default batch sizes, and detecting and reporting that a device has run out of memory."""

from __future__ import annotations

import jax

from relaxnet_jax.errors import InputError

# What may be raised when memory runs out, among other reasons; see `out_of_memory`.
ERRORS = (jax.errors.JaxRuntimeError, MemoryError)

# Structures per batch. On a CPU, larger batches gain nothing, since they no longer fit in its caches; a
# GPU is not fully used by batches this small.
ON_CPU, ON_ACCELERATOR = 16, 128


def batch_size_of(given: int | None) -> int:
    """The batch size as given, or a default that suits JAX's default backend.

    Raises:
      InputError: the batch size is below 1.
    """
    if given is None:
        return ON_CPU if jax.default_backend() == "cpu" else ON_ACCELERATOR
    if given < 1:
        raise InputError(f"batch_size={given}: give at least 1")
    return given


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a program did not fit in the device's (or the host's) memory."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def does_not_fit(n_atoms: int) -> str:
    """A message that a structure of ``n_atoms`` atoms does not fit in the memory of a device."""
    device = jax.devices()[0].device_kind
    return (
        f"its {n_atoms} atoms do not fit in the memory of one device ({device}); use a device with more "
        "memory"
    )
