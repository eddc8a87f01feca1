"""Splits by group, and the selection of frames."""

import numpy as np
import pytest

from relaxnet_jax.data import select_frames, split_groups
from relaxnet_jax.errors import InputError


def some_groups(seed=0, n_groups=60, largest=20):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, largest, n_groups)
    groups = np.repeat([f"g{k}" for k in range(n_groups)], sizes)
    return list(rng.permutation(groups))


def as_sets(groups, splits):
    return [{groups[i] for i in part} for part in splits]


@pytest.mark.parametrize("fractions", [(0.9, 0.05, 0.05), (0.8, 0.1, 0.1), (0.5, 0.25, 0.25)])
@pytest.mark.parametrize("seed", range(5))
def test_partition_and_fractions(fractions, seed):
    groups = some_groups(seed)
    splits = split_groups(groups, fractions, seed=seed)
    assert sorted(np.concatenate(splits)) == list(range(len(groups)))
    train, validation, test = as_sets(groups, splits)
    assert not (train & validation or train & test or validation & test)
    for part, fraction in zip(splits, fractions):
        assert part.dtype == np.int64 and np.all(np.diff(part) > 0)
        assert abs(len(part) / len(groups) - fraction) < 0.02


def test_folds_cover_everything_once():
    groups = some_groups()
    tests = [split_groups(groups, fold=k).test for k in range(20)]
    assert sorted(np.concatenate(tests)) == list(range(len(groups)))
    validations = [split_groups(groups, fold=k).validation for k in range(20)]
    assert all(len(v) and not np.intersect1d(v, t).size for v, t in zip(validations, tests))
    with pytest.raises(InputError, match="splits, fold: 20: give 0 to 19"):
        split_groups(groups, fold=20)
    with pytest.raises(InputError, match="fold: -1"):
        split_groups(groups, fold=-1)


def test_seed_and_order():
    groups = some_groups()
    first = as_sets(groups, split_groups(groups))
    assert as_sets(groups, split_groups(groups)) == first
    assert as_sets(groups, split_groups(groups, seed=1)) != first
    shuffled = list(np.random.default_rng(3).permutation(groups))
    assert as_sets(shuffled, split_groups(shuffled)) == first


@pytest.mark.parametrize("fractions", [(0.9, 0.05, 0.05), (0.4, 0.2, 0.4), (0.1, 0.8, 0.1)])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (100, 1, 1), (50, 1, 1, 1), (9, 9, 9, 9, 200)])
def test_every_split_gets_a_group(fractions, sizes):
    groups = np.repeat([f"g{k}" for k in range(len(sizes))], sizes)
    n_folds = 3 if len(sizes) == 3 else min(max(2, round(1 / fractions[2])), len(sizes))
    for fold in range(n_folds):
        assert all(len(part) for part in split_groups(groups, fractions, fold=fold))


def test_large_group_is_not_the_default_test_split():
    groups = ["big"] * 400 + [f"g{k}" for k in range(600)]
    splits = split_groups(groups)
    assert [len(part) for part in splits] == [918, 50, 32]
    assert "big" in as_sets(groups, splits)[0]


def test_default_test_split_is_of_many_materials():
    """Seven materials of 13 structures each among 510 of one: they wait for later folds."""
    groups = [f"pure{k % 7}" for k in range(91)] + [f"alloy{k}" for k in range(509)]
    sizes = [len({groups[i] for i in split_groups(groups, fold=k).test}) for k in range(20)]
    assert sizes[0] == 30 and sizes == sorted(sizes, reverse=True)
    assert sorted(sizes)[:7] == [18] * 7


def test_validation_may_be_empty():
    splits = split_groups(some_groups(), (0.9, 0.0, 0.1))
    assert len(splits.validation) == 0 and len(splits.train) and len(splits.test)


def test_bad_splits():
    with pytest.raises(InputError, match=r"splits: 2 group\(s\).*need 3 groups or more"):
        split_groups(["a", "b", "b"])
    with pytest.raises(InputError, match="0 group"):
        split_groups([])
    for fractions in [(0.9, 0.05, 0.1), (1.0, 0.0, 0.0), (1.2, -0.1, -0.1), (0.0, 0.5, 0.5)]:
        with pytest.raises(InputError, match="give three fractions that sum to 1"):
            split_groups(["a", "b", "c"], fractions)


def test_equidistant_frames():
    chosen = select_frames(9, 5)
    assert chosen.indices.tolist() == [0, 2, 4, 6, 8]
    assert chosen.slots.tolist() == [0, 1, 2, 3, 4]
    assert chosen.times.tolist() == [0, 0.25, 0.5, 0.75, 1]
    # Few frames keep their places on the grid.
    assert select_frames(2, 5).slots.tolist() == [0, 4]
    assert select_frames(3, 5).slots.tolist() == [0, 2, 4]
    chosen = select_frames(4, 5)
    assert (chosen.indices.tolist(), chosen.slots.tolist()) == ([0, 1, 2, 3], [0, 1, 3, 4])
    assert chosen.times.tolist() == [0, 0.25, 0.75, 1]


@pytest.mark.parametrize("mode", ["equidistant", "all"])
def test_frames_for_all_sizes(mode):
    for n_available in range(2, 40):
        for n_frames in range(2, 40):
            indices, slots, times = select_frames(n_available, n_frames, mode)
            assert len(indices) == len(slots) == len(times) == min(n_available, n_frames)
            assert indices[0] == 0 and indices[-1] == n_available - 1
            assert times[0] == 0 and times[-1] == 1
            assert slots[0] == 0 and slots[-1] <= n_frames - 1
            assert np.all(np.diff(indices) > 0) and np.all(np.diff(slots) > 0)
            own = indices / (n_available - 1)
            if mode == "all":
                np.testing.assert_array_equal(times, own)
            else:
                assert slots[-1] == n_frames - 1
                np.testing.assert_allclose(times, slots / (n_frames - 1))
                # On a grid spaced h and frames spaced H the nearest are half of one away.
                spacing = 1 / (max(n_available, n_frames) - 1)
                assert np.abs(times - own).max() <= spacing / 2 + 1e-12


def test_bad_frame_requests():
    with pytest.raises(InputError, match="frames: 1 wanted"):
        select_frames(5, 1)
    with pytest.raises(InputError, match="frames: 1 available"):
        select_frames(1, 5)
    with pytest.raises(InputError, match="unknown 'some': use 'equidistant' or 'all'"):
        select_frames(5, 5, "some")
