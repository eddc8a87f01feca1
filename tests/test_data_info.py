"""What ``data info`` says about a store."""

import dataclasses
import json

import numpy as np
import pytest
from matplotlib.image import imread

from relaxnet_jax.cli import main
from relaxnet_jax.data import RelaxationTrajectory, TrajectoryStore, write_store
from relaxnet_jax.data.quality import duplicates
from relaxnet_jax.data.quality.columns import Columns
from relaxnet_jax.data.quality.duplicates import first_frame, invariants, same_structure
from relaxnet_jax.data.quality.statistics import summarise, summary_lines


def relaxation(name, seed=0, numbers=(29, 29, 8, 8, 8), n=3, **fields):
    """Frames of a random triclinic structure that moves by (0.1, 0.2, 0.2) Å a frame."""
    rng = np.random.default_rng(seed)
    cell = np.diag([4.0, 5.0, 6.0]) + 0.3 * rng.normal(size=(3, 3))
    x = rng.uniform(size=(len(numbers), 3)) @ cell
    steps = np.arange(n)[:, None, None] * np.array([0.1, 0.2, 0.2])
    return RelaxationTrajectory(**{
        "id": name, "atomic_numbers": np.array(numbers), "positions": x + steps,
        "cells": np.repeat(cell[None], n, axis=0), "pbc": np.ones(3, bool),
        "energies": -10.0 - 0.5 * np.arange(n),
        "forces": np.ones((n, len(numbers), 3)) / (1 + np.arange(n))[:, None, None],
        "fixed_mask": np.zeros(len(numbers), bool), "group": "g", "source": "s",
    } | fields)  # fmt: skip


def summary(path, *items, **metadata):
    write_store(path, items, metadata=metadata)
    with TrajectoryStore(path) as store:
        return summarise(store)


def test_counts_and_distributions(tmp_path):
    first = np.array([True, False, False, False, False])
    cells = relaxation("c", 2).cells * np.array([1, 1.02, 1.1])[:, None, None]
    got = summary(
        tmp_path / "a.h5",
        relaxation("a", 0),
        relaxation("b", 1, numbers=(29, 79, 79), n=5, group="h", charges=np.ones(3)),
        relaxation("c", 2, cells=cells, stresses=np.ones((3, 6)), source="other"),
        relaxation("d", 3, fixed_mask=first),
    )
    assert (got.relaxations, got.frames, got.atoms) == (4, 14, 18)
    assert got.elements == {"O": (3, 9), "Cu": (4, 7), "Au": (1, 2)}
    flags = (got.with_stresses, got.with_charges, got.with_fixed_atoms, got.variable_cell)
    assert flags == (1, 1, 1, 1)
    assert (got.groups, got.largest_groups) == (2, [("g", 3), ("h", 1)])
    assert (got.sources, got.largest_sources) == (2, [("s", 3), ("other", 1)])
    d = got.distributions
    assert dataclasses.astuple(d["frames"]) == (4, 3, 3, 3, 3.5, 5)
    np.testing.assert_allclose(got.values["energy_drop"], [0.2, 2 / 3, 0.2, 0.2])
    np.testing.assert_allclose(got.values["first_fmax"], np.sqrt(3))
    np.testing.assert_allclose(got.values["last_fmax"], np.sqrt(3) / np.array([3, 5, 3, 3]))
    # A rigid translation is no displacement, unless a fixed atom says where the structure is.
    moved = got.values["displacement"]
    np.testing.assert_allclose(moved[[0, 1, 3]], [0, 0, 0.6], atol=1e-12)
    assert moved[2] > 0.05
    assert d["volume_change"].n == 1
    np.testing.assert_allclose(d["volume_change"].median, 33.1)


def rotated(t):
    turn, _ = np.linalg.qr(np.random.default_rng(8).normal(size=(3, 3)))
    turn *= np.sign(np.linalg.det(turn))
    return dataclasses.replace(t, positions=t.positions @ turn, cells=t.cells @ turn)


def moved(t, by):
    return dataclasses.replace(t, positions=t.positions + by)


