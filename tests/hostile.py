"""Inputs that somebody broke, by accident or on purpose, and what may come of them: success, or a mistake told in one line.

`mutants` makes them from good ones: bytes flipped, cut, doubled, moved, and replaced by what parsers stumble over. They are a
function of the seed alone, so that one that breaks something can be made again.
"""

import contextlib
import faulthandler
import io
import random
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence

from bench.cli import main
from bench.errors import BenchError

#: what parsers stumble over
TOKENS = [
    *(
        b"null",
        b"NaN",
        b"-1",
        b"1e999",
        b"9" * 400,
        b"18446744073709551616",
        b"true",
        b'""',
        b"[]",
        b"{}",
        b"0x10",
        b"\0",
    ),
    *(
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"\\ud800",
        b"../../../etc/passwd",
        b"<script>alert(1)</script>",
        b"\\input{/etc/passwd}",
    ),
    *(
        b"[" * 3000,
        b'{"a":' * 3000,
        b"a.b=" * 50,
        b"1979-05-27T07:32:00Z",
        b"inf",
        b"%s%n",
        b"$(id)",
        b"\r\n",
        b"'''",
        b'"""',
    ),
]


def mutants(seeds: Sequence[bytes], count: int, seed: int) -> Iterator[bytes]:
    """So many broken inputs, each from one of the seeds by one to four changes."""
    rng = random.Random(seed)
    for _ in range(count):
        content = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            _change(content, rng, seeds)
        yield bytes(content)


def _change(content: bytearray, rng: random.Random, seeds: Sequence[bytes]) -> None:
    size = len(content)
    # heads of files decide how the rest is read
    place = rng.randrange(min(size, 200) + 1) if rng.random() < 0.4 else rng.randrange(size + 1)
    length = rng.choice((1, 1, 2, 4, 8, 32, 200))
    kind = rng.randrange(9)
    if kind == 0 and size:
        content[min(place, size - 1)] ^= 1 << rng.randrange(8)
    elif kind == 1:
        content[place : place + length] = rng.randbytes(length)
    elif kind == 2:
        del content[place : place + length]
    elif kind == 3:
        del content[place:]
    elif kind == 4:
        content[place : place + length] = content[place : place + length] * rng.choice((2, 3, 40))
    elif kind == 5:
        content[place : place + rng.choice((0, length))] = rng.choice(TOKENS)
    elif kind == 6:
        other = rng.choice(seeds)
        cut = rng.randrange(len(other) + 1)
        content[place : place + length] = other[cut : cut + rng.choice((length, 400))]
    elif kind == 7:
        value = rng.choice((0, 1, -1, 2**31 - 1, 2**31, 2**62, -(2**63)))
        content[place : place + 8] = (value % 2**64).to_bytes(8, rng.choice(("little", "big")))
    else:
        swap = content[place : place + length]
        del content[place : place + length]
        other_place = rng.randrange(len(content) + 1)
        content[other_place:other_place] = swap


def told(action: Callable[[], object]) -> str | None:
    """None where it succeeds, the line where it says that something is wrong; anything else is a failure of the test."""
    try:
        action()
    except BenchError as error:
        assert error.exit_code == 2, error
        assert str(error).strip()
        return str(error)
    return None


def survives(
    action: Callable[[bytes], object], inputs: Iterator[bytes], patience: float = 20.0
) -> tuple[int, int]:
    """How many of the inputs were taken and how many refused.

    An input that ends otherwise fails the test and is shown; one that takes longer than `patience` seconds ends the process
    with a traceback.
    """
    taken = refused = 0
    for content in inputs:
        faulthandler.dump_traceback_later(patience, exit=True, file=sys.__stderr__)
        try:
            said = told(lambda content=content: action(content))
        except BaseException:
            raise AssertionError(
                f"input {taken + refused} ends in a traceback: {content[:300]!r} ({len(content)} bytes)\n{traceback.format_exc()[-3000:]}"
            ) from None
        finally:
            faulthandler.cancel_dump_traceback_later()
        taken, refused = taken + (said is None), refused + (said is not None)
    return taken, refused


def command(*words: str) -> tuple[int, str, str]:
    """What `bench WORDS` exits with and prints, in this process."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["bench", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        return int(end.code or 0), out.getvalue(), err.getvalue()
    finally:
        sys.argv = before
    raise AssertionError("main returned")
