"""The reasons for which a relaxation is reported; `quality.checks` explains each of them."""

from __future__ import annotations

from collections.abc import Sequence

from relaxnet_jax.errors import InputError

REASONS = (
    "energy",
    "energy-change",
    "force",
    "shifted",
    "outlier",
    "discontinuity",
    "work",
    "order",
    "rising",
    "jump",
    "charge",
    "unconverged",
)


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """The reasons named, all of them for "all"; raises InputError, which names an unknown one."""
    unknown = [name for name in names if name not in (*REASONS, "all")]
    if unknown:
        known = ", ".join(REASONS)
        raise InputError(f"--drop {unknown[0]}: no such reason: use all, or some of {known}")
    return REASONS if "all" in names else tuple(dict.fromkeys(names))