def copies(t):
    """The same structure, written in other ways."""
    rng = np.random.default_rng(5)
    order = rng.permutation(t.n_atoms)
    images = rng.integers(-2, 3, size=(t.n_atoms, 3)) @ t.cells[0]
    noise = 5e-4 * rng.uniform(-1, 1, size=(t.n_atoms, 3))
    return {
        "itself": t,
        "shorter": dataclasses.replace(
            t, positions=t.positions[:2], cells=t.cells[:2], energies=t.energies[:2],
            forces=t.forces[:2],
        ),
        "other order": dataclasses.replace(
            t, positions=t.positions[:, order], atomic_numbers=t.atomic_numbers[order]
        ),
        "other images": moved(t, images),
        "translated": moved(t, [0.3, -0.7, 1.1]),
        "rotated": rotated(t),
        "rounded": moved(t, noise),
        "all": rotated(moved(moved(t, images), noise + np.array([0.3, -0.7, 1.1]))),
    }  # fmt: skip


def others(t):
    """Nearly the same structure."""
    x = t.positions.copy()
    x[:, 3, 2] += 0.02
    return {
        "one atom moved": dataclasses.replace(t, positions=x),
        "elements swapped": dataclasses.replace(t, atomic_numbers=t.atomic_numbers[::-1]),
        "other element": dataclasses.replace(t, atomic_numbers=t.atomic_numbers + 1),
        "strained": dataclasses.replace(t, positions=1.01 * t.positions, cells=1.01 * t.cells),
        "not periodic": dataclasses.replace(t, pbc=np.array([True, True, False])),
        "mirrored": dataclasses.replace(t, positions=-t.positions),
    }


@pytest.mark.parametrize("seed", range(5))
def test_duplicates(tmp_path, seed):
    t = relaxation("t", seed)
    named = {k: dataclasses.replace(v, id=k) for k, v in {**others(t), **copies(t)}.items()}
    got = summary(tmp_path / "a.h5", *named.values())
    assert [set(ids) for ids in got.duplicates] == [set(copies(t))]
    first = first_frame(t)
    for copy in map(first_frame, copies(t).values()):
        assert same_structure(first, copy)
        assert np.abs(invariants(copy) - invariants(first)).max() < 2e-3
    # The screening alone must not be what tells these apart.
    assert not any(same_structure(first, first_frame(other)) for other in others(t).values())


def test_duplicates_of_slabs_and_molecules(tmp_path):
    slab = relaxation("slab", 1, pbc=np.array([True, True, False]))
    alone = relaxation("molecule", 2, pbc=np.zeros(3, bool), cells=np.zeros((3, 3, 3)))
    items = [slab, alone]
    for t, name in ((slab, "slab 2"), (alone, "molecule 2")):
        items.append(dataclasses.replace(moved(t, [1.0, 2, 3]), id=name))
    # What spans a direction that is not periodic is no part of the structure.
    items[2].cells[:, 2] *= 1.5
    got = summary(tmp_path / "a.h5", *items)
    assert got.duplicates == [["slab", "slab 2"], ["molecule", "molecule 2"]]


def test_many_alike_are_one_set(tmp_path):
    t = relaxation("t")
    got = summary(tmp_path / "a.h5", *(dataclasses.replace(t, id=f"{k}") for k in range(30)))
    assert got.duplicates == [[str(k) for k in range(30)]]
    assert "29 relaxations start from the same structure as another" in summary_lines(got)


def near_equal(n, scale, numbers=(29, 29, 8, 8)):
    """One perfect lattice, rattled ``n`` times; a copy of every tenth, moved and in other order."""
    rng = np.random.default_rng(1)
    lattice = 4.0 * np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    made = []
    for _ in range(n):
        x = lattice + scale * rng.normal(size=(4, 3))
        made.append(duplicates.First(np.array(numbers), x, 4 * np.eye(3), np.ones(3, bool)))
    order = np.array([1, 0, 3, 2])
    moved = [
        f._replace(
            positions=f.positions[order] + [0.1, 0.2, 3.0], atomic_numbers=f.atomic_numbers[order]
        )
        for f in made[::10]
    ]
    return made + moved, [[10 * k, n + k] for k in range(len(moved))]


