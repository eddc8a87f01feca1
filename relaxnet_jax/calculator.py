"""`RelaxNetCalculator`: a model's potential energy surface as an ASE calculator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ase.calculators.calculator import Calculator, all_changes

from relaxnet_jax import dynamics
from relaxnet_jax.batching import (
    WASTE,
    BatchShape,
    collate,
    fitting_shape,
    known_shape,
    largest_shape,
    remember_shape,
    shape_of,
)
from relaxnet_jax.data.trajectory import CALCULATOR, unwrap_positions
from relaxnet_jax.errors import InputError
from relaxnet_jax.graph import structure_from_atoms
from relaxnet_jax.model import NO_ENERGY_SURFACE, RelaxNet, check_one, dtype_of
from relaxnet_jax.models.energy import RelaxNetwork
from relaxnet_jax.neighbors import approach
from relaxnet_jax.potential import evaluate, program_kind
from relaxnet_jax.programs import Program
from relaxnet_jax.strain import deformations, to_voigt
from relaxnet_jax.typing import AnyArray, Graph, Latent, Params

if TYPE_CHECKING:
    from ase import Atoms

NOT_A_POTENTIAL = (
    "the explicit scheme's energy E(x; h) depends on the structure h was encoded from, so it is not a "
    "potential; use head_start(atoms, model) and another calculator, train an implicit model "
    "(implicit.py), or fix h at a structure with RelaxNetCalculator(model, reference=atoms)"
)


@Program
def _encode(network: RelaxNetwork, params: Params, graph: Graph) -> Latent:
    """Latent h in the explicit scheme, encoded at the graph's own positions."""
    positions = jnp.asarray(graph.nodes["positions"])
    return dynamics.initial_state(network, params, graph, positions).latent


class _Neighbourhood(NamedTuple):
    """A neighbour list, as a padded graph on the device, and the structure it was built for."""

    atoms: Atoms
    origin: np.ndarray  # Å, of the graph's positions
    graph: Graph
    latent: AnyArray
    composition_energy: float


