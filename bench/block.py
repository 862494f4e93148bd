"""What every table of groups shares: which groups stand in one, what is said of a row, and which value is set off.

Defenses stand in one table only if they were asked the same of the same images.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from bench.finding import Finding, verdict
from bench.long import Group
from bench.protocol import ADAPTIVE
from bench.record import Training
from bench.typeset import Cell


def together(found: Sequence[Group], *, same_images: bool = True) -> list[list[Group]]:
    """The groups by dataset, protocol and images, in that order; or whichever images they were asked about."""
    alike: dict[tuple[str, str, str], list[Group]] = {}
    for group in found:
        asked = group.records[0].asked
        # what only a mixture is asked does not keep it from standing beside other networks
        columns = [c for c in asked.protocol.get("columns", ()) if c["attack"] not in ADAPTIVE]
        protocol = {**asked.protocol, "columns": columns}
        samples = asked.samples if same_images else None
        same = json.dumps([samples, asked.data_hash, protocol], sort_keys=True)
        alike.setdefault((group.dataset, group.protocol, same), []).append(group)
    return [alike[key] for key in sorted(alike)]


def title(group: Group, what: str = "accuracy") -> str:
    """The first sentence of a caption: the dataset, the protocol, what is told and of how many images."""
    n = len(group.images)
    few = "fewer than 1000; " if n < 1000 else ""
    data = group.records[0].asked.data_hash[:8]
    return f"{group.dataset}, protocol {group.protocol}: {what} in % on n = {n} images ({few}data {data})"


def doubt(group: Group) -> str:
    """`suspect` or `void` where the runs are not credible, else nothing."""
    come_to = verdict(_findings(group))
    return "" if come_to == "credible" else come_to


def cautions(alike: Sequence[Group]) -> Iterable[str]:
    """Sentences of the caption on doubted rows, on seeds and on precision."""
    doubts = [doubt(group) for group in alike]
    if "suspect" in doubts:
        yield "Suspect: something speaks against the numbers of this row, as its notes say"
    if "void" in doubts:
        yield "Void: this run must not become a number, as its notes say"
    several = [f"{group.label} {group.seeds}" for group in alike if group.seeds > 1]
    if several:
        single = "; rows without it are one seed" if len(several) < len(alike) else ""
        yield f"±: sample standard deviation over seeds ({', '.join(several)}){single}"
    for precision in ("bf16", "tf32"):
        reduced = [group.label for group in alike if group.records[0].asked.precision == precision]
        if reduced:
            yield f"Gradients in {precision}: {', '.join(reduced)}"


def set_off_best(lines: list[list[Cell | None]]) -> None:
    """Marks the highest cell of each column as it is printed; the only one of a column is no best."""
    for column in range(len(lines[0]) if lines else 0):
        values = [round(cell.accuracy, 2) for line in lines if (cell := line[column]) is not None]
        for line in lines:
            cell = line[column]
            if cell is not None and len(values) > 1:
                line[column] = replace(cell, best=round(cell.accuracy, 2) == max(values))


class Notes:
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


def shared(alike: Sequence[Group]) -> list[str]:
    """The footnotes that hold for every row of a table."""
    first = alike[0].records[0].footnotes
    return [text for text in first if all(text in r.footnotes for g in alike for r in g.records)]


def remarks(group: Group) -> list[str]:
    """What is to be said of a row alone: its footnotes, its training, and a line for every code of its findings."""
    runs = len(group.records)
    said = list(dict.fromkeys(text for record in group.records for text in record.footnotes))
    if group.records[0].asked.weights == "last":
        said.append("the weights of the last epoch, not of the one selected on held-out images")
    fell = [(text, record.asked.seed) for record in group.records if (text := _collapse(record.training))]
    said += _of_seeds(fell, runs)
    for code in dict.fromkeys(finding.code for finding in _findings(group)):
        found = [
            (f, record.asked.seed) for record in group.records for f in record.findings if f.code == code
        ]
        found.sort(key=lambda pair: pair[0].severity == "informs")
        said += _of_seeds(found, runs)
    return said


def _findings(group: Group) -> list[Finding]:
    return [finding for record in group.records for finding in record.findings]


def _of_seeds(said: Sequence[tuple[Finding | str, int]], runs: int) -> list[str]:
    """A text with the seeds that it concerns; where they say different things, the first and who else says something."""
    if not said:
        return []
    first, _ = said[0]
    text = str(first)
    if isinstance(first, Finding) and first.severity == "informs":
        text = textwrap.shorten(text, 100, placeholder=" …")
    own = [seed for other, seed in said if other == first]
    also = sorted({seed for other, seed in said if other != first})
    seeds = ", ".join(map(str, own))
    if also:
        return [f"{text} (seed {seeds}; also seed {', '.join(map(str, also))})"]
    return [f"{text} (seed {seeds})" if len(own) < runs else text]


def _collapse(training: Training) -> str:
    """Where a training first fell into catastrophic overfitting, and whose weights these are; empty where it did not."""
    for before, row in pairwise([{}, *training.stages]):
        if row.get("collapsed"):
            was, now = (one.get("held_out_pgd", one.get("held_out")) for one in (before, row))
            fell = f"fell from {was:.1%} to" if was is not None else "fell to"
            beside = f" while FGSM stood at {row['held_out_fgsm']:.1%}" if "held_out_fgsm" in row else ""
            these = "" if training.epoch is None else f"; these weights are of epoch {training.epoch}"
            return (
                f"collapsed: training fell into catastrophic overfitting at epoch {row['epoch']} "
                f"(PGD-10 on held-out images {fell} {now:.1%}{beside}){these}"
            )
    return ""
