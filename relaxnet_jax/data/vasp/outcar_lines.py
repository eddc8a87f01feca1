"""Lines and tables of an OUTCAR, read from a stream with only one chunk in memory."""

from __future__ import annotations

import re
from typing import IO

import numpy as np

from relaxnet_jax.data.vasp.unfinished import Cut
from relaxnet_jax.data.vasp.vasprun import is_number
from relaxnet_jax.errors import InputError

_CHUNK = 1 << 20
_LONGEST_LINE = 1 << 16
# Beginnings of the lines of interest, after blanks, or after dashes for those in `_DASHED`.
_MARKS = (
    b"TITEL  =",
    b"VRHFIN =",
    b"number of dos",
    b"ions per type",
    b"ZVAL   =",
    b"IBRION =",
    b"PSTRESS=",
    b"using selective dynamics",
    b" Iteration ",
    b" aborting loop ",
    b"total charge",
    b"in kB",
    b"direct lattice vectors",
    b"POSITION  ",
    b"free  energy",
    b"energy  without entropy",
    b"energy of chain is (eV)",
    b"NEB: projections on to tangent",
    b"General timing and accounting",
)
_DASHED = (b" Iteration ", b" aborting loop ")
# Beginnings of lines in the head, which ends with the first iteration: tags for
# `functional.functional_of` whose value is one word, and others.
FUNCTIONAL_MARKS = (
    b"GGA     =",
    b"METAGGA=",
    b"LHFCALC =",
    b"AEXX    =",
    b"HFSCREEN=",
    b"LUSE_VDW   =",
    b"LSORBIT =",
    b"ISPIN  =",
)
_HEAD = (
    *FUNCTIONAL_MARKS,
    b"NELM   =",
    b"ISIF   =",
    b"IVDW ",
    b"LDA+U is selected",
    # From the INCAR, which newer versions repeat.
    b"LATTICE_CONSTRAINTS",
    b"ML_LMLFF",
    b"ML_FF_LMLFF",
)
_GLUED = re.compile(rb"(?<=\d)-")


class Scanner:
    """Searches a binary stream for lines of interest and forgets what it has passed.

    Only lines that end in a line break are seen: the last line of a truncated file may end in half a
    number.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._buffer, self._at = file, b"", 0
        self._hits: list[tuple[int, bytes]] = []
        self._marks: tuple[bytes, ...] = _MARKS + _HEAD

    def _more(self) -> bool:
        """Reads the next chunk; False at the end of the file."""
        if len(self._buffer) - self._at > _LONGEST_LINE + 2 * _CHUNK:
            raise InputError(
                "lines longer than 64 kB, or an unterminated table: the file is damaged"
            )
        chunk = self._file.read(_CHUNK)
        self._buffer, self._at = self._buffer[self._at :] + chunk, 0
        upto = self._buffer.rfind(b"\n") + 1
        hits = []
        for mark in self._marks:
            found = self._buffer.find(mark, 0, upto)
            while found >= 0:
                hits.append((found, mark))
                found = self._buffer.find(mark, found + 1, upto)
        self._hits = sorted(hits, reverse=True)
        if any(mark == b" Iteration " for _, mark in hits):
            self._marks = _MARKS
        return bool(chunk)

    def line(self) -> tuple[bytes, bytes] | None:
        """(its beginning in `_MARKS` or `_HEAD`, the line) of the next line of interest; None at the end."""
        while True:
            while self._hits:
                found, mark = self._hits.pop()
                if found < self._at:
                    continue
                start = self._buffer.rfind(b"\n", 0, found) + 1
                before = self._buffer[start:found].strip()
                if before.strip(b"-") if mark in _DASHED else before:
                    continue
                end = self._buffer.index(b"\n", found)
                self._at = end + 1
                return mark, self._buffer[found:end]
            self._at = max(self._at, self._buffer.rfind(b"\n") + 1)
            if not self._more():
                return None

    def lines(self, count: int) -> list[bytes]:
        """The next ``count`` lines; raises Cut if the file ends first."""
        taken: list[bytes] = []
        while len(taken) < count:
            end = self._buffer.find(b"\n", self._at)
            if end >= 0:
                taken.append(self._buffer[self._at : end])
                self._at = end + 1
            elif not self._more():
                raise Cut
        return taken

    def peek(self) -> bytes:
        """The next line, without consuming it; b"" at the end of the file."""
        while (end := self._buffer.find(b"\n", self._at)) < 0:
            if not self._more():
                return b""
        return self._buffer[self._at : end]


def table(lines: list[bytes], columns: int, what: str) -> np.ndarray:
    """Parses lines into (rows, columns) numbers; raises InputError if that fails."""
    # Numbers in a Fortran format touch if the second is negative and fills its field.
    found = [_GLUED.sub(b" -", line).split() for line in lines]
    if any(len(row) != columns for row in found):
        bad = next(len(row) for row in found if len(row) != columns)
        raise InputError(f"{what}: {bad} numbers in a row of {columns}: the file is damaged")
    try:
        return np.array(found, dtype="S").astype(np.float64)
    except ValueError:
        token = next(t for row in found for t in row if not is_number(t)).decode("ascii", "replace")
        raise InputError(
            f"{what}: {token!r} is not a number: too wide for VASP's format, or the file is damaged"
        ) from None