class RelaxNetCalculator(Calculator):
    """ASE calculator for the energy (eV), free energy (the same) and forces (eV/Å) of a model.

    An implicit or static model is a potential: E(x) = E(encoder(x)), and F = -dE/dx is the exact
    gradient of that energy, so it can be used for optimisation, molecular dynamics and phonons.

    An explicit model is not a potential. Its latent h is a state of its own that starts at
    encoder(x(0)) and evolves along a path; forces are -∂E(x; h)/∂x at fixed h. Encoding anew at
    every x would give forces that are not the gradient of the energies: optimisers would stall and
    molecular dynamics would drift. Therefore h is held at ``reference``, which makes
    E(x; h(reference)) a function of x with an exact gradient. Positions further from the reference
    than half the skin are refused, because no training frame paired such positions with that h.

    The neighbour list, built for pairs up to the cutoff plus ``skin``, is kept until two atoms may
    have approached each other by more than ``skin``, by their motion and the shrinking of the cell;
    or until elements, charges or periodicity change, or the cell if the model keeps cells fixed.
    Programs are compiled once per padded shape; a shape compiled for other atoms or by another
    calculator is reused where it has room and costs at most twice as much. Forces are raw; ASE
    applies constraints. Stress (eV/Å³, tension positive) is available for models trained with
    dynamics.cell="variable"; other models, which never saw a strained cell, raise ASE's
    ``PropertyNotImplementedError``.

    Args:
      model: from `load_model` or `create_model`.
      reference: the structure from which h is encoded; required for an explicit model, refused for
        implicit and static ones.
      skin: Å, at least 0; by default that of the model's configuration.

    Raises:
      InputError: something that is not one model, a direct predictor, a wrong combination of scheme and
        ``reference``, or a negative skin; and, when properties are calculated, an element the model never saw, a
        structure that cannot be used, or one that is too far from the reference.
    """

    name = CALCULATOR
    # Declared as in ASE's base class.
    implemented_properties: list[str] = ["energy", "free_energy", "forces"]  # noqa: RUF012
    ignored_changes: set[str] = {"initial_magmoms"}  # noqa: RUF012

    def __init__(
        self, model: RelaxNet, reference: Atoms | None = None, skin: float | None = None
    ) -> None:
        super().__init__()
        check_one(model)
        self.model = model
        self.skin = model.config.graph.skin if skin is None else float(skin)
        self._config = model.config.with_skin(self.skin)
        if model.config.dynamics.cell == "variable":
            self.implemented_properties = [*self.implemented_properties, "stress"]
        if model.config.dynamics.latent == "direct":
            raise InputError(NO_ENERGY_SURFACE)
        self._explicit = model.config.dynamics.latent == "explicit"
        if self._explicit and reference is None:
            raise InputError(NOT_A_POTENTIAL)
        if not self._explicit and reference is not None:
            raise InputError("reference: implicit and static models do not use it; leave it out")
        self._kind = program_kind(model.network, dtype_of(model.params))
        self.lists_built = 0
        self._shape: BatchShape | None = None
        self._near: _Neighbourhood | None = None
        self._reference = None if reference is None else self._around(reference.copy())

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        """Calculates all properties and stores them in ``results`` (ASE's entry point)."""
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        near = self._neighbourhood(self.atoms)
        at = self.atoms.positions
        if self._reference is not None:
            at = self._near_reference(self.atoms, self._reference.atoms)
        positions = np.zeros(near.graph.nodes["positions"].shape, dtype_of(self.model.params))
        positions[: len(self.atoms)] = at - near.origin
        model, deformation = self.model, None
        if model.config.dynamics.cell == "variable":
            graphs = near.graph.n_node.shape[0]
            deformation = np.repeat(np.eye(3, dtype=positions.dtype)[None], graphs, axis=0)
            cells = np.stack([near.atoms.cell.array, self.atoms.cell.array])
            if (cells[0] != cells[1]).any():
                deformation[0] = deformations(cells)[1]
        known = model.network, model.params, model.energy_scale, near.graph
        found = jax.device_get(evaluate(*known, positions, near.latent, deformation))
        remember_shape(self._kind, shape_of(near.graph))
        energy = float(found.energies[0]) + near.composition_energy
        self.results = {
            "energy": energy,
            "free_energy": energy,
            "forces": np.asarray(found.forces[: len(self.atoms)], np.float64),
        }
        if found.virial is not None and self.atoms.cell.rank == 3:
            virial = np.asarray(found.virial[0], np.float64)
            self.results["stress"] = to_voigt(virial / self.atoms.get_volume())

    def _neighbourhood(self, atoms: Atoms) -> _Neighbourhood:
        """The current neighbour list if it is still valid for these atoms, otherwise a new one.

        Changes are determined against the atoms of the list itself, because ASE's
        ``system_changes`` refers to the last call, which may have failed.
        """
        if self._reference is not None:
            return self._reference
        if self._near is None or not self._serves(self._near.atoms, atoms):
            same = self._near is not None and np.array_equal(
                self._near.atoms.numbers, atoms.numbers
            )
            self._shape = self._shape if same else None
            self._near = self._around(atoms.copy())
        return self._near

    def _serves(self, built: Atoms, atoms: Atoms) -> bool:
        """Whether the list built for ``built`` holds every pair of ``atoms`` within the cutoff."""
        if not _same_crystal(built, atoms):
            return False
        cells = np.stack([built.cell.array, atoms.cell.array])
        if self.model.config.dynamics.cell == "fixed" and (cells[0] != cells[1]).any():
            return False
        reach = self.model.config.graph.cutoff + self.skin
        return approach(np.stack([built.positions, atoms.positions]), cells, reach) <= self.skin

    def _near_reference(self, atoms: Atoms, reference: Atoms) -> np.ndarray:
        """Positions (N, 3), Å, in the periodic images nearest to the reference, as its list assumes.

        Raises:
          InputError: the atoms are not those of the reference, or too far from it.
        """
        same_cell = np.array_equal(reference.cell.array, atoms.cell.array)
        if not (same_cell and _same_crystal(reference, atoms)):
            raise InputError(
                "reference: cell, elements, charges or periodicity differ from those of the atoms; "
                "make a calculator for each reference"
            )
        cells = np.stack([reference.cell.array, atoms.cell.array])
        both = np.stack([reference.positions, atoms.positions])
        both = unwrap_positions(both, cells, reference.pbc)
        moved = _moved(*both)
        if not moved <= self.skin / 2:
            raise InputError(
                f"reference: an atom is {moved:.3f} Å from it, more than half the skin ({self.skin / 2:g} "
                "Å); the explicit scheme's energy is valid only near it: give a closer reference, or use "
                "an implicit model"
            )
        return both[1]

    def _around(self, atoms: Atoms) -> _Neighbourhood:
        """Builds the neighbour list and padded graph of these atoms, on the device."""
        model = self.model
        name = atoms.get_chemical_formula()
        model.check_elements(atoms.numbers, name)
        structure = structure_from_atoms(atoms, self._config, name)
        needed = fitting_shape([structure], rounded=True)
        if self._shape is not None:
            needed = largest_shape([needed, self._shape])
        self._shape = known_shape(self._kind, [structure], needed, WASTE)
        near = collate([structure.centred()], self._shape, dtype_of(model.params))
        graph: Any = jax.device_put(near)
        self.lists_built += 1
        latent: AnyArray = np.zeros((self._shape.n_atoms, 0), dtype_of(model.params))
        if self._explicit:
            latent = _encode(model.network, model.params, graph)
        energy = model.composition_energy(atoms.numbers)
        return _Neighbourhood(atoms, structure.origin, graph, latent, energy)


def _same_crystal(a: Atoms, b: Atoms) -> bool:
    """Whether elements, periodicity and charges are equal (not positions and cell)."""
    return (
        np.array_equal(a.numbers, b.numbers)
        and np.array_equal(a.pbc, b.pbc)
        and np.array_equal(a.get_initial_charges(), b.get_initial_charges())
    )


def _moved(a: np.ndarray, b: np.ndarray) -> float:
    """The largest displacement, Å; inf if a position is not finite."""
    largest = np.linalg.norm(b - a, axis=1).max(initial=0.0)
    return float(largest) if np.isfinite(largest) else np.inf
