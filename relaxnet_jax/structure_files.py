"""Reading structure files and writing trajectories, for ``relaxnet-jax predict`` and ``relax``."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from relaxnet_jax.data.ase_io import images_of
from relaxnet_jax.data.files import atomic_path, is_poscar, one_line
from relaxnet_jax.data.trajectory import MANY, RelaxationTrajectory, output_form
from relaxnet_jax.errors import InputError

if TYPE_CHECKING:
    from ase import Atoms

    from relaxnet_jax.committee import Spread
    from relaxnet_jax.graph import Structure
    from relaxnet_jax.model import RelaxNet
    from relaxnet_jax.predict import Judged
    from relaxnet_jax.trust import Flag

FULL = 1e-3  # largest deviation of a full occupancy from 1
Say = Callable[[str], None]


class Failure(NamedTuple):
    """A structure that could not be processed, and why; as text, one line ``name: reason``."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Predicted(NamedTuple):
    """A predicted trajectory.

    Attributes:
      path: the predicted path; for a committee, the mean path.
      flags: warnings about it, see `trust.trust_flags`.
      spread: disagreement of the committee's members; None without a committee.
    """

    path: RelaxationTrajectory
    flags: tuple[Flag, ...]
    spread: Spread | None = None


class Options(NamedTuple):
    """How structures are predicted.

    Attributes:
      relax_cell: whether cells relax, if the model was trained for that.
      fmax: eV/Å, largest force at the end of a minimisation with a static model, which predicts no
        path of its own.
      steps: maximum number of steps of such a minimisation.
      batch_size: structures predicted at once; None for a default that suits the device
        (`memory.batch_size_of`).
    """

    relax_cell: bool = True
    fmax: float = 0.05
    steps: int = 500
    batch_size: int | None = None


DEFAULT = Options()


def check_output(out: Path, source: Path) -> None:
    """Raises InputError unless ``out`` has a format we write and is not the file that is read."""
    if out.resolve() == source.resolve():
        raise InputError(f"{out}: is also read; choose another --out")
    output_form(out)


def holds_many(out: Path) -> bool:
    """Whether the format can hold the frames of several structures."""
    return out.suffix in MANY


def read_images(path: Path) -> list[Atoms | str]:
    """Every image of a file, with a one-line error message in place of images that cannot be read.

    If damage makes the rest of the file unreadable, the last message says so.

    Raises:
      InputError: nothing in the file can be read.
    """
    images: list[Atoms | str] = []
    if path.suffix.lower() in (".h5", ".hdf5"):
        raise InputError(
            f"{path}: is a data store, not a structure file; train on it with data.path, or inspect it with "
            "relaxnet-jax data info"
        )
    try:
        for item in images_of(path):
            images.append(item if isinstance(item, str) else disorder(item) or item)
    except Exception as error:  # ASE's readers raise many kinds for files they cannot parse
        if not images:
            remedy = "give a structure file ASE reads: POSCAR, CIF, extxyz, …"
            if is_poscar(path):
                remedy = (
                    "give a complete file with a line of element symbols above the line of their "
                    "counts (VASP 5)"
                )
            raise InputError(
                f"{path}: cannot be read ({_reason(path, error)}); {remedy}"
            ) from error
        images.append(f"file damaged after {len(images)} structures ({one_line(error)})")
    if not images:
        raise InputError(f"{path}: holds no structure; give a file with at least one")
    return images


def _reason(path: Path, error: Exception) -> str:
    """The meaning of an exception from ASE's readers, on one line: some exceptions have no message."""
    from ase.io.formats import UnknownFileTypeError

    suffix = path.suffix.lower().lstrip(".")
    if isinstance(error, UnknownFileTypeError) and str(error).lower() in ("", suffix):
        return "unknown format"
    if suffix in ("xyz", "extxyz") and isinstance(error, ValueError):
        return f"not a valid {suffix}: it does not begin with the number of atoms"
    if isinstance(error, AssertionError | AttributeError | IndexError | KeyError | StopIteration):
        return f"not a valid {suffix.upper()}" if suffix == "cif" else "unknown or damaged format"
    return one_line(error)


def disorder(atoms: Atoms) -> str:
    """Error message for partially occupied sites; empty if there are none.

    ASE puts the most likely element on such a site and stores the occupancies separately.
    """
    sites = atoms.info.get("occupancy")
    for site, shares in sites.items() if isinstance(sites, dict) else ():
        if isinstance(shares, dict) and any(abs(share - 1) > FULL for share in shares.values()):
            shown = ", ".join(f"{symbol} {share:g}" for symbol, share in shares.items())
            return f"partial occupancies (site {site}: {shown}); give an ordered configuration"
    return ""


