"""A table as text, Markdown, LaTeX or CSV: how it is written, not what it says."""

from __future__ import annotations

import csv
import io
import math
import textwrap
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.long import HEADER

#: stands where there is no value
MISSING = "–"
#: stands where there must be no value
VOID = "void"
#: stands behind a value that differs from the one it is compared with
DIFFERS = "†"
#: characters of a line of text; a wider table is written in several parts, one below the other
WIDTH = 200


@dataclass(frozen=True)
class Cell:
    """An accuracy in percent (NaN where it is void), its std over seeds (None for one), and what sets it off.

    It may be the `best` of its column, and may be found by a test that it `differs` from the row it is compared with.
    """

    accuracy: float
    std: float | None = None
    best: bool = False
    differs: bool = False
    interval: tuple[float, float] | None = None
    """its 95 % interval, where that is to be printed"""

    def __str__(self) -> str:
        if math.isnan(self.accuracy):
            return VOID
        std = "" if self.std is None else f" ± {self.std:.2f}"
        interval = "" if self.interval is None else " [{:.1f}, {:.1f}]".format(*self.interval)
        return f"{self.accuracy:.2f}{std}{interval}{DIFFERS if self.differs else ''}"


@dataclass(frozen=True)
class Row:
    """A defense, or what a paper prints of one (`published`), or of how many images a column is (`counts`).

    A cell is an accuracy, something else as it is to be written, or None where it was not asked. `doubt` is `suspect`
    or `void` where the runs are not credible.
    """

    label: str
    marks: tuple[str, ...]
    cells: tuple[Cell | str | None, ...]
    published: bool = False
    counts: bool = False
    doubt: str = ""

    @property
    def name(self) -> str:
        """The label, with the doubt beside it."""
        return f"{self.label} ({self.doubt})" if self.doubt else self.label


@dataclass(frozen=True)
class Block:
    """One table: defenses that were asked the same of the same images.

    Args:
        title: the first sentence of the caption.
        marks: of the notes that hold for all of the table.
        caption: further sentences.
        best: what is to be said of the best value of a column, after the words for how it is set off; empty
            where there is nothing to compare.
        differs: what the dagger behind a value says; empty where nothing was compared with one row.
        headings: per column, its two lines.
        rows: in order.
        notes: mark and text.
        corner: what the first column is of.
    """

    dataset: str
    protocol: str
    title: str
    marks: tuple[str, ...]
    caption: tuple[str, ...]
    best: str
    differs: str
    headings: tuple[tuple[str, str], ...]
    rows: tuple[Row, ...]
    notes: tuple[tuple[str, str], ...]
    corner: str = "defense"


def _caption(block: Block, how: str, marks: str) -> list[str]:
    """The sentences of a caption; `how` is the word for what sets off the best value."""
    best = [f"{how}: {block.best}"] if block.best else []
    differs = [f"{DIFFERS}: {block.differs}"] if block.differs else []
    return [f"{sentence}." for sentence in (block.title + marks, *block.caption, *best, *differs)]


def _paper_text(block: Block, color: bool) -> str:
    title, *sentences = _caption(block, "Bold" if color else "*", _bracketed(block.marks))
    lines = [title, *_wrapped(" ".join(sentences))]
    labels = [("  " if row.published else "") + row.name + _bracketed(row.marks) for row in block.rows]
    first = max(map(len, labels))
    tail = "  " if block.differs else " "
    texts = [[_text_cell(cell, color, len(tail)) for cell in row.cells] for row in block.rows]
    widths = [
        max(len(sub + tail), *(len(line[place]) for line in texts))
        for place, (_, sub) in enumerate(block.headings)
    ]
    for top, start, stop in _spans(block.headings):
        # A heading that is wider than what it spans widens its first column.
        widths[start] += max(0, len(top) + 1 - _room(widths[start:stop]))
    for panel in _panels(list(_pieces(_spans(block.headings), widths, WIDTH - first)), widths, WIDTH - first):
        start, stop = panel[0][1], panel[-1][2]
        ruler = "-" * (first + 1 + _room(widths[start:stop]))
        tops = [top.center(_room(widths[a:b])) for top, a, b in panel]
        subs = [(block.headings[c][1] + tail).rjust(widths[c]) for c in range(start, stop)]
        heads = [" ".join([" " * first, *line]).rstrip() for line in (tops, subs)]
        lines += [ruler, *filter(None, heads), ruler]
        for row, label, line in zip(block.rows, labels, texts, strict=True):
            cells = [line[c].rjust(widths[c]) for c in range(start, stop)]
            if color:
                cells = [
                    _emphasised(text, cell) for text, cell in zip(cells, row.cells[start:stop], strict=True)
                ]
            written = " ".join([label.ljust(first), *cells]).rstrip()
            lines.append(f"\x1b[2m{written}\x1b[0m" if color and row.published else written)
        lines.append(ruler)
    for mark, text in block.notes:
        lines += _wrapped(f"[{mark}] {text}", indent=len(mark) + 3)
    return "\n".join(lines) + "\n"


