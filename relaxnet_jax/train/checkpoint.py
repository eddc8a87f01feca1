"""Checkpoints with orbax, written atomically in the background."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.options import MultiprocessingOptions

from relaxnet_jax.errors import InputError
from relaxnet_jax.train.state import TrainState

LATEST = Path("checkpoints", "latest")  # in a workdir
MODEL = "model"  # in a workdir
UNFINISHED = "*.orbax-checkpoint-tmp*"


def has_checkpoint(workdir: Path) -> bool:
    """Whether a run can be resumed. Folders that orbax has not finished have longer names."""
    return any(folder.name.isdigit() for folder in (Path(workdir) / LATEST).glob("*"))


class Checkpoints:
    """The two newest states of a run, under ``workdir/checkpoints/latest``.

    Only process 0 creates this object: all processes have the same state, so orbax is told that
    there is no other process and waits for none.
    """

    def __init__(self, workdir: Path) -> None:
        """Opens the folder and removes what killed runs have not finished writing."""
        self._folder = (Path(workdir) / LATEST).resolve()
        for unfinished in self._folder.glob(UNFINISHED):
            shutil.rmtree(unfinished, ignore_errors=True)
        alone = MultiprocessingOptions(primary_host=0, active_processes={0})
        # Orbax does not create it for only some of the processes.
        self._folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=2, create=False, multiprocessing_options=alone
            ),
            item_names=("state", "progress"),
        )

    def save(self, state: TrainState, progress: dict[str, Any]) -> None:
        """Saves the state under the number of its step; returns before it is on disk."""
        # The step donates its buffers, so what is written in the background must be a copy.
        state = jax.device_get(state)
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)
            ),
        )

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """State (NumPy) and progress of the newest checkpoint.

        Raises:
          InputError: there is none, or it cannot be read.
        """
        step = self._manager.latest_step()
        if step is None:
            raise InputError(
                f"{self._folder}: no checkpoint to resume from; start without --resume "
                "in another --workdir"
            )
        abstract = jax.tree.map(lambda x: np.empty(np.shape(x), x.dtype), like)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), progress=ocp.args.JsonRestore()
                ),
            )
        except Exception as error:  # orbax and tensorstore raise many kinds for damaged files
            raise InputError(
                f"{self._folder / str(step)}: damaged checkpoint ({type(error).__name__}); delete this "
                "folder to resume from the one before"
            ) from error
        return restored["state"], restored["progress"]

    def wait(self) -> None:
        """Waits until everything saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything saved is on disk, then closes the manager."""
        self.wait()
        self._manager.close()
