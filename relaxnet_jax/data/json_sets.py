"""Relaxations from the JSON files of three collections: JARVIS's ALIGNN-FF set, MPtrj, Alexandria.

ALIGNN-FF (jarvis-tools' ``alignn_ff_db``, and files of the same layout) is a list of records::

    {"jid": "JVASP-6664_main-5", "atoms": {"lattice_mat": …, "coords": …, "elements": …,
     "cartesian": false}, "total_energy": …, "forces": …, "stresses": …}

The part of ``jid`` before the last hyphen (or underscore) names the relaxation, and the number after it is the ionic
step. A field ``step`` or ``id``, if present, gives the step instead. Records may come in any order,
except that those sharing a plain ``jid`` such as "JVASP-39" are taken as in order. ``total_energy`` is
in eV per atom despite its name (JARVIS's list of data sets says so, and NIST's nfflr multiplies it by
the number of atoms). ``forces`` are in eV/Å. ``stresses`` are as in vasprun.xml, from which
jarvis-tools reads them: 3×3, kB, pressure positive.

MPtrj is an object of materials, each of which is an object of frames::

    {"mp-1234": {"mp-1234-0-3": {"structure": …, "uncorrected_total_energy": …, "force": …,
     "stress": …}}}

A frame's name consists of task, calculation and ionic step. The frames of one calculation form a
relaxation, which is named after task and calculation, e.g. "mp-1234-0", and also after the material if
its id differs from the task's, e.g. "mp-1/mp-1234-0". The energy is the uncorrected one (eV), with
which the forces (eV/Å) are consistent. ``stress`` is VASP's: 3×3, kB, pressure positive. CHGNet trains
on -0.1 times it, in GPa with tension positive, and matbench-discovery's conversion for ASE is the same
times ASE's GPa: eV/Å³ = -0.1/160.21766208 kB.

Both sets contain selected ionic steps: some steps of a relaxation are missing, possibly the first or
the last; those present are in order.

Alexandria's relaxation paths (``geo_opt_paths``) are an object of materials, each of which is a list of
runs::

    {"agm001": [{"functional": "PBE", "steps": [{"structure": …, "energy": …, "forces": …,
     "stress": …}]}]}

A run is a relaxation, named after the material and the run's position in the list, e.g. "agm001-0".
Public converters read these files in this way, with energies in eV and forces in eV/Å; it has not been
tried on a file of the collection. Stresses are left out: the converters assume VASP's convention, which
is not documented. Force components may be null; such a run is left out.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from relaxnet_jax.data.ase_io import SkippedRelaxation
from relaxnet_jax.data.files import one_line
from relaxnet_jax.data.json_stream import Item, JsonDamageError, items
from relaxnet_jax.data.sources import decompressed, plain_copy
from relaxnet_jax.data.trajectory import (
    RelaxationTrajectory,
    reduced_formula,
    sound_and_unwrapped,
)
from relaxnet_jax.data.vasp.vasprun import stress_of
from relaxnet_jax.errors import InputError

Layout = Literal["alignn", "mptrj", "alexandria"]
_Relaxations = Iterator[RelaxationTrajectory | SkippedRelaxation]
# eV/atom; DFT total energies with pseudopotentials are within 20.
_LARGEST_PER_ATOM = 60.0
_LOOKED_AT = 10  # values inspected to recognise the layout
_STEP = re.compile(r"(.+)[-_](\d+)")
_MPTRJ_STEP = re.compile(r"(\w+-\d+-\d+)-(\d+)")
_MATERIAL = re.compile(r"JVASP-\d+")
_UNLABELLED = re.compile(r": no (forces?|(total_|uncorrected_total_)?energy): ")


class _Frame(NamedTuple):
    """One ionic step.

    Attributes:
      step: number of the ionic step.
      numbers: (N,) atomic numbers.
      positions: (N, 3), Å.
      cell: (3, 3), Å.
      pbc: (3,) bool, periodic directions.
      energy: eV.
      forces: (N, 3), eV/Å.
      stress: (6,), eV/Å³ in ASE's sign convention, or None.
    """

    step: int
    numbers: np.ndarray
    positions: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray
    energy: float
    forces: np.ndarray
    stress: np.ndarray | None


def json_layout(path: Path) -> Layout | None:
    """Recognises the layout of a JSON file by its first values; None if it is none of the three.

    Raises:
      InputError: a compressed file is damaged.
    """
    with decompressed(path) as stream:
        try:
            for item in itertools.islice(items(stream), _LOOKED_AT):
                value = item.value
                if (
                    item.key
                    and isinstance(value, list)
                    and "steps" in _mapping(next(iter(value), 0))
                ):
                    return "alexandria"
                if not isinstance(value, dict):
                    continue
                if not item.key and "lattice_mat" in _mapping(value.get("atoms")):
                    return "alignn"
                if item.key and any("structure" in _mapping(frame) for frame in value.values()):
                    return "mptrj"
        except JsonDamageError:
            return None
    return None


def read_json_set(shown: Path, path: Path, layout: Layout) -> _Relaxations:
    """Yields the relaxations of a JSON file, with one in memory at a time.

    Args:
      shown: the file, as named in messages.
      path: where the file is, plain or compressed.
      layout: see `json_layout`.

    Yields:
      A validated `RelaxationTrajectory` of at least two frames, or a `SkippedRelaxation`. One bad
      record makes its relaxation be skipped; reading stops where the file is damaged.

    Raises:
      InputError: nothing can be read, or no record has both energy and forces.
    """
    labelled = False
    read: dict[Layout, Callable[[Path, Path], _Relaxations]] = {
        "alignn": _alignn,
        "mptrj": functools.partial(_materials, _of_mptrj),
        "alexandria": functools.partial(_materials, _of_alexandria),
    }
    for item in read[layout](shown, path):
        labelled |= isinstance(item, RelaxationTrajectory) or not _UNLABELLED.search(item.reason)
        yield item
    if not labelled:
        fields = {
            "mptrj": "force and uncorrected_total_energy",
            "alignn": "forces and total_energy",
            "alexandria": "forces and energy",
        }
        raise InputError(f"{shown}: no record has {fields[layout]}: give a file of ionic steps")


def _materials(
    relaxations_of: Callable[[Item, str], _Relaxations], shown: Path, path: Path
) -> _Relaxations:
    """Yields the relaxations of an object of materials."""
    n_read = 0
    seen: set[str] = set()
    with decompressed(path) as stream:
        try:
            for material in items(stream):
                n_read += 1
                for built in relaxations_of(material, shown.name):
                    name = built.id
                    if name in seen:
                        built = SkippedRelaxation(name, "id occurs twice: remove one of them")
                    seen.add(name)
                    yield built
        except JsonDamageError as error:
            yield SkippedRelaxation(
                "(rest)", f"file damaged after {n_read} materials ({error}): fetch it again"
            )


def _of_mptrj(material: Item, source: str) -> _Relaxations:
    """Yields the relaxations of one material of MPtrj."""
    runs: dict[str, list[tuple[int, str, Any]]] = {}
    for name, record in _mapping(material.value).items():
        match = _MPTRJ_STEP.fullmatch(name)
        if match is None:
            yield SkippedRelaxation(name, "no ionic step in its name: name it mp-1234-0-3")
            continue
        runs.setdefault(match[1], []).append((int(match[2]), name, record))
    if not _mapping(material.value):
        yield SkippedRelaxation(material.key, "no frames: remove it")
    for run, records in runs.items():
        name = run if run.startswith(f"{material.key}-") else f"{material.key}/{run}"
        yield _relaxation(name, records, _pymatgen_frame, source)


def _of_alexandria(material: Item, source: str) -> _Relaxations:
    """Yields the relaxations of one material of Alexandria."""
    parse = functools.partial(_pymatgen_frame, energy="energy", force="forces", stress=None)
    runs = material.value if isinstance(material.value, list) else []
    if not runs:
        yield SkippedRelaxation(material.key, "no runs: remove it")
    for place, run in enumerate(map(_mapping, runs)):
        name = f"{material.key}-{place}"
        steps = run.get("steps")
        if not isinstance(steps, list):
            yield SkippedRelaxation(name, "no steps: remove it")
            continue
        records = [(k, f"step {k}", step) for k, step in enumerate(steps)]
        yield _relaxation(name, records, parse, f"{source} {run.get('functional', '')}".rstrip())


def _alignn(shown: Path, path: Path) -> _Relaxations:
    """Yields the relaxations of a list of records.

    All records are located first, since those of one relaxation need not be adjacent.
    """
    runs: dict[str, list[tuple[int, str, int, int]]] = {}
    damage, last, n_read = "", "", 0
    with plain_copy(path) as plain, plain.open("rb") as file:
        try:
            for n_read, item in enumerate(items(file), 1):
                try:
                    last, step, label = _record_id(item.value)
                except InputError as error:
                    yield SkippedRelaxation(f"record {n_read - 1}", str(error))
                    continue
                run = runs.setdefault(last, [])
                place = len(run) if step is None else step
                run.append((place, label, item.start, item.length))
        except JsonDamageError as error:
            damage = f"file damaged after {n_read} records ({error}): fetch it again"
        for name, places in runs.items():
            # The part that is lost may have held more of this relaxation.
            if damage and name == last:
                yield SkippedRelaxation(name, damage)
                continue
            records = []
            for step, label, start, length in places:
                file.seek(start)
                # Bytes that are not text were also accepted when the records were located.
                text = file.read(length).decode("utf-8", "replace")
                records.append((step, label, json.loads(text)))
            yield _relaxation(name, records, _alignn_frame, shown.name)


def _record_id(record: Any) -> tuple[str, int | None, str]:
    """(relaxation, ionic step or None, label of the record).

    Raises:
      InputError: the record names no relaxation.
    """
    record = _mapping(record)
    jid = record.get("jid")
    if not isinstance(jid, str | int) or jid == "":
        raise InputError("no jid: name the material and the ionic step, JVASP-39-3")
    jid = str(jid)
    for field in ("step", "id"):
        value = record.get(field)
        if isinstance(value, int) and not isinstance(value, bool):
            return jid, value, f"{jid}-{value}"
        match = _STEP.fullmatch(value) if isinstance(value, str) else None
        if match is not None and not _MATERIAL.fullmatch(value):
            return match[1], int(match[2]), value
    match = _STEP.fullmatch(jid)
    if match is None or _MATERIAL.fullmatch(jid):
        return jid, None, jid
    return match[1], int(match[2]), jid


def _relaxation(
    name: str,
    records: list[tuple[int, str, Any]],
    parse: Callable[[int, Mapping[str, Any]], _Frame],
    source: str,
) -> RelaxationTrajectory | SkippedRelaxation:
    """Builds a relaxation from (step, label, record) tuples; skips it if one of them is unsound."""
    frames: list[_Frame] = []
    for step, label, record in sorted(records, key=lambda entry: entry[0]):
        try:
            if frames and step == frames[-1].step:
                raise InputError("ionic step occurs twice: remove one of them")
            frame = parse(step, _mapping(record))
            if frames and not np.array_equal(frame.numbers, frames[0].numbers):
                raise InputError("number, order or species of atoms change: keep them the same")
            if frames and not np.array_equal(frame.pbc, frames[0].pbc):
                raise InputError("periodic directions change: keep them the same")
        except KeyError as missing:
            return SkippedRelaxation(name, f"{label}: no {missing.args[0]}: add it or remove it")
        except InputError as error:
            return SkippedRelaxation(name, f"{label}: {error}")
        except (TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            return SkippedRelaxation(name, f"{label}: {one_line(error)}: repair or remove it")
        frames.append(frame)
    if len(frames) < 2:
        return SkippedRelaxation(name, "a single frame: a relaxation needs two or more")
    numbers = frames[0].numbers
    stresses = [frame.stress for frame in frames if frame.stress is not None]
    trajectory = RelaxationTrajectory(
        id=name,
        atomic_numbers=numbers,
        positions=np.stack([frame.positions for frame in frames]),
        cells=np.stack([frame.cell for frame in frames]),
        pbc=frames[0].pbc,
        energies=np.array([frame.energy for frame in frames]),
        forces=np.stack([frame.forces for frame in frames]),
        fixed_mask=np.zeros(len(numbers), dtype=bool),
        group=reduced_formula(numbers),
        stresses=np.stack(stresses) if len(stresses) == len(frames) else None,
        source=source,
    )
    try:
        return sound_and_unwrapped(trajectory)
    except InputError as error:
        return SkippedRelaxation(name, str(error))


def _alignn_frame(step: int, record: Mapping[str, Any]) -> _Frame:
    atoms = _mapping(record["atoms"])
    numbers = _elements(atoms["elements"])
    cell = _array("lattice_mat", atoms["lattice_mat"], (3, 3))
    coords = _per_atom("coords", atoms["coords"], len(numbers))
    cartesian = atoms["cartesian"]
    if not isinstance(cartesian, bool):
        raise InputError(f"cartesian: {cartesian!r}: give true or false")
    per_atom = float(record["total_energy"])
    if abs(per_atom) > _LARGEST_PER_ATOM:
        raise InputError(
            f"total_energy: {per_atom:.6g} eV per atom is impossible: in this layout it is the "
            "energy per atom; divide it by the number of atoms"
        )
    return _Frame(
        step,
        numbers,
        coords if cartesian else coords @ cell,
        cell,
        np.ones(3, dtype=bool),
        per_atom * len(numbers),
        _per_atom("forces", record["forces"], len(numbers)),
        _stress("stresses", record.get("stresses")),
    )


def _pymatgen_frame(
    step: int,
    record: Mapping[str, Any],
    energy: str = "uncorrected_total_energy",
    force: str = "force",
    stress: str | None = "stress",
) -> _Frame:
    """A frame with a pymatgen structure; the other arguments name the fields of its labels."""
    structure = _mapping(record["structure"])
    lattice, sites = structure["lattice"], structure["sites"]
    if any(len(site["species"]) != 1 or site["species"][0]["occu"] != 1 for site in sites):
        raise InputError("structure: a site is shared or empty: give an ordered structure")
    numbers = _elements([site["species"][0]["element"] for site in sites])
    cell = _array("lattice", lattice["matrix"], (3, 3))
    fractional = _array("abc", [site["abc"] for site in sites], (len(numbers), 3))
    return _Frame(
        step,
        numbers,
        fractional @ cell,
        cell,
        np.array(lattice.get("pbc", (True, True, True)), dtype=bool),
        float(record[energy]),
        _array(force, record[force], (len(numbers), 3)),
        _stress(stress, record.get(stress)) if stress else None,
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _elements(symbols: list[str]) -> np.ndarray:
    from ase.data import atomic_numbers

    if not symbols:
        raise InputError("no atoms: remove it")
    names = [str(symbol).strip() for symbol in symbols]
    unknown = sorted({name for name in names if not atomic_numbers.get(name)})
    if unknown:
        raise InputError(f"elements {', '.join(unknown)}: unknown: use chemical symbols")
    return np.array([atomic_numbers[name] for name in names], dtype=np.int64)


def _array(field: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{field}: not all numbers: repair or remove it") from None
    if array.shape != shape:
        raise InputError(f"{field}: shape {array.shape} instead of {shape}: repair or remove it")
    return array


def _per_atom(field: str, value: Any, n_atoms: int) -> np.ndarray:
    """(N, 3) array; jarvis-tools omits the first axis if there is only one atom."""
    if n_atoms == 1 and isinstance(value, list) and len(value) == 3:
        value = [value]
    return _array(field, value, (n_atoms, 3))


def _stress(field: str, value: Any) -> np.ndarray | None:
    """(6,) stress, eV/Å³, Voigt order, tension positive, from (3, 3) in kB with pressure positive."""
    if value is None or value == "na" or value == []:
        return None
    return stress_of(_array(field, value, (3, 3)))
