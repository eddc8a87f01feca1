"""Energies and forces: F = -dE/dx, smooth, and finite where symmetry makes angles singular."""

import dataclasses

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.constraints import FixAtoms
from tiny import (
    CASES,
    SCHEMES,
    atom_slices,
    batch,
    compiled,
    crystal,
    no_weights,
    perfect,
    slab,
    split,
    systems,
    tiny_config,
    tiny_model,
)

from relaxnet_jax.batching import fitting_shape
from relaxnet_jax.calculator import RelaxNetCalculator
from relaxnet_jax.errors import InputError
from relaxnet_jax.graph import structure_from_atoms
from relaxnet_jax.model import network_of
from relaxnet_jax.strain import from_voigt

pytestmark = pytest.mark.usefixtures("x64", "optimised")
SYMMETRIC = ("fcc", "rocksalt", "perovskite", "bcc", "one atom", "isolated", "far apart")


@pytest.fixture(scope="module", params=CASES)
def case(request, x64):
    config = tiny_config(request.param)
    return config, tiny_model(config)


def check_forces(config, model, atoms, step=1e-4):
    """Central differences of every structure's energy for every coordinate; largest force."""
    graph = batch(atoms, config)
    x, functions = graph.nodes["positions"], compiled(config)
    latent = functions.start(model, graph, x).latent
    forces = split(functions.forces(model, graph, x, latent).forces, atoms)
    # Structures do not see each other: atom k of all of them is moved at once.
    for k in range(max(len(a) for a in atoms)):
        rows = [r.start + k for r, a in zip(atom_slices(atoms), atoms) if k < len(a)]
        owners = [i for i, a in enumerate(atoms) if k < len(a)]
        for axis in range(3):
            shift = np.zeros(x.shape)
            shift[rows, axis] = step
            up, down = (
                np.asarray(functions.forces(model, graph, x + sign * shift, latent).energies)
                for sign in (1, -1)
            )
            for i in owners:
                numeric, scale = -(up[i] - down[i]) / (2 * step), np.abs(forces[i]).max()
                assert abs(forces[i][k, axis] - numeric) < 1e-5 * scale + 1e-8, (i, k, axis)
    return [np.abs(f).max() for f in forces]


def test_forces_are_the_gradient(case):
    """At fixed latent in the explicit scheme, through the encoder in the implicit one."""
    assert min(check_forces(*case, systems())) > 0.02


@pytest.mark.parametrize("interaction", ["moments", "triplets"])
def test_positions_moved_in_the_encoder(x64, interaction):
    """Its energy knows neither which atoms are held nor how far the neighbour list reaches."""

    def energy(atoms, skin):
        config = tiny_config(
            "implicit", model__update_positions=True, model__interaction=interaction, graph__skin=skin
        )
        graph, functions = batch(atoms, config), compiled(config)
        x = graph.nodes["positions"]
        model = tiny_model(config, factor=60.0)
        found = functions.forces(model, graph, x, functions.start(model, graph, x).latent)
        return np.asarray(found.energies)[: len(atoms)]

    held, free = systems(), systems()
    held[0].set_constraint(FixAtoms([0, 2, 3]))
    free[1].set_constraint()
    expected = energy(free, 0.5)
    np.testing.assert_allclose(energy(held, 0.5), expected, rtol=1e-12)
    for skin in (0.0, 0.9 if interaction == "moments" else 0.6):
        np.testing.assert_allclose(energy(free, skin), expected, rtol=1e-10)


def test_forces_are_the_gradient_near_symmetric_points(case):
    """Collinear bonds everywhere: where textbook Gram-Schmidt would be singular."""
    config, model = case
    rng = np.random.default_rng(0)
    structures = [perfect()[name] for name in ("rocksalt", "perovskite", "collinear", "dimer")]
    for a in structures[:2]:
        a.positions += rng.normal(0, 0.05, (len(a), 3))
    assert min(check_forces(config, model, structures)) > 1e-4  # eV/Å: not zero by symmetry


