"""What speaks against anybody's table of accuracies: rules that need no model, only the numbers and their headings.

An attack that was declared stronger cannot leave more images standing than a weaker one: where it does, one of the two
columns is not what its heading says. The rest are symptoms, and each finding says of what.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, pairwise
from statistics import median

from bench.accuracies import Cell, Row, Table
from bench.audit.check import Evidence, check
from bench.audit.check import findings as found_by
from bench.finding import Finding, verdict
from bench.long import WORST_CASE, radius
from bench.stats import wilson

#: classes of the datasets whose chance is known; 10 where a table names no dataset
CLASSES = {
    **dict.fromkeys(("", "cifar10", "svhn", "mnist", "fashionmnist", "digits", "stl10", "imagenette"), 10),
    **{"cifar100": 100, "tinyimagenet": 200, "imagenet": 1000},
}
#: words that name a network, or say that it has no defense, and words that may stand beside them
_PLAIN = re.compile(
    "(?:pre|preact|wide)?resnet|wrn|resnext|vgg|densenet|googlenet|inception|xception|mobilenet|efficientnet|alexnet|lenet|"
    "convnext|vit|deit|cnn|standard|undefended|natural|vanilla|plain|clean|baseline|normal|erm|none|no"
)
_BESIDE = re.compile("net|network|model|pre|act|preact|wide|defen[cs]e|training|trained|v|x|bn|[bs]")
#: rises and excesses up to this many points cannot happen, but change nothing
HARMLESS = 0.5


def findings(table: Table) -> list[Finding]:
    """What the rules find in a table."""
    return found_by(CHECKS, table)


def undefended(name: str) -> bool:
    """Whether a row's name is that of a network without a defense."""
    words = re.findall(r"[a-z]+", name.lower())
    others = [word for word in words if not _PLAIN.fullmatch(word)]
    return len(others) < len(words) and all(map(_BESIDE.fullmatch, others))


def _listed(texts: Sequence[str], most: int = 4) -> str:
    shown = "; ".join(texts[:most])
    return shown if len(texts) <= most else f"{shown}; and {len(texts) - most} more"


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low}–{high}"


def as_text(found: Sequence[Finding], table: Table) -> str:
    """The verdict in a line, and two for every finding."""
    cells = sum(len(row.cells) for row in table.rows)
    lines = [f"{verdict(found)}: {len(found)} finding(s) in {len(table.rows)} rows, {cells} accuracies"]
    for finding in found:
        lines += [f"  {finding.severity:7} {finding}", f"          {finding.advice}"]
    return "\n".join(lines)


# accuracy that rises along a sweep


def _sweeps(row: Row, *, over: str) -> Iterable[list[Cell]]:
    """Cells that differ in nothing but `eps`, `steps` or `restarts`, from the weakest on."""
    alike: dict[tuple[object, ...], list[Cell]] = {}
    for cell in row.cells:
        setting = {"eps": cell.eps, "steps": cell.steps, "restarts": cell.restarts}
        if setting.pop(over) is not None:
            # a step size given as a share of the radius follows it
            size = None if over == "eps" else cell.step_size
            alike.setdefault((cell.attack, cell.norm, size, *setting.values()), []).append(cell)
    for cells in alike.values():
        yield sorted(cells, key=lambda cell: float(getattr(cell, over)))


def _rises(table: Table, over: str) -> tuple[list[str], list[float]]:
    """Per row in which accuracy rises, a text; and the size of every single rise in points."""
    said: list[str] = []
    sizes: list[float] = []
    for row in table.rows:
        steps = [
            (before, after)
            for cells in _sweeps(row, over=over)
            for before, after in pairwise(cells)
            if after.accuracy > before.accuracy
        ]
        sizes += [after.accuracy - before.accuracy for before, after in steps]
        if steps:
            said.append(f"{row} {_climb(steps)}")
    return said, sizes


