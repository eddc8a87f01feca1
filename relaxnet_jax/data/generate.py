"""Relaxations that the package generates itself: fcc alloys with ASE's EMT potential (not DFT)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relaxnet_jax.data.store import TrajectoryStore
from relaxnet_jax.data.store_write import write_store
from relaxnet_jax.data.trajectory import RelaxationTrajectory, reduced_formula
from relaxnet_jax.errors import InputError
from relaxnet_jax.runtime import cache_folder

if TYPE_CHECKING:
    import ase

# Part of the cached file's name: increase it whenever the same seed gives different relaxations.
GENERATOR_VERSION = 1
ELEMENTS = ("Al", "Cu", "Ag", "Au", "Ni", "Pd", "Pt")
KINDS = ("bulk", "vacancy", "surface")
SOURCE = "ASE EMT (not DFT)"
FMAX = 0.02  # eV/Å
MAX_STEPS = 100
MAX_ATTEMPTS = 20
VACUUM = 7.0  # Å
RATTLE = (0.05, 0.20)  # Å, range of the standard deviation per coordinate


def emt_relaxations(
    n: int = 600, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> Iterator[RelaxationTrajectory]:
    """Relaxes rattled alloy cells with EMT and keeps every ionic step.

    The kinds bulk, vacancy and surface alternate. Each relaxation depends only on ``(seed,
    index)``. Cells are fixed, and the optimiser is LBFGS down to 0.02 eV/Å; an attempt that has
    not converged after 100 steps is replaced by another one.

    Args:
      n: number of relaxations.
      seed: seed of all random choices.
      progress: called with (relaxations done, attempts made so far) after each.

    Yields:
      Trajectories of 4 to 16 atoms with ids ``emt-SEED-INDEX`` and the reduced formula as group;
      surfaces have fixed bottom layers and no stresses.

    Raises:
      InputError: ``n`` is below 1.
    """
    if n < 1:
        raise InputError(f"EMT data, n: {n} relaxations asked for: give 1 or more")
    attempts = 0
    for index in range(n):
        for attempt in range(MAX_ATTEMPTS):
            rng = np.random.default_rng((seed, index, attempt))
            kind = KINDS[index % len(KINDS)]
            trajectory = _relax(_structure(kind, rng), f"emt-{seed}-{index:05d}", kind)
            attempts += 1
            if trajectory is not None:
                break
        else:
            raise RuntimeError(f"no EMT relaxation {index} converged in {MAX_ATTEMPTS} attempts")
        yield trajectory
        if progress is not None:
            progress(index + 1, attempts)


def default_dataset(
    n: int = 600, seed: int = 0, report: Callable[[str], None] | None = None
) -> Path:
    """Returns the store of ``emt_relaxations(n, seed)``, generated on first use (about a minute).

    The store lies in the folder given by the environment variable RELAXNET_JAX_CACHE, or else in the
    user's cache folder. A damaged one is generated again. The function may be called from several
    processes: the last to finish replaces the file as a whole.

    Args:
      n, seed: see `emt_relaxations`.
      report: called with one line when the data are generated.

    Returns:
      Path of the store.

    Raises:
      InputError: the cache folder cannot be written, or ``n`` is below 1.
    """
    say = report or (lambda _: None)
    path = cache_folder() / f"emt-n{n}-seed{seed}-v{GENERATOR_VERSION}.h5"
    if path.exists():
        try:
            with TrajectoryStore(path) as store:
                store.verify()
            return path
        except InputError as error:
            say(f"cached EMT data are damaged; making them again ({error})")
    say(f"making {n} EMT relaxations (once, about {max(1, n // 10)} s): {path}")
    metadata = {"generator": "emt", "version": GENERATOR_VERSION, "n": n, "seed": seed}
    write_store(path, emt_relaxations(n, seed), metadata=metadata)
    return path


def _lattice_constant(symbols: list[str]) -> float:
    """Lattice constant in Å by Vegard's law: the mean of the elements' fcc lattice constants."""
    from ase.data import atomic_numbers, reference_states

    states: Any = reference_states
    return float(np.mean([states[atomic_numbers[s]]["a"] for s in symbols]))


def _composition(n: int, rng: np.random.Generator) -> list[str]:
    """(n,) symbols of one to three elements in random proportions and order."""
    n_elements = int(rng.choice([1, 2, 3], p=[0.15, 0.6, 0.25]))
    chosen = rng.choice(ELEMENTS, size=n_elements, replace=False)
    # Each chosen element occurs at least once.
    symbols = [*chosen, *rng.choice(chosen, size=n - n_elements)]
    return [str(s) for s in rng.permutation(symbols)]


def _ordered(kind: str, repeat: tuple[int, int, int], rng: np.random.Generator) -> list[str]:
    """Symbols of an L1_2 (A3B) or L1_0 (AB, layered along z) conventional cell, repeated."""
    a, b = (str(s) for s in rng.choice(ELEMENTS, size=2, replace=False))
    # ASE's cubic fcc: corner, then the centres of the yz, xz and xy faces.
    cell = [b, a, a, a] if kind == "L1_2" else [a, b, b, a]
    return cell * int(np.prod(repeat))


def _structure(kind: str, rng: np.random.Generator) -> ase.Atoms:
    """An unrelaxed structure of 4 to 16 atoms."""
    from ase.build import bulk

    if kind == "surface":
        return _surface(rng)
    repeats = [(1, 1, 1), (2, 1, 1), (3, 1, 1), (2, 2, 1)]
    repeat = repeats[rng.integers(1 if kind == "vacancy" else 0, len(repeats))]
    atoms = bulk("Cu", "fcc", a=1.0, cubic=True) * repeat
    order = rng.choice(["L1_2", "L1_0", "random"], p=[0.15, 0.15, 0.7])
    symbols = _composition(len(atoms), rng) if order == "random" else _ordered(order, repeat, rng)
    atoms.set_chemical_symbols(symbols)
    strain = np.eye(3) + symmetric(rng.uniform(-0.03, 0.03, 6))
    atoms.set_cell(atoms.cell.array * _lattice_constant(symbols) @ strain, scale_atoms=True)
    if kind == "vacancy":
        del atoms[int(rng.integers(len(atoms)))]
    atoms.positions += rng.normal(0.0, rng.uniform(*RATTLE), (len(atoms), 3))
    return atoms


def _surface(rng: np.random.Generator) -> ase.Atoms:
    """A slab of 3 or 4 layers in vacuum; the top two are rattled, the others fixed."""
    from ase import build
    from ase.constraints import FixAtoms

    facet = str(rng.choice(["fcc111", "fcc100", "fcc110"]))
    layers = int(rng.choice([3, 4]))
    size = (2, int(rng.choice([1, 2])), layers) if facet != "fcc111" else (2, 2, layers)
    symbols = _composition(int(np.prod(size)), rng)
    slab = getattr(build, facet)("Cu", size=size, a=_lattice_constant(symbols), vacuum=VACUUM)
    slab.set_chemical_symbols(symbols)
    slab.pbc = True
    # ASE tags layers from the top, starting at 1.
    free = slab.get_tags() <= 2
    slab.set_tags(0)
    slab.set_constraint(FixAtoms(mask=~free))
    noise = rng.normal(0.0, rng.uniform(*RATTLE), (len(slab), 3))
    slab.positions[free] += noise[free]
    return slab


def symmetric(voigt: np.ndarray) -> np.ndarray:
    """(3, 3) symmetric strain from (6,) numbers in Voigt order, shears halved."""
    xx, yy, zz, yz, xz, xy = voigt
    off = np.array([[0, xy, xz], [xy, 0, yz], [xz, yz, 0]]) / 2
    return np.diag([xx, yy, zz]) + off


def _relax(atoms: ase.Atoms, name: str, kind: str) -> RelaxationTrajectory | None:
    """Relaxes a structure and keeps every step; None if it does not converge or does not move."""
    from ase.calculators.emt import EMT
    from ase.optimize import LBFGS

    atoms.calc = EMT()
    positions, energies, forces, stresses = [], [], [], []
    options: dict[str, Any] = {"maxstep": 0.2, "logfile": None}
    for _ in LBFGS(atoms, **options).irun(fmax=FMAX, steps=MAX_STEPS):
        # The optimiser has just computed the forces at these positions; atoms.get_forces() etc.
        # would first compare all atoms with the calculator's, which costs a third of the time.
        results = atoms.calc.results
        positions.append(atoms.get_positions())
        energies.append(results["energy"])
        forces.append(results["forces"].copy())
        stresses.append(results["stress"].copy())
    n = len(positions)
    fixed = np.zeros(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        fixed[constraint.index] = True
    trajectory = RelaxationTrajectory(
        id=name,
        atomic_numbers=atoms.numbers.astype(np.int64),
        positions=np.array(positions),
        cells=np.repeat(atoms.cell.array[None], n, axis=0),
        pbc=atoms.pbc.copy(),
        energies=np.array(energies),
        forces=np.array(forces),
        fixed_mask=fixed,
        group=reduced_formula(atoms.numbers),
        stresses=None if kind == "surface" else np.array(stresses),
        source=SOURCE,
    )
    if n < 2 or trajectory.fmax[-1] >= FMAX:
        return None
    try:
        return trajectory.validate()
    except InputError:
        # A rattle can push two atoms into each other; EMT then gives an absurd energy.
        return None
