"""What training carries from step to step, and from epoch to epoch."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import numpy as np
import optax

from relaxnet_jax.config import TrainConfig
from relaxnet_jax.typing import AnyArray, Params


class TrainState(NamedTuple):
    """Parameters, their moving average, the optimiser's state, counts of steps.

    ``skipped`` counts the steps left out because the loss or gradient was not finite.
    """

    params: Params
    ema: Params
    optimizer: optax.OptState
    step: AnyArray
    skipped: AnyArray


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Gradient clipping and AdamW at unit learning rate; decay on kernels only."""

    # By name: with the layers stacked a bias is a matrix too.
    def kernels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: path[-1].key.endswith("kernel"), params
        )

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(),
        optax.add_decayed_weights(config.weight_decay, kernels),
    )


def initial_train_state(params: Params, config: TrainConfig) -> TrainState:
    """Step 0; the average starts at the parameters. NumPy: JAX would compile every shape of a zero."""
    shapes = jax.eval_shape(make_optimizer(config).init, params)
    optimizer = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    average = jax.tree.map(np.array, params)
    return TrainState(params, average, optimizer, np.zeros((), np.int32), np.zeros((), np.int32))


@dataclasses.dataclass
class Plateau:
    """Reduce-on-plateau and early stopping on the validation loss. Lower is better.

    Attributes:
      scale: current factor on the learning rate.
      best: lowest validation loss so far. best_epoch: when. skipped: validation batches left out of it.
      waited: epochs since the last improvement or reduction.
    """

    scale: float = 1.0
    best: float = math.inf
    best_epoch: int = -1
    waited: int = 0
    skipped: int = 0

    def update(self, loss: float, epoch: int, config: TrainConfig, skipped: int = 0) -> bool:
        """Takes one epoch's loss in; True if it is the best so far. NaN never is.

        Losses over fewer batches are lower for it: first counts how many were ``skipped``.
        """
        first = self.best_epoch < 0
        if math.isfinite(loss) and (first or (skipped, loss) < (self.skipped, self.best)):
            self.best, self.best_epoch, self.waited, self.skipped = loss, epoch, 0, skipped
            return True
        self.waited += 1
        if self.waited > config.plateau_patience:
            self.scale *= config.plateau_factor
            self.waited = 0
        return False

    def exhausted(self, epoch: int, config: TrainConfig) -> bool:
        """Whether early stopping is due; where nothing was ever best, counted from epoch 0."""
        return epoch - max(self.best_epoch, 0) >= config.early_stop_patience


@dataclasses.dataclass
class Cooling:
    """Factors on the learning rate towards the end of a run, as this process has applied them.

    Attributes:
      first: None before there is one. last: the newest.
    """

    first: float | None = None
    last: float = 1.0

    def take(self, factor: float) -> float:
        """Notes a factor, and returns it."""
        self.first = factor if self.first is None else self.first
        self.last = factor
        return factor

    @property
    def annealed(self) -> bool:
        """Whether the rate has fallen. A run taken up after its end has a rate of zero at once."""
        return self.first is not None and self.last < self.first


def cooling_factor(t: TrainConfig, seconds: float, limit: float, epochs: float) -> float:
    """Factor on the learning rate towards the end of a run with a time limit (s): the end of its time
    or of its epochs, whichever is nearer.

    Args:
      seconds, epochs: done. limit: seconds.
    """
    if not t.max_minutes or not t.cooldown:
        return 1.0
    left = min((limit - seconds) / (60 * t.max_minutes), 1.0 - epochs / t.epochs) / t.cooldown
    return min(1.0, max(left, 0.0))