def _climb(steps: Sequence[tuple[Cell, Cell]]) -> str:
    """What rose: where rises follow one another, from the first value to the last."""
    first, last = steps[0][0], steps[0][1]
    climbs: list[tuple[int, Cell, Cell]] = []
    count = 1
    for before, after in steps[1:]:
        if before is last:
            last, count = after, count + 1
        else:
            climbs.append((count, first, last))
            first, last, count = before, after, 1
    climbs.append((count, first, last))
    times = [f"{count} times in a row, " if count > 1 else "" for count, _, _ in climbs]
    return ", ".join(
        f"{often}{low.accuracy:.2f} → {high.accuracy:.2f} ({low} to {high})"
        for often, (_, low, high) in zip(times, climbs, strict=True)
    )


def _not_monotone(table: Table, over: str, what: str, threshold: float) -> Evidence:
    said, sizes = _rises(table, over)
    if not said:
        return None
    text = (
        f"accuracy rises with {what} in {len(said)} of {len(table.rows)} rows, "
        f"by {_span(sizes)} points: {_listed(said)}"
    )
    return text if max(sizes) > threshold else (text, "informs")


@check(
    "not-monotone",
    rule="A7",
    threshold=HARMLESS,
    severity="warns",
    advice="a larger ball contains the smaller one: carry what broke an image over to the larger radius, "
    "and look for masked gradients or label leaking",
)
def rises_with_eps(table: Table, threshold: float) -> Evidence:
    """Accuracy rises with the radius of one attack; only informs while no rise exceeds the threshold."""
    return _not_monotone(table, "eps", "the radius", threshold)


@check(
    "not-monotone",
    rule="A7",
    threshold=HARMLESS,
    severity="warns",
    advice="read all step counts off one trajectory with one step size, and keep the worst iterate",
)
def rises_with_steps(table: Table, threshold: float) -> Evidence:
    """Accuracy rises with the steps of one attack; only informs while no rise exceeds the threshold."""
    return _not_monotone(table, "steps", "the number of steps", threshold)


@check(
    "not-monotone",
    rule="A7",
    threshold=HARMLESS,
    severity="warns",
    advice="an image must survive every start: count the worst of them, and begin with the same one",
)
def rises_with_restarts(table: Table, threshold: float) -> Evidence:
    """Accuracy rises with the restarts of one attack; only informs while no rise exceeds the threshold."""
    return _not_monotone(table, "restarts", "the number of restarts", threshold)


# columns declared stronger

_STEPPED = ("pgd", "ms-pgd", "a-pgd")
_WEAKER = ("clean", "fgsm", "pgd", "ms-pgd", "a-pgd", "autoattack", "cw", "square")


def _same_ball(a: Cell, b: Cell) -> bool:
    return a.eps == b.eps and (a.norm or b.norm) == (b.norm or a.norm)


def _no_more_steps(weak: Cell, strong: Cell) -> bool:
    return weak.steps is None or strong.steps is None or weak.steps <= strong.steps


def _excess(
    table: Table,
    what: str,
    threshold: float,
    pairs: Callable[[Row], Iterable[tuple[Cell, Cell]]],
) -> Evidence:
    """Rows where the second cell of a pair, declared stronger, is the higher one; of each row the worst pair."""
    said: list[str] = []
    sizes: list[float] = []
    having = 0
    for row in table.rows:
        compared = list(pairs(row))
        having += bool(compared)
        weak, strong = max(compared, key=lambda p: p[1].accuracy - p[0].accuracy, default=(None, None))
        if weak is not None and strong is not None and strong.accuracy > weak.accuracy:
            sizes.append(strong.accuracy - weak.accuracy)
            said.append(f"{row} {strong.accuracy:.2f} ({strong}) above {weak.accuracy:.2f} ({weak})")
    if not said:
        return None
    text = f"{what} in {len(said)} of {having} rows, by up to {max(sizes):.2f} points: {_listed(said)}"
    return text if max(sizes) > threshold else (text, "informs")