def search(structures):
    """Groups of duplicates, and how often a structure was read for them."""
    columns, reads = Columns(duplicates.FIELDS), []

    def read(i):
        reads.append(i)
        return structures[i]

    for structure in structures:
        columns.append(**duplicates.row(structure))
    return duplicates.find_duplicates(columns, read), len(reads)


@pytest.mark.parametrize("numbers", [(29, 29, 29, 29), (29, 29, 8, 8), (29, 8, 79, 1)])
@pytest.mark.parametrize("slab", [8192, 100])
def test_near_equal_cells_are_told_apart_without_reading_them(numbers, slab, monkeypatch):
    monkeypatch.setattr(duplicates, "_SLAB", slab)
    structures, expected = near_equal(1000, 0.03, numbers)
    found, reads = search(structures)
    assert found == expected
    assert 200 <= reads < 300


def test_structures_within_the_tolerance_of_the_numbers_take_bounded_time(monkeypatch):
    """Cells that no number tells apart: each is compared with the most alike only."""
    compared = []
    compare = same_structure
    monkeypatch.setattr(duplicates, "same_structure", lambda *x: compared.append(x) or compare(*x))
    structures, expected = near_equal(600, 3e-3)
    found, reads = search(structures)
    assert len(compared) <= 16 * len(structures) and reads <= len(structures)
    assert len(compared) > 8 * len(structures)
    group = {row: k for k, rows in enumerate(found) for row in rows}
    assert all(group[first] == group[copy] for first, copy in expected)


def test_columns():
    columns = Columns({"a": ("<f8", 1), "b": ("<i4", 2)})
    for i in range(10_000):
        columns.append(a=i / 2, b=[i, -i])
        if i == 5000:
            assert len(columns["a"]) == 5001
    np.testing.assert_array_equal(columns["a"], np.arange(10_000) / 2)
    rows = np.array([9999, 0, 4096, 4095])
    np.testing.assert_array_equal(columns.rows("b", rows), np.stack([rows, -rows], axis=1))


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "set.h5"
    items = [relaxation(f"r{k}", k, n=3 + k) for k in range(5)]
    write_store(path, [*items, dataclasses.replace(items[2], id="again")], metadata={"by": "me"})
    return path


def test_command(store, capsys):
    assert main(["data", "info", str(store)]) == 0
    out = capsys.readouterr().out
    assert "6 relaxations, 30 frames, 30 atoms, 2 elements, 1 groups, 1 sources" in out
    assert "again, r2" in out or "r2, again" in out
    assert "by=me" in out and "relaxations with element:\n  O 6, Cu 6" in out
    assert max(map(len, out.splitlines()[1:])) <= 100
    assert main(["data", "info", str(store), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["duplicates"] == [["r2", "again"]] and result["metadata"] == {"by": "me"}
    frames = result["distributions"]["frames"]
    assert (frames["min"], frames["max"], frames["unit"]) == (3, 7, "")
    assert result["elements"]["O"] == {"relaxations": 6, "atoms": 18}


def test_figure(store, tmp_path, capsys):
    path = tmp_path / "figure.png"
    assert main(["data", "info", str(store), "--figure", str(path)]) == 0
    image = imread(path)
    assert image.shape[0] > 900 and image.shape[1] == 1600
    # Something is drawn in each of the four panels.
    ink = (image[..., :3].min(axis=-1) < 0.8).astype(float)
    half = image.shape[0] // 2
    panels = [*np.array_split(ink[:half], 3, axis=1), ink[half:]]
    assert min(panel.mean() for panel in panels) > 0.005


def test_bad_input(tmp_path, store, capsys):
    (tmp_path / "words.h5").write_text("hello")
    for name, message in (("absent.h5", "no such store"), ("words.h5", "not an HDF5 file")):
        for command in ("info", "check"):
            assert main(["data", command, str(tmp_path / name)]) == 2
            error = capsys.readouterr().err.strip()
            assert f"{name}: {message}" in error and "\n" not in error
    assert main(["data", "info", str(store), "--figure", f"{store}/x.png"]) == 2
    assert "cannot be written" in capsys.readouterr().err
