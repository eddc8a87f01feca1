"""Measurements kept as they are made: a run that was cut off, or out of time, can go on."""

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
    """What figures depend on: machine (but for its load), versions, code, settings, and data as they are.

    Args:
      facts: see `machine.describe`. configs: what is measured. others: what else it depends on.
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
    """Name, bytes and time of a file, or of those in a folder; nothing where there is none."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


class Notebook:
    """Entries by key, on disk after each; nothing is measured after the time is over.

    Attributes:
      entries: what was measured. missing: keys there was no time for.
    """

    def __init__(
        self, path: Path, identity: Entry, minutes: float, report: Callable[[str], None]
    ) -> None:
        """Goes on with the unfinished notebook at ``path`` of the same identity, else anew.

        Args:
          identity: everything the figures depend on, for JSON; see `conditions`.
          minutes: after which no measurement begins.
        """
        self.path, self.identity, self._report = path, json.loads(json.dumps(identity)), report
        self._deadline = time.monotonic() + 60 * minutes
        self.entries: dict[str, Entry] = {}
        self.missing: list[str] = []
        self._load = round(os.getloadavg()[0], 2)  # of others: later it is this program's own too
        found = _read(path)
        if found.get("identity") == self.identity and not found.get("complete", True):
            self.entries = found["entries"]
            report(f"{path}: unfinished; its {len(self.entries)} measurements are kept")

    def entry(self, key: str, measure: Callable[[], Entry]) -> Entry | None:
        """The measurement of this key: kept, or made now; None when the time is over.

        Of what does not fit in memory it says so, and the next one can be made.
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
        """What is written."""
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
