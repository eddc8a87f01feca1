"""Files that are either complete or absent."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from relaxnet_jax.errors import InputError

# Errors of a write (never of a read) when there is no room; EFBIG is a limit on file size.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` that replaces it if the block ends without error.

    Raises:
      InputError: the folder cannot be created or written to.
    """
    target = Path(path)
    # The suffix stays last: some writers choose the format by it.
    tag = f"{os.getpid()}-{secrets.token_hex(4)}.tmp"
    temporary = target.with_name(f".{target.stem}.{tag}{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        raise InputError(
            f"{target}: cannot be written ({error.strerror}): choose another output path"
        ) from error
    try:
        yield temporary
        try:
            temporary.replace(target)
        except OSError as error:
            raise InputError(
                f"{target}: cannot be replaced ({error.strerror}): choose another output path"
            ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file, whole or not at all; raises as `atomic_path` does."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def is_poscar(path: str | os.PathLike[str]) -> bool:
    """Whether the name is one that VASP uses for structures: POSCAR*, CONTCAR*, *.vasp, *.poscar."""
    upper = Path(path).name.upper()
    return upper.startswith(("POSCAR", "CONTCAR")) or upper.endswith((".VASP", ".POSCAR"))


@contextlib.contextmanager
def held(folder: str | os.PathLike[str], work: str, option: str) -> Iterator[None]:
    """Locks a folder, created if necessary, so that no other process does the same work there.

    On file systems without locks, other processes are not kept out. Folders created here, or by a
    process killed here, are removed again if they are left empty.

    Args:
      work: the work done there, for the error message.
      option: the command-line option that names the folder, for the error message.

    Raises:
      InputError: another process holds the lock, or the folder cannot be written to.
    """
    path = Path(folder) / ".lock"
    created = [parent for parent in path.parents if not parent.exists()]
    if path.exists():
        created = [path.parent]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written ({error.strerror}): choose another {option}"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder}: another process is using it ({work}); wait for it, or give another "
                f"{option}"
            ) from None
        except OSError:
            pass
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if list(path.parent.iterdir()) == [path]:
                    path.unlink()
                    for parent in created:
                        parent.rmdir()


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Deletes what processes killed in `atomic_path` have left beside ``path``.

    Call it only if no other process may be writing ``path``.
    """
    target = Path(path)
    ours = re.compile(rf"\.{re.escape(target.stem)}\.\d+-[0-9a-f]+\.tmp{re.escape(target.suffix)}")
    for file in target.parent.glob(f".{glob.escape(target.stem)}.*"):
        if ours.fullmatch(file.name):  # not those of a name that only begins alike
            file.unlink(missing_ok=True)


def one_line(error: BaseException) -> str:
    """The message of another library's exception, on one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def no_space(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, reports a full disk.

    Recognises the errors of the operating system and of tensorstore, which writes checkpoints.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return True
        if isinstance(error, ValueError):  # for device memory it is a RuntimeError
            words = ["RESOURCE_EXHAUSTED", *(f"os_error_code='{code}'" for code in NO_ROOM)]
            if any(word in str(error) for word in words):
                return True
        error = error.__cause__
    return False


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder that replaces ``path`` if the block ends without error.

    Raises:
      InputError: ``path`` is a file, or its parent cannot be written to.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise InputError(f"{target}: is a file: choose another output folder")
    tag = f"{os.getpid()}-{secrets.token_hex(4)}.tmp"
    temporary, retired = (
        target.with_name(f".{target.name}.{kind}-{tag}") for kind in ("new", "old")
    )
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"{target}: cannot be written ({error.strerror}): choose another output folder"
        ) from error
    try:
        yield temporary
        # A folder cannot be replaced in one step; see `restore_folder`.
        if target.exists():
            target.replace(retired)
        try:
            temporary.replace(target)
        except BaseException:
            if retired.exists():
                retired.replace(target)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if target.exists():
            shutil.rmtree(retired, ignore_errors=True)


def restore_folder(path: str | os.PathLike[str]) -> None:
    """Completes or undoes what a process killed in `atomic_folder` has left half done.

    Call it only if no other process may be writing ``path``.
    """
    target = Path(path)
    for kind in ("old", "new"):
        for folder in target.parent.glob(f".{glob.escape(target.name)}.{kind}-*.tmp"):
            if kind == "old" and not target.exists():
                folder.replace(target)
            else:
                shutil.rmtree(folder, ignore_errors=True)
