"""`RelaxNet`, a pytree of parameters, element energies and configuration; saving and loading it.

A saved model is a folder with ``config.json``, ``parameters.npz`` (no pickles) and ``model.json``
(elements, statistics, versions, checksums). Nothing else is needed to use it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import platform
import zipfile
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from jax import Array

from relaxnet_jax import dynamics, solver
from relaxnet_jax.batching import (
    REUSE,
    BatchShape,
    collate,
    fitting_shape,
    known_shape,
    largest_shape,
    remember_shape,
    shape_of,
)
from relaxnet_jax.config import PRETRAINED, Config, from_json, load_config, to_json
from relaxnet_jax.data.files import atomic_folder
from relaxnet_jax.data.trajectory import CELL_TOLERANCE, unwrap_positions
from relaxnet_jax.errors import InputError
from relaxnet_jax.graph import MAX_ATOMIC_NUMBER, Structure, structure_from_atoms
from relaxnet_jax.model_folders import member_folders, model_folder
from relaxnet_jax.models.energy import RelaxNetwork
from relaxnet_jax.models.init import initial_parameters
from relaxnet_jax.models.precision import in_float32
from relaxnet_jax.neighbors import approach, skin_for
from relaxnet_jax.potential import Evaluation
from relaxnet_jax.programs import Program
from relaxnet_jax.strain import deformations, stress, to_reference
from relaxnet_jax.typing import AnyArray, Graph, Params, Times

FORMAT = 2
NO_ENERGY_SURFACE = (
    "dynamics.latent='direct': the model predicts the energy of the final structure, not of the given "
    "positions; use a static or implicit model"
)


class Prediction(NamedTuple):
    """Predicted trajectories of a padded batch of G structures on n frames.

    Attributes:
      positions: (n, N, 3) Å.
      velocities: (n, N, 3) Å, u of `solver.Trajectory`.
      energies: (n, G) eV, total energies on the scale of the training data, in the precision of the
        parameters. In float32, the last bit of an all-electron energy of -45 keV per atom is 4 meV;
        `relax` adds the composition energies in float64, and `solve_trajectory` returns energies
        without them.
      forces: (n, N, 3) eV/Å, raw: also on fixed atoms.
      cells: (n, G, 3, 3) Å.
      stresses: (n, G, 3, 3) eV/Å³, tension positive; None for models with fixed cells.
    """

    positions: Array
    velocities: Array
    energies: Array
    forces: Array
    cells: Array
    stresses: Array | None = None


@flax.struct.dataclass
class RelaxNet:
    """A model: a pytree whose leaves are the parameters and the energy reference.

    Attributes:
      params: Flax parameters.
      element_energies: (119,) eV, composition energy of each element.
      energy_scale: scalar, eV, the training set's spread of energies per atom.
      config: the configuration (static).
      elements: sorted atomic numbers the model was trained on; empty if untrained (static).
      statistics: facts about the training data as JSON text (static).
    """

    params: Params
    element_energies: AnyArray
    energy_scale: AnyArray
    config: Config = flax.struct.field(pytree_node=False)
    elements: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
    statistics: str = flax.struct.field(pytree_node=False, default="{}")

    def __repr__(self) -> str:
        sizes = [getattr(leaf, "size", 1) for leaf in jax.tree.leaves(self.params)]
        elements = f"{len(self.elements)} elements" if self.elements else "untrained"
        d = self.config.dynamics
        return f"RelaxNet({d.latent}, {d.cell} cells, {elements}, {sum(sizes):,} parameters)"

    @property
    def network(self) -> RelaxNetwork:
        """The Flax module of the learned functions."""
        return network_of(self.config)

    def structure(
        self,
        atoms: Atoms,
        name: str | None = None,
        relax_cell: bool = True,
        skin: float | None = None,
    ) -> Structure:
        """Checks a structure and finds its neighbours.

        Args:
          atoms: the structure.
          name: for error messages; by default the chemical formula.
          relax_cell: whether the cell relaxes; only matters to models whose cells relax
            (dynamics.cell="variable").
          skin: Å, as in `graph`.

        Raises:
          InputError: as `graph.build_structure`; not ASE Atoms; an unseen element; a negative skin.
        """
        (atoms,) = atoms_list(atoms)
        self.check_elements(atoms.numbers, name or atoms.get_chemical_formula())
        config = self.config if skin is None else self.config.with_skin(skin)
        return structure_from_atoms(atoms, config, name, relax_cell, bond_skin=skin)

    def graph(
        self,
        atoms: Atoms | Sequence[Atoms],
        relax_cell: bool = True,
        like: Graph | None = None,
        skin: float | None = None,
    ) -> Graph:
        """A padded graph of one structure or several.

        Positions are those of ``atoms`` in the parameters' precision: in float32, 1000 Å from the
        coordinate origin, they are rounded to 6e-5 Å. `relax`, `energy_and_forces` and
        `RelaxNetCalculator` take them relative to their centroid.

        Args:
          atoms: one structure, or a sequence of them.
          relax_cell: as in `structure`.
          like: another graph, whose padded shape to use, so that programs compiled for one graph also
            serve the other.
          skin: Å, how far two atoms may approach each other before the graph lacks a pair or a bond.
            By default, pairs have the configuration's skin, and so have bonds, except in the explicit
            scheme, which visits bonds only at the start of the path and lists them without a skin.
            Give a skin if you replace the graph's positions by others.

        Raises:
          InputError: as `structure`; no structure at all; the shape of ``like`` is too small.
        """
        structures = [self.structure(a, None, relax_cell, skin) for a in atoms_list(atoms)]
        if not structures:
            raise InputError("graph: no structure given")
        shape = fitting_shape(structures, rounded=True)
        if like is not None:
            shape = shape_of(like)
            if not shape.holds(needed := fitting_shape(structures)):
                raise InputError(
                    f"like: a graph of {shape} has no room for {needed}; give a larger one, or leave it out"
                )
        return jax.tree.map(jnp.asarray, collate(structures, shape, dtype_of(self.params)))

    def graphs(self, atoms: Sequence[Atoms], relax_cell: bool = True) -> Graph:
        """Padded graphs, one per structure, all of the same shape and stacked for `jax.vmap`.

        Raises:
          InputError: as `structure`; no structure at all.
        """
        structures = [self.structure(a, relax_cell=relax_cell) for a in atoms_list(atoms)]
        if not structures:
            raise InputError("graphs: no structure given")
        shape = largest_shape([fitting_shape([s], rounded=True) for s in structures])
        apart = [collate([s], shape, dtype_of(self.params)) for s in structures]
        return jax.tree.map(lambda *parts: jnp.asarray(np.stack(parts)), *apart)

    def energy_and_forces(
        self, atoms: Atoms, reference: Atoms | None = None
    ) -> tuple[float, np.ndarray]:
        """Energy (eV) and forces (N, 3) eV/Å of a structure, as at the frames of a trajectory.

        For the implicit scheme and static models, F = -dE/dx of E(x). In the explicit scheme, the
        latent h is a separate state, and E(x; h) depends on the structure that h was encoded from;
        F = -dE/dx at that fixed h.

        Args:
          atoms: the structure.
          reference: the structure to encode in the explicit scheme, usually the initial structure of
            a relaxation; by default ``atoms`` itself. Not used by other models.

        Raises:
          InputError: an unseen element; positions or a cell that cannot be used; a reference with
            other atoms, or with another cell where cells are fixed; a direct predictor.
        """
        if self.config.dynamics.latent == "direct":
            raise InputError(NO_ENERGY_SURFACE)
        if self.config.dynamics.latent != "explicit" or reference is None:
            reference = atoms
        structure, positions, deformation = self._from_reference(atoms, reference)
        kind = "energy_and_forces", self.network, dtype_of(self.params).name
        shape = known_shape(kind, [structure], fitting_shape([structure], rounded=True), REUSE)
        graph = collate([structure.centred()], shape, dtype_of(self.params))
        at = graph.nodes["positions"].copy()
        at[: len(atoms)] = positions - structure.origin
        steps = np.repeat(np.eye(3, dtype=at.dtype)[None], shape.n_graphs, axis=0)
        steps[0] = deformation
        result = _evaluate(self.network, self.params, self.energy_scale, graph, at, steps)
        remember_shape(kind, shape)
        energy = float(result.energies[0]) + self.composition_energy(atoms.numbers)
        return energy, np.asarray(result.forces, np.float64)[: len(atoms)]

    def _from_reference(
        self, atoms: Atoms, reference: Atoms
    ) -> tuple[Structure, np.ndarray, np.ndarray]:
        """Describes the atoms relative to the reference.

        Returns:
          The reference's structure, with a neighbour list that includes all neighbours of the atoms;
          the atoms' positions mapped back to its cell (N, 3) Å; and their deformation gradient (3, 3).
        """
        same = np.array_equal(reference.numbers, atoms.numbers)
        if not (same and np.array_equal(reference.pbc, atoms.pbc)):
            raise InputError(
                "reference: must have the structure's atoms, in the same order, and its periodicity"
            )
        cells = np.stack([reference.cell.array, atoms.cell.array])
        if self.config.dynamics.cell == "fixed" and not np.allclose(
            cells[0], cells[1], atol=CELL_TOLERANCE
        ):
            raise InputError(
                "reference: its cell differs from the structure's, which a fixed-cell model cannot handle; "
                "give a reference with the structure's cell"
            )
        if not np.isfinite(atoms.positions).all():
            raise InputError(
                f"{atoms.get_chemical_formula()}: positions are not finite; repair or drop the structure"
            )
        structure = self.structure(reference)
        x = unwrap_positions(np.stack([reference.positions, atoms.positions]), cells, reference.pbc)
        needed = approach(x, cells, structure.neighbors.reach)
        if needed > self.config.graph.skin:
            wider = skin_for(x, cells, self.config.graph.cutoff)
            if not np.isfinite(wider):
                raise InputError(
                    f"{atoms.get_chemical_formula()}: the cell has no volume or is not finite; repair or drop "
                    "the structure"
                )
            structure = structure_from_atoms(reference, self.config.with_skin(wider))
        deformation = deformations(cells)[1]
        return structure, to_reference(x[1], deformation), deformation

    def composition_energy(self, atomic_numbers: np.ndarray) -> float:
        """The sum of the element energies, eV, in float64."""
        return float(np.asarray(self.element_energies, np.float64)[atomic_numbers].sum())

    def check_elements(self, atomic_numbers: np.ndarray, name: str) -> None:
        """Checks that the model was trained on all elements.

        Raises:
          InputError: an element the model was not trained on.
        """
        unseen = sorted(set(np.asarray(atomic_numbers).tolist()) - set(self.elements))
        if self.elements and unseen:
            symbols = ", ".join(chemical_symbols[z] for z in unseen)
            raise InputError(
                f"{name}: the model never saw {symbols}; train on data that contain it, or "
                "leave the structure out"
            )


@functools.lru_cache(maxsize=32)
def network_of(config: Config) -> RelaxNetwork:
    """The Flax module of a configuration."""
    return RelaxNetwork(config.graph, config.model, config.dynamics)


# Its static argument is the network alone: models that differ only in what they record of their data
# and training share one program.
solve_compiled = Program(solver.solve_trajectory)


@in_float32
def predict_trajectory(model: RelaxNet, graph: Graph, times: Times | None = None) -> Prediction:
    """Predicts the relaxation trajectories of all structures of a padded graph: a pure function.

    It is compiled once for each padded shape and architecture. It works under `jax.jit`, under
    `jax.vmap` over graphs of equal shape (`RelaxNet.graphs`) and over models (`stack_models`), and
    under `jax.grad` with respect to the model and to ``graph.nodes["positions"]``. Only reverse mode is
    supported: compute second derivatives as `jax.jacrev` of `jax.grad`.

    The neighbour list is always the graph's. If two atoms approach each other by more than the
    configuration's ``graph.skin`` along the path, it may lack a pair. This function does not detect
    that, and `neighbors.approach` at the returned frames may miss it, since the solver's stages can go
    further than the frames. `relax` checks both and builds a longer list.

    If you replace the graph's positions by others, the graph may also lack bonds, which the explicit
    scheme lists without a skin. Derivatives at the graph's own positions are exact; for other
    positions, build the graph with a ``skin`` of at least the distance by which atoms approach.

    Args:
      model: from `create_model` or `load_model`.
      graph: from `RelaxNet.graph`.
      times: pseudotimes in [0, 1], either (m,) for all structures or (m, G) for each structure
        separately; by default the frames the model was trained on, k/(n-1). Values of traced times
        (arguments of a function under `jax.jit`) cannot be checked: outside [0, 1] the path is
        silently extrapolated.

    Returns:
      A `Prediction`. Its values for padding atoms and padding structures have no meaning.

    Raises:
      InputError: ``graph`` is not a graph; times outside [0, 1]; a static model.
    """
    if not hasattr(graph, "nodes"):
        raise InputError(
            f"predict_trajectory: takes a graph, not {type(graph).__name__}; give model.graph(atoms), or "
            "call relax(model, atoms)"
        )
    if times is not None:
        times = _pseudotimes(jnp.asarray(times))
    result = solve_compiled(model.network, model.params, model.energy_scale, graph, times)
    per_atom = jnp.asarray(model.element_energies)[graph.nodes["atomic_numbers"]]
    per_atom = jnp.where(graph.nodes["mask"], per_atom, 0.0)
    composition = jax.ops.segment_sum(per_atom, graph.nodes["graph"], graph.n_node.shape[0])
    total = result.energies + composition.astype(result.energies.dtype)
    cell = jnp.asarray(graph.globals["cell"])
    moving = result.positions, result.velocities, total, result.forces
    if result.deformation is None or result.virial is None:
        return Prediction(*moving, jnp.broadcast_to(cell, (len(total), *cell.shape)))
    cells = cell @ jnp.swapaxes(result.deformation, -1, -2)
    return Prediction(*moving, cells, stress(result.virial, cell, result.deformation))


def _pseudotimes(times: Array) -> Array:
    """Returns the times unchanged.

    Raises:
      InputError: the values are known, i.e. not traced, and outside [0, 1].
    """
    if not isinstance(times, jax.core.Tracer):
        values = np.asarray(times)
        if not ((values >= 0) & (values <= 1)).all():
            raise InputError(
                "times: must be pseudotimes in [0, 1]; the model is not defined elsewhere"
            )
    return times


@Program
@in_float32
def _evaluate(
    network: RelaxNetwork,
    params: Params,
    scale: AnyArray,
    graph: Graph,
    at: Array,
    deformation: Array,
) -> Evaluation:
    """Evaluates a padded graph, with h encoded from the graph's own positions.

    Args:
      network: the learned functions (static).
      params: their parameters.
      scale: eV, the network's unit of energy.
      graph: padded batch.
      at: (N, 3) Å, reference positions at which to evaluate.
      deformation: (G, 3, 3), deformation gradients; not used for fixed cells.
    """
    start = jnp.asarray(graph.nodes["positions"])
    state = dynamics.initial_state(network, params, graph, start)
    changed = None if state.deformation is None else deformation
    state = state._replace(positions=at, deformation=changed)
    return dynamics.evaluate(network, params, scale, graph, state)


def atoms_list(atoms: Any) -> list[Atoms]:
    """Returns one structure, or a sequence of them, as a list.

    Raises:
      InputError: one of them is not an ASE Atoms object.
    """
    several = isinstance(atoms, Iterable) and not isinstance(atoms, Atoms | str)
    many: list[Any] = list(atoms) if several else [atoms]
    for place, one in enumerate(many):
        if not isinstance(one, Atoms):
            raise InputError(
                f"structure {place}: is of type {type(one).__name__}, not ase.Atoms: read files with ase.io.read, "
                "convert pymatgen's with pymatgen.io.ase.AseAtomsAdaptor.get_atoms"
            )
    return many


def check_one(model: Any) -> None:
    """Checks that the argument is a single model.

    Raises:
      InputError: it is not.
    """
    if isinstance(model, RelaxNet):
        return
    way_out = "give a model from load_model or create_model"
    if isinstance(model, Sequence) and not isinstance(model, str):
        way_out = "give one of them, or all to relax_committee(models, atoms)"
    raise InputError(f"model: is of type {type(model).__name__}, not RelaxNet: {way_out}")


def dtype_of(params: Params) -> Any:
    """The precision of a model's parameters."""
    return jax.tree.leaves(params)[0].dtype


