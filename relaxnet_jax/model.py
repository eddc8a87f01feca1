"""`RelaxNet`: parameters, element energies and configuration as one pytree; saving and loading.

A saved model is a folder: ``config.json``, ``parameters.npz`` (no pickles), ``model.json``
(elements, statistics, versions, checksum). Nothing else is needed to use it.
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
    "dynamics.latent='direct': the model predicts the energy of the final structure, not one of the "
    "positions given; use a static or implicit model"
)


class Prediction(NamedTuple):
    """Predicted trajectories of a padded batch of G structures on n frames.

    Attributes:
      positions: (n, N, 3) Å. velocities: (n, N, 3) Å, u of `solver.Trajectory`.
      energies: (n, G) eV, total: on the scale of the training data. In the parameters' float32: of
        all-electron energies, -45 keV an atom, 4 meV are the last bit; `relax` adds the composition
        energies in float64, and `solve_trajectory` gives energies without them.
      forces: (n, N, 3) eV/Å, raw: also on fixed atoms.
      cells: (n, G, 3, 3) Å. stresses: (n, G, 3, 3) eV/Å³, tension positive; None where the model
        keeps cells fixed.
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
      energy_scale: () eV, the training set's spread per atom.
      config: static.
      elements: static, sorted atomic numbers the model was trained on; empty if untrained.
      statistics: static, facts of the training data as JSON text.
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
        """The learned functions."""
        return network_of(self.config)

    def structure(
        self,
        atoms: Atoms,
        name: str | None = None,
        relax_cell: bool = True,
        skin: float | None = None,
    ) -> Structure:
        """Checked structure with neighbours. Raises InputError, also for unseen elements.

        ``relax_cell`` only matters to models whose cells relax (dynamics.cell="variable"); ``skin`` as
        in `graph`.
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

        Args:
          atoms: one structure, or a sequence of them.
          relax_cell: as in `structure`.
          like: another graph, whose padded shape this one shall have: what is compiled for one serves
            the other.
          skin: Å, how much two atoms may approach before the graph lacks a pair or a bond. By default that
            of the configuration for pairs, and none for the bonds of the explicit scheme, which looks at
            them where the path begins: give one where you put other positions in place of the graph's.

        Positions are those of ``atoms`` in the parameters' precision: in float32, 1000 Å from the
        coordinate origin, rounded to 6e-5 Å. `relax`, `energy_and_forces` and `RelaxNetCalculator`
        take them relative to their centroid.

        Raises:
          InputError: as `structure`; no structure at all; no room in the shape of ``like``, a
            negative skin.
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
        """A padded graph of each structure by itself, all of one shape and stacked: for `jax.vmap`.

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
        """Energy (eV) and forces (N, 3) eV/Å of a structure, as on a trajectory's frames.

        Implicit scheme and static models: F = -dE/dx of E(x). Explicit scheme: the latent h is a state of its own,
        and E(x; h) depends on the structure it was encoded from: ``reference`` (the initial
        structure of a relaxation; by default ``atoms`` itself). F = -dE/dx at that fixed h.

        Raises:
          InputError: an unseen element; a reference of other atoms, or of another cell where cells
            are fixed; a direct predictor.
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
        """The reference's structure, with all neighbours the atoms have; the atoms' positions mapped
        back to its cell (N, 3) Å, and their deformation (3, 3)."""
        same = np.array_equal(reference.numbers, atoms.numbers)
        if not (same and np.array_equal(reference.pbc, atoms.pbc)):
            raise InputError(
                "reference: must have the atoms of the structure in the same order, and its periodicity"
            )
        cells = np.stack([reference.cell.array, atoms.cell.array])
        if self.config.dynamics.cell == "fixed" and not np.allclose(
            cells[0], cells[1], atol=CELL_TOLERANCE
        ):
            raise InputError(
                "reference: has another cell, which this fixed-cell model never saw change; give a "
                "reference with the cell of the structure"
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
        """Sum of the element energies, eV, in float64."""
        return float(np.asarray(self.element_energies, np.float64)[atomic_numbers].sum())

    def check_elements(self, atomic_numbers: np.ndarray, name: str) -> None:
        """Raises InputError for elements the model was not trained on."""
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


# By the network, which is all of a model that is no array: what else a model knows, of its data and
# training, makes no other program.
solve_compiled = Program(solver.solve_trajectory)


@in_float32
def predict_trajectory(model: RelaxNet, graph: Graph, times: Times | None = None) -> Prediction:
    """Relaxation trajectories of every structure of a padded graph: a pure function.

    Compiled once for each padded shape and architecture. Works under `jax.jit`, under `jax.vmap` over graphs of
    equal shape (`RelaxNet.graphs`) and over models (`stack_models`), and under `jax.grad` with respect to the model and
    to ``graph.nodes["positions"]``; in reverse mode only: second derivatives are `jax.jacrev` of `jax.grad`.

    The neighbour list is the graph's, whatever moves. Where two atoms approach by more than the
    configuration's ``graph.skin`` along the path, it may lack a pair, and nothing here tells, nor do the
    frames, which `neighbors.approach` takes: the solver's stages go further. `relax` looks at both and makes
    a longer list. Where positions are put in place of the graph's, it may lack bonds, too, which the explicit
    scheme lists without a skin: derivatives at the graph's own positions are exact, other positions want a
    graph with the ``skin`` by which they approach.

    Args:
      model: from `create_model` or `load_model`.
      graph: from `RelaxNet.graph`.
      times: (m,) pseudotimes in [0, 1], or (m, G) for each structure its own; by default the
        frames the model was trained on, k/(n-1). Of traced ones (arguments of a function under `jax.jit`)
        nothing is known here: outside [0, 1] the path is extrapolated, without a word.

    Returns:
      `Prediction`; what stands at padding atoms and structures has no meaning.

    Raises:
      InputError: something that is no graph; times outside [0, 1].
    """
    if not hasattr(graph, "nodes"):
        raise InputError(
            f"predict_trajectory: takes a graph, not {type(graph).__name__}: give model.graph(atoms), or call "
            "relax(model, atoms)"
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
    """The times as they are; InputError where they are known and outside [0, 1]."""
    if not isinstance(times, jax.core.Tracer):
        values = np.asarray(times)
        if not ((values >= 0) & (values <= 1)).all():
            raise InputError(
                "times: must be pseudotimes in [0, 1]: the model says nothing of others"
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
    """At reference positions (N, 3) and deformations (G, 3, 3), with h of the graph's own positions."""
    start = jnp.asarray(graph.nodes["positions"])
    state = dynamics.initial_state(network, params, graph, start)
    changed = None if state.deformation is None else deformation
    state = state._replace(positions=at, deformation=changed)
    return dynamics.evaluate(network, params, scale, graph, state)


