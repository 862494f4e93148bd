"""What `bench list` prints: names, and of a defense its kind, paper, cost, and whether it is trained here. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import data, protocol, registry

#: the headings of the table of defenses, by field
HEADINGS = {
    "name": "name",
    "kind": "kind",
    "paper": "paper",
    "cost": "cost (recipe fast)",
    "trained": "trained here",
}


def everything(what: str | None, results: Path) -> dict[str, dict[str, Any]]:
    """What there is of one kind or of all, by kind and name; of defenses with all that is known of them."""
    known: dict[str, dict[str, Any]] = {
        "defenses": defenses(results),
        "datasets": data.names(),
        "protocols": protocol.names(),
        "attacks": protocol.ATTACKS,
    }
    return {what: known[what]} if what else known


def defenses(results: Path) -> dict[str, dict[str, Any]]:
    """By name: `summary`, `kind`, `paper`, `cost`, and `trained`, the datasets and recipes of its finished trainings."""
    here = trained(results)
    return {
        name: {
            "summary": entry.summary,
            "kind": entry.kind,
            "paper": entry.paper,
            "cost": entry.cost,
            "trained": here.get(name, []),
        }
        for name, entry in registry.entries().items()
    }


def trained(results: Path) -> dict[str, list[str]]:
    """By defense the datasets and recipes of which a checkpoint is finished, such as `digits (tiny)`."""
    found: dict[str, list[str]] = {}
    for file in sorted(results.glob("checkpoints/*/*/*/model.safetensors")):
        dataset, defense, training = file.parts[-4:-1]
        said = f"{dataset} ({training.rpartition('-')[0]})"
        if said not in found.setdefault(defense, []):
            found[defense].append(said)
    return found


def as_text(what: str | None, known: Mapping[str, Mapping[str, Any]]) -> str:
    """One line for each name; for all defenses alone a table."""
    if what == "defenses":
        return table([{"name": shown(name), **facts} for name, facts in known["defenses"].items()])
    lines = []
    for kind, names in known.items():
        lines += [f"{kind}:"] if what is None else []
        for name, about in names.items():
            lines.append(f"  {shown(name):18} {about['summary'] if kind == 'defenses' else about}")
    return "\n".join(lines)


def shown(name: str) -> str:
    """A name as it is typed: that of a family wants one more."""
    return name + "NAME" if name.endswith(":") else name


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Aligned columns under headings; a dash where nothing is known."""
    cells = [HEADINGS] + [
        {field: ", ".join(row[field]) if field == "trained" else row[field] for field in HEADINGS}
        for row in rows
    ]
    widths = {field: max(len(row[field]) for row in cells) for field in HEADINGS}
    return "\n".join(
        ("  " + "  ".join((row[field] or "-").ljust(width) for field, width in widths.items())).rstrip()
        for row in cells
    )
