"""The relaxations of a training run's splits, wherever its data are now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from relaxnet_jax.config import Config, from_json
from relaxnet_jax.data.dataset import read_trajectories
from relaxnet_jax.data.relaxations import Relaxations
from relaxnet_jax.data.split_file import split_of_run
from relaxnet_jax.errors import InputError
from relaxnet_jax.train.beginning import read_beginning


def relaxations_of_run(
    workdir: Path,
    split: str,
    config: Config,
    report: Callable[[str], None],
    moved: str | None = None,
    otherwise: str = "",
) -> tuple[Relaxations, int]:
    """The relaxations of one split of a run, and how many the split had when the run began.

    The data are read from where the run's config.json says. A resumed run keeps that file up to date,
    whereas its model's own config changes only when the model improves. Changes of the data since the
    run began are reported.

    Args:
      workdir: folder of the run.
      split: "train", "validation" or "test".
      config: configuration of the run's model.
      report: called with one line for each remark.
      moved: where the data are instead; their content must be what the run began with.
      otherwise: what else the user could do, appended to error messages.

    Raises:
      InputError: there are no data, they are not the run's, or they have none of the split; see
        `split_of_run`, `read_beginning` and `read_trajectories`.
    """
    ids = split_of_run(workdir, split, otherwise)
    path = _recorded(workdir, config) if moved is None else moved
    if path != "emt" and not Path(path).exists():
        raise InputError(
            f"{path}: no such data (data.path of {workdir}); give their current location with --set "
            f"data.path=FILE{otherwise}"
        )
    found, _ = read_trajectories(path, config, report)
    began = read_beginning(workdir)
    if began is not None and not began.had(path, found.store.checksum):
        if moved is not None:
            raise InputError(
                f"{path}: its content is not what {workdir} started with (by checksum); give the original "
                f"data with --set data.path=FILE{otherwise}"
            )
        report(f"{path}: its content has changed since the run began (by checksum)")
    kept = found.named(ids)
    if not len(kept):
        raise InputError(
            f"{path}: has none of the {len(ids)} {split} relaxations of {workdir}; give the original data "
            f"with --set data.path=FILE{otherwise}"
        )
    if len(kept) < len(ids):
        report(
            f"{path}: {len(ids) - len(kept)} of the {len(ids)} {split} relaxations of the run are no longer "
            "in it; it has changed since"
        )
    return kept, len(ids)


def _recorded(workdir: Path, config: Config) -> str:
    """``data.path`` in a run's config.json, or in its model's config if there is no such file."""
    file = workdir / "config.json"
    return from_json(file.read_text(), str(file)).data.path if file.is_file() else config.data.path
