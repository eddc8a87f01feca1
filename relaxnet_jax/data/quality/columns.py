"""Columns of numbers for many relaxations, on disk instead of in memory."""

from __future__ import annotations

import os
import tempfile

import numpy as np

_BLOCK = 512  # rows gathered before they are written


class Columns:
    """Named columns with one row per relaxation, in temporary files that vanish with the object.

    Args:
      fields: (dtype, width) of a row of each column, by name.
    """

    def __init__(self, fields: dict[str, tuple[str, int]]) -> None:
        self._types = {name: (np.dtype(dtype), width) for name, (dtype, width) in fields.items()}
        self._files = {
            name: tempfile.TemporaryFile(prefix="relaxnet-jax-")  # noqa: SIM115 - see __del__
            for name in fields
        }
        self._blocks = {
            name: np.empty((_BLOCK, width), dtype) for name, (dtype, width) in self._types.items()
        }
        self._filled = 0

    def __del__(self) -> None:
        for file in self._files.values():
            file.close()

    def append(self, **row: object) -> None:
        """Adds a row: for every column a number, or an array of the column's width."""
        for name, block in self._blocks.items():
            block[self._filled] = row[name]
        self._filled += 1
        if self._filled == _BLOCK:
            self._flush()

    def _flush(self) -> None:
        for name, file in self._files.items():
            file.seek(0, os.SEEK_END)
            file.write(self._blocks[name][: self._filled].tobytes())
            file.flush()
        self._filled = 0

    def __getitem__(self, name: str) -> np.ndarray:
        """(R,) values of a column of width 1, all in memory."""
        self._flush()
        file, (dtype, _) = self._files[name], self._types[name]
        column = np.empty(os.fstat(file.fileno()).st_size // dtype.itemsize, dtype)
        file.seek(0)
        file.readinto(column.data)
        return column

    def rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """(len(rows), width) values of a column in the given rows."""
        self._flush()
        dtype, width = self._types[name]
        size = dtype.itemsize * width
        descriptor = self._files[name].fileno()
        data = b"".join(os.pread(descriptor, size, size * row) for row in rows.tolist())
        return np.frombuffer(data, dtype).reshape(-1, width)
