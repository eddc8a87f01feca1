"""Split files: which relaxations of a set are trained, validated and tested on, for each fold."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from relaxnet_jax.data.files import write_text
from relaxnet_jax.data.prototypes import prototype
from relaxnet_jax.data.splits import Splits, split_groups
from relaxnet_jax.data.store import TrajectoryStore
from relaxnet_jax.data.trajectory import reduced_formula
from relaxnet_jax.errors import InputError

By = Literal["group", "formula", "elements", "prototype", "id"]
FORMAT = "relaxnet_jax splits"
RECORD = "splits.json"  # record of a training run, in its folder
FRACTIONS = (0.9, 0.05, 0.05)
HELD_OUT = FRACTIONS[2]
REMEDY = "make one with 'relaxnet-jax data split NAME.h5', or name a run's splits.json"


def make_folds(
    store: TrajectoryStore,
    folds: int,
    by: By = "group",
    fractions: tuple[float, float, float] = FRACTIONS,
    seed: int = 0,
) -> list[Splits]:
    """Splits a set such that relaxations that belong together are never separated.

    Args:
      folds: 1 for one split with these ``fractions``; k > 1 for k splits with disjoint test parts of
        1/k each, which together cover the whole set (validation keeps its fraction).
      by: which relaxations belong together: those of one group as stored, of one reduced formula, of
        one set of elements, or of one prototype (see `prototypes`); or "id": none, each is on its
        own, which is an honest split only if the relaxations are independent of each other.
      fractions: fractions of training, validation and test, all above 0, as training needs each; if
        ``folds`` is not 1, only that of validation is used.

    Raises:
      InputError: see `split_groups`; ``folds`` is below 1; a fraction is not above 0.
    """
    if folds < 1:
        raise InputError(f"--folds {folds}: give 1 or more")
    if min(fractions if folds == 1 else fractions[1:2]) <= 0:
        raise InputError(
            f"--fractions {' '.join(f'{f:g}' for f in fractions)}: training needs relaxations in all "
            "three splits: give each a fraction above 0"
        )
    if folds > 1:
        fractions = (1.0 - fractions[1] - 1.0 / folds, fractions[1], 1.0 / folds)
        if fractions[0] <= 0:
            raise InputError(
                f"--folds {folds}: leaves nothing to train on with {fractions[1]:g} for "
                "validation: give more folds or a smaller validation fraction"
            )
    labels = _labels(store, by)
    kinds = len(set(labels))
    # With three kinds `split_groups` always makes three folds.
    if folds > 1 and (folds > kinds or (kinds == 3 and folds != 3)):
        raise InputError(f"--folds {folds}: the set has {kinds} kinds of {by}: give {kinds} folds")
    name = f"{store.paths[0]}{', ...' * (len(store.paths) > 1)}, --by {by}"
    return [split_groups(labels, fractions, fold, seed, name) for fold in range(folds)]


def folds_like(
    store: TrajectoryStore, other: TrajectoryStore, path: str | Path, by: By = "group"
) -> list[Splits]:
    """Splits a set such that nothing another set validates or tests on is trained on here.

    Relaxations of the same kind as one in the other set's test split are tested on. Of the rest, those
    of the same kind as one in its validation split are validated on, and all others are trained on.
    This is for a model that is trained first on one set and then on the other (``train.start_from``).
    If one of the two held-out splits would be empty, it is drawn from the rest.

    Args:
      other: the other set.
      path: the file of its splits (or a run's splits.json); each of its folds gives one split.
      by: what relaxations of the same kind have in common, see `make_folds`.

    Raises:
      InputError: see `read_splits`; none or all of the relaxations here are of the same kind as those
        held out there.
    """
    theirs, ours, folds = _labels(other, by), np.array(_labels(store, by)), []
    for fold in range(len(_read(Path(path))[0])):
        try:
            splits, _ = read_splits(path, other.ids, fold)
        except InputError as error:
            raise InputError(f"--like: not the splits of that set? {error}") from error
        kinds = {name: [theirs[i] for i in rows] for name, rows in splits._asdict().items()}
        test = np.isin(ours, kinds["test"])
        validation = np.isin(ours, kinds["validation"]) & ~test
        if not (test.any() or validation.any()):
            raise InputError(
                f"--like {path}: fold {fold}: the set shares no {by} with the validation and test splits there: "
                "there is nothing to keep apart; leave out --like, or give a --by that the two share"
            )
        if (test | validation).all():
            raise InputError(
                f"--like {path}: fold {fold}: every {by} of the set is in the validation or test split there; "
                "add others to train on"
            )
        for missing in (held for held in (validation, test) if not held.any()):
            rest = np.flatnonzero(~test & ~validation)
            share = split_groups(ours[rest].tolist(), (1 - HELD_OUT, 0.0, HELD_OUT)).test
            missing[rest[share]] = True
        folds.append(Splits(*map(np.flatnonzero, (~test & ~validation, validation, test))))
    return folds


def _labels(store: TrajectoryStore, by: By) -> list[str]:
    """Label of each relaxation, which it shares with those that are never separated from it."""
    if by not in get_args(By):
        raise InputError(f"--by {by}: give one of {', '.join(get_args(By))}")
    if by == "id":
        return store.ids
    return store.groups if by == "group" else [_label(store, i, by) for i in range(len(store))]


def _label(store: TrajectoryStore, i: int, by: By) -> str:
    if by == "prototype":
        return prototype(store[i])
    numbers, _ = store.energies(i)
    if by == "formula":
        return reduced_formula(numbers)
    return "-".join(str(z) for z in np.unique(numbers))


def write_splits(path: Path, ids: list[str], folds: list[Splits], facts: dict[str, Any]) -> None:
    """Writes the ids of every fold; the file appears only when it is complete.

    An existing file is replaced (the command refuses that without --overwrite, see `same_splits`).
    """
    write_text(path, json.dumps(_content(ids, folds, facts), indent=1))


def same_splits(path: Path, ids: list[str], folds: list[Splits], facts: dict[str, Any]) -> bool:
    """Whether a file holds exactly what `write_splits` would write."""
    try:
        return json.loads(path.read_text()) == _content(ids, folds, facts)
    except (OSError, ValueError):
        return False


def _content(ids: list[str], folds: list[Splits], facts: dict[str, Any]) -> dict[str, Any]:
    named = [{k: [ids[i] for i in v] for k, v in fold._asdict().items()} for fold in folds]
    return {"format": FORMAT, **facts, "folds": named}


def read_splits(
    path: str | Path, ids: Sequence[str], fold: int = 0, known: Collection[str] = ()
) -> tuple[Splits, int]:
    """Reads the rows of each split among ``ids``, and how many of ``ids`` no split names.

    The file may also be the record of a training run, splits.json in its folder, which has one fold.

    Names in the file that are not among ``ids`` are ignored if they are ``known``, i.e. relaxations
    of the set that are left out for a reason already reported, or if the file is the record of a
    run, which may have used more data.

    Raises:
      InputError: there is no such file or fold, the file is not a split file, a name is unknown or in
        two splits, or nothing is left of a split.
    """
    path = Path(path)
    folds, of_run = _read(path)
    if not 0 <= fold < len(folds):
        raise InputError(f"{path}: has folds 0 to {len(folds) - 1}, data.fold is {fold}")
    rows = {name: row for row, name in enumerate(ids)}
    seen: dict[str, str] = {}
    for split, names in folds[fold].items():
        for name in names:
            if name not in rows and name not in known and not of_run:
                raise InputError(f"{path}: fold {fold}: {name!r} is not in the set: {REMEDY}")
            if name in seen:
                where = f"{seen[name]} and {split}" if seen[name] != split else f"{split} twice"
                raise InputError(f"{path}: fold {fold}: {name!r} is in {where}: {REMEDY}")
            seen[name] = split
        if not any(name in rows for name in names):
            raise InputError(f"{path}: fold {fold}: nothing is left of the {split} split: {REMEDY}")
    arrays = ([rows[n] for n in folds[fold][k] if n in rows] for k in Splits._fields)
    splits = Splits(*(np.sort(np.array(a, np.int64)) for a in arrays))
    return splits, len(rows) - sum(map(len, splits))


def _read(path: Path) -> tuple[list[dict[str, list[str]]], bool]:
    """Ids of each split of every fold, and whether the file is a run's record. Raises InputError."""
    try:
        content = json.loads(path.read_text())
        if content.get("format", FORMAT) != FORMAT:
            raise ValueError("not a file of splits")
        of_run = "format" not in content
        recorded = [content] if of_run else content["folds"]
        return [{k: list(f[k]) for k in Splits._fields} for f in recorded], of_run
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a file of splits"
        raise InputError(f"{path}: {reason}: {REMEDY}") from None


def run_splits(folder: Path) -> tuple[Path, dict[str, list[str]]] | None:
    """The splits.json of a training run and the ids of each split in it; None if there is no such file.

    Args:
      folder: folder of the run or of its model.

    Raises:
      InputError: the file is damaged.
    """
    places = (folder / RECORD, folder.parent / RECORD)
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        return None
    return file, _record(file, "restore it, or give the model folder alone")


def split_of_run(workdir: Path, split: str, otherwise: str = "") -> list[str]:
    """Ids of one split of a training run.

    Args:
      split: "train", "validation" or "test".
      otherwise: alternative remedy, added to the error message.

    Raises:
      InputError: ``workdir`` holds no splits.json, or a damaged one.
    """
    remedy = "give the folder of a whole training run" + otherwise
    return _record(workdir / RECORD, remedy)[split]


def _record(file: Path, remedy: str) -> dict[str, list[str]]:
    try:
        found = json.loads(file.read_text())
        return {name: list(found[name]) for name in Splits._fields}
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: damaged ({type(error).__name__}); {remedy}") from None
