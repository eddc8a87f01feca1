"""Checkpoints with orbax: the latest and the best, written atomically in the background."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.options import MultiprocessingOptions

from relaxnet_jax.errors import InputError
from relaxnet_jax.train.state import TrainState


class Checkpoints:
    """The two newest states of a run under ``folder/latest``, the best under ``folder/best``.

    Only process 0 makes one, also where there are several: every process has the same state, so
    orbax is told that there is no other and waits for none.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = Path(folder).resolve()
        alone = MultiprocessingOptions(primary_host=0, active_processes={0})
        for name in ("latest", "best"):  # orbax makes no folders for some of the processes
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        self._managers = {
            name: ocp.CheckpointManager(
                self._folder / name,
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep, create=False, multiprocessing_options=alone
                ),
                item_names=("state", "progress"),
            )
            for name, keep in (("latest", 2), ("best", 1))
        }

    def save(self, state: TrainState, progress: dict[str, Any], best: bool) -> None:
        """Saves the state under the number of its step; returns before it is on disk."""
        # The step donates its buffers, so what is written in the background must be a copy.
        state = jax.device_get(state)
        step = int(state.step)
        for name in ("latest", "best") if best else ("latest",):
            self._managers[name].save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)
                ),
            )

    def restore(self, like: TrainState, which: str = "latest") -> tuple[TrainState, dict[str, Any]]:
        """State (NumPy) and progress of the newest checkpoint.

        Raises:
          InputError: there is none, or it cannot be read.
        """
        manager = self._managers[which]
        step = manager.latest_step()
        if step is None:
            raise InputError(
                f"{self._folder / which}: no checkpoint to resume from; start without --resume "
                "in another --workdir"
            )
        abstract = jax.tree.map(lambda x: np.empty(np.shape(x), x.dtype), like)
        try:
            restored = manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore()
                ),
            )
        except Exception as error:  # orbax and tensorstore raise many kinds for damaged files
            raise InputError(
                f"{self._folder / which / str(step)}: damaged checkpoint ({type(error).__name__}); delete this "
                "folder to resume from the one before"
            ) from error
        return restored["state"], restored["progress"]

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        for manager in self._managers.values():
            manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and frees the managers."""
        for manager in self._managers.values():
            manager.wait_until_finished()
            manager.close()