def create_model(config: Config | str = "explicit.py", seed: int = 0, dtype=np.float32) -> RelaxNet:
    """Creates an untrained model with random parameters, which accepts every element.

    Args:
      config: a `Config`, or a config file or name as for `load_config`.
      seed: seed of the random parameters.
      dtype: precision of the parameters.

    Raises:
      InputError: an invalid configuration; a dtype that is not enabled in JAX (float64 needs
        ``jax.config.update("jax_enable_x64", True)`` first).
    """
    if jax.dtypes.canonicalize_dtype(dtype) != np.dtype(dtype):
        raise InputError(
            f"dtype={np.dtype(dtype).name}: JAX makes {jax.dtypes.canonicalize_dtype(dtype).name} of it; call "
            'jax.config.update("jax_enable_x64", True) first'
        )
    config = config if isinstance(config, Config) else load_config(config)
    slots = int(config.model.interaction == "triplets")
    graph = collate(
        [], BatchShape(n_graphs=2, n_atoms=2, n_edges=2, n_bonds=2, n_slots=slots), dtype
    )
    return RelaxNet(
        params=initial_parameters(network_of(config), graph, seed, dtype),
        element_energies=np.zeros(MAX_ATOMIC_NUMBER + 1),
        energy_scale=np.asarray(1.0, dtype),
        config=config,
    )


