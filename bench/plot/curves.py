"""Robust accuracy against the radius of FGSM, the steps of PGD, and the radius of both: the DWF paper's figures 6 and 7, and one it lacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

from bench.curves import PROTOCOL, SWEEP, Line, high_end, line_of, low_end
from bench.long import Group
from bench.plot.style import STYLE, band, empty, legend, lines_of, look, saved, tidy, write
from bench.record import safe

NOTHING = f"no finished {PROTOCOL} or {SWEEP} runs in {{}}; `bench run --protocol {PROTOCOL}` makes some"

#: the figures of a dataset, and what stands under their axis
KINDS = {
    "fgsm": "FGSM radius eps (pixels in [0,1])",
    "pgd": "PGD steps",
    "sweep": "radius eps of FGSM and PGD (pixels in [0,1])",
}


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
            ends = (point.accuracy, low_end(point), high_end(point))
            shown = int(x) if kind == "pgd" else repr(x)
            rows.append([line.label, shown, *ends, band(point), point.n, point.seeds, *own])
    return lines_of(rows)
