"""Runs without their end, and what is done with them: one policy for all files of VASP.

A run that was killed or is still going, and a file that is cut short, keep their complete ionic
steps. That is noted, counted by the import, and said by the relaxation's ``source``, which ends in
`trajectory.UNFINISHED`. Damage within a file, and in its compression, is no such end: the file is refused.
"""

from __future__ import annotations

from relaxnet_jax.errors import InputError


class Cut(Exception):  # noqa: N818 - the end of the file, not a fault of it
    """The file ends inside a block."""


class NoRelaxation(InputError):  # noqa: N818 - as above
    """The run itself is nothing to learn from, whatever the state of its files."""


def remark(n_steps: int) -> str:
    """What is noted of a run without its end."""
    return (
        f"the run was killed, is still going or the file is cut: {n_steps} complete ionic steps "
        "kept"
    )


def too_few(n_steps: int, end: str = "") -> str:
    """Why fewer than two ionic steps are refused; ``end``: where a cut file ends."""
    what = "a single ionic step" if n_steps else "no complete ionic step"
    if end:
        what = f"ends {end}, after {n_steps} complete ionic steps"
    return f"{what}: a relaxation needs two or more"
