"""Groups to figures: robust accuracy against the radius of FGSM, the steps of PGD and the radius of PGD, or against SA.

The first two are the DWF paper's figures 6 and 7, the third is the one it lacks; the last shows what a knob of the
deployed model trades (`tradeoff`). All are as wide as a column of a two-column paper. Colours are those of
Okabe and Ito (Color Universal Design, 2008), which the colour-blind tell apart, without the yellow, which
white swallows; markers and dashes tell lines apart without colour.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench import registry
from bench.curves import PROTOCOL, SWEEP, Line, high_end, line_of, low_end
from bench.errors import UnknownName, UsageError
from bench.long import WORST_CASE, Group, Measured, groups
from bench.record import Record, atomic, read_all, safe

#: inches: one column of a two-column paper, and the height of the axes
WIDTH, HEIGHT = 3.4, 2.1

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h", "<")
_DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = (
    *("-", "--", "-.", ":"),
    *((0, (5, 1, 1, 1, 1, 1)), (0, (8, 2))),
)
#: the rest is matplotlib's default, so that a user's own settings do not move a figure.
STYLE: dict[Any, Any] = {
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
    "sweep": "radius eps of FGSM and PGD (pixels in [0,1])",
}


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
            lines = [line for group in alike if (line := line_of(group, kind)).points]
            if lines:
                forms = [*_draw(lines, kind, chance), ("csv", _data(lines, kind))]
                written += write(Path(out) / f"{safe(dataset)}-{kind}", forms)
    return written


def write(path: Path, forms: Sequence[tuple[str, bytes]]) -> list[Path]:
    """Writes each form of a figure to the path and its ending; the files.

    Raises:
        UsageError: the folder cannot be written.
    """
    files = []
    for ending, content in forms:
        files.append(path.with_name(f"{path.name}.{ending}"))
        atomic(files[-1], content)
    return files


def _chance(alike: Sequence[Group]) -> float:
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
        figure, axes, columns = _empty([line.label for line in lines])
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
            axes.set_xlim(-0.003, 1.15 * ticks[-1])
            axes.set_xticks([0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5])
            axes.xaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        axes.set_xlabel(KINDS[kind])
        axes.set_ylabel("robust accuracy (%)")
        axes.grid(axis="y", color="0.9", linewidth=0.5)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        _legend(figure, columns)
        return saved(figure)


def _empty(labels: Sequence[str]) -> tuple[Figure, Axes, int]:
    """A figure with room for a legend of these labels and one more, its axes, and the columns of that legend."""
    columns = 2 if max(map(len, labels)) <= 22 else 1
    legend = 0.135 * math.ceil((len(labels) + 1) / columns) + 0.08
    below = 0.38
    height = HEIGHT + below + legend
    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.14, (legend + below) / height, 0.83, (HEIGHT - 0.08) / height))
    return figure, axes, columns


def _legend(figure: Figure, columns: int) -> None:
    figure.legend(
        loc="lower center",
        ncols=columns,
        frameon=False,
        handlelength=3.2,
        borderaxespad=0.2,
        columnspacing=1.4,
        labelspacing=0.3,
    )


def saved(figure: Figure) -> list[tuple[str, bytes]]:
    """A figure as PNG and as PDF, without the hour at which it was drawn."""
    png, pdf = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    figure.savefig(pdf, format="pdf", metadata={"CreationDate": None})
    return [("png", png.getvalue()), ("pdf", pdf.getvalue())]


def _data(lines: Sequence[Line], kind: str) -> bytes:
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


@dataclass(frozen=True, eq=False)
class _Point:
    """A group by its two accuracies."""

    group: Group
    value: float | None
    """of the knob; None where there is none"""

    @property
    def sa(self) -> Measured:
        return next(column for column in self.group.columns if column.attack == "clean")

    @property
    def ra(self) -> Measured:
        return next(column for column in self.group.columns if column.name == WORST_CASE)

    @property
    def at(self) -> tuple[float, float]:
        return self.sa.accuracy, self.ra.accuracy


@dataclass(frozen=True)
class _Curve:
    """A defense as a knob is turned, by its value, or the one point that it is."""

    label: str
    knob: str
    """what the knob sets; empty where there is none"""
    points: tuple[_Point, ...]


def tradeoff(results: Path, out: Path) -> list[Path]:
    """Draws `<dataset>-<protocol>-tradeoff`: accuracy on clean images (SA) against the worst case (RA) as a knob is turned.

    A knob is a number of the config that only the deployed model reads (`Defense.evaluation_only`); left unset,
    `deployed_NAME` stands at NAME. Runs that differ in nothing else are a line, its points labelled by the knob's value. All
    others on the same images at the same radius are points. Grey is the Pareto front: no other point has as much of both.

    Each figure is a PNG, a PDF and a CSV. Crosses are intervals as in `figures`.

    Args:
        results: the results folder.
        out: where the files go; made if it is not there.

    Returns:
        The files, in the order of datasets and protocols.

    Raises:
        UsageError: no such folder, no runs to draw a line through, a damaged one, or a folder that cannot be written.
    """
    asked: dict[str, list[Group]] = {}
    for group in groups(read_all(Path(results))):
        attacked = any(c.attack != "clean" and not c.diagnostic for c in group.records[0].columns)
        if not group.void and attacked and any(c.attack == "clean" for c in group.columns):
            asked.setdefault(_same_images(group), []).append(group)
    curves = {question: _curves(alike) for question, alike in asked.items()}
    drawn = {question: found for question, found in curves.items() if any(len(c.points) > 1 for c in found)}
    if not drawn:
        raise UsageError(
            f"no runs in {str(results)!r} differ in nothing but a setting of the deployed model; "
            "`bench run --defense jtdmoe --set deployed_alpha=0.25`, and again with other values, makes some"
        )
    names = [f"{safe(asked[q][0].dataset)}-{safe(asked[q][0].protocol)}-tradeoff" for q in drawn]
    written = []
    for name, (question, found) in zip(names, drawn.items(), strict=True):
        # other radii or other images may bear the same names
        apart = f"-{hashlib.sha256(question.encode()).hexdigest()[:6]}" if names.count(name) > 1 else ""
        front = _front([point for curve in found for point in curve.points])
        forms = [*_draw_tradeoff(found, front), ("csv", _tradeoff_data(found, front))]
        written += write(Path(out) / f"{name}{apart}", forms)
    return written


def _same_images(group: Group) -> str:
    """What groups must share to stand in one figure, as text."""
    asked = group.records[0].asked
    attack = [asked.protocol.get(name) for name in ("norm", "eps", "success")]
    return json.dumps([asked.dataset, group.protocol, asked.data_hash, asked.samples, attack])


def _curves(alike: Sequence[Group]) -> list[_Curve]:
    """The groups of a figure as lines and points, each group in the longest line that it can be in."""
    knobs = _knobs(alike)
    families: dict[tuple[str, str], list[_Point]] = {}
    for group in alike:
        first = group.records[0]
        for knob in knobs.get(first.asked.defense, ()):
            value = _value(first.asked.config, knob)
            if value is not None:
                families.setdefault((_question(_without(first, knob)), knob), []).append(_Point(group, value))
    found: list[tuple[Record, str, list[_Point]]] = []
    taken: set[Group] = set()
    for (_, knob), points in sorted(families.items(), key=lambda family: -len(family[1])):
        free = [point for point in points if point.group not in taken]
        taken.update(point.group for point in free)
        # of two runs with one value, as where the knob was set to what it is by itself, the one with more seeds
        by_value = {point.value: point for point in sorted(free, key=lambda point: point.group.seeds)}
        if by_value:
            line = sorted(by_value.values(), key=lambda point: point.value or 0.0)
            found.append((_without(line[0].group.records[0], knob), knob, line))
    found += [(group.records[0], "", [_Point(group, None)]) for group in alike if group not in taken]
    # named anew: a line's name says nothing of its knob
    named = {id(group.records[0]): group.label for group in groups(record for record, _, _ in found)}
    return [
        _Curve(named[id(record)], knob.removeprefix("deployed_"), tuple(points))
        for record, knob, points in found
    ]


def _knobs(alike: Sequence[Group]) -> dict[str, list[str]]:
    """The settings that only the deployed model reads, by defense, where there are several configs to compare."""
    configs: dict[str, list[Mapping[str, Any]]] = {}
    for group in alike:
        asked = group.records[0].asked
        configs.setdefault(asked.defense, []).append(asked.config)
    found = {}
    for name, several in configs.items():
        if any(config != several[0] for config in several):
            try:
                found[name] = sorted(registry.get(name).evaluation_only)
            except UnknownName:
                # a plugin's, which is not here: its runs are points
                continue
    return found


def _value(config: Mapping[str, Any], knob: str) -> float | None:
    """What a knob stands at; unset, `deployed_NAME` is at NAME."""
    value = config.get(knob)
    if value is None:
        value = config.get(knob.removeprefix("deployed_"))
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _without(record: Record, knob: str) -> Record:
    """The record of a run as if there were no such setting."""
    config = {name: value for name, value in record.asked.config.items() if name != knob}
    return record.model_copy(update={"asked": record.asked.model_copy(update={"config": config})})


def _question(record: Record) -> str:
    """What the runs of a line share, as text."""
    own = {"seed", "model_hash"} if record.training.source == "trained" else {"seed"}
    return json.dumps(
        [record.asked.model_dump(mode="json", exclude=own), record.training.source], sort_keys=True
    )


def _front(points: Sequence[_Point]) -> list[_Point]:
    """The Pareto front by rising SA: those of which no other has as much of both accuracies and more of one."""
    best = [
        point
        for point in points
        if not any(
            other.at != point.at and other.at[0] >= point.at[0] and other.at[1] >= point.at[1]
            for other in points
        )
    ]
    return sorted(best, key=lambda point: point.at)


def _draw_tradeoff(curves: Sequence[_Curve], front: Sequence[_Point]) -> list[tuple[str, bytes]]:
    """The figure as PNG and as PDF."""
    with matplotlib.rc_context(STYLE):
        labels = [
            f"{curve.label}, by {curve.knob}" if len(curve.points) > 1 else curve.label for curve in curves
        ]
        figure, axes, columns = _empty(labels)
        # a step, as what lies between two runs was not measured
        axes.plot(
            [point.sa.accuracy for point in front],
            [point.ra.accuracy for point in front],
            color="0.6",
            drawstyle="steps-pre",
            linewidth=0.9,
            label="Pareto front",
        )
        for place, (curve, label) in enumerate(zip(curves, labels, strict=True)):
            color = _COLORS[place % len(_COLORS)]
            bar: dict[str, Any] = {"color": color, "alpha": 0.4, "linewidth": 0.6}
            for point in curve.points:
                axes.hlines(point.at[1], low_end(point.sa), high_end(point.sa), **bar)
                axes.vlines(point.at[0], low_end(point.ra), high_end(point.ra), **bar)
                if point.value is not None:
                    axes.annotate(
                        f"{point.value:g}",
                        point.at,
                        (2.5, 2.5),
                        textcoords="offset points",
                        color=color,
                        fontsize=6,
                    )
            axes.plot(
                [point.sa.accuracy for point in curve.points],
                [point.ra.accuracy for point in curve.points],
                color=color,
                marker=_MARKERS[place % len(_MARKERS)],
                linestyle=_DASHES[place % len(_DASHES)] if len(curve.points) > 1 else "none",
                markeredgecolor="white",
                markeredgewidth=0.3,
                clip_on=False,
                zorder=3,
                label=label,
            )
        axes.margins(0.06)
        # all intervals lie in here, but those of a std may not
        axes.set_xlim(*np.clip(axes.get_xlim(), 0, 100))
        axes.set_ylim(*np.clip(axes.get_ylim(), 0, 100))
        axes.set_xlabel("accuracy on clean images, SA (%)")
        axes.set_ylabel("worst case, RA (%)")
        axes.grid(color="0.9", linewidth=0.5)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        _legend(figure, columns)
        return saved(figure)


def _tradeoff_data(curves: Sequence[_Curve], front: Sequence[_Point]) -> bytes:
    """The points of the figure as CSV: a column for each knob, accuracies in percent, the radius in pixel units."""
    knobs = list(dict.fromkeys(curve.knob for curve in curves if curve.knob))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    measured = ("sa", "sa_low", "sa_high", "ra", "ra_low", "ra_high")
    writer.writerow(["defense", *knobs, *measured, "band", "n", "seeds", "eps", "front", "credible"])
    for curve in curves:
        for point in curve.points:
            ends = [f(column) for column in (point.sa, point.ra) for f in (_accuracy, low_end, high_end)]
            writer.writerow(
                [
                    curve.label,
                    *(f"{point.value:g}" if knob == curve.knob else "" for knob in knobs),
                    *(round(value, 4) for value in ends),
                    "wilson" if point.sa.seeds == 1 else "std",
                    point.sa.n,
                    point.sa.seeds,
                    _radius(point.group),
                    int(point in front),
                    int(all(record.verdict == "credible" for record in point.group.records)),
                ]
            )
    return file.getvalue().encode()


def _accuracy(point: Measured) -> float:
    return point.accuracy


def _radius(group: Group) -> float | None:
    """The largest radius of what the worst case is of."""
    radii = [c.epsilon for c in group.records[0].columns if c.epsilon is not None and not c.diagnostic]
    return max(radii, default=None)
