"""How every figure looks, and how it is kept.

A figure is as wide as a column of a two-column paper, or as its page; both are the narrowest of ICML's, CVPR's and IEEE's, so
that none is shrunk. Colours are those of Okabe and Ito (Color Universal Design, 2008), which the colour-blind tell apart,
without the yellow, which white swallows; markers, dashes and hatches tell things apart without colour.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.long import Measured
from bench.record import atomic

#: inches: one column of a two-column paper, both of them, and the height of the axes
WIDTH, WIDE, HEIGHT = 3.25, 6.75, 2.0

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h", "<", "*", ">", "d", "p")
DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = (
    *("-", "--", "-.", ":"),
    *((0, (5, 1, 1, 1, 1, 1)), (0, (8, 2))),
)
#: what is filled beside something filled without a hatch
HATCH = "/////"
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
    "hatch.linewidth": 0.5,
    # letters that can be searched and edited, which publishers ask for
    "pdf.fonttype": 42,
    "savefig.dpi": 300,
}


def look(place: int) -> dict[str, Any]:
    """Colour, marker and dashes of the line at a place; the numbers of each share no divisor that would let lines recur."""
    return {
        "color": COLORS[place % len(COLORS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": DASHES[place % len(DASHES)],
        "markeredgecolor": "white",
        "markeredgewidth": 0.3,
    }


def band(point: Measured) -> str:
    """Which of the two a band is: `wilson` or `std`."""
    return "wilson" if point.seeds == 1 else "std"


def canvas(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def empty(labels: Sequence[str]) -> tuple[Figure, Axes, int]:
    """A figure with room for a legend of these labels and one more, its axes, and the columns of that legend."""
    columns = 2 if max(map(len, labels)) <= 20 else 1
    legend = 0.135 * math.ceil((len(labels) + 1) / columns) + 0.08
    below = 0.38
    height = HEIGHT + below + legend
    figure = canvas(WIDTH, height)
    axes = figure.add_axes((0.14, (legend + below) / height, 0.83, (HEIGHT - 0.08) / height))
    return figure, axes, columns


def tidy(axes: Axes, grid: str = "both") -> None:
    """Faint lines behind what is drawn, and no frame."""
    axes.grid(axis=grid, color="0.9", linewidth=0.5)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend(figure: Figure, columns: int) -> None:
    """What the lines are, below the axes."""
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


def lines_of(rows: Iterable[Sequence[object]]) -> bytes:
    """Rows of what a figure shows as CSV, the header first; four decimals, nothing for None."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    for row in rows:
        writer.writerow([round(value, 4) if isinstance(value, float) else value for value in row])
    return file.getvalue().encode()


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
