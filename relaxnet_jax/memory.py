"""What to say, and to catch, where a device has no memory left."""

from __future__ import annotations

import jax

# What JAX raises there, among other things: see `out_of_memory`.
ERRORS = (jax.errors.JaxRuntimeError, MemoryError)


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