@check(
    "stronger-is-higher",
    rule="S7",
    threshold=HARMLESS,
    severity="warns",
    advice="iterated attacks that fail where one step succeeds have lost the gradient: check step size and loss, "
    "and attack without gradients",
)
def pgd_above_fgsm(table: Table, threshold: float) -> Evidence:
    """PGD leaves more than FGSM of the same radius."""

    def pairs(row: Row) -> Iterable[tuple[Cell, Cell]]:
        steps = row.of(*_STEPPED, "autoattack")
        return ((w, s) for w in row.of("fgsm") for s in steps if w.eps is not None and _same_ball(w, s))

    return _excess(table, "PGD leaves more than FGSM of its radius", threshold, pairs)


@check(
    "stronger-is-higher",
    rule="S7",
    threshold=HARMLESS,
    severity="warns",
    advice="let the first of several starts be the single one, and count the worst of them",
)
def restarts_above_single(table: Table, threshold: float) -> Evidence:
    """PGD from several starts leaves more than PGD from one with no more steps."""

    def pairs(row: Row) -> Iterable[tuple[Cell, Cell]]:
        single = [cell for cell in row.of("pgd") if not cell.several_starts]
        several = [cell for cell in row.cells if cell.several_starts]
        return ((w, s) for w in single for s in several if _same_ball(w, s) and _no_more_steps(w, s))

    return _excess(table, "PGD from several starts leaves more than PGD from one", threshold, pairs)


@check(
    "stronger-is-higher",
    rule="S7",
    threshold=HARMLESS,
    severity="warns",
    advice="an adaptive attack that is weaker than a plain one is not adapted; report the worst case per image of both",
)
def adaptive_above_plain(table: Table, threshold: float) -> Evidence:
    """The adaptive attack leaves more than single-start PGD with no more steps."""

    def pairs(row: Row) -> Iterable[tuple[Cell, Cell]]:
        single = [cell for cell in row.of("pgd") if not cell.several_starts]
        return ((w, s) for w in single for s in row.of("a-pgd") if _same_ball(w, s) and _no_more_steps(w, s))

    return _excess(table, "the adaptive attack leaves more than plain PGD", threshold, pairs)


@check(
    "stronger-is-higher",
    rule="S7",
    threshold=HARMLESS,
    severity="warns",
    advice="the strongest column must hold the worst case per image of all that were run at its radius",
)
def ensemble_above_single(table: Table, threshold: float) -> Evidence:
    """AutoAttack leaves more than PGD of its radius, or a worst case more than one of its attacks."""

    def pairs(row: Row) -> Iterable[tuple[Cell, Cell]]:
        for strong in row.of("autoattack"):
            yield from ((weak, strong) for weak in row.of(*_STEPPED) if _same_ball(weak, strong))
        for strong in row.of(WORST_CASE):
            yield from ((weak, strong) for weak in row.of(*_WEAKER))

    return _excess(table, "AutoAttack or the worst case leaves more than one attack", threshold, pairs)


@check(
    "stronger-is-higher",
    rule="S7",
    severity="warns",
    advice="an image that is wrong without an attack counts as broken under every attack",
)
def attacked_above_clean(table: Table, threshold: float) -> Evidence:
    """An attacked column is above the clean one."""

    def pairs(row: Row) -> Iterable[tuple[Cell, Cell]]:
        return ((w, s) for w in row.of("clean") for s in row.cells if s.attack != "clean")

    return _excess(table, "accuracy under attack is above clean accuracy", threshold, pairs)


@check(
    "adaptive-adds-nothing",
    rule="S7",
    threshold=0.5,
    severity="warns",
    advice="an adaptive attack must aim at what the defense does; one draw of EoT on a deterministic model is PGD, and "
    "with one start it is weaker than the column beside it",
)
def adaptive_adds_nothing(table: Table, threshold: float) -> Evidence:
    """The adaptive column is weaker than multi-restart PGD; only informs up to this share of the rows."""
    gaps: list[tuple[float, Row]] = []
    having = 0
    for row in table.rows:
        compared = [
            adaptive.accuracy - several.accuracy
            for adaptive in row.of("a-pgd")
            for several in row.cells
            if several.several_starts and _same_ball(adaptive, several)
        ]
        having += bool(compared)
        if compared and max(compared) > 0:
            gaps.append((max(compared), row))
    if not gaps:
        return None
    least, most = min(gaps, key=lambda g: g[0]), max(gaps, key=lambda g: g[0])
    text = (
        f"the adaptive column is weaker than multi-restart PGD in {len(gaps)} of {having} rows, "
        f"by {least[0]:.2f} ({least[1]}) to {most[0]:.2f} points ({most[1]})"
    )
    return text if len(gaps) > threshold * having else (text, "informs")


