"""No structure of real data may give anything that is not finite."""

import csv
from pathlib import Path

import ase.io
import jax
import numpy as np
import pytest
from tiny import SCHEMES, tiny_config

from relaxnet_jax.batching import BatchShape, collate, split_nodes
from relaxnet_jax.data.buckets import plan_buckets, sizes_of
from relaxnet_jax.errors import InputError
from relaxnet_jax.graph import structure_from_atoms
from relaxnet_jax.model import create_model, predict_trajectory

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
FILES = ("crystals", "dft_adsorbates", "dft_mixed", "dft_slabs")
SAMPLE = 40
MAX_ATOMS = 40  # of the default run: the largest structures alone would take most of the time

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is not here")


def first_frames(name, limit):
    """(id, atoms) of the first frame of the first relaxations of a file."""
    found, seen = [], set()
    for atoms in ase.io.iread(DATA / f"{name}.extxyz", index=":"):
        key = atoms.info["traj_id"]
        if key in seen:
            continue
        seen.add(key)
        if limit is None or len(atoms) <= MAX_ATOMS:
            found.append((str(key), atoms))
        if len(found) == limit:
            break
    return found


def check(latent, limit):
    config = tiny_config(latent, model__layers=1, dynamics__frames=2)
    model = create_model(config)
    structures, names = [], []
    for file in FILES:
        frames = first_frames(file, limit)
        assert frames
        for name, atoms in frames:
            try:
                structures.append(structure_from_atoms(atoms, config, name))
                names.append(name)
            except InputError as error:  # named, not crashed
                assert str(error).startswith(name)
    assert len(structures) > 0.98 * 4 * (limit or 0) and len(structures) > 100
    # One shape, one compilation: room for any eight of up to so many atoms in all.
    size = max(160, max(s.n_atoms for s in structures))
    edges = max(s.neighbors.n_edges / s.n_atoms for s in structures)
    bonds = max(s.neighbors.n_bonds / s.n_atoms for s in structures)
    shape = BatchShape(9, size, int(edges * size) + 1, int(bonds * size) + 1)
    predict = jax.jit(predict_trajectory)
    order = np.argsort([s.n_atoms for s in structures])
    pending, batches = [int(i) for i in order], []
    while pending:
        batches.append([pending.pop()])
        while pending and len(batches[-1]) < 8 and (
            sum(structures[i].n_atoms for i in batches[-1]) + structures[pending[0]].n_atoms <= size
        ):  # fmt: skip
            batches[-1].append(pending.pop(0))
    moved = 0
    for batch in batches:
        graph = collate([structures[i] for i in batch], shape)
        result = jax.device_get(predict(model, graph))
        pieces = [split_nodes(np.asarray(v), graph) for v in (
            result.positions, result.velocities, result.forces)]  # fmt: skip
        for k, i in enumerate(batch):
            assert np.isfinite(result.energies[:, k]).all(), names[i]
            assert all(np.isfinite(p[k]).all() for p in pieces), names[i]
            moved += np.abs(pieces[2][k]).max() > 1e-6
    assert moved > 0.8 * len(structures)


@pytest.mark.parametrize("latent", SCHEMES)
def test_sample_is_finite(latent):
    check(latent, SAMPLE)


@pytest.mark.heavy
@pytest.mark.parametrize("latent", SCHEMES)
def test_everything_is_finite(latent):
    check(latent, None)


def test_index_matches():
    """The index beside each file knows the relaxations the tests read."""
    for name in FILES:
        with (DATA / f"{name}.csv").open() as file:
            ids = {row["id"] for row in csv.DictReader(file)}
        assert {key for key, _ in first_frames(name, 5)} <= ids


def test_buckets_of_real_data():
    """A few shapes hold the slabs with little padding."""
    config = tiny_config()
    structures = [structure_from_atoms(a, config) for _, a in first_frames("dft_slabs", 60)]
    buckets = plan_buckets(sizes_of(structures), 8, 3, 0.25)
    assert buckets.padding < 0.6 and len(buckets.shapes) <= 3
