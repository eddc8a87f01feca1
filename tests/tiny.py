"""What the physics tests share: a tiny network, structures that have no symmetry, one shape.

Compilation dominates the time of these tests, so all batches have the shape `SHAPE` and all
laws go through the few functions that `compiled` returns.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from ase.build import bulk, fcc111
from ase.constraints import FixAtoms

from relaxnet_jax import dynamics, potential
from relaxnet_jax.batching import BatchShape, collate
from relaxnet_jax.config import load_config
from relaxnet_jax.graph import structure_from_atoms
from relaxnet_jax.model import create_model, network_of, predict_trajectory

SCHEMES = ("explicit", "implicit")
CASES = (*SCHEMES, "triplets", "egnn")  # the last two: implicit, with other layers
SHAPE = BatchShape(n_graphs=10, n_atoms=24, n_edges=760, n_bonds=310, n_slots=20)
TINY = {
    "graph": {"cutoff": 4.0, "triplet_cutoff": 3.2, "skin": 0.5},
    "model": {
        "features": 8, "vector_features": 3, "layers": 2, "triplet_features": 4,
        "pair_features": 4, "n_gaussian": 4, "n_bessel": 3, "l_max": 2, "l_angle": 3,
        "expansion_channels": 3, "attention_heads": 2, "moment_channels": 3,
    },
    "dynamics": {"frames": 3},
}  # fmt: skip


def tiny_config(latent="explicit", **overrides):
    """The tiny configuration of a scheme or case; overrides as section__field=value."""
    if latent == "triplets":
        latent, overrides = "implicit", {"model__interaction": "triplets"} | overrides
    if latent == "egnn":
        latent, overrides = "implicit", {"model__architecture": "egnn"} | overrides
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_config(TINY, {"dynamics.latent": latent} | changes)


def tiny_model(config, seed=2, dtype=np.float64, factor=20.0):
    """A model whose velocities, forces and latent rates are far from negligible.

    The layers that start near zero (small_*) are multiplied by ``factor``, biases are drawn at
    random, and the energy unit is such that atoms move by some 0.1 Å.
    """
    model = create_model(config, seed, dtype)
    unit = 1.0
    if config.dynamics.latent == "implicit":
        unit = 0.2 if config.model.interaction == "triplets" else 0.8
    rng = np.random.default_rng(seed + 100)

    def enlarge(path, leaf):
        names = [entry.key for entry in path]
        if names[-1] == "bias":
            return jnp.asarray(rng.normal(0, 0.2, leaf.shape), dtype)
        if names[-1].startswith("log_"):
            return jnp.asarray(rng.normal(-0.5, 0.2, leaf.shape), dtype)
        small = len(names) > 1 and names[-2].startswith("small_")
        return leaf * (factor if small else 1.0)

    params = jax.tree_util.tree_map_with_path(enlarge, model.params)
    return model.replace(params=params, energy_scale=np.asarray(unit, dtype))


def molecule():
    """Seven atoms, chiral, no cell."""
    positions = [[0, 0, 0], [1.4, 0.1, 0.2], [-0.5, 1.0, 0.1], [-0.4, -0.6, -0.9],
                 [-0.7, -0.4, 1.2], [1.9, 1.0, -0.3], [2.2, -1.1, 0.9]]  # fmt: skip
    return Atoms("COHFClHN", positions)


def slab():
    """Two layers of Pt with O and H on top, periodic in plane only, the lower layer fixed."""
    atoms = fcc111("Pt", (2, 1, 2), a=3.92, vacuum=4.0)
    atoms += Atoms("OH", [atoms.positions[2] + [0.2, 0.3, 1.5], atoms.positions[3] + [0, 0.5, 1.6]])
    atoms.pbc = (True, True, False)
    atoms.positions[2:] += np.random.default_rng(5).normal(0, 0.1, (4, 3))
    atoms.set_constraint(FixAtoms([0, 1]))
    return atoms


def crystal():
    """Three atoms in a skewed cell smaller than the cutoff."""
    cell = [[3.4, 0, 0], [1.1, 3.6, 0], [-0.7, 0.9, 3.9]]
    scaled = [[0.02, 0.05, -0.03], [0.53, 0.4, 0.46], [0.1, 0.56, 0.61]]
    return Atoms("NaClO", scaled_positions=scaled, cell=cell, pbc=True)


def alloy(symbol="Au", seed=0):
    """Four rattled atoms, three of them copper."""
    atoms = bulk("Cu", cubic=True)
    atoms.symbols[1] = symbol
    atoms.rattle(0.08, seed=seed)
    return atoms


def systems():
    """The three of them."""
    return [molecule(), slab(), crystal()]


def perfect():
    """Structures of high symmetry by name; forces vanish in those listed first."""
    perovskite = Atoms("SrTiO3", cell=3.9 * np.eye(3), pbc=True, scaled_positions=[
        [0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])  # fmt: skip
    return {
        "fcc": bulk("Al", "fcc", a=4.05),
        "rocksalt": bulk("NaCl", "rocksalt", a=5.6),
        "perovskite": perovskite,
        "bcc": bulk("Fe", "bcc", a=2.87),
        "one atom": Atoms("Po", cell=3.3 * np.eye(3), pbc=True),
        "isolated": Atoms("He", [[1.0, 2.0, 3.0]]),
        "far apart": Atoms("HeNe", [[0, 0, 0], [0, 0, 30.0]]),
        "dimer": Atoms("CO", [[0, 0, 0], [0.0, 0, 1.13]]),
        "collinear": Atoms("OCO", [[0, 0, -1.16], [0, 0, 0], [0, 0, 1.16]]),
    }


def batch(atoms, config, shape=SHAPE, dtype=np.float64):
    """A padded graph of ASE structures."""
    if config.model.interaction == "moments":
        shape = dataclasses.replace(shape, n_slots=0)
    structures = [structure_from_atoms(a, config, f"structure {i}") for i, a in enumerate(atoms)]
    return jax.tree.map(jnp.asarray, collate(structures, shape, dtype))


def atom_slices(atoms):
    """Rows of each structure in the batch."""
    ends = np.cumsum([len(a) for a in atoms])
    return [slice(e - len(a), e) for e, a in zip(ends, atoms)]


@functools.cache
def compiled(config):
    """The jitted functions of a configuration.

    trajectory(model, graph) -> Prediction; forces(model, graph, positions, latent) ->
    Evaluation; start(model, graph, positions) -> State; field(model, graph, state) -> State;
    weighted(model, positions, graph, weights) -> ((value, Prediction), (gradients with
    respect to model, positions)) of sum_k weights_k · prediction_k.
    """
    network = network_of(config)

    def forces(model, graph, positions, latent):
        return potential.energies_and_forces(
            network, model.params, model.energy_scale, graph, positions, latent)

    def start(model, graph, positions):
        return dynamics.initial_state(network, model.params, graph, positions)

    def field(model, graph, state):
        result = dynamics.evaluate(network, model.params, model.energy_scale, graph, state)
        return dynamics.vector_field(network, model.params, graph, state, result)

    def value(model, positions, graph, weights):
        result = predict_trajectory(model, replace_positions(graph, positions))
        total = sum(jnp.sum(w * jnp.where(w != 0, y, 0.0)) for w, y in zip(weights, result))
        return total, result

    return types.SimpleNamespace(
        trajectory=jax.jit(predict_trajectory),
        forces=jax.jit(forces),
        start=jax.jit(start),
        field=jax.jit(field),
        weighted=jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True)),
    )


def replace_positions(graph, positions):
    """The graph with other positions."""
    return graph._replace(nodes=graph.nodes | {"positions": jnp.asarray(positions)})


def bigger(shape, **extra):
    """A shape enlarged by so much."""
    return dataclasses.replace(shape, **{k: getattr(shape, k) + v for k, v in extra.items()})


def split(values, atoms):
    """The trajectory (or anything with an atom axis -2) of each structure, as NumPy."""
    return [np.asarray(values)[..., rows, :] for rows in atom_slices(atoms)]


def no_weights(graph, n_frames=3):
    """Zero weights for `compiled(...).weighted`: positions, velocities, energies, forces."""
    n_graphs, n_atoms = graph.n_node.shape[0], graph.nodes["mask"].shape[0]
    vectors = np.zeros((n_frames, n_atoms, 3))
    return [vectors, vectors.copy(), np.zeros((n_frames, n_graphs)), vectors.copy()]


def random_rotation(seed, determinant=1):
    """A random orthogonal matrix."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q * np.sign(np.linalg.det(q)) * determinant
