"""What the page says of one defense under one protocol: every number taken from a group, none computed anew."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import published, registry
from bench.block import doubt, remarks
from bench.curves import PROTOCOL, line_of
from bench.finding import Finding, merged
from bench.long import WORST_CASE, Group, Measured
from bench.per_class import block as per_class
from bench.record import ColumnRecord, Record, Void
from bench.report import words
from bench.report.falls import Falls, counted, falls
from bench.report.gate import Gate, usage


@dataclass(frozen=True, kw_only=True)
class Beside:
    """A printed accuracy beside a measured one, in percent, and who prints it."""

    accuracy: float
    std: float | None
    source: str


@dataclass(frozen=True, kw_only=True)
class Line:
    """One column of the protocol: what was asked, what was measured, what is printed, where the outcomes lie."""

    measured: Measured
    asked: str
    beside: tuple[Beside, ...]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A row of the leaderboard and the section behind it. `anchor` is its address in the page."""

    anchor: str
    label: str
    dataset: str
    protocol: str
    kind: str
    verdict: str
    clean: Measured | None
    worst: Measured | None
    decided: str
    findings: tuple[Finding, ...]
    remarks: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    lines: tuple[Line, ...] = ()
    charts: tuple[dict[str, Any], ...] = ()
    classes: tuple[tuple[str, float | None, float | None, str], ...] = ()
    """by class: its name, robust and clean accuracy in percent, and its images"""
    caption: tuple[str, ...] = ()
    gate: Gate | None = None
    """of a mixture whose record tells; None else"""
    falls: Falls | None = None
    """None where nothing fell that was right clean"""
    records: tuple[tuple[str, Record], ...] = ()
    """by folder, relative to the results"""

    @property
    def void(self) -> bool:
        """Whether no number may be shown."""
        return self.verdict == "void"

    @property
    def beside(self) -> tuple[tuple[str, Beside], ...]:
        """What is printed of this defense, clean and where the least robust accuracy is printed, by column."""
        printed = [(line.measured.name, one) for line in self.lines for one in line.beside]
        clean = [pair for pair in printed if pair[0] == "clean"][:1]
        attacked = sorted((pair for pair in printed if pair[0] != "clean"), key=lambda pair: pair[1].accuracy)
        return (*clean, *attacked[:1])


def entry(group: Group, anchor: str, results: Path, registered: Mapping[str, registry.Entry]) -> Entry:
    """The entry of a group of runs; `registered` are the defenses that there are."""
    first = group.records[0]
    asked = {column.name: column for column in first.columns}
    shown = {} if group.void else {column.name: column for column in group.columns}
    paper = published.rows(first.asked.dataset) if group.protocol == PROTOCOL else {}
    row = paper.get(first.published_as, {}) if first.published_as else {}
    reports = list(published.reports(first.asked.dataset, first.asked.defense))
    return Entry(
        anchor=anchor,
        label=group.label,
        dataset=group.dataset,
        protocol=group.protocol,
        kind=_kind(first, registered),
        verdict=doubt(group) or "credible",
        clean=next((column for column in shown.values() if column.attack == "clean"), None),
        worst=shown.get(WORST_CASE),
        decided="" if group.void else _decided(group),
        findings=tuple(merged([finding for record in group.records for finding in record.findings])),
        remarks=tuple(remarks(group)),
        words=tuple(words.protocol(first)),
        lines=tuple(
            Line(
                measured=column,
                asked=words.column(asked[column.name]) if column.name in asked else _derived(column),
                beside=tuple(_printed(first, row, reports, asked[column.name]))
                if column.name in asked
                else (),
            )
            for column in group.columns
        ),
        charts=() if group.void else tuple(_charts(group)),
        **({} if group.void else _of_classes(group)),
        gate=None if group.void else usage(group),
        falls=None if group.void else falls(group),
        records=tuple((_folder(record, results), record) for record in group.records),
    )