def stack_models(models: Sequence[RelaxNet]) -> RelaxNet:
    """Stacks models of one architecture, along a new leading axis of all leaves, for `jax.vmap`.

    The static parts are those of the first model, except for ``elements``: the stack has the elements
    that all trained models were trained on.

    Raises:
      InputError: no model; models that differ in more than parameters, data and training; trained
        models without a common element.
    """
    if not models:
        raise InputError("stack_models: no model given")
    first = models[0]
    if any(model.network != first.network for model in models):
        raise InputError(
            "stack_models: models with different graph, model or dynamics settings are different "
            "functions; call each separately"
        )
    trained = [set(model.elements) for model in models if model.elements]
    common = tuple(sorted(set.intersection(*trained))) if trained else ()
    if trained and not common:
        raise InputError("stack_models: no element is common to all trained models")
    alike = [
        dataclasses.replace(m, config=first.config, statistics=first.statistics, elements=common)
        for m in models
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *alike)


def save_model(model: RelaxNet, folder: str | Path) -> Path:
    """Saves a model in a folder, atomically, replacing any model already there."""
    flat = {
        "/".join(k): np.asarray(v) for k, v in flax.traverse_util.flatten_dict(model.params).items()
    }
    arrays = {f"params/{k}": v for k, v in flat.items()}
    arrays["element_energies"] = np.asarray(model.element_energies, np.float64)
    arrays["energy_scale"] = np.asarray(model.energy_scale)
    with atomic_folder(folder) as temporary:
        np.savez(temporary / "parameters.npz", **arrays)  # type: ignore[arg-type]
        (temporary / "config.json").write_text(to_json(model.config))
        facts = {
            "format": FORMAT,
            "elements": [chemical_symbols[z] for z in model.elements],
            "statistics": json.loads(model.statistics),
            "parameters": int(sum(v.size for v in flat.values())),
            "sha256": _digest(temporary / "parameters.npz"),
            "config_sha256": _digest(temporary / "config.json"),
            "versions": _versions(),
        }
        (temporary / "model.json").write_text(json.dumps(facts, indent=2))
    return Path(folder)


