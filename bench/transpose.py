"""A table with a row for each attack and a column for each defense: what is asked down the side, for a narrow page."""

from __future__ import annotations

import re
from dataclasses import replace

from bench.typeset import Block, Row

_SWAPPED = {"row": "column", "rows": "columns", "column": "row", "columns": "rows"}


def transposed(block: Block, *, marked: bool = True) -> Block:
    """Rows for columns, and the words for them in what is said of the table; `marked`: with the marks of notes."""
    headings = tuple(
        ("", row.name + "".join(f" [{mark}]" for mark in row.marks if marked)) for row in block.rows
    )
    rows = tuple(
        Row(" ".join(heading).strip(), (), tuple(row.cells[place] for row in block.rows))
        for place, heading in enumerate(block.headings)
    )
    return replace(
        block,
        corner="attack",
        caption=tuple(map(_swapped, block.caption)),
        best=_swapped(block.best),
        differs=_swapped(block.differs),
        headings=headings,
        rows=rows,
        notes=tuple(
            (mark, _swapped(text) if text.startswith("few-images: n =") else text)
            for mark, text in block.notes
        ),
    )


def _swapped(text: str) -> str:
    said = re.sub(r"\b(rows?|columns?)\b", lambda found: _SWAPPED[found[0]], text)
    said = said.replace("Rows marked", "Columns marked")
    return said.replace("to its left", "above it")