def void_entry(folder: str, void: Void, anchor: str) -> Entry:
    """The entry of a run that is void and left no record."""
    return Entry(
        anchor=anchor,
        label=void.asked.defense,
        dataset=void.asked.dataset,
        protocol=str(void.asked.protocol["name"]),
        kind="not recorded",
        verdict="void",
        clean=None,
        worst=None,
        decided="",
        findings=tuple(merged(void.findings)),
        remarks=(f"void.json lies in {folder}; the run left no outcomes",),
    )


def _folder(record: Record, results: Path) -> str:
    assert record._folder is not None, "a record that was not read from disk"
    return record._folder.relative_to(results).as_posix()


def _kind(record: Record, registered: Mapping[str, registry.Entry]) -> str:
    """What sort of defense it is, as far as the record and the registry tell."""
    if record.model.mixture is not None:
        return f"{record.model.mixture} mixture"
    if record.training.source != "trained":
        return "checkpoint"
    known = registered.get(record.asked.defense)
    return "plain network" if known and known.module.startswith("baselines.") else "single network, defended"


def _derived(column: Measured) -> str:
    if column.name == WORST_CASE:
        return "image by image the least over all attacks"
    return "images right in every draw under every attack"


def _decided(group: Group) -> str:
    """The first attack that alone leaves no more than the worst case; else the strongest, and that it was not alone."""
    attacks = [(group.columns[place], c) for place, c in counted(group) if c.part_of is None]
    worst = group.column(WORST_CASE)
    if not attacks or worst is None:
        return ""
    for measured, column in attacks:
        if math.isclose(measured.accuracy, worst.accuracy, abs_tol=1e-9):
            return column.name
    least, column = min(attacks, key=lambda pair: pair[0].accuracy)
    return f"{column.name} ({least.accuracy:.2f} % alone), with others"


def _printed(
    record: Record,
    row: Mapping[tuple[str, float], published.Printed],
    reports: Sequence[published.Report],
    asked: ColumnRecord,
) -> Iterator[Beside]:
    """What papers print for this column of this defense: in the row of Table 3, and in what is reported elsewhere."""
    setting = asked.epsilon if asked.attack == "fgsm" else asked.steps
    one = row.get((asked.attack, round(float(setting or 0), 6)))
    if one is not None:
        source = f"{record.published_as}, arXiv 2512.20821 v2, Table 3"
        yield Beside(accuracy=one.accuracy, std=one.std, source=source)
    for report in reports:
        said = report.of(asked)
        if said is not None:
            source = f"{report.name} ({report.architecture}), eps {report.eps}: {said.source}"
            yield Beside(
                accuracy=said.accuracy, std=None, source=source + (f"; {said.note}" if said.note else "")
            )


_AXES = {"fgsm": "FGSM radius eps", "pgd": "PGD steps", "sweep": "radius eps of FGSM and PGD"}


def _charts(group: Group) -> Iterator[dict[str, Any]]:
    """The curves with more than one point, as the page's script draws them: accuracies in percent."""
    for kind, axis in _AXES.items():
        line = line_of(group, kind)
        if len(line.x) > 1:
            ends = zip(line.x, line.points, line.low, line.high, strict=True)
            values = [
                {"x": x, "y": round(p.accuracy, 3), "low": round(low, 3), "high": round(high, 3)}
                for x, p, low, high in ends
            ]
            band = (
                "band: 95 % Wilson interval"
                if group.seeds == 1
                else "band: sample standard deviation over seeds"
            )
            yield {"kind": "curve", "axis": axis, "band": band, "values": values}


def _of_classes(group: Group) -> dict[str, Any]:
    """Robust and clean accuracy class by class, from the same table as `bench table --per-class`."""
    made = per_class([group])
    own, counted = made.rows
    half = len(made.headings) // 2
    cells = [None if cell is None or isinstance(cell, str) else cell.accuracy for cell in own.cells]
    # the first two of each half are all images and the worst class
    classes = [
        (made.headings[place][1], cells[place], cells[place + half], str(counted.cells[place]))
        for place in range(2, half)
    ]
    return {"classes": tuple(classes), "caption": made.caption}
