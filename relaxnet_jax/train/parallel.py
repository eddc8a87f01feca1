"""One or more devices of one or more processes: the only module that knows where steps run.

Several devices use `jax.pmap`, which cannot trace diffrax's own differentiable loops: these mark
arrays with the mesh of the devices and treat a marked counter as of another type than an unmarked
one (patrick-kidger/diffrax#765). For that reason too, the RK4 solve is a plain scan, and the
adaptive solver runs on one device only.
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
    """Runs steps on the devices of all processes, one padded batch each; plain `jax.jit` on one.

    Attributes:
      n: number of devices of all processes.
      local: number of devices of this process.
      mine: slice of the n devices that belong to this process.
      hosts: the processes.
      axis: name of the axis a step must sum over; None on one device.
      compilations: number of compilations, by kind of step.
      compile_seconds: time spent on them.
      ahead: number of steps that may be launched before the metrics of the one before are collected.
        Without any, an accelerator would wait for the host between steps; a CPU is the host itself.
      loaders: number of threads that make this process's batches: more beside an accelerator, where
        the cores are not busy with the steps.
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
        if len({*counts}) > 1 or hosts.share(self.local) != self.local:  # pmap requires it
            raise InputError(
                f"--devices: process {hosts.index} takes {self.local} devices; the processes see "
                f"{counts}; each must see and take the same number (choose with CUDA_VISIBLE_DEVICES)"
            )
        # Process by process, the order pmap itself would use.
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
        """Returns the step as a function that is compiled once for each set of argument shapes.

        Args:
          step: pure function.
          kind: name of the step in the log.
          batched: for each argument, whether it has a leading axis of devices, as `replicate`
            and `stack` make it; the others must be the same on all processes.
          donate: indices of the arguments whose buffers may be reused.
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
                # The first collectives connect the devices: no process should be minutes late.
                self.hosts.wait()
                seconds = time.perf_counter() - start
                self.compilations[kind] = self.compilations.get(kind, 0) + 1
                self.compile_seconds += seconds
                self._log(f"compiled {kind} in {seconds:.1f} s")
            return compiled[shapes](*args)

        return run

    def replicate(self, tree: Any) -> Any:
        """Copies the tree to every device (leading axis); on a single device, without that axis."""
        if self.n == 1:
            # Copies that are not committed to a device, of restored checkpoints too: otherwise a
            # resumed run would be another program and compile again.
            return jax.device_put(jax.tree.map(np.array, tree))
        return self._put(
            jax.tree.map(
                lambda x: np.broadcast_to(np.asarray(x)[None], (self.local, *np.shape(x))), tree
            )
        )

    def first(self, tree: Any) -> Any:
        """The first of this process's copies of a tree."""
        if self.n == 1:
            return tree
        return jax.tree.map(lambda x: np.asarray(x.addressable_data(0))[0], tree)

    def stack(self, batches: Sequence[Any]) -> Any:
        """Stacks this process's batches, one per device, into arrays over the devices of all processes."""
        if self.n == 1:
            return batches[0]
        return self._put(jax.tree.map(lambda *leaves: np.stack(leaves), *batches))

    def total(self, tree: Any) -> Any:
        """Sums arrays, given by every process, over the processes (NumPy)."""
        return tree if self.hosts.count == 1 else self.first(self.add(tree))

    def add(self, tree: Any) -> Any:
        """Starts the sum of `total` on the devices, without waiting for it."""

        def on_first(x):
            rows = np.zeros((self.local, *np.shape(x)), np.asarray(x).dtype)
            rows[0] = x
            return rows

        return self._total(jax.tree.map(on_first, tree))

    def _put(self, tree: Any) -> Any:
        """Makes arrays over all devices, of which those given are this process's parts."""
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(self._sharding, x), tree
        )
