"""Measurements kept as they are made: a run that was cut off, or out of time, can go on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from relaxnet_jax.data.files import atomic_path

Entry = dict[str, Any]


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
          identity: everything the figures depend on (device, versions, configs, data), for JSON.
          minutes: after which no measurement begins.
        """
        self.path, self.identity, self._report = path, json.loads(json.dumps(identity)), report
        self._deadline = time.monotonic() + 60 * minutes
        self.entries: dict[str, Entry] = {}
        self.missing: list[str] = []
        found = _read(path)
        if found.get("identity") == self.identity and not found.get("complete", True):
            self.entries = found["entries"]
            report(f"{path}: unfinished; its {len(self.entries)} measurements are kept")

    def entry(self, key: str, measure: Callable[[], Entry]) -> Entry | None:
        """The measurement of this key: kept, or made now; None when the time is over."""
        if key not in self.entries:
            if time.monotonic() > self._deadline:
                self.missing.append(key)
                return None
            self._report(key)
            start = time.monotonic()
            value = measure()
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
