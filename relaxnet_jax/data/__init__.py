"""Relaxation data: reading, storing, splitting and generating it. Pure NumPy, no JAX."""

from relaxnet_jax.data.ase_io import SkippedRelaxation
from relaxnet_jax.data.frames import FrameSelection, select_frames
from relaxnet_jax.data.generate import default_dataset, emt_relaxations
from relaxnet_jax.data.importing import ImportReport, import_files, read_groups
from relaxnet_jax.data.reading import read_relaxations
from relaxnet_jax.data.splits import Splits, split_groups
from relaxnet_jax.data.store import TrajectoryStore
from relaxnet_jax.data.store_write import write_store
from relaxnet_jax.data.trajectory import RelaxationTrajectory, unwrap_positions

__all__ = [
    "FrameSelection",
    "ImportReport",
    "RelaxationTrajectory",
    "SkippedRelaxation",
    "Splits",
    "TrajectoryStore",
    "default_dataset",
    "emt_relaxations",
    "import_files",
    "read_groups",
    "read_relaxations",
    "select_frames",
    "split_groups",
    "unwrap_positions",
    "write_store",
]
