"""Keeps measurements as they are made, so that a run cut off or out of time can be continued."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from relaxnet_jax import programs
from relaxnet_jax.config import Config, to_dict
from relaxnet_jax.data.files import atomic_path
from relaxnet_jax.memory import ERRORS, out_of_memory

Entry = dict[str, Any]


def conditions(facts: Entry, configs: Sequence[Config], **others: Any) -> Entry:
    """Everything figures depend on: machine (but not its load), versions, code, settings and data files.

    Args:
      facts: see `machine.describe`.
      configs: the configurations that are measured.
      others: what else the figures depend on.
    """
    settings: Any = jax.config
    return {k: v for k, v in facts.items() if k not in ("load_average", "memory_bytes")} | {
        "code": programs.CODE,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "matmul_precision": settings.jax_default_matmul_precision,
        "configs": [to_dict(c) for c in configs],
        "data": {c.data.path: _files(Path(c.data.path)) for c in configs if c.data.path},
        **others,
    }


def _files(path: Path) -> list[tuple[str, int, int]]:
    """Name, bytes and time of change of a file, or of each file in a folder; empty if there is none."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


class Notebook:
    """Measurements by key, on disk after each one; none is begun when the time is over.

    Attributes:
      entries: the measurements.
      missing: keys for which no time was left.
    """

    def __init__(
        self, path: Path, identity: Entry, minutes: float, report: Callable[[str], None]
    ) -> None:
        """Continues the unfinished notebook at ``path`` if its identity is the same, else begins anew.

        Args:
          path: the JSON file.
          identity: everything the figures depend on, for JSON; see `conditions`.
          minutes: time after which no measurement begins.
          report: called with one line for each remark.
        """
        self.path, self.identity, self._report = path, json.loads(json.dumps(identity)), report
        self._deadline = time.monotonic() + 60 * minutes
        self.entries: dict[str, Entry] = {}
        self.missing: list[str] = []
        # Others' load; later it includes this program's own.
        self._load = round(os.getloadavg()[0], 2)
        found = _read(path)
        if found.get("identity") == self.identity and not found.get("complete", True):
            self.entries = found["entries"]
            report(f"{path}: resuming; {len(self.entries)} measurements already made")

    def entry(self, key: str, measure: Callable[[], Entry]) -> Entry | None:
        """The measurement under this key, made now unless it is kept; None if the time is over.

        One that does not fit in memory is recorded as skipped, and the next one can be made.
        """
        if key not in self.entries:
            if time.monotonic() > self._deadline:
                self.missing.append(key)
                return None
            self._report(key)
            start = time.monotonic()
            try:
                value = measure()
            except ERRORS as error:
                if not out_of_memory(error):
                    raise
                value = {"skipped": "does not fit in memory"}
            value["load_average"] = self._load
            value["took_s"] = round(time.monotonic() - start, 2)
            self.entries[key] = value
            self._write(complete=False)
        return self.entries[key]

    def finish(self) -> None:
        """Marks the notebook as complete, unless something is missing."""
        self._write(complete=not self.missing)

    def document(self, complete: bool) -> Entry:
        """The document that is written."""
        return {
            "complete": complete,
            "missing": self.missing,
            "identity": self.identity,
            "entries": self.entries,
        }

    def _write(self, complete: bool) -> None:
        with atomic_path(self.path) as temporary:
            temporary.write_text(json.dumps(self.document(complete), indent=1))


def _read(path: Path) -> Entry:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # none yet, or damaged: it is measured again
        return {}
    return found if isinstance(found, dict) else {}
