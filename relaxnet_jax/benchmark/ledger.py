"""Stores results that took long, line by line, and finds them again by what they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relaxnet_jax.errors import InputError


class Ledger:
    """A file of JSON lines; a process that is killed loses at most the line it was writing."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the ledger. Raises InputError if the file cannot be read or written."""
        self.path = path
        self._known: dict[str, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            # A line that was cut off must not swallow the next one.
            with path.open("a", encoding="utf-8") as file:
                file.write("\n" if text and not text.endswith("\n") else "")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path}: cannot be read or written ({error}); give another --out"
            ) from error
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self._known[entry["key"]] = entry["value"]
            except (ValueError, KeyError, TypeError):  # cut off: the result is computed again
                continue

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> dict[str, Any] | None:
        """The value stored under a key from `fingerprint`; None if there is none."""
        return self._known.get(key)

    def put(self, key: str, value: Mapping[str, Any]) -> None:
        """Stores a value that JSON can hold; it is on disk when this returns."""
        self._known[key] = dict(value)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "value": value}, allow_nan=False) + "\n")


def fingerprint(facts: Mapping[str, Any]) -> str:
    """A key made of everything that a result depends on; arrays count to the last bit."""
    text = json.dumps(facts, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _plain(value: Any) -> Any:
    return value.tolist()
