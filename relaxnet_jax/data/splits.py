"""Splits into training, validation and test structures, with no material in two of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from relaxnet_jax.errors import InputError


class Splits(NamedTuple):
    """Ascending int64 indices of the structures in each split; each structure is in exactly one."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split_groups(
    groups: Sequence[str],
    fractions: tuple[float, float, float] = (0.9, 0.05, 0.05),
    fold: int = 0,
    seed: int = 0,
    name: str = "splits",
) -> Splits:
    """Splits structures so that structures of one group stay together.

    The groups are dealt to folds of about ``fractions[2]`` of the structures each: larger groups
    first, each to the fold with the fewest structures so far. Fold ``fold`` is the test split, so the
    test splits of all folds are disjoint and together cover all structures. Fold 0 is the one with
    the most groups among folds of the right size. Validation gets its fraction from the other
    groups. The result depends on which groups there are and how large they are, not on the order of
    the structures.

    Args:
      groups: (R,) group of each structure.
      fractions: fractions of the structures in training, validation and test, summing to 1. Training
        and test must be positive; validation may be 0 (then it is empty).
      fold: 0 to round(1/fractions[2]) - 1 (or one less than the number of groups, if lower).
      seed: seed of the dealing.
      name: name of what is split, for error messages.

    Raises:
      InputError: there are fewer groups than splits, the fractions do not sum to 1, or there is no
        such fold.
    """
    train, validation, test = fractions
    if min(fractions) < 0 or train == 0 or test == 0 or abs(sum(fractions) - 1) > 1e-6:
        raise InputError(
            f"splits: {tuple(fractions)}: give three fractions that sum to 1, with positive "
            "training and test"
        )
    names, inverse, sizes = np.unique(
        np.asarray(list(groups), dtype=str), return_inverse=True, return_counts=True
    )
    if len(names) < 3:
        raise InputError(
            f"{name}: {len(names)} group(s) of structures: three splits need 3 groups or more; import "
            "more materials, define the groups (relaxnet-jax data import --groups CSV), or, if the "
            "relaxations are independent of each other, make each a group of its own (relaxnet-jax data "
            "split --by id, for data.split_file)"
        )
    n_groups = len(names)
    # With three groups each must be a fold, or the other splits would not get one each.
    n_folds = 3 if n_groups == 3 else min(max(2, round(1 / test)), n_groups)
    if not 0 <= fold < n_folds:
        raise InputError(f"splits, fold: {fold}: give 0 to {n_folds - 1}")
    order = np.random.default_rng(seed).permutation(n_groups)
    folds = _deal(order, sizes, n_folds)
    # Fold 0 has the most groups among the folds nearest to the fraction asked for (to a tenth of it):
    # an error over many materials is more informative than one dominated by a single material.
    totals, wanted = np.bincount(folds, weights=sizes, minlength=n_folds), test * sizes.sum()
    deviation = np.abs(totals - wanted) / wanted
    counts = np.bincount(folds, minlength=n_folds)
    ranked = np.lexsort((deviation, -counts, np.round(10 * deviation)))
    split = np.where(folds == ranked[fold], 2, 0)
    rest = order[split[order] == 0]
    split[_pick(rest, sizes, validation * sizes.sum())] = 1
    of_structure = split[inverse]
    return Splits(*(np.flatnonzero(of_structure == k).astype(np.int64) for k in range(3)))


def _deal(order: np.ndarray, sizes: np.ndarray, n_folds: int) -> np.ndarray:
    """(G,) fold of each group: largest groups first, each to the fold that holds least so far.

    ``order`` decides among groups of equal size. No fold gets more than G - 2 groups, so that two
    are left for the other splits.
    """
    folds = np.zeros(len(order), dtype=np.int64)
    filled, counts = np.zeros(n_folds), np.zeros(n_folds, dtype=int)
    for group in order[np.argsort(-sizes[order], kind="stable")]:
        fold = int(np.argmin(np.where(counts < len(order) - 2, filled, np.inf)))
        folds[group] = fold
        filled[fold] += sizes[group]
        counts[fold] += 1
    return folds


def _pick(groups: np.ndarray, sizes: np.ndarray, target: float) -> np.ndarray:
    """Takes groups, in the order given, whose sizes sum to about ``target``.

    At least one group is taken, but not all of them; none if ``target`` is 0.
    """
    if target == 0:
        return groups[:0]
    taken: list[int] = []
    total = 0
    for group in groups:
        # Only groups that bring the sum nearer to the target.
        if abs(total + sizes[group] - target) < abs(total - target):
            taken.append(group)
            total += sizes[group]
    if not taken:
        taken = [int(groups[np.argmin(sizes[groups])])]
    if len(taken) == len(groups):
        taken.remove(int(groups[np.argmax(sizes[groups])]))
    return np.array(taken, dtype=np.int64)
