"""Finding relaxations in files, folders and archives: which files to read, and under which id."""

from __future__ import annotations

import bz2
import collections
import contextlib
import errno
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
from pathlib import Path, PurePath
from typing import IO, Any, NamedTuple

from relaxnet_jax.console import printable
from relaxnet_jax.data.files import NO_ROOM, one_line
from relaxnet_jax.errors import InputError

_COMPRESSED: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open,
}  # fmt: skip
_TARS = {".tgz": ".gz", ".txz": ".xz", ".tbz": ".bz2", ".tbz2": ".bz2"}
_ARCHIVES = (".zip", ".tar", *(f".tar{suffix}" for suffix in _COMPRESSED), *_TARS)
# What folders and archives are searched for; a file given by the user is read whatever its name.
_WANTED = (".extxyz", ".traj", ".db")
_VASP = re.compile(r"(?i)[._-]?(vasprun|outcar)(?:[._-]?xml)?")
_STRUCTURE = re.compile(r"(?i)[._-]?(poscar|contcar)(?:[._-]?vasp)?")
# custodian's archives of failed attempts, which it keeps beside the files of the successful one.
_ATTEMPT = re.compile(r"error\.\d+\.tar(\.gz)?")
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)


class Beside(NamedTuple):
    """Companion files, i.e. files beside that of a VASP run that belong to the same run; None if absent.

    Attributes:
      outcar: OUTCAR of a run with a vasprun.xml.
      structure: POSCAR, or else CONTCAR.
      cif: the CIF with the run's name, or the only CIF in a folder with a single run.
    """

    outcar: Path | None = None
    structure: Path | None = None
    cif: Path | None = None


class Source(NamedTuple):
    """A file of relaxations.

    Attributes:
      path: path on disk.
      id: id of its relaxation, if the file does not name it.
      beside: companion files of the same run.
    """

    path: Path
    id: str
    beside: Beside = Beside()


class Found(NamedTuple):
    """Outcome of a search.

    Attributes:
      sources: files to read, in order.
      others: number of files ignored because they are not relaxation files.
      closed: (folder, reason) of each folder that could not be searched.
      attempts: number of custodian's archives of failed attempts that were ignored.
    """

    sources: list[Source]
    others: int
    closed: list[tuple[str, str]]
    attempts: int = 0


def find_sources(paths: Sequence[str | os.PathLike[str]]) -> Found:
    """Finds the files to read, in order: files given, and those in folders given, recursively.

    In a folder these are VASP's vasprun.xml and OUTCAR under any name that contains one of these
    words, extxyz, traj and db files, and archives of them, also compressed. If a run has both a
    vasprun.xml and an OUTCAR, the vasprun.xml is read. The archives in which custodian keeps failed
    attempts (error.N.tar.gz) are read only if they are given themselves. Symbolic links are followed.
    A folder that can be reached in several ways is searched once, under its own path if that lies in
    the folder given.

    Raises:
      InputError: a folder holds no such file.
    """
    sources: list[Source] = []
    others, attempts, closed = 0, 0, []
    named = [Path(path) for path in paths]
    root = Path(os.path.commonpath([p.absolute() if p.is_dir() else p.absolute().parent
                                    for p in named])) if named else Path()  # fmt: skip

    neighbours = Neighbours()

    def source(file: Path) -> Source:
        own = relaxation_id(file.absolute().relative_to(root), root)
        return Source(file, own, neighbours.of(file))

    for path in named:
        if not path.is_dir():
            sources.append(source(path))
            continue
        inside, unread = _inside(path)
        failed = {file for file in inside if _ATTEMPT.fullmatch(file.name)}
        chosen = relaxation_files(file for file in sorted(inside) if file not in failed)
        if not chosen:
            but = "".join(f" ({folder}: {reason})" for folder, reason in unread[:1])
            raise InputError(
                f"{path}: holds no vasprun.xml, OUTCAR, extxyz, traj or db file{but}: name the files"
            )
        others += len(inside) - len(chosen) - len(failed)
        attempts += len(failed)
        closed += unread
        sources += [source(file) for file in chosen]
    return Found(sources, others, closed, attempts)


