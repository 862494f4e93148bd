"""Groups to tables: the layout of the DWF paper's Table 3, or the long table with a row per column.

Defenses stand in one block only if they were asked the same of the same images.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench import published as printed
from bench import typeset
from bench.errors import UsageError
from bench.long import HEADER, WORST_CASE, Group, Measured, frame, groups, radius
from bench.protocol import ADAPTIVE
from bench.record import read_all
from bench.stats import holm, mcnemar
from bench.typeset import MISSING, Block, Cell, Row

FORMATS = ("text", "markdown", "latex", "csv")
LAYOUTS = ("paper", "long")
#: the protocol whose tables have the columns of Table 3
PAPER = "dwf-paper"

#: the columns of the paper's Table 3: attack, its radius or steps, and the two lines of the heading
_TABLE_3 = [
    ("clean", 0.0, "", "SA"),
    *(("fgsm", i / 100, "RA-FGSM", f"0.0{i}") for i in range(1, 10)),
    *(("pgd", float(k), "RA-PGD", str(k)) for k in (10, 20, 30, 40, 50)),
    ("ms-pgd", 100.0, "RA-PGD", "100 (MS)"),
    ("a-pgd", 100.0, "RA-PGD", "100 (A)"),
]


def render(
    results: Path,
    *,
    format: str = "text",
    layout: str = "paper",
    published: bool = False,
    color: bool = False,
) -> str:
    """The finished runs of a results folder as a table, ending in a newline.

    Args:
        results: the folder.
        format: `text`, `markdown`, `latex` or `csv`.
        layout: `paper`, as the DWF paper's Table 3, or `long`, one row per run and column.
        published: whether rows of published numbers are added; the long layout has none.
        color: whether text may use the terminal's bold and faint.

    Raises:
        UsageError: no such format, layout or folder; no finished runs; or a damaged one.
    """
    _check(format, layout)
    found = groups(read_all(Path(results)))
    if not found:
        raise UsageError(f"no finished runs in {str(results)!r}; `bench run` makes some")
    return render_groups(found, format=format, layout=layout, published=published, color=color)


def render_groups(
    found: Sequence[Group],
    *,
    format: str = "text",
    layout: str = "paper",
    published: bool = False,
    color: bool = False,
) -> str:
    """These groups as a table, ending in a newline; the arguments are those of `render`.

    Raises:
        UsageError: no such format or layout.
    """
    _check(format, layout)
    if layout == "long":
        return typeset.LONG[format](long(found, exact=format == "csv"))
    return typeset.PAPER[format](paper(found, published=published), color)


def _check(format: str, layout: str) -> None:
    for what, given, known in (("format", format, FORMATS), ("layout", layout, LAYOUTS)):
        if given not in known:
            raise UsageError(f"no {what} named {given!r}; choose from {', '.join(known)}")


def long(found: Sequence[Group], *, exact: bool) -> list[list[str]]:
    """The cells of the long table, the header first.

    Args:
        found: the groups.
        exact: whether radii are written as decimals that read back the same, percentages with four decimals
            and what is missing as nothing; otherwise `8/255`, two decimals and a dash.
    """

    def written(name: str, value: object) -> str:
        if value is None:
            return "" if exact else MISSING
        if name in ("epsilon", "step_size") and isinstance(value, float):
            return repr(value) if exact else radius(value)
        if isinstance(value, float):
            return repr(round(value, 4)) if exact else f"{value:.2f}"
        return str(value)

    table = frame(found).astype(object)
    rows = table.where(table.notna(), None).itertuples(index=False)
    return [list(HEADER), *([written(n, v) for n, v in zip(HEADER, row, strict=True)] for row in rows)]


def paper(found: Sequence[Group], *, published: bool) -> list[Block]:
    """A block for every dataset, protocol and set of images, in that order.

    Args:
        found: the groups.
        published: whether the rows of the paper's Table 3 stand beside the measured ones.
    """
    alike: dict[tuple[str, str, str], list[Group]] = {}
    for group in found:
        asked = group.records[0].asked
        # what only a mixture is asked does not keep it from standing beside other networks
        columns = [c for c in asked.protocol.get("columns", ()) if c["attack"] not in ADAPTIVE]
        protocol = {**asked.protocol, "columns": columns}
        same = json.dumps([asked.samples, asked.data_hash, protocol], sort_keys=True)
        alike.setdefault((group.dataset, group.protocol, same), []).append(group)
    return [_block(alike[key], published) for key in sorted(alike)]


@dataclass(frozen=True)
class _Slot:
    """A column of a block: its heading, and the name of the groups' column that goes there."""

    heading: tuple[str, str]
    name: str | None
    asked: tuple[str, float] | None = None
    """attack and setting in the paper's Table 3"""

    def of(self, group: Group) -> Measured | None:
        return None if self.name is None else group.column(self.name)


