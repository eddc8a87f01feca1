"""``summary.csv``: how far to trust each result, also where its file format cannot record that."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from relaxnet_jax.data.files import atomic_path
from relaxnet_jax.errors import InputError

NAME = "summary.csv"
COLUMNS = (
    *("name", "input", "relaxed file", "path file"),
    *("energy change (meV/atom)", "volume change (%)", "fmax first (eV/Å)", "fmax last (eV/Å)"),
    *("spread of energy (meV/atom)", "spread of positions (Å)", "converged", "flags"),
    *("refined", "failure", "model", "model checksum"),
)


class Models(NamedTuple):
    """The models that predict.

    Attributes:
      names: their names as they were given; empty if unknown.
      checksum: their `model_folders.checksum`; empty if unknown.
    """

    names: str = ""
    checksum: str = ""

    def __str__(self) -> str:
        return f"{self.names} (checksum {self.checksum})"


UNKNOWN = Models()


def row(
    record: Mapping[str, Any], refine: str | None, failure: str = "", models: Models = UNKNOWN
) -> dict[str, str]:
    """The row of a structure, by `COLUMNS`; its numbers are the model's.

    Args:
      record: from `report.record`, with the input and the output files added.
      refine: the calculator that refined the structure, if the record says that it was refined.
      failure: why it could not be refined; empty otherwise.
      models: the models that predicted it.
    """
    before, after = record["volume_first"], record["volume_last"]
    relaxes = record["cell_relaxed"] and before > 0
    spread = record["spread"] or {"energy_per_atom": None, "positions": None}
    values = (
        *(record["name"], record["input"], record["relaxed_file"], record["path_file"]),
        _number(record["energy_change_per_atom"], 1e3),
        _number(after / before - 1 if relaxes else None, 1e2),
        _number(record["fmax_first"]),
        _number(record["fmax_last"]),
        _number(spread["energy_per_atom"], 1e3),
        _number(spread["positions"]),
        "yes" if record["converged"] else "no",
        ", ".join(flag["name"] for flag in record["flags"]),
        (refine or "") if record.get("refined") is not None else "",
        failure,
        *models,
    )
    return dict(zip(COLUMNS, values))


def failed(name: str, place: str, failure: str) -> dict[str, str]:
    """The row of an input without results; ``name`` is empty if it has none yet."""
    return dict.fromkeys(COLUMNS, "") | {"name": name, "input": place, "failure": failure}


def models_of(row: Mapping[str, str]) -> Models:
    """The models that predicted the structure of a row."""
    return Models(row["model"], row["model checksum"])


def _number(value: float | None, factor: float = 1.0) -> str:
    return "" if value is None else f"{factor * value:.6g}"


def read(folder: Path) -> list[dict[str, str]]:
    """The rows of the folder's summary; empty if it has none.

    Raises:
      InputError: the file of that name is not such a summary.
    """
    file = folder / NAME
    if not file.exists():
        return []
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines)
            rows = [{key: found.get(key) or "" for key in COLUMNS} for found in reader]
            known = {"name", "input"} <= set(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error):
        known = False
    if not known:
        raise InputError(
            f"{file}: is not a summary of this command; rename it, or give another --out"
        )
    return rows


class Summary:
    """The summary of a folder, updated as results arrive."""

    def __init__(self, folder: Path) -> None:
        """Checks a summary that exists. Raises InputError, see `read`."""
        self.folder, self.pending = folder, list[dict[str, str]]()
        read(folder)

    def add(self, rows: list[dict[str, str]]) -> None:
        """Adds rows, replacing those with the same name or, if they have none, the same input.

        Nothing is written before something was relaxed: failures alone create no folder.

        Raises:
          InputError: the summary cannot be written.
        """
        self.pending += rows
        if not (self.folder / NAME).exists() and not any(r["relaxed file"] for r in self.pending):
            return
        kept: dict[tuple[str, str], dict[str, str]] = {}
        for found in [*read(self.folder), *self.pending]:
            name, place = found["name"], found["input"]
            kept.pop(("", place), None)
            kept[(name, "") if name else ("", place)] = found
        file = self.folder / NAME
        try:
            with (
                atomic_path(file) as temporary,
                temporary.open("w", newline="", encoding="utf-8") as out,
            ):
                writer = csv.DictWriter(out, COLUMNS)
                writer.writeheader()
                writer.writerows(kept.values())
        except OSError as error:
            raise InputError(f"{file}: cannot be written ({error.strerror}); free space") from error
        self.pending = []
