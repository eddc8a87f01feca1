"""Ionic steps whose electronic minimisation did not converge: one policy for all VASP files.

Such a step ends at NELM, with energies and forces that are not those of the ground state. If others
follow, it is kept, as they were computed anew; this is noted, counted by the import, and recorded in
the relaxation's ``source`` (`trajectory.AT_NELM`). If it is the last one, it is unknown whether the
structure is a minimum and what its energy is, so the run is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from relaxnet_jax.data.trajectory import AT_NELM
from relaxnet_jax.data.vasp.unfinished import NoRelaxation


def tell_unconverged(unconverged: Sequence[bool], say: Callable[[str], None]) -> str:
    """Notes how many ionic steps are electronically unconverged, if any.

    Args:
      unconverged: for each ionic step, whether it is unconverged.
      say: called with one line.

    Returns:
      The ending that marks this in the run's ``source``, "" if all steps converged.

    Raises:
      NoRelaxation: the last step is unconverged.
    """
    if not any(unconverged):
        return ""
    if unconverged[-1]:
        raise NoRelaxation(
            "the last ionic step ended at NELM (electronically unconverged): its energy and forces are "
            "not those of a minimum; continue from there with a larger NELM or another ALGO"
        )
    say(
        f"{sum(unconverged)} of {len(unconverged)} ionic steps ended at NELM (electronically "
        "unconverged)"
    )
    return AT_NELM
