"""A table of words, in the four forms: what methods, protocols and recipes are, as against what they measured."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.errors import UnknownName
from bench.typeset import MISSING, markdown, tex

#: characters of a column from which on its cells are broken over lines
WIDE = 44


@dataclass(frozen=True)
class Sheet:
    """A caption, headings, rows of as many cells (empty where nothing applies), and notes below."""

    name: str
    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def chosen(sheet: Sheet, columns: Sequence[str]) -> Sheet:
    """The first column, and those of these headings, in their order.

    Raises:
        UnknownName: no such heading.
    """
    known = {heading.lower(): place for place, heading in enumerate(sheet.headings)}
    for column in columns:
        if column.lower() not in known:
            raise UnknownName("column", column, sheet.headings, " (of this table)")
    places = list(dict.fromkeys([0, *(known[column.lower()] for column in columns)]))
    return replace(
        sheet,
        headings=tuple(sheet.headings[place] for place in places),
        rows=tuple(tuple(row[place] for place in places) for row in sheet.rows),
    )


def transposed(sheet: Sheet) -> Sheet:
    """Rows for columns."""
    first, *others = zip(sheet.headings, *sheet.rows, strict=True)
    return replace(sheet, headings=tuple(first), rows=tuple(map(tuple, others)))


def written(sheet: Sheet, format: str) -> str:
    """The table as `text`, `markdown`, `latex` or `csv`, ending in a newline."""
    return {"text": _text, "markdown": _markdown, "latex": _latex, "csv": _csv}[format](sheet)


def _text(sheet: Sheet) -> str:
    broken = [[_broken(cell) for cell in row] for row in sheet.rows]
    columns = zip(sheet.headings, *broken, strict=True)
    widths = [max(len(heading), *(len(x) for cell in cells for x in cell)) for heading, *cells in columns]
    ruler = "-" * (sum(widths) + 2 * len(widths) - 2)

    def line(cells: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

    lines = [*textwrap.wrap(sheet.caption, 110), ruler, line(sheet.headings), ruler]
    for row in broken:
        for place in range(max(map(len, row))):
            lines.append(line([cell[place] if place < len(cell) else "" for cell in row]))
    lines.append(ruler)
    for note in sheet.notes:
        lines += textwrap.wrap(note, 110, break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def _broken(cell: str) -> list[str]:
    return textwrap.wrap(cell, WIDE, break_long_words=False, break_on_hyphens=False) or [MISSING]


def _markdown(sheet: Sheet) -> str:
    lines = [f"| {' | '.join(map(markdown, sheet.headings))} |", "|" + "---|" * len(sheet.headings)]
    lines += [f"| {' | '.join(markdown(cell) or MISSING for cell in row)} |" for row in sheet.rows]
    notes = ["", *(f"{markdown(note)}  " for note in sheet.notes)] if sheet.notes else []
    return "\n".join([markdown(sheet.caption), "", *lines, *notes]) + "\n"


def _latex(sheet: Sheet) -> str:
    columns = list(zip(*sheet.rows, strict=True)) or [()] * len(sheet.headings)
    broken = [max((len(cell) for cell in cells), default=0) > WIDE for cells in columns]
    share = 0.45 / max(1, sum(broken))
    kinds = "".join(f"p{{{share:.3g}\\textwidth}}" if one else "l" for one in broken)
    lines = [
        "% needs \\usepackage{booktabs} and \\usepackage{graphicx}",
        "\\begin{table*}",
        "\\centering",
        "\\footnotesize",
        f"\\caption{{{tex(sheet.caption)}}}",
        f"\\label{{tab:{sheet.name}}}",
        # only what is too wide is shrunk, nothing is blown up
        "\\resizebox{\\ifdim\\width>\\textwidth\\textwidth\\else\\width\\fi}{!}{%",
        f"\\begin{{tabular}}{{{kinds}}}",
        "\\toprule",
        " & ".join(map(tex, sheet.headings)) + r" \\",
        "\\midrule",
    ]
    for row in sheet.rows:
        cells = [
            f"\\raggedright {tex(cell) or '--'}" if one else tex(cell) or "--"
            for cell, one in zip(row, broken, strict=True)
        ]
        # after \raggedright in a last cell, \\ would end a line of that cell
        lines.append(" & ".join(cells) + r" \tabularnewline")
    lines += ["\\bottomrule", "\\end{tabular}}"]
    if sheet.notes:
        notes = " \\\\\n".join(tex(note) for note in sheet.notes)
        lines += ["\\par\\smallskip\\raggedright", notes]
    return "\n".join([*lines, "\\end{table*}"]) + "\n"


def _csv(sheet: Sheet) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([sheet.headings, *sheet.rows])
    return file.getvalue()
