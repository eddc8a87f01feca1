"""Which frames of a relaxation are trained on, and at which pseudotimes."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from relaxnet_jax.errors import InputError


class FrameSelection(NamedTuple):
    """Frames of one relaxation.

    Attributes:
      indices: (m,) int, ascending frames of the relaxation, the first 0 and the last its last.
      slots: (m,) int, distinct ascending places they take in an array of ``n_frames``.
      times: (m,) float64, their pseudotimes, from 0 to 1.
    """

    indices: np.ndarray
    slots: np.ndarray
    times: np.ndarray


def select_frames(
    n_available: int, n_frames: int, mode: Literal["equidistant", "all"] = "equidistant"
) -> FrameSelection:
    """Chooses frames.

    "equidistant" puts the frames nearest to k/(n_frames-1) of the way on that grid of
    pseudotimes; of a shorter relaxation it takes every frame, in the nearest grid slots.
    "all" takes every frame at its own pseudotime index/(n_available-1); of a relaxation
    longer than ``n_frames``, equidistant ones.

    Args:
      n_available: frames of the relaxation, at least 2.
      n_frames: most frames wanted, at least 2.
      mode: see above.

    Raises:
      InputError: fewer than 2 frames available or wanted, or another mode.
    """
    if n_frames < 2:
        raise InputError(f"frames: {n_frames} wanted: a trajectory needs 2 or more")
    if n_available < 2:
        raise InputError(f"frames: {n_available} available: a relaxation needs 2 or more")
    m = min(n_available, n_frames)
    indices = np.round(np.linspace(0, n_available - 1, m)).astype(np.int64)
    if mode == "all":
        return FrameSelection(indices, np.arange(m), indices / (n_available - 1))
    if mode != "equidistant":
        raise InputError(f"frame_selection: unknown {mode!r}: use 'equidistant' or 'all'")
    # With m <= n_frames the wanted slots are at least one apart, so rounding keeps them
    # distinct; half-way cases are rounded up, since to-even rounding could merge two.
    slots = np.floor(np.arange(m) * (n_frames - 1) / (m - 1) + 0.5).astype(np.int64)
    return FrameSelection(indices, slots, slots / (n_frames - 1))