def _room(widths: Sequence[int]) -> int:
    """What columns of these widths take, side by side."""
    return sum(widths) + len(widths) - 1


def _pieces(
    spans: Sequence[tuple[str, int, int]], widths: Sequence[int], room: int
) -> Iterator[tuple[str, int, int]]:
    """Columns that belong together, in pieces where all of them are wider than a line."""
    for top, start, stop in spans:
        for place in range(start + 1, stop):
            if _room(widths[start : place + 1]) > room:
                yield top, start, place
                start = place
        yield top, start, stop


def _panels(
    spans: Sequence[tuple[str, int, int]], widths: Sequence[int], room: int
) -> list[list[tuple[str, int, int]]]:
    """Columns that belong together, as many side by side as there is room for."""
    panels: list[list[tuple[str, int, int]]] = [[]]
    for span in spans:
        start = panels[-1][0][1] if panels[-1] else span[1]
        if panels[-1] and _room(widths[start : span[2]]) > room:
            panels.append([])
        panels[-1].append(span)
    return panels


def _text_cell(cell: Cell | str | None, color: bool, room: int) -> str:
    """A cell that ends in its dagger and its star, or in the room for them."""
    marks = DIFFERS * cell.differs + "*" * (cell.best and not color) if isinstance(cell, Cell) else ""
    return (MISSING if cell is None else str(cell).removesuffix(DIFFERS)) + marks.ljust(room)


def _emphasised(text: str, cell: Cell | str | None) -> str:
    return f"\x1b[1m{text}\x1b[0m" if isinstance(cell, Cell) and cell.best else text


def _wrapped(text: str, indent: int = 0) -> list[str]:
    return textwrap.wrap(
        text, 110, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False
    )


def _bracketed(marks: Sequence[str]) -> str:
    return "".join(f" [{mark}]" for mark in marks)


def _spans(headings: Sequence[tuple[str, str]]) -> list[tuple[str, int, int]]:
    """Neighbouring columns under one first line: that line, where it starts and where it stops."""
    spans: list[tuple[str, int, int]] = []
    for place, (top, _) in enumerate(headings):
        if top and spans and spans[-1][0] == top:
            spans[-1] = (top, spans[-1][1], place + 1)
        else:
            spans.append((top, place, place + 1))
    return spans


