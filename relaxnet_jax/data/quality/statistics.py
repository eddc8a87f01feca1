"""Statistics of a store, from one pass: counts, distributions, groups and duplicates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from relaxnet_jax.data.quality import duplicates
from relaxnet_jax.data.quality.columns import Columns
from relaxnet_jax.data.quality.work import displacements
from relaxnet_jax.data.store import TrajectoryStore
from relaxnet_jax.data.trajectory import RelaxationTrajectory

# Scalars of each relaxation: (label, unit).
SCALARS: dict[str, tuple[str, str]] = {
    "atoms": ("atoms", ""),
    "frames": ("frames", ""),
    "displacement": ("mean displacement", "Å"),
    "max_displacement": ("largest displacement", "Å"),
    "energy_drop": ("energy drop", "eV/atom"),
    "first_fmax": ("first fmax", "eV/Å"),
    "last_fmax": ("last fmax", "eV/Å"),
    "volume_change": ("volume change", "%"),
    "first_energy": ("first energy", "eV/atom"),
    "last_energy": ("last energy", "eV/atom"),
}

_QUARTILES = ("min", "quartile", "median", "quartile", "max")


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Number of relaxations that have a scalar, and its (exact) quartiles over them."""

    n: int
    min: float
    q1: float
    median: float
    q3: float
    max: float


