"""Downloads over HTTP: a file is either complete and verified, or absent."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.client
import os
import random
import re
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

from relaxnet_jax.data.files import one_line
from relaxnet_jax.data.sources import DAMAGE
from relaxnet_jax.errors import InputError

_CHUNK = 1 << 18
_RETRIED = {202, 408, 425, 429, 500, 502, 503, 504}
_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")


@dataclasses.dataclass(frozen=True)
class Policy:
    """How persistently to try.

    Attributes:
      tries: most requests made for a file.
      wait: seconds before the second request, doubled before each further one and multiplied by a
        random factor from 0.5 to 1.5; a longer wait that the server asks for is respected.
      longest: longest wait in seconds.
      timeout: seconds without data after which a connection is given up.
      sleep: function that waits for a number of seconds.
      uniform: function that returns a random number in [0, 1).
    """

    tries: int = 6
    wait: float = 1.0
    longest: float = 120.0
    timeout: float = 60.0
    sleep: Callable[[float], None] = time.sleep
    uniform: Callable[[], float] = random.random


class Fetched(NamedTuple):
    """Outcome of a download.

    Attributes:
      size: size of the file in bytes.
      how: "already there", "fetched", or "fetched, resumed at byte N".
    """

    size: int
    how: str


class _TransientError(Exception):
    """An error worth another try, after ``wait`` seconds if the server asked for that."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _Body(NamedTuple):
    """Outcome of one response.

    Attributes:
      began: offset in the file of the first byte received.
      sure: whether the server stated the length of the file, and that many bytes are there.
    """

    began: int
    sure: bool


def fetch(
    url: str,
    target: str | os.PathLike[str],
    verify: Callable[[Path], None],
    size: int | None = None,
    md5: str | None = None,
    policy: Policy | None = None,
) -> Fetched:
    """Downloads a file, unless a valid copy is already there.

    Data are written to a hidden ``.NAME.part`` beside the target, which they replace once verified.
    A broken connection is resumed where it broke if the server supports that, also by a later call.

    Args:
      url: http or https address.
      target: the file to write.
      verify: called with a path; raises InputError (without naming the path) if the content is wrong.
      size: expected size in bytes, None if unknown.
      md5: expected MD5 sum in hexadecimal, None if unknown.
      policy: how persistently to try.

    Raises:
      InputError: the file could not be downloaded, or its content is not as expected.
    """
    policy, target = policy or Policy(), Path(target)
    if not url.lower().startswith(("http://", "https://")):
        raise InputError(f"{url}: not an HTTP address: correct the index")
    if target.is_file():
        with contextlib.suppress(InputError):
            _check(target, verify, size, md5)
            return Fetched(target.stat().st_size, "already there")
    part = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{target.parent}: cannot be created ({error.strerror}): choose another folder"
        ) from error
    for attempt in range(1, policy.tries + 1):
        try:
            body = _stream(url, part, size, policy.timeout)
            try:
                _check(part, verify, size, md5)
            except InputError as wrong:
                part.unlink()
                if body.sure and body.began == 0:
                    raise InputError(f"{url}: {wrong}") from None
                # The pieces may come from two versions of the file, or the end may be missing.
                raise _TransientError(str(wrong)) from None
            length = part.stat().st_size
            part.replace(target)
            return Fetched(
                length, f"fetched, resumed at byte {body.began}" if body.began else "fetched"
            )
        except _TransientError as error:
            if part.is_file() and not part.stat().st_size:
                part.unlink()
            if attempt == policy.tries:
                raise InputError(
                    f"{url}: {error}, after {attempt} tries: run again to resume"
                ) from None
            wait = policy.wait * 2 ** (attempt - 1) * (0.5 + policy.uniform())
            policy.sleep(min(max(wait, error.wait), policy.longest))
        except OSError as error:
            raise InputError(
                f"{target}: cannot be written ({one_line(error)}): make room or choose another folder"
            ) from error
    raise InputError(f"{url}: not tried: allow 1 or more tries")


