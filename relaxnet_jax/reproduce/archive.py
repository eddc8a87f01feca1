"""Arrays of many structures, such as comparisons, in one npz file without pickles."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relaxnet_jax.data.files import atomic_path
from relaxnet_jax.metrics import Comparison

Records = Sequence[Mapping[str, np.ndarray]]
FACTS = "facts"


def write_records(path: Path, records: Records, facts: Mapping[str, Any]) -> None:
    """Writes named arrays of each structure, and facts as JSON, atomically."""
    arrays = {f"{i}/{k}": np.asarray(v) for i, one in enumerate(records) for k, v in one.items()}
    text = json.dumps({**facts, "records": len(records)})
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, **{FACTS: np.array(text)}, **arrays)  # type: ignore[arg-type]


def read_records(path: Path) -> tuple[list[dict[str, np.ndarray]], dict[str, Any]] | None:
    """Reads what `write_records` wrote; None if missing or damaged, so that it is made again."""
    try:
        with np.load(path, allow_pickle=False) as file:
            facts = json.loads(str(file[FACTS]))
            records: list[dict[str, np.ndarray]] = [{} for _ in range(facts.pop("records"))]
            for key in file.files:
                if key != FACTS:
                    row, _, name = key.partition("/")
                    records[int(row)][name] = file[key]
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile):
        return None
    return records, facts


def to_record(c: Comparison) -> dict[str, np.ndarray]:
    """A comparison as arrays."""
    fields = {f.name: getattr(c, f.name) for f in dataclasses.fields(c)}
    return {k: np.asarray(v) for k, v in fields.items() if v is not None}


def from_record(record: Mapping[str, np.ndarray]) -> Comparison:
    """The comparison that `to_record` turned into arrays."""
    plain: dict[str, Any] = {k: v.item() if v.ndim == 0 else v for k, v in record.items()}
    return Comparison(**plain)
