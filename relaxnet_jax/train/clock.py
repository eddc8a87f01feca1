"""The clock of a run and requests to stop it, which must be the same on all processes."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import numpy as np

from relaxnet_jax.train.parallel import Devices


class Clock:
    """Context manager that times a run and notes whether any of its processes received SIGTERM.

    Within the context, SIGTERM, which batch systems send some time before they kill, only sets `stop`.

    Attributes:
      seconds: duration of the run on process 0, as last read.
      stop: whether any process had received SIGTERM, as last read.
    """

    def __init__(self, devices: Devices, elapsed: float) -> None:
        self.seconds, self.stop = elapsed, False
        self._devices, self._start = devices, time.perf_counter() - elapsed
        self._told = False
        self._before: Any = None

    def __enter__(self) -> Clock:
        # Python allows signal handlers to be set in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _tell(self, *_: object) -> None:
        self._told = True

    def tick(self) -> None:
        """Reads the clock; all processes must call this together."""
        self.read(self.ask())

    def ask(self) -> Any:
        """Starts the exchange that `read` completes; processes need not wait for it in between."""
        if self._devices.hosts.count == 1:
            return None
        # Integers, since their sums are exact; 32 bits of milliseconds are 24 days.
        mine = [1000 * self._now() if self._devices.hosts.first else 0, self._told]
        return self._devices.add(np.array(mine, np.int32))

    def read(self, asked: Any) -> None:
        """Sets ``seconds`` and ``stop`` as of the call of `ask`, or as of now for a single process."""
        if self._devices.hosts.count == 1:
            self.seconds, self.stop = self._now(), self._told
            return
        total = self._devices.first(asked)
        self.seconds, self.stop = float(total[0]) / 1000, bool(total[1])

    def _now(self) -> float:
        return time.perf_counter() - self._start
