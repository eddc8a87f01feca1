"""Other starts for the same relaxation: the frames stay where they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from test_cell_data import relaxation
from tiny import crystal, slab, tiny_config, tiny_model

from relaxnet_jax.batching import fitting_shape
from relaxnet_jax.data.pipeline import collate_samples
from relaxnet_jax.data.sample import make_sample
from relaxnet_jax.model import network_of
from relaxnet_jax.potential import energies_and_forces
from relaxnet_jax.strain import deform_positions
from relaxnet_jax.train.perturb import perturbed

CHANGES = {"train__noise": 0.05, "train__strain_noise": 0.02, "dynamics__mass": "unit"}


def config_of(**changes):
    return tiny_config(dynamics__cell="variable", **(CHANGES | changes))


@pytest.fixture
def batch(x64):
    """A crystal whose cell relaxes, the same one with its cell held, and a slab on fixed atoms."""
    moving, held = relaxation(crystal(), "a"), relaxation(crystal(), "bb")
    held = type(held)(**{**held.__dict__, "cells": np.repeat(held.cells[:1], 3, 0)})
    on_slab = relaxation(slab(), "ccc", grow=(0, 0, 0))
    cells = np.repeat(slab().cell.array[None], 3, 0)
    fixed = {"cells": cells, "fixed_mask": np.arange(len(slab())) < 2, "pbc": slab().pbc,
             "stresses": None}  # fmt: skip
    on_slab = type(on_slab)(**{**on_slab.__dict__, **fixed})
    samples = [make_sample(t, config_of()) for t in (moving, held, on_slab)]
    shape = fitting_shape([s.structure for s in samples])
    return collate_samples(samples, shape, config_of(), np.float64)


def shaken(batch, config, seed=0):
    return perturbed(config, network_of(config), *batch, jax.random.key(seed))


def cartesian(graph, targets):
    return deform_positions(targets.cells.deformation, targets.positions, graph.nodes["graph"])


def test_frames_stay_where_they_are(batch):
    graph, targets = batch
    config = config_of(train__noise_share=1.0)
    other, seen = shaken(batch, config)
    np.testing.assert_allclose(cartesian(other, seen), cartesian(graph, targets), atol=1e-12)
    before = graph.globals["cell"] @ np.swapaxes(targets.cells.deformation, -1, -2)
    after = other.globals["cell"] @ np.swapaxes(seen.cells.deformation, -1, -2)
    np.testing.assert_allclose(after, before, atol=1e-12)
    product = seen.cells.deformation @ seen.cells.inverse
    np.testing.assert_allclose(product, np.broadcast_to(np.eye(3), product.shape), atol=1e-12)
    # Only the cell that relaxes is strained, by about what was asked for and without a rotation.
    change = np.linalg.solve(graph.globals["cell"][0], other.globals["cell"][0])
    assert 0.003 < np.abs(change - np.eye(3)).mean() < 0.05
    np.testing.assert_allclose(change, change.T, atol=1e-12)
    np.testing.assert_array_equal(other.globals["cell"][1:], graph.globals["cell"][1:])
    # The first frame is no longer the start's.
    assert not seen.frame_mask[0].any()
    np.testing.assert_array_equal(seen.frame_mask[1:], targets.frame_mask[1:])


def test_who_moves(batch):
    graph, _ = batch
    other, _ = shaken(batch, config_of(train__noise_share=1.0, train__strain_noise=0.0))
    moved = np.asarray(other.nodes["positions"] - graph.nodes["positions"])
    node, fixed = graph.nodes["graph"], graph.nodes["fixed"]
    assert (moved[fixed | ~graph.nodes["mask"]] == 0).all()
    free = graph.nodes["mask"] & ~fixed
    assert 0.02 < moved[free].std() < 0.08
    for index in (0, 1):  # nothing holds these two: they keep their centre
        np.testing.assert_allclose(moved[node == index].mean(0), 0, atol=1e-12)


def test_where_nothing_can_move_the_first_frame_counts(x64):
    """A lone atom, and a slab all of whose atoms are fixed: held cells, so there is no other start."""
    lone = relaxation(bulk("Cu"), "a", grow=(0, 0, 0))
    still = relaxation(slab(), "bb", grow=(0, 0, 0))
    made = []
    for t, atoms, fixed in ((lone, bulk("Cu"), False), (still, slab(), True)):
        held = {"cells": np.repeat(atoms.cell.array[None], 3, 0), "pbc": atoms.pbc,
                "fixed_mask": np.full(len(atoms), fixed), "stresses": None}  # fmt: skip
        made.append(type(t)(**{**t.__dict__, **held}))
    strained = relaxation(bulk("Cu"), "ccc")
    strained = type(strained)(**{**strained.__dict__, "positions": np.zeros((3, 1, 3))})
    config = config_of(train__noise_share=1.0)
    samples = [make_sample(t, config) for t in (*made, strained)]
    shape = fitting_shape([s.structure for s in samples])
    both = collate_samples(samples, shape, config, np.float64)
    other, seen = shaken(both, config)
    np.testing.assert_array_equal(other.nodes["positions"], both[0].nodes["positions"])
    assert seen.frame_mask[0, :3].tolist() == [True, True, False]


def test_a_share_of_them(batch):
    graph, targets = batch
    same, unseen = shaken(batch, config_of(train__noise_share=0.0))
    np.testing.assert_array_equal(same.nodes["positions"], graph.nodes["positions"])
    np.testing.assert_array_equal(unseen.frame_mask, targets.frame_mask)
    kept = np.array([shaken(batch, config_of(), seed)[1].frame_mask[0, :3] for seed in range(40)])
    assert ((kept.mean(0) > 0.2) & (kept.mean(0) < 0.8)).all()


def test_the_graph_is_that_of_the_new_start(batch):
    """Its energy is that of a graph built anew from the moved atoms in the strained cell."""
    config = config_of(train__noise_share=1.0)
    model = tiny_model(config)
    other, _ = shaken(batch, config, 3)
    positions = jnp.asarray(other.nodes["positions"])
    latent = model.network.apply({"params": model.params}, other, positions, method="encode").h
    scale = model.energy_scale
    found = energies_and_forces(model.network, model.params, scale, other, positions, latent)
    atoms = Atoms(
        crystal().numbers, np.asarray(positions)[:3], cell=other.globals["cell"][0], pbc=True
    )
    energy, forces = model.energy_and_forces(atoms)
    np.testing.assert_allclose(found.energies[0], energy, rtol=1e-8)
    np.testing.assert_allclose(found.forces[:3], forces, atol=1e-8)
