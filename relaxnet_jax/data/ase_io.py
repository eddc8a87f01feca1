"""Relaxations from files that ASE reads, with one relaxation in memory at a time."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from relaxnet_jax.constraints import held_atoms
from relaxnet_jax.data.files import one_line
from relaxnet_jax.data.trajectory import (
    ALONE,
    CALCULATOR,
    PREDICTED,
    RelaxationTrajectory,
    reduced_formula,
    sound_and_unwrapped,
)
from relaxnet_jax.errors import InputError

if TYPE_CHECKING:
    import ase


class SkippedRelaxation(NamedTuple):
    """A relaxation that was left out.

    Attributes:
      id: id of the relaxation.
      reason: why it was left out, in one line that does not repeat the id.
    """

    id: str
    reason: str


class Unreadable(str):
    """The error message for a frame that cannot be parsed.

    Attributes:
      comment: comment line of the frame.
    """

    comment: str = ""


class _Frame(NamedTuple):
    """One frame of the relaxation ``name``: its ``atoms``, or the ``error`` if it cannot be read."""

    name: str
    atoms: ase.Atoms | None
    error: str = ""


def read_frames(
    path: Path, plain: Path, default: str
) -> Iterator[RelaxationTrajectory | SkippedRelaxation]:
    """Yields the relaxations of a file that ASE reads; see `reading.read_relaxations`.

    Args:
      path: the file, as named in messages.
      plain: the file itself or a decompressed copy of it.
      default: id of a relaxation that has no ``traj_id``.

    Raises:
      InputError: the file is unreadable or holds molecular dynamics, or none of its frames has both
        energy and forces.
    """
    dynamics = _molecular_dynamics(plain)
    if dynamics:
        raise InputError(f"{path}: {dynamics}, molecular dynamics: give relaxations")
    labelled = False
    seen: set[str] = set()
    frames = _frames(path, plain, default)
    for own, members in itertools.groupby(frames, key=lambda frame: frame.name):
        images, error = _collect(members)
        # A prediction's traj_id identifies a relaxation started from it within one file, not across files.
        name = f"{default}/{own}" if own != default and _begun_at_prediction(images) else own
        try:
            labels = [labels_of(atoms) for atoms in images]
            labelled |= any(e is not None and f is not None for e, f, _ in labels)
            error = error or _complaint(images, labels)
            built = (
                SkippedRelaxation(name, error) if error else _build(name, images, labels, path.name)
            )
        except (TypeError, ValueError) as bad:
            built = SkippedRelaxation(name, f"{one_line(bad)}: repair or remove it")
        if name in seen:
            built = SkippedRelaxation(
                name,
                "id occurs again after frames of another: only the frames before those are imported; keep "
                "the frames of a relaxation together, and give each relaxation its own id",
            )
        seen.add(name)
        yield built
    if not labelled:
        raise InputError(
            f"{path}: no frame has energy and forces: give a file with both, under ASE's names "
            "energy and forces"
        )


def _frames(path: Path, plain: Path, default: str) -> Iterator[_Frame]:
    """Yields frames with the name of their relaxation; stops at damage that hides the rest.

    An unreadable frame that does not name its relaxation may belong to the one before it or to the
    one after it, so it is yielded for both.
    """
    name, n_read = "", 0
    orphan = ""  # error of a nameless frame that may belong to the next relaxation
    try:
        for item in images_of(plain):
            error = f"frame {n_read} of the file: {item}" if isinstance(item, Unreadable) else ""
            own = _name_of(item, default)
            if own:
                if orphan and own != name:
                    yield _Frame(own, None, orphan)
                name, orphan = own, ""
            else:
                orphan = orphan or error
            if name:
                yield _Frame(name, None if isinstance(item, Unreadable) else item, error)
            n_read += 1
    except Exception as bad:
        if not n_read:
            raise InputError(
                f"{path}: cannot be read ({one_line(bad)}): give a file ASE reads as frames"
            ) from bad
        reason = f"file damaged after {n_read} frames ({one_line(bad)}): fetch it again"
        yield _Frame(name or default, None, reason)
    if not n_read:
        raise InputError(f"{path}: no frames: give a file ASE reads as frames")
    if not name:
        yield _Frame(default, None, orphan)


def _name_of(item: ase.Atoms | Unreadable, default: str) -> str:
    """Name of a frame's relaxation; "" for an unreadable frame that does not state it."""
    if not isinstance(item, Unreadable):
        return text_of(_info(item).get("traj_id")) or default
    from ase.io.extxyz import key_val_str_to_dict

    try:  # parsed as for readable frames, or the names would differ
        return text_of(key_val_str_to_dict(item.comment).get("traj_id"))
    except Exception:
        return ""


