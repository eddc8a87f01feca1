"""A head start for any ASE optimiser: atoms moved to where the model expects them to relax."""

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
      flags: what speaks against it, see `trust.trust_flags`.
      moved: whether the atoms were moved; False where a flag says the geometry is unusable.
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
    """Moves the atoms, and the cell where the model relaxes cells, to the relaxed structure it
    predicts, in place:

        head_start(atoms, model)
        LBFGS(atoms).run(fmax=0.05)

    The model itself holds what `FixAtoms` (or `FixCartesian` in all directions) holds, relative to
    the lattice: where the cell changes, a fixed atom goes along with it. Other
    constraints are applied by ASE to the final positions, as whenever positions are set, and
    flagged. Where the prediction is unusable the atoms stay where they are, with a warning, so
    that an optimiser starts from there.

    Args:
      atoms: moved; its calculator is not used.
      model: from `load_model` or `create_model`, of either scheme; or several, whose mean
        predicts: `load_committee`.
      n_frames: of the path that is returned and judged, at least 2.
      relax_cell: whether the cell relaxes along its periodic directions, if the model was trained
        for that; give False before an optimiser that keeps the cell, and for slabs with vacuum in
        a cell that is periodic along it.

    Raises:
      InputError: atoms that cannot be used, an element the model never saw, or n_frames < 2.
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
