"""How far long work has come and how long it will take: a line that is redrawn on a terminal, a line a minute elsewhere.

A terminal that cannot redraw (`TERM=dumb`) and a CI log (`CI` is set) are no terminals. Everything is written to standard
error, so that standard output carries results alone, and in ASCII, which every log can hold.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

#: seconds between two lines where there is no terminal
EVERY = 60.0
#: seconds between two looks at the clock, for work that itself says nothing for minutes
LOOK = 10.0
#: characters of the bar
BAR = 20
#: what a line shows, in its order, and what a narrow terminal gives up first
ORDER = ("what", "bar", "count", "rate", "left", "note")
GIVEN_UP = ("bar", "rate", "note", "left", "count")


class Meter(Protocol):
    """Work under way."""

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Some more is done; `note` says how it looks."""
        ...


class Silent:
    """Says nothing."""

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Nothing to say."""


class Work:
    """How far something has come, in words.

    Args:
        what: is being done.
        total: pieces of work, `done` of them before this began.
        images: that one piece is, for the images a second; 0 where pieces are no images.
    """

    def __init__(self, what: str, total: int, done: int = 0, images: int = 1) -> None:
        self.what, self.total, self.before, self.images = what, total, done, images
        self.done: float = done
        self.note = ""
        self.started = self.advanced = time.monotonic()

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Counts."""
        self.done += amount
        self.note = note or self.note
        if amount:
            self.advanced = time.monotonic()

    def parts(self) -> dict[str, str]:
        """Everything there is to say, each part for itself; empty where it is not known yet."""
        said = {
            "what": self.what,
            # a part of an image is not done
            "count": f"{int(self.done + 1e-6)} of {self.total}",
            "rate": "",
            "left": "",
            "note": self.note,
        }
        # what an earlier run did says nothing of how quick this one is
        here, took = self.done - self.before, self.advanced - self.started
        if here > 0:
            left = took / here * (self.total - self.done) - (time.monotonic() - self.advanced)
            said["left"] = f"about {duration(max(left, 0.0))} left"
            if self.images and took > 0:
                said["rate"] = f"{speed(here * self.images / took)} images/s"
        return said

    def line(self) -> str:
        """All of it, for a log."""
        said = self.parts()
        told = [said[name] for name in ("count", "rate", "left", "note") if said[name]]
        return f"{self.what}: {', '.join(told)}"

    def fitted(self, width: int) -> str:
        """As much of it as goes into one line of a terminal that is `width` characters wide."""
        share = self.done / self.total if self.total else 1.0
        full = min(BAR, int(BAR * share))
        said = {**self.parts(), "bar": f"[{'=' * full}{' ' * (BAR - full)}]"}
        line = ""
        for given_up in range(len(GIVEN_UP) + 1):
            shown = [said[name] for name in ORDER if said[name] and name not in GIVEN_UP[:given_up]]
            line = "  ".join(shown)
            if len(line) <= width:
                break
        return line[: max(width, 0)]


class Lines:
    """A line a minute."""

    def __init__(self, work: Work) -> None:
        self.work, self.said = work, work.started
        self.lock = threading.Lock()

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Counts, and speaks when a minute is over."""
        with self.lock:
            self.work.advance(amount, note)
        self.tick()

    def tick(self) -> None:
        """Speaks when a minute is over."""
        with self.lock:
            now = time.monotonic()
            if now - self.said < EVERY:
                return
            self.said = now
            line = self.work.line()
        print(line, file=sys.stderr, flush=True)


@contextmanager
def ticking(lines: Lines) -> Iterator[Lines]:
    """Has the lines look at the clock even while the work says nothing."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK):
            lines.tick()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        over.set()
        thread.join()


@contextmanager
def progress(
    what: str, total: int, *, done: int = 0, images: int = 1, quiet: bool = False
) -> Iterator[Meter]:
    """A meter for `total` pieces of work, `done` of which were done before; one piece is so many images."""
    work = Work(what, total, done, images)
    if quiet:
        yield Silent()
    elif redraws():
        import rich.console
        import rich.progress as rp
        from rich.text import Text

        console = rich.console.Console(stderr=True)

        class Line(rp.ProgressColumn):
            def render(self, task: rp.Task) -> Text:
                # the last column is left free: some terminals wrap as soon as it is written
                return Text(work.fitted(console.width - 1), no_wrap=True, overflow="crop")

        with rp.Progress(Line(), console=console, transient=True) as bar:
            bar.add_task(what, total=total)
            yield work
    else:
        with ticking(Lines(work)) as lines:
            yield lines


def redraws() -> bool:
    """Whether standard error is a terminal that can redraw a line."""
    watched = os.environ.get("CI", "").lower() not in ("", "0", "false")
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    return sys.stderr.isatty() and not watched and not dumb


def speed(per_second: float) -> str:
    """A rate with no more digits than it is worth."""
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2g}"


def duration(seconds: float) -> str:
    """Seconds in the unit a person would use."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 3600 * 48 else f"{seconds / 86400:.1f} days"
