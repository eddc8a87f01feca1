"""The clock of a run and requests to stop it, which must be the same on all processes."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from relaxnet_jax.train.parallel import Devices


class Clock:
    """Context manager that times a run and notes requests to stop it.

    Within the context, SIGTERM, which batch systems send some time before they kill, only sets `stop`.
    So does the first Ctrl-C, for a single process that does not handle SIGINT itself; the next one
    raises KeyboardInterrupt at once.

    Attributes:
      seconds: duration of the run on process 0, as last read.
      stop: whether any process had been told to stop, as last read.
      told: whether this process has been told to stop.
      interrupted: whether that was by Ctrl-C.
    """

    def __init__(
        self, devices: Devices, elapsed: float, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self.seconds, self.stop = elapsed, False
        self.told = self.interrupted = False
        self._devices, self._start = devices, time.perf_counter() - elapsed
        self._say = say
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Clock:
        # Python allows signal handlers to be set in the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._tell)
            alone = self._devices.hosts.count == 1
            if alone and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # it was set by other than Python
                signal.signal(number, handler)

    def _tell(self, *_: object) -> None:
        self.told = True

    def _interrupt(self, *_: object) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.told = self.interrupted = True
        # The signal may come in the middle of another print, or have ended what reads them.
        with contextlib.suppress(Exception, SystemExit):
            self._say("stopping with a checkpoint; Ctrl-C again to stop at once")

    def tick(self) -> None:
        """Reads the clock; all processes must call this together."""
        self.read(self.ask())

    def ask(self) -> Any:
        """Starts the exchange that `read` completes; processes need not wait for it in between."""
        if self._devices.hosts.count == 1:
            return None
        # Integers, since their sums are exact; 32 bits of milliseconds alone would be 24 days.
        seconds, rest = divmod(self._now() if self._devices.hosts.first else 0.0, 1.0)
        return self._devices.add(np.array([seconds, 1000 * rest, self.told], np.int32))

    def read(self, asked: Any) -> None:
        """Sets ``seconds`` and ``stop`` as of the call of `ask`, or as of now for a single process."""
        if self._devices.hosts.count == 1:
            self.seconds, self.stop = self._now(), self.told
            return
        total = self._devices.first(asked)
        self.seconds, self.stop = float(total[0]) + float(total[1]) / 1000, bool(total[2])

    def _now(self) -> float:
        return time.perf_counter() - self._start
