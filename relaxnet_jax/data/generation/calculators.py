"""Calculators that relaxations are generated with, by name."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from relaxnet_jax.data.files import one_line
from relaxnet_jax.data.generate import ELEMENTS, SOURCE
from relaxnet_jax.errors import InputError

_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
# Elements up to plutonium that its training data, the Materials Project's, lack.
_CHGNET_ABSENT = (84, 85, 86, 87, 88)


class Calculator(NamedTuple):
    """A kind of calculator.

    Attributes:
      make: returns a new ASE calculator.
      label: short name, used in ids.
      source: ``source`` of the trajectories.
      elements: atomic numbers it supports, None for any.
      version: changes whenever its results may change.
      serial: whether it uses only one thread.
    """

    make: Callable[[], Any]
    label: str
    source: str
    elements: frozenset[int] | None
    version: str
    serial: bool = False


def load_calculator(name: str, option: str = "--calculator") -> Calculator:
    """Returns the calculator called ``name``.

    "emt" is ASE's EMT for Al, Cu, Ag, Au, Ni, Pd and Pt; "chgnet" is the pretrained CHGNet potential
    (needs the extra ``chgnet``). MODULE:FACTORY imports MODULE from the working directory or the
    environment and uses its callable FACTORY, which returns an ASE calculator when called without
    arguments. FACTORY is called for every relaxation, so that none depends on another. This runs the
    code of that module: name only what you would run yourself.

    Args:
      name: "emt", "chgnet" or MODULE:FACTORY.
      option: the command-line option that gave the name, for error messages.

    Raises:
      InputError: there is no such calculator, module or factory, or CHGNet is not installed.
    """
    if name == "emt":
        return _emt()
    if name == "chgnet":
        return _chgnet(option)
    if not _FACTORY.fullmatch(name):
        raise InputError(
            f"{option} {name}: unknown: give emt, chgnet or MODULE:FACTORY, a function of "
            "your own that returns an ASE calculator"
        )
    return _factory(name, option)


def _emt() -> Calculator:
    import ase
    from ase.calculators.emt import EMT
    from ase.data import atomic_numbers

    # EMT also has made-up parameters for H, C, N and O.
    known = frozenset(atomic_numbers[s] for s in ELEMENTS)
    return Calculator(EMT, "emt", SOURCE, known, ase.__version__, serial=True)


def _chgnet(option: str) -> Calculator:
    try:
        return _loaded_chgnet()
    except ImportError as error:
        raise InputError(
            f"{option} chgnet: CHGNet cannot be imported ({one_line(error)}): "
            "pip install 'relaxnet-jax[chgnet]'"
        ) from error


@functools.cache
def _loaded_chgnet() -> Calculator:
    import torch
    from chgnet import __version__
    from chgnet.model.dynamics import CHGNetCalculator
    from chgnet.model.model import CHGNet

    # Sums over several threads round differently: results would depend on the number of jobs.
    torch.set_num_threads(1)
    # Silences its messages about itself and its device.
    with contextlib.redirect_stdout(io.StringIO()):
        model = CHGNet.load(use_device="cpu", verbose=False)
    known = frozenset(range(1, 95)) - frozenset(_CHGNET_ABSENT)

    def make() -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return CHGNetCalculator(model, use_device="cpu", on_isolated_atoms="error")

    version = getattr(model, "version", None) or __version__
    source = f"CHGNet {version} (not DFT)"
    return Calculator(make, "chgnet", source, known, f"{version} {__version__}", serial=True)


def _factory(name: str, option: str) -> Calculator:
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module's own code runs and may raise anything
        raise InputError(
            f"{option} {name}: module {module_name} cannot be imported "
            f"({type(error).__name__}: {one_line(error)}): correct the module or its name"
        ) from error
    make = getattr(module, attribute, None)
    if not callable(make):
        raise InputError(
            f"{option} {name}: {module_name} has no function {attribute}: "
            "name one that returns an ASE calculator"
        )
    file = getattr(module, "__file__", None)
    version = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
    return Calculator(make, attribute, f"calculator {name}", None, version)


def check_calculator(name: str, relax_cell: bool, option: str = "--calculator") -> Calculator:
    """Loads the calculator and makes one, so that an unsuitable one is refused before any work.

    Args:
      name, option: see `load_calculator`.
      relax_cell: whether it must provide stresses.

    Raises:
      InputError: it cannot be loaded or made, is not an ASE calculator, or lacks the energy, the
        forces or the stress (needed to relax the cell).
    """
    calculator = load_calculator(name, option)
    try:
        made = calculator.make()
    except Exception as error:  # the user's own code
        raise InputError(
            f"{option} {name}: the factory fails ({type(error).__name__}: "
            f"{one_line(error)}): repair it"
        ) from error
    offered = getattr(made, "implemented_properties", None)
    if offered is None or not callable(getattr(made, "get_property", None)):
        raise InputError(
            f"{option} {name}: returns {type(made).__name__}, not an ASE calculator: return one"
        )
    needed = ("energy", "forces", "stress") if relax_cell else ("energy", "forces")
    missing = [need for need in needed if need not in offered]
    if missing:
        ways = {
            "--calculator": "leave out --relax-cell",
            "--refine": "needed to relax cells; choose another, or give --keep-cell",
        }
        remedy = ways.get(option) if missing == ["stress"] else None
        remedy = remedy or "choose another"
        raise InputError(f"{option} {name}: has no {' and no '.join(missing)}: {remedy}")
    return calculator
