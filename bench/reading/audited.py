"""Where the audit doubted a number, and whether it was right, by what every attack on the same network found.

A run's number is right as long as nothing breaks more images in the same ball. So each run is held against all runs of the same
weights on the images that they share: what fell there and had held here is what this run overlooked.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bench.block import doubt
from bench.finding import merged
from bench.long import Group, radius
from bench.sheet import Sheet
from bench.stats import wilson

#: the share of images that a believed number may overlook before it counts as refuted: the lower end of its interval
WRONG = 0.01


def sheets(found: Sequence[Group]) -> list[Sheet]:
    """One table for each dataset; a row for each run."""
    made = []
    for dataset in dict.fromkeys(group.dataset for group in found):
        rows = [_row(group, found) for group in found if group.dataset == dataset]
        made.append(Sheet("audit", _caption(dataset), HEADINGS, tuple(rows)))
    return made


HEADINGS = (
    "run",
    "protocol",
    "radius",
    "RA",
    "verdict",
    "what warned",
    "overlooked",
    "was the verdict right?",
)


def _caption(dataset: str) -> str:
    return (
        f"{dataset}: RA: the worst case over the run's attacks at the radius that it shares with most other runs of the same weights, "
        "else at its own largest, in %; of a random model the images right in more draws than not. Overlooked: images that held in this run and fell at that radius, or a smaller one, in another, of the images both have; "
        "95 % Wilson interval. Right: a suspect number that was overlooked much, or a credible one that was not (the interval's "
        f"lower end above {100 * WRONG:g} % or not). Open: no other run, or a suspect number that nothing has refuted yet."
    )


def _row(group: Group, found: Sequence[Group]) -> tuple[str, ...]:
    record = group.records[0]
    others = [
        other
        for other in found
        if other is not group
        and other.records[0].asked.model_hash == record.asked.model_hash
        and other.records[0].asked.data_hash == record.asked.data_hash
    ]
    eps = _shared_radius(group, others)
    own = _held(group, eps)
    findings = merged([finding for one in group.records for finding in one.findings])
    said = "; ".join(f.code for f in findings if f.severity != "informs") or "–"
    missed, n = 0.0, 0
    beaten = np.ones(len(group.images), dtype=bool)
    seen = np.zeros(len(group.images), dtype=bool)
    for other in others:
        at = np.isin(group.images, other.images)
        place = np.searchsorted(other.images, group.images[at])
        beaten[at] &= _held(other, eps)[place]
        seen |= at
    if others and seen.any():
        n = int(seen.sum())
        missed = float((own & ~beaten)[seen].sum())
    verdict = doubt(group) or "credible"
    if not n:
        overlooked, right = "–", "open"
    else:
        low, high = (100 * float(end) for end in wilson(missed, n))
        overlooked = f"{missed:.0f} of {n}: {100 * missed / n:.1f} [{low:.1f}, {high:.1f}]"
        refuted = low > 100 * WRONG
        right = ("yes" if refuted else "open") if verdict != "credible" else ("no" if refuted else "yes")
    return (
        group.label,
        group.protocol,
        "–" if eps is None else radius(eps),
        f"{100 * own.mean():.1f}",
        verdict,
        said,
        overlooked,
        right,
    )


def _shared_radius(group: Group, others: Sequence[Group]) -> float | None:
    """The radius at which most others looked too, the largest of several; the run's own largest where none did."""
    own = {column.epsilon for column in group.columns if column.epsilon is not None}
    told = {eps: sum(any(c.epsilon == eps for c in other.columns) for other in others) for eps in own}
    return max(told, key=lambda eps: (told[eps], eps), default=None)


def _held(group: Group, eps: float | None) -> NDArray[np.bool_]:
    """Whether each image held against every attack of the first record within this radius, clean images included, `(n,)`."""
    diagnostic = {column.name for column in group.records[0].columns if column.diagnostic}
    names = [column.name for column in group.columns]
    kept = [
        i
        for i, column in enumerate(group.columns[: len(group.records[0].columns)])
        if names[i] not in diagnostic
        and (column.epsilon is None or (eps is not None and column.epsilon <= eps * (1 + 1e-9)))
    ]
    held: NDArray[np.bool_] = np.all(group.shares[0][kept] > 0.5, axis=0)
    return held