def verify_zip(path: Path) -> None:
    """Raises InputError unless the file is a zip archive whose members can all be unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (*DAMAGE, RuntimeError, NotImplementedError) as error:
        raise InputError(f"not a valid zip archive ({one_line(error)}): fetch it again") from error
    if bad is not None:
        raise InputError(f"not a valid zip archive ({bad} is damaged): fetch it again")


def _check(path: Path, verify: Callable[[Path], None], size: int | None, md5: str | None) -> None:
    found = path.stat().st_size
    with path.open("rb") as file:
        if _is_page(file.read(512)):
            raise InputError("a web page instead of the file: open the address in a browser")
    if size is not None and found != size:
        raise InputError(f"{found} bytes instead of {size}: fetch it again")
    if md5 is not None:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "md5").hexdigest() != md5.lower():
                raise InputError("its MD5 sum differs from the index: fetch it again")
    verify(path)


def _is_page(head: bytes) -> bool:
    return (
        head.lstrip(b"\xef\xbb\xbf \t\r\n")[:14].lower().startswith((b"<!doctype html", b"<html"))
    )


def _stream(url: str, part: Path, size: int | None, timeout: float) -> _Body:
    """Requests what is missing from ``part`` and appends it."""
    have = part.stat().st_size if part.is_file() else 0
    if size is not None and have > size:
        have = 0
    headers = {"User-Agent": "relaxnet-jax", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        request = urllib.request.Request(url, headers=headers)
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        total = _RANGE.fullmatch(error.headers.get("Content-Range", ""))
        if error.code == 416 and have:
            if total and total[2] == str(have):
                return _Body(have, True)  # nothing is missing
            part.unlink()
            raise _TransientError("the file on the server has changed") from None
        reason = f"HTTP {error.code} {error.reason}"
        if error.code in _RETRIED:
            raise _TransientError(reason, _seconds(error.headers.get("Retry-After"))) from None
        raise InputError(f"{url}: {reason}: check the address") from None
    except (http.client.InvalidURL, ValueError) as error:
        raise InputError(
            f"{url}: not a valid address ({one_line(error)}): correct the index"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        raise _TransientError(one_line(error)) from None
    with response:
        return _receive(url, response, part, have)


def _receive(url: str, response: Any, part: Path, have: int) -> _Body:
    """Writes the body of a response to ``part``, appending at byte ``have`` if it starts there."""
    if response.status in _RETRIED:
        raise _TransientError(f"HTTP {response.status} {response.reason}",
                         _seconds(response.headers.get("Retry-After")))  # fmt: skip
    if response.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
        raise InputError(f"{url}: a web page instead of the file: open the address in a browser")
    length = response.headers.get("Content-Length", "")
    total = int(length) if length.isdigit() else None
    if response.status == 206:
        where = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if where is None or where[1] != str(have):
            part.unlink(missing_ok=True)
            raise _TransientError("the server sent a different part than requested")
        total = int(where[2]) if where[2].isdigit() else None if total is None else have + total
    else:
        have = 0  # the server cannot resume and sends the whole file
    received = have
    with part.open("ab" if have else "wb") as out:
        while chunk := _read(response):
            if received == 0 and _is_page(chunk):
                out.close()
                part.unlink()
                raise InputError(
                    f"{url}: a web page instead of the file: open the address in a browser"
                )
            out.write(chunk)
            received += len(chunk)
    if total is not None and received != total:
        if received > total:
            part.unlink()
        raise _TransientError(f"connection cut at byte {received} of {total}")
    return _Body(have, total is not None)


def _read(response: IO[bytes]) -> bytes:
    try:
        return response.read(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _TransientError(one_line(error)) from None


def _seconds(text: str | None) -> float:
    """Seconds of a Retry-After header; 0 if it is missing or a date."""
    return float(text) if text and text.isdigit() else 0.0
