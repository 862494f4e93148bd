"""How far long work has come and how long it will take: a bar on a terminal, a line a minute elsewhere.

Everything is written to standard error, so that standard output carries results alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

#: seconds between two lines where there is no terminal
EVERY = 60.0


class Meter(Protocol):
    """Work under way."""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Some more is done; `note` says how it looks."""
        ...


class Silent:
    """Says nothing."""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Nothing to say."""


class Lines:
    """A line a minute."""

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self.what, self.total, self.before, self.done = what, total, done, done
        self.started = self.said = time.monotonic()

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Counts, and speaks when a minute is over."""
        self.done += amount
        now = time.monotonic()
        if now - self.said < EVERY:
            return
        self.said = now
        said = f"{self.what}: {self.done} of {self.total}"
        # what an earlier run did says nothing of how quick this one is
        if self.done > self.before:
            left = (now - self.started) / (self.done - self.before) * (self.total - self.done)
            said += f", about {duration(left)} left"
        print(f"{said}, {note}" if note else said, file=sys.stderr, flush=True)


@contextmanager
def progress(what: str, total: int, *, done: int = 0, quiet: bool = False) -> Iterator[Meter]:
    """A meter for `total` pieces of work, `done` of which were done before."""
    if quiet:
        yield Silent()
    elif sys.stderr.isatty():
        import rich.console
        import rich.progress as rp

        columns = (
            rp.TextColumn("{task.description}"),
            rp.BarColumn(bar_width=24),
            rp.MofNCompleteColumn(),
            rp.TimeElapsedColumn(),
            rp.TextColumn("left"),
            rp.TimeRemainingColumn(),
            rp.TextColumn("{task.fields[note]}"),
        )
        with rp.Progress(*columns, console=rich.console.Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total, completed=done, note="")

            class Bar:
                def advance(self, amount: int = 1, note: str = "") -> None:
                    bar.update(task, advance=amount)
                    if note:
                        bar.update(task, note=note)

            yield Bar()
    else:
        yield Lines(what, total, done)


def duration(seconds: float) -> str:
    """Seconds in the unit a person would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 3600 * 48 else f"{seconds / 86400:.1f} days"
