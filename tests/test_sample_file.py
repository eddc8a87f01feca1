"""Samples on disk: the same as made in memory, found again, made again when damaged."""

import dataclasses
import os
import time

import numpy as np
import pytest
from test_pipeline import CONFIG, relaxation
from tiny import molecule, slab, systems, tiny_config

from relaxnet_jax.data import sample_file
from relaxnet_jax.data.buckets import size_of
from relaxnet_jax.data.relaxations import Relaxations
from relaxnet_jax.data.sample import make_sample
from relaxnet_jax.data.sample_file import SampleView, prepare_samples
from relaxnet_jax.data.store import TrajectoryStore
from relaxnet_jax.data.store_write import write_store


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RELAXNET_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "samples"


@pytest.fixture
def relaxations(tmp_path):
    """Nine relaxations of three kinds and lengths, one with charges."""
    made = [
        dataclasses.replace(relaxation(a, n=3 + k, name=f"{k}-{i}", seed=k), group=str(k))
        for k in range(3)
        for i, a in enumerate(systems())
    ]
    made[4] = dataclasses.replace(made[4], charges=np.linspace(-1, 1, made[4].n_atoms))
    write_store(tmp_path / "set.h5", made)
    store = TrajectoryStore(tmp_path / "set.h5")
    return Relaxations(store, np.arange(len(store)), "set")


def same(a, b):
    """Every array of two samples is equal, dtype included."""
    assert a.id == b.id
    pairs = [(vars(a), vars(b)), (vars(a.structure), vars(b.structure)),
             (vars(a.structure.neighbors), vars(b.structure.neighbors))]  # fmt: skip
    for x, y in pairs:
        assert x.keys() == y.keys()
        for name in x.keys() - {"id", "structure", "neighbors"}:
            np.testing.assert_array_equal(x[name], y[name], err_msg=name)
            assert np.asarray(x[name]).dtype == np.asarray(y[name]).dtype, name


def test_samples_come_back_as_made(relaxations):
    file = prepare_samples(relaxations, CONFIG)
    table = np.linspace(-3, 3, 119)
    rows = np.array([7, 2, 4])
    view = SampleView(file, rows, table)
    assert len(file) == 9 and len(view) == 3 and not file.left_out
    for k, row in enumerate(rows):
        truth = make_sample(relaxations[int(row)], CONFIG)
        composition = table[truth.structure.atomic_numbers].sum()
        relative = np.where(truth.frame_mask, truth.energies - composition, 0.0)
        truth = dataclasses.replace(truth, energies=relative)
        assert file.id(row) == view.id(k) == truth.id
        same(view[k], truth)
        s = truth.structure
        assert tuple(int(values[k]) for values in view.sizes) == size_of(s)
        for z in range(119):
            alone = np.arange(119) == z
            assert file.has_any(alone)[row] == (z in s.atomic_numbers)


def test_made_once(relaxations, cache, monkeypatch):
    """A second call reads the file; other settings or rows make another one."""
    first = prepare_samples(relaxations, CONFIG)
    with monkeypatch.context() as patch:
        patch.setattr(sample_file, "make_sample", None)
        same(prepare_samples(relaxations, CONFIG)[3], first[3])
    assert len(list(cache.iterdir())) == 1
    prepare_samples(relaxations, tiny_config(dynamics__frames=4))
    prepare_samples(relaxations, tiny_config(dynamics__frames=5, graph__cutoff=4.5))
    prepare_samples(relaxations[2:], CONFIG)
    assert len(list(cache.iterdir())) == 4


def test_later_starts(relaxations, tmp_path, monkeypatch):
    """The way from a later frame on, of those named; the rest of the rows stay where they were."""
    which = np.array([0, 3, 7])  # of 3, 4 and 5 frames
    every, later = relaxations.with_later_starts(which, 2)
    # Half of 3 frames leaves 2 and half of 5 three; a quarter of 4 and 5 leaves the rest but one.
    assert [every.ids[k] for k in later] == ["1-0@1", "2-1@1", "2-1@2"]
    assert every.ids[:9] == relaxations.ids and list(later) == [9, 10, 11]
    whole, rest = every[7], every[11]
    np.testing.assert_array_equal(rest.positions, whole.positions[2:])
    np.testing.assert_array_equal(rest.energies, whole.energies[2:])
    file = prepare_samples(every, CONFIG)
    same(file[11], make_sample(rest, CONFIG))
    same(file[3], prepare_samples(relaxations, CONFIG)[3])
    assert file.path != prepare_samples(relaxations, CONFIG).path
    none, nobody = relaxations.with_later_starts(which, 0)
    assert len(none) == 9 and len(nobody) == 0
    timed = dataclasses.replace(whole, times=np.array([0, 0.1, 0.2, 0.6, 1.0]))
    np.testing.assert_allclose(timed.begun_at(2).times, [0, 0.5, 1])
    store = relaxations.store
    changing = next(t for t in store if t.n_frames == 5 and t.pbc.all())
    cells = changing.cells.copy()
    cells[0] *= 1.01
    write_store(store_path := tmp_path / "cells.h5", [dataclasses.replace(changing, cells=cells)])
    cells_relax = Relaxations(TrajectoryStore(store_path), np.arange(1), "cells")
    both, _ = cells_relax.with_later_starts(np.arange(1), 1)
    config = tiny_config(dynamics__frames=5, dynamics__cell="variable")
    reads, read = [], TrajectoryStore.__getitem__
    monkeypatch.setattr(
        TrajectoryStore, "__getitem__", lambda self, i: reads.append(i) or read(self, i)
    )
    file = prepare_samples(both, config)
    assert reads == [0, 0]  # once for each
    assert not both[1].variable_cell and file[0].structure.strain.any()
    np.testing.assert_allclose(file[1].structure.strain, file[0].structure.strain, atol=1e-12)
    assert [t.id for t in every.take(np.array([11, 0]))] == ["2-1@2", "0-0"]


