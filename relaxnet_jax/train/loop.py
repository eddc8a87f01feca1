"""`train`: prepares a folder and the data, trains, and explains errors that have a way out."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
from pathlib import Path

import jax

from relaxnet_jax.config import Config, load_config, to_json
from relaxnet_jax.console import q
from relaxnet_jax.data.dataset import load_dataset
from relaxnet_jax.data.files import held, no_space, restore_folder, write_text
from relaxnet_jax.data.split_file import RECORD
from relaxnet_jax.errors import InputError
from relaxnet_jax.memory import ERRORS, out_of_memory
from relaxnet_jax.train.beginning import Beginning, read_beginning
from relaxnet_jax.train.checkpoint import MODEL, has_checkpoint
from relaxnet_jax.train.checks import (
    check_same_config,
    check_same_content,
    check_same_splits,
    check_workdir,
)
from relaxnet_jax.train.epochs import Epochs, Result
from relaxnet_jax.train.hosts import Hosts
from relaxnet_jax.train.parallel import Devices
from relaxnet_jax.train.report import ConsoleReport
from relaxnet_jax.train.run import Run


def train(
    config: Config | str,
    workdir: str | Path,
    resume: bool = False,
    report: ConsoleReport | None = None,
    devices: int | None = None,
    shares: int = 1,
) -> Result:
    """Trains a model and leaves the best one in ``workdir/model``.

    With several processes (see `hosts`), all call it with the same arguments. Each feeds its own
    devices, and only process 0 writes, prints and reads checkpoints.

    Args:
      config: the complete configuration of the run, or the name of one (`load_config`).
      workdir: holds config.json, splits.json, metrics.jsonl, checkpoints/ and model/.
      resume: continue the run in ``workdir`` exactly from its latest checkpoint. The number of devices
        may have changed: each relaxation is still visited once per epoch.
      report: receives the progress; by default it is shown on the terminal.
      devices: number of local devices, all by default.
      shares: number of parts into which a batch of ``train.batch_size`` is divided, one per device, so
        that a step covers as many structures as on one device (`runtime.batch_shares`).

    Raises:
      InputError: the data or the configuration are unusable; batches do not fit in a device's memory;
        the workdir holds a run, or other files that a run would replace, although ``resume`` is off,
        or a run of another configuration or other data although it is on; another process trains in
        the workdir; or processes have different configurations or data.
      KeyboardInterrupt: Ctrl-C was pressed. The first press ends the run with a checkpoint, as SIGTERM
        does; the second ends it at once.
    """
    config = config if isinstance(config, Config) else load_config(config)
    hosts = Hosts()
    report = (report or ConsoleReport()) if hosts.first else ConsoleReport.silent()
    workdir = Path(workdir)
    with held(workdir, "train", "--workdir") if hosts.first else contextlib.nullcontext():
        return _train(config, workdir, resume, report, devices, shares, hosts)


def _train(
    config: Config,
    workdir: Path,
    resume: bool,
    report: ConsoleReport,
    devices: int | None,
    shares: int,
    hosts: Hosts,
) -> Result:
    """`train`, in a folder that this process holds."""
    if hosts.first:
        check_workdir(config, workdir, resume)
    check_same_config(config, hosts)
    if config.train.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise InputError(
            "train.tensorboard: tensorboardX is not installed; pip install 'relaxnet-jax[tensorboard]'"
        )
    dataset = hosts.in_turn(lambda: load_dataset(config, report))
    began = read_beginning(workdir) if resume and hosts.first else None
    if resume and hosts.first:
        restore_folder(workdir / MODEL)
        check_same_splits(config, dataset, workdir / RECORD)
        if began is not None:
            check_same_content(config, dataset, began)
    kept = hosts.share(None if began is None else dataclasses.asdict(began))
    began = None if kept is None else Beginning(**kept)
    run = Run(config, dataset, report, Devices(devices, report, hosts), shares, began)
    try:
        if hosts.first:
            _record(run, workdir, resume)
        return Epochs(run, workdir, resume).execute()
    except (OSError, ValueError) as error:
        if not no_space(error):
            raise
        then = "give --resume" if has_checkpoint(workdir) else "start again"
        raise InputError(f"{workdir}: no space left; free some and {then}") from error
    except ERRORS as error:
        if not out_of_memory(error):
            raise
        raise InputError(_does_not_fit(config, workdir)) from error


def _does_not_fit(config: Config, workdir: Path) -> str:
    """The error message for a step that needs more memory than there is.

    The batch size of a run cannot be changed when it is resumed.
    """
    size, changes = config.train.batch_size, ""
    if (workdir / MODEL).exists():
        changes = f"train.start_from={q(workdir)} "
    where = " in another --workdir" if has_checkpoint(workdir) else ""
    smaller = f"start again{where} with --set {changes}train.batch_size={size // 2}"
    if size == 1:
        smaller = "use a device with more memory, a smaller model, or smaller structures"
    return (
        f"{workdir}: a batch of train.batch_size={size} structures does not fit in the memory of one "
        f"device ({jax.local_devices()[0].device_kind}): {smaller}"
    )


def _record(run: Run, workdir: Path, resume: bool) -> None:
    """Records the configuration, the splits and the beginning of the run in its folder."""
    # For a resumed run too: when resumed again, it has the limits it was given last.
    write_text(workdir / "config.json", to_json(run.config))
    if not resume:
        write_text(workdir / RECORD, json.dumps(run.data.dataset.ids(), indent=1))
        run.beginning().write(workdir)


__all__ = ["Result", "train"]
