"""Makes everything that is derived from the kept records anew: tables, figures, and the tables inside documents.

    python tests/tables.py            # write, and fail if anything differed
    python tests/tables.py --check    # compare alone, and name what differs

Records lie in results/measured (digits, and what was measured on the way) and results/cifar10 (the grid of `tests/grid.py`, whose
rows have names of their own). A document holds what is made of them between two marks:

    <!-- table: DATASET PROTOCOL NAME,NAME -->                  what `bench table` prints of these rows
    <!-- read: QUESTION protocol=P rows=NAME,… compare_to=N --> what `bench read` prints of these rows of the grid
    <!-- rows: NAME,NAME -->                                    how these rows of the grid were trained, and what it cost
    <!-- summary: NAME,NAME -->                                 a line for each of them over all protocols
    <!-- hours: NAME -->                                        what training this row's defense takes, here and at full size

each closed by `<!-- /table -->`. Pictures depend on the versions of the libraries that draw them, so a figure is compared by
the CSV behind it, and drawn anew where that differs.
"""

import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import chain
from pathlib import Path

import grid

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "results" / "measured"
CIFAR = ROOT / "results" / "cifar10"
DOCUMENTS = (ROOT / "README.md", MEASURED / "README.md", ROOT / "results" / "README.md")
MARK = re.compile(r"<!-- (table|read|rows|summary|hours): (.+?) -->\n.*?<!-- /table -->", re.DOTALL)
#: how the second training of a row is called, of the same settings and seed
AGAIN = "-bf16"
#: stands where the grid has not come yet
NOT_YET = "Not measured yet; `tests/grid.py` goes on with it."
ENDINGS = {"markdown": "md", "latex": "tex", "csv": "csv"}


@cache
def measured(root: Path):
    """The records of a folder."""
    from bench.record import read_all

    return list(read_all(root))


@cache
def named():
    """The groups of the grid, by the names of its rows; of a row that was trained in fp32 and in bf16, the latter by a name of its own."""
    from bench.long import groups

    found = [
        (grid.name_of(group.records[0]), group.records[0].asked.precision, group)
        for group in groups(measured(CIFAR))
    ]
    exact = {name for name, precision, _ in found if precision == "fp32"}
    return [
        replace(group, label=f"{name}{AGAIN}" if precision == "bf16" and name in exact else name)
        for name, precision, group in found
    ]


def chosen(rows: str, protocol: str = "*"):
    """Groups of the grid, in the order of these names; all of a protocol, or of any."""
    found = [group for group in named() if protocol in ("*", group.protocol)]
    return [group for name in rows.split(",") for group in found if group.label == name]


def table(told: str) -> str:
    """What `bench table` prints."""
    from bench.long import groups
    from bench.table import render_groups

    dataset, protocol, names = told.split()
    if dataset == grid.CPU.dataset:
        found = chosen(names, protocol)
        return render_groups(found, format="markdown") if found else f"{NOT_YET}\n"
    asked = [
        record
        for record in measured(MEASURED)
        if (record.asked.dataset, record.asked.protocol["name"]) == (dataset, protocol)
        and record.asked.defense in names.split(",")
    ]
    return render_groups(groups(asked), format="markdown")


def read(told: str) -> str:
    """What `bench read` prints of the grid."""
    return "\n".join(sheets(told)[0])


@cache
def sheets(told: str) -> tuple[list[str], dict[str, str]]:
    """What `bench read` answers, in Markdown; and as files, by name."""
    from bench.errors import UsageError
    from bench.reading import read as answer
    from bench.sheet import written

    question, *how = told.split()
    asked = dict(one.split("=", 1) for one in how)
    found = chosen(asked.pop("rows"), asked.pop("protocol", "*"))
    try:
        made = answer(question, found, **({"lines": "cifar10"} if question == "published" else asked))
    except UsageError:
        # rows that the grid has not come to: nothing to read is no number
        return [f"{NOT_YET}\n"], {}
    files = {f"{one.name}.{ending}": written(one, form) for one in made for form, ending in ENDINGS.items()}
    return [written(one, "markdown") for one in made], files


