"""The images that a run lost: to which attack, after how many of its steps, and to which answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bench.long import Group
from bench.per_class import names
from bench.record import ColumnRecord

#: fallen images that are listed one by one; all of them are in outcomes.parquet
LISTED = 10
#: classes that fit into a table of answers; of more, the commonest mistakes are listed, so many of them
FIT, COMMONEST = 20, 20


@dataclass(frozen=True, kw_only=True)
class Fallen:
    """One image that a run lost to an attack: where it lies in the dataset, and how it fell."""

    image: int
    label: str
    prediction: str
    column: str
    restart: int
    step: int


@dataclass(frozen=True, kw_only=True)
class Line:
    """What one attack broke: how many images, how many of them from a later start than the first, and in which span of steps."""

    column: str
    images: int
    later: int
    counts: tuple[int, ...]
    untold: int
    """images of which the attack does not tell the step"""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What fallen images were taken for."""

    classes: tuple[str, ...] = ()
    counts: tuple[tuple[int, ...], ...] = ()
    """of a class (row) read as another (column); empty where there are too many classes"""
    commonest: tuple[tuple[str, str, int], ...] = ()
    """then these: class, read as, images"""


@dataclass(frozen=True, kw_only=True)
class Falls:
    """The images of a group's first record that were right clean and fell, each charged to the first attack that broke it."""

    lines: tuple[Line, ...]
    """by attack, in the protocol's order"""
    spans: tuple[str, ...]
    """of steps"""
    final: bool
    """whether only the final iterate was looked at, so that a step tells which attack it was and not how soon an image fell"""
    answers: Answers
    listed: tuple[Fallen, ...]


def falls(group: Group) -> Falls | None:
    """What fell of a group, and how; None where nothing did that was right clean."""
    charged = list(_charged(group))
    if not charged:
        return None
    table = group.records[0].outcomes(["index", "label", "column", "prediction", "restart", "step"])
    table["column"] = table["column"].astype(object)
    called = _called(group.dataset, table)
    # the outcome of each fallen image under the attack it is charged to
    fell = pd.DataFrame(charged, columns=["index", "column"]).merge(table, "left", ["index", "column"])
    spans, lines = _lines(fell)
    return Falls(
        lines=lines,
        spans=spans,
        final=group.records[0].asked.protocol.get("success") == "last",
        answers=_answers(fell, called),
        listed=tuple(
            Fallen(
                image=image,
                label=called[label],
                prediction=called[read],
                column=column,
                restart=restart,
                step=step,
            )
            for image, column, label, read, restart, step in fell.head(LISTED).itertuples(
                index=False, name=None
            )
        ),
    )


def counted(group: Group) -> list[tuple[int, ColumnRecord]]:
    """The attacks that count for the worst case, with their places among the columns."""
    columns = enumerate(group.records[0].columns)
    return [(place, c) for place, c in columns if c.attack != "clean" and not c.diagnostic]


def _charged(group: Group) -> Iterator[tuple[int, str]]:
    """Images of the first record that held clean but not under every attack: which, and the first attack they fell to."""
    clean = next((c.name for c in group.records[0].columns if c.attack == "clean"), None)
    if clean is None:
        return
    standing = group.outcomes(clean)
    for _, column in counted(group):
        if column.part_of is None:
            fell = standing & ~group.outcomes(column.name)
            standing = standing & ~fell
            yield from ((int(image), column.name) for image in group.images[fell])


def _lines(fell: pd.DataFrame) -> tuple[tuple[str, ...], tuple[Line, ...]]:
    """The spans of steps in which images fell, and what each attack broke in them."""
    steps = fell["step"].to_numpy(dtype=np.int64)
    span = np.where(steps < 0, -1, _span(steps))
    told = span[steps >= 0]
    spans = range(told.min(), told.max() + 1) if len(told) else range(0)
    lines = []
    for column in dict.fromkeys(fell["column"]):
        own = (fell["column"] == column).to_numpy()
        lines.append(
            Line(
                column=column,
                images=int(own.sum()),
                later=int((fell["restart"].to_numpy()[own] > 0).sum()),
                counts=tuple(int((span[own] == at).sum()) for at in spans),
                untold=int((span[own] < 0).sum()),
            )
        )
    return tuple(map(_words, spans)), tuple(lines)


def _span(steps: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which span of steps each is in: 0 alone, 1 alone, 2–3, 4–7 and so on."""
    return np.frexp(np.maximum(steps, 0))[1].astype(np.int64)


def _words(span: int) -> str:
    low, high = (1 << span) >> 1, (1 << span) - 1
    return str(high) if span < 2 else f"{low}–{high}"


def _called(dataset: str, table: pd.DataFrame) -> dict[int, str]:
    """Every label and every answer of a record, with the name of its class."""
    numbers = np.union1d(table["label"], table["prediction"]).astype(np.int64)
    return dict(zip(numbers.tolist(), names(dataset, numbers), strict=True))


def _answers(fell: pd.DataFrame, called: dict[int, str]) -> Answers:
    pairs = Counter(zip(fell["label"].tolist(), fell["prediction"].tolist(), strict=True))
    if len(called) > FIT:
        commonest = sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))[:COMMONEST]
        return Answers(commonest=tuple((called[label], called[read], n) for (label, read), n in commonest))
    return Answers(
        classes=tuple(called.values()),
        counts=tuple(tuple(pairs[label, read] for read in called) for label in called),
    )