def test_symmetric_structures(case):
    """Perfect crystals and lone atoms: finite energies, no forces, no motion."""
    config, model = case
    atoms = list(perfect().values())
    graph = batch(atoms, config)
    result = compiled(config).trajectory(model, graph)
    assert np.isfinite(result.energies).all() and np.isfinite(result.positions).all()
    assert len(set(np.round(result.energies[0, : len(atoms)], 6).tolist())) == len(atoms)
    pieces = zip(perfect(), *(split(v, atoms) for v in (
        result.forces, result.velocities, result.positions)), atoms)  # fmt: skip
    for name, forces, velocities, positions, a in pieces:
        moved = positions - a.positions
        if name in SYMMETRIC:
            for values in (forces, velocities, moved):
                assert np.abs(values).max() < 1e-10, name
        else:  # a molecule moves along its axis only
            assert np.abs(forces[..., 2]).max() > 1e-2 and np.abs(forces[..., :2]).max() < 1e-10
            assert np.abs(moved[..., 2]).max() > 1e-3 and np.abs(moved[..., :2]).max() < 1e-10


@pytest.mark.parametrize("latent", SCHEMES)
def test_gradients_of_symmetric_structures_are_finite(latent):
    """Parameter gradients of energies, forces and positions through the whole ODE."""
    config = tiny_config(latent, model__layers=1)
    model, atoms = tiny_model(config), list(perfect().values())
    graph, rng = batch(atoms, config), np.random.default_rng(0)
    weights = [rng.normal(size=w.shape) for w in no_weights(graph)]
    (value, _), (gradient, by_positions) = compiled(config).weighted(
        model, graph.nodes["positions"], graph, weights)  # fmt: skip
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(gradient.params)]
    assert np.isfinite(value) and np.isfinite(by_positions).all()
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert sum(np.abs(leaf).max() > 1e-6 for leaf in leaves) > 0.8 * len(leaves)


@pytest.mark.parametrize("latent", SCHEMES)
def test_energy_and_forces_of_atoms(latent):
    """`energy_and_forces`: the trajectory's first frame; F = -dE/dx at the reference's latent."""
    config = tiny_config(latent, model__layers=1)
    table = np.zeros(119)
    table[[1, 8, 78]] = -3.0, -5.0, -2.0
    model, atoms = tiny_model(config).replace(element_energies=table), slab()
    energy, forces = model.energy_and_forces(atoms)
    start = compiled(config).weighted(
        model, *(lambda g: (g.nodes["positions"], g, no_weights(g)))(batch([atoms], config))
    )[0][1]
    np.testing.assert_allclose(energy, start.energies[0, 0], rtol=1e-10)
    np.testing.assert_allclose(forces, start.forces[0, : len(atoms)], rtol=0, atol=1e-9)
    step, numeric = 1e-4, []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.set_constraint()
        moved.positions[4, 1] += sign * step
        numeric.append(model.energy_and_forces(moved, reference=atoms)[0])
    assert abs(forces[4, 1]) > 1e-3
    np.testing.assert_allclose(
        forces[4, 1], -(numeric[0] - numeric[1]) / (2 * step), rtol=1e-5)  # fmt: skip


def test_energies_at_the_latent_of_another_cell(x64):
    """Explicit scheme, strained: the slope of E(x; h(reference)) along a strain is the virial there,
    neighbours that come in are seen, and a fixed-cell model says that it cannot tell."""
    config = tiny_config(model__layers=1, dynamics__cell="variable", dynamics__mass="unit")
    model, atoms = tiny_model(config), crystal()
    strain = np.array([[0.7, 0.2, 0], [0.2, -0.4, 0.1], [0, 0.1, 0.3]])

    def energy(size, reference):
        moved = atoms.copy()
        moved.set_cell(atoms.cell.array @ (np.eye(3) + size * strain), scale_atoms=True)
        return model.energy_and_forces(moved, reference=reference)[0]

    slope = (energy(1e-4, atoms) - energy(-1e-4, atoms)) / 2e-4
    stress = from_voigt(RelaxNetCalculator(model, reference=atoms).get_stress(atoms))
    expected = atoms.get_volume() * (stress * strain).sum()
    assert abs(expected) > 1e-3
    np.testing.assert_allclose(slope, expected, rtol=1e-5)
    # Squeezed far beyond the skin: as with a list that was wide from the start.
    far = energy(-0.25, atoms)
    graph = dataclasses.replace(config.graph, skin=3.0)
    model = model.replace(config=dataclasses.replace(config, graph=graph))
    np.testing.assert_allclose(energy(-0.25, atoms), far, rtol=1e-9)
    model = tiny_model(tiny_config(model__layers=1))
    with pytest.raises(InputError, match="its cell differs"):
        energy(0.01, atoms)
    with pytest.raises(InputError, match="same order"):
        energy(0.0, atoms[[1, 0, 2]])


