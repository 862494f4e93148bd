"""What speaks against believing a number: findings, and the verdict they come to.

| severity  | what it does                                                              |
|-----------|---------------------------------------------------------------------------|
| `blocks`  | the run is `void`: tables print no number for it                          |
| `warns`   | the run is `suspect`: its number is printed with a mark and the evidence  |
| `informs` | something a reader should know; the run stays `credible`                  |
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict

Severity = Literal["blocks", "warns", "informs"]
Verdict = Literal["credible", "suspect", "void"]


class Finding(BaseModel):
    """One thing that was found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    code: str
    """the check's name, such as `zero-gradient`"""
    severity: Severity
    evidence: str
    """what was seen, with the numbers"""
    advice: str
    """what to do about it"""

    def __str__(self) -> str:
        return f"{self.code}: {self.evidence}"


def verdict(findings: Iterable[Finding]) -> Verdict:
    """What the findings come to: the worst of them decides."""
    severities = {finding.severity for finding in findings}
    return "void" if "blocks" in severities else "suspect" if "warns" in severities else "credible"
