"""Pages that mkdocs makes as it builds: protocols and defenses as the code has them, and rows that papers print."""

from __future__ import annotations

import ast
import csv
import re
from pathlib import Path
from typing import Any

from bench import listing, protocol, registry

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "results" / "published"


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages."""
    from mkdocs.structure.files import File

    for name, text in (("protocols", protocols()), ("defenses", defenses())):
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Puts rows of published tables where `<!-- published: ATTACK of ROW, ROW on DATASET -->` stands."""
    return re.sub(r"<!-- published: (\w+) of (.+?) on (\w+) -->", lambda m: published(*m.groups()), markdown)


def protocols() -> str:
    """Every protocol: what it is about, and its file."""
    parts = ["# Protocols\n", "Each is a file of the harness, and could be a file of yours.\n"]
    for name, about in protocol.names().items():
        text = (ROOT / "bench" / "protocols" / f"{name}.toml").read_text(encoding="utf-8")
        parts.append(f"## {name}\n\n{about}\n\n```toml\n{text}```\n")
    return "\n".join(parts)


def defenses() -> str:
    """Every defense: a table of all, and the docstring of each file."""
    entries = registry.entries()
    parts = [
        "# Defenses\n",
        "The cost is that of the recipe `fast`: forward-backward passes for each training image, and multiply-adds of one "
        "pass on CIFAR-10, in billions (G). What follows the table is what each file says of itself.\n",
        "| name | kind | paper | cost |",
        "|---|---|---|---|",
    ]
    for name, one in entries.items():
        parts.append(f"| `{listing.shown(name)}` | {one.kind} | {one.paper or '-'} | {one.cost or '-'} |")
    for module in dict.fromkeys(one.module for one in entries.values()):
        file = ROOT / (module.replace(".", "/") + ".py")
        names = ", ".join(f"`{listing.shown(n)}`" for n, one in entries.items() if one.module == module)
        about = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        title, _, rest = about.partition("\n")
        parts.append(f"\n## {file.stem}\n\n{names}: {title}\n\n```text\n{rest.strip()}\n```\n")
    return "\n".join(parts)


def published(attack: str, models: str, dataset: str) -> str:
    """Rows of the paper's table, a column for each setting."""
    wanted, found = models.split(", "), {}
    settings: list[str] = []
    for file in ("paper_table_fgsm.csv", "paper_table_pgd.csv"):
        for row in csv.DictReader((PUBLISHED / file).read_text(encoding="utf-8").splitlines()):
            if (row["dataset"], row["attack"]) == (dataset, attack) and row["model"] in wanted:
                found[row["model"], row["setting"]] = row["accuracy_mean"]
                settings += [row["setting"]] if row["setting"] not in settings else []
    if missing := [model for model in wanted if not any(name == model for name, _ in found)]:
        raise ValueError(f"the published tables have no {attack} of {', '.join(missing)} on {dataset}")
    lines = [f"| {dataset}, {attack} | {' | '.join(settings)} |", f"|---|{'---:|' * len(settings)}"]
    for model in wanted:
        cells = [found.get((model, setting), "") for setting in settings]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)
