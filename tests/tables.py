"""Makes everything that is derived from the kept records anew: tables, figures, and the README's table.

python tests/tables.py            # write
python tests/tables.py --check    # compare, and name what differs
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "results" / "measured"
OPEN, CLOSE = "<!-- table: results/measured, digits -->\n", "<!-- /table -->"
FIRST = ("digits", "dwf-paper")
ENDINGS = {"markdown": "md", "latex": "tex", "csv": "csv"}


def tables() -> dict[Path, str]:
    """What each derived text file must hold."""
    from bench.cli import DEFAULT_DEFENSES
    from bench.long import groups
    from bench.record import read_all
    from bench.table import render, render_groups

    made = {
        MEASURED / "tables" / f"paper.{ending}": render(MEASURED, format=format, published=True)
        for format, ending in ENDINGS.items()
    }
    made[MEASURED / "tables" / "long.csv"] = render(MEASURED, format="csv", layout="long")
    # what `bench run` prints when it is told nothing
    first = groups(
        record
        for record in read_all(MEASURED)
        if (record.asked.dataset, record.asked.protocol["name"]) == FIRST
    )
    first = [group for group in first if group.label in DEFAULT_DEFENSES.split(",")]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, rest = readme.split(OPEN)
    _, after = rest.split(CLOSE)
    made[ROOT / "README.md"] = before + OPEN + render_groups(first, format="markdown") + CLOSE + after
    return made


def main() -> None:
    """Writes or compares."""
    from bench.plot import figures

    stale = []
    for path, text in tables().items():
        if "--check" in sys.argv:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                stale.append(path.relative_to(ROOT))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if "--check" not in sys.argv:
        figures(MEASURED, MEASURED / "figures")
    if stale:
        sys.exit(f"not what the records give: {', '.join(map(str, stale))}; run `tox run -e tables`")


if __name__ == "__main__":
    main()
