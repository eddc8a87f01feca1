"""Where relaxations are: files, folders, archives; which of their files to read, under what id."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, Any, NamedTuple

from relaxnet_jax.data.files import one_line
from relaxnet_jax.errors import InputError

_COMPRESSED = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.xz", ".tar.bz2")
# What a folder or an archive is searched for; a file named by the user is read whatever its name.
_WANTED = (".extxyz", ".traj", ".db")
_VASP = re.compile(r"(?i)[._-]?(vasprun|outcar)(?:[._-]?xml)?")
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)


class Source(NamedTuple):
    """A file of relaxations.

    Attributes:
      path: on disk.
      id: of its relaxation, where the file does not name it.
    """

    path: Path
    id: str


class Found(NamedTuple):
    """What a search came upon: ``sources`` to read, and the number of files left alone."""

    sources: list[Source]
    others: int


def find_sources(paths: Sequence[str | os.PathLike[str]]) -> Found:
    """Files to read, in order: those named, and those in the folders named, searched recursively.

    In a folder these are VASP's vasprun.xml and OUTCAR under any name that contains one of the
    words, extxyz, traj and db files, and archives of them, also compressed. Of a vasprun.xml and
    an OUTCAR of the same run the vasprun.xml is read.

    Raises:
      InputError: nothing is there under one of the names, or a folder holds no such file.
    """
    sources: list[Source] = []
    others = 0
    named = [Path(path) for path in paths]
    root = Path(os.path.commonpath([p.absolute() if p.is_dir() else p.absolute().parent
                                    for p in named])) if named else Path()  # fmt: skip

    def source(file: Path) -> Source:
        return Source(file, relaxation_id(file.absolute().relative_to(root), root))

    for path in named:
        if not path.is_dir():
            sources.append(source(path))
            continue
        inside = [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
        chosen = relaxation_files(sorted(inside))
        if not chosen:
            raise InputError(
                f"{path}: holds no vasprun.xml, OUTCAR, extxyz, traj or db file: name the files"
            )
        others += len(inside) - len(chosen)
        sources += [source(file) for file in chosen]
    return Found(sources, others)


def relaxation_files(names: Iterable[PurePath]) -> list:
    """Those of the names that are files of relaxations, each run once."""

    def run(name: PurePath) -> tuple[PurePath, str]:
        return name.parent, _VASP.sub("", plain_name(name))

    kinds = {name: _kind(name) for name in names}
    runs = {run(name) for name, kind in kinds.items() if kind == "vasprun"}
    return [n for n, kind in kinds.items() if kind and not (kind == "outcar" and run(n) in runs)]


def _kind(name: PurePath) -> str:
    """ "vasprun", "outcar", "archive", "frames", or "" for what is none of these."""
    plain = plain_name(name)
    if plain.startswith("."):
        return ""
    if is_archive(name):
        return "archive"
    match = _VASP.search(plain)
    if match:
        return match[1].lower()
    return "frames" if plain.endswith(_WANTED) else ""


def is_archive(name: PurePath) -> bool:
    """Whether it is a zip or tar archive, by its name."""
    return name.name.lower().endswith(_ARCHIVES)


def is_vasprun(name: PurePath) -> bool:
    """Whether it is a vasprun.xml, by its name."""
    return _kind(name) == "vasprun"


def is_json(name: PurePath) -> bool:
    """Whether it is a JSON file, by its name."""
    return plain_name(name).lower().endswith(".json")


def plain_name(name: PurePath) -> str:
    """File name without the suffix of a compression."""
    return name.stem if name.suffix in _COMPRESSED else name.name


def relaxation_id(relative: PurePath, root: Path | None = None) -> str:
    """Id of a file's relaxation: its path without suffixes and without VASP's own file names.

    E.g. "Au/run2/vasprun.xml.gz" -> "Au/run2", "JVASP-39.vasprun.xml" -> "JVASP-39".

    Args:
      relative: to ``root``, whose own name is taken where nothing else is left.
    """
    plain = plain_name(relative)
    last = (
        _VASP.sub("", plain.removesuffix(".xml")).lstrip("._-")
        if _VASP.search(plain)
        else _stem(plain)
    )
    parts = [*relative.parent.parts, *([last] if last else [])]
    return "/".join(parts) or (root.name if root is not None else "") or plain


def _stem(plain: str) -> str:
    return PurePath(plain).stem.removesuffix(".tar")


@contextlib.contextmanager
def decompressed(path: Path) -> Iterator[IO[bytes]]:
    """The file's content as a stream. Raises InputError where it is damaged or missing."""
    opener = _COMPRESSED.get(path.suffix)
    try:
        with opener(path) if opener else path.open("rb") as stream:  # type: ignore[operator]
            yield stream
    except DAMAGE as error:
        kind = f"damaged {path.suffix[1:]} file" if opener else "cannot be read"
        raise InputError(f"{path}: {kind} ({one_line(error)}): fetch it again") from error


@contextlib.contextmanager
def plain_copy(path: Path) -> Iterator[Path]:
    """The file itself, or a decompressed copy: ASE's seeks in a gzip file are quadratic."""
    if path.suffix not in _COMPRESSED:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="relaxnet-jax-") as folder:
        copy = Path(folder) / path.stem
        with decompressed(path) as packed, copy.open("wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
        yield copy


class Member(NamedTuple):
    """A file out of an archive: its ``name`` there, and a ``path`` to it while it lasts, or the
    ``error`` that kept it from being unpacked."""

    name: PurePosixPath
    path: Path | None
    error: str = ""


def archive_members(archive: Path) -> Iterator[Member]:
    """The files of relaxations in an archive, one unpacked at a time.

    Raises:
      InputError: the archive is damaged, or holds none.
    """
    with tempfile.TemporaryDirectory(prefix="relaxnet-jax-") as folder, _opened(archive) as opened:
        names, open_member = opened
        inside = sorted(PurePosixPath(name) for name in names)
        chosen = [name for name in relaxation_files(inside) if not is_archive(name)]
        # Data sets come as one JSON file in a zip; beside other files JSON is something else.
        chosen = chosen or [name for name in inside if is_json(name)]
        if not chosen:
            raise InputError(
                f"{archive}: holds no vasprun.xml, OUTCAR, extxyz, traj or db file: name the "
                "archive that does"
            )
        for name in chosen:
            # Only the last part of the name is used: no member leaves this folder.
            path = Path(folder) / name.name
            try:
                with open_member(names[str(name)]) as packed, path.open("wb") as out:
                    shutil.copyfileobj(packed, out, 1 << 20)
            except (*DAMAGE, RuntimeError, NotImplementedError) as error:
                yield Member(name, None, f"damaged in the archive ({one_line(error)})")
            else:
                yield Member(name, path)
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[tuple[dict[str, Any], Callable[[Any], Any]]]:
    """(members by name, a function that opens one) of an archive."""
    try:
        if archive.suffix == ".zip":
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
            with tarfile.open(archive) as packed:
                files = {str(PurePosixPath(i.name)): i for i in packed.getmembers() if i.isfile()}
                yield files, packed.extractfile
    except DAMAGE as error:
        raise InputError(
            f"{archive}: damaged archive ({one_line(error)}): fetch it again"
        ) from error
