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
    "the explicit scheme's energy E(x; h) depends on the structure h was encoded from: it is no "
    "potential; use head_start(atoms, model) and another calculator, train an implicit model "
    "(implicit.py), or give RelaxNetCalculator(model, reference=atoms) to hold h there"
)


@Program
def _encode(network: RelaxNetwork, params: Params, graph: Graph) -> Latent:
    """h of the graph's own positions in the explicit scheme."""
    positions = jnp.asarray(graph.nodes["positions"])
    return dynamics.initial_state(network, params, graph, positions).latent


class _Neighbourhood(NamedTuple):
    """A neighbour list, on the device as a padded graph, and the structure it was made for."""

    atoms: Atoms
    origin: np.ndarray  # Å, of the graph's positions
    graph: Graph
    latent: AnyArray
    composition_energy: float


class RelaxNetCalculator(Calculator):
    """Energy (eV), forces (eV/Å) and free energy (the same) of a model, for ASE.

    An implicit or static model is a potential: E(x) = E(encoder(x)), F = -dE/dx of exactly that energy, so
    optimisers, molecular dynamics and phonons may use it.

    An explicit model is none. Its latent h is a state of its own that starts at encoder(x(0)) and
    evolves along a path; forces are -∂E(x; h)/∂x at fixed h. Encoding anew at every x would give
    forces that are not the gradient of the energies beside them: optimisers would stall and
    dynamics drift. So h is held at ``reference``, E(x; h(reference)) is a function of x with its
    exact gradient, and positions further from the reference than half the skin, where no training
    frame ever paired them with that h, are refused.

    The neighbour list, made for pairs up to the cutoff plus ``skin``, is kept until two atoms may have
    approached by more than ``skin``, as they move and as the cell shrinks; or until elements, charges
    or periodicity change, or the cell of a model that keeps cells fixed. Programs are
    compiled once per padded shape; a shape that was compiled for other atoms or by another calculator is
    used again where it has room and costs at most twice as much. Forces are raw; ASE applies constraints.
    Stress (eV/Å³, tension positive) is that of models trained with
    dynamics.cell="variable"; of others, which never saw a strained cell, it is not implemented:
    ASE's ``PropertyNotImplementedError``.

    Args:
      model: from `load_model` or `create_model`.
      reference: the structure h is encoded from; needed by an explicit model, refused for an
        implicit one.
      skin: Å, at least 0; that of the model's configuration by default.

    Raises:
      InputError: something that is not one model, a wrong combination of scheme and ``reference``,
        or a negative skin; and, when energies are asked for, an element the model never saw, a
        structure that cannot be used, or one that is too far from the reference.
    """

    name = CALCULATOR
    # Declared as ASE's base class declares them.
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
            raise InputError(
                "reference: the implicit scheme encodes every structure anew; leave it out"
            )
        self._kind = program_kind(model.network, dtype_of(model.params))
        self.lists_built = 0
        self._shape: BatchShape | None = None
        self._near: _Neighbourhood | None = None
        self._reference = None if reference is None else self._around(reference.copy())

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        """ASE's entry: fills ``results``."""
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
        """The list in use if it still serves these atoms, otherwise a new one.

        What changed is asked of the list's own atoms: ASE's ``system_changes`` compares with the
        last call, which may have failed.
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
        """Whether every pair within the cutoff is in the list of ``built``."""
        if not _same_crystal(built, atoms):
            return False
        cells = np.stack([built.cell.array, atoms.cell.array])
        if self.model.config.dynamics.cell == "fixed" and (cells[0] != cells[1]).any():
            return False
        reach = self.model.config.graph.cutoff + self.skin
        return approach(np.stack([built.positions, atoms.positions]), cells, reach) <= self.skin

    def _near_reference(self, atoms: Atoms, reference: Atoms) -> np.ndarray:
        """(N, 3) Å, the positions without whole lattice vectors from the reference's: those that its
        neighbour list is for. InputError where it does not hold."""
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
                f"reference: an atom is {moved:.3f} Å from it, more than half the skin "
                f"({self.skin / 2:g} Å); the explicit scheme's energy holds near it only: "
                "encode a new reference there, or use an implicit model"
            )
        return both[1]

    def _around(self, atoms: Atoms) -> _Neighbourhood:
        """Neighbour list and padded graph of these atoms, on the device."""
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
    """But for positions and cell."""
    return (
        np.array_equal(a.numbers, b.numbers)
        and np.array_equal(a.pbc, b.pbc)
        and np.array_equal(a.get_initial_charges(), b.get_initial_charges())
    )


def _moved(a: np.ndarray, b: np.ndarray) -> float:
    """Å, the largest displacement; inf where a position is not finite."""
    largest = np.linalg.norm(b - a, axis=1).max(initial=0.0)
    return float(largest) if np.isfinite(largest) else np.inf
