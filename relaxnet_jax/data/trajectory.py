"""`RelaxationTrajectory`: one relaxation, from the first ionic step to the last."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from relaxnet_jax.console import printable
from relaxnet_jax.data.checks import MIN_VOLUME, check_geometry, check_numbers, check_shapes
from relaxnet_jax.data.files import atomic_path, is_poscar, one_line
from relaxnet_jax.errors import InputError
from relaxnet_jax.work import work

if TYPE_CHECKING:
    import ase

# Å; a lattice-vector component that changes by more has been relaxed, not rounded.
CELL_TOLERANCE = 1e-4
PREDICTED = "RelaxNet"  # ``source`` of predicted relaxations
REFINED = f"{PREDICTED}, refined"  # of a structure relaxed further from a prediction
ALONE = f"refined without {PREDICTED}"  # of one for which the prediction was of no use
CALCULATOR = "relaxnet"  # ASE's name of the package's calculator
# Endings of ``source`` if the relaxation has not reached its end.
UNFINISHED = ", unfinished"  # killed, still running, or its file truncated
UNCONVERGED = ", not converged"
# Precedes these for a VASP run with electronically unconverged ionic steps.
AT_NELM = ", steps at NELM"
SPIN_POLARISED = " ISPIN=2"  # precedes all of these for a spin-polarised VASP run
MANY = (".extxyz", ".traj")  # formats that take all frames, of several relaxations
SUPPORTED_OUTPUTS = ".extxyz, .traj (all frames), .cif, .vasp, POSCAR*, CONTCAR* (final frame)"


@dataclasses.dataclass(frozen=True, eq=False)
class RelaxationTrajectory:
    """Positions, energies and forces of the ionic steps of one relaxation.

    All arrays are NumPy, floating arrays float64. Frames are in order and
    unwrapped: no atom jumps across the cell from one frame to the next.

    Attributes:
      id: name of the relaxation, unique in its data set.
      atomic_numbers: (N,) int.
      positions: (n, N, 3), Å, Cartesian.
      cells: (n, 3, 3), Å, rows are lattice vectors.
      pbc: (3,) bool.
      energies: (n,), eV per structure (total energies as given by the code).
      forces: (n, N, 3), eV/Å, raw, i.e. not zeroed on fixed atoms.
      fixed_mask: (N,) bool, True where the atom was held fixed.
      group: group of the material; a split never separates materials of one group.
      stresses: (n, 6) or None, eV/Å³, Voigt order xx yy zz yz xz xy, tension positive.
      charges: (N,) or None, e: net charges of the atoms, positive where electrons are missing
        (ASE's initial charges; for a VASP run, those of its PAW spheres, see `outcar.Outcar`).
      times: (n,) pseudotime in [0, 1], or None for k/(n-1).
      source: where the relaxation comes from (file, code, functional); it ends in `SPIN_POLARISED`,
        `AT_NELM`, `UNFINISHED` or `UNCONVERGED` where these apply.
    """

    id: str
    atomic_numbers: np.ndarray
    positions: np.ndarray
    cells: np.ndarray
    pbc: np.ndarray
    energies: np.ndarray
    forces: np.ndarray
    fixed_mask: np.ndarray
    group: str = ""
    stresses: np.ndarray | None = None
    charges: np.ndarray | None = None
    times: np.ndarray | None = None
    source: str = ""

    def __repr__(self) -> str:
        cells = "changing" if self.variable_cell else "one"
        return f"RelaxationTrajectory({self.id!r}, {self.formula}, {self.n_frames} frames, {cells} cell)"

    @property
    def n_frames(self) -> int:
        """Number n of ionic steps, the initial structure included."""
        return self.positions.shape[0]

    @property
    def n_atoms(self) -> int:
        """Number N of atoms."""
        return self.positions.shape[1]

    @property
    def fmax(self) -> np.ndarray:
        """(n,), eV/Å: the largest force norm among the free atoms, 0 if none is free."""
        free = np.asarray(self.forces)[:, ~np.asarray(self.fixed_mask, dtype=bool)]
        return np.linalg.norm(free, axis=-1).max(axis=1, initial=0.0)

    @property
    def formula(self) -> str:
        """Reduced chemical formula in Hill order, e.g. "Cu3Au" as "AuCu3"."""
        return reduced_formula(self.atomic_numbers)

    @property
    def family(self) -> str:
        """``source`` without its special endings; energies of one family can be compared."""
        source = self.source
        # Structures without magnetic moments have the same energy with and without spin
        # polarisation, and many sets hold both: separated, their rarer elements would have too few
        # relaxations to compare with. Moments lower an energy by some 0.1 eV/atom, which is within
        # what compositions leave unexplained.
        for ending in (UNFINISHED, UNCONVERGED, AT_NELM, SPIN_POLARISED):
            source = source.removesuffix(ending)
        return source

    @property
    def variable_cell(self) -> bool:
        """Whether any frame's cell differs from the first by more than 1e-4 Å."""
        return bool(np.any(np.abs(self.cells - self.cells[:1]) > CELL_TOLERANCE))

    def work(self) -> np.ndarray:
        """E(t) - E(0), (n,) eV, as the work of the forces (see `relaxnet_jax.work.work`).

        This is for predicted paths in fixed cells; add it to the first frame's DFT energy.

        Raises:
          InputError: the cell changes, so that forces alone do not give the work.
        """
        if self.variable_cell:
            raise InputError(
                f"{self.id}: the cell changes, and the work of its stress is unknown; use the energies"
            )
        return work(self.positions, self.forces, self.fixed_mask)

    def begun_at(self, frame: int) -> RelaxationTrajectory:
        """The relaxation from ``frame`` on, with the id ``ID@FRAME``; itself for frame 0."""
        if frame == 0:
            return self
        times = self.times
        if times is not None:
            times = (times[frame:] - times[frame]) / (1.0 - times[frame])
        return dataclasses.replace(
            self,
            id=f"{self.id}@{frame}",
            positions=self.positions[frame:],
            cells=self.cells[frame:],
            energies=self.energies[frame:],
            forces=self.forces[frame:],
            stresses=None if self.stresses is None else self.stresses[frame:],
            times=times,
        )

    def atoms(self, i: int = -1) -> ase.Atoms:
        """Frame ``i`` (the final one by default) as ASE atoms.

        The atoms carry a ``SinglePointCalculator`` with energy, raw forces and (if known) stress,
        ``charges`` as initial charges, ``FixAtoms`` on fixed atoms, and ``traj_id``, ``frame``,
        ``group`` and ``source`` in ``info``.

        Raises:
          IndexError: ``i`` is not a frame.
        """
        from ase import Atoms
        from ase.calculators.singlepoint import SinglePointCalculator
        from ase.constraints import FixAtoms

        frame = range(self.n_frames)[i]
        atoms = Atoms(
            numbers=self.atomic_numbers,
            positions=self.positions[frame],
            cell=self.cells[frame],
            pbc=self.pbc,
            charges=self.charges,
        )
        if np.any(self.fixed_mask):
            atoms.set_constraint(FixAtoms(indices=np.flatnonzero(self.fixed_mask)))
        results = {"energy": float(self.energies[frame]), "forces": self.forces[frame].copy()}
        if self.stresses is not None:
            results["stress"] = self.stresses[frame].copy()
        atoms.calc = SinglePointCalculator(atoms, **results)
        atoms.info = {"traj_id": self.id, "frame": frame}
        atoms.info |= {k: v for k, v in (("group", self.group), ("source", self.source)) if v}
        return atoms

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the trajectory; an existing file is replaced only by a complete one.

        Args:
          path: file to write; ``.extxyz`` and ``.traj`` take all frames, ``.cif`` and VASP's names
            (see `is_poscar`) the final one.

        Raises:
          InputError: the suffix is unknown, the folder cannot be written, or the format cannot hold
            the structure (e.g. a molecule without cell as POSCAR).
        """
        import ase.io

        target = Path(path)
        form = output_form(target)
        chosen = range(self.n_frames) if target.suffix in MANY else (-1,)
        frames = [self.atoms(i) for i in chosen]
        # Without a cell ASE writes a POSCAR that nothing can read.
        if form == "vasp" and abs(np.linalg.det(self.cells[-1])) < MIN_VOLUME:
            raise InputError(f"{target}: {self.id} has no cell: write .extxyz, .traj or .cif")
        with atomic_path(target) as temporary:
            try:
                ase.io.write(temporary, frames, format=form)
            except Exception as error:
                raise InputError(
                    f"{target}: ASE cannot write {self.id} as {form} ({one_line(error)}): "
                    "write .extxyz instead"
                ) from error

    def validate(self) -> RelaxationTrajectory:
        """Returns the relaxation itself if it is sound.

        Sound means: shapes agree; there are at least one frame and one atom; atomic numbers are 1 to
        118; every number is finite; times ascend in [0, 1]; energies are within 20 eV/atom; lattice
        vectors along periodic directions are independent (others may be missing); and no two atoms
        (periodic images included) are within 1e-3 Å.

        Raises:
          InputError: the first of these that does not hold, with id, frame and field.
        """
        check_shapes(self)
        check_numbers(self)
        check_geometry(self)
        return self


def output_form(path: Path) -> str:
    """ASE's name for the format of an output file, judged by the file's name.

    The suffix takes precedence over words like POSCAR, so that no frames are lost.

    Raises:
      InputError: files of this name cannot be written.
    """
    if path.suffix in (*MANY, ".cif"):
        return path.suffix[1:]
    if is_poscar(path):
        return "vasp"
    raise InputError(f"{path}: unknown suffix {path.suffix!r}: use one of {SUPPORTED_OUTPUTS}")


def sound_and_unwrapped(trajectory: RelaxationTrajectory) -> RelaxationTrajectory:
    """Validates a relaxation as it was read, unwraps its positions and makes its texts UTF-8.

    Raises:
      InputError: it is unsound; the message does not name it, which is left to the caller.
    """
    try:
        trajectory.validate()
    except InputError as bad:
        prefix = f"relaxation {trajectory.id!r}, "
        raise InputError(str(bad).removeprefix(prefix)) from None
    unwrapped = unwrap_positions(trajectory.positions, trajectory.cells, trajectory.pbc)
    # Ids and sources may come from file names, which need not be UTF-8; a store holds only UTF-8.
    return dataclasses.replace(
        trajectory,
        id=printable(trajectory.id),
        group=printable(trajectory.group),
        source=printable(trajectory.source),
        positions=unwrapped,
    )


def reduced_formula(atomic_numbers: np.ndarray) -> str:
    """Reduced chemical formula, in Hill order, of (N,) atomic numbers."""
    from ase.data import chemical_symbols
    from ase.formula import Formula

    numbers, counts = np.unique(atomic_numbers, return_counts=True)
    counts = counts // np.gcd.reduce(counts)
    symbols = {chemical_symbols[z]: int(c) for z, c in zip(numbers, counts)}
    return Formula.from_dict(symbols).format("hill")


def unwrap_positions(positions: np.ndarray, cells: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """Removes lattice-vector jumps between consecutive frames.

    A step is a jump if it exceeds one half in a fractional coordinate along a periodic direction. A
    whole number of the frame's own lattice vectors is removed, so every frame remains the same
    crystal. Without jumps the result equals the input bit for bit.

    Args:
      positions: (n, N, 3), Å.
      cells: (n, 3, 3), Å.
      pbc: (3,) bool.

    Returns:
      (n, N, 3), Å; the first frame is unchanged.
    """
    if len(positions) < 2 or not np.any(pbc):
        return positions.copy()
    # The pseudo-inverse also serves slabs without a third lattice vector.
    fractional = positions @ np.linalg.pinv(cells)
    jumps = np.round(np.diff(fractional, axis=0)) * np.asarray(pbc, dtype=float)
    total = np.concatenate([np.zeros_like(jumps[:1]), np.cumsum(jumps, axis=0)])
    return positions - total @ cells