@pytest.mark.parametrize("damage", ["cut", "emptied", "other bytes at the end"])
def test_damaged_file_is_made_again(relaxations, damage):
    path = prepare_samples(relaxations, CONFIG).path
    whole = path.read_bytes()
    end = {"cut": whole[:-500], "emptied": b"", "other bytes at the end": whole[:-40] + bytes(40)}
    path.write_bytes(end[damage])
    told = []
    prepare_samples(relaxations, CONFIG, told.append)
    assert "damaged; making it again" in told[0] and path.read_bytes() == whole


def test_processes_write_the_same_bytes(relaxations, monkeypatch):
    path = prepare_samples(relaxations, CONFIG).path
    whole = path.read_bytes()
    path.unlink()
    monkeypatch.setattr(sample_file, "PARALLEL", 1)
    monkeypatch.setattr(sample_file, "CHUNK", 2)
    monkeypatch.setattr(sample_file.joblib, "cpu_count", lambda: 2)
    pools, parallel = [], sample_file.joblib.Parallel

    def pool(**options):
        pools.append(options["n_jobs"])
        return parallel(**options)

    monkeypatch.setattr(sample_file.joblib, "Parallel", pool)
    assert prepare_samples(relaxations, CONFIG).path.read_bytes() == whole
    assert pools == [2]


def test_unusable_structure_is_named(tmp_path):
    """Atoms too close for the bases: no sample, a reason, and the others are there."""
    close = molecule()
    close.positions[1] = close.positions[0] + [0.02, 0, 0]
    made = [relaxation(slab(), name="good"), relaxation(close, name="bad")]
    for t in made:
        t.positions[1:] = t.positions[:1]
    write_store(tmp_path / "set.h5", made)
    store = TrajectoryStore(tmp_path / "set.h5")
    file = prepare_samples(Relaxations(store, np.arange(2), "set"), CONFIG)
    assert (
        list(file.left_out) == [1] and "bad" in file.left_out[1] and "Å apart" in file.left_out[1]
    )
    assert file[0].id == "good"
    with pytest.raises(KeyError, match="bad"):
        file[1]


def test_unused_files_are_deleted(relaxations, cache):
    old, used = (prepare_samples(relaxations[k:], CONFIG).path for k in (1, 2))
    for path in (old, used):
        os.utime(path, (0, time.time() - 40 * 86400))
    prepare_samples(relaxations[2:], CONFIG)  # reads it: no longer unused
    new = prepare_samples(relaxations, CONFIG).path
    assert sorted(cache.iterdir()) == sorted([used, new])


def test_store_scalars(relaxations):
    """The small columns alone agree with whole relaxations."""
    store = relaxations.store
    for i in (0, 5, 8):
        numbers, energies = store.energies(i)
        np.testing.assert_array_equal(numbers, store[i].atomic_numbers)
        np.testing.assert_array_equal(energies, store[i].energies)
    assert not store.variable_cell().any()
    assert relaxations.named(["1-0", "2-2"]).ids == ["1-0", "2-2"]


def test_variable_cells_are_found(tmp_path, monkeypatch):
    from relaxnet_jax.data import store as module

    monkeypatch.setattr(module, "BLOCK", 2)
    made = []
    for k in range(5):
        t = relaxation(systems()[2], n=4, name=str(k), seed=k)
        if k in (1, 4):
            t.cells[2, 1, 0] += 2e-4
        made.append(t)
    write_store(tmp_path / "set.h5", made)
    store = TrajectoryStore(tmp_path / "set.h5")
    assert store.variable_cell().tolist() == [t.variable_cell for t in made]
    assert np.flatnonzero(store.variable_cell()).tolist() == [1, 4]