def scan_function(config, model):
    """(graph, start, direction, r (n,)) -> E(x(r); encoder(x(r))), all of its gradient, u(0)."""
    network, variables = network_of(config), {"params": model.params}

    def total(x, graph):
        encoding = network.apply(variables, graph, x, method="encode")
        if config.dynamics.latent == "explicit":
            energies, _ = network.apply(variables, encoding.h, graph, x, method="explicit_energy")
        else:
            energies = network.apply(variables, encoding.h, graph, method="read_out")
        velocities = network.apply(variables, encoding, graph, method="initial_velocity")
        return energies[0], velocities

    @jax.jit
    def scan(graph, start, direction, r):
        def at(r):
            (energy, velocities), gradient = jax.value_and_grad(total, has_aux=True)(
                start + r * direction, graph)
            return energy, gradient, velocities

        return jax.lax.map(at, r)

    return lambda *args: [np.asarray(v) for v in scan(*args)]


@pytest.mark.parametrize(
    "latent, update_positions",
    [(s, u) for s in SCHEMES for u in (False, True)] + [("triplets", False), ("egnn", False)],
)
def test_smooth_through_both_cutoffs(latent, update_positions):
    """Across either cutoff energy, forces and velocities have no step, the energy no kink.

    Halving the spacing of the scan must leave difference quotients as they are: of the energy
    the second ones, of forces and velocities the first. A kink or step doubles them.
    """
    config = tiny_config(latent, model__update_positions=update_positions)
    model, g = tiny_model(config), config.graph
    # Atom 2 leaves atom 0; atom 1 is on the other side, so that only 0-2 crosses a cutoff.
    direction = np.array([0.6, 0.0, 0.8])
    atoms = Atoms("OCN", [[0, 0, 0], [-1.3, 0.5, -1.2], g.triplet_cutoff * 0.99 * direction])
    dimer = Atoms("ONC", [[0, 0, 0], g.cutoff * 0.99 * direction, [0, 40, 0]])
    scans = {"triplet": (atoms, 2, g.triplet_cutoff), "pair": (atoms, 2, g.cutoff),
             "dimer": (dimer, 1, g.cutoff)}  # fmt: skip
    structures = {k: structure_from_atoms(a, config, k) for k, (a, _, _) in scans.items()}
    shape = dataclasses.replace(
        fitting_shape([structures["triplet"]]), n_edges=6, n_bonds=6, n_slots=2)  # fmt: skip
    scan = scan_function(config, model)
    for name, (a, mover, cutoff) in scans.items():
        graph = batch([a], config, shape)
        start, along = np.array(a.positions), np.zeros((3, 3))
        start[mover], along[mover] = 0, direction
        r = np.linspace(cutoff - 0.08, cutoff + 0.04, 241)
        energy, gradient, velocities = scan(graph, start, along, r)
        coarse, fine = (
            np.array([
                np.abs(np.diff(energy[::k], 2)).max() / k**2,
                np.abs(np.diff(gradient[::k], axis=0)).max() / k,
                np.abs(np.diff(velocities[::k], axis=0)).max() / k,
            ])
            for k in (2, 1)
        )  # fmt: skip
        assert (fine < 1.1 * coarse).all(), (name, coarse, fine)
        beyond = r > cutoff + 1e-9  # the grid holds the cutoff itself, give or take a rounding
        inside = r < cutoff - 1e-9
        assert np.abs(gradient[inside, mover]).max() > 1e-7
        # Out of every reach: exactly constant, exactly no force. (Positions that move inside the
        # encoder may bring atom 0 back into reach.)
        if name == "dimer" or (name == "pair" and not update_positions):
            assert np.ptp(energy[beyond]) == 0 and np.ptp(energy) > 1e-9
            assert (gradient[beyond][:, mover] == 0).all()
            last = np.abs(gradient[np.flatnonzero(inside)[-1], mover]).max()
            assert last < 1e-2 * np.abs(gradient[:, mover]).max()
        if name == "dimer":
            assert (velocities[beyond][:, :2] == 0).all() and (gradient[beyond] == 0).all()
        if name == "triplet":  # a list built without the bond says the same
            outside = a.copy()
            outside.positions[mover] = r[-1] * direction
            again = scan(batch([outside], config, shape), start, along, r)
            for ours, theirs in zip(again, (energy, gradient, velocities)):
                np.testing.assert_allclose(ours[-1], theirs[-1], rtol=0, atol=1e-12)
