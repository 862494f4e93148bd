"""Every defense under every attack as a heat map: dark where little is left."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from bench.block import doubt, together
from bench.curves import SWEEP, high_end, low_end
from bench.long import Group, Measured
from bench.plot.calibration import PROTOCOL as CALIBRATION
from bench.plot.style import STYLE, WIDE, WIDTH, band, canvas, lines_of, saved, write
from bench.record import safe

NOTHING = "no finished run in {} has an attack; `bench run` makes some"
#: inches: the least width of a cell, its height, and what a letter of a label takes
CELL, ROW, LETTER = 0.27, 0.17, 0.054


def draw(found: Sequence[Group], out: Path, *, data_only: bool = False) -> list[Path]:
    """Draws `<dataset>-<protocol>-matrix`: a row a defense, a column an attack, the accuracy in percent in each cell.

    It is as wide as a column, or as the page where that is too narrow. A defense whose run is not credible says so; where a
    defense was not asked, the cell is empty. Protocols that are one attack at many radii are curves, and not drawn here.
    """
    asked = [group for group in found if group.protocol not in (SWEEP, CALIBRATION)]
    blocks = [(alike, columns) for alike in together(asked) if len(columns := _columns(alike)) > 1]
    names = [f"{safe(alike[0].dataset)}-{safe(alike[0].protocol)}-matrix" for alike, _ in blocks]
    written = []
    for name, (alike, columns) in zip(names, blocks, strict=True):
        same = alike[0].records[0].asked
        text = f"{same.data_hash}{same.samples}{same.protocol}"
        apart = f"-{hashlib.sha256(text.encode()).hexdigest()[:6]}" if names.count(name) > 1 else ""
        drawn = [] if data_only else _draw(alike, columns)
        written += write(out / f"{name}{apart}", [*drawn, ("csv", _data(alike, columns))])
    return written


def _columns(alike: Sequence[Group]) -> list[str]:
    """The names of all columns but an ensemble's components, the derived ones last."""
    names = [c.name for group in alike for c in group.columns if c.part_of is None]
    derived = ("worst-draw", "worst-case")
    there = list(dict.fromkeys(name for name in names if name not in derived))
    return [*there, *(name for name in derived if name in names)]


def _label(group: Group) -> str:
    return f"{group.label} ({doubt(group)})" if doubt(group) else group.label


def _draw(alike: Sequence[Group], columns: Sequence[str]) -> list[tuple[str, bytes]]:
    """The figure as PNG and as PDF."""
    labels = [_label(group) for group in alike]
    left = 0.1 + LETTER * max(map(len, labels))
    above = 0.1 + LETTER * max(map(len, columns))
    width = WIDTH if left + CELL * len(columns) <= WIDTH else WIDE
    height = above + ROW * len(alike) + 0.05
    values = np.array([[_accuracy(group.column(name)) for name in columns] for group in alike])
    with matplotlib.rc_context(STYLE):
        figure = canvas(width, height)
        across = width - left - 0.05
        axes = figure.add_axes((left / width, 0.05 / height, across / width, ROW * len(alike) / height))
        axes.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        fits = across / len(columns)
        size = min(6.5, 72 * fits / 3.0)
        for row, line in enumerate(values):
            for place, value in enumerate(line):
                if not math.isnan(value):
                    color = "black" if value > 55 else "white"
                    axes.text(
                        place, row, f"{value:.1f}", ha="center", va="center", color=color, fontsize=size
                    )
        axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=6.5)
        axes.set_yticks(range(len(alike)), labels, fontsize=6.5)
        axes.xaxis.tick_top()
        axes.tick_params(length=0, pad=2)
        axes.set_xticks(np.arange(0.5, len(columns) - 1), minor=True)
        axes.set_yticks(np.arange(0.5, len(alike) - 1), minor=True)
        axes.grid(which="minor", color="white", linewidth=0.8)
        axes.tick_params(which="minor", length=0)
        axes.spines[:].set_visible(False)
        return saved(figure)


def _accuracy(column: Measured | None) -> float:
    return math.nan if column is None else column.accuracy


def _data(alike: Sequence[Group], columns: Sequence[str]) -> bytes:
    """The cells as CSV, a line each; accuracies in percent, the radius in pixel units."""
    header = [
        "defense",
        "column",
        "attack",
        "eps",
        "accuracy",
        "low",
        "high",
        "band",
        "n",
        "seeds",
        "credible",
    ]
    rows: list[list[object]] = [[*header]]
    for group in alike:
        for name in columns:
            column = group.column(name)
            if column is None:
                continue
            eps = "" if column.epsilon is None else repr(column.epsilon)
            ends = (column.accuracy, low_end(column), high_end(column), band(column), column.n, column.seeds)
            rows.append([group.label, name, column.attack, eps, *ends, int(not doubt(group))])
    return lines_of(rows)
