"""The engine: a check is a function with a name, a threshold, a severity and a sentence of advice.

    @check("zero-gradient", rule="M13", threshold=0.01, severity="warns", advice="…")
    def zero_gradient(subject: Subject, threshold: float) -> Evidence:
        ...

The function looks at its subject (a model, a run's outcomes, a table) and returns what it saw as a sentence with numbers,
or None where there is nothing to say. It may return `(sentence, severity)` where what it saw is worse, or less, than usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from bench.finding import Finding, Severity

S = TypeVar("S")
#: what a check saw: nothing, a sentence, or a sentence and how bad that is
Evidence: TypeAlias = "str | tuple[str, Severity] | None"


@dataclass(frozen=True)
class Check(Generic[S]):
    """One check; calling it gives a finding or None."""

    code: str
    rule: str
    """its letter and number in the list of checks in docs/checks.md"""
    threshold: float
    severity: Severity
    advice: str
    about: str
    """the first line of the function's docstring: when it fires"""
    look: Callable[[S, float], Evidence]

    def __call__(self, subject: S) -> Finding | None:
        """The finding, if there is one."""
        seen = self.look(subject, self.threshold)
        if seen is None:
            return None
        evidence, severity = (seen, self.severity) if isinstance(seen, str) else seen
        return Finding(code=self.code, severity=severity, evidence=evidence, advice=self.advice)


def check(
    code: str, *, rule: str, severity: Severity, advice: str, threshold: float = 0.0
) -> Callable[[Callable[[S, float], Evidence]], Check[S]]:
    """Makes a check of the decorated function, whose docstring's first line says when it fires."""

    def made(look: Callable[[S, float], Evidence]) -> Check[S]:
        about = (look.__doc__ or "").strip().split("\n")[0]
        assert about, f"the check {code} must say in its docstring when it fires"
        return Check(code, rule, threshold, severity, advice, about, look)

    return made


def findings(checks: Sequence[Check[S]], subject: S) -> list[Finding]:
    """What these checks find, in their order."""
    found: Iterable[Finding | None] = (one(subject) for one in checks)
    return [finding for finding in found if finding is not None]
