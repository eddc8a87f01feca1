"""Locations and checksums of saved models, available without importing JAX."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from relaxnet_jax.config import PRETRAINED
from relaxnet_jax.errors import InputError

_SHIPPED = Path(__file__).with_name(PRETRAINED)


def model_folder(folder: str | Path = PRETRAINED) -> Path:
    """The model folder of a training run, the folder itself, or that of the first pretrained model.

    Raises:
      InputError: no such folder.
    """
    if folder == PRETRAINED:
        return member_folders(PRETRAINED)[0]
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; give a training run or its 'model' folder")
    return path / "model" if (path / "model").is_dir() else path


def member_folders(name: str | Path = PRETRAINED) -> list[Path]:
    """The model folders a name stands for: all of the pretrained committee, or that of `model_folder`."""
    if name == PRETRAINED:
        return sorted(path.parent for path in _SHIPPED.glob("*/model.json"))
    return [model_folder(name)]


def checksum(names: Sequence[str]) -> str:
    """A checksum of the parameters of all models the names stand for, independent of their order.

    It is empty if a model cannot be read; `load_model` then reports why.
    """
    try:
        files = [folder / "model.json" for name in names for folder in member_folders(name)]
        known = sorted(str(json.loads(file.read_text())["sha256"]) for file in files)
    except (InputError, OSError, ValueError, KeyError, TypeError):
        return ""
    return hashlib.sha256(" ".join(known).encode()).hexdigest()[:16]
