"""The calculators whose steps ``benchmark steps`` counts."""

from __future__ import annotations

from typing import Any

from relaxnet_jax.data.files import one_line
from relaxnet_jax.data.generation.calculators import Calculator, check_calculator
from relaxnet_jax.errors import InputError

# Forces on rattled MgO, LiF and TiN (2 atoms) differ from those at 900 eV by at most 1.6 meV/Å at 600 eV,
# by 34 at 500 eV (TiN) and by 28 at 400 eV (MgO). Stresses converge more slowly: 0.05 eV/Å³ off at 600 eV
# (TiN).
CUTOFF, CELL_CUTOFF = 600.0, 900.0  # eV, for fixed cells and for those that relax
KPOINT_DENSITY = 3.0  # per Å⁻¹; from 2 to 3 the forces on MgO and LiF change by less than 1 meV/Å
SMEARING = 0.05  # eV, of the Fermi-Dirac occupations
# Tolerance for symmetries, in positions relative to the cell. What a model predicts in single precision is
# no more symmetric than that.
SYMMETRY = 1e-5


def load_oracle(
    name: str, relax_cell: bool, cutoff: float | None = None, density: float | None = None
) -> Calculator:
    """Loads the calculator of ``--oracle``.

    Args:
      name: emt, chgnet, gpaw or MODULE:FACTORY.
      relax_cell: whether it must have stresses.
      cutoff: eV, of gpaw's plane waves (default `CUTOFF`, or `CELL_CUTOFF` with ``relax_cell``).
      density: density of gpaw's k-points, per Å⁻¹ (default `KPOINT_DENSITY`).

    Raises:
      InputError: the calculator cannot be loaded, or does not have an option that is given.
    """
    if name == "gpaw":
        usual = CELL_CUTOFF if relax_cell else CUTOFF
        return _gpaw(
            usual if cutoff is None else cutoff, KPOINT_DENSITY if density is None else density
        )
    for option, value in (("--cutoff", cutoff), ("--kpoint-density", density)):
        if value is not None:
            raise InputError(f"{option} {value:g}: only for --oracle gpaw; omit it")
    try:
        return check_calculator(name, relax_cell, "--oracle")
    except InputError as error:
        text = str(error).replace("give emt, chgnet or", "give emt, chgnet, gpaw or")
        raise InputError(text) from None


def _gpaw(cutoff: float, density: float) -> Calculator:
    """GPAW with plane waves, PBE, no spins and its own convergence criteria."""
    for option, value in (("--cutoff", cutoff), ("--kpoint-density", density)):
        if not value > 0:
            raise InputError(f"{option} {value:g}: must be positive")
    try:
        import gpaw
        from gpaw import GPAW, PW, FermiDirac
    except ImportError as error:
        raise InputError(
            f"--oracle gpaw: GPAW cannot be imported ({one_line(error)}); on Debian and "
            "Ubuntu, install it with bin/setup_gpaw from the repository"
        ) from error
    if not gpaw.setup_paths:
        raise InputError(
            "--oracle gpaw: GPAW finds no PAW data sets; run pip install gpaw-data, or set "
            "GPAW_SETUP_PATH to their folder"
        )

    def make() -> Any:
        return GPAW(
            mode=PW(cutoff),
            xc="PBE",
            kpts={"density": density, "gamma": True},
            occupations=FermiDirac(SMEARING),
            spinpol=False,
            symmetry={"tolerance": SYMMETRY},
            txt=None,
        )

    settings = f"PBE, {cutoff:g} eV, {density:g} k-points per Å⁻¹, no spins"
    source = f"GPAW {gpaw.__version__} ({settings})"
    return Calculator(make, "gpaw", source, None, f"{gpaw.__version__} {settings}")