@dataclasses.dataclass(frozen=True, eq=False)
class DataSummary:
    """What a store holds.

    Attributes:
      relaxations: number of relaxations.
      frames: number of frames of all relaxations.
      atoms: number of atoms of all structures, each structure counted once.
      elements: by symbol, in order of atomic number, the numbers of relaxations with the element and
        of its atoms.
      distributions: by name of `SCALARS`, for those that some relaxation has. Displacements are the
        mean and the largest of a relaxation's free atoms from the first frame to the last (see
        `work.displacements`); the volume change is that of relaxations with a variable cell.
      with_stresses, with_charges, with_fixed_atoms, variable_cell: numbers of such relaxations.
      groups, sources: numbers of distinct groups and sources.
      largest_groups, largest_sources: (name, number of relaxations), largest first, at most five.
      duplicates: sets of ids of relaxations that start from the same structure (see `duplicates`).
      metadata: metadata of the store.
      values: (R,) float64 by name of `SCALARS`, NaN if a relaxation has none; kept on disk, and not
        part of the JSON.
    """

    relaxations: int
    frames: int
    atoms: int
    elements: dict[str, tuple[int, int]]
    distributions: dict[str, Distribution]
    with_stresses: int
    with_charges: int
    with_fixed_atoms: int
    variable_cell: int
    groups: int
    largest_groups: list[tuple[str, int]]
    sources: int
    largest_sources: list[tuple[str, int]]
    duplicates: list[list[str]]
    metadata: dict[str, Any]
    values: Columns

    def to_dict(self) -> dict[str, Any]:
        """The summary ready for JSON; units as in `SCALARS`."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["values"]
        fields["distributions"] = {
            name: dataclasses.asdict(d) | {"unit": SCALARS[name][1]}
            for name, d in self.distributions.items()
        }
        fields["elements"] = {
            symbol: {"relaxations": r, "atoms": a} for symbol, (r, a) in self.elements.items()
        }
        return fields


def summarise(
    store: TrajectoryStore, advance: Callable[[int], None] = lambda _: None
) -> DataSummary:
    """Summarises a store, reading every relaxation once and those that may be duplicates again.

    Args:
      store: the open store; some 220 bytes per relaxation are kept in temporary files.
      advance: called with the number of relaxations read.
    """
    from ase.data import chemical_symbols

    n = len(store)
    texts = ("group", "source")
    columns = Columns(
        dict.fromkeys(SCALARS, ("<f8", 1)) | dict.fromkeys(texts, ("<i8", 1)) | duplicates.FIELDS
    )
    counts = dict.fromkeys(("stresses", "charges", "fixed", "variable"), 0)
    relaxations, atoms = np.zeros(119, np.int64), np.zeros(119, np.int64)
    absent = dict.fromkeys(SCALARS, np.nan)
    for i in range(n):
        t = store[i]
        found = scalars(t)
        hashes = {name: duplicates.hash64(getattr(t, name).encode()) for name in texts}
        columns.append(**absent | found, **hashes, **duplicates.row(duplicates.first_frame(t)))
        counts["stresses"] += t.stresses is not None
        counts["charges"] += t.charges is not None
        counts["fixed"] += bool(t.fixed_mask.any())
        counts["variable"] += "volume_change" in found
        of_elements = np.bincount(t.atomic_numbers, minlength=119)
        atoms += of_elements
        relaxations += of_elements > 0
        advance(i + 1)
    groups, largest_groups = _largest(columns, "group", lambda i: store[i].group)
    sources, largest_sources = _largest(columns, "source", lambda i: store[i].source)
    same = duplicates.find_duplicates(columns, lambda i: duplicates.first_frame(store[i]))
    distributions = {name: _distribution(columns[name]) for name in SCALARS}
    return DataSummary(
        relaxations=n,
        frames=int(store.n_frames.sum()),
        atoms=int(atoms.sum()),
        elements={
            chemical_symbols[z]: (int(relaxations[z]), int(atoms[z]))
            for z in np.flatnonzero(atoms).tolist()
        },
        distributions={name: d for name, d in distributions.items() if d is not None},
        with_stresses=counts["stresses"],
        with_charges=counts["charges"],
        with_fixed_atoms=counts["fixed"],
        variable_cell=counts["variable"],
        groups=groups,
        largest_groups=largest_groups,
        sources=sources,
        largest_sources=largest_sources,
        duplicates=[[store[i].id for i in rows] for rows in same],
        metadata=store.metadata,
        values=columns,
    )


def scalars(t: RelaxationTrajectory) -> dict[str, float]:
    """Those of `SCALARS` that a relaxation has, in their units."""
    fmax = t.fmax
    found = {
        "atoms": t.n_atoms,
        "frames": t.n_frames,
        "energy_drop": float(t.energies[0] - t.energies[-1]) / t.n_atoms,
        "first_energy": float(t.energies[0]) / t.n_atoms,
        "last_energy": float(t.energies[-1]) / t.n_atoms,
    }
    free = ~t.fixed_mask
    if free.any():
        ends = np.array([0]), np.array([t.n_frames - 1])
        moved = np.linalg.norm(displacements(t, *ends)[0, free], axis=-1)
        found |= {"displacement": float(moved.mean()), "max_displacement": float(moved.max())}
        found |= {"first_fmax": float(fmax[0]), "last_fmax": float(fmax[-1])}
    if t.variable_cell:
        first, last = np.abs(np.linalg.det(t.cells[[0, -1]]))
        found["volume_change"] = 100 * (float(last / first) - 1) if first > 0 else np.nan
    return found


def summary_lines(summary: DataSummary) -> list[str]:
    """The summary as text of at most 100 columns, except for ids and names."""
    s = summary
    lines = [
        f"{s.relaxations} relaxations, {s.frames} frames, {s.atoms} atoms, "
        f"{len(s.elements)} elements, {s.groups} groups, {s.sources} sources",
        f"  with stresses {s.with_stresses}, charges {s.with_charges}, "
        f"fixed atoms {s.with_fixed_atoms}, variable cell {s.variable_cell}",
        "",
        f"{'':28}{'relaxations':>11}" + "".join(f"{name:>11}" for name in _QUARTILES),
    ]
    for name, d in s.distributions.items():
        label, unit = SCALARS[name]
        quartiles = (d.min, d.q1, d.median, d.q3, d.max)
        label += f" ({unit})" if unit else ""
        lines.append(f"{label:28}{d.n:11d}" + "".join(f"{x:11.4g}" for x in quartiles))
    lines += ["", "relaxations with element:"]
    items = [f"{symbol} {count}" for symbol, (count, _) in s.elements.items()]
    for k in range(0, len(items), 12):
        lines.append("  " + ", ".join(items[k : k + 12]))
    for title, largest in (("groups", s.largest_groups), ("sources", s.largest_sources)):
        shown = ", ".join(f"{name or '(none)'} {count}" for name, count in largest)
        lines.append(f"largest {title}: {shown}")
    extra = sum(len(ids) - 1 for ids in s.duplicates)
    lines.append(f"{extra} relaxations start from the same structure as another")
    lines += [f"  {', '.join(ids[:5])}{', …' * (len(ids) > 5)}" for ids in s.duplicates[:5]]
    if len(s.duplicates) > 5:
        lines.append(f"  … {len(s.duplicates) - 5} more sets (--json lists all)")
    lines.append(f"metadata: {', '.join(f'{k}={_short(v)}' for k, v in s.metadata.items())}")
    return lines


def _distribution(column: np.ndarray) -> Distribution | None:
    values = column[np.isfinite(column)]
    if not len(values):
        return None
    shares = np.quantile(values, [0, 0.25, 0.5, 0.75, 1], overwrite_input=True)
    return Distribution(len(values), *shares.tolist())


def _largest(
    columns: Columns, column: str, name: Callable[[int], str], n: int = 5
) -> tuple[int, list[tuple[str, int]]]:
    """Number of distinct hashes in a column, and (name, count) of the ``n`` most frequent."""
    hashes = columns[column]
    hashes.sort()
    starts = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1]))
    counts = np.diff(np.append(starts, len(hashes)))
    most = [(hashes[starts[k]], int(counts[k])) for k in np.argsort(-counts, kind="stable")[:n]]
    hashes = columns[column]
    return len(starts), [(name(int((hashes == found).argmax())), count) for found, count in most]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