def load_committee(*folders: str | Path) -> list[RelaxNet]:
    """Loads several models, for `relax_committee` and `head_start`.

    Args:
      folders: see `load_model`; by default the committee that comes with the package.

    Raises:
      InputError: as `load_model`.
    """
    names = folders or (PRETRAINED,)
    return [load_model(path) for name in names for path in member_folders(name)]


def load_model(folder: str | Path = PRETRAINED) -> RelaxNet:
    """Loads a model, without executing any code from its folder.

    Args:
      folder: a folder written by `save_model`, or a training run that contains one; by default the
        first model of the committee that comes with the package (model card: ``docs/pretrained.md``).

    Raises:
      InputError: no such folder, or a file in it is missing, damaged or of another format.
    """
    folder = model_folder(folder)
    for name in ("model.json", "config.json", "parameters.npz"):
        if not (folder / name).is_file():
            raise InputError(
                f"{folder}: not a model folder ({name} is missing); give the 'model' folder of a "
                "training run"
            )
    try:
        facts = json.loads((folder / "model.json").read_text())
        elements = tuple(sorted(chemical_symbols.index(s) for s in facts["elements"]))
        stored = facts["format"]
        intact = facts["sha256"] == _digest(folder / "parameters.npz")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder / 'model.json'}: damaged ({error}); export the model again"
        ) from None
    if stored != FORMAT:
        raise InputError(
            f"{folder}: model format {stored}, this version reads {FORMAT}; "
            "use the version that wrote it"
        )
    if not intact:
        raise InputError(
            f"{folder / 'parameters.npz'}: damaged (checksum differs); copy or export it again"
        )
    config = from_json((folder / "config.json").read_text(), str(folder / "config.json"))
    try:
        with np.load(folder / "parameters.npz", allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{folder / 'parameters.npz'}: damaged ({error}); copy or export it again"
        ) from None
    params = flax.traverse_util.unflatten_dict(
        {
            tuple(k.split("/")[1:]): jax.device_put(v)  # jnp.asarray compiles a copy per shape
            for k, v in arrays.items()
            if k.startswith("params/")
        }
    )
    model = RelaxNet(
        params,
        arrays["element_energies"],
        arrays["energy_scale"],
        config,
        elements,
        json.dumps(facts["statistics"]),
    )
    # Tracing the network for its shapes takes 2 s; skip it if the config is the one exported.
    if facts.get("config_sha256") != _digest(folder / "config.json"):
        expected = jax.tree.map(jnp.shape, create_model(config).params)
        if jax.tree.map(jnp.shape, params) != expected:
            raise InputError(
                f"{folder}: parameters do not fit config.json; restore the pair that was exported"
            )
    return model


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("relaxnet-jax", "jax", "flax", "diffrax", "e3nn-jax"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # e.g. a source tree that is not installed
            found[name] = "not installed"
    return found


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
