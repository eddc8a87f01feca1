"""The training loop: data, epochs, validation, checkpoints, the exported model."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from relaxnet_jax.config import Config, from_json, to_dict, to_json
from relaxnet_jax.data.buckets import Buckets, pack_epoch, plan_buckets
from relaxnet_jax.data.dataset import Dataset, load_dataset
from relaxnet_jax.data.pipeline import epoch_iterator
from relaxnet_jax.data.references import fit_element_energies
from relaxnet_jax.data.sample_file import SampleFile, SampleView, prepare_samples
from relaxnet_jax.errors import InputError
from relaxnet_jax.graph import MAX_ATOMIC_NUMBER
from relaxnet_jax.losses import Term, weighted_loss
from relaxnet_jax.model import RelaxNet, create_model, save_model
from relaxnet_jax.train.checkpoint import Checkpoints
from relaxnet_jax.train.parallel import Devices
from relaxnet_jax.train.report import ConsoleReport, MetricsLog
from relaxnet_jax.train.state import Plateau, TrainState, initial_train_state
from relaxnet_jax.train.step import make_eval_step, make_train_step
from relaxnet_jax.train.tally import Tally

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

# A run that cools down to its deadline ends with a model that has settled. It is kept, unless its
# validation loss, mostly noise of a few structures from epoch to epoch, is worse than the best by
# more than this factor.
KEEP_LAST = 1.1


@dataclasses.dataclass
class Result:
    """What a run ended with."""

    workdir: Path
    model_folder: Path
    epochs: int
    best: float
    reason: str
    compilations: dict[str, int]


def train(
    config: Config,
    workdir: str | Path,
    resume: bool = False,
    report: ConsoleReport | None = None,
    devices: int | None = None,
) -> Result:
    """Trains a model and leaves the best one in ``workdir/model``.

    Args:
      config: everything the run is determined by.
      workdir: holds config.json, splits.json, metrics.jsonl, checkpoints/ and model/.
      resume: continue the run in ``workdir`` from its latest checkpoint, exactly.
      report: where progress goes. devices: number of local devices, all by default.

    Raises:
      InputError: unusable data or configuration; a workdir that holds a run although
        ``resume`` is off, or a run of another configuration although it is on.
    """
    report = report or ConsoleReport()
    workdir = Path(workdir)
    _check_workdir(config, workdir, resume)
    if config.train.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise InputError(
            "train.tensorboard: tensorboardX is not installed; pip install 'relaxnet-jax[tensorboard]'"
        )
    dataset = load_dataset(config, report)
    run = _Run(config, dataset, report, devices)
    workdir.mkdir(parents=True, exist_ok=True)
    if not resume:
        (workdir / "config.json").write_text(to_json(config))
        (workdir / "splits.json").write_text(json.dumps(dataset.ids(), indent=1))
    return run.execute(workdir, resume)


def _check_workdir(config: Config, workdir: Path, resume: bool) -> None:
    file = workdir / "config.json"
    if not resume:
        # A run that never reached its first model left nothing worth keeping: it starts anew.
        if file.exists() and (workdir / "model").exists():
            raise InputError(
                f"{workdir}: already holds a run; continue it with --resume or give another --workdir"
            )
        return
    if not file.exists():
        raise InputError(
            f"{workdir}: holds no run to resume (config.json is missing); start without --resume"
        )
    theirs, ours = to_dict(from_json(file.read_text(), str(file))), to_dict(config)
    for part in (theirs, ours):
        part.pop("name")
        for field in RESUMABLE:
            part["train"].pop(field)
    if theirs != ours:
        section, field = next((s, f) for s in ours for f in ours[s] if ours[s][f] != theirs[s][f])
        raise InputError(
            f"{workdir}: is a run of another config ({section}.{field} is {theirs[section][field]!r} there, "
            f"{ours[section][field]!r} here); resume with its own config or give another --workdir"
        )


class _Run:
    """Everything that does not change from epoch to epoch."""

    def __init__(
        self, config: Config, dataset: Dataset, report: ConsoleReport, devices: int | None
    ) -> None:
        self.config, self.dataset, self.report = config, dataset, report
        self.devices = Devices(devices, report)
        if self.devices.n > 1 and config.dynamics.solver != "rk4":
            raise InputError(
                f"dynamics.solver={config.dynamics.solver!r} runs on one device, not on "
                f"{self.devices.n}; give --devices 1 or dynamics.solver=rk4"
            )
        for reason, count in dataset.left_out.items():
            report(f"{count} relaxations left out: {reason}")
        found = dataset.trajectories
        self.element_energies, self.scale, self.seen = fit_element_energies(
            (found.store.energies(int(found.rows[i])) for i in dataset.splits["train"]),
            MAX_ATOMIC_NUMBER + 1,
        )
        file = prepare_samples(found, config, report)
        used = self._usable(file)
        self.samples = SampleView(file, used, self.element_energies)
        in_train = np.isin(used, dataset.splits["train"])
        self.members = {"train": np.flatnonzero(in_train), "validation": np.flatnonzero(~in_train)}
        for name, members in self.members.items():
            if len(members) == 0:
                raise InputError(
                    f"{config.data.path}: no usable relaxation in the {name} split; import more data "
                    "or change data.splits"
                )
        t = config.train
        self.buckets: Buckets = plan_buckets(
            self.samples.sizes, t.batch_size, t.max_buckets, t.max_padding
        )
        report(
            f"{dataset.name}: {len(self.members['train'])} training, {len(self.members['validation'])} validation, "
            f"{len(dataset.splits['test'])} test relaxations; {len(self.buckets.shapes)} bucket(s), padding "
            f"{100 * self.buckets.padding:.0f} %"
        )
        for shape in self.buckets.shapes:
            report(
                f"  bucket: {shape.n_graphs - 1} structures, {shape.n_atoms} atoms, {shape.n_edges} edges, "
                f"{shape.n_bonds} bonds"
            )
        batched = self.devices.axis is not None
        self.train_step, self.static_step = (
            self.devices.compile(
                make_train_step(config, self.scale, self.devices.axis, static),
                "static training step" if static else "training step",
                (True, True, False, False),
                donate=(0,),
            )
            for static in (False, True)
        )
        self.eval_step = self.devices.compile(
            make_eval_step(config, self.scale, self.devices.axis), "validation step", (True, True)
        )
        self._batched = batched

    def _usable(self, file: SampleFile) -> np.ndarray:
        """Rows of the training and validation relaxations that can be used; reports the others."""
        unseen = (file.elements & ~self.seen).any(axis=1)
        used = []
        for i in (int(i) for name in ("train", "validation") for i in self.dataset.splits[name]):
            if i in file.left_out:
                self.report(f"left out: {file.left_out[i]}")
            elif unseen[i]:
                self.report(
                    f"{file.ids[i]}: left out: contains an element absent from the training split"
                )
            else:
                used.append(i)
        return np.array(used, np.int64)

    def model(self, params: Any) -> RelaxNet:
        """The model with these parameters."""
        elements = tuple(int(z) for z in np.flatnonzero(self.seen))
        statistics = json.dumps(
            {
                "data": self.dataset.name,
                "training_relaxations": len(self.members["train"]),
                "energy_scale_eV_per_atom": self.scale,
                "surroundings": self._surroundings(),
            }
        )
        return RelaxNet(
            params,
            self.element_energies,
            np.asarray(self.scale, np.float32),
            self.config,
            elements,
            statistics,
        )

    def _surroundings(self) -> dict[str, tuple[float, float]]:
        """Ranges, over the first training frames, of what `trust.surroundings` gives."""
        atoms, edges, bonds, *_ = (v[self.members["train"]] for v in self.samples.sizes)
        means = {"density": edges / atoms, "coordination": bonds / atoms}
        return {name: (float(v.min()), float(v.max())) for name, v in means.items()}

    def export(self, params: Any, workdir: Path) -> None:
        """Writes the model with these (replicated) parameters to ``workdir/model``."""
        save_model(self.model(jax.device_get(self.devices.first(params))), workdir / "model")

    def batches(self, split: str, rng: np.random.Generator | None, done: int = 0):
        """(number of structures, stacked batch) of an epoch after the first ``done``; an iterator,
        and how many the whole epoch has."""
        n = self.devices.n
        plan = pack_epoch(
            self.buckets,
            self.samples.sizes,
            rng,
            self.members[split],
            n,
        )

        def iterate():
            group: list[tuple[int, Any]] = []
            rest = plan[done * n :]
            for _, indices, batch in epoch_iterator(rest, self.samples, self.buckets, self.config):
                group.append((len(indices), batch))
                if len(group) == n:
                    yield sum(size for size, _ in group), self.devices.stack([b for _, b in group])
                    group = []

        return iterate(), len(plan) // n

    def validate(self, params: Any) -> dict[str, float]:
        """Means of every loss term, the loss, and coordinate errors on the validation split."""
        totals: dict[str, list[float]] = {}
        iterator, _ = self.batches("validation", None)
        for _, batch in iterator:
            terms = jax.device_get(self.devices.first(self.eval_step(params, batch)))
            for name, term in terms.items():
                total = totals.setdefault(name, [0.0, 0.0])
                total[0] += float(term.total)
                total[1] += float(term.number)
        terms = {name: Term(np.float64(a), np.float64(b)) for name, (a, b) in totals.items()}
        loss, _ = weighted_loss(terms, self.config.loss)
        return {"loss": float(loss)} | {name: float(term.mean()) for name, term in terms.items()}

    def execute(self, workdir: Path, resume: bool) -> Result:
        """Runs until an end is reached."""
        config, t = self.config, self.config.train
        state = initial_train_state(create_model(config, t.seed).params, t)
        plateau, first, elapsed, tally = Plateau(), 0, 0.0, Tally()
        checkpoints = Checkpoints(workdir / "checkpoints")
        if resume:
            state, progress = checkpoints.restore(state)
            plateau, first, elapsed = (
                Plateau(**progress["plateau"]),
                progress["epoch"] + 1,
                progress["seconds"],
            )
            plateau.best = math.inf if plateau.best is None else plateau.best
            tally = Tally(**progress["tally"])
            within = f" and {tally.batches} batches" if tally.batches else ""
            self.report(f"resuming after epoch {progress['epoch']}{within}")
        log = MetricsLog(workdir, first - 1, t.tensorboard)
        parameters = sum(x.size for x in jax.tree.leaves(state.params))
        self.report(
            f"{parameters:,} parameters, {self.devices.n} device(s): {jax.devices()[0].platform}"
        )
        state = self.devices.replicate(state)
        start, reason, epoch = time.perf_counter() - elapsed, "epochs", first - 1
        deadline = start + 60 * t.max_minutes if t.max_minutes else math.inf

        def keep(state: TrainState, tally: Tally, epoch: int, best: bool = False) -> None:
            progress = {
                "epoch": epoch,
                "seconds": time.perf_counter() - start,
                "plateau": _jsonable(plateau),
                "tally": dataclasses.asdict(tally),
            }
            checkpoints.save(self.devices.first(state), progress, best)

        for epoch in range(first, t.epochs):
            rate = plateau.scale * t.learning_rate
            state, record = self._epoch(
                state, epoch, rate, deadline, tally, functools.partial(keep, epoch=epoch - 1)
            )
            tally = Tally()
            averaged = state.ema if t.ema else state.params
            record["validation"] = self.validate(averaged)
            if epoch < t.static_epochs:  # another loss: what it reaches is no mark for the solution
                plateau = Plateau()
            record["best"] = plateau.update(record["validation"]["loss"], epoch, t)
            record["seconds"] = time.perf_counter() - start
            if record["best"] or not (workdir / "model").exists():
                self.export(averaged, workdir)
            due = (epoch + 1) % t.checkpoint_every == 0 or epoch + 1 == t.epochs
            if not record["partial"] and (due or record["best"]):
                keep(state, tally, epoch, record["best"])
            log.write(record)
            self.report.epoch(record, _time_left(deadline, record, epoch, t.epochs))
            if not math.isfinite(record["validation"]["loss"]):
                self.report("validation loss is not finite; it counts as no improvement")
            if time.perf_counter() >= deadline:
                reason = f"train.max_minutes={t.max_minutes:g}"
                loss = record["validation"]["loss"]
                if t.cooldown and not record["best"] and loss <= KEEP_LAST * plateau.best:
                    self.export(averaged, workdir)
                    self.report(f"the last model is kept (validation loss {loss:.4f})")
                break
            # A run that cools down to a deadline is at its best then, and not before.
            if not (t.max_minutes and t.cooldown) and plateau.exhausted(epoch, t):
                reason = f"no better validation loss for {t.early_stop_patience} epochs"
                break
        checkpoints.close()
        self.report(
            f"ended after epoch {epoch}: {reason}; best validation loss {plateau.best:.4f} at epoch "
            f"{plateau.best_epoch}; model in {workdir / 'model'}"
        )
        return Result(
            workdir, workdir / "model", epoch + 1, plateau.best, reason, self.devices.compilations
        )

    def _epoch(
        self,
        state: TrainState,
        epoch: int,
        rate: float,
        deadline: float,
        tally: Tally,
        keep: Callable[[TrainState, Tally], None],
    ) -> tuple[TrainState, dict[str, Any]]:
        """The rest of an epoch after what ``tally`` says is done; ``keep`` is called now and then."""
        t, report = self.config.train, self.report
        iterator, count = self.batches(
            "train", np.random.default_rng((t.seed, epoch)), tally.batches
        )
        key = jax.random.key_data(jax.random.key(t.seed))
        report.start_epoch(epoch, count)
        step = self.static_step if epoch < t.static_epochs else self.train_step
        before = tally.seconds + self.devices.compile_seconds
        begin = asked = saved = time.perf_counter()
        try:
            for size, batch in iterator:
                tally.waited += time.perf_counter() - asked
                now = np.float32(rate * self._cooling(deadline))
                state, metrics = step(state, batch, now, key)
                metrics = {
                    k: float(v) for k, v in jax.device_get(self.devices.first(metrics)).items()
                }
                if not tally.add(metrics, size):
                    report(
                        f"step skipped: loss or gradient not finite; structures: {self._names(batch)}"
                    )
                asked = time.perf_counter()
                tally.seconds = before + asked - begin - self.devices.compile_seconds
                speed = tally.structures / max(tally.seconds, 1e-9)
                report.batch(tally.batches, metrics["loss"], speed)
                if asked >= deadline:
                    break
                if asked - saved >= 60 * t.checkpoint_minutes and tally.batches < count:
                    keep(state, tally)
                    saved = time.perf_counter()
        finally:
            report.end_epoch()
        return state, {
            "epoch": epoch,
            "partial": tally.batches < count,
            "learning_rate": rate,
            "compile_seconds": self.devices.compile_seconds,
            **tally.record(),
        }

    def _cooling(self, deadline: float) -> float:
        """Factor on the learning rate towards the end of a run with a time limit."""
        t = self.config.train
        if not t.max_minutes or not t.cooldown:
            return 1.0
        left = (deadline - time.perf_counter()) / (60 * t.max_minutes * t.cooldown)
        return min(1.0, max(left, 0.0))

    def _names(self, batch: Any) -> str:
        """Ids of the structures in a batch, found by their positions."""
        graph = batch[0]
        wanted = {
            hashlib.sha1(np.asarray(s.structure.positions, np.float32).tobytes()).digest(): s.id
            for s in self.samples
        }
        names = []
        for n_node, mask, positions in _per_device(graph, self._batched):
            ends = np.cumsum(n_node)
            for end, size, real in zip(ends, n_node, mask):
                if real:
                    digest = hashlib.sha1(
                        np.ascontiguousarray(positions[end - size : end]).tobytes()
                    ).digest()
                    names.append(wanted.get(digest, "?"))
        return ", ".join(names)


def _per_device(graph: Any, batched: bool):
    leaves = graph.n_node, graph.globals["mask"], graph.nodes["positions"]
    return zip(*leaves) if batched else [leaves]


def _jsonable(plateau: Plateau) -> dict[str, Any]:
    values = dataclasses.asdict(plateau)
    values["best"] = values["best"] if math.isfinite(values["best"]) else None
    return values


def _time_left(deadline: float, record: dict[str, Any], epoch: int, epochs: int) -> str:
    per_epoch = record["seconds"] / (epoch + 1)
    left = min(deadline - time.perf_counter(), per_epoch * (epochs - epoch - 1))
    return f"{max(left, 0) / 60:.1f} min left at most"


__all__ = ["Result", "train"]
