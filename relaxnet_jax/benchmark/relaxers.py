"""Iterative relaxations for comparison: CHGNet with ASE's LBFGS, and batched with torch-sim."""

from __future__ import annotations

import contextlib
import io
import os
import time
import warnings
from collections.abc import Sequence
from typing import Any

from ase import Atoms
from ase.constraints import FixAtoms
from ase.optimize import LBFGS

from relaxnet_jax.graph import Structure

FMAX = 0.05  # eV/Å
MAX_STEPS = 500


def atoms_of(structure: Structure) -> Atoms:
    """ASE Atoms with the structure's fixed atoms."""
    s = structure
    atoms = Atoms(s.atomic_numbers, s.positions, cell=s.cell, pbc=s.pbc)
    if s.fixed_mask.any():
        atoms.set_constraint(FixAtoms(mask=s.fixed_mask))
    return atoms


def load_chgnet() -> Any:
    """The pretrained CHGNet on the CPU. Raises ImportError if it is not installed."""
    from chgnet.model.model import CHGNet

    return CHGNet.load(use_device="cpu", verbose=False)


def _with_chgnet(model: Any, atoms: Atoms) -> Atoms:
    from chgnet.model.dynamics import CHGNetCalculator

    copy = atoms.copy()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints on which device it runs
        copy.calc = CHGNetCalculator(model, use_device="cpu", on_isolated_atoms="error")
    return copy


def chgnet_energy(model: Any, atoms: Atoms) -> float:
    """The energy in eV; forces are computed with it."""
    return float(_with_chgnet(model, atoms).get_potential_energy())


def relax_with_lbfgs(model: Any, atoms: Atoms) -> tuple[float, int, bool]:
    """Seconds, steps and convergence of one CHGNet relaxation at fixed cell, as a user runs it."""
    copy = _with_chgnet(model, atoms)
    start = time.perf_counter()
    optimizer = LBFGS(copy, logfile=os.devnull)
    converged = optimizer.run(fmax=FMAX, steps=MAX_STEPS)
    return time.perf_counter() - start, optimizer.nsteps, bool(converged)


def relax_with_torch_sim(model: Any, atoms: Sequence[Atoms]) -> tuple[float, list[float]]:
    """Seconds of one batched relaxation (FIRE, fixed cell), and each structure's last fmax.

    torch-sim ships no CHGNet, so one is wrapped here for its interface. Fixed atoms are not supported:
    give structures without any.
    """
    import torch
    import torch_sim

    wrapped = _chgnet_for_torch_sim(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # max_steps was reached, which shows in the forces
        start = time.perf_counter()
        state = torch_sim.optimize(
            system=[a.copy() for a in atoms],
            model=wrapped,
            optimizer=torch_sim.optimizers.fire,
            convergence_fn=torch_sim.generate_force_convergence_fn(FMAX, include_cell_forces=False),
            max_steps=MAX_STEPS,
            autobatcher=torch_sim.autobatching.InFlightAutoBatcher(
                wrapped, memory_scales_with="n_atoms", max_memory_scaler=1e9
            ),
        )
        seconds = time.perf_counter() - start
    largest = [
        float(torch.linalg.norm(state.forces[state.system_idx == k], dim=-1).max())
        for k in range(len(atoms))
    ]
    return seconds, largest


def _chgnet_for_torch_sim(model: Any) -> Any:
    import torch
    import torch_sim
    from pymatgen.io.ase import AseAtomsAdaptor
    from torch_sim.models.interface import ModelInterface

    class CHGNetModel(ModelInterface):
        """Energies and forces of a batch by CHGNet's own batched prediction."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self._device, self._dtype = torch.device("cpu"), torch.float32
            self._compute_stress, self._compute_forces = False, True

        def forward(self, state, **kwargs):
            if isinstance(state, dict):
                state = torch_sim.SimState(
                    **state, masses=torch.ones(len(state["positions"]), dtype=self._dtype)
                )
            structures = [
                AseAtomsAdaptor.get_structure(a) for a in torch_sim.io.state_to_atoms(state)
            ]
            graphs = [self.model.graph_converter(s) for s in structures]
            found = self.model.predict_graph(graphs, task="ef", batch_size=max(len(graphs), 1))
            found = [found] if isinstance(found, dict) else found
            energies = [float(f["e"]) * len(s) for f, s in zip(found, structures)]
            forces = [torch.as_tensor(f["f"], dtype=self._dtype) for f in found]
            return {
                "energy": torch.tensor(energies, dtype=self._dtype),
                "forces": torch.cat(forces),
            }

    return CHGNetModel()