def rows(told: str) -> str:
    """How rows of the grid were trained."""
    from bench.sheet import Sheet, written

    made = []
    base = None
    for name in (name for name in told.split(",") if chosen(name)):
        training = chosen(name)[0].records[0].training
        row = next(row for row in grid.CPU.rows if row.name == name.removesuffix(AGAIN))
        # ablations leave out what they share with DWF
        settings = ", ".join(
            f"{key} {_said(value)}" for key, value in row.settings.items() if grid.DWF.get(key) != value
        )
        cost = training.passes * training.multiply_adds / 1e9
        base = base or cost
        learnt = f"{training.passes:.1f} × {training.multiply_adds / 1e6:.1f} M"
        minutes = f"{training.seconds / 60:.0f}"
        made.append(
            (
                name,
                row.defense,
                settings,
                f"{training.parameters / 1e6:.2f} M",
                learnt,
                f"{cost / base:.2f}",
                minutes,
            )
        )
    caption = (
        "How each network was trained. Cost: forward-backward passes for each training image, crafting included, times the multiply-adds of "
        f"one; and as a multiple of that of {made[0][0]}. Minutes on one CPU core that others shared, of one processor or another: {sum(int(one[-1]) for one in made)} in all. "
        "Batches of 64; what is not named is the recipe `fast`, and for mixtures of kind dwf what the first row has."
    )
    headings = ("row", "defense", "settings", "parameters", "passes × multiply-adds", "cost", "minutes")
    return written(Sheet("rows", caption, headings, tuple(made)), "markdown")


