"""A head start for any ASE optimiser: moves atoms to where the model expects them to relax."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from relaxnet_jax.committee import check_members, relax_by
from relaxnet_jax.constraints import move_to_end
from relaxnet_jax.data.trajectory import RelaxationTrajectory
from relaxnet_jax.model import RelaxNet
from relaxnet_jax.trust import Flag

if TYPE_CHECKING:
    from ase import Atoms


class HeadStart(NamedTuple):
    """What `head_start` did.

    Attributes:
      path: the predicted relaxation.
      flags: reasons not to trust it, see `trust.trust_flags`.
      moved: whether the atoms were moved; False if a flag says the geometry is unusable.
    """

    path: RelaxationTrajectory
    flags: tuple[Flag, ...]
    moved: bool


def head_start(
    atoms: Atoms,
    model: RelaxNet | Sequence[RelaxNet],
    n_frames: int = 5,
    relax_cell: bool = True,
) -> HeadStart:
    """Moves atoms, and the cell if the model relaxes it, to the predicted relaxed structure, in place.

    For example, before a relaxation with ASE's LBFGS:

        head_start(atoms, model)
        LBFGS(atoms).run(fmax=0.05)

    Atoms fixed by `FixAtoms` (or by `FixCartesian` in all directions) are fixed in the model too,
    relative to the lattice: if the cell changes, a fixed atom moves along with it. ASE applies other
    constraints to the final positions, as it does whenever positions are set, and a flag reports them.
    If the prediction is unusable, the atoms stay where they are, with a warning, so that an optimiser
    starts from there.

    Args:
      atoms: the atoms to move; their calculator is not used.
      model: a model from `load_model` or `create_model`, of any kind; or several models (e.g. from
        `load_committee`), which predict their mean.
      n_frames: number of frames of the path that is returned and judged, at least 2.
      relax_cell: whether the cell relaxes along its periodic directions, if the model was trained
        for that. Give False before an optimiser that keeps the cell, and for slabs in a cell that is
        periodic along the vacuum.

    Raises:
      InputError: atoms that cannot be used, an element the model was not trained on, n_frames < 2, or
        models that do not form a committee.
    """
    models = [model] if isinstance(model, RelaxNet) else list(model)
    if len(models) != 1:
        check_members(models)
    (((path, flags, *_), reason),) = relax_by(models, atoms, n_frames, relax_cell)
    if reason:
        warnings.warn(f"{path.id}: no head start, {reason}", stacklevel=2)
        return HeadStart(path, flags, False)
    move_to_end(atoms, path)
    return HeadStart(path, flags, True)
