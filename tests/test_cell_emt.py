"""The virial of a potential fitted to EMT's energies and forces is EMT's: nobody tells it stresses."""

import jax
import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT
from tiny import TINY

from relaxnet_jax.batching import fitting_shape
from relaxnet_jax.calculator import RelaxNetCalculator
from relaxnet_jax.config import load_config
from relaxnet_jax.data.pipeline import collate_samples
from relaxnet_jax.data.references import fit_element_energies
from relaxnet_jax.data.sample import make_sample
from relaxnet_jax.data.trajectory import RelaxationTrajectory
from relaxnet_jax.model import create_model
from relaxnet_jax.train.state import initial_train_state
from relaxnet_jax.train.step import make_train_step

CONFIG = load_config(
    TINY,
    {
        "graph.cutoff": 5.0, "graph.skin": 0.6, "model.features": 16, "model.triplet_features": 8,
        "model.layers": 1, "dynamics.latent": "static", "dynamics.cell": "variable", "dynamics.frames": 3,
        "loss.energy": 10.0, "loss.forces": 1.0, "loss.stress": 0.0, "train.ema": 0.0,
    },
)  # fmt: skip


def frames(rng, n=3, strain=0.03, rattle=0.06):
    """Frames of Cu3Au, four atoms each: strained and rattled anew, labelled by EMT."""
    parent = bulk("Cu", cubic=True, a=3.75)
    parent.symbols[0] = "Au"
    found = []
    for _ in range(n):
        e = rng.uniform(-strain, strain, (3, 3))
        atoms = parent.copy()
        atoms.set_cell(parent.cell.array @ (np.eye(3) + (e + e.T) / 2), scale_atoms=True)
        atoms.positions += rng.normal(0, rattle, (4, 3))
        atoms.calc = EMT()
        found.append(atoms)
    return found


def relaxation(name, atoms):
    """Looks like one; the static loss draws its frames at random and knows no order."""
    return RelaxationTrajectory(
        id=name, atomic_numbers=atoms[0].numbers, positions=np.array([a.positions for a in atoms]),
        cells=np.array([a.cell.array for a in atoms]), pbc=np.ones(3, bool),
        energies=np.array([a.get_potential_energy() for a in atoms]),
        forces=np.array([a.get_forces() for a in atoms]), fixed_mask=np.zeros(4, bool),
        stresses=np.array([a.get_stress() for a in atoms]),
    )  # fmt: skip


@pytest.mark.heavy
def test_virial_of_a_potential_fitted_to_emt():
    rng = np.random.default_rng(0)
    training = [relaxation(f"r{i}", frames(rng)) for i in range(64)]
    energies, scale, _ = fit_element_energies(
        ((t.atomic_numbers, t.energies) for t in training), 119
    )
    samples = [make_sample(t, CONFIG) for t in training]
    for s in samples:
        s.energies[:] -= energies[s.structure.atomic_numbers].sum()
    graph, targets = collate_samples(samples, fitting_shape([s.structure for s in samples]), CONFIG)
    model = create_model(CONFIG, 0)
    state = initial_train_state(model.params, CONFIG.train)
    step = jax.jit(make_train_step(CONFIG, scale, static=True))
    steps = 2000
    for k in range(steps):
        rate = np.float32(5e-3 * min(1.0, 2 * (1 - k / steps)))
        state, _ = step(state, (graph, targets), rate, jax.random.key(k))
    model = model.replace(
        params=state.params,
        element_energies=energies,
        energy_scale=np.float32(scale),
        elements=(29, 79),
    )
    calculator = RelaxNetCalculator(model)
    unseen = [a for _ in range(12) for a in frames(rng)]
    ours = np.array([calculator.get_stress(a) for a in unseen])
    emt = np.array([a.get_stress() for a in unseen])
    forces = [np.abs(calculator.get_forces(a) - a.get_forces()).mean() for a in unseen]
    error, spread = np.abs(ours - emt).mean(), np.abs(emt - emt.mean(0)).mean()
    assert np.mean(forces) < 0.25 * np.mean([np.abs(a.get_forces()).mean() for a in unseen])
    assert error < 0.3 * spread
    for component in range(6):
        assert np.corrcoef(ours[:, component], emt[:, component])[0, 1] > 0.95
