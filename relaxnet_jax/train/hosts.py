"""Several processes: how they find each other, agree on things, and end together.

Under SLURM, JAX's own detection reads everything from environment variables; elsewhere, three
options of ``relaxnet-jax train`` give it. A single process waits for nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax

from relaxnet_jax.console import note
from relaxnet_jax.errors import InputError

T = TypeVar("T")

JOIN_SECONDS = 300.0  # for all processes to start and find each other
HEARTBEAT_SECONDS = 60  # a process silent for this long is lost; JAX then ends the others
WAIT_MS = 7 * 24 * 3600 * 1000  # for one another; a lost process ends the wait earlier
POLL_SECONDS = 0.5  # between checks for the message of a failed process
FAILED = "relaxnet_jax/failed"
# Matches errors of JAX that are caused by another process.
_LOST = re.compile(
    r"gloo|nccl|connection (closed|reset)|coordination ?service|heartbeat|barrier", re.I
)


@dataclasses.dataclass(frozen=True)
class Place:
    """One process among several.

    Attributes:
      coordinator: HOST:PORT at which process 0 serves the others.
      count: number of processes.
      index: index of this process.
      local_devices: ids of the GPUs this process takes, None for all it sees.
    """

    coordinator: str
    count: int
    index: int
    local_devices: tuple[int, ...] | None = None


def find_place(
    coordinator: str | None,
    processes: int | None,
    process_id: int | None,
    environment: Mapping[str, str] = os.environ,
) -> Place | None:
    """This process's place, from the options if given, else from SLURM; None for a single process.

    ``processes=1`` without the other options means a single process, even under SLURM.

    Raises:
      InputError: only some of the options are given, or they are inconsistent.
    """
    options = {"--coordinator": coordinator, "--processes": processes, "--process-id": process_id}
    given = [name for name, value in options.items() if value is not None]
    if not given:
        return _slurm_place(environment)
    if given == ["--processes"] and processes == 1:
        return None
    if coordinator is None or processes is None or process_id is None:
        missing = " and ".join(name for name in options if name not in given)
        raise InputError(
            f"train: {missing} missing beside {' and '.join(given)}; give --coordinator HOST:PORT, "
            "--processes N and --process-id I to each process (or none of them under SLURM)"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(
            f"--coordinator {coordinator}: give HOST:PORT, the host of process 0 and a free port "
            "there, e.g. node01:29400"
        )
    if processes < 1 or not 0 <= process_id < processes:
        raise InputError(
            f"--process-id {process_id}: of --processes {processes}; number them from 0 to "
            f"{max(processes - 1, 0)}"
        )
    return Place(coordinator, processes, process_id) if processes > 1 else None


def _slurm_place(environment: Mapping[str, str]) -> Place | None:
    """This process's place among the tasks of an ``srun``; None for a single one."""
    from jax._src.clusters.slurm_cluster import SlurmCluster

    if not SlurmCluster.is_env_present() or SlurmCluster.get_process_count() == 1:
        return None
    address = SlurmCluster.get_coordinator_address(
        timeout_secs=None, override_coordinator_port=environment.get("JAX_COORDINATOR_PORT")
    )
    count, index = SlurmCluster.get_process_count(), SlurmCluster.get_process_id()
    return Place(address, count, index, _slurm_devices(count, environment))


