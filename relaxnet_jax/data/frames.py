"""Selection of the frames of a relaxation to train on, and their pseudotimes."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from relaxnet_jax.errors import InputError


class FrameSelection(NamedTuple):
    """Frames selected from one relaxation.

    Attributes:
      indices: (m,) int, ascending frame numbers, from 0 to the last frame of the relaxation.
      slots: (m,) int, distinct ascending positions of the frames in an array of ``n_frames``.
      times: (m,) float64, pseudotimes of the frames, from 0 to 1.
    """

    indices: np.ndarray
    slots: np.ndarray
    times: np.ndarray


def select_frames(
    n_available: int, n_frames: int, mode: Literal["equidistant", "all"] = "equidistant"
) -> FrameSelection:
    """Selects frames of a relaxation.

    "equidistant" takes the frames nearest to the pseudotimes k/(n_frames-1) and places them on this
    grid; if the relaxation is shorter, it takes every frame, placed in the nearest grid slot.
    "all" takes every frame at its own pseudotime index/(n_available-1), or equidistant ones if the
    relaxation has more than ``n_frames``.

    Args:
      n_available: number of frames of the relaxation, at least 2.
      n_frames: largest number of frames to select, at least 2.
      mode: see above.

    Raises:
      InputError: fewer than 2 frames are available or wanted, or the mode is unknown.
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
