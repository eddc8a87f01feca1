"""Differences between the configurations of models that are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from relaxnet_jax.config import Config
from relaxnet_jax.reproduce.setting import SHOWN, Setting

_SECTIONS = ("graph", "model", "dynamics", "loss", "train")
_OWN = {"dynamics.latent", "train.max_minutes"}  # the subject of the comparison; stated elsewhere
# Fields without effect on some kinds of models.
_OF_PATHS = {"loss.energy_change", "loss.monotonicity", "graph.skin"}
_OF_STARTS = {
    *("loss.positions", "loss.direction", "loss.cell"),
    *("train.noise", "train.noise_share", "train.strain_noise"),
}
_OF_TRIPLETS = {
    *("graph.triplet_cutoff", "model.triplet_features", "model.moment_channels", "model.l_angle"),
    *("model.interaction", "model.vector_messages", "model.update_positions"),
}


def unlike(setting: Setting, roles: Iterable[str], than: str = "explicit") -> list[str]:
    """A remark for each role whose configuration differs from that of another role.

    A comparison of two schemes also compares everything else that differs, such as widths, cutoffs
    and the loss. Fields without effect on a role (a loss on paths for a model without paths) are
    left out, as are roles that cannot be trained with these settings.
    """
    reference = dict(_fields(setting.config(than)))
    remarks = []
    for role in roles:
        if setting.why_not(role):
            continue
        config = setting.config(role)
        without = _meaningless(config)
        own = [
            f"{name} {_shown(value)} ({_shown(reference[name])})"
            for name, value in _fields(config)
            if value != reference[name] and name not in without
        ]
        if own:
            name = SHOWN.get(role, role)
            remarks.append(
                f"Settings of {name} that differ from {than} (in brackets): {', '.join(own)}."
            )
    return remarks


def _fields(config: Config) -> Iterator[tuple[str, Any]]:
    for section in _SECTIONS:
        values = getattr(config, section)
        for field in dataclasses.fields(values):
            name = f"{section}.{field.name}"
            if name not in _OWN:
                yield name, getattr(values, field.name)


def _meaningless(config: Config) -> set[str]:
    """Names of the fields without effect on this kind of model."""
    names: set[str] = set()
    if config.dynamics.latent in ("static", "direct"):
        names |= _OF_PATHS | {name for name, _ in _fields(config) if name.startswith("dynamics.")}
    if config.dynamics.latent == "static":
        names |= _OF_STARTS
    if config.dynamics.latent == "direct":
        names |= {"loss.forces"}
    if config.dynamics.latent != "explicit":
        names |= {"model.pair_features"}
    if config.model.architecture == "egnn":
        names |= _OF_TRIPLETS
    return names


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
