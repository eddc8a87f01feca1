"""Relaxation files in zip and tar archives, unpacked one at a time."""

from __future__ import annotations

import contextlib
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from relaxnet_jax.data.sources import (
    DAMAGE,
    Beside,
    Companions,
    fault,
    fault_of_machine,
    is_archive,
    is_json,
    plain_copy,
    relaxation_files,
)
from relaxnet_jax.errors import InputError

# Also encrypted members, and those compressed by an unsupported method.
_DAMAGED = (*DAMAGE, RuntimeError, NotImplementedError)


class Member(NamedTuple):
    """A relaxation file in an archive.

    Attributes:
      name: its path inside the archive.
      path: the unpacked file, which exists until the next member is taken; None if it could not be
        unpacked.
      error: why it could not be unpacked, else "".
      beside: companion files of the same run; a damaged one is an empty file.
    """

    name: PurePosixPath
    path: Path | None
    error: str = ""
    beside: Beside = Beside()


def archive_members(archive: Path) -> Iterator[Member]:
    """Yields the relaxation files in an archive in order of name, unpacking one at a time.

    A compressed tar is first decompressed as a whole, into a temporary file.

    Raises:
      InputError: the archive is damaged or contains no relaxation files, or there is no room to
        decompress it.
    """
    with tempfile.TemporaryDirectory(prefix="relaxnet-jax-") as place, _opened(archive) as opened:
        folder, (names, open_member) = Path(place), opened
        inside = sorted(PurePosixPath(name) for name in names)
        companions = Companions(inside)
        found = relaxation_files(inside)
        chosen = [name for name in found if not is_archive(name)]
        packed = [name for name in found if is_archive(name)]
        # Data sets come as one JSON file in a zip; next to relaxation files, JSON is something else.
        chosen = chosen or [name for name in inside if is_json(name)]
        if not chosen and not packed:
            raise InputError(
                f"{archive}: holds no vasprun.xml, OUTCAR, extxyz, traj or db file: give an "
                "archive that does"
            )

        def unpacked(name: PurePosixPath) -> Path:
            # Only the last part of the name is used: no member leaves this folder.
            path = folder / name.name
            with open_member(names[str(name)]) as packed, path.open("wb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
            return path

        def unpacked_beside(name: PurePosixPath) -> Path:
            """Unpacks a companion file; a damaged one becomes empty, which its reader reports."""
            try:
                return unpacked(name)
            except _DAMAGED as error:
                if fault_of_machine(error):
                    raise
                (folder / name.name).write_bytes(b"")
                return folder / name.name

        for name in packed:
            yield Member(name, None, "is an archive inside an archive: unpack it and give its path")
        for name in chosen:
            try:
                path = unpacked(name)
                beside = [
                    unpacked_beside(PurePosixPath(other)) if other else None
                    for other in companions.of(name)
                ]
            except _DAMAGED as error:
                yield Member(name, None, fault(error, "damaged in the archive"))
            else:
                yield Member(name, path, "", Beside(*beside))
            for file in folder.iterdir():
                file.unlink()


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[tuple[dict[str, Any], Callable[[Any], Any]]]:
    """Opens an archive: (members by name, function that opens a member)."""
    try:
        if archive.suffix.lower() == ".zip":
            with zipfile.ZipFile(archive) as packed:
                yield (
                    {
                        str(PurePosixPath(i.filename)): i
                        for i in packed.infolist()
                        if not i.is_dir()
                    },
                    packed.open,
                )
        else:
            # Members are read out of archive order, which needs a seekable tar.
            with plain_copy(archive) as plain, tarfile.open(plain) as packed:
                files = {str(PurePosixPath(i.name)): i for i in packed.getmembers() if i.isfile()}
                yield files, packed.extractfile
    except DAMAGE as error:
        raise InputError(f"{archive}: {fault(error, 'damaged archive')}") from error
