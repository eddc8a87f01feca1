"""A predicted path as one HTML page with a 3D view that needs no network and no other file."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
from ase.data import chemical_symbols, covalent_radii
from ase.data.colors import jmol_colors

from relaxnet_jax.data.files import atomic_path
from relaxnet_jax.data.trajectory import RelaxationTrajectory
from relaxnet_jax.evaluate.path_figure import path_curves, path_displacements

if TYPE_CHECKING:
    from relaxnet_jax.trust import Flag

TEMPLATE = "viewer.html"
TITLE, DATA = "{{title}}", "{{data}}"


def viewer_data(path: RelaxationTrajectory, flags: Sequence[Flag] = ()) -> dict[str, Any]:
    """The data shown on the page: plain lists, lengths in Å to five decimals.

    Keys: title, source, symbols (N), fixed (N), pbc (3), positions (n, N, 3), cells (n, 3, 3),
    moved (n, N, 3; displacements within the cell), times (n), energies (n; eV), fmax (n; eV/Å),
    largest (n; Å, largest displacement of a free atom),
    elements {symbol: {colour: jmol's, as "#rrggbb"; radius: covalent, Å}}, flags [[name, detail]].
    """
    curves = path_curves(path)
    numbers = path.atomic_numbers
    colours, radii = np.asarray(jmol_colors), np.asarray(covalent_radii)
    return {
        "title": f"{path.id}: {path.formula}" if path.id != path.formula else path.id,
        "source": path.source,
        "symbols": [chemical_symbols[z] for z in numbers],
        "fixed": path.fixed_mask.tolist(),
        "pbc": path.pbc.tolist(),
        "positions": np.round(path.positions, 5).tolist(),
        "moved": np.round(path_displacements(path), 5).tolist(),
        "cells": np.round(path.cells, 5).tolist(),
        "times": curves["times"].tolist(),
        "energies": path.energies.tolist(),
        "fmax": path.fmax.tolist(),
        "largest": curves["largest"].tolist(),
        "elements": {
            chemical_symbols[z]: {
                "colour": "#" + "".join(f"{round(255 * c):02x}" for c in colours[z]),
                "radius": round(float(radii[z]), 3),
            }
            for z in sorted(set(numbers.tolist()))
        },
        "flags": [[flag.name, flag.detail] for flag in flags],
    }


def write_viewer(
    path: RelaxationTrajectory, file: str | os.PathLike[str], flags: Sequence[Flag] = ()
) -> None:
    """Writes the page. Raises InputError if the file cannot be written."""
    data = viewer_data(path, flags)
    text = files("relaxnet_jax.evaluate").joinpath(TEMPLATE).read_text(encoding="utf-8")
    # Only "<" could end the script element. The template is split before anything is filled in, so the
    # title may contain anything.
    numbers = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    head, title, rest = text.partition(TITLE)
    body, mark, tail = rest.partition(DATA)
    assert title and mark
    with atomic_path(file) as temporary:
        page = head + html.escape(data["title"]) + body + numbers + tail
        temporary.write_text(page, encoding="utf-8")