def _long_text(cells: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    words = sum(name in ("dataset", "defense", "protocol", "attack") for name in HEADER)
    lines = []
    for line in cells:
        padded = [
            text.ljust(width) if place < words else text.rjust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines) + "\n"


def _paper_markdown(block: Block) -> str:
    caption = " ".join(_caption(block, "Bold", _bracketed(block.marks)))
    heads = [block.corner, *(" ".join(heading).strip() for heading in block.headings)]
    lines = [markdown(caption), "", *_markdown_head(heads, 1)]
    for row in block.rows:
        label = markdown(row.name + _bracketed(row.marks))
        cells = [_markdown_cell(cell, row.published) for cell in row.cells]
        lines.append(f"| {' | '.join([f'*{label}*' if row.published else label, *cells])} |")
    # Two blanks end a line without ending the paragraph.
    notes = [f"{markdown(f'[{mark}] {text}')}  " for mark, text in block.notes]
    return "\n".join([*lines, *(["", *notes] if notes else [])]) + "\n"


def _markdown_cell(cell: Cell | str | None, published: bool) -> str:
    if cell is None:
        return MISSING
    if isinstance(cell, str):
        return markdown(cell)
    return f"**{cell}**" if cell.best else f"*{cell}*" if published else str(cell)


def _markdown_head(names: Sequence[str], words: int) -> list[str]:
    rules = ["---" if place < words else "---:" for place in range(len(names))]
    return [f"| {' | '.join(map(markdown, names))} |", f"|{'|'.join(rules)}|"]


def markdown(text: str) -> str:
    """Text as Markdown prints it, inside a table too."""
    return "".join("\\" + c if c in "\\|*`<" else c for c in text)


def _long_markdown(cells: list[list[str]]) -> str:
    lines = [f"| {' | '.join(map(markdown, line))} |" for line in cells[1:]]
    return "\n".join([*_markdown_head(cells[0], 4), *lines]) + "\n"


def _latex_names(blocks: Sequence[Block]) -> list[str]:
    """A name for each block that a \\label can bear, numbered where two blocks would share it."""
    names: list[str] = []
    for block in blocks:
        name = "".join(c if c.isascii() and c.isalnum() else "-" for c in f"{block.dataset}-{block.protocol}")
        same = sum(known == name or known.startswith(f"{name}.") for known in names)
        names.append(f"{name}.{same + 1}" if same else name)
    return names


def _paper_latex(block: Block, name: str) -> str:
    title, *sentences = map(tex, _caption(block, "Bold", ""))
    caption = " ".join([title + _superscript(block.marks), *sentences])
    spans = _spans(block.headings)
    tops = [f"\\multicolumn{{{b - a}}}{{c}}{{{tex(top)}}}" if top else "" for top, a, b in spans]
    rules = [f"\\cmidrule(lr){{{a + 2}-{b + 1}}}" for top, a, b in spans if top]
    lines = [
        "% needs \\usepackage{booktabs} and \\usepackage{graphicx}",
        "\\begin{table*}",
        "\\centering",
        f"\\caption{{{caption}}}",
        f"\\label{{tab:{name}}}",
        # only what is too wide is shrunk, nothing is blown up
        "\\resizebox{\\ifdim\\width>\\textwidth\\textwidth\\else\\width\\fi}{!}{%",
        f"\\begin{{tabular}}{{l{'r' * len(block.headings)}}}",
        "\\toprule",
        *([_latex_row(["", *tops]), " ".join(rules)] if rules else []),
        _latex_row([block.corner.capitalize(), *(tex(sub) for _, sub in block.headings)]),
        "\\midrule",
    ]
    for row in block.rows:
        label = tex(row.name)
        label = (f"\\quad\\textit{{{label}}}" if row.published else label) + _superscript(row.marks)
        lines.append(_latex_row([label, *(_latex_cell(cell, row.published) for cell in row.cells)]))
    lines += ["\\bottomrule", "\\end{tabular}}"]
    if block.notes:
        notes = [f"\\textsuperscript{{{mark}}}~{tex(text)}" for mark, text in block.notes]
        lines += ["\\par\\smallskip\\raggedright\\footnotesize", " \\\\\n".join(notes)]
    return "\n".join([*lines, "\\end{table*}"]) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _latex_cell(cell: Cell | str | None, published: bool) -> str:
    if cell is None:
        return "--"
    text = tex(str(cell))
    if isinstance(cell, str):
        return text
    return f"\\textbf{{{text}}}" if cell.best else f"\\textit{{{text}}}" if published else text


def _superscript(marks: Sequence[str]) -> str:
    return f"\\textsuperscript{{{','.join(marks)}}}" if marks else ""


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "`": r"\textasciigrave{}",
    "\u00a0": "~",
    # \\ takes a bracket that follows it for its argument
    "[": "{[}",
    "–": "--",
    "—": "---",
    "…": r"\dots{}",
    "‘": "`",
    "’": "'",
    "“": "``",
    "”": "''",
    "±": r"$\pm$",
    "†": r"$\dagger$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "−": "$-$",
    "∞": r"$\infty$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≈": r"$\approx$",
    "≠": r"$\neq$",
    "≪": r"$\ll$",
    "≫": r"$\gg$",
    "→": r"$\to$",
    "∈": r"$\in$",
    "‖": r"$\Vert$",
    "₁": r"$_1$",
    "₂": r"$_2$",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}


