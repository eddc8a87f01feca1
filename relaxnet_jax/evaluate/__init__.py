"""Tables and figures of the metrics in ``relaxnet_jax.metrics``."""

from relaxnet_jax.evaluate.figures import parity_figure, per_frame_figure, trajectory_figure
from relaxnet_jax.evaluate.tables import metrics_table, write_metrics

__all__ = [
    "metrics_table",
    "parity_figure",
    "per_frame_figure",
    "trajectory_figure",
    "write_metrics",
]