def _said(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "/".join(map(_said, value)) if isinstance(value, tuple) else str(value)


#: of a multiply-add, forward and backward
OPERATIONS = 6


def hours(told: str) -> str:
    """What training a row's defense takes, at the scale of the grid and at full size, beside the hours that its paper reports."""
    import costs

    from bench import registry
    from bench.config import replaced
    from bench.data import load
    from bench.sheet import Sheet, written

    kind = registry.get(told)
    reported = int(re.search(r"(\d+) GPU-hours", sys.modules[kind.__module__].__doc__)[1])
    # a tenth of the images is held out, here as there
    training, full = chosen(told)[0].records[0].training, 0.9 * 50_000
    entry = float(re.search(r"passes of ([\d.]+) G", registry.entries()[told].cost)[1])
    done = OPERATIONS * training.passes * 0.9 * 5_085 * training.multiply_adds
    made = [
        (
            "this grid, one CPU core",
            f"{training.passes:.1f} × {training.multiply_adds / 1e6:.1f} M",
            f"{done / 1e15:.3g}",
            f"{training.seconds / 3600:.2g}",
            f"{done / training.seconds / 1e12:.2g}",
        )
    ]
    for recipe in ("fast", "paper"):
        narrow = replaced(kind.recipes[recipe], {"width": costs.NARROW["width"]})
        passes = costs.passes(kind(narrow), load("digits"))
        work = OPERATIONS * passes * full * entry * 1e9
        known = recipe == "paper"
        made.append(
            (
                f"recipe {recipe}, all of CIFAR-10"
                + (", in the hours that the paper reports" if known else ""),
                f"{passes:.0f} × {entry:g} G",
                f"{work / 1e15:.3g}",
                f"{reported}" if known else "",
                f"{work / reported / 3600 / 1e12:.2g}" if known else "",
            )
        )
    caption = (
        f"What training {told} takes. Work: passes for each training image, times images, times multiply-adds, times {OPERATIONS} operations "
        "forward and backward. The last column is what the hours would come to; a dash, what was not run."
    )
    headings = ("training", "passes × multiply-adds", "work, PFLOP", "hours", "sustained, TFLOP/s")
    return written(Sheet("hours", caption, headings, tuple(made)), "markdown")


#: the summary's columns: heading, protocol, column
HEADLINES = (
    ("SA", "dwf-paper", "clean"),
    ("PGD-100 ×3, the paper's protocol", "dwf-paper", "ms-pgd-100"),
    ("worst case, adaptive", "adaptive", "worst-case"),
    ("worst case, standard", "standard", "worst-case"),
)


def summary(told: str) -> str:
    """A line for each row of the grid, over all protocols."""
    from bench.block import doubt
    from bench.sheet import Sheet, written

    made, n, reduced = [], {}, {}
    for name in (name for name in told.split(",") if chosen(name)):
        cells, verdicts = [], []
        for _, protocol, column in HEADLINES:
            group = next(iter(chosen(name, protocol)), None)
            if group is None:
                cells.append("")
                continue
            n.setdefault(protocol, len(group.images))
            reduced.setdefault(group.records[0].asked.precision, {})[name] = None
            value = group.column(column)
            fewer = "" if n[protocol] == len(group.images) else f" of {len(group.images)}"
            cells.append(f"{value.accuracy:.1f} [{value.ci_low:.1f}, {value.ci_high:.1f}]{fewer}")
            verdicts.append(f"{protocol}: {doubt(group)}" if doubt(group) else "")
        doubted = ", ".join(dict.fromkeys(filter(None, verdicts))) or "credible"
        made.append((name, *cells, doubted))
    gradients = "; ".join(f"{precision}: {', '.join(names)}" for precision, names in reduced.items())
    caption = (
        f"CIFAR-10 ({grid.CPU.dataset}): accuracy in % with 95 % Wilson intervals, L∞ 8/255, on the first test images: "
        f"{', '.join(f'{protocol} {count}' for protocol, count in n.items())}, where nothing else is said. All networks have about 1.6 M parameters, learnt from 5,085 "
        "images, a tenth of them held out, at about equal cost, one seed, and are far smaller and far less trained than anybody's in the literature: compare the rows with one "
        f"another, not with papers. Gradients in {gradients}. Judged in float32."
    )
    headings = ("row", *(heading for heading, *_ in HEADLINES), "audit")
    return written(Sheet("summary", caption, headings, tuple(made)), "markdown")


KINDS: dict[str, Callable[[str], str]] = {
    "table": table,
    "read": read,
    "rows": rows,
    "summary": summary,
    "hours": hours,
}


@cache
def tables() -> dict[Path, str]:
    """What each derived text file must hold."""
    from bench.table import render

    def filled(match: re.Match) -> str:
        kind, told = match.groups()
        return f"<!-- {kind}: {told} -->\n{KINDS[kind](told)}<!-- /table -->"

    made = {}
    for root in (MEASURED, CIFAR):
        for format, ending in ENDINGS.items():
            made[root / "tables" / f"paper.{ending}"] = render(root, format=format, published=True)
        made[root / "tables" / "long.csv"] = render(root, format="csv", layout="long")
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        made[document] = MARK.sub(filled, text)
        for kind, told in MARK.findall(text):
            if kind == "read":
                made |= {CIFAR / "tables" / name: content for name, content in sheets(told)[1].items()}
    return made


def figures(root: Path, out: Path, *, data_only: bool = False) -> list[Path]:
    """Draws every figure that is kept of a folder's records."""
    from bench.plot import draw

    kept = partial(draw, root, out, data_only=data_only)
    if root == CIFAR:
        return kept(["curves", "tradeoff", "matrix", "calibration"], lines="cifar10")
    return [
        *kept(["curves", "tradeoff", "matrix"]),
        *kept(["calibration"], datasets=["digits"]),
        # these are images of CIFAR-10, of which the paper prints values
        *kept(["calibration"], datasets=["npz:cifar10-10k"], lines="cifar10"),
    ]


def stale_figures(root: Path) -> list[Path]:
    """The figures whose data are not what the records give, made or left over."""
    with tempfile.TemporaryDirectory() as folder:
        made = {path.name: path.read_bytes() for path in figures(root, Path(folder), data_only=True)}
    kept = {path.name: path.read_bytes() for path in (root / "figures").glob("*.csv")}
    return [
        root / "figures" / name for name in sorted(made.keys() | kept) if made.get(name) != kept.get(name)
    ]


def differing(paths: Iterable[Path], texts: dict[Path, str]) -> list[Path]:
    """The files that hold something else."""
    return [path for path in paths if not path.exists() or path.read_text(encoding="utf-8") != texts[path]]


def main(arguments: Sequence[str]) -> None:
    """Writes or compares."""
    stale = differing(tables(), tables())
    drawn = {root: stale_figures(root) for root in (MEASURED, CIFAR)}
    if "--check" not in arguments:
        for path in stale:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(tables()[path], encoding="utf-8")
        for root, paths in drawn.items():
            if paths:
                for path in paths:
                    for old in path.parent.glob(f"{path.stem}.*"):
                        old.unlink()
                figures(root, root / "figures")
    wrong = [str(path.relative_to(ROOT)) for path in chain(stale, *drawn.values())]
    if wrong:
        done = "" if "--check" in arguments else "; they are now"
        sys.exit(f"not what the records gave: {', '.join(wrong)}{done}")


if __name__ == "__main__":
    main(sys.argv[1:])
