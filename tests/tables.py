"""Makes everything that is derived from the kept records anew: tables, figures, and the tables inside documents.

    python tests/tables.py            # write
    python tests/tables.py --check    # compare, and name what differs

A document holds a table between `<!-- table: DATASET PROTOCOL DEFENSE,DEFENSE -->` and `<!-- /table -->`.
"""

import re
import sys
from functools import cache, partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "results" / "measured"
DOCUMENTS = (ROOT / "README.md", MEASURED / "README.md")
TABLE = re.compile(r"<!-- table: (\S+) (\S+) (\S+) -->\n.*?<!-- /table -->", re.DOTALL)
ENDINGS = {"markdown": "md", "latex": "tex", "csv": "csv"}


@cache
def tables() -> dict[Path, str]:
    """What each derived text file must hold."""
    from bench.long import groups
    from bench.record import read_all
    from bench.table import render, render_groups

    records = list(read_all(MEASURED))

    def filled(match: re.Match) -> str:
        dataset, protocol, defenses = match.groups()
        asked = [
            record
            for record in records
            if (record.asked.dataset, record.asked.protocol["name"]) == (dataset, protocol)
            and record.asked.defense in defenses.split(",")
        ]
        text = render_groups(groups(asked), format="markdown")
        return f"<!-- table: {dataset} {protocol} {defenses} -->\n{text}<!-- /table -->"

    made = {
        MEASURED / "tables" / f"paper.{ending}": render(MEASURED, format=format, published=True)
        for format, ending in ENDINGS.items()
    }
    made[MEASURED / "tables" / "long.csv"] = render(MEASURED, format="csv", layout="long")
    for document in DOCUMENTS:
        made[document] = TABLE.sub(filled, document.read_text(encoding="utf-8"))
    return made


def figures(out: Path, *, data_only: bool = False) -> list[Path]:
    """Draws every figure that is kept."""
    from bench.plot import draw

    kept = partial(draw, MEASURED, out, data_only=data_only)
    return [
        *kept(["curves", "tradeoff", "matrix"]),
        *kept(["calibration"], datasets=["digits"]),
        # these are images of CIFAR-10, of which the paper prints values
        *kept(["calibration"], datasets=["npz:cifar10-10k"], lines="cifar10"),
    ]


def main() -> None:
    """Writes or compares."""
    stale = []
    for path, text in tables().items():
        if "--check" in sys.argv:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                stale.append(path.relative_to(ROOT))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if "--check" not in sys.argv:
        figures(MEASURED / "figures")
    if stale:
        sys.exit(f"not what the records give: {', '.join(map(str, stale))}; run `tox run -e tables`")


if __name__ == "__main__":
    main()