# levels that no such network has


@check(
    "undefended-survives",
    rule="S7",
    threshold=5.0,
    severity="warns",
    advice="check the attack on this network first: wrong normalisation, a radius that is too small, a step that cannot "
    "reach the ball; state the radius",
)
def undefended_survives(table: Table, threshold: float) -> Evidence:
    """An undefended network stands above 5 % under PGD of 10 steps or more, at L∞ 0.01 or more or at no stated radius."""
    kept: list[tuple[Row, Cell]] = []
    for row in table.rows:
        if not undefended(row.defense):
            continue
        strong = [
            cell
            for cell in row.of("pgd", "ms-pgd", "a-pgd")
            if (cell.steps or 0) >= 10 and cell.norm != "L2" and (cell.eps is None or cell.eps >= 0.01)
        ]
        # plain PGD with the most steps speaks first: other columns may hide behind what they add
        strong.sort(key=lambda cell: (cell.attack == "pgd", cell.steps or 0))
        if strong and strong[-1].accuracy > threshold:
            kept.append((row, strong[-1]))
    if not kept:
        return None
    kept.sort(key=lambda pair: -pair[1].accuracy)
    unprinted = any(cell.eps is None for _, cell in kept)
    under = "/".join(dict.fromkeys(str(cell) for _, cell in kept))
    values = [cell.accuracy for _, cell in kept]
    rows = "one undefended row keeps" if len(kept) == 1 else f"{len(kept)} undefended rows keep"
    doubt = (
        " (its radius is not printed; at 0.01 or more they must fall to about nothing)" if unprinted else ""
    )
    named = _listed([f"{row} {cell.accuracy:.2f}" for row, cell in kept])
    return f"{rows} {_span(values)} % under {under}{doubt}: {named}"


@check(
    "fgsm-far-above-pgd",
    rule="S9",
    threshold=15.0,
    severity="warns",
    advice="the usual picture of a network fitted to single-step noise (label leaking, catastrophic over-fitting): run PGD "
    "over the radii of the FGSM sweep",
)
def fgsm_far_above_pgd(table: Table, threshold: float) -> Evidence:
    """A defense holds against FGSM by 15 points more than against PGD, or far above all others, or ever more so."""
    said: list[str] = []
    for row in table.rows:
        # FGSM misses much of what PGD finds on an undefended network, and that is no fault of the network's
        if undefended(row.defense):
            continue
        sweep = sorted(
            (cell for cell in row.of("fgsm") if cell.eps is not None), key=lambda cell: cell.eps or 0.0
        )
        pgd = sorted(row.of("pgd"), key=lambda cell: cell.steps or 0)[-1:]
        for last in pgd if sweep else ():
            if last.eps is not None:
                # what holds at a larger radius holds at this one
                reached = [cell for cell in sweep if (cell.eps or 0.0) >= last.eps * (1 - 1e-6)][:1]
                gaps = [cell for cell in reached if cell.accuracy - last.accuracy > threshold]
                said += [_gap(row, cell, last) for cell in gaps]
            elif _outlier(table, row, sweep[-1], threshold):
                others = _others(table, row, sweep[-1])
                above = [cell for cell in sweep if cell.accuracy - last.accuracy > threshold]
                symptom = f"; {_gap(row, above[-1], last, named=False)}, whose radius is not printed: a symptom, not a proof"
                said.append(
                    f"{row} keeps {sweep[-1].accuracy:.2f} under {sweep[-1]}, where the other rows have a median of "
                    f"{median(others):.2f}" + (symptom if above else "")
                )
        rising = [(a, b) for a, b in pairwise(sweep) if b.accuracy > a.accuracy]
        if rising and sum(b.accuracy - a.accuracy for a, b in rising) > HARMLESS:
            said.append(f"{row} rises with the radius of FGSM, {_climb(rising)}")
    return _listed(said, most=8) if said else None