def _block(alike: list[Group], published: bool) -> Block:
    slots = _slots(alike)
    notes = _Notes()
    shared = [
        text
        for text in alike[0].records[0].footnotes
        if all(text in r.footnotes for g in alike for r in g.records)
    ]
    marks = notes.marks(shared)
    cells = _set_off_best([[_cell(slot.of(group)) for slot in slots] for group in alike])
    from_paper = printed.rows(alike[0].dataset) if published and alike[0].protocol == PAPER else {}
    rows = []
    for group, line in zip(alike, cells, strict=True):
        own = notes.marks(text for text in _remarks(group) if text not in shared)
        rows.append(Row(group.label, own, tuple(line)))
        name = group.records[0].published_as
        if name in from_paper:
            rows.append(_printed_row(name, from_paper[name], slots, notes))
    measured = {group.records[0].published_as for group in alike}
    rows += [
        _printed_row(name, row, slots, notes) for name, row in from_paper.items() if name not in measured
    ]
    return Block(
        dataset=alike[0].dataset,
        protocol=alike[0].protocol,
        title=_title(alike[0]),
        marks=marks,
        caption=tuple(_caption(alike, slots, bool(from_paper))),
        best=_best(alike, slots),
        headings=tuple(slot.heading for slot in slots),
        rows=tuple(rows),
        notes=tuple(notes.texts.items()),
    )


def _slots(alike: Sequence[Group]) -> list[_Slot]:
    """The columns of a block: those of Table 3 in its protocol, then what else there is, worst case last."""
    columns = {column.name: column for group in alike for column in group.columns}
    worst = columns.pop(WORST_CASE)
    slots = []
    if alike[0].protocol == PAPER:
        del worst
        for attack, setting, top, sub in _TABLE_3:
            fits = [name for name, column in columns.items() if _asked(column) == (attack, setting)]
            slots.append(_Slot((top, sub), fits[0] if fits else None, (attack, setting)))
            columns = {name: column for name, column in columns.items() if name not in fits[:1]}
    else:
        columns[WORST_CASE] = worst
    radii = {column.epsilon for column in columns.values() if column.attack not in ("clean", WORST_CASE)}
    headings = {name: _heading(column, len(radii) > 1) for name, column in columns.items()}
    for name, heading in headings.items():
        twice = list(headings.values()).count(heading) > 1
        slots.append(_Slot(("", name) if twice else heading, name))
    return slots


def _asked(column: Measured) -> tuple[str, float]:
    setting = column.epsilon if column.attack == "fgsm" else column.steps
    return column.attack, round(float(setting or 0), 6)


def _heading(column: Measured, name_radius: bool) -> tuple[str, str]:
    if column.attack in ("clean", WORST_CASE):
        return "", "SA" if column.attack == "clean" else "worst case"
    parts = [radius(column.epsilon)] if name_radius and column.epsilon is not None else []
    if column.steps is not None:
        parts.append(f"{column.steps}" + (f"×{column.restarts}" if (column.restarts or 1) > 1 else ""))
    if (column.eot or 1) > 1:
        parts.append(f"EoT {column.eot}")
    return (column.attack, ", ".join(parts)) if parts else ("", column.attack)


def _cell(column: Measured | None) -> Cell | None:
    if column is None:
        return None
    return Cell(column.accuracy, None if column.seeds == 1 else column.std)


def _set_off_best(lines: list[list[Cell | None]]) -> list[list[Cell | None]]:
    """The cells, the highest of each column marked as it is printed; the only one of a column is no best."""
    for column in range(len(lines[0])):
        values = [round(cell.accuracy, 2) for line in lines if (cell := line[column]) is not None]
        for line in lines:
            cell = line[column]
            if cell is not None and len(values) > 1:
                line[column] = replace(cell, best=round(cell.accuracy, 2) == max(values))
    return lines


def _printed_row(
    name: str, row: dict[tuple[str, float], printed.Printed], slots: Sequence[_Slot], notes: _Notes
) -> Row:
    found = [row.get(slot.asked) if slot.asked else None for slot in slots]
    cells = tuple(None if value is None else Cell(value.accuracy, value.std) for value in found)
    return Row(f"{name}, published", notes.marks(printed.doubts(row)), cells, True)


