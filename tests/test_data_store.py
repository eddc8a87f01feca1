"""The HDF5 store: round trip, laziness, damage."""

import os
import pickle
import tracemalloc

import h5py
import numpy as np
import pytest

from relaxnet_jax.data import RelaxationTrajectory, TrajectoryStore, store_write, write_store
from relaxnet_jax.errors import InputError

REMEDY = r"make one with 'relaxnet-jax data import FILE --out NAME\.h5'"
FIELDS = [
    "atomic_numbers",
    "positions",
    "cells",
    "pbc",
    "energies",
    "forces",
    "fixed_mask",
    "stresses",
    "charges",
    "times",
]


def random_trajectory(k, n=None, n_atoms=None):
    """A sound relaxation whose sizes and optional fields depend on ``k``."""
    rng = np.random.default_rng(k)
    n, n_atoms = n or 2 + k % 4, n_atoms or 1 + k % 5
    grid = np.stack(np.unravel_index(np.arange(n_atoms), (60, 60, 60)), axis=1) * 2.0
    return RelaxationTrajectory(
        id=f"id {k} ä",
        atomic_numbers=rng.integers(1, 119, n_atoms),
        positions=grid + rng.normal(0, 0.1, (n, n_atoms, 3)),
        cells=np.eye(3) * 120 + rng.normal(0, 0.1, (n, 3, 3)),
        pbc=rng.random(3) < 0.5,
        energies=rng.normal(-1e4, 1, n),
        forces=rng.normal(0, 1, (n, n_atoms, 3)),
        fixed_mask=rng.random(n_atoms) < 0.5,
        group=f"group {k % 3}",
        stresses=rng.normal(0, 1, (n, 6)) if k % 2 else None,
        charges=rng.normal(0, 1, n_atoms) if k % 3 else None,
        times=np.sort(rng.random(n)) if k % 4 == 1 else None,
        source="Ångström code" if k % 2 else "",
    )


def assert_same(one, other):
    assert (one.id, one.group, one.source) == (other.id, other.group, other.source)
    for name in FIELDS:
        a, b = getattr(one, name), getattr(other, name)
        if a is None:
            assert b is None, name
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)
            assert a.dtype == b.dtype, name


@pytest.mark.parametrize("flush", [1, 30, 65_536])
def test_round_trip(tmp_path, monkeypatch, flush):
    monkeypatch.setattr(store_write, "FLUSH_ROWS", flush)
    given = [random_trajectory(k) for k in range(13)]
    path = tmp_path / "new" / "a.h5"
    assert write_store(path, iter(given), metadata={"code": "ä", "n": 3}) == 13
    assert os.listdir(path.parent) == ["a.h5"]
    with TrajectoryStore(path) as store:
        store.verify()
        assert len(store) == 13
        for k in [*range(13), -1, np.int64(4)]:
            assert_same(given[k], store[k])
            store[k].validate()
        assert store.ids == [t.id for t in given]
        assert store.groups == [t.group for t in given]
        assert store.n_atoms.tolist() == [t.n_atoms for t in given]
        assert store.n_frames.tolist() == [t.n_frames for t in given]
        elements = np.unique(np.concatenate([t.atomic_numbers for t in given]))
        np.testing.assert_array_equal(store.elements(), elements)
        assert store.metadata == {"code": "ä", "n": 3}
        for beyond in (13, -14):
            with pytest.raises(IndexError):
                store[beyond]
        with pytest.raises(TypeError):
            store[0:2]


def test_checksum_is_of_the_content(tmp_path, monkeypatch):
    def checksum(name, trajectories):
        write_store(tmp_path / name, trajectories)
        with h5py.File(tmp_path / name) as file:
            return file.attrs["sha256"]

    given = [random_trajectory(k) for k in range(4)]
    first = checksum("a.h5", given)
    monkeypatch.setattr(store_write, "FLUSH_ROWS", 1)
    assert checksum("b.h5", given) == first
    assert checksum("c.h5", given[::-1]) != first


def test_shards_folder_and_pickle(tmp_path):
    given = [random_trajectory(k) for k in range(7)]
    write_store(tmp_path / "s" / "b.h5", given[3:])
    write_store(tmp_path / "s" / "a.h5", given[:3])
    for source in (tmp_path / "s", [tmp_path / "s" / "a.h5", str(tmp_path / "s" / "b.h5")]):
        with TrajectoryStore(source) as store:
            assert store.ids == [t.id for t in given]
            for k in range(7):
                assert_same(given[k], store[k])
            store.verify()
    copy = pickle.loads(pickle.dumps(TrajectoryStore(tmp_path / "s")))
    assert_same(given[5], copy[5])
    write_store(tmp_path / "s" / "c.h5", given[:1])
    with pytest.raises(InputError, match="stores share ids: give each relaxation once"):
        TrajectoryStore(tmp_path / "s")
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match=r"none: no \.h5 file in this folder"):
        TrajectoryStore(tmp_path / "none")


