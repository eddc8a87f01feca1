"""One device or several, of one process or several: the only place that knows where steps run.

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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from relaxnet_jax.errors import InputError
from relaxnet_jax.runtime import ONE_THREAD
from relaxnet_jax.train.hosts import Hosts

AXIS = "devices"


class Devices:
    """Runs steps on devices of all processes, one padded batch each; plain `jax.jit` on one.

    Attributes:
      n: number of devices, of all processes. local: of this one.
      mine: slice of the n devices that are this process's. hosts: the processes.
      axis: axis name the step must add over, None on one device.
      compilations: how many step functions were compiled, by kind.
      ahead: how many steps may be begun before the last one's metrics are there. An accelerator would
        wait for the host between two steps; a CPU is the host.
      loaders: threads that make this process's batches. A CPU's cores are busy with the steps, those
        beside an accelerator are not.
    """

    def __init__(
        self,
        local: int | None = None,
        log: Callable[[str], None] = lambda _: None,
        hosts: Hosts | None = None,
    ) -> None:
        self.hosts = hosts = hosts or Hosts()
        found = [jax.local_devices(process_index=p) for p in range(hosts.count)]
        counts = [len(devices) for devices in found]
        self.local = counts[hosts.index] if local is None else local
        if len({*counts}) > 1 or hosts.share(self.local) != self.local:  # pmap wants it so
            raise InputError(
                f"--devices: process {hosts.index} takes {self.local} devices; the processes see "
                f"{counts}; each must see and take the same number (choose with CUDA_VISIBLE_DEVICES)"
            )
        # Process by process, as pmap itself would have them.
        self._devices = [device for devices in found for device in devices[: self.local]]
        self.n = self.local * hosts.count
        self.mine = slice(self.local * hosts.index, self.local * (hosts.index + 1))
        self.axis = AXIS if self.n > 1 else None
        on_cpu = self._devices[0].platform == "cpu"
        self.ahead = 0 if on_cpu else 1
        self.loaders = self.local * (1 if on_cpu else 4)
        self._options = ONE_THREAD if on_cpu and self.local > 1 else None
        self.compilations: dict[str, int] = {}
        self.compile_seconds = 0.0
        self._log = log
        self._sharding = NamedSharding(Mesh(np.array(self._devices), (AXIS,)), PartitionSpec(AXIS))
        self._total = jax.pmap(
            lambda x: jax.lax.psum(x, AXIS), axis_name=AXIS, devices=self._devices
        )

    def compile(
        self, step: Callable, kind: str, batched: tuple[bool, ...], donate: tuple[int, ...] = ()
    ) -> Callable:
        """The step, compiled once for each shape of its arguments.

        Args:
          step: pure function. kind: its name in the log.
          batched: for each argument, whether it has a leading axis of devices, as `replicate`
            and `stack` make it; the others must be the same on all processes.
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
                devices=self._devices,
            )
        compiled: dict[Hashable, Any] = {}

        def run(*args):
            shapes = tuple(np.shape(x) for x in jax.tree.leaves(args))
            if shapes not in compiled:
                start = time.perf_counter()
                self._log(f"compiling {kind}…")
                compiled[shapes] = transformed.lower(*args).compile(self._options)
                # The first collectives connect the devices: nobody should come minutes late.
                self.hosts.wait()
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
            return jax.device_put(jax.tree.map(np.array, tree))
        return self._put(
            jax.tree.map(
                lambda x: np.broadcast_to(np.asarray(x)[None], (self.local, *np.shape(x))), tree
            )
        )

    def first(self, tree: Any) -> Any:
        """This process's first copy."""
        if self.n == 1:
            return tree
        return jax.tree.map(lambda x: np.asarray(x.addressable_data(0))[0], tree)

    def stack(self, batches: Sequence[Any]) -> Any:
        """One batch per device of this process, stacked; on all devices of all processes."""
        if self.n == 1:
            return batches[0]
        return self._put(jax.tree.map(lambda *leaves: np.stack(leaves), *batches))

    def total(self, tree: Any) -> Any:
        """Sums over the processes of arrays every one of them gives (NumPy)."""
        return tree if self.hosts.count == 1 else self.first(self.add(tree))

    def add(self, tree: Any) -> Any:
        """`total` on the devices: begun, and not waited for."""

        def on_first(x):
            rows = np.zeros((self.local, *np.shape(x)), np.asarray(x).dtype)
            rows[0] = x
            return rows

        return self._total(jax.tree.map(on_first, tree))

    def _put(self, tree: Any) -> Any:
        """Arrays of this process's devices as parts of arrays over all devices."""
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(self._sharding, x), tree
        )