class _Notes:
    """Texts below a table, each under one mark however often it is cited: a, b, …, z, aa, …"""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def marks(self, texts: Iterable[str]) -> tuple[str, ...]:
        """The marks of these texts, in the order of the notes."""
        cited = {self._mark(" ".join(text.split())) for text in texts}
        return tuple(mark for mark in self.texts if mark in cited)

    def _mark(self, text: str) -> str:
        for mark, known in self.texts.items():
            if known == text:
                return mark
        place, mark = len(self.texts), ""
        while place >= 0:
            mark, place = chr(ord("a") + place % 26) + mark, place // 26 - 1
        self.texts[mark] = text
        return mark


def _remarks(group: Group) -> list[str]:
    """What is to be said of a group alone: its footnotes, and its findings with the seeds they concern."""
    remarks = list(dict.fromkeys(text for record in group.records for text in record.footnotes))
    for text in dict.fromkeys(text for record in group.records for text in record.findings):
        seeds = [record.asked.seed for record in group.records if text in record.findings]
        some = len(seeds) < len(group.records)
        remarks.append(f"{text} (seed {', '.join(map(str, seeds))})" if some else text)
    return remarks


def _title(group: Group) -> str:
    n = len(group.images)
    few = "fewer than 1000; " if n < 1000 else ""
    data = group.records[0].asked.data_hash[:8]
    return f"{group.dataset}, protocol {group.protocol}: accuracy in % on n = {n} images ({few}data {data})"


def _caption(alike: Sequence[Group], slots: Sequence[_Slot], published: bool) -> Iterable[str]:
    shown = [column for group in alike for slot in slots if (column := slot.of(group)) is not None]
    paper = alike[0].protocol == PAPER
    yield "SA: on clean images; " + ("RA: on attacked ones" if paper else "worst case: under every attack")
    iterated = [column for column in shown if column.steps is not None]
    attacks = iterated if paper else [c for c in shown if c.attack not in ("clean", WORST_CASE)]
    radii = sorted({column.epsilon for column in attacks if column.epsilon is not None})
    sizes = sorted({column.step_size for column in iterated if column.step_size is not None})
    if radii:
        norms = "/".join(dict.fromkeys(column.norm for column in attacks if column.norm))
        size = f", step size {', '.join(map(radius, sizes))}" if sizes else ""
        what = "PGD" if paper else "Attacks"
        yield f"{what}: {norms or 'norm not recorded'}, eps {', '.join(map(radius, radii))}{size}"
    starts = {column.restarts for column in shown if column.attack == "ms-pgd" and column.restarts}
    if paper and starts:
        yield f"MS: {', '.join(map(str, sorted(starts)))} starts, A: adaptive attack"
    reach = max(max(column.ci_high - column.accuracy, column.accuracy - column.ci_low) for column in shown)
    yield f"95 % Wilson intervals reach at most {reach:.2f} points to either side"
    several = [f"{group.label} {group.seeds}" for group in alike if group.seeds > 1]
    if several:
        single = "; rows without it are one seed" if len(several) < len(alike) else ""
        yield f"±: sample standard deviation over seeds ({', '.join(several)}){single}"
    reduced = [group.label for group in alike if group.records[0].asked.precision != "fp32"]
    if reduced:
        yield f"Gradients in bf16: {', '.join(reduced)}"
    if published:
        yield (
            "Rows marked 'published' are what Divided We Fall (arXiv 2512.20821 v2) prints, "
            "for display only; its ± is over five runs"
        )


def _best(alike: Sequence[Group], slots: Sequence[_Slot]) -> str:
    """Which values are set off, and how sure their lead over every other row is."""
    if len(alike) < 2:
        return ""
    said = "the best measured value of a column"
    if any(len(group.records) > 1 for group in alike):
        return f"{said}; leads are not tested where defenses have several seeds"
    if not all(np.array_equal(group.images, alike[0].images) for group in alike):
        return f"{said}; leads are not tested, for the images differ"
    compared: list[int] = []
    pvalues: list[float] = []
    for place, slot in enumerate(slots):
        asked = [(group, column) for group in alike if (column := slot.of(group)) is not None]
        if len(asked) > 1:
            first, first_column = max(asked, key=lambda pair: pair[1].accuracy)
            for group, column in asked:
                if group is not first:
                    compared.append(place)
                    pvalues.append(mcnemar(first.outcomes(first_column.name), group.outcomes(column.name)))
    doubtful = {place for place, p in zip(compared, holm(pvalues), strict=True) if p >= 0.05}
    names = [" ".join(slots[place].heading).strip() for place in sorted(doubtful)]
    if not compared:
        return ""
    where = "every column"
    if names:
        where = "no column" if len(names) == len(set(compared)) else f"every column but {', '.join(names)}"
    test = "exact McNemar test on the same images, Holm over all comparisons, 5 %"
    return f"{said}; its lead over every other row is significant in {where} ({test})"
