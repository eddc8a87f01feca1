"""What the processes of test_parts do: apart, since each imports the module it comes from."""

import os
import signal
from pathlib import Path

from relaxnet_jax.data import SkippedRelaxation
from relaxnet_jax.data.import_tasks import read_files
from relaxnet_jax.data.parts import Mark
from relaxnet_jax.errors import InputError


def work(task):
    """Yields relaxation ``k``, one left out, and a mark; or does what ``task`` says."""
    calls, k, fault = task
    with open(Path(calls) / f"{k}", "a") as file:
        file.write("x")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "raise":
        raise RuntimeError("no\nluck")
    if fault != "empty":
        from test_data_store import random_trajectory

        yield random_trajectory(k)
    yield SkippedRelaxation(f"left-{k}", "why")
    yield Mark("end", "ä")
    if fault == "refuse":
        raise InputError("x: bad: mend it")


def deadly(task):
    """`read_files`, but a .db file ends the process."""
    if any(file.path.endswith(".db") for file in task.files):
        os.kill(os.getpid(), signal.SIGKILL)
    yield from read_files(task)
