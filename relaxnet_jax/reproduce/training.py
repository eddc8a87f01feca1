"""Trains what a plan says is missing."""

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
from relaxnet_jax.reproduce.plan import Entry
from relaxnet_jax.reproduce.runs import folder_of, read_epochs, state_of, write_facts
from relaxnet_jax.train.loop import train
from relaxnet_jax.train.report import ConsoleReport

SHOWN = 12  # digits of the digest of the code


class StoppedError(Exception):
    """SIGTERM came: the run has written a checkpoint, and the same command goes on there."""


def train_entry(
    entry: Entry, out: Path, report: ConsoleReport | None = None, devices: int | None = None
) -> None:
    """Trains a run of a plan, or goes on with it, and marks it as finished.

    Raises:
      StoppedError: see there. InputError: see `train.loop.train`.
    """
    folder = folder_of(out, entry.run)
    state = state_of(folder)
    if state == "finished":
        return
    assert entry.minutes is not None and entry.minutes > 0
    t = dataclasses.replace(entry.run.config.train, max_minutes=entry.minutes)
    config = dataclasses.replace(entry.run.config, train=t)
    if state == "missing" and folder.exists():
        shutil.rmtree(folder)  # it was killed before its first checkpoint
    if state == "interrupted":
        # The data and the report may have moved since; its time is what it was promised.
        file = folder / "config.json"
        limit = from_json(file.read_text(), str(file)).train.max_minutes
        config = dataclasses.replace(config, train=dataclasses.replace(t, max_minutes=limit))
        file.write_text(to_json(config))
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


def train_all(
    entries: list[Entry], out: Path, say: Callable[[str], None], report: ConsoleReport | None = None
) -> None:
    """Trains those that are not finished, one after the other."""
    entries = [e for e in entries if state_of(folder_of(out, e.run)) != "finished"]
    for number, entry in enumerate(entries, 1):
        say(f"[{number}/{len(entries)}] {entry.run.name}: {entry.minutes:.2f} min")
        train_entry(entry, out, report)
        jax.clear_caches()  # the programs of a run that is over
