"""By how much one defense differs from every other on the same images, with an interval, and whether that can be chance.

The interval is that of Bonett and Price (Statistics in Medicine 2012) for a difference of paired shares: Wald's, after one image
more has been added for which only the first holds, and one for which only the second does. Of random models an image's
difference is one of shares of draws, and the same is done. The test is McNemar's, exact, with Holm's correction over the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bench.block import doubt, together
from bench.compare import named, untestable
from bench.errors import UnknownName
from bench.long import WORST_CASE, Group, Measured
from bench.sheet import Sheet
from bench.stats import holm, mcnemar
from bench.typeset import DIFFERS

#: what is compared, besides clean images and the worst case
HEADLINES = ("ms-pgd", "autoattack", "aa-like")
LEVEL = 0.05


def sheets(found: Sequence[Group], compare_to: str) -> list[Sheet]:
    """A table for each dataset and protocol that has the defense and another, each compared on the images that both have.

    Raises:
        UnknownName: no row of that defense.
    """
    if not named(found, compare_to):
        raise UnknownName("defense", compare_to, {group.label for group in found}, " (in these runs)")
    made = []
    for alike in together(found, same_images=False):
        for one in named(alike, compare_to):
            pairs = [
                (restricted(one, group.images), restricted(group, one.images))
                for group in alike
                if network(group) != network(one)
            ]
            pairs = [(a, b) for a, b in pairs if len(a.images) and not untestable(a, b)]
            if pairs:
                made.append(_sheet(pairs))
    return made


def network(group: Group) -> tuple[str, str]:
    """What tells one network from another, whatever it was asked."""
    asked = group.records[0].asked
    return asked.defense, asked.model_hash


def restricted(group: Group, images: NDArray[np.int64]) -> Group:
    """The group's outcomes on those of its images that are among these; its columns still tell of all."""
    own = np.isin(group.images, images)
    return replace(group, images=group.images[own], shares=tuple(matrix[:, own] for matrix in group.shares))


def difference(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, float, float]:
    """How much larger the mean of `a` is than that of `b`, paired, and the ends of its 95 % interval; all in [-1,1].

    Args:
        a, b: of each image whether a defense holds, or in which share of draws, `(n,)`.
    """
    d = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    padded = np.concatenate([d, [1.0, -1.0]])
    reach = 1.959964 * padded.std() / len(padded) ** 0.5
    middle = float(padded.mean())
    return float(d.mean()), max(-1.0, middle - reach), min(1.0, middle + reach)


def compared(alike: Sequence[Group]) -> list[Measured]:
    """The columns that are worth comparing: clean, the headlines, and the worst case where it is one of one radius."""
    first = alike[0]
    radii = {column.epsilon for column in first.columns if column.epsilon is not None}
    return [
        column
        for column in first.columns
        if all(group.column(column.name) is not None for group in alike)
        and (column.attack in ("clean", *HEADLINES) or (column.name == WORST_CASE and len(radii) == 1))
        and column.part_of is None
    ]


def held(group: Group, name: str) -> NDArray[np.float64]:
    """Whether each image held in a column, or in which share of draws, `(n,)`."""
    found: NDArray[np.float64] = group.shares[0][[column.name for column in group.columns].index(name)]
    return found


def _sheet(pairs: Sequence[tuple[Group, Group]]) -> Sheet:
    one = pairs[0][0]
    columns = compared([one, *(group for _, group in pairs)])
    places = [(own, group, column) for own, group in pairs for column in columns]
    p = [mcnemar(own.outcomes(column.name), group.outcomes(column.name)) for own, group, column in places]
    adjusted = dict(zip([(id(g), c.name) for _, g, c in places], holm(p), strict=True))
    several = len({len(group.images) for _, group in pairs}) > 1

    def cell(one: Group, group: Group, column: Measured) -> str:
        value, low, high = difference(held(one, column.name), held(group, column.name))
        mark = DIFFERS if adjusted[id(group), column.name] < LEVEL else ""
        return f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]{mark}"

    rows = [
        (
            f"{group.label} ({doubt(group)})" if doubt(group) else group.label,
            *((f"{len(group.images)}",) if several else ()),
            *(cell(own, group, column) for column in columns),
        )
        for own, group in pairs
    ]
    same = "the n images that both were asked about" if several else f"the same {len(one.images)} images"
    caption = (
        f"{one.dataset}, protocol {one.protocol}: how many points {one.label} is above each row, on {same}; above 0 "
        f"{one.label} is the better. In brackets the 95 % interval (Bonett and Price). {DIFFERS}: it differs (McNemar's exact test, "
        f"Holm over the {len(places)} differences of this table, {100 * LEVEL:g} %)."
    )
    headings = (
        "less",
        *(["n"] if several else []),
        *("SA" if c.attack == "clean" else f"RA {c.name}" for c in columns),
    )
    return Sheet(f"differences-{one.protocol}", caption, headings, tuple(rows))
