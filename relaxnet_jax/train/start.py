"""The parameters a run starts from: random ones, or those of a model trained before."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import numpy as np

from relaxnet_jax.config import Config, from_json
from relaxnet_jax.data.split_file import run_splits
from relaxnet_jax.errors import InputError
from relaxnet_jax.model import RelaxNet, create_model, load_model, model_folder
from relaxnet_jax.typing import AnyArray, Params

# Fields of the graph that parameters were learned for; they do not depend on the skin.
_GRAPH = ("cutoff", "triplet_cutoff")
# Key in a model's statistics: by split, how many of its relaxations the start was trained on.
SEEN = "start_trained_on"


def read_start(config: Config) -> RelaxNet | None:
    """The model named by ``train.start_from``, or None if it is empty.

    Raises:
      InputError: it does not name a model (see `load_model`), or one with other layers or cutoffs.
    """
    if not config.train.start_from:
        return None
    with _named():
        folder = model_folder(config.train.start_from)
        model = load_model(folder)
    theirs, ours = model.config, config
    pairs = [(f"graph.{k}", getattr(theirs.graph, k), getattr(ours.graph, k)) for k in _GRAPH]
    pairs += [
        (f"model.{f.name}", getattr(theirs.model, f.name), getattr(ours.model, f.name))
        for f in dataclasses.fields(ours.model)
        if f.name != "matmul"
    ]
    for name, their, our in pairs:
        if their != our:
            raise InputError(
                f"train.start_from: {folder}: {name} is {their!r} there, {our!r} here: set it alike, "
                "or start from another model"
            )
    return model


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Names the configuration field in errors about the start's files."""
    try:
        yield
    except InputError as error:
        raise InputError(f"train.start_from: {error}") from error


def start_parameters(
    config: Config, start: RelaxNet | None, report: Callable[[str], None]
) -> Params:
    """Initial parameters: those of the start where it has them, else drawn with ``train.seed``.

    A scheme may have learned functions that the start lacks, such as the strain rate of a relaxing
    cell or the latent rate of the explicit scheme: these start at random and are named to ``report``.
    Where the start's function takes fewer inputs (the latent rate of fixed cells lacks those of the
    strain rate), the common inputs, which come first, get the start's weights; inputs that only the
    start's has are left out, and named.
    """
    fresh = create_model(config, config.train.seed).params
    if start is None:
        return fresh
    known = flax.traverse_util.flatten_dict(start.params)
    flat = flax.traverse_util.flatten_dict(fresh)
    missing = sorted({path[0] for path in flat if path not in known})
    more = {path: _rows(flat[path]) - _rows(known[path]) for path in flat if path in known}
    missing += [
        f"some inputs of {name}" for name in sorted({p[0] for p, n in more.items() if n > 0})
    ]
    if missing:
        report(f"{config.train.start_from}: has no {', '.join(missing)}: initialised at random")
    if narrower := sorted({path[0] for path, n in more.items() if n < 0}):
        report(
            f"{config.train.start_from}: left out the inputs that {', '.join(narrower)} has there but "
            "not here"
        )
    taken = {p: _with_rows(v, known[p]) if p in known else v for p, v in flat.items()}
    return flax.traverse_util.unflatten_dict(taken)


def _rows(values: AnyArray) -> int:
    return len(values) if np.ndim(values) else 0


def _with_rows(fresh: AnyArray, known: AnyArray) -> AnyArray:
    """The known array, or the fresh one with the known rows where the numbers of rows differ.

    Rows are the inputs of a kernel (inputs, outputs).
    """
    if _rows(fresh) == _rows(known):
        return known
    rows = min(_rows(fresh), _rows(known))
    return np.concatenate([np.asarray(known)[:rows], np.asarray(fresh)[rows:]])


def start_facts(config: Config) -> dict[str, str]:
    """What the exported model stores about its start: the checksum of the start's parameters."""
    if not config.train.start_from:
        return {}
    return {"started_from": _described(model_folder(config.train.start_from))["sha256"]}


def seen_by_start(
    config: Config, splits: Mapping[str, Sequence[str]], report: Callable[[str], None]
) -> dict[str, dict[str, int]]:
    """Counts this run's validation and test relaxations that its start was trained on.

    Args:
      splits: ids by split.
      report: called with a warning if there are any.

    Returns:
      What the exported model stores: the counts by split, under `SEEN`; empty if there are none.
    """
    if not config.train.start_from:
        return {}
    trained: set[str] = set()
    file = None
    with _named():
        for place, ids in trained_on(config.train.start_from):
            if not ids.isdisjoint([*splits["validation"], *splits["test"]]):
                file = file or place
                trained |= ids
    if file is None:
        return {}
    counts = {name: len(trained.intersection(splits[name])) for name in ("validation", "test")}
    seen = {name: n for name, n in counts.items() if n}
    told = " and ".join(f"{n} of the {len(splits[name])} {name}" for name, n in seen.items())
    report(
        f"train.start_from: {config.train.start_from} was trained on {told} relaxations of this "
        "run (by their ids): its errors on these are not those of unseen structures; keep them "
        f"apart as they were with --set data.split_file={file}"
    )
    return {SEEN: seen}


def trained_on(name: str) -> Iterator[tuple[Path, set[str]]]:
    """Yields the split file and training ids of a run or model folder, of its start, and so on.

    It ends where a start's folder is missing or no longer holds the model that was started from.

    Raises:
      InputError: a file is damaged.
    """
    folder = model_folder(name)
    while True:
        if found := run_splits(folder):
            yield found[0], set(found[1]["train"])
        config = from_json((folder / "config.json").read_text(), str(folder / "config.json"))
        before = _described(folder)["statistics"].get("started_from")
        try:
            folder = model_folder(config.train.start_from)
            if before is None or _described(folder)["sha256"] != before:
                return
        except (InputError, OSError, ValueError, KeyError):  # moved, or another model by now
            return


def trained_ids(name: str) -> set[str]:
    """All ids that `trained_on` yields."""
    return set().union(*(ids for _, ids in trained_on(name)))


def _described(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "model.json").read_text())


def energy_scale(start: RelaxNet | None, fitted: float) -> float:
    """The network's energy unit, eV/atom: the start's, or else the training set's own spread."""
    return fitted if start is None else float(np.asarray(start.energy_scale))
