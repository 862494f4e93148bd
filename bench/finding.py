"""What speaks against believing a number: findings, and the verdict they come to.

| severity  | what it does                                                              |
|-----------|---------------------------------------------------------------------------|
| `blocks`  | the run is `void`: tables print no number for it                          |
| `warns`   | the run is `suspect`: its number is printed with a mark and the evidence  |
| `informs` | something a reader should know; the run stays `credible`                  |
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


def merged(found: Sequence[Finding]) -> list[Finding]:
    """One finding for each code: the worst, with all that was seen, the worst first."""
    order = {"blocks": 0, "warns": 1, "informs": 2}
    by_code: dict[str, list[Finding]] = {}
    for finding in found:
        by_code.setdefault(finding.code, []).append(finding)
    worst = []
    for same in by_code.values():
        same.sort(key=lambda finding: order[finding.severity])
        evidence = same[0].evidence
        for finding in same[1:]:
            evidence += "" if finding.evidence in evidence else f"; {finding.evidence}"
        worst.append(same[0].model_copy(update={"evidence": evidence}))
    return sorted(worst, key=lambda finding: order[finding.severity])
