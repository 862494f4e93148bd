"""Robust accuracy against the radius of FGSM, the steps of PGD, and the radius of both: the DWF paper's figures 6 and 7, and one it lacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from bench.long import WORST_CASE, WORST_DRAW, Group, Measured
from bench.plot.style import STYLE, band, empty, high, legend, lines_of, look, low, saved, tidy, write
from bench.record import safe
from bench.stats import mean_std, wilson

PROTOCOL = "dwf-paper"
SWEEP = "sweep"
NOTHING = f"no finished {PROTOCOL} or {SWEEP} runs in {{}}; `bench run --protocol {PROTOCOL}` makes some"

#: the figures of a dataset, and what stands under their axis
KINDS = {
    "fgsm": "FGSM radius eps (pixels in [0,1])",
    "pgd": "PGD steps",
    "sweep": "radius eps of FGSM and PGD (pixels in [0,1])",
}


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
        return [low(point) for point in self.points]

    @property
    def high(self) -> list[float]:
        """The upper end."""
        return [high(point) for point in self.points]


def draw(found: Sequence[Group], out: Path, *, data_only: bool = False) -> list[Path]:
    """Draws per dataset `<dataset>-fgsm` and `<dataset>-pgd` of dwf-paper runs, and `<dataset>-sweep` of sweep runs.

    In a sweep the line counts an image as fallen from the radius on at which it first fell, which every larger ball allows;
    the crosses are what the attacks at each radius found by themselves, and where they rise an attack has failed.

    The band around a line is the 95 % Wilson interval, or mean ± sample standard deviation where there are several seeds;
    the CSV holds every point and says which.
    """
    found = [group for group in found if group.protocol in (PROTOCOL, SWEEP)]
    written = []
    for dataset in dict.fromkeys(group.dataset for group in found):
        alike = [group for group in found if group.dataset == dataset]
        for kind in KINDS:
            lines = [line for group in alike if (line := line_of(group, kind)).points]
            if lines:
                drawn = [] if data_only else _draw(lines, kind, chance(alike))
                written += write(out / f"{safe(dataset)}-{kind}", [*drawn, ("csv", _data(lines, kind))])
    return written


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
        lower, upper = wilson(mean / 100 * n, n)
        points.append(
            Measured(
                name=f"sweep-{eps:g}",
                attack=SWEEP,
                epsilon=eps,
                accuracy=mean,
                ci_low=100 * float(lower),
                ci_high=100 * float(upper),
                n=n,
                seeds=len(group.records),
                std=std,
            )
        )
    return Line(group.label, tuple(radii), tuple(points), tuple(np.mean(alone, axis=0).tolist()))


def chance(alike: Sequence[Group]) -> float:
    """The accuracy of guessing, in percent, from the classes that occur."""
    top = max(
        int(record.outcomes(["label", "prediction"]).to_numpy().max())
        for group in alike
        for record in group.records
    )
    return 100 / (top + 1)


def _draw(lines: Sequence[Line], kind: str, chance: float) -> list[tuple[str, bytes]]:
    """The figure as PNG and as PDF; equal data give equal bytes."""
    with matplotlib.rc_context(STYLE):
        figure, axes, columns = empty([line.label for line in lines])
        for place, line in enumerate(lines):
            shown = look(place)
            axes.fill_between(line.x, line.low, line.high, color=shown["color"], alpha=0.18, linewidth=0)
            axes.plot(line.x, [point.accuracy for point in line.points], **shown, label=line.label)
            if line.raw:
                axes.plot(
                    line.x, line.raw, color=shown["color"], marker="x", markersize=3.5, linestyle="none"
                )
        axes.axhline(chance, color="0.45", linestyle=(0, (1, 2)), linewidth=0.9, label="chance")
        top = max(chance, *(value for line in lines for value in line.high))
        axes.set_ylim(0, min(100, 10 * math.ceil(top / 10 + 0.2)))
        ticks = sorted({x for line in lines for x in line.x})
        axes.set_xticks(ticks[:: 2 if len(ticks) > 8 else 1])
        axes.set_xticks(ticks, minor=True)
        axes.xaxis.set_major_formatter("{x:g}")
        if kind == "sweep":
            axes.set_xscale("symlog", linthresh=0.01, linscale=0.4)
            axes.set_xlim(-0.003, 1.15 * ticks[-1])
            axes.set_xticks([0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5])
            axes.xaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        axes.set_xlabel(KINDS[kind])
        axes.set_ylabel("robust accuracy (%)")
        tidy(axes, "y")
        legend(figure, columns)
        return saved(figure)


def _data(lines: Sequence[Line], kind: str) -> bytes:
    """The points of a figure as CSV: accuracies in percent, the radius in pixel units."""
    at = "steps" if kind == "pgd" else "eps"
    header = ["defense", at, "accuracy", "low", "high", "band", "n", "seeds"]
    rows: list[list[object]] = [[*header, *(["alone"] if kind == "sweep" else [])]]
    for line in lines:
        alone: list[list[object]] = [[value] for value in line.raw] or [[]] * len(line.x)
        for x, point, own in zip(line.x, line.points, alone, strict=True):
            ends = (point.accuracy, low(point), high(point))
            shown = int(x) if kind == "pgd" else repr(x)
            rows.append([line.label, shown, *ends, band(point), point.n, point.seeds, *own])
    return lines_of(rows)
