"""Groups to figures: robust accuracy against the radius of FGSM, the steps of PGD and the radius of PGD.

The first two are the DWF paper's figures 6 and 7, the third is the one it lacks. All are as wide as a column of a
two-column paper. Colours are those of
Okabe and Ito (Color Universal Design, 2008), which the colour-blind tell apart, without the yellow, which
white swallows; markers and dashes tell lines apart without colour.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.errors import UsageError
from bench.long import WORST_CASE, WORST_DRAW, Group, Measured, groups
from bench.record import atomic, read_all, safe
from bench.stats import mean_std, wilson

PROTOCOL = "dwf-paper"
SWEEP = "sweep"
#: inches: one column of a two-column paper, and the height of the axes
WIDTH, HEIGHT = 3.4, 2.1

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h", "<")
_DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = (
    *("-", "--", "-.", ":"),
    *((0, (5, 1, 1, 1, 1, 1)), (0, (8, 2))),
)
# The rest is matplotlib's default, so that a user's own settings do not move a figure.
_STYLE: dict[Any, Any] = {
    **{name: value for name, value in matplotlib.rcParamsDefault.items() if "backend" not in name},
    "font.size": 8.0,
    "axes.linewidth": 0.6,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7.0,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.2,
    # letters that can be searched and edited, which publishers ask for
    "pdf.fonttype": 42,
    "savefig.dpi": 300,
}


#: the figures of a dataset, and what stands under their axis
KINDS = {
    "fgsm": "FGSM radius eps (pixels in [0,1])",
    "pgd": "PGD steps",
    "sweep": "radius eps (pixels in [0,1]) of the strongest of FGSM and PGD",
}


@dataclass(frozen=True)
class _Line:
    """A defense: where its points lie, and how far its band reaches; accuracies in percent."""

    label: str
    x: tuple[float, ...]
    points: tuple[Measured, ...]
    raw: tuple[float, ...] = ()
    """in a sweep: what each radius alone was found to leave"""

    @property
    def low(self) -> list[float]:
        return [p.ci_low if p.seeds == 1 else p.accuracy - p.std for p in self.points]

    @property
    def high(self) -> list[float]:
        return [p.ci_high if p.seeds == 1 else p.accuracy + p.std for p in self.points]


def figures(results: Path, out: Path, *, datasets: Collection[str] | None = None) -> list[Path]:
    """Draws per dataset `<dataset>-fgsm` and `<dataset>-pgd` of dwf-paper runs, and `<dataset>-sweep` of sweep runs.

    Each is a PNG, a PDF and a CSV. In a sweep the line counts an image as fallen from the radius on at which it first fell,
    which every larger ball allows; the crosses are what the attacks at each radius found by themselves, and where they rise
    an attack has failed.

    The band around a line is the 95 % Wilson interval, or mean ± sample standard deviation where there are
    several seeds; the CSV holds every point and says which.

    Args:
        results: the results folder.
        out: where the files go; made if it is not there.
        datasets: draw these alone, nothing if there is nothing to draw; all by default, at least one.

    Returns:
        The files, in the order of the datasets.

    Raises:
        UsageError: no such folder, no such runs, a damaged one, or a folder that cannot be written.
    """
    every = [group for group in groups(read_all(Path(results))) if not group.void]
    found = [group for group in every if group.protocol in (PROTOCOL, SWEEP)]
    if datasets is not None:
        found = [group for group in found if group.dataset in datasets]
    elif not found:
        raise UsageError(
            f"no finished {PROTOCOL} or {SWEEP} runs in {str(results)!r}; `bench run --protocol {PROTOCOL}` makes some"
        )
    written = []
    for dataset in dict.fromkeys(group.dataset for group in found):
        alike = [group for group in found if group.dataset == dataset]
        chance = _chance(alike)
        for kind in KINDS:
            lines = [line for group in alike if (line := _line(group, kind)).points]
            if lines:
                path = Path(out) / f"{safe(dataset)}-{kind}"
                for ending, content in (*_draw(lines, kind, chance), ("csv", _data(lines, kind))):
                    atomic(path.with_name(f"{path.name}.{ending}"), content)
                    written.append(path.with_name(f"{path.name}.{ending}"))
    return written


def _line(group: Group, kind: str) -> _Line:
    """A defense under FGSM of rising radius, clean images at 0, or under PGD of rising steps, or under both in a sweep."""
    if (kind == "sweep") != (group.protocol == SWEEP):
        return _Line(group.label, (), ())
    if kind == "sweep":
        return _swept(group)
    found: list[tuple[float, Measured]] = []
    for column in group.columns:
        if column.attack == kind:
            found.append((float((column.epsilon if kind == "fgsm" else column.steps) or 0), column))
        elif column.attack == "clean" and kind == "fgsm":
            found.append((0.0, column))
    found.sort(key=lambda point: point[0])
    return _Line(group.label, tuple(x for x, _ in found), tuple(column for _, column in found))


def _swept(group: Group) -> _Line:
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
    return _Line(group.label, tuple(radii), tuple(points), tuple(np.mean(alone, axis=0).tolist()))


def _chance(alike: Sequence[Group]) -> float:
    """The accuracy of guessing, in percent, from the classes that occur."""
    top = max(
        int(record.outcomes(["label", "prediction"]).to_numpy().max())
        for group in alike
        for record in group.records
    )
    return 100 / (top + 1)


def _draw(lines: Sequence[_Line], kind: str, chance: float) -> list[tuple[str, bytes]]:
    """The figure as PNG and as PDF; equal data give equal bytes."""
    with matplotlib.rc_context(_STYLE):
        columns = 2 if max(len(line.label) for line in lines) <= 22 else 1
        rows = math.ceil((len(lines) + 1) / columns)
        legend = 0.135 * rows + 0.08
        below = 0.38
        height = HEIGHT + below + legend
        figure = Figure(figsize=(WIDTH, height))
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0.14, (legend + below) / height, 0.83, (HEIGHT - 0.08) / height))
        for place, line in enumerate(lines):
            color = _COLORS[place % len(_COLORS)]
            axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.18, linewidth=0)
            axes.plot(
                line.x,
                [point.accuracy for point in line.points],
                color=color,
                marker=_MARKERS[place % len(_MARKERS)],
                linestyle=_DASHES[place % len(_DASHES)],
                markeredgecolor="white",
                markeredgewidth=0.3,
                label=line.label,
            )
            if line.raw:
                axes.plot(line.x, line.raw, color=color, marker="x", markersize=3.5, linestyle="none")
        axes.axhline(chance, color="0.45", linestyle=(0, (1, 2)), linewidth=0.9, label="chance")
        top = max(chance, *(value for line in lines for value in line.high))
        axes.set_ylim(0, min(100, 10 * math.ceil(top / 10 + 0.2)))
        ticks = sorted({x for line in lines for x in line.x})
        axes.set_xticks(ticks[:: 2 if len(ticks) > 8 else 1])
        axes.set_xticks(ticks, minor=True)
        axes.xaxis.set_major_formatter("{x:g}")
        if kind == "sweep":
            axes.set_xscale("symlog", linthresh=0.01, linscale=0.4)
            axes.set_xticks([0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5])
            axes.xaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        axes.set_xlabel(KINDS[kind])
        axes.set_ylabel("robust accuracy (%)")
        axes.grid(axis="y", color="0.9", linewidth=0.5)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(
            loc="lower center",
            ncols=columns,
            frameon=False,
            handlelength=3.2,
            borderaxespad=0.2,
            columnspacing=1.4,
            labelspacing=0.3,
        )
        png, pdf = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", metadata={"Software": None})
        figure.savefig(pdf, format="pdf", metadata={"CreationDate": None})
    return [("png", png.getvalue()), ("pdf", pdf.getvalue())]


def _data(lines: Sequence[_Line], kind: str) -> bytes:
    """The points of a figure as CSV: accuracies in percent, the radius in pixel units."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        [
            *(
                "defense",
                "steps" if kind == "pgd" else "eps",
                "accuracy",
                "low",
                "high",
                "band",
                "n",
                "seeds",
            ),
            *(("alone",) if kind == "sweep" else ()),
        ]
    )
    for line in lines:
        alone = [[round(value, 4)] for value in line.raw] or [[]] * len(line.x)
        for x, point, low, high, own in zip(line.x, line.points, line.low, line.high, alone, strict=True):
            band = "wilson" if point.seeds == 1 else "std"
            written = [
                str(int(x)) if kind == "pgd" else repr(x),
                *(round(v, 4) for v in (point.accuracy, low, high)),
            ]
            writer.writerow([line.label, *written, band, point.n, point.seeds, *own])
    return file.getvalue().encode()
