"""Training data made by relaxing structures with an ASE calculator."""

from relaxnet_jax.data.generation.calculators import check_calculator, load_calculator
from relaxnet_jax.data.generation.making import GenerationReport, generate_set, standing
from relaxnet_jax.data.generation.parents import Parent, mineral_prototypes, read_parents
from relaxnet_jax.data.generation.settings import Settings

__all__ = [
    "GenerationReport",
    "Parent",
    "Settings",
    "check_calculator",
    "generate_set",
    "load_calculator",
    "mineral_prototypes",
    "read_parents",
    "standing",
]
