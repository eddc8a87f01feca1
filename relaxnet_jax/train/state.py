"""The state that training carries from step to step, and from epoch to epoch."""

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
    """Parameters, their moving average, the optimiser's state, and counts of steps.

    ``skipped`` counts the steps without an update because the loss or gradient was not finite.
    """

    params: Params
    ema: Params
    optimizer: optax.OptState
    step: AnyArray
    skipped: AnyArray


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Gradient clipping and AdamW at unit learning rate; weight decay on kernels only."""

    # Kernels are recognised by name: in stacked layers, biases are matrices too.
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
    """The state at step 0; the moving average starts at the parameters.

    Zeros are made with NumPy: JAX would compile a program for every shape.
    """
    shapes = jax.eval_shape(make_optimizer(config).init, params)
    optimizer = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    average = jax.tree.map(np.array, params)
    return TrainState(params, average, optimizer, np.zeros((), np.int32), np.zeros((), np.int32))


@dataclasses.dataclass
class Plateau:
    """Reduce-on-plateau and early stopping on the validation loss. Lower is better.

    Attributes:
      scale: current factor on the learning rate.
      best: best validation loss so far.
      best_epoch: its epoch; -1 if there is none.
      waited: epochs since the last improvement or reduction.
      skipped: number of validation batches left out of the best loss.
    """

    scale: float = 1.0
    best: float = math.inf
    best_epoch: int = -1
    waited: int = 0
    skipped: int = 0

    def update(self, loss: float, epoch: int, config: TrainConfig, skipped: int = 0) -> bool:
        """Takes the loss of an epoch into account; returns whether it is the best so far.

        NaN never is. Since a loss is lower for every batch left out, the number of batches ``skipped``
        is compared first.
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
        """Whether early stopping is due; without a best epoch, patience counts from the first of the ODE."""
        since = self.best_epoch if self.best_epoch >= 0 else config.static_epochs
        return epoch - since >= config.early_stop_patience


@dataclasses.dataclass
class Cooling:
    """Factors on the learning rate towards the end of a run, as applied in this process.

    Attributes:
      first: the first factor; None before there is one.
      last: the latest factor.
    """

    first: float | None = None
    last: float = 1.0

    def take(self, factor: float) -> float:
        """Records a factor and returns it."""
        self.first = factor if self.first is None else self.first
        self.last = factor
        return factor

    @property
    def annealed(self) -> bool:
        """Whether the rate has fallen; not so in a run resumed after its end, where it is zero at once."""
        return self.first is not None and self.last < self.first


def cooling_factor(t: TrainConfig, seconds: float, limit: float, epochs: float) -> float:
    """Factor on the learning rate towards the end of a run with a time limit.

    The end is that of the run's time or of its epochs, whichever is nearer.

    Args:
      t: training configuration.
      seconds: time elapsed.
      limit: time limit in seconds.
      epochs: epochs done.
    """
    if not t.max_minutes or not t.cooldown:
        return 1.0
    left = min((limit - seconds) / (60 * t.max_minutes), 1.0 - epochs / t.epochs) / t.cooldown
    return min(1.0, max(left, 0.0))
