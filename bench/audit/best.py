"""The best that has been published: what a run would have to beat to be too good to be true.

`results/published/best.csv` says where each number comes from, and when it was copied.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass

from bench.config import number
from bench.published import published_dir


@dataclass(frozen=True)
class Best:
    """One robust accuracy, in percent, at a radius in pixel units."""

    dataset: str
    norm: str
    eps: float
    accuracy: float
    model: str
    source: str
    year: int


def best(dataset: str, norm: str, eps: float) -> Best | None:
    """The highest accuracy published at this radius or a smaller one, at the largest such radius; None if there is none.

    A defense that holds at `eps` holds at every smaller radius, so a number published for one of those bounds it from above.
    """
    known = [one for one in read() if (one.dataset, one.norm) == (dataset, norm) and one.eps <= eps + 1e-9]
    return max(known, key=lambda one: (one.eps, one.accuracy), default=None)


def read() -> list[Best]:
    """Every row of the file."""
    with (published_dir() / "best.csv").open(encoding="utf-8", newline="") as file:
        lines = csv.DictReader(line for line in file if not line.startswith("#"))
        return [
            Best(
                dataset=line["dataset"],
                norm=line["norm"],
                eps=float(str(number(line["eps"]))),
                accuracy=float(line["accuracy"]),
                model=line["model"],
                source=line["source"],
                year=int(line["year"]),
            )
            for line in lines
        ]
