"""Groups to tables: the layout of the DWF paper's Table 3, or the long table with a row per column."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench import published as printed
from bench import typeset
from bench.block import Notes, cautions, doubt, remarks, set_off_best, shared, title, together
from bench.compare import named, one, untestable
from bench.errors import UnknownName, UsageError
from bench.long import HEADER, WORST_CASE, WORST_DRAW, Group, Measured, frame, groups, radius
from bench.per_class import block as classes
from bench.record import read_all, read_void
from bench.stats import holm, mcnemar
from bench.transpose import transposed
from bench.typeset import MISSING, Block, Cell, Row

#: columns that have no radius of their own
DERIVED = ("clean", WORST_CASE, WORST_DRAW)
FORMATS = ("text", "markdown", "latex", "csv")
LAYOUTS = ("paper", "long")
#: the protocol whose tables have the columns of Table 3
PAPER = "dwf-paper"

#: the columns that say what a training cost
COST = (("training", "passes"), ("training", "G multiply-adds"), ("training", "seconds"), ("", "parameters"))
COST_SAYS = (
    "Passes: forward-backward passes of the whole training per image learnt from, crafting included; "
    "G multiply-adds: passes × multiply-adds of one forward pass, in billions (1e9) per image learnt from; "
    "rows are in the order of these, a training whose cost is unknown last"
)
REPORTED_SAYS = (
    "Rows marked 'reported' are what papers and others report of the network and the radius that they name, "
    "found by their own code, for display only"
)

#: how values are compared
_TEST = "exact McNemar test on the same images, Holm over all comparisons, 5 %"

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
    compare_to: str | None = None,
    per_class: bool = False,
    cost: bool = False,
    look: Look | None = None,
    color: bool = False,
) -> str:
    """The finished runs of a results folder as a table, ending in a newline.

    In text and Markdown a line below the tables names each run that is void and so has no record.

    Args:
        results: the folder.
        format: `text`, `markdown`, `latex` or `csv`.
        layout: `paper`, as the DWF paper's Table 3, or `long`, one row per run and column.
        published: whether rows of published numbers are added: Table 3's, and what is reported of the defenses that were
            measured; the long layout and classes have none.
        compare_to: the defense that every other row is tested against on the same images, in the paper's layout.
        per_class: whether the columns are the classes, as in `bench.per_class`, and not the attacks.
        cost: whether columns say what the training cost and rows stand in its order, in the paper's layout.
        look: which columns there are, what a cell shows, and which way the table lies, in the paper's layout.
        color: whether text may use the terminal's bold and faint.

    Raises:
        UsageError: no such format, layout or folder; no finished runs; or a damaged one; options that exclude each
            other, or several rows of the defense that is compared to.
        UnknownName: no row of that defense, or no such column.
    """
    asked: dict[str, Any] = {
        "published": published,
        "compare_to": compare_to,
        "per_class": per_class,
        "cost": cost,
        "look": look or Look(),
    }
    _check(format, layout, asked)
    found, without = groups(read_all(Path(results))), list(_voids(Path(results)))
    if not found and not (without and format in typeset.BELOW):
        void = f" but {len(without)} void, which `bench table` lists" if without else ""
        raise UsageError(f"no finished runs in {str(results)!r}{void}; `bench run` makes some")
    parts = [_rendered(found, format, layout, color, **asked)] if found else []
    if without and format in typeset.BELOW:
        parts.append(typeset.BELOW[format](without))
    return "\n".join(parts)


def _voids(results: Path) -> Iterable[str]:
    """A line for each run that is void and has no record."""
    for file in sorted((results / "runs").glob("*/*/*/void.json")):
        void = read_void(file.parent)
        if void is not None and not (file.parent / "record.json").exists():
            why = "; ".join(str(finding) for finding in void.findings if finding.severity == "blocks")
            yield " ".join(f"void: {'/'.join(file.parts[-4:-1])}: {why}".split())


def render_groups(
    found: Sequence[Group],
    *,
    format: str = "text",
    layout: str = "paper",
    published: bool = False,
    compare_to: str | None = None,
    per_class: bool = False,
    cost: bool = False,
    look: Look | None = None,
    color: bool = False,
) -> str:
    """These groups as a table, ending in a newline; the arguments are those of `render`.

    Raises:
        UsageError: no such format or layout; options that exclude each other, or several rows of that defense.
        UnknownName: no row of the defense that is compared to.
    """
    asked: dict[str, Any] = {
        "published": published,
        "compare_to": compare_to,
        "per_class": per_class,
        "cost": cost,
        "look": look or Look(),
    }
    _check(format, layout, asked)
    return _rendered(found, format, layout, color, **asked)


def _rendered(
    found: Sequence[Group], format: str, layout: str, color: bool, *, per_class: bool, **asked: Any
) -> str:
    if layout == "long":
        return typeset.LONG[format](long(found, exact=format == "csv"))
    blocks = [classes(alike) for alike in together(found)] if per_class else paper(found, **asked)
    if asked["look"].transpose:
        blocks = [transposed(block, marked=format != "csv") for block in blocks]
    return typeset.PAPER[format](blocks, color)


def _check(format: str, layout: str, asked: Mapping[str, Any]) -> None:
    for what, given, known in (("format", format, FORMATS), ("layout", layout, LAYOUTS)):
        if given not in known:
            raise UsageError(f"no {what} named {given!r}; choose from {', '.join(known)}")
    if layout == "long":
        for name, what in (("compare_to", "a comparison"), ("per_class", "classes"), ("cost", "costs")):
            if asked[name]:
                raise UsageError(f"the long layout has no place for {what}; take the paper's layout")
        if asked["look"] != Look():
            raise UsageError(
                "--transpose, --columns, --ci, --no-std and --no-best are of the paper's layout; the long one is always the same"
            )
    if asked["per_class"]:
        if replace(asked["look"], transpose=False) != Look():
            raise UsageError("of these a table of classes can be transposed alone; leave the others out")
        for name, what in (("compare_to", "a comparison"), ("cost", "costs")):
            if asked[name]:
                raise UsageError(f"a table of classes has no place for {what}; ask for one of the two")


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


def paper(
    found: Sequence[Group],
    *,
    published: bool,
    compare_to: str | None = None,
    cost: bool = False,
    look: Look | None = None,
) -> list[Block]:
    """A block for every dataset, protocol and set of images, in that order.

    Args:
        found: the groups.
        published: whether the rows of the paper's Table 3, and what is reported elsewhere, stand beside the measured ones.
        compare_to: the defense that the other rows of its blocks are tested against.
        cost: whether columns say what the training cost, and rows stand in the order of it.
        look: which columns there are, and what a cell shows.

    Raises:
        UnknownName: no group of that defense, or no such column in any block.
        UsageError: several of its groups stand in one block.
    """
    if compare_to is not None and not named(found, compare_to):
        raise UnknownName("defense", compare_to, {group.label for group in found}, " (in this table)")
    look = look or Look()
    blocks = [(alike, _slots(alike)) for alike in together(found)]
    if look.columns:
        blocks = [(alike, kept) for alike, slots in blocks if (kept := _kept(slots, alike, look.columns))]
        known = [name for alike in together(found) for slot in _slots(alike) for name in _names(slot, alike)]
        for asked in look.columns:
            if asked.lower() not in (name.lower() for name in known):
                raise UnknownName("column", asked, dict.fromkeys(known), " (of these tables)")
    return [_block(alike, slots, published, compare_to, cost, look) for alike, slots in blocks]


def _kept(slots: Sequence[_Slot], alike: Sequence[Group], columns: Sequence[str]) -> list[_Slot]:
    """The columns that bear one of these names, in the order of the names."""
    kept = [
        slot
        for asked in columns
        for slot in slots
        if asked.lower() in (name.lower() for name in _names(slot, alike))
    ]
    return list(dict.fromkeys(kept))


def _names(slot: _Slot, alike: Sequence[Group]) -> list[str]:
    """What a column may be called: its heading, its name in the protocol, and its attack."""
    attack = next((c.attack for group in alike if (c := slot.of(group)) is not None), None)
    return [name for name in (" ".join(slot.heading).strip(), slot.name, attack) if name]


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a table in the paper's layout is shown.

    Args:
        transpose: whether attacks stand down the side and defenses across.
        columns: those shown, in this order, by heading, by name in the protocol or by attack; all where there are none. What
            is tested and which value is best follows from them.
        best: whether the best value of a column is set off.
        std: whether the standard deviation over seeds is shown.
        ci: whether the 95 % Wilson interval is shown.
    """

    transpose: bool = False
    columns: tuple[str, ...] = ()
    best: bool = True
    std: bool = True
    ci: bool = False


