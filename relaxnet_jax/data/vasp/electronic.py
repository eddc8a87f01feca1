"""Ionic steps whose electronic minimisation did not converge: one policy for all files of VASP.

Such a step ends at NELM with energies and forces that are not those of the ground state. One before
others is kept, for what follows it was computed anew: that is noted, counted by the import, and
said by the relaxation's ``source`` (`trajectory.AT_NELM`). After a last one it is not known
whether the structure is a minimum, and what its energy is: the run is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from relaxnet_jax.data.trajectory import AT_NELM
from relaxnet_jax.data.vasp.unfinished import NoRelaxation


def tell_unconverged(unconverged: Sequence[bool], say: Callable[[str], None]) -> str:
    """Notes how many ionic steps are electronically unconverged, if any.

    Args:
      unconverged: of each ionic step. say: called with one line.

    Returns:
      What the run's ``source`` says of it, "" where all steps converged.

    Raises:
      NoRelaxation: the last step is unconverged.
    """
    if not any(unconverged):
        return ""
    if unconverged[-1]:
        raise NoRelaxation(
            "the last ionic step ended at NELM (electronically unconverged): its energy and forces are "
            "not those of a minimum; relax on from there with a larger NELM or another ALGO"
        )
    say(
        f"{sum(unconverged)} of {len(unconverged)} ionic steps ended at NELM (electronically "
        "unconverged)"
    )
    return AT_NELM
