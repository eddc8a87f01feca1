"""Reports of training: JSON lines, TensorBoard, and a progress bar."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from relaxnet_jax.config import Config
from relaxnet_jax.data.files import write_text

METRICS = "metrics.jsonl"  # in a workdir


class MetricsLog:
    """Appends one JSON object per epoch to ``metrics.jsonl``; optionally TensorBoard events.

    On resume, records after the restored epoch are dropped first.
    """

    def __init__(self, folder: Path, keep_until: int, tensorboard: bool) -> None:
        self.path = folder / METRICS
        kept = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # the run was killed while writing it
                    continue
                if record["epoch"] <= keep_until and not record["partial"]:
                    kept.append(line)
        write_text(self.path, "".join(line + "\n" for line in kept))
        self._events = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            # Readers then drop earlier events of the epochs that are trained again.
            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=keep_until + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Appends a record; numbers that are not finite are written as null."""
        clean = _finite(record)
        with self.path.open("a") as file:
            file.write(json.dumps(clean) + "\n")
        if self._events is not None:
            rate = clean["learning_rate"]
            self._events.add_scalar("learning_rate", rate, record["epoch"])
            for group in ("train", "validation"):
                for name, value in clean[group].items():
                    if value is not None:
                        self._events.add_scalar(f"{group}/{name}", value, record["epoch"])
            self._events.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def model_score(validation: Mapping[str, float], config: Config) -> dict[str, float]:
    """The validation errors stored in an exported model, without values that are not finite.

    Args:
      validation: the validation means of an epoch's record.

    Returns:
      positions_over_nothing, strain_over_nothing: errors at the end of the path, as fractions of
      those of doing nothing. forces_mae_eV_per_angstrom, energy_mae_eV_per_atom: mean absolute
      errors over all frames.
    """
    found = {}
    for ours, nothing, name in (
        ("coordinates", "nothing", "positions_over_nothing"),
        ("strain", "nothing_strain", "strain_over_nothing"),
    ):
        if validation.get(nothing):
            found[name] = validation[ours] / validation[nothing]
    if config.loss.energy_per == "atom" and "energy" in validation:
        found["energy_mae_eV_per_atom"] = validation["energy"]
    if "force_error" in validation and config.dynamics.latent != "direct":
        found["forces_mae_eV_per_angstrom"] = validation["force_error"]
    return {name: float(f"{value:.4g}") for name, value in found.items() if math.isfinite(value)}


def _coordinates(validation: dict[str, float]) -> str:
    if "coordinates" not in validation:  # a static model predicts none
        return ""
    nothing = validation["nothing"]
    ratio = validation["coordinates"] / nothing if nothing else math.nan
    return f"x {1e3 * validation['coordinates']:.1f} mÅ ({ratio:.2f} of doing nothing)  "


def _strain(validation: dict[str, float]) -> str:
    if "strain" not in validation:
        return ""
    nothing = validation["nothing_strain"]
    ratio = validation["strain"] / nothing if nothing else math.nan
    return f"strain {1e2 * validation['strain']:.2f} % ({ratio:.2f})  "


class ConsoleReport:
    """Progress on the terminal: a bar within the epoch, a line per epoch."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._task: Any = None

    def __call__(self, message: str) -> None:
        """Prints a line."""
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    @classmethod
    def silent(cls) -> ConsoleReport:
        """Creates a report that shows nothing, for all processes but the first."""
        return cls(Console(quiet=True))

    def start_epoch(self, epoch: int, batches: int) -> None:
        """Opens the progress bar of an epoch."""
        self._bar = Progress(
            TextColumn(f"epoch {epoch:4d}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=batches, note="")

    def batch(self, done: int, loss: float, rate: float) -> None:
        """Advances the progress bar."""
        if self._bar is not None:
            self._bar.update(
                self._task, completed=done, note=f"loss {loss:.4f}  {rate:.1f} structures/s"
            )

    def end_epoch(self) -> None:
        """Closes the progress bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def epoch(self, record: dict[str, Any], left: str, energy_per: str) -> None:
        """Prints the line of an epoch."""
        train, validation = record["train"], record["validation"]
        self(
            f"epoch {record['epoch']:4d}  loss {train['loss']:.4f}, validation {validation['loss']:.4f}  "
            f"E {1e3 * validation['energy']:.1f} meV/{energy_per}  F {1e3 * validation['force_error']:.0f} meV/Å  "
            f"{_coordinates(validation)}{_strain(validation)}"
            f"{record['structures_per_second']:.1f} structures/s  {left}{'  *' if record['best'] else ''}"
        )
