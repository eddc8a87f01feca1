"""Some relaxations of a store, read when indexed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from relaxnet_jax.data.store import TrajectoryStore
from relaxnet_jax.data.trajectory import RelaxationTrajectory


class Relaxations(Sequence[RelaxationTrajectory]):
    """Rows of a store as a sequence of relaxations; memory for one at a time.

    Attributes:
      store: where they are. rows: (R,) int64, which of its relaxations. name: for captions.
    """

    def __init__(self, store: TrajectoryStore, rows: np.ndarray, name: str) -> None:
        self.store, self.rows, self.name = store, np.asarray(rows, np.int64), name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return self.take(i)
        return self.store[int(self.rows[i])]

    def __iter__(self) -> Iterator[RelaxationTrajectory]:
        return (self.store[int(row)] for row in self.rows)

    @property
    def ids(self) -> list[str]:
        """Their names."""
        ids = self.store.ids
        return [ids[row] for row in self.rows]

    @property
    def groups(self) -> list[str]:
        """Their groups."""
        groups = self.store.groups
        return [groups[row] for row in self.rows]

    def named(self, ids: Collection[str]) -> Relaxations:
        """Those with these ids."""
        wanted = set(ids)
        keep = [name in wanted for name in self.ids]
        return self.take(np.array(keep, bool))

    def take(self, which: np.ndarray | slice) -> Relaxations:
        """Some of them, by position or mask."""
        return Relaxations(self.store, self.rows[which], self.name)
