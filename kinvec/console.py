"""What a person sees: while waiting, one progress bar with an ETA on stderr; of results, the form of a table.

What is shown may come from a stranger's file, and holds no secret of the user's: see `contracts.presentable`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kinvec.contracts import presentable

if TYPE_CHECKING:
    from rich.table import Table

QUIET_SECONDS = 15.0  # without a terminal (a log file, CI) a line at most this often
silent = False  # of several processes one speaks


def say(message: str) -> None:
    """One line for the person waiting, on stderr."""
    if not silent:
        print(presentable(message), file=sys.stderr, flush=True)


def plain_table(*columns: str, left: Collection[int] = (0,)) -> Table:
    """An empty table without lines, as every verb prints one; columns are set right but for those in `left`."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, name in enumerate(columns):
        made.add_column(name, justify="left" if place in left else "right", no_wrap=True)
    return made


class Progress:
    """`advance(n)` moves it; `note` is the short text behind the bar (loss, tokens/s)."""

    def __init__(self, label: str, total: int, bar: Any = None, task: Any = None) -> None:
        self.label, self.total, self.done, self.note = label, total, 0, ""
        self._bar, self._task = bar, task
        self._begun = self._said = time.monotonic()

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        self.note = note or self.note
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, note=self.note)
        elif time.monotonic() - self._said > QUIET_SECONDS:
            self._said = time.monotonic()
            left = (self._said - self._begun) / max(self.done, 1) * (self.total - self.done)
            say(f"{self.label}: {self.done:,}/{self.total:,}, {clock(left)} left {self.note}".rstrip())


def clock(seconds: float) -> str:
    """Seconds for a person, with minutes and hours."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


@contextmanager
def progress(label: str, total: int, start: int = 0) -> Iterator[Progress]:
    """A bar for `total` units, of which `start` are done already; plain, rare lines where stderr is no terminal."""
    if silent or not sys.stderr.isatty():
        shown = Progress(label, total)
        shown.done = start
        yield shown
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True), transient=True) as bar:
        shown = Progress(label, total, bar, bar.add_task(label, total=total, completed=start, note=""))
        shown.done = start
        yield shown
