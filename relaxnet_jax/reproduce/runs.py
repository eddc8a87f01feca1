"""A training run that experiments need: its configuration, its folder and its progress."""

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

# Fields that say where data lie or how a run is monitored, not what is computed. The time limit is
# one of them: every command divides its time anew, so a finished run is reused whatever time it
# had; its facts record how much. `digest_of` takes the checksum of ``start_from`` instead.
_NOT_IN_DIGEST = {
    "data": ("path", "split_file"),
    "train": (
        *("max_minutes", "tensorboard", "checkpoint_every", "checkpoint_minutes"),
        "start_from",
    ),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run, identified by its digest.

    Attributes:
      name: label for people.
      config: the configuration, without a time limit.
      weight: the run's share of the budget, relative to other runs.
      digest: hash of configuration, data, splits and start, as it was when the run was first
        requested.
      relaxations: size of its training split, including relaxations that cannot be used.
    """

    name: str
    config: Config
    weight: float
    digest: str
    relaxations: int


def digest_of(config: Config, data: str, split: str, start: str = "") -> str:
    """16 hexadecimal digits that identify everything a run's result depends on.

    Args:
      config: its name and the fields in `_NOT_IN_DIGEST` are ignored.
      data: checksum of the store.
      split: hash of the split file; empty without one.
      start: checksum of the model that training starts from; empty without one.
    """
    return _digest(to_dict(config), data, split, start)


def _digest(fields: Mapping[str, Any], data: str, split: str, start: str) -> str:
    """`digest_of` for a configuration's fields, today's or those it had when it was written."""
    text = json.dumps([_computed(fields), data, split, start], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _computed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that determine what is computed."""
    return {
        section: {k: v for k, v in own.items() if k not in _NOT_IN_DIGEST.get(section, ())}
        for section, own in fields.items()
        if section != "name"
    }


class FinishedRuns:
    """Finished runs in a report's folder, found even if the configuration has gained fields since.
    A new field changes every digest, but not the runs for which its default is the earlier
    behaviour. A run is therefore the one wanted if its config.json, completed with today's
    defaults, equals the wanted configuration, and if its folder is named by the digest of
    config.json as it stands with the wanted data, splits and start. No differing value is ever
    ignored in either.
    """

    def __init__(self, out: Path) -> None:
        """Reads the configurations of the finished runs in ``out``, and nothing else."""
        self._found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for folder in sorted((out / "runs").glob("*")):
            if state_of(folder) != "finished":
                continue
            file = folder / "config.json"
            try:
                text = file.read_text()
                key = _key(from_json(text, str(file)))
            except (OSError, InputError):  # another version's, with fields unknown here
                continue
            self._found.setdefault(key, []).append((folder.name, json.loads(text)))

    def digest(self, config: Config, data: str, split: str, start: str = "") -> str:
        """`digest_of`, or the digest under which the run was trained if only that one is there."""
        own, found = digest_of(config, data, split, start), self._found.get(_key(config), ())
        kept = [name for name, fields in found if name == _digest(fields, data, split, start)]
        return kept[0] if kept and own not in kept else own


def _key(config: Config) -> str:
    return json.dumps(_computed(to_dict(config)), sort_keys=True)


def folder_of(out: Path, run: Run) -> Path:
    """The run's workdir."""
    return out / "runs" / run.digest


def state_of(folder: Path) -> State:
    """Whether a run is missing, interrupted (to be resumed) or finished."""
    if (folder / "finished.json").is_file() and (folder / "model").is_dir():
        return "finished"
    return "interrupted" if has_checkpoint(folder) else "missing"


def write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Writes a run's facts, which marks it as finished."""
    with atomic_path(folder / "finished.json") as temporary:
        temporary.write_text(json.dumps(facts, indent=1))


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts of a finished run, such as minutes, epochs, reason for ending and machine."""
    return _json(folder / "finished.json")


def read_epochs(folder: Path) -> list[dict[str, Any]]:
    """The epoch records of a run (``metrics.jsonl``), without lines cut short by a kill."""
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
            f"{path}: missing or damaged ({type(error).__name__}); delete its folder to train again"
        ) from None
