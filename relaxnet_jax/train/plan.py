"""Which batches an epoch still has to visit, and which of them are this process's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Batches = list[tuple[int, list[int]]]  # (bucket, sample indices) of each


class Run(NamedTuple):
    """Batches of one step, one for each device.

    Attributes:
      indices: samples in all of them. mine: the batches of this process's devices.
    """

    indices: list[int]
    mine: Batches


def remaining_runs(
    pack: Callable[[np.ndarray, int, int], Batches],
    members: np.ndarray,
    n: int,
    mine: slice,
    done: Sequence[Sequence[int]],
    shares: int = 1,
) -> list[Run]:
    """The steps an epoch has left; every sample comes once, however often it was resumed.

    Args:
      pack: (members, n, shares) -> the batches of an epoch over them on n devices, n of a bucket in
        a row; always the same for the same arguments.
      members: samples of the whole epoch. n: devices now. mine: this process's among them.
      done: (devices, steps, shares) done so far, one entry for each number of devices and shares;
        of two numbers, as once written, with the present shares.
      shares: in how many parts a batch is divided now: buckets depend on it.
    """
    earlier, skip = [(*entry, shares)[:3] for entry in done], 0
    if earlier and earlier[-1][::2] == (n, shares):
        skip = earlier.pop()[1]
    for devices, steps, parts in earlier:
        plan = pack(members, devices, parts)[: steps * devices]
        members = np.setdiff1d(members, [i for _, batch in plan for i in batch])
    plan = pack(members, n, shares)
    runs = [plan[k : k + n] for k in range(skip * n, len(plan), n)]
    return [Run([i for _, batch in run for i in batch], run[mine]) for run in runs]
