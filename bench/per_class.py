"""A table with a column for each class: what fair defenses are judged by (FRL, arXiv 2010.06121)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from bench.block import Notes, cautions, doubt, remarks, set_off_best, shared, title
from bench.data import load
from bench.errors import UsageError
from bench.long import WORST_CASE, Group
from bench.stats import mean_std, wilson
from bench.typeset import Block, Cell, Row

#: the datasets whose classes have the same names everywhere; elsewhere the names lie with the images
_NAMED = ("digits", "cifar10", "cifar100", "svhn")


def block(alike: Sequence[Group]) -> Block:
    """Robust and clean accuracy of each class, and of the class that a run serves worst.

    Over seeds each is a mean, the worst class too: each seed has its own.

    Args:
        alike: groups that were asked the same of the same images.

    Raises:
        UsageError: outcomes are missing or damaged, or two groups have different images.
    """
    labels = _labels(alike)
    classes, n = np.unique(labels, return_counts=True)
    called = names(alike[0].dataset, classes)
    lines: list[list[Cell | None]] = []
    for group in alike:
        clean = next((column.name for column in group.columns if column.attack == "clean"), None)
        lines.append([*_cells(group, WORST_CASE, labels, classes), *_cells(group, clean, labels, classes)])
    set_off_best([line for group, line in zip(alike, lines, strict=True) if not doubt(group)])
    notes = Notes()
    of_all = shared(alike)
    marks = notes.marks(of_all)
    rows = []
    for group, line in zip(alike, lines, strict=True):
        own = notes.marks(text for text in remarks(group) if text not in of_all)
        rows.append(Row(group.label, own, tuple(line), doubt=doubt(group)))
    counted = (str(len(labels)), None, *map(str, n))
    rows.append(Row("images", (), counted * 2, counts=True))
    several = sum(not doubt(group) for group in alike) > 1
    return Block(
        dataset=alike[0].dataset,
        protocol=alike[0].protocol,
        title=title(alike[0], "accuracy of each class"),
        marks=marks,
        caption=tuple(_caption(alike, lines, n)),
        best="the best measured value of a column in a credible row; leads are not tested" if several else "",
        differs="",
        headings=tuple((kind, name) for kind in ("RA", "SA") for name in ("all", "worst class", *called)),
        rows=tuple(rows),
        notes=tuple(notes.texts.items()),
    )


def _labels(alike: Sequence[Group]) -> NDArray[np.int64]:
    """The class of each image, `(n,)`."""
    for group in alike:
        if not np.array_equal(group.images, alike[0].images):
            raise UsageError(
                f"{group.records[0]._folder} has other images than {alike[0].records[0]._folder}; delete both"
            )
    table = alike[0].records[0].outcomes(["index", "label"]).drop_duplicates("index")
    return np.asarray(table.sort_values("index")["label"], dtype=np.int64)


def names(dataset: str, classes: NDArray[np.int64]) -> list[str]:
    """The names of these classes where they are known without the dataset's files, else their numbers."""
    known = load(dataset).classes if dataset in _NAMED else ()
    # a network may have more outputs than there are classes
    return [known[label] if label < len(known) else str(label) for label in classes]


def _cells(
    group: Group, column: str | None, labels: NDArray[np.int64], classes: NDArray[np.int64]
) -> list[Cell | None]:
    """Of a column: all images, the class that it serves worst, and every class; None where it was not asked."""
    if column is None:
        return [None] * (2 + len(classes))
    place = [known.name for known in group.columns].index(column)
    runs = []
    for shares in group.shares:
        of_class = [shares[place, labels == label].mean() for label in classes]
        runs.append([shares[place].mean(), min(of_class), *of_class])
    # as everywhere, two trainings of one seed are averaged before seeds are
    seeds = np.array([record.asked.seed for record in group.records])
    by_seed = np.array([np.array(runs)[seeds == seed].mean(0) for seed in np.unique(seeds)])
    cells: list[Cell | None] = []
    for values in by_seed.T:
        mean, std = mean_std(values)
        cells.append(Cell(math.nan if group.void else 100 * mean, None if len(values) == 1 else 100 * std))
    return cells


def _caption(
    alike: Sequence[Group], lines: Sequence[Sequence[Cell | None]], n: NDArray[np.int64]
) -> Iterable[str]:
    yield "RA: under the worst case of every attack, SA: on clean images"
    yield (
        "Worst class: the lowest of a run, so that it errs to the low side where classes have few images"
        + (", the mean over seeds of each one's own" if any(group.seeds > 1 for group in alike) else "")
    )
    reach = 0.0
    for line in lines:
        of_classes = np.array(line).reshape(2, -1)[:, 2:]
        for cell, images in zip(of_classes.ravel(), [*n, *n], strict=True):
            if cell is not None and not math.isnan(cell.accuracy):
                low, high = wilson(cell.accuracy / 100 * images, images)
                reach = max(reach, cell.accuracy - 100 * float(low), 100 * float(high) - cell.accuracy)
    if reach:
        yield f"95 % Wilson intervals of a class reach at most {reach:.2f} points to either side"
    yield from cautions(alike)
