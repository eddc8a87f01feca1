"""The EMT data the package makes itself, and their cache."""

import numpy as np
import pytest
from ase.calculators.emt import EMT

from relaxnet_jax.data import TrajectoryStore, default_dataset, emt_relaxations, generate
from relaxnet_jax.errors import InputError


@pytest.fixture(scope="module")
def relaxations():
    counts = []
    made = list(emt_relaxations(12, seed=3, progress=lambda *c: counts.append(c)))
    assert [done for done, _ in counts] == list(range(1, 13))
    assert all(attempts >= done for done, attempts in counts)
    return made


def test_sound_and_converged(relaxations):
    for k, traj in enumerate(relaxations):
        traj.validate()
        assert traj.id == f"emt-3-{k:05d}" and traj.source == "ASE EMT (not DFT)"
        assert traj.group == traj.formula
        assert 4 <= traj.n_atoms <= 16 and 2 <= traj.n_frames <= 101
        assert traj.fmax[-1] < 0.02 < traj.fmax[0]
        assert traj.energies[-1] < traj.energies[0] - 1e-3
        assert not traj.variable_cell
        surface = k % 3 == 2
        assert traj.fixed_mask.any() == surface and (traj.stresses is None) == surface
        moved = np.linalg.norm(traj.positions[-1] - traj.positions[0], axis=-1)
        assert np.all(moved[traj.fixed_mask] == 0)
        assert 0.03 < moved.max() < 2
    assert len({traj.group for traj in relaxations}) >= 8


def test_labels_are_those_of_their_frame(relaxations):
    """Every recorded step has the energy, raw forces and stress of its own positions."""
    for traj in relaxations[:3]:
        for k in (0, 1, traj.n_frames - 1):
            atoms = traj.atoms(k)
            atoms.calc = EMT()
            np.testing.assert_allclose(traj.energies[k], atoms.get_potential_energy(), atol=1e-9)
            raw = atoms.get_forces(apply_constraint=False)
            np.testing.assert_allclose(traj.forces[k], raw, atol=1e-9)
            if traj.stresses is not None:
                np.testing.assert_allclose(traj.stresses[k], atoms.get_stress(), atol=1e-9)
    surface = relaxations[2]
    assert np.abs(surface.forces[:, surface.fixed_mask]).max() > 1e-3


def test_each_depends_on_seed_and_index_only(relaxations):
    again = list(emt_relaxations(3, seed=3))
    for one, other in zip(again, relaxations):
        np.testing.assert_array_equal(one.positions, other.positions)
        np.testing.assert_array_equal(one.energies, other.energies)
    other_seed = next(emt_relaxations(1, seed=4))
    assert other_seed.energies[0] != relaxations[0].energies[0]


def test_unconverged_attempts_are_replaced(monkeypatch, relaxations):
    monkeypatch.setattr(generate, "MAX_STEPS", relaxations[0].n_frames - 2)
    counts = []
    try:
        made = list(emt_relaxations(1, seed=3, progress=lambda *c: counts.append(c)))
    except RuntimeError:
        pytest.fail("none of the attempts converged")
    assert counts[0][1] > 1
    assert made[0].n_frames < relaxations[0].n_frames


def test_bad_number():
    with pytest.raises(InputError, match="EMT data, n: 0 relaxations asked for: give 1 or more"):
        next(emt_relaxations(0))


def test_default_dataset_is_cached_and_mended(tmp_path, monkeypatch):
    monkeypatch.setenv("RELAXNET_JAX_CACHE", str(tmp_path / "cache"))
    lines = []
    path = default_dataset(3, seed=1, report=lines.append)
    assert path == tmp_path / "cache" / f"emt-n3-seed1-v{generate.GENERATOR_VERSION}.h5"
    assert len(lines) == 1 and lines[0].startswith("making 3 EMT relaxations")
    with TrajectoryStore(path) as store:
        assert len(store) == 3
        energies = store[2].energies
    stamp = path.stat().st_mtime_ns
    assert default_dataset(3, seed=1, report=lines.append) == path
    assert len(lines) == 1 and path.stat().st_mtime_ns == stamp
    raw = bytearray(path.read_bytes())
    path.write_bytes(raw[: len(raw) // 2])
    default_dataset(3, seed=1, report=lines.append)
    assert "damaged; making them again" in lines[1] and lines[2].startswith("making 3")
    with TrajectoryStore(path) as store:
        store.verify()
        np.testing.assert_array_equal(store[2].energies, energies)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_cache_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RELAXNET_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="cannot be written"):
        default_dataset(1)