def _inside(top: Path) -> tuple[list[Path], list[tuple[str, str]]]:
    """Files in a folder and below it, and (folder, reason) of each folder that cannot be listed."""
    files: list[Path] = []
    closed: list[tuple[str, str]] = []
    seen: set[tuple[int, int]] = set()
    # Folders before links, or an id would depend on which path to a folder comes first.
    links = [top]

    def left_out(error: OSError) -> None:
        reason = f"cannot be searched ({error.strerror}): grant access, or name the files in it"
        closed.append((str(error.filename), reason))

    while links:
        for place, folders, names in os.walk(links.pop(0), onerror=left_out):
            stat = os.stat(place)
            if (stat.st_dev, stat.st_ino) in seen:  # e.g. a link to a parent folder
                folders.clear()
                continue
            seen.add((stat.st_dev, stat.st_ino))
            folders.sort()
            inside = [Path(place, folder) for folder in folders]
            links += [folder for folder in inside if folder.is_symlink()]
            files += [Path(place, name) for name in names]
    return files, closed


def relaxation_files(names: Iterable[PurePath]) -> list:
    """The names of relaxation files among those given, one per run."""
    kinds = {name: _kind(name) for name in names}
    runs = {_run(name) for name, kind in kinds.items() if kind == "vasprun"}
    return [n for n, kind in kinds.items() if kind and not (kind == "outcar" and _run(n) in runs)]


def _run(name: PurePath, words: re.Pattern[str] = _VASP) -> tuple[PurePath, str]:
    """What the files of one run have in common: the folder, and the name without VASP's words."""
    return name.parent, words.sub("", plain_name(name).removesuffix(".xml"))


class Companions:
    """Finds files of the same run among all files in a folder or an archive."""

    def __init__(self, names: Iterable[PurePath]) -> None:
        self._found: dict[str, dict[tuple[PurePath, str], Any]] = {
            kind: {} for kind in ("vasprun", "outcar", "poscar", "contcar", "cif")
        }
        for name in names:
            plain = plain_name(name)
            kind, key = _kind(name), _run(name)
            if structure := _STRUCTURE.search(plain):
                kind, key = structure[1].lower(), _run(name, _STRUCTURE)
            elif plain.lower().endswith(".cif"):
                kind, key = "cif", (name.parent, plain[:-4])
            if kind in self._found and not plain.startswith("."):
                self._found[kind].setdefault(key, name)
        # By folder, collected once for all of its runs.
        self._runs: dict[PurePath, set[str]] = collections.defaultdict(set)
        self._cifs: dict[PurePath, list[Any]] = collections.defaultdict(list)
        for folder, run in (*self._found["vasprun"], *self._found["outcar"]):
            self._runs[folder].add(run)
        for (folder, _), cif in self._found["cif"].items():
            self._cifs[folder].append(cif)

    def of(self, name: PurePath) -> Beside:
        """Companion files of a vasprun.xml or OUTCAR; none for other files."""
        kind, key = _kind(name), _run(name)
        if kind not in ("vasprun", "outcar"):
            return Beside()
        found = self._found
        cif = found["cif"].get(key)
        if cif is None:
            cifs = self._cifs.get(name.parent, [])
            runs = self._runs.get(name.parent, set())
            cif = cifs[0] if len(cifs) == 1 and runs <= {key[1]} else None
        structure = found["poscar"].get(key) or found["contcar"].get(key)
        return Beside(found["outcar"].get(key) if kind == "vasprun" else None, structure, cif)