def _molecular_dynamics(plain: Path) -> str:
    """Name of the ASE molecular-dynamics algorithm that wrote this .traj; "" for any other file."""
    import ase.io

    if plain.suffix != ".traj":
        return ""
    try:
        with ase.io.Trajectory(str(plain)) as frames:
            written: dict[str, Any] = frames.description or {}
    except Exception:  # an unreadable file is reported when its frames are read
        return ""
    return str(written.get("md-type", "ASE")) if written.get("type") == "molecular-dynamics" else ""


def images_of(plain: Path) -> Iterator[ase.Atoms | Unreadable]:
    """Yields ASE's frames; an extxyz frame that cannot be parsed comes as an `Unreadable`."""
    import ase.io
    from ase.io.extxyz import read_xyz

    if plain.suffix not in (".extxyz", ".xyz"):
        yield from ase.io.iread(plain, index=":", do_not_split_by_at_sign=True)
        return
    # ase.io.iread would scan the whole file first, end silently at a blank line, and lose
    # everything after a frame it cannot parse. (ASE 3.29's ixyzchunks reads the first digit
    # of the number of atoms only.)
    with plain.open(encoding="utf-8") as file:
        for line in file:
            if line.isspace():
                continue
            text = [line, *itertools.islice(file, int(line) + 1)]
            try:
                image = next(read_xyz(io.StringIO("".join(text)), 0))
            except Exception as error:
                complaint = Unreadable(f"unreadable ({one_line(error)}): repair or remove it")
                complaint.comment = "".join(text[1:2])
                yield complaint
            else:
                yield image


def _collect(frames: Iterator[_Frame]) -> tuple[list[ase.Atoms], str]:
    """The readable frames, and the error of the first unreadable one, or ""."""
    images: list[ase.Atoms] = []
    error = ""
    for frame in frames:
        if frame.atoms is None:
            error = error or frame.error
        else:
            images.append(frame.atoms)
    return images, error


_Labels = tuple[float | None, np.ndarray | None, np.ndarray | None]


def _build(
    name: str, images: list[ase.Atoms], labels: list[_Labels], source: str
) -> RelaxationTrajectory | SkippedRelaxation:
    """Builds the relaxation from ``images``; skips it if it is predicted or unsound."""
    first, info = images[0], _info(images[0])
    if predicted(images):
        return SkippedRelaxation(name, "was predicted by this package, not computed: leave it out")
    origin = "" if _begun_at_prediction(images) else text_of(info.get("source"))
    code = " ".join(filter(None, (text_of(info.get("code")), text_of(info.get("functional")))))
    stresses = [stress for _, _, stress in labels if stress is not None]
    charges = first.arrays.get("charges", first.get_initial_charges())
    trajectory = RelaxationTrajectory(
        id=name,
        atomic_numbers=first.numbers.astype(np.int64),
        positions=np.array([atoms.positions for atoms in images], dtype=np.float64),
        cells=np.array([atoms.cell.array for atoms in images], dtype=np.float64),
        pbc=first.pbc.copy(),
        energies=np.array([energy for energy, _, _ in labels], dtype=np.float64),
        forces=np.array([forces for _, forces, _ in labels], dtype=np.float64),
        fixed_mask=fixed_atoms(first),
        group=text_of(info.get("group"))
        or text_of(info.get("parent"))
        or reduced_formula(first.numbers),
        stresses=np.array(stresses) if len(stresses) == len(images) else None,
        charges=np.array(charges, dtype=np.float64) if np.any(charges) else None,
        source=origin or code or source,
    )
    try:
        return sound_and_unwrapped(trajectory)
    except InputError as bad:
        return SkippedRelaxation(name, str(bad))


def labels_of(atoms: ase.Atoms) -> _Labels:
    """Energy (eV), raw forces (N, 3) (eV/Å) and stress (6,) (eV/Å³) of a frame; None if absent."""
    results: dict[str, Any] = {} if atoms.calc is None else atoms.calc.results
    energy = results.get("free_energy")
    energy = results.get("energy") if energy is None else energy
    forces, stress = results.get("forces"), results.get("stress")
    if stress is not None:
        stress = np.asarray(stress, dtype=np.float64)
        if stress.size == 9:
            stress = stress.reshape(9)[[0, 4, 8, 5, 2, 1]]
    return None if energy is None else float(energy), forces, stress


