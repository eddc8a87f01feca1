"""Which batches an epoch still has to visit, and which of them belong to this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Batches = list[tuple[int, list[int]]]  # (bucket, sample indices) of each


class Run(NamedTuple):
    """The batches of one step, one for each device.

    Attributes:
      indices: indices of the samples in all batches.
      mine: the batches of this process's devices.
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
    """The steps an epoch has left; every sample comes once, however often the run was resumed.

    Args:
      pack: (members, n, shares) -> the batches of an epoch over the members on n devices, with n
        batches of the same bucket in a row; deterministic.
      members: indices of the samples of the whole epoch.
      n: present number of devices.
      mine: slice of the n devices that belong to this process.
      done: entries (devices, steps, shares) of the steps done so far, one for each number of devices
        and shares. Entries of two numbers, from earlier versions, have the present shares.
      shares: present number of parts into which a batch is divided, on which the buckets depend.
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
