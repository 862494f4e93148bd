"""Long work says how far it is: a line a minute, on standard error, with an estimate that holds."""

import io
import re
import sys
import threading

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
        "dwf: experts: 30 of 100, 0.5 images/s, about 2 min left, loss 0.5",
        "dwf: experts: 60 of 100, 0.5 images/s, about 80 s left, loss 0.5",
    ]


def test_nothing_is_written_to_standard_output(clock, capsys):
    work(clock, [61] * 3)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 3


def test_what_was_done_before_counts_as_done_but_not_for_the_estimate(clock, capsys):
    work(clock, [60], done=80)
    assert capsys.readouterr().err == "dwf: experts: 90 of 100, 0.17 images/s, about 60 s left, loss 0.5\n"


def test_a_minute_without_any_progress_gives_no_estimate(clock, capsys):
    with progress("work", 3) as meter:
        clock.now += 61
        meter.advance(0)
    assert capsys.readouterr().err == "work: 0 of 3\n"


def test_there_is_nothing_left_when_all_is_done(clock, capsys):
    with progress("work", 1) as meter:
        clock.now += 61
        meter.advance()
    assert capsys.readouterr().err == "work: 1 of 1, 0.016 images/s, about 0 s left\n"


def test_quiet_is_silent(clock, capsys):
    work(clock, [61] * 3, quiet=True)
    assert capsys.readouterr() == ("", "")
    with progress("work", 1, quiet=True) as meter:
        assert isinstance(meter, Silent)


def test_a_piece_of_many_images_counts_as_many_for_the_rate(clock, capsys):
    work(clock, [60], images=128)
    assert ", 21 images/s, " in capsys.readouterr().err


def test_part_of_an_image_is_not_done(clock, capsys):
    with progress("work", 4) as meter:
        clock.now += 61
        meter.advance(1.75)
    assert capsys.readouterr().err.startswith("work: 1 of 4, ")


def test_time_left_goes_down_while_nothing_is_done(clock):
    some = module.Work("work", 3)
    clock.now += 10
    some.advance()
    clock.now += 5
    assert some.parts()["left"] == "about 15 s left"


def test_work_that_says_nothing_for_minutes_still_has_its_line(clock, capsys, monkeypatch):
    monkeypatch.setattr(module, "LOOK", 0.001)
    with progress("work", 3) as meter:
        clock.now += 61
        wait_for(lambda: meter.said == clock.now)
    assert capsys.readouterr().err == "work: 0 of 3\n"


def wait_for(happened):
    pause = threading.Event()
    for _ in range(5000):
        if happened():
            return
        pause.wait(0.001)
    raise AssertionError("it did not happen")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal(monkeypatch, **environment):
    """A terminal in place of standard error; not by a fixture, since pytest changes it once more before the test."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    for name in ("CI", "TERM", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", "COLUMNS": "120", **environment}.items():
        monkeypatch.setenv(name, value)
    return screen


def test_on_a_terminal_a_line_is_drawn_on_standard_error_and_wiped(monkeypatch, capsys):
    screen = terminal(monkeypatch)
    with progress("dwf: experts", 100, done=40) as meter:
        meter.advance(10, note="loss 0.5")
    drawn = screen.getvalue()
    assert "dwf: experts" in drawn and "50 of 100" in drawn and "loss 0.5" in drawn and "[=====" in drawn
    assert drawn.endswith("\x1b[2K")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("width", [8, 20, 40, 60, 80, 120])
def test_a_narrow_terminal_gets_one_line_that_fits(monkeypatch, width):
    screen = terminal(monkeypatch, COLUMNS=str(width))
    with progress("attacking dwf, standard", 100) as meter:
        meter.advance(10, note="PGD-100, 5 starts, margin loss, RA so far 50.0 % of 10")
    drawn = screen.getvalue()
    # the one that ends the last drawing, before that is wiped
    assert drawn.count("\n") == 1
    shown = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in re.split("[\r\n]", drawn)]
    assert all(len(line) < width for line in shown)
    assert width < 24 or any(line.startswith("attacking dwf, standard") for line in shown)


def test_what_is_done_and_how_much_of_it_are_given_up_last(clock):
    some = module.Work("attacking dwf", 100)
    clock.now += 2
    some.advance(10, note="FGSM")
    assert (
        some.fitted(200)
        == "attacking dwf  [==                  ]  10 of 100  5 images/s  about 18 s left  FGSM"
    )
    assert some.fitted(60) == "attacking dwf  10 of 100  5 images/s  about 18 s left  FGSM"
    assert some.fitted(48) == "attacking dwf  10 of 100  about 18 s left  FGSM"
    assert some.fitted(41) == "attacking dwf  10 of 100  about 18 s left"
    assert some.fitted(40) == "attacking dwf  10 of 100"
    assert some.fitted(20) == "attacking dwf" and some.fitted(6) == "attack"


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("CI", "true"), ("CI", "1")])
def test_a_ci_log_and_a_dumb_terminal_get_lines_without_control_characters(clock, monkeypatch, name, value):
    screen = terminal(monkeypatch, **{name: value})
    work(clock, [61])
    assert screen.getvalue() == "dwf: experts: 10 of 100, 0.16 images/s, about 9 min left, loss 0.5\n"


def test_a_log_in_ascii_holds_every_line(monkeypatch, clock):
    log = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", log)
    work(clock, [61])
    log.flush()
    assert log.buffer.getvalue().startswith(b"dwf: experts: 10 of 100")


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
