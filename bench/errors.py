"""What can go wrong, as one tree.

    BenchError                 the user's mistake or a run that cannot be believed: one line, exit code 2
    ├── UsageError             an argument, a setting or a file of the user's is not what it must be
    │   ├── UnknownName        no such defense, dataset, protocol or attack; names the nearest
    │   ├── DuplicateName      one name registered twice
    │   ├── DataError          a dataset that is missing, damaged or of the wrong form
    │   ├── CheckpointError    weights that cannot be read or belong to another architecture
    │   ├── ProtocolError      a protocol file that does not say what to do
    │   └── PluginError        a user's file that fails at import
    ├── VoidRun                a run that must not become a number: NaN, crash, illegal perturbation
    │   ├── NonFinite          a model or a gradient that is NaN or infinite
    │   └── AttackCrash        an attack that raised; exit code 1
    ├── Interrupted            stopped by the user; state is kept, exit code 130
    └── Elsewhere              another process of this command failed, and has said why; nothing more to say, its exit code

Anything else that escapes is a bug of ours: traceback, exit code 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class BenchError(Exception):
    """Says what was given, what was expected and what to do, in one line."""

    exit_code = 2


class UsageError(BenchError):
    """An argument, a setting or a file of the user's is not what it must be."""


def nearest(given: str, known: Iterable[str]) -> str | None:
    """The name that was probably meant; None where none is near."""
    near = difflib.get_close_matches(given, sorted(known), n=1, cutoff=0.5)
    return near[0] if near else None


def meant(given: str, known: Iterable[str]) -> str:
    """`; did you mean …?`, to end a sentence that has told all there is; nothing where no name is near."""
    near = nearest(given, known)
    return f"; did you mean {near!r}?" if near else ""


class UnknownName(UsageError):
    """Nothing is registered under this name."""

    def __init__(self, kind: str, given: str, known: Iterable[str], hint: str = "") -> None:
        known = sorted(known)
        near = nearest(given, known)
        advice = f"did you mean {near!r}?" if near else f"known: {', '.join(known)}"
        super().__init__(f"no {kind} named {given!r}; {advice}{hint}")


class DuplicateName(UsageError):
    """Two objects claim one name."""


class DataError(UsageError):
    """A dataset is missing, damaged or of the wrong form."""


class CheckpointError(UsageError):
    """Weights cannot be read, or belong to another architecture."""


class ProtocolError(UsageError):
    """A protocol file does not say what to do."""


class PluginError(UsageError):
    """A user's plugin file fails at import."""


class VoidRun(BenchError):
    """A run that must not become a number.

    `rows` are the positions in the batch that show it, if it is known; `code` names the cause, as findings do.
    """

    def __init__(self, message: str, rows: Sequence[int] = (), *, code: str = "void") -> None:
        super().__init__(message)
        self.rows = list(rows)
        self.code = code


class NonFinite(VoidRun):
    """Logits or gradients are NaN or infinite."""

    def __init__(self, what: str, rows: Sequence[int]) -> None:
        super().__init__(
            f"{what} are NaN or infinite for {len(rows)} image(s) of the batch", rows, code="non-finite"
        )


class AttackCrash(VoidRun):
    """An attack raised something: a bug of ours or of a library's."""

    exit_code = 1

    def __init__(self, message: str, rows: Sequence[int] = ()) -> None:
        super().__init__(message, rows, code="attack-crash")


class Interrupted(BenchError):
    """Stopped by the user; what was finished is kept."""

    exit_code = 130


class Elsewhere(BenchError):
    """Another process of the same command has failed and said why: an empty line, and the same exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code