def _gap(row: Row, fgsm: Cell, pgd: Cell, named: bool = True) -> str:
    text = f"{fgsm} stands {fgsm.accuracy - pgd.accuracy:.2f} points above {pgd}"
    return f"{row}: {text} ({fgsm.accuracy:.2f} and {pgd.accuracy:.2f})" if named else text


def _others(table: Table, row: Row, cell: Cell) -> list[float]:
    """What the other rows of the dataset have in this column."""
    rows = [other for other in table.rows if other is not row and other.dataset == row.dataset]
    return [other.accuracy for line in rows for other in line.cells if other.asked == cell.asked]


def _outlier(table: Table, row: Row, cell: Cell, threshold: float) -> bool:
    others = _others(table, row, cell)
    return len(others) >= 3 and cell.accuracy - median(others) > threshold


@check(
    "at-chance",
    rule="S8",
    severity="informs",
    advice="a constant answer is a failed run, not a result: look at the predictions",
)
def at_chance(table: Table, threshold: float) -> Evidence:
    """A cell is exactly at chance; warns where a row has two of them, or its clean accuracy is one."""
    said: list[str] = []
    constant = False
    for row in table.rows:
        classes = CLASSES.get(re.sub(r"[^a-z0-9]", "", row.dataset.lower()))
        level = round(100 / classes, 2) if classes else None
        cells = [cell for cell in row.cells if cell.accuracy == level]
        if cells:
            constant |= len(cells) > 1 or cells[0].attack == "clean"
            where = ", ".join(map(str, cells[:3])) + (", …" if len(cells) > 3 else "")
            said.append(f"{row} is at exactly {level:.2f} % under {where}, chance with {classes} classes")
    if not said:
        return None
    return (_listed(said), "warns") if constant else _listed(said)


# numbers that were not measured, or not measured alike


@check(
    "copied-rows",
    rule="S7",
    threshold=2.0,
    severity="warns",
    advice="compare with the records: two datasets, or two defenses, do not come out alike in so many columns",
)
def copied_rows(table: Table, threshold: float) -> Evidence:
    """More than 10 cells of a defense agree within 2 points on two datasets, or two rows are the same throughout."""
    said: list[str] = []
    for a, b in combinations(table.rows, 2):
        values = {cell.asked: cell.accuracy for cell in a.cells}
        shared = [(values[cell.asked], cell.accuracy) for cell in b.cells if cell.asked in values]
        # where both are broken, or untouched, agreement says nothing
        telling = [(x, y) for x, y in shared if 2 < x < 98 or 2 < y < 98]
        if a.defense == b.defense and a.protocol == b.protocol and a.dataset != b.dataset:
            close = sum(abs(x - y) <= threshold for x, y in telling)
            if close > 10:
                said.append(
                    f"{a.defense}: {close} of {len(shared)} cells agree within {threshold:g} points on {a.dataset} and "
                    f"{b.dataset}"
                )
        elif a.defense != b.defense and len(telling) >= 5 and all(x == y for x, y in shared):
            said.append(f"{a} and {b} are the same in all {len(shared)} cells")
    return _listed(said) if said else None


@check(
    "one-row-has-std",
    rule="S4",
    severity="warns",
    advice="train every row with several seeds, or print one seed of each",
)
def one_row_has_std(table: Table, threshold: float) -> Evidence:
    """Only one method has ±."""
    methods = {row.defense for row in table.rows}
    with_std = {row.defense for row in table.rows if any(cell.std is not None for cell in row.cells)}
    if len(with_std) != 1 or len(methods) < 2:
        return None
    return f"only {with_std.pop()} has a standard deviation, of {len(methods)} methods"