def test_memory_stays_at_one_relaxation(tmp_path):
    """Writing and reading 18 MB needs a few MB: neither holds the data set."""
    sizes = {"n": 20, "n_atoms": 500}

    def peak(work):
        tracemalloc.start()
        work()
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return high / 2**20

    path = tmp_path / "a.h5"
    one = random_trajectory(1, **sizes)
    total = 40 * 2 * one.positions.nbytes / 2**20
    assert total > 18

    def trajectories():
        for k in range(40):
            object.__setattr__(one, "id", f"{k}")
            yield one

    def read():
        with TrajectoryStore(path) as store:
            assert sum(store[k].n_frames for k in range(len(store))) == 800

    # HDF5's own caches are not traced; they have a fixed size.
    assert peak(lambda: write_store(path, trajectories())) < 12
    assert peak(read) < 8


def test_nothing_half_written_stays(tmp_path):
    path = tmp_path / "a.h5"
    write_store(path, [random_trajectory(0)])
    before = path.read_bytes()

    def interrupted():
        yield random_trajectory(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(path, interrupted())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.h5"]


def test_write_refuses(tmp_path):
    good, bad = random_trajectory(0), random_trajectory(1)
    bad.energies[1] = np.nan
    with pytest.raises(InputError, match=r"a\.h5: relaxation 'id 1 ä', frame 1, energies"):
        write_store(tmp_path / "a.h5", [good, bad])
    with pytest.raises(InputError, match=r"a\.h5: relaxation 'id 0 ä', id: given twice"):
        write_store(tmp_path / "a.h5", [good, good])
    with pytest.raises(InputError, match=r"a\.h5: no relaxations to write"):
        write_store(tmp_path / "a.h5", [])
    with pytest.raises(InputError, match=r"a\.xyz: unknown suffix '\.xyz': end the store in"):
        write_store(tmp_path / "a.xyz", [good])
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="choose another output path"):
        write_store(tmp_path / "file" / "a.h5", [good])


def damage(path, how):
    """Does one thing to a good store."""
    raw = path.read_bytes()
    if how == "truncated":
        path.write_bytes(raw[: len(raw) // 2])
    elif how == "text":
        path.write_text("not a store")
    elif how == "foreign":
        with h5py.File(path, "w") as file:
            file["x"] = 1
    else:
        with h5py.File(path, "a") as file:
            if how == "version":
                file.attrs["version"] = 99
            elif how == "column":
                del file["pairs/forces"]
            elif how == "short":
                file["frames/energies"].resize(3, axis=0)
            elif how == "attribute":
                del file.attrs["sha256"]
    return path


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "no such store"),
        ("text", "not an HDF5 file or damaged"),
        ("truncated", "not an HDF5 file or damaged"),
        ("foreign", "HDF5, but not a store of relaxations"),
        ("version", "store version 99, this package reads 1"),
        ("column", "damaged store"),
        ("short", "damaged store .*frames/energies has the wrong length"),
        ("attribute", "damaged store"),
    ],
)
def test_unreadable_store(tmp_path, how, message):
    path = tmp_path / "a.h5"
    if how != "missing":
        write_store(path, [random_trajectory(k) for k in range(6)])
        damage(path, how)
    with pytest.raises(InputError, match=rf"a\.h5: {message}.*: {REMEDY}$") as caught:
        TrajectoryStore(path)
    assert "\n" not in str(caught.value)


def test_locked_store(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    write_store(tmp_path / "a.h5", [random_trajectory(0)])
    with open(tmp_path / "a.h5", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"a\.h5: cannot be opened \(.* unavailable\): check"):
            TrajectoryStore(tmp_path / "a.h5")


@pytest.mark.parametrize("name", ["frames/energies", "relaxations/pbc", "atoms/fixed_mask"])
def test_verify_notices_a_changed_number(tmp_path, name):
    path = tmp_path / "a.h5"
    write_store(path, [random_trajectory(k) for k in range(6)])
    with h5py.File(path, "a") as file:
        value = file[name][3:4]
        file[name][3:4] = ~value if value.dtype == bool else np.nextafter(value, 0)
    with (
        TrajectoryStore(path) as store,
        pytest.raises(InputError, match=rf"a\.h5: content does not match its checksum: {REMEDY}"),
    ):
        store.verify()


def test_damaged_chunk_is_named_on_reading(tmp_path):
    path = tmp_path / "a.h5"
    write_store(path, [random_trajectory(k) for k in range(6)])
    with h5py.File(path) as file:
        chunk = file["pairs/positions"].id.get_chunk_info(0)
    raw = bytearray(path.read_bytes())
    raw[chunk.byte_offset + chunk.size // 2] ^= 0xFF
    path.write_bytes(raw)
    with (
        TrajectoryStore(path) as store,
        pytest.raises(InputError, match=rf"a\.h5: damaged store \(.*{REMEDY}"),
    ):
        store[2]