#: grave, acute, circumflex, tilde, macron, breve, dot, diaeresis, ring, double acute, caron, cedilla
_ACCENTS = "\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u030a\u030b\u030c\u0327"


def tex(text: str) -> str:
    """Text as LaTeX prints it, with its default fonts and no package."""
    # two hyphens, as of an option, would become a dash
    parts = unicodedata.normalize("NFC", text).split("--")
    return "-{}-".join("".join(map(_latex_character, part)) for part in parts)


def _latex_character(c: str) -> str:
    if c in _LATEX:
        return _LATEX[c]
    if "α" <= c <= "ω" and c not in "ος":
        return f"$\\{unicodedata.name(c).split()[-1].lower().replace('lamda', 'lambda')}$"
    letter, *accents = list(unicodedata.normalize("NFD", c))
    if (
        c.isascii()
        or (letter.isascii() and len(accents) == 1 and accents[0] in _ACCENTS)
        or c in "ßæøåœÆØÅŒłŁ"
    ):
        return c
    return f"U+{ord(c):04X}"


def _long_latex(cells: list[list[str]]) -> str:
    lines = [
        "% needs \\usepackage{booktabs} and \\usepackage{longtable}",
        "\\begin{longtable}{" + "l" * 4 + "r" * (len(HEADER) - 4) + "}",
        "\\toprule",
        _latex_row([tex(name) for name in cells[0]]),
        "\\midrule",
        "\\endhead",
        *(_latex_row([tex(text) for text in line]) for line in cells[1:]),
        "\\bottomrule",
        "\\end{longtable}",
    ]
    return "\n".join(lines) + "\n"


def _paper_csv(blocks: Sequence[Block]) -> str:
    """All blocks under one header, the columns of all of them; empty where a row has no such column."""
    headings = list(dict.fromkeys(heading for block in blocks for heading in block.headings))
    names = [" ".join(heading).strip() for heading in headings]
    corner = blocks[0].corner if blocks else "defense"
    # a source is that of a defense
    sourced = corner == "defense"
    lines = [["dataset", "protocol", corner, *(["source"] if sourced else []), *names]]
    for block in blocks:
        for row in block.rows:
            cells = dict(zip(block.headings, row.cells, strict=True))
            texts = ["" if (cell := cells.get(heading)) is None else str(cell) for heading in headings]
            source = "published" if row.published else "images" if row.counts else "measured"
            source += f", {row.doubt}" if row.doubt else ""
            lines.append([block.dataset, block.protocol, row.label, *([source] if sourced else []), *texts])
    return _csv(lines)


def _csv(lines: list[list[str]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue()


#: the writers of the paper's layout: blocks, and whether a terminal's bold may be used
PAPER: dict[str, Callable[[Sequence[Block], bool], str]] = {
    "text": lambda blocks, color: "\n\n".join(_paper_text(block, color) for block in blocks),
    "markdown": lambda blocks, color: "\n".join(_paper_markdown(block) for block in blocks),
    "latex": lambda blocks, color: "\n".join(map(_paper_latex, blocks, _latex_names(blocks))),
    "csv": lambda blocks, color: _paper_csv(blocks),
}
#: the writers of the long layout: lines of cells, the header first
LONG: dict[str, Callable[[list[list[str]]], str]] = {
    "text": _long_text,
    "markdown": _long_markdown,
    "latex": _long_latex,
    "csv": _csv,
}
#: the writers of what stands below all tables: one line each, where a format has a place for it
BELOW: dict[str, Callable[[Sequence[str]], str]] = {
    "text": lambda lines: "\n".join(lines) + "\n",
    # two blanks end a line without ending the paragraph
    "markdown": lambda lines: "".join(f"{markdown(line)}  \n" for line in lines),
}


def document(body: str) -> str:
    """LaTeX tables as a whole document, for pdflatex as it is; the long table lies across the page."""
    across = ",landscape" if "\\begin{longtable}" in body else ""
    packages = ("[T1]{fontenc}", "[utf8]{inputenc}", f"[margin=1.5cm{across}]{{geometry}}")
    uses = [*packages, "{booktabs}", "{graphicx}", "{longtable}"]
    lines = ["\\documentclass{article}", *(f"\\usepackage{name}" for name in uses), "\\begin{document}"]
    return "\n".join([*lines, body.rstrip("\n"), "\\end{document}"]) + "\n"
