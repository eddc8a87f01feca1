"""Settings of a generated data set."""

from __future__ import annotations

import dataclasses
from typing import Literal

from relaxnet_jax.errors import InputError

# Part of the parts' keys and the store's metadata: increase it whenever the same settings give
# different relaxations.
GENERATOR_VERSION = 1
OPTIMIZERS = ("lbfgs", "fire")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How relaxations are generated; given these settings, each depends only on its index.

    Attributes:
      calculator: "emt", "chgnet" or MODULE:FACTORY (see `calculators.load_calculator`).
      seed: seed of all random choices, 0 or more.
      rattle: Å, range of the standard deviation of the noise per coordinate.
      strain: largest magnitude of the components of the cell's symmetric strain.
      substitute: probability of replacing each element by another of its group.
      f_elements: whether rare earths (Sc, Y, La to Lu) may replace each other, and likewise
        actinides (Ac to Pu).
      supercell: number of repetitions along each lattice vector.
      relax_cell: whether the cell relaxes too.
      optimizer: "lbfgs" or "fire".
      fmax: eV/Å, the largest force (with ``relax_cell`` also the cell's) of a relaxed structure.
      max_steps: number of steps after which a relaxation counts as not converged.
      keep_unconverged: whether such relaxations are kept; their ``source`` says so.
      max_atoms: largest number of atoms, supercell included; larger structures are refused.
      attempts: number of starts drawn for each relaxation before it is left out.
      group_by: "parent" if all materials made from one structure or prototype share a group, or
        "formula".
    """

    calculator: str
    seed: int = 0
    rattle: tuple[float, float] = (0.02, 0.15)
    strain: float = 0.02
    substitute: float = 0.0
    f_elements: bool = False
    supercell: tuple[int, int, int] = (1, 1, 1)
    relax_cell: bool = False
    optimizer: Literal["lbfgs", "fire"] = "lbfgs"
    fmax: float = 0.03
    max_steps: int = 200
    keep_unconverged: bool = False
    max_atoms: int = 40
    attempts: int = 5
    group_by: Literal["parent", "formula"] = "parent"

    def check(self) -> Settings:
        """Returns the settings; raises InputError, which names the first one that makes no sense."""
        low, high = self.rattle
        complaints = (
            (self.seed >= 0, f"--seed {self.seed}: give 0 or more"),
            (
                0 <= low <= high < 1,
                f"--rattle {low} {high}: give two standard deviations in Å, the lower first, "
                "within 0 to 1",
            ),
            (0 <= self.strain < 0.5, f"--strain {self.strain}: give a number from 0 to below 0.5"),
            (0 <= self.substitute <= 1, f"--substitute {self.substitute}: give a probability"),
            (
                self.substitute > 0 or not self.f_elements,
                "--f-elements: nothing is replaced: give --substitute a probability above 0",
            ),
            (
                min(self.supercell) >= 1,
                f"--supercell {' '.join(map(str, self.supercell))}: give three numbers of 1 or "
                "more",
            ),
            (
                self.optimizer in OPTIMIZERS,
                f"--optimizer {self.optimizer}: give one of {', '.join(OPTIMIZERS)}",
            ),
            (0 < self.fmax < 10, f"--fmax {self.fmax}: give a force in eV/Å above 0"),
            (self.max_steps >= 1, f"--max-steps {self.max_steps}: give 1 or more"),
            (self.max_atoms >= 1, f"--max-atoms {self.max_atoms}: give 1 or more"),
            (self.attempts >= 1, f"--attempts {self.attempts}: give 1 or more"),
            (
                self.group_by in ("parent", "formula"),
                f"--group-by {self.group_by}: give parent or formula",
            ),
        )
        for sound, complaint in complaints:
            if not sound:
                raise InputError(complaint)
        return self
