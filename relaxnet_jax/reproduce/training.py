"""Trains the runs of a plan that are not finished."""

from __future__ import annotations

import dataclasses
import datetime
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from relaxnet_jax import programs
from relaxnet_jax.benchmark.machine import describe
from relaxnet_jax.config import from_json, to_json
from relaxnet_jax.data.files import write_text
from relaxnet_jax.reproduce.plan import Entry
from relaxnet_jax.reproduce.runs import folder_of, read_epochs, state_of, write_facts
from relaxnet_jax.train.loop import train
from relaxnet_jax.train.report import ConsoleReport

SHOWN = 12  # digits kept of the code's digest


class StoppedError(Exception):
    """SIGTERM was received: the run has ended, or written a checkpoint for the same command to resume."""


def train_entry(
    entry: Entry, out: Path, report: ConsoleReport | None = None, devices: int | None = None
) -> None:
    """Trains or resumes a run of a plan, and marks it as finished.

    Raises:
      StoppedError: SIGTERM was received.
      InputError: see `train.loop.train`.
    """
    folder = folder_of(out, entry.run)
    state = state_of(folder)
    if state == "finished":
        return
    assert entry.minutes is not None and entry.minutes > 0
    t = dataclasses.replace(entry.run.config.train, max_minutes=entry.minutes)
    config = dataclasses.replace(entry.run.config, train=t)
    if state == "missing" and folder.exists():
        shutil.rmtree(folder)  # killed before its first checkpoint
    if state == "interrupted":
        # Data and report may have moved since then; the time limit stays as it was given.
        file = folder / "config.json"
        limit = from_json(file.read_text(), str(file)).train.max_minutes
        config = dataclasses.replace(config, train=dataclasses.replace(t, max_minutes=limit))
        write_text(file, to_json(config))
    result = train(config, folder, resume=state == "interrupted", report=report, devices=devices)
    if result.stopped:
        raise StoppedError
    epochs = read_epochs(folder)
    facts: dict[str, Any] = {
        "name": entry.run.name,
        "minutes": epochs[-1]["seconds"] / 60,
        "limit": config.train.max_minutes,
        "epochs": result.epochs,
        "reason": result.reason,
        "ended": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": describe(),
        "code": programs.CODE[:SHOWN],
    }
    write_facts(folder, facts)
    if result.told:  # too late to stop this run
        raise StoppedError


def train_all(
    entries: list[Entry], out: Path, say: Callable[[str], None], report: ConsoleReport | None = None
) -> None:
    """Trains the unfinished entries one after the other."""
    entries = [e for e in entries if state_of(folder_of(out, e.run)) != "finished"]
    for number, entry in enumerate(entries, 1):
        say(f"[{number}/{len(entries)}] {entry.run.name}: {entry.minutes:.2f} min")
        train_entry(entry, out, report)
        jax.clear_caches()  # compiled programs of the finished run