@check(
    "missing-radius",
    rule="S5",
    severity="warns",
    advice="print the norm, the radius and the step size: without them the number cannot be compared with any other",
)
def missing_radius(table: Table, threshold: float) -> Evidence:
    """Columns of PGD, AutoAttack or Square without a radius."""
    cells = [c for row in table.rows for c in row.of(*_STEPPED, "autoattack", "square") if c.eps is None]
    columns = list(dict.fromkeys(map(str, cells)))
    return f"no radius stated for {', '.join(columns)}" if columns else None


@check(
    "degenerate-settings",
    rule="A12",
    severity="warns",
    advice="write radii in pixels of [0,1], and take steps that reach the border of the ball without jumping across it",
)
def degenerate_settings(table: Table, threshold: float) -> Evidence:
    """Steps that cannot reach the ball's border, or jump across all of it; an L∞ radius above 1."""
    said: list[str] = []
    for cell in {cell.asked: cell for row in table.rows for cell in row.cells}.values():
        if cell.eps is not None and cell.eps > 1 and cell.norm != "L2":
            said.append(f"{cell} has a radius above 1: meant in pixels of 0 to 255?")
        elif cell.eps is not None and cell.step_size is not None:
            size = radius(cell.step_size)
            if cell.steps is not None and cell.steps * cell.step_size < cell.eps * (1 - 1e-6):
                said.append(f"{cell} cannot reach its border with {cell.steps} steps of {size}")
            if cell.step_size >= 2 * cell.eps:
                said.append(f"{cell} jumps across the ball with steps of {size}")
    return _listed(said) if said else None


@check(
    "few-images",
    rule="S2",
    threshold=1000,
    severity="informs",
    advice="take more images (`bench power` says how many), or claim no order",
)
def few_images(table: Table, threshold: float) -> Evidence:
    """Cells on fewer than 1,000 images, or a best row whose lead its own interval is wider than."""
    counts = [cell.n for row in table.rows for cell in row.cells if cell.n is not None]
    said = []
    if counts and min(counts) < threshold:
        few = sum(n < threshold for n in counts)
        said.append(
            f"{few} of {len(counts)} cells are of fewer than {threshold:g} images, the fewest {min(counts):g}"
        )
    columns: dict[tuple[object, ...], list[Cell]] = {}
    for row in table.rows:
        for cell in row.cells:
            columns.setdefault((row.dataset, row.protocol, cell.asked), []).append(cell)
    claims = unsure = 0
    for cells in columns.values():
        best, *others = sorted(cells, key=lambda cell: -cell.accuracy)
        lead = best.accuracy - others[0].accuracy if others else 0.0
        if lead == 0:
            continue
        reach = _reach(best)
        claims += reach is not None
        unsure += reach is not None and lead < reach
    if unsure:
        said.append(
            f"in {unsure} of {claims} columns the best row leads by less than its 95 % interval reaches to one side"
        )
    return "; ".join(said) if said else None


def _reach(cell: Cell) -> float | None:
    """How far the interval of a cell reaches to the wider side, in points; None where n is not known."""
    if cell.low is not None and cell.high is not None:
        return max(cell.accuracy - cell.low, cell.high - cell.accuracy)
    if not cell.n:
        return None
    low, high = wilson(cell.accuracy / 100 * cell.n, cell.n)
    return max(cell.accuracy - 100 * float(low), 100 * float(high) - cell.accuracy)


#: every rule, in the order in which findings are printed
CHECKS = (
    rises_with_eps,
    rises_with_steps,
    rises_with_restarts,
    pgd_above_fgsm,
    restarts_above_single,
    adaptive_above_plain,
    ensemble_above_single,
    attacked_above_clean,
    adaptive_adds_nothing,
    undefended_survives,
    fgsm_far_above_pgd,
    at_chance,
    copied_rows,
    one_row_has_std,
    missing_radius,
    degenerate_settings,
    few_images,
)