def _slurm_devices(count: int, environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """The one GPU of a task that shares a node with others; None if all visible ones are its own."""
    alone = count == int(environment.get("SLURM_STEP_NUM_NODES", 0))
    bound = len(environment.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1
    return None if alone or bound else (int(environment["SLURM_LOCALID"]),)


@contextlib.contextmanager
def joined(place: Place | None, seconds: float = JOIN_SECONDS) -> Iterator[None]:
    """Joins the other processes; an error in one of them ends all, each reporting the reason.

    With several processes, errors do not propagate out of this context: they are reported here and
    to the others, and the process exits (with status 2 for an `InputError`, 130 for an interrupt,
    else 1). Unwinding would wait for the others, which wait for this one in the next collective.

    Args:
      place: place of this process; with None the context does nothing.
      seconds: how long to wait for the others to join.

    Raises:
      InputError: process 0 cannot serve at its address, or another process cannot reach it.
    """
    if place is None:
        yield
        return
    end = time.monotonic() + seconds
    # JAX ends the process without an exception if it cannot serve or connect, so check first.
    if place.index == 0:
        _check_port(place.coordinator)
    else:
        _reach(place.coordinator, end, seconds)
    ended, together = threading.Event(), False
    try:
        _join(place, end, seconds)
        together = True
        threading.Thread(target=_watch, args=(place, ended), daemon=True).start()
        yield
        # No process leaves while another is at work: JAX would consider it lost.
        _client().wait_at_barrier("relaxnet_jax/end", WAIT_MS)
        ended.set()
    except BaseException as error:
        if _LOST.search(str(error)):
            time.sleep(4 * POLL_SECONDS)  # if the other one gave a reason, `_watch` exits first
        ended.set()
        _leave(place, error, together)


def _join(place: Place, end: float, seconds: float) -> None:
    # JAX's handler of SIGTERM would only take note; the training loop has its own.
    jax.config.update("jax_enable_preemption_service", False)
    errors: list[BaseException] = []

    def attempt() -> None:
        try:
            jax.distributed.initialize(
                coordinator_address=place.coordinator,
                num_processes=place.count,
                process_id=place.index,
                local_device_ids=place.local_devices,
                cluster_detection_method="deactivate",
                initialization_timeout=int(seconds) + 60,  # later than ours: it ends the process
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(max(end - time.monotonic(), 0.0))
    if errors:
        raise errors[0]
    if thread.is_alive():
        raise InputError(
            f"{place.coordinator}: not all of the {place.count} processes came within {seconds:g} s; "
            "start every one with the same --coordinator and --processes, or give more --join-seconds"
        )


def _check_port(coordinator: str) -> None:
    port = int(coordinator.rpartition(":")[2])
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except OSError as error:
        raise InputError(
            f"{coordinator}: process 0 cannot serve there ({os.strerror(error.errno or 0)}); choose another port"
        ) from None


def _reach(coordinator: str, end: float, seconds: float) -> None:
    host, _, port = coordinator.rpartition(":")
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2.0).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise InputError(
                    f"{coordinator}: no coordinator within {seconds:g} s ({error}); start process 0 "
                    "on that host, or give its address in --coordinator"
                ) from None
        time.sleep(0.2)


def _client() -> Any:
    """JAX's client of the coordinator, whose barriers and messages need no devices.

    There is no public way to obtain it yet; orbax uses the same private one.
    """
    from jax._src import distributed

    return distributed.global_state.client


def _watch(place: Place, ended: threading.Event) -> None:
    """Ends this process once another one has reported why it failed."""
    client = _client()
    while not ended.wait(POLL_SECONDS):
        try:
            told = json.loads(client.key_value_try_get(FAILED))
        except jax.errors.JaxRuntimeError:  # no process has failed
            continue
        if told["index"] != place.index and not ended.is_set():
            _say(place, f"stopped because of process {told['index']}: {told['reason']}")
            _exit(place, told["code"])


def _leave(place: Place, error: BaseException, together: bool) -> None:
    code = 1
    if isinstance(error, InputError):
        code, reason = 2, " ".join(str(error).split())
    elif isinstance(error, KeyboardInterrupt):
        code, reason = 130, "interrupted"
    else:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if _LOST.search(str(error)):
            reason = f"another process was lost ({reason[:500]}); continue with --resume"
        else:
            traceback.print_exception(error)
    _say(place, reason)
    if together:
        with contextlib.suppress(Exception):  # the coordinator may be the one that is lost
            told = {"index": place.index, "reason": reason, "code": code}
            _client().key_value_set(FAILED, json.dumps(told))
    _exit(place, code)


def _exit(place: Place, code: int) -> NoReturn:
    if place.index == 0:
        time.sleep(4 * POLL_SECONDS)  # process 0 serves the message to the others
    sys.stdout.flush()
    os._exit(code)


def _say(place: Place, text: str) -> None:
    note(f"relaxnet-jax: error: process {place.index} of {place.count}: {text}")


_calls = itertools.count()  # the same on all processes, which make the same calls


class Hosts:
    """The processes of a run, once they have joined. A single process never waits.

    All processes must call the same methods in the same order.

    Attributes:
      index: index of this process.
      count: number of processes.
      first: whether this is process 0, the one that writes and prints.
    """

    def __init__(self) -> None:
        self.index, self.count = jax.process_index(), jax.process_count()
        self.first = self.index == 0

    def share(self, value: T) -> T:
        """Returns the value that process 0 gave (anything JSON can hold)."""
        if self.count == 1:
            return value
        key = f"relaxnet_jax/shared/{next(_calls)}"
        if self.first:
            _client().key_value_set(key, json.dumps(value))
            return value
        return json.loads(_client().blocking_key_value_get(key, WAIT_MS))

    def wait(self) -> None:
        """Waits until all processes have called this."""
        if self.count > 1:
            _client().wait_at_barrier(f"relaxnet_jax/wait/{next(_calls)}", WAIT_MS)

    def in_turn(self, do: Callable[[], T]) -> T:
        """Calls ``do`` on process 0 and then on the others, which find in the cache what it made."""
        if not self.first:
            self.wait()
            return do()
        result = do()
        self.wait()
        return result