@dataclass(frozen=True)
class _Slot:
    """A column of a block: its heading, and the name of the groups' column that goes there."""

    heading: tuple[str, str]
    name: str | None
    asked: tuple[str, float] | None = None
    """attack and setting in the paper's Table 3"""

    def of(self, group: Group) -> Measured | None:
        return None if self.name is None else group.column(self.name)


def _block(
    alike: list[Group],
    slots: Sequence[_Slot],
    published: bool,
    compare_to: str | None,
    cost: bool,
    look: Look,
) -> Block:
    if cost:
        alike = sorted(alike, key=_rank)
    notes = Notes()
    # a number that is doubted wins nothing
    credible = [group for group in alike if not doubt(group)]
    of_all = shared(alike)
    marks = notes.marks([*of_all, *_few(credible, slots)])
    lines = [[_cell(slot.of(group), look) for slot in slots] for group in alike]
    if look.best:
        set_off_best([line for group, line in zip(alike, lines, strict=True) if not doubt(group)])
    differs = _set_off_differences(lines, alike, slots, compare_to) if compare_to is not None else ""
    from_paper = printed.rows(alike[0].dataset) if published and alike[0].protocol == PAPER else {}
    unknown = (None,) * len(COST) if cost else ()
    rows: list[Row] = []
    told: dict[str, list[Row]] = {}
    for group, line in zip(alike, lines, strict=True):
        own = notes.marks(text for text in remarks(group) if text not in of_all)
        rows.append(Row(group.label, own, (*line, *(_costs(group) if cost else ())), doubt=doubt(group)))
        name = group.records[0].published_as
        if name in from_paper:
            rows.append(_printed_row(name, from_paper[name], slots, notes, unknown))
        defense = group.records[0].asked.defense
        if published and defense not in told:
            told[defense] = list(_reported_rows(group, slots, notes, unknown))
            rows += told[defense]
    measured = {group.records[0].published_as for group in alike}
    rows += [
        _printed_row(name, row, slots, notes, unknown)
        for name, row in from_paper.items()
        if name not in measured
    ]
    return Block(
        dataset=alike[0].dataset,
        protocol=alike[0].protocol,
        title=title(alike[0]),
        marks=marks,
        caption=(
            *_caption(alike, slots, bool(from_paper), look),
            *([REPORTED_SAYS] if any(told.values()) else []),
            *([COST_SAYS] if cost else []),
        ),
        best=_best(credible, slots, aside=len(credible) < len(alike)) if look.best else "",
        differs=differs,
        headings=(*(slot.heading for slot in slots), *(COST if cost else ())),
        rows=tuple(rows),
        notes=tuple(notes.texts.items()),
    )


