"""A readable description of a saved model, from the text files in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from relaxnet_jax.config import Config

_KINDS = {
    "explicit": "paths by an ODE, features encoded once (explicit)",
    "implicit": "paths by an ODE, features re-encoded along the path (implicit); a potential",
    "static": "a potential; paths by L-BFGS",
    "direct": "the final structure and energy at once",
}


def facts(config: Config, model: Mapping[str, Any]) -> dict[str, str]:
    """Describes a model as lines of text, keyed by their labels.

    Args:
      config: the model's configuration.
      model: the contents of its model.json.
    """
    d, told = config.dynamics, model["statistics"]
    elements = model["elements"]
    found = {
        "predicts": _KINDS[d.latent],
        "cells": "relax" if d.cell == "variable" else "fixed",
        "elements": f"{len(elements)}: {' '.join(elements)}" if elements else "untrained: any",
        "trained on": str(told.get("data", "nothing")),
    }
    if count := told.get("training_relaxations"):
        found["trained on"] += f", {count} relaxations"
    if start := told.get("started_from"):
        found["started from"] = f"another model (sha256 {str(start)[:12]}…)"
    for name, (low, high) in told.get("surroundings", {}).items():
        found[f"neighbours ({name})"] = f"{low:.0f} to {high:.0f} per atom in the training data"
    if check := told.get("validation"):
        found["on its validation split"] = ", ".join(f"{k} {v:.3g}" for k, v in check.items())
    found["cutoffs"] = f"pairs {config.graph.cutoff:g} Å, bonds {config.graph.triplet_cutoff:g} Å"
    found["parameters"] = f"{model['parameters']:,}"
    found["made by"] = ", ".join(f"{name} {number}" for name, number in model["versions"].items())
    return found
