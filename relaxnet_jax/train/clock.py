"""The run's clock and the wish to stop: what decides, and so must be the same on all processes."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import numpy as np

from relaxnet_jax.train.parallel import Devices


class Clock:
    """Seconds of a run, and whether a process of it was sent SIGTERM. A context manager.

    Within the context SIGTERM, the notice a batch system gives before it kills, only sets `stop`.

    Attributes:
      seconds: process 0's, at the last `tick`. stop: whether any process was told to stop then.
    """

    def __init__(self, devices: Devices, elapsed: float) -> None:
        self.seconds, self.stop = elapsed, False
        self._devices, self._start = devices, time.perf_counter() - elapsed
        self._told = False
        self._before: Any = None

    def __enter__(self) -> Clock:
        # Python sets signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _tell(self, *_: object) -> None:
        self._told = True

    def tick(self) -> None:
        """Reads the clock; all processes together."""
        self.read(self.ask())

    def ask(self) -> Any:
        """What `read` takes, so that processes need not wait for one another in between."""
        if self._devices.hosts.count == 1:
            return None
        # Integers, since sums of them are exact; 32 bits of milliseconds are 24 days.
        mine = [1000 * self._now() if self._devices.hosts.first else 0, self._told]
        return self._devices.add(np.array(mine, np.int32))

    def read(self, asked: Any) -> None:
        """Sets what all processes said when they asked; of one process, what it says now."""
        if self._devices.hosts.count == 1:
            self.seconds, self.stop = self._now(), self._told
            return
        total = self._devices.first(asked)
        self.seconds, self.stop = float(total[0]) / 1000, bool(total[1])

    def _now(self) -> float:
        return time.perf_counter() - self._start