def atoms_list(atoms: Any) -> list[Atoms]:
    """One structure, or a sequence of them, as a list; InputError where they are not ASE's."""
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
    """Raises InputError unless it is one model."""
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
    """An untrained model with random parameters; it accepts every element.

    Raises:
      InputError: a wrong configuration; a dtype that JAX does not have (float64 needs
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
    """Models of one architecture as one, whose leaves have a leading axis of models: for `jax.vmap`.

    Its static parts are the first's, but for ``elements``: those that all were trained on.

    Raises:
      InputError: no model, or such that differ in more than parameters, data and training.
    """
    if not models:
        raise InputError("stack_models: no model given")
    first = models[0]
    if any(model.network != first.network for model in models):
        raise InputError(
            "stack_models: models of different graph, model or dynamics settings are different functions; "
            "call each by itself"
        )
    trained = [set(model.elements) for model in models if model.elements]
    common = tuple(sorted(set.intersection(*trained))) if trained else ()
    if trained and not common:
        raise InputError("stack_models: there is no element that all were trained on")
    alike = [
        dataclasses.replace(m, config=first.config, statistics=first.statistics, elements=common)
        for m in models
    ]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *alike)


def save_model(model: RelaxNet, folder: str | Path) -> Path:
    """Writes the model folder, as a whole or not at all; replaces a model already there."""
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
    """The models of these folders, for `relax_committee` and `head_start`; without any, the
    committee that comes with the package.

    Args:
      folders: see `load_model`.

    Raises:
      InputError: as `load_model`.
    """
    names = folders or (PRETRAINED,)
    return [load_model(path) for name in names for path in member_folders(name)]


def load_model(folder: str | Path = PRETRAINED) -> RelaxNet:
    """Reads a model; executes nothing in its folder.

    Args:
      folder: a folder written by `save_model`, or a training run that holds one; by default the
        first model of the committee that comes with the package (its card: ``docs/pretrained.md``).

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
            tuple(k.split("/")[1:]): jax.device_put(v)  # asarray compiles a copy for each shape
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
    # Tracing the network for its shapes takes 2 s: only where they are not the pair exported.
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
        except PackageNotFoundError:  # run from a source tree that is not installed
            found[name] = "not installed"
    return found


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
