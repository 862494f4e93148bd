"""Long work says how far it is: a line a minute, on standard error, with an estimate that holds."""

import io
import sys

import pytest

from bench import progress as module
from bench.progress import Silent, duration, progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on when it is told to."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(module.time, "monotonic", lambda: Clock.now)
    return Clock


def work(clock, seconds, **options):
    with progress("dwf: experts", 100, **options) as meter:
        for pause in seconds:
            clock.now += pause
            meter.advance(10, note="loss 0.5")


def test_nothing_is_said_within_the_first_minute(clock, capsys):
    work(clock, [59.9])
    assert capsys.readouterr() == ("", "")


def test_a_line_is_said_when_a_minute_is_over_and_then_every_minute(clock, capsys):
    work(clock, [20] * 7)
    assert capsys.readouterr().err.splitlines() == [
        "dwf: experts: 30 of 100, about 2 min left, loss 0.5",
        "dwf: experts: 60 of 100, about 80 s left, loss 0.5",
    ]


def test_nothing_is_written_to_standard_output(clock, capsys):
    work(clock, [61] * 3)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 3


def test_what_was_done_before_counts_as_done_but_not_for_the_estimate(clock, capsys):
    work(clock, [60], done=80)
    assert capsys.readouterr().err == "dwf: experts: 90 of 100, about 60 s left, loss 0.5\n"


def test_a_minute_without_any_progress_gives_no_estimate(clock, capsys):
    with progress("work", 3) as meter:
        clock.now += 61
        meter.advance(0)
    assert capsys.readouterr().err == "work: 0 of 3\n"


def test_there_is_nothing_left_when_all_is_done(clock, capsys):
    with progress("work", 1) as meter:
        clock.now += 61
        meter.advance()
    assert capsys.readouterr().err == "work: 1 of 1, about 0 s left\n"


def test_quiet_is_silent(clock, capsys):
    work(clock, [61] * 3, quiet=True)
    assert capsys.readouterr() == ("", "")
    with progress("work", 1, quiet=True) as meter:
        assert isinstance(meter, Silent)


def test_on_a_terminal_a_bar_is_drawn_on_standard_error_and_wiped(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress("dwf: experts", 100, done=40) as meter:
        meter.advance(10, note="loss 0.5")
    drawn = screen.getvalue()
    assert "dwf: experts" in drawn and "50/100" in drawn and "loss 0.5" in drawn
    assert drawn.endswith("\x1b[2K")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (89, "89 s"),
        (90, "2 min"),
        (5399, "90 min"),
        (5400, "1.5 h"),
        (86400, "24.0 h"),
        (172800, "2.0 days"),
    ],
)
def test_a_duration_is_said_as_people_do(seconds, said):
    assert duration(seconds) == said
