"""Runs that did not finish: one policy for all VASP files.

A run that was killed or is still running, and a file that is truncated, keep their complete ionic
steps. This is noted, counted by the import, and recorded in the relaxation's ``source``, which ends in
`trajectory.UNFINISHED`. Damage within a file or in its compression is another matter: the file is
refused.
"""

from __future__ import annotations

from relaxnet_jax.errors import InputError


class Cut(Exception):  # noqa: N818 - the end of the file, not a fault of it
    """The file ends inside a block."""


class NoRelaxation(InputError):  # noqa: N818 - as above
    """The run itself cannot be learned from, whatever the state of its files."""


def remark(n_steps: int) -> str:
    """The note about a run that did not finish."""
    return (
        f"the run was killed or is still running, or its file is truncated: {n_steps} complete ionic steps "
        "kept"
    )


def too_few(n_steps: int, end: str = "") -> str:
    """Why fewer than two ionic steps are refused; ``end`` says where a truncated file ends."""
    what = "a single ionic step" if n_steps else "no complete ionic step"
    if end:
        what = f"ends {end}, after {n_steps} complete ionic steps"
    return f"{what}: a relaxation needs two or more"
