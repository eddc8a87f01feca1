"""The training loop: data, epochs, validation, checkpoints, the exported model."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from relaxnet_jax.config import Config, load_config, to_json
from relaxnet_jax.data.buckets import pack_epoch
from relaxnet_jax.data.dataset import Dataset, load_dataset
from relaxnet_jax.data.files import held, no_space, write_text
from relaxnet_jax.data.pipeline import epoch_iterator
from relaxnet_jax.data.split_file import RECORD
from relaxnet_jax.errors import InputError
from relaxnet_jax.memory import ERRORS, out_of_memory
from relaxnet_jax.model import RelaxNet, save_model
from relaxnet_jax.runtime import usable_cores
from relaxnet_jax.train.beginning import Beginning, read_beginning
from relaxnet_jax.train.checkpoint import Checkpoints, has_checkpoint
from relaxnet_jax.train.checks import (
    check_same_config,
    check_same_content,
    check_same_data,
    check_same_splits,
    check_workdir,
)
from relaxnet_jax.train.clock import Clock
from relaxnet_jax.train.data import prepare
from relaxnet_jax.train.hosts import Hosts
from relaxnet_jax.train.parallel import Devices
from relaxnet_jax.train.plan import Batches, remaining_runs
from relaxnet_jax.train.report import ConsoleReport, MetricsLog, model_score
from relaxnet_jax.train.start import (
    read_start,
    seen_by_start,
    start_facts,
    start_parameters,
)
from relaxnet_jax.train.state import (
    Cooling,
    Plateau,
    TrainState,
    cooling_factor,
    initial_train_state,
)
from relaxnet_jax.train.step import make_eval_step, make_train_step
from relaxnet_jax.train.tally import Tally, ValidationTally

# A run that cools down to its deadline ends with a settled model. That one is kept unless its
# validation loss, whose changes from epoch to epoch are mostly noise from a few structures, exceeds
# the best by more than this factor.
KEEP_LAST = 1.1


@dataclasses.dataclass
class Result:
    """The outcome of a run.

    Attributes:
      stopped: whether the run was stopped by SIGTERM; it can be resumed where it was.
    """

    workdir: Path
    model_folder: Path
    epochs: int
    best: float
    reason: str
    compilations: dict[str, int]
    stopped: bool = False


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
        the workdir holds a run although ``resume`` is off, or one of another configuration or other
        data although it is on; another process trains in the workdir; or processes have different
        configurations or data.
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
        check_same_splits(config, dataset, workdir / RECORD)
        if began is not None:
            check_same_content(config, dataset, began)
    kept = hosts.share(None if began is None else dataclasses.asdict(began))
    began = None if kept is None else Beginning(**kept)
    run = _Run(config, dataset, report, Devices(devices, report, hosts), shares, began)
    try:
        if hosts.first:
            _record(run, workdir, resume)
        return run.execute(workdir, resume)
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
    again = "start again"
    if has_checkpoint(workdir):
        again = (
            f"begin another --workdir with what this one learned, train.start_from={workdir}, and"
        )
    return (
        f"{workdir}: a batch of train.batch_size={config.train.batch_size} structures does not fit in the "
        f"memory of one device ({jax.local_devices()[0].device_kind}): {again} with fewer (--set "
        f"train.batch_size={max(1, config.train.batch_size // 2)})"
    )


def _record(run: _Run, workdir: Path, resume: bool) -> None:
    """Records the configuration, the splits and the beginning of the run in its folder."""
    # For a resumed run too: when resumed again, it has the limits it was given last.
    write_text(workdir / "config.json", to_json(run.config))
    if not resume:
        write_text(workdir / RECORD, json.dumps(run.data.dataset.ids(), indent=1))
        run.beginning().write(workdir)


class _Run:
    """Everything that does not change from epoch to epoch."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        report: ConsoleReport,
        devices: Devices,
        shares: int = 1,
        began: Beginning | None = None,
    ) -> None:
        self.config, self.report = config, report
        self.devices, self.hosts, self.shares = devices, devices.hosts, shares
        if self.devices.n > 1 and config.dynamics.solver != "rk4":
            raise InputError(
                f"dynamics.solver={config.dynamics.solver!r} runs on one device, not on "
                f"{self.devices.n}; give --devices 1 or dynamics.solver=rk4"
            )
        if shares > 1:
            report(f"{shares} cores share each batch")
        t = config.train
        if t.static_epochs >= t.epochs:
            report(
                f"train.static_epochs={t.static_epochs} of train.epochs={t.epochs}: the ODE is never "
                "trained; give more epochs, or fewer static ones"
            )
        for reason, count in dataset.left_out.items():
            report(f"{count} relaxations left out: {reason}")
        if began is None:
            self.start = read_start(config)
            self.start_facts = start_facts(config) | seen_by_start(config, dataset.ids(), report)
        else:  # the start's folder may have moved, or hold another model by now
            self.start, self.start_facts = None, began.start
        self.data = prepare(config, dataset, report, self.start, shares, self.hosts, began)
        self.data.tell(report)
        self.cooling = Cooling()
        self.unfit: set[int] = set()  # validation samples already reported as left out
        check_same_data(self.data, config, self.hosts)
        self.train_step, self.static_step = (
            self.devices.compile(
                make_train_step(config, self.data.scale, self.devices.axis, static, stored=True),
                "static training step" if static else "training step",
                (True, True, False, False),
                donate=(0,),
            )
            for static in (False, True)
        )
        self.eval_step = self.devices.compile(
            make_eval_step(config, self.data.scale, self.devices.axis, stored=True),
            "validation step",
            (True, True),
        )

    def beginning(self) -> Beginning:
        """What is fixed by the beginning of the run, for when it is resumed."""
        data = self.data
        return Beginning(
            data.dataset.trajectories.store.checksum,
            data.element_energies.tolist(),
            data.scale,
            self.start_facts,
        )

    def model(self, params: Any, validation: Mapping[str, float]) -> RelaxNet:
        """The model with these parameters, whose means on the validation split are ``validation``."""
        data = self.data
        statistics = {
            "data": data.dataset.name,
            "training_relaxations": data.relaxations,
            "later_starts": data.later_starts,
            "energy_scale_eV_per_atom": data.scale,
            "surroundings": data.surroundings(),
            "validation": model_score(validation, self.config),
        }
        return RelaxNet(
            params,
            data.element_energies,
            np.asarray(data.scale, np.float32),
            self.config,
            tuple(int(z) for z in np.flatnonzero(data.seen)),
            json.dumps(statistics | self.start_facts),
        )

    def export(self, params: Any, workdir: Path, validation: Mapping[str, float]) -> None:
        """Writes the model with these (replicated) parameters to ``workdir/model``; see `model`."""
        own = jax.device_get(self.devices.first(params))
        save_model(self.model(own, validation), workdir / "model")

    def _finite(self, params: Any) -> bool:
        leaves = jax.tree.leaves(jax.device_get(self.devices.first(params)))
        return all(np.isfinite(leaf).all() for leaf in leaves)

    def batches(
        self, split: str, seed: tuple[int, int] | None, done: list[list[int]]
    ) -> tuple[Iterator[tuple[list[int], Any]], int]:
        """Iterates over the steps an epoch has left.

        Args:
          split: name of the split.
          seed: seed of the order; None for the order of the data.
          done: see `plan.remaining_runs`.

        Returns:
          An iterator over (sample indices, batch over all devices) of each step, and the number of
          steps.
        """

        data, devices = self.data, self.devices

        def pack(members: np.ndarray, n: int, shares: int) -> Batches:
            rng = None if seed is None else np.random.default_rng(seed)
            buckets = data.buckets_of(shares, self.config)
            return pack_epoch(buckets, data.samples.sizes, rng, members, n)

        members = data.members[split]
        runs = remaining_runs(pack, members, devices.n, devices.mine, done, self.shares)

        def iterate() -> Iterator[tuple[list[int], Any]]:
            mine = [batch for run in runs for batch in run.mine]
            threads = min(devices.loaders, usable_cores())
            loaded = epoch_iterator(mine, data.samples, data.buckets, self.config, threads)
            for run in runs:
                parts = [batch for _, _, batch in itertools.islice(loaded, devices.local)]
                yield run.indices, devices.stack(parts)

        return iterate(), len(runs)

    def validate(self, params: Any) -> tuple[dict[str, float], int]:
        """Evaluates parameters on the validation split.

        Batches whose terms are not finite are left out; their structures are reported once.

        Returns:
          Means of the loss, its terms and the coordinate errors, and how many batches were left out:
          process 0's numbers on all processes, so that decisions based on them are the same everywhere.
        """
        tally, unfit = ValidationTally(), []
        iterator, _ = self.batches("validation", None, [])
        for indices, batch in iterator:
            if not tally.add(jax.device_get(self.devices.first(self.eval_step(params, batch)))):
                unfit += [i for i in indices if i not in self.unfit]
        if unfit:
            self.unfit.update(unfit)
            names = ", ".join(self.data.samples.id(i) for i in unfit)
            self.report(f"left out of the validation loss: not finite with one of {names}")
        return self.hosts.share((tally.means(self.config.loss), tally.skipped))

    def execute(self, workdir: Path, resume: bool) -> Result:
        """Trains until one of the run's ends is reached."""
        config, t, first_host = self.config, self.config.train, self.hosts.first
        state = initial_train_state(start_parameters(config, self.start, self.report), t)
        plateau, first, elapsed, tally = Plateau(), 0, 0.0, Tally()
        checkpoints = Checkpoints(workdir, fresh=not resume) if first_host else None
        if resume:
            state, progress = self._restore(state, checkpoints)
            plateau, first, elapsed = (
                Plateau(**progress["plateau"]),
                progress["epoch"] + 1,
                progress["seconds"],
            )
            plateau.best = math.inf if plateau.best is None else plateau.best
            tally = Tally(**progress["tally"])
            after = f"after epoch {progress['epoch']}"
            if tally.batches:
                after = f"within epoch {first}, after {tally.batches} batches"
            self.report(f"resuming {after}")
            self._tell_devices(progress["devices"], progress.get("shares", self.shares))
        log = MetricsLog(workdir, first - 1, t.tensorboard) if first_host else None
        parameters = sum(x.size for x in jax.tree.leaves(state.params))
        others = f" of {self.hosts.count} processes" if self.hosts.count > 1 else ""
        self.report(
            f"{parameters:,} parameters, {self.devices.n} device(s){others}: {jax.devices()[0].platform}"
        )
        state = self.devices.replicate(state)
        validated = first > 0 or plateau.best_epoch >= 0
        missing = not (workdir / "model").exists()
        if first_host and validated and missing:  # killed before the export
            self.export(state.ema if t.ema else state.params, workdir, {})
        clock, limit = Clock(self.devices, elapsed), 60 * t.max_minutes or math.inf
        reason, epoch, ended = "epochs", first - 1, ""

        def keep(state: TrainState, tally: Tally, epoch: int) -> None:
            progress = {
                "epoch": epoch,
                "seconds": clock.seconds,
                "plateau": _jsonable(plateau),
                "tally": dataclasses.asdict(tally),
                "devices": self.devices.n,
                "shares": self.shares,
            }
            if checkpoints is not None:
                checkpoints.save(self.devices.first(state), progress)

        with clock:
            clock.tick()
            for epoch in range(first, t.epochs):
                rate = plateau.scale * t.learning_rate
                state, record = self._epoch(
                    state,
                    epoch,
                    rate,
                    clock,
                    limit,
                    tally,
                    functools.partial(keep, epoch=epoch - 1),
                )
                if clock.stop:
                    ended = f"stopped within epoch {epoch}"
                    break
                unfinished, tally = tally, Tally()
                averaged = state.ema if t.ema else state.params
                record["validation"], unfit = self.validate(averaged)
                record["validation_skipped"] = unfit
                clock.tick()
                if epoch < t.static_epochs:  # another loss, not comparable with that of paths
                    plateau = Plateau()
                record["best"] = plateau.update(record["validation"]["loss"], epoch, t, unfit)
                record["seconds"] = clock.seconds
                # Without a best epoch so far, the latest finite parameters are exported.
                wanted = record["best"] or (plateau.best_epoch < 0 and self._finite(averaged))
                new = checkpoints is not None and not (workdir / "model").exists()
                if first_host and wanted and not new:
                    self.export(averaged, workdir, record["validation"])
                due = (epoch + 1) % t.checkpoint_every == 0 or epoch + 1 == t.epochs or new
                due = due or clock.stop
                if record["partial"]:  # cut short by the deadline; the best so far must be kept
                    keep(state, unfinished, epoch - 1)
                elif due or record["best"]:
                    keep(state, tally, epoch)
                if checkpoints is not None and new:
                    # A model without a checkpoint would allow neither starting again nor resuming.
                    checkpoints.wait()
                    self.export(averaged, workdir, record["validation"])
                if log is not None:
                    log.write(record)
                left = _time_left(limit, record, epoch, t.epochs)
                self.report.epoch(record, left, config.loss.energy_per)
                if not math.isfinite(record["validation"]["loss"]):
                    self.report("validation loss is not finite; it counts as no improvement")
                late = clock.seconds >= limit
                if late or epoch + 1 == t.epochs:
                    reason = f"train.max_minutes={t.max_minutes:g}" if late else reason
                    loss, cooled = record["validation"]["loss"], self.cooling.annealed
                    near = loss <= KEEP_LAST * plateau.best and unfit <= plateau.skipped
                    if cooled and not record["best"] and near:
                        if first_host:
                            self.export(averaged, workdir, record["validation"])
                        self.report(f"the last model is kept (validation loss {loss:.4f})")
                    break
                # A run that cools down to a deadline is best at the deadline: no early stopping.
                if not (t.max_minutes and t.cooldown) and plateau.exhausted(epoch, t):
                    reason = f"no better validation loss for {t.early_stop_patience} epochs"
                    break
                if clock.stop:  # during validation: the next step may compile for minutes first
                    ended = f"stopped after epoch {epoch}"
                    break
            if checkpoints is not None:
                checkpoints.close()
        self.hosts.wait()
        if ended:
            reason = "told to stop (SIGTERM)"
        best = f"best validation loss {plateau.best:.4f} at epoch {plateau.best_epoch}"
        if plateau.best_epoch < 0:
            best = "no validation loss was finite: kept is the last model whose parameters are"
        self.report(
            f"ended after epoch {epoch}: {reason}; {best}; model in {workdir / 'model'}"
            if not ended
            else f"{ended}: {reason}"
        )
        return Result(
            workdir,
            workdir / "model",
            epoch + 1,
            plateau.best,
            reason,
            self.devices.compilations,
            bool(ended),
        )

    def _tell_devices(self, devices: int, shares: int) -> None:
        """Reports how the size of a step has changed with the number of devices or shares, if it has."""
        n = self.devices.n
        if (devices, shares) != (n, self.shares):
            self.report(
                f"on {n} device(s) instead of {devices}: a step is now over {n / self.shares:g} batch(es) "
                f"instead of {devices / shares:g}"
            )

    def _restore(
        self, like: TrainState, checkpoints: Checkpoints | None
    ) -> tuple[TrainState, dict[str, Any]]:
        """The latest checkpoint, read by process 0 and sent to the others."""
        state, progress = jax.tree.map(np.zeros_like, jax.device_get(like)), None
        if checkpoints is not None:
            state, progress = checkpoints.restore(like)
        progress = self.hosts.share(progress)
        assert progress is not None
        return self.devices.total(state), progress

    def _epoch(
        self,
        state: TrainState,
        epoch: int,
        rate: float,
        clock: Clock,
        limit: float,
        tally: Tally,
        keep: Callable[[TrainState, Tally], None],
    ) -> tuple[TrainState, dict[str, Any]]:
        """Trains on what ``tally`` says is left of an epoch, calling ``keep`` to save checkpoints."""
        t, report = self.config.train, self.report
        iterator, left = self.batches("train", (t.seed, epoch), tally.done)
        count = tally.batches + left
        key = jax.random.key_data(jax.random.key(t.seed))
        report.start_epoch(epoch, count)
        step = self.static_step if epoch < t.static_epochs else self.train_step
        before = tally.seconds + self.devices.compile_seconds
        begin = asked = time.perf_counter()
        saved = clock.seconds
        begun: collections.deque[tuple[list[int], Any, Any]] = collections.deque()

        def settle(ahead: int) -> None:
            """Collects the metrics of all steps launched, except for the last ``ahead``."""
            while len(begun) > ahead:
                indices, metrics, tick = begun.popleft()
                values = jax.device_get(self.devices.first(metrics))
                metrics = {k: float(v) for k, v in values.items()}
                if not tally.add(metrics, len(indices), self.devices.n, self.shares):
                    names = ", ".join(self.data.samples.id(i) for i in indices)
                    report(f"step skipped: loss or gradient not finite; structures: {names}")
                clock.read(tick)
                spent = time.perf_counter() - begin
                tally.seconds = before + spent - self.devices.compile_seconds
                speed = tally.structures / max(tally.seconds, 1e-9)
                report.batch(tally.batches, metrics["loss"], speed)

        try:
            for indices, batch in iterator:
                tally.waited += time.perf_counter() - asked
                done = epoch + (tally.batches + len(begun)) / count
                now = rate * self.cooling.take(cooling_factor(t, clock.seconds, limit, done))
                state, metrics = step(state, batch, np.float32(now), key)
                begun.append((indices, metrics, clock.ask()))
                settle(self.devices.ahead)
                asked = time.perf_counter()
                due = clock.seconds - saved >= 60 * t.checkpoint_minutes
                if clock.stop or clock.seconds >= limit or due:
                    settle(0)  # the state includes all steps launched
                if clock.stop or clock.seconds >= limit:
                    break
                if due and tally.batches < count:
                    keep(state, tally)
                    saved = clock.seconds
            settle(0)
            if clock.stop:
                keep(state, tally)
        finally:
            report.end_epoch()
        return state, {
            "epoch": epoch,
            "partial": tally.batches < count,
            "learning_rate": rate * self.cooling.last,
            "compile_seconds": self.devices.compile_seconds,
            **tally.record(),
        }


def _jsonable(plateau: Plateau) -> dict[str, Any]:
    values = dataclasses.asdict(plateau)
    values["best"] = values["best"] if math.isfinite(values["best"]) else None
    return values


def _time_left(limit: float, record: dict[str, Any], epoch: int, epochs: int) -> str:
    per_epoch = record["seconds"] / (epoch + 1)
    left = min(limit - record["seconds"], per_epoch * (epochs - epoch - 1))
    return f"{max(left, 0) / 60:.1f} min left at most"


__all__ = ["Result", "train"]
