"""What commands write: results to stdout, remarks and progress to stderr."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 200  # columns: a file or a pipe is as wide as tables need, not as wide as rich's default
PERIOD = 30.0  # s, between lines on progress in a log
COMPILING = "compiling (first time for this size)…"


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


def result_console() -> Console:
    """For tables on stdout: as wide as the terminal, `WIDE` where there is none (pipes, SLURM logs)."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDE)


@contextmanager
def status(text: str) -> Iterator[None]:
    """A spinner while something of unknown length happens; nothing where stderr is no terminal."""
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextmanager
def bar(text: str, total: int, first: str = "") -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr; yields a function to call with the number done. Where stderr is no
    terminal, a line every `PERIOD` seconds says how many are done, and how long the others take.

    Args:
      first: in place of the text until something is done, if that takes longer than the rest.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(text, total)
        return
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(first or text, total=total)
        yield lambda done: bar.update(
            task, completed=done, description=text if done else first or text
        )


def _lines(text: str, total: int) -> Callable[[int], None]:
    """What `bar` yields for a log."""
    begin = last = time.monotonic()

    def advance(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if 0 < done < total and now - last >= PERIOD:
            last = now
            left = (now - begin) / done * (total - done) / 60
            note(f"{done}/{total} {text}, {left:.{int(left < 10)}f} min left")

    return advance


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
