"""The interface of an experiment."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from relaxnet_jax.reproduce.runs import Run
from relaxnet_jax.reproduce.section import Section
from relaxnet_jax.reproduce.setting import Setting

if TYPE_CHECKING:
    from relaxnet_jax.reproduce.lab import Lab


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A table or figure.

    Attributes:
      name: name on the command line.
      runs: returns the training runs it needs.
      section: evaluates these runs once they are finished; also writes the figures.
    """

    name: str
    runs: Callable[[Setting], Sequence[Run]]
    section: Callable[[Lab], Section]