class Neighbours:
    """Finds the companions of files on disk; lists a folder once for consecutive files in it."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._companions = Companions([])

    def of(self, path: Path) -> Beside:
        """Companion files of a vasprun.xml or OUTCAR; none for other files."""
        if _kind(path) not in ("vasprun", "outcar"):
            return Beside()
        if path.parent != self._folder:
            try:
                inside = sorted(file for file in path.parent.iterdir() if file.is_file())
            except OSError:  # a folder that may be entered but not listed, or none
                inside = []
            self._folder, self._companions = path.parent, Companions(inside)
        return self._companions.of(path)


def _kind(name: PurePath) -> str:
    """Kind of file: "vasprun", "outcar", "archive", "frames", or "" for any other."""
    plain = plain_name(name)
    if plain.startswith("."):
        return ""
    if is_archive(name):
        return "archive"
    if plain.endswith(_WANTED):
        return "frames"
    match = _VASP.search(plain)
    return match[1].lower() if match else ""


def is_archive(name: PurePath) -> bool:
    """Whether the file is a zip or tar archive, judged by its name."""
    return name.name.lower().endswith(_ARCHIVES)


def is_vasprun(name: PurePath) -> bool:
    """Whether the file is a vasprun.xml, judged by its name."""
    return _kind(name) == "vasprun"


def is_outcar(name: PurePath) -> bool:
    """Whether the file is an OUTCAR, judged by its name."""
    return _kind(name) == "outcar"


def is_json(name: PurePath) -> bool:
    """Whether the file is a JSON file, judged by its name."""
    return plain_name(name).lower().endswith(".json")


def plain_name(name: PurePath) -> str:
    """File name without the suffix of compression."""
    return name.stem if name.suffix.lower() in _COMPRESSED else name.name


def relaxation_id(relative: PurePath, root: Path | None = None) -> str:
    """Id of a file's relaxation: its path without suffixes and VASP's own file names.

    E.g. "Au/run2/vasprun.xml.gz" -> "Au/run2", "JVASP-39.vasprun.xml" -> "JVASP-39".

    Args:
      relative: path of the file relative to ``root``.
      root: folder whose name is used if nothing else is left.
    """
    plain = plain_name(relative)
    last = (
        _VASP.sub("", plain.removesuffix(".xml")).lstrip("._-")
        if _VASP.search(plain)
        else _stem(plain)
    )
    parts = [*relative.parent.parts, *([last] if last else [])]
    return printable("/".join(parts) or (root.name if root is not None else "") or plain)


def _stem(plain: str) -> str:
    return PurePath(plain).stem.removesuffix(".tar")


@contextlib.contextmanager
def decompressed(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file's content as a stream; raises InputError if it is damaged or missing."""
    opener = _opener(path)
    try:
        with opener(path) if opener else path.open("rb") as stream:
            yield stream
    except DAMAGE as error:
        kind = f"damaged {path.suffix[1:]} file" if opener else "cannot be read"
        raise InputError(f"{path}: {fault(error, kind)}") from error


def _opener(path: PurePath) -> Callable[[Path], Any] | None:
    """The function that opens a compressed file; None if the file is not compressed."""
    suffix = path.suffix.lower()
    return _COMPRESSED.get(_TARS.get(suffix, suffix))


def fault(error: BaseException, damaged: str) -> str:
    """Why a file could not be read: a fault of the machine, or else that the file is ``damaged``."""
    return fault_of_machine(error) or f"{damaged} ({one_line(error)}): fetch it again"


def fault_of_machine(error: BaseException) -> str:
    """What kept a sound file from being read or unpacked; "" if the file itself is at fault."""
    # EINVAL: invalid seek.
    if not isinstance(error, OSError) or error.errno in (None, errno.EINVAL):
        return ""
    if error.errno in NO_ROOM:
        return f"no room to unpack it in {tempfile.gettempdir()}: set TMPDIR to a larger folder"
    return f"cannot be read ({error.strerror}): check its permissions and the disk"


@contextlib.contextmanager
def plain_copy(path: Path) -> Iterator[Path]:
    """Yields the file itself or a decompressed copy, as seeking back in a gzip file is slow.

    Raises:
      InputError: the file is damaged, or there is no room for the copy.
    """
    if _opener(path) is None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="relaxnet-jax-") as folder:
        copy = Path(folder) / path.stem
        with decompressed(path) as packed, copy.open("wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
        yield copy