def _passes(group: Group) -> float | None:
    """Forward-backward passes of a training per image learnt from, the mean over its runs; None where one is unknown."""
    return _mean(record.training.passes for record in group.records)


def _multiply_adds(group: Group) -> float | None:
    """What a training costs per image learnt from: its passes times the multiply-adds of one, likewise."""
    return _mean(
        None
        if record.training.passes is None or record.training.multiply_adds is None
        else record.training.passes * record.training.multiply_adds
        for record in group.records
    )


def _rank(group: Group) -> tuple[float, str]:
    """Places the cheaper training first and an unknown one last."""
    cost = _multiply_adds(group)
    return (math.inf if cost is None else cost, group.label)


def _costs(group: Group) -> list[str | None]:
    """The cells under `COST`."""
    cost = _multiply_adds(group)
    values = (
        _passes(group),
        None if cost is None else cost / 1e9,
        _mean(record.training.seconds for record in group.records),
    )
    return [
        *(None if value is None else _written(value) for value in values),
        str(group.records[0].training.parameters),
    ]


def _mean(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else float(np.mean([value for value in known if value is not None]))


def _written(value: float) -> str:
    """Four significant digits, or all of those before the point, and no exponent."""
    return (
        f"{value:.0f}" if value >= 1000 else np.format_float_positional(value, 4, fractional=False, trim="-")
    )


def _slots(alike: Sequence[Group]) -> list[_Slot]:
    """The columns of a block: those of Table 3 in its protocol, then what else there is, worst case last."""
    columns = {column.name: column for g in alike for column in g.columns if column.part_of is None}
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
    radii = {column.epsilon for column in columns.values() if column.attack not in DERIVED}
    headings = {name: _heading(column, len(radii) > 1) for name, column in columns.items()}
    for name, heading in headings.items():
        twice = list(headings.values()).count(heading) > 1
        top, sub = ("", name) if twice else heading
        after = "+ " if columns[name].survivors else ""
        slots.append(_Slot((after + top, sub) if top else ("", after + sub), name))
    return slots


def _asked(column: Measured) -> tuple[str, float]:
    setting = column.epsilon if column.attack == "fgsm" else column.steps
    return column.attack, round(float(setting or 0), 6)


def _heading(column: Measured, name_radius: bool) -> tuple[str, str]:
    if column.attack == WORST_DRAW:
        return "", "worst draw"
    if column.attack in ("clean", WORST_CASE):
        return "", "SA" if column.attack == "clean" else "worst case"
    parts = [radius(column.epsilon)] if name_radius and column.epsilon is not None else []
    if column.steps is not None:
        parts.append(f"{column.steps}" + (f"×{column.restarts}" if (column.restarts or 1) > 1 else ""))
    if (column.eot or 1) > 1:
        parts.append(f"EoT {column.eot}")
    return (column.attack, ", ".join(parts)) if parts else ("", column.attack)


def _cell(column: Measured | None, look: Look) -> Cell | None:
    if column is None:
        return None
    interval = (column.ci_low, column.ci_high) if look.ci else None
    std = column.std if look.std and column.seeds > 1 else None
    return Cell(column.accuracy, std, interval=interval)


def _set_off_differences(
    lines: list[list[Cell | None]], alike: Sequence[Group], slots: Sequence[_Slot], compare_to: str
) -> str:
    """Marks the cells that differ from those of one defense, and says what was tested."""
    if not named(alike, compare_to):
        return f"nothing is marked, for {compare_to} has no row here"
    reference = one(alike, compare_to)
    compared: list[tuple[list[Cell | None], int]] = []
    pvalues: list[float] = []
    untested = []
    for group, line in zip(alike, lines, strict=True):
        if group is reference:
            continue
        if why := untestable(group, reference):
            untested.append(f"{group.label} ({why})")
            continue
        for place, slot in enumerate(slots):
            own, other = slot.of(group), slot.of(reference)
            if own is not None and other is not None:
                compared.append((line, place))
                pvalues.append(mcnemar(group.outcomes(own.name), reference.outcomes(other.name)))
    for (line, place), p in zip(compared, holm(pvalues), strict=True):
        cell = line[place]
        assert cell is not None
        line[place] = replace(cell, differs=bool(p < 0.05))
    test = f"differs from {reference.label} ({_TEST})"
    return test + (f"; not tested: {', '.join(untested)}" if untested else "")


def _printed_row(
    name: str,
    row: dict[tuple[str, float], printed.Printed],
    slots: Sequence[_Slot],
    notes: Notes,
    unknown: tuple[None, ...],
) -> Row:
    found = [row.get(slot.asked) if slot.asked else None for slot in slots]
    cells = tuple(None if value is None else Cell(value.accuracy, value.std) for value in found)
    return Row(f"{name}, published", notes.marks(printed.doubts(row)), (*cells, *unknown), published=True)


def _reported_rows(
    group: Group, slots: Sequence[_Slot], notes: Notes, unknown: tuple[None, ...]
) -> Iterable[Row]:
    """A row for each network of this defense that was attacked elsewhere as a column asks."""
    asked = {column.name: column for column in group.records[0].columns}
    for report in printed.reports(group.dataset, group.records[0].asked.defense):
        found = [report.of(asked[slot.name]) if slot.name in asked else None for slot in slots]
        shown = [one for one in found if one is not None]
        if all(one.attack == "clean" for one in shown):
            continue
        said = [f"{shown[0].norm}, eps {report.eps}; {one.source}" for one in shown]
        marks = notes.marks([*said, *(one.note for one in shown if one.note)])
        cells = tuple(None if one is None else Cell(one.accuracy) for one in found)
        label = f"{report.name} ({report.architecture}), reported"
        yield Row(label, marks, (*cells, *unknown), published=True)


def _caption(alike: Sequence[Group], slots: Sequence[_Slot], published: bool, look: Look) -> Iterable[str]:
    shown = [column for group in alike for slot in slots if (column := slot.of(group)) is not None]
    paper = alike[0].protocol == PAPER
    yield "SA: on clean images; " + ("RA: on attacked ones" if paper else "worst case: under every attack")
    iterated = [column for column in shown if column.steps is not None]
    attacks = iterated if paper else [c for c in shown if c.attack not in DERIVED]
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
    if any(column.survivors for column in shown):
        yield "+: attacks only what the columns to its left left standing"
    reaches = [_reach(column) for column in shown if not math.isnan(column.accuracy)]
    if reaches:
        shown_in = "; they stand in brackets" if look.ci else ""
        yield f"95 % Wilson intervals reach at most {max(reaches):.2f} points to either side{shown_in}"
    yield from cautions(alike)
    if published:
        yield (
            "Rows marked 'published' are what Divided We Fall (arXiv 2512.20821 v2) prints, "
            "for display only; its ± is over five runs"
        )


def _reach(column: Measured) -> float:
    """How far the interval reaches to its wider side, in points."""
    return max(column.ci_high - column.accuracy, column.accuracy - column.ci_low)


def _few(alike: Sequence[Group], slots: Sequence[_Slot]) -> list[str]:
    """A note where the best row leads the next by less than its interval reaches."""
    names = []
    for slot in slots:
        asked = [column for group in alike if (column := slot.of(group)) is not None]
        ranked = sorted(asked, key=lambda column: -column.accuracy)
        if len(ranked) > 1 and 0 < ranked[0].accuracy - ranked[1].accuracy < _reach(ranked[0]):
            names.append(" ".join(slot.heading).strip())
    if not names:
        return []
    where = "every column" if len(names) == len(slots) else ", ".join(names)
    n = len(alike[0].images)
    return [f"few-images: n = {n}; the best row leads the next by less than its interval reaches in {where}"]


def _best(alike: Sequence[Group], slots: Sequence[_Slot], aside: bool) -> str:
    """Which values are set off, and how sure their lead over every other row is; `aside`: there are doubted rows."""
    if len(alike) < 2:
        return ""
    said = "the best measured value of a column" + (" in a credible row" if aside else "")
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
    return f"{said}; its lead over every other row is significant in {where} ({_TEST})"
