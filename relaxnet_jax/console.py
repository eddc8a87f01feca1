"""Output of the commands: results to stdout, remarks and progress to stderr."""

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

WIDE = 200  # columns of tables in a file or pipe, where rich's default would be too narrow
PERIOD = 30.0  # s, between progress lines in a log
COMPILING = "compiling (first time for this size)…"


def q(path: str | Path) -> str:
    """The path quoted for a shell."""
    return shlex.quote(str(path))


def printable(text: str) -> str:
    """The text with what UTF-8 cannot encode, such as bytes in file names, escaped as ``\\xfc``."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a surrogate pair, which does not occur in file names
        return text.encode("utf-8", "backslashreplace").decode("utf-8")


def say(line: str) -> None:
    """Prints a line of the result to stdout."""
    print(printable(line), flush=True)


def note(line: str) -> None:
    """Prints a remark to stderr."""
    print(printable(line), file=sys.stderr, flush=True)


def result_console() -> Console:
    """Console for tables on stdout, as wide as the terminal, or `WIDE` without one (pipes, SLURM logs)."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDE)


@contextmanager
def status(text: str) -> Iterator[None]:
    """Shows a spinner during work of unknown length; nothing if stderr is not a terminal."""
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextmanager
def bar(text: str, total: int, first: str = "") -> Iterator[Callable[[int], None]]:
    """Shows a progress bar on stderr; yields a function to call with the number done.

    If stderr is not a terminal, a line every `PERIOD` seconds says how many are done and how long
    the rest will take.

    Args:
      text: what is counted.
      total: number to do.
      first: shown instead of ``text`` until the first is done, if that takes longer than the others.
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
    """The function that `bar` yields if stderr is not a terminal: it prints lines."""
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
    """Shows a progress bar whose total is known only later; yields a function of (done, total)."""
    with ExitStack() as stack:
        advances: list[Callable[[int], None]] = []

        def progress(done: int, total: int) -> None:
            if not advances:
                advances.append(stack.enter_context(bar(text, total)))
            advances[0](done)

        yield progress
