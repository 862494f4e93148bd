"""Accuracy on clean images (SA) against the worst case (RA), the Pareto front, and what a knob of a deployed model trades."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from bench import registry
from bench.block import doubt
from bench.curves import SWEEP, high_end, low_end
from bench.errors import UnknownName
from bench.long import WORST_CASE, Group, Measured, groups
from bench.plot.calibration import PROTOCOL as CALIBRATION
from bench.plot.style import STYLE, band, empty, legend, lines_of, look, saved, tidy, write
from bench.record import Record, safe

NOTHING = "no two finished runs in {} were attacked on the same images; `bench run --defense dwf,resnet18` makes some"


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

    @property
    def credible(self) -> bool:
        return not doubt(self.group)


@dataclass(frozen=True)
class _Curve:
    """A defense as a knob is turned, by its value, or the one point that it is."""

    label: str
    knob: str
    """what the knob sets; empty where there is none"""
    points: tuple[_Point, ...]


def draw(found: Sequence[Group], out: Path, *, data_only: bool = False) -> list[Path]:
    """Draws `<dataset>-<protocol>-tradeoff`: accuracy on clean images (SA) against the worst case (RA).

    A knob is a number of the config that only the deployed model reads (`Defense.evaluation_only`); left unset,
    `deployed_NAME` stands at NAME. Runs that differ in nothing else are a line, its points labelled by the knob's value. All
    others on the same images at the same radius are points; hollow ones are not credible. Grey is the Pareto front of the
    credible ones: no other has as much of both. Crosses are intervals, or mean ± std where there are several seeds. Protocols
    that go on to radii where nothing holds are left out.
    """
    asked: dict[str, list[Group]] = {}
    for group in found:
        if group.protocol in (SWEEP, CALIBRATION):
            continue
        attacked = any(c.attack != "clean" and not c.diagnostic for c in group.records[0].columns)
        if attacked and any(c.attack == "clean" for c in group.columns):
            asked.setdefault(_same_images(group), []).append(group)
    asked = {question: alike for question, alike in asked.items() if len(alike) > 1}
    names = [f"{safe(alike[0].dataset)}-{safe(alike[0].protocol)}-tradeoff" for alike in asked.values()]
    written = []
    for name, (question, alike) in zip(names, asked.items(), strict=True):
        # other radii or other images may bear the same names
        apart = f"-{hashlib.sha256(question.encode()).hexdigest()[:6]}" if names.count(name) > 1 else ""
        curves = _curves(alike)
        front = _front([point for curve in curves for point in curve.points if point.credible])
        drawn = [] if data_only else _draw(curves, front)
        written += write(out / f"{name}{apart}", [*drawn, ("csv", _data(curves, front))])
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


def _draw(curves: Sequence[_Curve], front: Sequence[_Point]) -> list[tuple[str, bytes]]:
    """The figure as PNG and as PDF."""
    with matplotlib.rc_context(STYLE):
        labels = [
            f"{curve.label}, by {curve.knob}" if len(curve.points) > 1 else curve.label for curve in curves
        ]
        doubted = [point for curve in curves for point in curve.points if not point.credible]
        figure, axes, columns = empty([*labels, *(["hollow: suspect"] if doubted else [])])
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
            shown = look(place)
            bar: dict[str, Any] = {"color": shown["color"], "alpha": 0.4, "linewidth": 0.6}
            for point in curve.points:
                axes.hlines(point.at[1], low_end(point.sa), high_end(point.sa), **bar)
                axes.vlines(point.at[0], low_end(point.ra), high_end(point.ra), **bar)
                if point.value is not None:
                    axes.annotate(
                        f"{point.value:g}",
                        point.at,
                        (2.5, 2.5),
                        textcoords="offset points",
                        color=shown["color"],
                        fontsize=6,
                    )
            at = [point.at for point in curve.points]
            line = shown["linestyle"] if len(at) > 1 else "none"
            hollow = {"markerfacecolor": "white", "markeredgecolor": shown["color"], "markeredgewidth": 0.9}
            every = not any(point.credible for point in curve.points)
            marked = {**shown, "linestyle": line, "markersize": 4.5, "clip_on": False, "zorder": 3}
            axes.plot(*zip(*at, strict=True), **{**marked, **(hollow if every else {})}, label=label)
            for point in curve.points:
                if not (point.credible or every):
                    axes.plot(*point.at, **{**marked, **hollow})
        if doubted:
            axes.plot(
                [],
                [],
                marker="o",
                markerfacecolor="white",
                markeredgecolor="0.3",
                linestyle="none",
                label="hollow: suspect",
            )
        axes.margins(0.06)
        # all intervals lie in here, but those of a std may not
        axes.set_xlim(*np.clip(axes.get_xlim(), 0, 100))
        axes.set_ylim(*np.clip(axes.get_ylim(), 0, 100))
        axes.set_xlabel("accuracy on clean images, SA (%)")
        axes.set_ylabel("worst case, RA (%)")
        tidy(axes)
        legend(figure, columns)
        return saved(figure)


def _data(curves: Sequence[_Curve], front: Sequence[_Point]) -> bytes:
    """The points of the figure as CSV: a column for each knob, accuracies in percent, the radius in pixel units."""
    knobs = list(dict.fromkeys(curve.knob for curve in curves if curve.knob))
    measured = ("sa", "sa_low", "sa_high", "ra", "ra_low", "ra_high")
    rows: list[list[object]] = [
        ["defense", *knobs, *measured, "band", "n", "seeds", "eps", "front", "credible"]
    ]
    for curve in curves:
        for point in curve.points:
            ends = [value for c in (point.sa, point.ra) for value in (c.accuracy, low_end(c), high_end(c))]
            turned = [f"{point.value:g}" if knob == curve.knob else "" for knob in knobs]
            eps = _radius(point.group)
            told = (band(point.sa), point.sa.n, point.sa.seeds, None if eps is None else repr(eps))
            rows.append([curve.label, *turned, *ends, *told, int(point in front), int(point.credible)])
    return lines_of(rows)


def _radius(group: Group) -> float | None:
    """The largest radius of what the worst case is of."""
    radii = [c.epsilon for c in group.records[0].columns if c.epsilon is not None and not c.diagnostic]
    return max(radii, default=None)
