"""Checks that a run may start or resume in a folder, and together with other processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from relaxnet_jax.config import Config, from_json, to_dict, to_json
from relaxnet_jax.data.dataset import Dataset
from relaxnet_jax.data.split_file import RECORD
from relaxnet_jax.errors import InputError
from relaxnet_jax.train.beginning import FILE, Beginning
from relaxnet_jax.train.checkpoint import LATEST, MODEL, has_checkpoint
from relaxnet_jax.train.data import TrainingData
from relaxnet_jax.train.hosts import Hosts
from relaxnet_jax.train.report import METRICS

# Fields that may differ when a run is resumed: they say when to stop, not what is computed.
RESUMABLE = (
    "epochs",
    "max_minutes",
    "cooldown",
    "early_stop_patience",
    "tensorboard",
    "checkpoint_every",
    "checkpoint_minutes",
)
# Likewise for the data, which are identified by their checksum and the record of the splits.
MOVABLE = ("path", "split_file")


def check_workdir(config: Config, workdir: Path, resume: bool) -> None:
    """Raises InputError if a new run would overwrite anything, or there is none of this config to resume."""
    file = workdir / "config.json"
    if not resume:
        _check_new(workdir, file)
        return
    if not file.exists():
        raise InputError(
            f"{workdir}: holds no run to resume (config.json is missing); start without --resume"
        )
    theirs, ours = to_dict(from_json(file.read_text(), str(file))), to_dict(config)
    for part in (theirs, ours):
        for field in RESUMABLE:
            part["train"].pop(field)
        if (workdir / FILE).exists():
            for field in MOVABLE:
                part["data"].pop(field)
    if difference := _difference(theirs, ours):
        raise InputError(
            f"{workdir}: is a run of another config ({difference}); resume with its own config or "
            "give another --workdir"
        )


def _check_new(workdir: Path, config: Path) -> None:
    """Raises InputError if the workdir holds a run or what is not of a run.

    A run that never reached a checkpoint left nothing worth keeping and may be replaced.
    """
    held = (workdir / MODEL).exists() or has_checkpoint(workdir)
    if config.exists() and held:
        raise InputError(
            f"{workdir}: already holds a run; continue it with --resume or give another --workdir"
        )
    if (workdir / "model.json").exists():
        raise InputError(f"{workdir}: is a model folder; give another --workdir")
    if not config.exists():  # a run writes it first
        others: list[str | Path] = [
            MODEL,
            RECORD,
            FILE,
            METRICS,
            *([LATEST] if has_checkpoint(workdir) else []),
        ]
        if found := [name for name in others if (workdir / name).exists()]:
            raise InputError(
                f"{workdir / found[0]}: exists, without the config.json of a run; give another "
                "--workdir, or move it away"
            )
    else:
        try:
            from_json(config.read_text(), str(config))
        except (InputError, OSError, ValueError):
            raise InputError(
                f"{config}: is not of a run, or of another version's, and would be overwritten; give "
                "another --workdir"
            ) from None


def check_same_splits(config: Config, dataset: Dataset, file: Path) -> None:
    """Raises InputError unless the relaxations and their splits are those the run began with.

    Otherwise it could train on what it is tested on.
    """
    try:
        before = {i: name for name, ids in json.loads(file.read_text()).items() for i in ids}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"{file}: missing or damaged ({type(error).__name__}): the run cannot be resumed; start "
            "in another --workdir"
        ) from None
    now = {i: name for name, ids in dataset.ids().items() for i in ids}
    for i in (*now, *before):
        if now.get(i) != before.get(i):
            raise InputError(
                f"{config.data.path}: its relaxations or their splits have changed since the run began "
                f"({i} was in {before.get(i, 'none')} by {file}, is in {now.get(i, 'none')}): resume with the "
                "data it had, or start in another --workdir (train.start_from takes its parameters)"
            )


def check_same_content(config: Config, dataset: Dataset, began: Beginning) -> None:
    """Raises InputError if relaxations have changed under the same ids since the run began."""
    if not began.had(config.data.path, dataset.trajectories.store.checksum):
        raise InputError(
            f"{config.data.path}: its content has changed since the run began (by its checksum): resume "
            "with the data it had, or start in another --workdir (train.start_from takes its parameters)"
        )


def _difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """The first field in which two configs differ, in words; empty if there is none."""
    for section in (name for name in ours if name != "name"):
        for field, value in ours[section].items():
            if value != theirs[section][field]:
                return f"{section}.{field} is {theirs[section][field]!r} there, {value!r} here"
    return ""


def check_same_config(config: Config, hosts: Hosts) -> None:
    """Raises InputError if this process was given another config than process 0."""
    theirs = json.loads(hosts.share(to_json(config)))
    if difference := _difference(theirs, json.loads(to_json(config))):
        raise InputError(
            f"train: process {hosts.index} has another config than process 0 ({difference}); start "
            "all with the same --config and --set"
        )


def check_same_data(data: TrainingData, config: Config, hosts: Hosts) -> None:
    """Raises InputError if this process found other data than process 0.

    Every process plans the epochs by itself, and the plans must be the same.
    """
    digest = data.digest
    if digest != hosts.share(digest):
        raise InputError(
            f"{config.data.path}: process {hosts.index} found other relaxations than process 0; give "
            "all the same file and the same version of relaxnet_jax"
        )
