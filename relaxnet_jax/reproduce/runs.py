"""A training run that experiments need: its configuration, its folder, how far it is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from relaxnet_jax.config import Config, from_json, to_dict
from relaxnet_jax.data.files import atomic_path
from relaxnet_jax.errors import InputError
from relaxnet_jax.train.checkpoint import has_checkpoint

State = Literal["missing", "interrupted", "finished"]

# What says where data lie or how a run is watched, not what is computed. The time a run gets is
# divided anew for every command, so a finished run serves whatever it got; its facts say how much.
_NOT_IN_DIGEST = {
    "data": ("path", "split_file"),
    "train": (
        *("max_minutes", "tensorboard", "checkpoint_every", "checkpoint_minutes"),
        "start_from",
    ),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, identified by its digest.

    Attributes:
      name: for people. config: without a time limit. weight: its share of the budget.
      digest: hash of configuration, data, splits and start, when the run was first wanted.
      relaxations: in its training split, those that cannot be used included.
    """

    name: str
    config: Config
    weight: float
    digest: str
    relaxations: int


def digest_of(config: Config, data: str, split: str, start: str = "") -> str:
    """16 hexadecimal digits of everything a run's result depends on.

    Args:
      data: checksum of the store. split: hash of the file of splits, empty without one.
      start: checksum of the model it begins with, empty without one.
    """
    return _digest(to_dict(config), data, split, start)


def _digest(fields: Mapping[str, Any], data: str, split: str, start: str) -> str:
    """Of a configuration's fields, today's or those it had when it was written."""
    text = json.dumps([_computed(fields), data, split, start], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _computed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say what is computed."""
    return {
        section: {k: v for k, v in own.items() if k not in _NOT_IN_DIGEST.get(section, ())}
        for section, own in fields.items()
        if section != "name"
    }


class FinishedRuns:
    """Finished runs of a report's folder, found again also after the configuration got new fields.

    A new field changes every digest, but no run where its default is what was done before. So a
    run is the one wanted if its config.json, read with today's defaults for the fields it lacks,
    is the wanted configuration, and if its folder has the digest of config.json as it stands with
    the wanted data, splits and start. A value that differs in either is never passed over.
    """

    def __init__(self, out: Path) -> None:
        """Reads the configurations, and nothing else, of the runs in ``out``."""
        self._found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for folder in sorted((out / "runs").glob("*")):
            if state_of(folder) != "finished":
                continue
            file = folder / "config.json"
            try:
                text = file.read_text()
                key = _key(from_json(text, str(file)))
            except (OSError, InputError):  # another version's, with fields this one lacks
                continue
            self._found.setdefault(key, []).append((folder.name, json.loads(text)))

    def digest(self, config: Config, data: str, split: str, start: str = "") -> str:
        """`digest_of`, or what it was when the run was trained, if only that is there."""
        own, found = digest_of(config, data, split, start), self._found.get(_key(config), ())
        kept = [name for name, fields in found if name == _digest(fields, data, split, start)]
        return kept[0] if kept and own not in kept else own


def _key(config: Config) -> str:
    return json.dumps(_computed(to_dict(config)), sort_keys=True)


def folder_of(out: Path, run: Run) -> Path:
    """The run's workdir."""
    return out / "runs" / run.digest


def state_of(folder: Path) -> State:
    """Whether a run is still to be trained, to be gone on with, or done."""
    if (folder / "finished.json").is_file() and (folder / "model").is_dir():
        return "finished"
    return "interrupted" if has_checkpoint(folder) else "missing"


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Marks a run as finished."""
    with atomic_path(folder / "finished.json") as temporary:
        temporary.write_text(json.dumps(facts, indent=1))


def read_facts(folder: Path) -> dict[str, Any]:
    """What is known of a finished run: minutes, epochs, reason, machine."""
    return _json(folder / "finished.json")


def read_epochs(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's epochs (``metrics.jsonl``); a line that a kill cut short is none."""
    records = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: missing or damaged ({type(error).__name__}): delete its folder to train anew"
        ) from None
