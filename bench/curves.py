"""Groups to curves: accuracy over the radius of FGSM, over the steps of PGD, and over the radius of both in a sweep.

Figures and the report draw these, so that a point and its band have one origin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bench.long import WORST_CASE, WORST_DRAW, Group, Measured
from bench.stats import mean_std, wilson

PROTOCOL = "dwf-paper"
SWEEP = "sweep"


@dataclass(frozen=True)
class Line:
    """A defense: where its points lie, and how far its band reaches; accuracies in percent."""

    label: str
    x: tuple[float, ...]
    points: tuple[Measured, ...]
    raw: tuple[float, ...] = ()
    """in a sweep: what each radius alone was found to leave"""

    @property
    def low(self) -> list[float]:
        """The lower end of the band at each point."""
        return [low_end(point) for point in self.points]

    @property
    def high(self) -> list[float]:
        """The upper end of the band at each point."""
        return [high_end(point) for point in self.points]


def low_end(point: Measured) -> float:
    """Where a band begins: at Wilson's interval for one seed, a sample standard deviation below the mean for several."""
    return point.ci_low if point.seeds == 1 else point.accuracy - point.std


def high_end(point: Measured) -> float:
    """Where a band ends, likewise."""
    return point.ci_high if point.seeds == 1 else point.accuracy + point.std


def line_of(group: Group, kind: str) -> Line:
    """A defense under FGSM of rising radius, clean images at 0, or under PGD of rising steps, or under both in a sweep."""
    if (kind == "sweep") != (group.protocol == SWEEP):
        return Line(group.label, (), ())
    if kind == "sweep":
        return _swept(group)
    found: list[tuple[float, Measured]] = []
    for column in group.columns:
        if column.attack == kind:
            found.append((float((column.epsilon if kind == "fgsm" else column.steps) or 0), column))
        elif column.attack == "clean" and kind == "fgsm":
            found.append((0.0, column))
    found.sort(key=lambda point: point[0])
    return Line(group.label, tuple(x for x, _ in found), tuple(column for _, column in found))


def _swept(group: Group) -> Line:
    """A defense under the strongest attack at each radius, an image that fell at a smaller one counted as fallen."""
    derived = (WORST_CASE, WORST_DRAW)
    radii = sorted({column.epsilon or 0.0 for column in group.columns if column.name not in derived})
    alone, running = [], []
    for shares in group.shares:
        at = [
            [
                place
                for place, c in enumerate(group.columns)
                if (c.epsilon or 0.0) == eps and c.name not in derived
            ]
            for eps in radii
        ]
        least = np.array([shares[places].min(0) for places in at])
        alone.append(100 * least.mean(1))
        running.append(100 * np.minimum.accumulate(least, axis=0).mean(1))
    n = len(group.images)
    points = []
    for place, eps in enumerate(radii):
        mean, std = mean_std([float(values[place]) for values in running])
        low, high = wilson(mean / 100 * n, n)
        points.append(
            Measured(
                name=f"sweep-{eps:g}",
                attack=SWEEP,
                epsilon=eps,
                accuracy=mean,
                ci_low=100 * float(low),
                ci_high=100 * float(high),
                n=n,
                seeds=len(group.records),
                std=std,
            )
        )
    return Line(group.label, tuple(radii), tuple(points), tuple(np.mean(alone, axis=0).tolist()))
