"""A selection of the relaxations of a store, read when indexed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from relaxnet_jax.data.store import TrajectoryStore
from relaxnet_jax.data.trajectory import RelaxationTrajectory

LEAST_FRAMES = 3  # least number of frames of a later start


class Relaxations(Sequence[RelaxationTrajectory]):
    """Rows of a store as a sequence of relaxations, with one in memory at a time.

    Attributes:
      store: the store with the relaxations.
      rows: (R,) int64, index in the store of each relaxation.
      name: name of the data, for captions.
      starts: (R,) int64, frame at which each relaxation begins; those before it are left out.
    """

    def __init__(
        self, store: TrajectoryStore, rows: np.ndarray, name: str, starts: np.ndarray | None = None
    ) -> None:
        self.store, self.rows, self.name = store, np.asarray(rows, np.int64), name
        self.starts = np.zeros(len(self.rows), np.int64) if starts is None else starts

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return self.take(i)
        return self.store[int(self.rows[i])].begun_at(int(self.starts[i]))

    def __iter__(self) -> Iterator[RelaxationTrajectory]:
        return (self[i] for i in range(len(self)))

    @property
    def ids(self) -> list[str]:
        """Ids of the relaxations, ``ID@FRAME`` for later starts."""
        ids = self.store.ids
        return [f"{ids[row]}@{k}" if k else ids[row] for row, k in zip(self.rows, self.starts)]

    @property
    def groups(self) -> list[str]:
        """Groups of the relaxations."""
        groups = self.store.groups
        return [groups[row] for row in self.rows]

    def named(self, ids: Collection[str]) -> Relaxations:
        """The relaxations with the given ids."""
        wanted = set(ids)
        keep = [name in wanted for name in self.ids]
        return self.take(np.array(keep, bool))

    def take(self, which: np.ndarray | slice) -> Relaxations:
        """A subset of the relaxations, by position or mask."""
        return Relaxations(self.store, self.rows[which], self.name, self.starts[which])

    def with_cell(self, i: int) -> tuple[RelaxationTrajectory, bool]:
        """Relaxation ``i``, and whether the cell of the whole relaxation changes.

        The cell is free in all later starts of such a relaxation, even if it stays constant from there.
        """
        whole = self.store[int(self.rows[i])]
        return whole.begun_at(int(self.starts[i])), whole.variable_cell

    def with_later_starts(self, which: np.ndarray, n: int) -> tuple[Relaxations, np.ndarray]:
        """Appends later starts: some of the relaxations again, beginning at later frames.

        Wherever on its path a relaxation begins, it continues in the same way. The relaxations must begin at
        their first frames themselves.

        Args:
          which: positions of the relaxations that get later starts.
          n: number of later starts for each, at a half, a quarter, … of its frames; fewer if one
            would leave fewer than `LEAST_FRAMES` or repeat a frame at which it already begins.

        Returns:
          All relaxations, and the positions of those that were added.
        """
        rows = self.rows[which]
        frames = self.store.n_frames[rows]
        rows, later = (
            np.tile(rows, n),
            np.concatenate([frames // 2 ** (k + 1) for k in range(n)] or [[]]),
        )
        later = later.astype(np.int64)
        fits = (later > 0) & (np.tile(frames, n) - later >= LEAST_FRAMES)
        pairs = np.unique(np.stack([rows[fits], later[fits]], axis=1), axis=0)
        every = Relaxations(
            self.store,
            np.concatenate([self.rows, pairs[:, 0]]),
            self.name,
            np.concatenate([self.starts, pairs[:, 1]]),
        )
        return every, np.arange(len(self), len(every))
