"""Figures, one kind a file: from records here, and from a trained network in `gallery`, `gates` and `heatmaps`.

Each figure is a PNG, a PDF that fits a two-column paper, and a CSV of what it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from bench.errors import UsageError
from bench.long import Group, groups
from bench.plot import calibration, curves, matrix, tradeoff
from bench.record import read_all

#: what can be drawn from records
KINDS = ("curves", "calibration", "tradeoff", "matrix")
_NOTHING = {
    "curves": curves.NOTHING,
    "calibration": calibration.NOTHING,
    "tradeoff": tradeoff.NOTHING,
    "matrix": matrix.NOTHING,
}


def draw(
    results: Path,
    out: Path,
    kinds: Sequence[str] = KINDS,
    *,
    datasets: Collection[str] | None = None,
    lines: str | None = None,
    data_only: bool = False,
) -> list[Path]:
    """Draws what the finished runs of a results folder give.

    Args:
        results: the results folder.
        out: where the files go; made if it is not there.
        kinds: which of `KINDS`.
        datasets: draw these alone, nothing if there is nothing to draw; all by default, at least one.
        lines: the dataset whose published values the calibration shows where the images' own name has none.
        data_only: whether only the CSV behind each figure is written.

    Returns:
        The files, kind by kind.

    Raises:
        UsageError: no such folder, no such runs, a damaged one, or a folder that cannot be written.
    """
    found = [group for group in groups(read_all(Path(results))) if not group.void]
    if datasets is not None:
        found = [group for group in found if group.dataset in datasets]
    by_kind: dict[str, Callable[[Sequence[Group], Path], list[Path]]] = {
        "curves": partial(curves.draw, data_only=data_only),
        "calibration": partial(calibration.draw, lines=lines, data_only=data_only),
        "tradeoff": partial(tradeoff.draw, data_only=data_only),
        "matrix": partial(matrix.draw, data_only=data_only),
    }
    written = [path for kind in kinds for path in by_kind[kind](found, Path(out))]
    if not written and datasets is None:
        raise UsageError(_NOTHING[kinds[0]].format(repr(str(results))))
    return written


def figures(results: Path, out: Path, *, datasets: Collection[str] | None = None) -> list[Path]:
    """Draws the curves alone: the DWF paper's figures 6 and 7, and the sweep; arguments and errors as of `draw`."""
    return draw(results, out, ["curves"], datasets=datasets)
