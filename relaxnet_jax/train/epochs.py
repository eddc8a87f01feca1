"""The epochs of a run: training, validation, checkpoints, the exported model, and the end."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from relaxnet_jax.train.checkpoint import MODEL, Checkpoints
from relaxnet_jax.train.clock import Clock
from relaxnet_jax.train.report import MetricsLog
from relaxnet_jax.train.run import Run
from relaxnet_jax.train.start import start_parameters
from relaxnet_jax.train.state import (
    Cooling,
    Plateau,
    TrainState,
    cooling_factor,
    initial_train_state,
)
from relaxnet_jax.train.tally import Tally

# A run that cools down to its deadline ends with a settled model. That one is kept unless its
# validation loss, whose changes from epoch to epoch are mostly noise from a few structures, exceeds
# the best by more than this factor.
KEEP_LAST = 1.1


@dataclasses.dataclass
class Result:
    """The outcome of a run.

    Attributes:
      stopped: whether the run was stopped by SIGTERM; it can be resumed where it was.
      told: whether SIGTERM was received, perhaps too late to stop the run: whoever trains several
        runs in turn should begin no other one.
    """

    workdir: Path
    model_folder: Path
    epochs: int
    best: float
    reason: str
    compilations: dict[str, int]
    stopped: bool = False
    told: bool = False


class Epochs:
    """Trains a run from its beginning, or from its latest checkpoint, until one of its ends."""

    def __init__(self, run: Run, workdir: Path, resume: bool) -> None:
        self.run, self.workdir, self.report = run, workdir, run.report
        self.t = t = run.config.train
        self.limit = 60 * t.max_minutes or math.inf
        self.first, self.plateau, self.tally, self.cooling = 0, Plateau(), Tally(), Cooling()
        self.checkpoints = Checkpoints(workdir) if run.hosts.first else None
        state = initial_train_state(start_parameters(run.config, run.start, run.report), t)
        elapsed = 0.0
        if resume:
            state, elapsed = self._restore(state)
        self.log = MetricsLog(workdir, self.first - 1, t.tensorboard) if run.hosts.first else None
        parameters = sum(x.size for x in jax.tree.leaves(state.params))
        others = f" of {run.hosts.count} processes" if run.hosts.count > 1 else ""
        self.report(
            f"{parameters:,} parameters, {run.devices.n} device(s){others}: {jax.devices()[0].platform}"
        )
        self.state: TrainState = run.devices.replicate(state)
        self.clock = Clock(run.devices, elapsed, self.report)
        self.saved = elapsed  # when the latest checkpoint was written

    def execute(self) -> Result:
        """Trains.

        Raises:
          KeyboardInterrupt: Ctrl-C was pressed; there is a checkpoint, as after SIGTERM.
        """
        clock, reason, epoch, stopped = self.clock, "epochs", self.first - 1, ""
        with clock, self._closing():
            self._replace_missing_model()
            clock.tick()
            over = self._end(epoch) if self.first and not self.tally.batches else ""
            reason = over or reason
            for epoch in [] if over else range(self.first, self.t.epochs):
                if clock.stop and (epoch or self.tally.batches):  # there is a checkpoint
                    stopped, epoch = f"before epoch {epoch}", epoch - 1
                    break
                record = self._train(epoch)
                if clock.stop and record["partial"]:
                    stopped = f"within epoch {epoch}"
                    break
                if end := self._finish(epoch, record):
                    reason = end
                    break
                if clock.stop:  # the next step may compile for minutes
                    stopped = f"after epoch {epoch}"
                    break
        self.run.hosts.wait()
        plateau, folder = self.plateau, self.workdir / MODEL
        best = f"best validation loss {plateau.best:.4f} at epoch {plateau.best_epoch}"
        if plateau.best_epoch < 0:
            best = "no validation loss was finite: kept is the last model whose parameters are"
        if stopped:
            reason = "Ctrl-C" if clock.interrupted else "SIGTERM"
            self.report(f"stopped by {reason} {stopped}")
        else:
            self.report(f"ended after epoch {epoch}: {reason}; {best}; model in {folder}")
        if clock.interrupted:
            raise KeyboardInterrupt
        return Result(
            self.workdir,
            folder,
            epoch + 1,
            plateau.best,
            reason,
            self.run.devices.compilations,
            bool(stopped),
            bool(stopped) or clock.told,
        )

    @contextlib.contextmanager
    def _closing(self) -> Iterator[None]:
        """Closes the checkpoints at the end, whatever it is: the latest may still be being written."""
        try:
            yield
        except BaseException:
            if self.checkpoints is not None:
                with contextlib.suppress(Exception):  # the first error tells more
                    self.checkpoints.close()
            raise
        if self.checkpoints is not None:
            self.checkpoints.close()

    @property
    def _averaged(self) -> Any:
        """The parameters that are validated and exported (on the devices)."""
        return self.state.ema if self.t.ema else self.state.params

    def _export(self, validation: Mapping[str, float]) -> None:
        if self.run.hosts.first:
            self.run.export(self._averaged, self.workdir, validation)

    def _replace_missing_model(self) -> None:
        """Exports the restored model if the run was killed before it exported one."""
        validated = self.first > 0 or self.plateau.best_epoch >= 0
        if self.run.hosts.share(validated and not (self.workdir / MODEL).exists()):
            validation, _ = self.run.validate(self._averaged)
            self._export(validation)

    def _keep(self, tally: Tally, epoch: int) -> None:
        """Writes a checkpoint: ``epoch`` was finished last, and ``tally`` is what was done since."""
        self.saved = self.clock.seconds
        if self.checkpoints is None:
            return
        best = (
            self.plateau.best if math.isfinite(self.plateau.best) else None
        )  # JSON has no infinity
        progress = {
            "epoch": epoch,
            "seconds": self.clock.seconds,
            "plateau": dataclasses.asdict(self.plateau) | {"best": best},
            "tally": dataclasses.asdict(tally),
            "devices": self.run.devices.n,
            "shares": self.run.shares,
        }
        self.checkpoints.save(self.run.devices.first(self.state), progress)

    def _restore(self, like: TrainState) -> tuple[TrainState, float]:
        """The state and the seconds of the latest checkpoint, read by process 0 and sent to the others."""
        state, progress = jax.tree.map(np.zeros_like, jax.device_get(like)), None
        if self.checkpoints is not None:
            state, progress = self.checkpoints.restore(like)
        progress = self.run.hosts.share(progress)
        assert progress is not None
        self.plateau, self.tally = Plateau(**progress["plateau"]), Tally(**progress["tally"])
        self.plateau.best = math.inf if self.plateau.best is None else self.plateau.best
        self.first = progress["epoch"] + 1
        after = f"after epoch {progress['epoch']}"
        if self.tally.batches:
            after = f"within epoch {self.first}, after {self.tally.batches} batches"
        self.report(f"resuming {after}")
        self.run.tell_devices(progress["devices"], progress.get("shares", self.run.shares))
        return self.run.devices.total(state), progress["seconds"]

    def _train(self, epoch: int) -> dict[str, Any]:
        """Trains on what the tally says is left of an epoch; returns the training part of its record."""
        run, t, report, clock, tally = self.run, self.t, self.report, self.clock, self.tally
        rate = self.plateau.scale * t.learning_rate
        iterator, left = run.batches("train", (t.seed, epoch), tally.done)
        count = tally.batches + left
        key = jax.random.key_data(jax.random.key(t.seed))
        report.start_epoch(epoch, count)
        step = run.static_step if epoch < t.static_epochs else run.train_step
        before = tally.seconds + run.devices.compile_seconds
        begin = asked = time.perf_counter()
        begun: collections.deque[tuple[list[int], Any, Any]] = collections.deque()

        def settle(ahead: int) -> None:
            """Collects the metrics of all steps launched, except for the last ``ahead``."""
            while len(begun) > ahead:
                indices, metrics, tick = begun.popleft()
                values = jax.device_get(run.devices.first(metrics))
                metrics = {k: float(v) for k, v in values.items()}
                if not tally.add(metrics, len(indices), run.devices.n, run.shares):
                    names = ", ".join(run.data.samples.id(i) for i in indices)
                    report(f"step skipped: loss or gradient not finite; structures: {names}")
                clock.read(tick)
                spent = time.perf_counter() - begin
                tally.seconds = before + spent - run.devices.compile_seconds
                speed = tally.structures / max(tally.seconds, 1e-9)
                report.batch(tally.batches, metrics["loss"], speed)

        try:
            for indices, batch in iterator:
                tally.waited += time.perf_counter() - asked
                done = epoch + (tally.batches + len(begun)) / count
                now = rate * self.cooling.take(cooling_factor(t, clock.seconds, self.limit, done))
                self.state, metrics = step(self.state, batch, np.float32(now), key)
                begun.append((indices, metrics, clock.ask()))
                settle(run.devices.ahead)
                due = clock.seconds - self.saved >= 60 * t.checkpoint_minutes
                if clock.stop or clock.seconds >= self.limit or due:
                    settle(0)  # the state includes all steps launched
                if clock.stop or clock.seconds >= self.limit:
                    break
                if due and tally.batches < count:
                    self._keep(tally, epoch - 1)
                asked = time.perf_counter()
            settle(0)
            if clock.stop and tally.batches < count:
                self._keep(tally, epoch - 1)
        finally:
            report.end_epoch()
        return {
            "epoch": epoch,
            "partial": tally.batches < count,
            "learning_rate": rate * self.cooling.last,
            "compile_seconds": run.devices.compile_seconds,
            **tally.record(),
        }

    def _finish(self, epoch: int, record: dict[str, Any]) -> str:
        """Validates, records, exports and saves; returns why the run ends here, empty if it does not."""
        run, t, clock = self.run, self.t, self.clock
        unfinished, self.tally = self.tally, Tally()
        validation, unfit = run.validate(self._averaged)
        loss = validation["loss"]
        clock.tick()
        if epoch < t.static_epochs:  # paths are not trained yet: the latest model is the best
            self.plateau = Plateau()
        best = self.plateau.update(loss, epoch, t, unfit)
        record |= {
            "validation": validation,
            "validation_skipped": unfit,
            "best": best,
            "seconds": clock.seconds,
        }
        end = self._end(epoch)
        if self.log is not None:
            # Before the checkpoint: what is not trained again must be on record.
            self.log.write(record)
        # Without a best epoch so far, the latest finite parameters are exported.
        wanted = best or (self.plateau.best_epoch < 0 and run.finite(self._averaged))
        new = run.hosts.share(not (self.workdir / MODEL).exists())
        if wanted and not new:
            self._export(validation)
        due = (epoch + 1) % t.checkpoint_every == 0 or clock.stop
        if record["partial"]:  # cut short by the deadline; the best so far must be kept
            self._keep(unfinished, epoch - 1)
        elif due or best or new or end:
            self._keep(self.tally, epoch)
        if self.checkpoints is not None and new:
            # A model without a checkpoint would allow neither starting again nor resuming.
            self.checkpoints.wait()
            self._export(validation)
        left = _time_left(self.limit, record, epoch, t.epochs)
        self.report.epoch(record, left, run.config.loss.energy_per)
        if not math.isfinite(loss):
            self.report("validation loss is not finite; it counts as no improvement")
        near = loss <= KEEP_LAST * self.plateau.best and unfit <= self.plateau.skipped
        if end and self.cooling.annealed and not best and near:
            self._export(validation)
            self.report(f"the last model is kept (validation loss {loss:.4f})")
        return end

    def _end(self, epoch: int) -> str:
        """Why the run ends with this epoch, which has been validated; empty if it does not."""
        t = self.t
        if self.clock.seconds >= self.limit:
            return f"train.max_minutes={t.max_minutes:g}"
        if epoch + 1 == t.epochs:
            return "epochs"
        # A run that cools down to a deadline is best at the deadline: no early stopping.
        if not (t.max_minutes and t.cooldown) and self.plateau.exhausted(epoch, t):
            return f"no better validation loss for {t.early_stop_patience} epochs"
        return ""


def _time_left(limit: float, record: dict[str, Any], epoch: int, epochs: int) -> str:
    per_epoch = record["seconds"] / (epoch + 1)
    left = min(limit - record["seconds"], per_epoch * (epochs - epoch - 1))
    return f"{max(left, 0) / 60:.1f} min left at most"
