"""RelaxNet in JAX: predicts whole relaxation trajectories from the unrelaxed structure.

The public names are loaded on first use, so that importing the package (or its data layer, which
does not need JAX) stays cheap.
"""

import importlib
from typing import TYPE_CHECKING

_HOMES = {
    "RelaxNetCalculator": "relaxnet_jax.calculator",
    "load_config": "relaxnet_jax.config",
    "RelaxationTrajectory": "relaxnet_jax.data.trajectory",
    "RelaxNet": "relaxnet_jax.model",
    "create_model": "relaxnet_jax.model",
    "load_committee": "relaxnet_jax.model",
    "load_model": "relaxnet_jax.model",
    "save_model": "relaxnet_jax.model",
    "stack_models": "relaxnet_jax.model",
    "predict_trajectory": "relaxnet_jax.model",
    "relax": "relaxnet_jax.predict",
    "relax_committee": "relaxnet_jax.committee",
    "head_start": "relaxnet_jax.starting",
    "solve_trajectory": "relaxnet_jax.solver",
    "train": "relaxnet_jax.train.loop",
    "enable_compilation_cache": "relaxnet_jax.runtime",
    "trust_flags": "relaxnet_jax.trust",
    "InputError": "relaxnet_jax.errors",
}
__version__ = "0.1.0"
__all__ = sorted([*_HOMES, "__version__"])

if TYPE_CHECKING:
    from relaxnet_jax.calculator import RelaxNetCalculator as RelaxNetCalculator
    from relaxnet_jax.committee import relax_committee as relax_committee
    from relaxnet_jax.config import load_config as load_config
    from relaxnet_jax.data.trajectory import RelaxationTrajectory as RelaxationTrajectory
    from relaxnet_jax.errors import InputError as InputError
    from relaxnet_jax.model import RelaxNet as RelaxNet
    from relaxnet_jax.model import create_model as create_model
    from relaxnet_jax.model import load_committee as load_committee
    from relaxnet_jax.model import load_model as load_model
    from relaxnet_jax.model import predict_trajectory as predict_trajectory
    from relaxnet_jax.model import save_model as save_model
    from relaxnet_jax.model import stack_models as stack_models
    from relaxnet_jax.predict import relax as relax
    from relaxnet_jax.runtime import enable_compilation_cache as enable_compilation_cache
    from relaxnet_jax.solver import solve_trajectory as solve_trajectory
    from relaxnet_jax.starting import head_start as head_start
    from relaxnet_jax.train.loop import train as train
    from relaxnet_jax.trust import trust_flags as trust_flags


def __getattr__(name: str):
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
