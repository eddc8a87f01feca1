"""Predictions and training records of a report's runs, made once and stored."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from relaxnet_jax.benchmark.costs import memory_bytes
from relaxnet_jax.benchmark.machine import describe
from relaxnet_jax.benchmark.timing import compile_once
from relaxnet_jax.benchmark.work import load_work, training_step
from relaxnet_jax.data.dataset import read_trajectories
from relaxnet_jax.data.files import atomic_path
from relaxnet_jax.data.split_file import split_of_run
from relaxnet_jax.data.trajectory import RelaxationTrajectory
from relaxnet_jax.metrics import Comparison
from relaxnet_jax.model import RelaxNet, load_model
from relaxnet_jax.reproduce import predictions
from relaxnet_jax.reproduce.archive import from_record, read_records, write_records
from relaxnet_jax.reproduce.reference import identity, relaxed_by
from relaxnet_jax.reproduce.runs import Run, folder_of, read_epochs, read_facts
from relaxnet_jax.reproduce.setting import Setting


@dataclasses.dataclass(frozen=True, eq=False)
class Predicted:
    """Predictions of one kind by one run.

    Attributes:
      comparisons: the predictions compared with the true relaxations.
      facts: see `predictions`.
    """

    comparisons: tuple[Comparison, ...]
    facts: dict[str, Any]


class Lab:
    """Finished runs of a report, and their predictions on their test splits."""

    def __init__(self, setting: Setting, report: Callable[[str], None]) -> None:
        self.setting, self.report = setting, report
        self.left_out: set[str] = set()  # why models left out test structures
        self.machines: list[dict[str, Any]] = []  # that made the predictions in use
        self._models: dict[str, RelaxNet] = {}
        self._tests: dict[tuple[str, ...], list[RelaxationTrajectory]] = {}
        self._kept: dict[tuple[str, str], tuple[list, dict[str, Any]]] = {}

    # Predictions

    def paths(self, run: Run, n_frames: int | None = None) -> Predicted:
        """Predicted paths, by default on the model's own frames."""
        n = n_frames or run.config.dynamics.frames

        def make(model, test):
            return predictions.paths(model, test, n, self.report)

        return self._predicted(run, f"paths-{n}", make)

    def relaxed(self, run: Run, fmax: float, n_frames: int = 5) -> Predicted:
        """L-BFGS relaxations with the model's energy, down to a force of ``fmax`` eV/Å."""

        def make(model, test):
            return predictions.relaxed(model, test, n_frames, fmax, self.report)

        return self._predicted(run, f"lbfgs-{n_frames}-{fmax:.6g}", make)

    def points(self, run: Run, n_frames: int = 5) -> Predicted:
        """Energies and forces of a static model at the true frames."""

        def make(model, test):
            return predictions.points(model, test, n_frames, self.report)

        return self._predicted(run, f"points-{n_frames}", make)

    def shaken(self, run: Run, scale: float) -> Predicted:
        """Paths from initial positions perturbed by noise of ``scale`` Å."""

        def make(model, test):
            return predictions.shaken(model, test, scale, self.report)

        return self._predicted(run, f"shaken-{scale:g}", make)

    def dense(self, run: Run, n_frames: int) -> list[dict[str, Any]]:
        """Whole predicted paths; see `predictions.dense`."""

        def make(model, test):
            return predictions.dense(model, test, n_frames, self.report)

        return self._records(run, f"dense-{n_frames}", make)[0]

    def reference(self, run: Run, fmax: float) -> Predicted | None:
        """L-BFGS relaxations with the setting's outside potential; None without one.

        Args:
          run: provides the test split, and the model that decides which of its structures can be
            compared.
          fmax: force criterion in eV/Å.
        """
        calculator = self.setting.reference
        if calculator is None:
            return None
        test = self._test(run)
        known = identity(calculator, self._model(run), self.setting.checksum, [t.id for t in test])
        name = f"{calculator.label}-{fmax:.6g}-{known}.npz"
        file = self.setting.out / "reference" / name
        found = read_records(file)
        if found is None:
            self.report(f"relaxing {len(test)} structures with {calculator.source}")
            records, facts = relaxed_by(calculator, self._model(run), test, fmax, self.report)
            write_records(file, records, facts | {"machine": describe()})
            found = read_records(file)
            assert found is not None
        self._note_machine(found[1])
        return Predicted(tuple(from_record(r) for r in found[0]), found[1])

    def _predicted(self, run: Run, kind: str, make: Callable) -> Predicted:
        records, facts = self._records(run, kind, make)
        return Predicted(tuple(from_record(r) for r in records), facts)

    def _records(self, run: Run, kind: str, make: Callable) -> tuple[list, dict[str, Any]]:
        key = run.digest, kind
        if key not in self._kept:
            folder = folder_of(self.setting.out, run)
            file = folder / "predictions" / f"{kind}.npz"
            found, stamp = read_records(file), _stamp(folder)
            if found is None or found[1].get("model") != stamp:
                self.report(f"predicting: {run.name} ({kind})")
                records, facts = make(self._model(run), self._test(run))
                write_records(file, records, facts | {"model": stamp, "machine": describe()})
                found = read_records(file)
                assert found is not None
            self._kept[key] = found
            self.left_out.update(found[1]["left_out"])
            self._note_machine(found[1])
        return self._kept[key]

    def _note_machine(self, facts: dict[str, Any]) -> None:
        if "machine" in facts:  # not recorded by earlier versions
            self.machines.append(facts["machine"])

    def _model(self, run: Run) -> RelaxNet:
        if run.digest not in self._models:
            self._models[run.digest] = load_model(folder_of(self.setting.out, run) / "model")
        return self._models[run.digest]

    def _test(self, run: Run) -> list[RelaxationTrajectory]:
        ids = tuple(split_of_run(folder_of(self.setting.out, run), "test"))
        if ids not in self._tests:
            found, _ = read_trajectories(self.setting.data, run.config, lambda _: None)
            self._tests[ids] = list(found.named(ids))
        return self._tests[ids]

    # Training

    def facts(self, run: Run) -> dict[str, Any]:
        """Minutes, epochs and machine of a run, among others; see `training`."""
        return read_facts(folder_of(self.setting.out, run))

    def epochs(self, run: Run) -> list[dict[str, Any]]:
        """The records of a run's ``metrics.jsonl``."""
        return read_epochs(folder_of(self.setting.out, run))

    def epoch_seconds(self, run: Run) -> float | None:
        """Median training time in s of an epoch with the run's own loss, without compilation.

        None if an implicit run did not get beyond its static first epochs.
        """
        first = run.config.train.static_epochs
        rates = [r["structures_per_second"] for r in self.epochs(run) if r["epoch"] >= first]
        file = folder_of(self.setting.out, run) / "model" / "model.json"
        known = json.loads(file.read_text())["statistics"]
        trained = known["training_relaxations"] + known.get("later_starts", 0)
        return trained / statistics.median(rates) if rates and min(rates) > 0 else None

    def memory(self, run: Run) -> int:
        """Peak memory in bytes of the training step on the largest bucket, as compiled by XLA."""
        file = folder_of(self.setting.out, run) / "memory.json"
        if not file.is_file():
            self.report(f"memory: {run.name}")
            self.setting.write_shares([run], self.report)
            work = load_work(run.config, self.report)
            largest = max(work.buckets, key=lambda b: b.shape.cost)
            step = training_step(work, largest.batch, run.config.dynamics.latent == "static")
            _, compiled, _ = compile_once(step.function, step.arguments, step.donate)
            with atomic_path(file) as temporary:
                temporary.write_text(json.dumps({"bytes": memory_bytes(compiled)}))
        return int(json.loads(file.read_text())["bytes"])


def _stamp(folder: Path) -> str:
    """What stored predictions depend on: the checksum of the model."""
    return json.loads((folder / "model" / "model.json").read_text())["sha256"]