def read_structures(path: Path, say: Say) -> tuple[list[tuple[str, Atoms]], list[Failure]]:
    """(name, atoms) of every image, with distinct names, and failures for unreadable ones.

    Raises:
      InputError: nothing in the file can be read.
    """
    found: list[tuple[str, Atoms]] = []
    bad: list[Failure] = []
    taken: set[str] = set()
    for count, item in enumerate(read_images(path)):
        place = f"{path.stem}-{count}"
        if isinstance(item, str):
            bad.append(Failure(place, item))
            say(f"left out: {bad[-1]}")
            continue
        name = str(item.info.get("traj_id") or place)
        while name in taken:
            name = f"{name}-{count}"
        taken.add(name)
        found.append((name, item))
    return found, bad


def usable_structures(
    model: RelaxNet, found: Sequence[tuple[str, Atoms]], say: Say, options: Options = DEFAULT
) -> tuple[list[tuple[str, Structure]], list[Failure]]:
    """The structures that the model can take, and failures for the others."""
    usable: list[tuple[str, Structure]] = []
    bad: list[Failure] = []
    for name, atoms in found:
        try:
            usable.append((name, model.structure(atoms, name, options.relax_cell)))
        except InputError as error:
            bad.append(Failure(name, str(error).removeprefix(f"{name}: ")))
            say(f"left out: {bad[-1]}")
    return usable, bad


def no_numbers(one: Judged) -> str:
    """The reason why a prediction is not finite; empty if it is finite."""
    if all(flag.name != "not finite" for flag in one.flags):
        return ""
    return one.failure or (
        "the prediction is not finite; the structure is too far from what the model was trained on"
    )


def sorted_out(results: Sequence[Predicted]) -> tuple[list[Predicted], list[Failure]]:
    """The usable predictions, and failures for those that a flag marks as unusable."""
    from relaxnet_jax.trust import unusable

    kept = [result for result in results if not unusable(result.flags)]
    bad = []
    for result in results:
        if unusable(result.flags):
            grave = result.flags[0]
            reason = f"the prediction is unusable, {grave.name}: {grave.detail}; relax it without the model"
            bad.append(Failure(result.path.id, reason))
    return kept, bad


def write_trajectories(
    results: Sequence[RelaxationTrajectory],
    out: Path,
    append: bool = False,
    before: Sequence[Atoms] = (),
) -> None:
    """Writes all frames of all trajectories, labelled with ``traj_id`` and ``frame``.

    Args:
      results: the trajectories; for a format that holds one structure, only the first is written.
      out: the file to write; its suffix gives the format.
      append: see `write_frames`; for formats that hold many structures.
      before: frames written before those of the trajectories; for formats that hold many structures.

    Raises:
      InputError: the file cannot be written.
    """
    if not holds_many(out):
        results[0].write(out)
        return
    frames = [r.atoms(k) for r in results for k in range(r.n_frames)]
    write_frames([*before, *frames], out, out.suffix[1:], append)


def write_frames(frames: Sequence[Atoms], file: Path, form: str, append: bool = False) -> None:
    """Writes frames, all or none of them.

    Args:
      frames: the frames to write.
      file: the file to write.
      form: ASE's name of the format.
      append: whether to append to the frames already in the file (extxyz, traj).

    Raises:
      InputError: the disk or folder cannot take the file, or the format cannot hold the frames.
    """
    import ase.io

    with atomic_path(file) as temporary:
        try:
            if append:
                shutil.copyfile(file, temporary)
            if append and form == "traj":  # ase.io.write cannot append to these
                with ase.io.Trajectory(str(temporary), "a") as trajectory:
                    for atoms in frames:
                        trajectory.write(atoms)
            else:
                ase.io.write(temporary, list(frames), format=form, append=append)
        except OSError as error:
            raise InputError(
                f"{file}: cannot be written ({error.strerror or one_line(error)}); free space there, or "
                "choose another output folder"
            ) from error
        except Exception as error:  # ASE's writers raise many kinds
            raise InputError(
                f"{file}: ASE cannot write it ({one_line(error)}); give --format extxyz"
            ) from error


def summary(result: RelaxationTrajectory, flags: Sequence[Flag] = ()) -> str:
    """One-line summary of a predicted trajectory."""
    from relaxnet_jax.strain import internal_displacements

    moved = np.linalg.norm(internal_displacements(result.positions, result.cells), axis=-1)
    change = 1e3 * (result.energies[-1] - result.energies[0]) / result.n_atoms
    return (
        f"{result.id}: {result.n_atoms} atoms, E {result.energies[-1]:.3f} eV "
        f"({change:+.1f} meV/atom), atoms move {moved.mean():.3f} Å (at most "
        f"{moved.max():.3f}), last fmax {result.fmax[-1]:.3f} eV/Å"
        + "".join(f"; {flag.name}: {flag.detail}" for flag in flags)
    )
