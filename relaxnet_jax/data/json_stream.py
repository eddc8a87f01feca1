"""The values of a JSON file's outermost list or object, with one in memory at a time.

The standard library's C decoder parses each value as a whole, which is fast and accepts the NaN that
Python writes. The position of each value is reported, so that a file can be read in another order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

_CHUNK = 1 << 20
_LARGEST = 1 << 29  # bytes of one value; far beyond any material's frames
_SPACE = re.compile(r"[ \t\n\r]*")
# An error this close to the end of the buffer may be due to a token cut in two.
_LONGEST_TOKEN = 32


class JsonDamageError(ValueError):
    """The file is not JSON from some byte on; the message states the byte and the reason."""


class Item(NamedTuple):
    """A value of the outermost list or object.

    Attributes:
      key: name of the value in an object, "" in a list.
      value: the value as Python objects.
      start: offset of its text in bytes.
      length: length of its text in bytes.
    """

    key: str
    value: Any
    start: int
    length: int


class _Text:
    """Buffered text of a stream; ``start`` is the offset of the buffer in the stream.

    One character is one byte (Latin-1). This is safe, as JSON's own characters are ASCII and never
    part of a UTF-8 sequence.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._decoder = stream, json.JSONDecoder()
        self.text, self.at, self.start = stream.read(_CHUNK).decode("latin-1"), 0, 0
        if self.text.startswith("\xef\xbb\xbf"):
            self.at = 3

    @property
    def byte(self) -> int:
        return self.start + self.at

    def _more(self) -> bool:
        """Reads on, doubling the buffer while no value ends; False at the end of the file."""
        rest = self.text[self.at :]
        if len(rest) > _LARGEST:
            raise JsonDamageError(f"byte {self.byte}: a value of more than {_LARGEST >> 20} MB")
        chunk = self._stream.read(max(_CHUNK, len(rest))).decode("latin-1")
        if chunk:
            self.start, self.text, self.at = self.byte, rest + chunk, 0
        return bool(chunk)

    def next(self) -> str:
        """Moves to the next character that is not a space and returns it; "" at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def expect(self, characters: str) -> str:
        """Consumes the next character, which must be one of those given, and returns it."""
        found = self.next()
        if not found or found not in characters:
            what = f"{found!r} instead of {' or '.join(characters)}" if found else "cut off"
            raise JsonDamageError(f"byte {self.byte}: {what}")
        self.at += 1
        return found

    def value(self) -> tuple[Any, int, int]:
        """Parses the next value: (value, offset in bytes, length in bytes)."""
        self.next()
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = "Unterminated" in error.msg or error.pos > len(self.text) - _LONGEST_TOKEN
                if cut and self._more():
                    continue
                raise JsonDamageError(f"byte {self.start + error.pos}: {error.msg}") from None
            except (ValueError, RecursionError) as error:
                raise JsonDamageError(f"byte {self.byte}: {error}") from None
            # A number near the end of the buffer may continue: "-1." is taken for -1.
            near = end > len(self.text) - _LONGEST_TOKEN and self.text[end - 1] not in '"]}'
            if near and self._more():
                continue
            start, length = self.byte, end - self.at
            self.at = end
            return value, start, length


def items(stream: IO[bytes]) -> Iterator[Item]:
    """Yields the values of the outermost list or object, in order.

    Keys are decoded as UTF-8, but strings inside values as Latin-1.

    Raises:
      JsonDamageError: the outermost value is neither a list nor an object, or the file is damaged;
        values before the damage are yielded first.
    """
    text = _Text(stream)
    close = {"[": "]", "{": "}"}[text.expect("[{")]
    if text.next() != close:
        separator = ","
        while separator == ",":
            key = ""
            if close == "}":
                key, _, _ = text.value()
                if not isinstance(key, str):
                    raise JsonDamageError(f"byte {text.byte}: {key!r} instead of a key")
                text.expect(":")
            yield Item(_utf8(key), *text.value())
            separator = text.expect(f",{close}")
    else:
        text.expect(close)
    if text.next():
        raise JsonDamageError(f"byte {text.byte}: extra data after the end")


def _utf8(text: str) -> str:
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text
