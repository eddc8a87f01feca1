"""The model that comes with the package: it is there, as its card says, and it relaxes crystals."""

import json
import re
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, graphene
from ase.constraints import FixAtoms

import relaxnet_jax
from relaxnet_jax import cli
from relaxnet_jax.config import load_config
from relaxnet_jax.model import load_model, model_folder
from relaxnet_jax.predict import relax
from relaxnet_jax.starting import head_start
from relaxnet_jax.train.start import read_start, start_facts

CARD = Path(__file__).parents[1] / "docs" / "pretrained.md"

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def model():
    return load_model()


def rattled():
    """Crystals at rest on a lattice of high symmetry, and the same disturbed."""
    perfect = [
        bulk("MgO", "rocksalt", a=4.22, cubic=True),
        bulk("CsCl", "cesiumchloride", a=4.12) * (2, 1, 1),
        bulk("ZnS", "zincblende", a=5.41, cubic=True),
        bulk("Cu", "fcc", a=3.61, cubic=True),
    ]
    disturbed = [atoms.copy() for atoms in perfect]
    for k, atoms in enumerate(disturbed):
        atoms.rattle(0.1, seed=k)
    return perfect, disturbed


def test_it_lies_in_the_package_and_is_what_the_config_makes(model):
    folder = model_folder()
    assert folder == model_folder("pretrained") and folder.is_relative_to(
        Path(relaxnet_jax.__file__).parent
    )
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4e6
    config = load_config("explicit_cell.py")
    for part in ("graph", "model", "dynamics"):
        assert getattr(model.config, part) == getattr(config, part)


def test_held_atoms_keep_their_place_in_the_lattice(model):
    """A cell that relaxes takes fixed atoms along, on the path and in the atoms a head start moves."""
    atoms = bulk("NaCl", "rocksalt", a=5.3, cubic=True)
    atoms.rattle(0.05, seed=1)
    atoms.set_constraint(FixAtoms([0, 3]))
    before = atoms.copy()
    result = head_start(atoms, model, n_frames=3)
    assert result.moved and np.abs(atoms.cell.array - before.cell.array).max() > 0.02
    np.testing.assert_allclose(atoms.positions, result.path.positions[-1], atol=1e-6)
    np.testing.assert_allclose(atoms.cell.array, result.path.cells[-1])
    held = [a.get_scaled_positions(wrap=False)[[0, 3]] for a in (before, atoms)]
    np.testing.assert_allclose(held[1], held[0], atol=1e-6)
    kept = before.copy()
    head_start(kept, model, n_frames=3, relax_cell=False)
    np.testing.assert_array_equal(kept.cell.array, before.cell.array)
    np.testing.assert_array_equal(kept.positions[[0, 3]], before.positions[[0, 3]])


def test_sheets_and_wires_without_all_lattice_vectors(model):
    """They relax, in the directions they have, and beside others in a batch."""
    sheet = graphene(vacuum=None)
    wire = Atoms("Al", cell=[0, 0, 2.6], pbc=(False, False, True))
    rocksalt = bulk("MgO", "rocksalt", a=4.2)
    assert sheet.cell.rank == 2 and wire.cell.rank == 1
    found = relax(model, [sheet, wire, rocksalt], n_frames=3)
    for path, atoms in zip(found, (sheet, wire, rocksalt)):
        assert np.isfinite(path.positions).all() and np.isfinite(path.energies).all()
        assert (path.cells[:, ~atoms.cell.any(1)] == 0).all()
    assert np.abs(found[0].cells[-1] - sheet.cell.array).max() > 1e-4


def test_the_card_tells_what_is_shipped(model):
    text = CARD.read_text(encoding="utf-8")
    facts = (model_folder() / "model.json").read_text()
    digest = re.search(r'"sha256": "([0-9a-f]{64})"', facts)[1]
    assert digest[:12] in text
    assert f"{len(model.elements)} elements" in text
    assert "not DFT" in text


def test_rattled_crystals_come_back(model):
    """Within the lattice, whatever the cell does; the best known answer is the perfect one."""
    perfect, disturbed = rattled()
    paths = relax(model, disturbed, relax_cell=False)

    def error(positions, reference):
        difference = positions - reference
        return np.sqrt(np.mean((difference - difference.mean(0)) ** 2))

    for reference, start, path in zip(perfect, disturbed, paths):
        before = error(start.positions, reference.positions)
        after = error(path.positions[-1], reference.positions)
        assert after < 0.7 * before, start.get_chemical_formula()
        assert path.energies[-1] < path.energies[0]
        assert np.ptp(path.cells, axis=0).max() == 0


def test_training_and_comparisons_begin_with_it():
    config = load_config("explicit_cell.py", {"train.start_from": "pretrained"})
    assert read_start(config).config.model == config.model
    assert len(start_facts(config)["started_from"]) == 64
    splits = json.loads((model_folder() / "splits.json").read_text())
    assert not set(splits["train"]) & set(splits["test"]) and len(splits["test"]) >= 70


def test_relax_and_predict_use_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ase.io.write("POSCAR", rattled()[1][0])
    assert cli.main(["relax", "POSCAR"]) == 0
    out, err = capsys.readouterr()
    assert "1 relaxed" in out and "not on DFT" in err
    names = sorted(file.name.removeprefix(tmp_path.name) for file in Path("relaxed").iterdir())
    assert names == ["-path.extxyz", "-relaxed.vasp", "summary.csv"]
    ase.io.write("cell.extxyz", rattled()[1][0])
    assert cli.main(["predict", "cell.extxyz", "--out", "path.extxyz"]) == 0
    assert len(ase.io.read("path.extxyz", ":")) == 5