def _complaint(images: list[ase.Atoms], labels: list[_Labels]) -> str:
    """Why these frames do not form a relaxation; "" if they do."""
    if len(images) < 2:
        return "a single frame: a relaxation needs two or more"
    first, last, numbered = images[0], -1, _numbered(images)
    for k, (atoms, (energy, forces, _)) in enumerate(zip(images, labels)):
        number = _info(atoms).get("frame", last + 1) if numbered else k
        try:
            index = int(number)
        except (TypeError, ValueError):
            return f"frame {k}, frame: {number!r} is not a number: count from 0"
        if index <= last:
            return f"frame {index} after frame {last}: sort the frames"
        last = index
        if len(atoms) != len(first):
            return f"frame {k}: {len(atoms)} atoms after {len(first)}: keep the number of atoms"
        if np.any(atoms.numbers != first.numbers):
            return f"frame {k}, atomic_numbers: order or species change: keep them the same"
        if np.any(atoms.pbc != first.pbc):
            return f"frame {k}, pbc: changes between frames: keep it the same"
        # A relaxation leaves momenta as they are, e.g. those of the MD snapshot it starts from.
        moving = atoms.has("momenta") or first.has("momenta")
        if moving and not np.allclose(atoms.get_momenta(), first.get_momenta()):
            return f"frame {k}, momenta: change (molecular dynamics): give a relaxation"
        missing = [n for n, v in (("energy", energy), ("forces", forces)) if v is None]
        if missing:
            return f"frame {k}: no {' and no '.join(missing)}: every frame needs both"
        try:
            if np.any(fixed_atoms(atoms) != fixed_atoms(first)):
                return f"frame {k}, constraints: fixed atoms change: keep them the same"
        except InputError as error:
            return f"frame {k}, constraints: {error}"
    band = _band(np.array([atoms.positions for atoms in images]))
    if band:
        return (
            f"frames 0 and {band - 1} recur every {band} frames: a path of images (NEB), or a "
            "relaxation written more than once: give one relaxation"
        )
    return ""


def _band(positions: np.ndarray) -> int:
    """Number of images if the frames are an NEB band, all written at each step; 0 otherwise.

    The ends of a band do not move, so both recur bit for bit, with a period of the number of images.
    To look the same, a relaxation would have to pass through as many distinct structures and
    return to exactly two of them. A band written only once cannot be distinguished from a relaxation.

    Args:
      positions: (n, N, 3), Å.
    """
    n_frames = len(positions)
    first = np.all(positions == positions[0], axis=(1, 2))
    for n in np.flatnonzero(first[: n_frames // 2 + 1])[1:]:
        ends_stay = first[::n].all() and np.all(positions[n - 1 :: n] == positions[n - 1])
        if n >= 3 and ends_stay and len({image.tobytes() for image in positions[:n]}) == n:
            return int(n)
    return 0


def fixed_atoms(atoms: ase.Atoms) -> np.ndarray:
    """(N,) bool: which atoms cannot move.

    Raises:
      InputError: an atom is held in some directions only.
    """
    fixed, partly = held_atoms(atoms)
    if partly.any():
        # Its force would never vanish, and the mask cannot hold a single direction.
        raise InputError("an atom is held in some directions only: fix or free it")
    return fixed


def _begun_at_prediction(images: Sequence[ase.Atoms]) -> bool:
    """Whether a relaxation was computed starting from a structure that this package predicted.

    All its frames then claim to be predicted, since ASE's optimisers copy the ``info`` of the initial
    structure into every frame. The frames of a predicted path, in contrast, are numbered.
    """
    source = text_of(_info(images[0]).get("source")) if len(images) > 1 else ""
    return source.startswith((PREDICTED, ALONE)) and not _numbered(images)


def predicted(images: Sequence[ase.Atoms]) -> bool:
    """Whether the frames are a predicted path, or have energies from the package's own calculator."""
    if any(getattr(atoms.calc, "name", None) == CALCULATOR for atoms in images):
        return True
    source = text_of(_info(images[0]).get("source"))
    return source.startswith(PREDICTED) and not _begun_at_prediction(images)


def _numbered(images: Sequence[ase.Atoms]) -> bool:
    """Whether the frames of a relaxation are numbered; one number shared by all does not count."""
    return len({text_of(_info(atoms).get("frame")) for atoms in images}) > 1


def _info(atoms: ase.Atoms) -> dict[str, Any]:
    """``info`` of a frame, including the key-value pairs of an ASE database."""
    return atoms.info.get("key_value_pairs", {}) | atoms.info


def text_of(value: object) -> str:
    """Text of an ``info`` value; extxyz turns formulas such as "F" (fluorine) into bools."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    return str(value)[0] if isinstance(value, bool | np.bool_) else str(value)
