"""What commands write: results to stdout, remarks and progress to stderr."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path


def q(path: str | Path) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))


def printable(text: str) -> str:
    """Text that UTF-8 can hold: bytes of a file's name that it cannot come as ``\\xfc``."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a character, which no file name gives
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


def say(line: str) -> None:
    """A line of the result."""
    print(printable(line), flush=True)


def note(line: str) -> None:
    """A remark."""
    print(printable(line), file=sys.stderr, flush=True)


@contextmanager
def status(text: str) -> Iterator[None]:
    """A spinner while something of unknown length happens; nothing where stderr is no terminal."""
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextmanager
def bar(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr; yields a function to call with the number done."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.update(task, completed=done)


@contextmanager
def lazy_bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar whose total is known only later; yields a function of (done, total)."""
    with ExitStack() as stack:
        advances: list[Callable[[int], None]] = []

        def progress(done: int, total: int) -> None:
            if not advances:
                advances.append(stack.enter_context(bar(text, total)))
            advances[0](done)

        yield progress
