"""How far what was measured is from what the DWF paper prints, cell by cell, and which radius of PGD would explain its row.

The paper's networks are not ours, and neither is their training: the difference is to be looked at, it is no error of either.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench import published
from bench.long import Group, Measured
from bench.plot.calibration import PROTOCOL as CALIBRATION
from bench.plot.calibration import implied
from bench.sheet import Sheet
from bench.typeset import DIFFERS

#: the protocol whose columns the paper prints
PAPER = "dwf-paper"


def sheets(found: Sequence[Group], lines: str | None = None) -> list[Sheet]:
    """For each dataset the differences under the paper's protocol, and the radii that calibration runs imply."""
    made = []
    for dataset in dict.fromkeys(group.dataset for group in found):
        rows = published.rows(dataset) or (published.rows(lines) if lines else {})
        own = [(group, name) for group in found if group.dataset == dataset and (name := _name(group, rows))]
        gaps = [(group, rows[name]) for group, name in own if group.protocol == PAPER]
        if gaps:
            made.append(_gaps(dataset, gaps))
        curves = [(group, name) for group, name in own if group.protocol == CALIBRATION]
        if curves:
            made.append(_radii(dataset, curves, rows))
    return made


def _name(group: Group, rows: published.PublishedRows) -> str | None:
    record = group.records[0]
    return published.row_of(record.asked.defense, record.published_as, rows)


def _asked(column: Measured) -> tuple[str, float] | None:
    """How the paper's tables name what a column asks."""
    if column.attack == "clean":
        return "clean", 0.0
    setting = column.epsilon if column.attack == "fgsm" else column.steps
    return None if setting is None else (column.attack, float(setting))


def _gaps(dataset: str, own: Sequence[tuple[Group, published.PublishedRow]]) -> Sheet:
    columns = [column for column in own[0][0].columns if _asked(column) in own[0][1]]

    def cell(group: Group, row: published.PublishedRow, name: str) -> str:
        column = group.column(name)
        asked = None if column is None else _asked(column)
        if column is None or asked is None or asked not in row:
            return ""
        printed = row[asked].accuracy
        outside = not column.ci_low <= printed <= column.ci_high
        return f"{column.accuracy - printed:+.1f}{DIFFERS if outside else ''}"

    table = [(group.label, *(cell(group, row, column.name) for column in columns)) for group, row in own]
    caption = (
        f"{dataset}, protocol {PAPER}: measured less published, in points of accuracy, on n = {len(own[0][0].images)} images. {DIFFERS}: what is "
        "printed lies outside the 95 % Wilson interval of what was measured. The paper's networks are larger and were trained for longer."
    )
    headings = ("defense", *("SA" if c.attack == "clean" else c.name for c in columns))
    return Sheet("published-differences", caption, headings, tuple(table))


def _radii(dataset: str, own: Sequence[tuple[Group, str]], rows: published.PublishedRows) -> Sheet:
    table = []
    for group, name in own:
        steps = max(column.steps or 0 for column in group.columns)
        printed = rows[name].get(("pgd", float(steps)))
        if printed is None:
            continue
        at = implied(group, printed.accuracy)
        clean = next(column for column in group.columns if column.attack == "clean")
        said = (
            f"{at:.4f}, {255 * at:.1f}/255"
            if at is not None
            else "none: it is above what is right unattacked"
        )
        table.append((group.label, f"{clean.accuracy:.1f}", f"{printed.accuracy:.1f}", f"PGD-{steps}", said))
    caption = (
        f"{dataset}: the radius at which PGD leaves of our network what the paper prints of its own, read off between measured radii "
        "in a straight line. The paper does not give its radius; 8/255 is 0.0314."
    )
    headings = ("defense", "SA, measured", "RA, printed", "attack", "radius that would explain it")
    return Sheet("published-radii", caption, headings, tuple(table))
