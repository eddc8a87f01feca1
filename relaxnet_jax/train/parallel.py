"""One device or several: the only place that knows where steps run.

Several devices run `jax.pmap`. It cannot trace diffrax's own differentiable loops, which mark
arrays with the devices' mesh and take a marked counter for another type than an unmarked one
(patrick-kidger/diffrax#765); the RK4 solve is a plain scan for that reason too, and the adaptive
solver is left to one device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

AXIS = "devices"


class Devices:
    """Runs steps on ``n`` local devices, one padded batch each; plain `jax.jit` on one.

    Attributes:
      n: number of devices. axis: axis name the step must add over, None on one device.
      compilations: how many step functions were compiled, by kind.
    """

    def __init__(self, n: int | None = None, log: Callable[[str], None] = lambda _: None) -> None:
        self.n = jax.local_device_count() if n is None else n
        self.axis = AXIS if self.n > 1 else None
        self.compilations: dict[str, int] = {}
        self.compile_seconds = 0.0
        self._log = log

    def compile(
        self, step: Callable, kind: str, batched: tuple[bool, ...], donate: tuple[int, ...] = ()
    ) -> Callable:
        """The step, compiled once for each shape of its arguments.

        Args:
          step: pure function. kind: its name in the log.
          batched: for each argument, whether it has a leading axis of devices.
          donate: arguments whose buffers may be reused.
        """
        if self.n == 1:
            transformed: Any = jax.jit(step, donate_argnums=donate)
        else:
            transformed = jax.pmap(
                step,
                axis_name=AXIS,
                in_axes=tuple(0 if b else None for b in batched),
                donate_argnums=donate,
                devices=jax.local_devices()[: self.n],
            )
        compiled: dict[Hashable, Any] = {}

        def run(*args):
            shapes = tuple(np.shape(x) for x in jax.tree.leaves(args))
            if shapes not in compiled:
                start = time.perf_counter()
                self._log(f"compiling {kind}…")
                compiled[shapes] = transformed.lower(*args).compile()
                seconds = time.perf_counter() - start
                self.compilations[kind] = self.compilations.get(kind, 0) + 1
                self.compile_seconds += seconds
                self._log(f"compiled {kind} in {seconds:.1f} s")
            return compiled[shapes](*args)

        return run

    def replicate(self, tree: Any) -> Any:
        """A copy on every device (leading axis), or the tree itself on one."""
        if self.n == 1:
            # Copies that are bound to no device, also of what a checkpoint restored: else a
            # resumed run would be another program, compiled again.
            return jax.tree.map(lambda x: jax.numpy.array(np.asarray(x)), tree)
        return jax.tree.map(
            lambda x: np.broadcast_to(np.asarray(x)[None], (self.n, *np.shape(x))), tree
        )

    def first(self, tree: Any) -> Any:
        """The first device's copy."""
        return tree if self.n == 1 else jax.tree.map(lambda x: x[0], tree)

    def stack(self, batches: Sequence[Any]) -> Any:
        """One batch per device, stacked."""
        if self.n == 1:
            return batches[0]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
