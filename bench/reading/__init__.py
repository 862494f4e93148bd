"""What finished runs say beyond their accuracies: one question, one file, one table.

| question      | asks                                                                                           |
|---------------|------------------------------------------------------------------------------------------------|
| `differences` | by how much does one defense differ from every other on the same images?                       |
| `routing`     | what does a mixture's routing hide from PGD, and which expert does the work?                   |
| `published`   | how far is what was measured from what the DWF paper prints, and which radius would explain it? |
| `audit`       | where did the audit doubt a number, and was it right, by what every attack on it found?        |
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.errors import UsageError
from bench.long import Group
from bench.reading import audited, differences, published, routing
from bench.sheet import Sheet

QUESTIONS = ("differences", "routing", "published", "audit")


def read(
    question: str, found: Sequence[Group], *, compare_to: str | None = None, lines: str | None = None
) -> list[Sheet]:
    """The tables that answer a question, a list that is never empty.

    Args:
        question: one of `QUESTIONS`.
        found: what was measured.
        compare_to: the defense that `differences` compares every other with.
        lines: the dataset whose `published` numbers are meant where the images' own name has none, as with `npz:DIR`.

    Raises:
        UsageError: no such question, an option of another one, or nothing that answers it.
        UnknownName: no row of that defense.
    """
    if question not in QUESTIONS:
        raise UsageError(f"no question {question!r}; choose from {', '.join(QUESTIONS)}")
    if (compare_to is None) == (question == "differences"):
        raise UsageError("--compare-to DEFENSE belongs to differences, which need it")
    if lines is not None and question != "published":
        raise UsageError("--lines belongs to published")
    if question == "differences":
        assert compare_to is not None
        made = differences.sheets(found, compare_to)
        without = f"no run stands beside one of {compare_to} on the same images"
    elif question == "routing":
        made = routing.sheets(found)
        without = "no run of a mixture that kept what its experts did; older runs did not"
    elif question == "published":
        made = published.sheets(found, lines)
        without = (
            "no run under dwf-paper of a row that the paper prints; --lines cifar10 says whose row it is"
        )
    else:
        made = audited.sheets(found)
        without = "no finished runs"
    if not made:
        raise UsageError(f"nothing to read here: {without}")
    return made
