"""The findings of a kept run, and how they are shown; no model is needed, nor torch."""

from __future__ import annotations

import json
from collections.abc import Sequence

from bench.audit.outcomes import Outcomes, outcome_findings
from bench.errors import UsageError
from bench.finding import Finding, Verdict, merged
from bench.record import Record


def again(record: Record) -> list[Finding]:
    """A kept run's findings: those it was stored with, and what today's checks see in its outcomes.

    Raises:
        UsageError: the record does not say what was asked.
    """
    outcomes = record.outcomes()
    try:
        seen = Outcomes.read(outcomes, record)
    except (KeyError, ValueError, TypeError) as error:
        raise UsageError(
            f"{record._folder} does not say all of its protocol ({error}); delete it and run again"
        ) from None
    return merged([*record.findings, *outcome_findings(seen)])


def as_json(findings: Sequence[Finding], verdict: Verdict) -> str:
    """`{"verdict": …, "findings": […]}`, indented."""
    return json.dumps(
        {"verdict": verdict, "findings": [finding.model_dump() for finding in findings]},
        indent=2,
        ensure_ascii=False,
    )


def as_text(findings: Sequence[Finding], verdict: Verdict, what: str) -> str:
    """The verdict in a line, and two for every finding."""
    lines = [f"{what}: {verdict}"]
    for finding in findings:
        lines += [f"  {finding.severity:7} {finding.code}: {finding.evidence}", f"          {finding.advice}"]
    return "\n".join(lines)
