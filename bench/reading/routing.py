"""What a mixture's routing hides from PGD, and which expert does the work.

PGD end to end follows the expert that happens to weigh most. What the run's other attacks broke beyond that, PGD did not see.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.block import doubt
from bench.long import WORST_CASE, Group
from bench.reading.differences import held
from bench.sheet import Sheet
from bench.stats import wilson
from bench.usage import ATTACKED, CLEAN, Usage, usage


def sheets(found: Sequence[Group]) -> list[Sheet]:
    """A table for each protocol: what routing hides, and how the work is shared."""
    made = []
    for dataset, protocol in dict.fromkeys((group.dataset, group.protocol) for group in found):
        rows = [
            row
            for group in found
            if (group.dataset, group.protocol) == (dataset, protocol) and (row := _row(group)) is not None
        ]
        if rows:
            made.append(Sheet(f"routing-{protocol}", _caption(dataset, protocol), HEADINGS, tuple(rows)))
    return made


HEADINGS = (
    "mixture",
    "n",
    "PGD alone",
    "worst case",
    "hidden from PGD",
    "best expert alone",
    "mean expert alone",
    "load of each expert",
    "gate entropy, clean",
    "gate entropy, attacked",
)


def _caption(dataset: str, protocol: str) -> str:
    return (
        f"{dataset}, protocol {protocol}: mixtures of experts, in % of the n images but for entropies. PGD alone: the first column of "
        "PGD end to end; hidden: what held there and fell to another attack of the same radius, with its 95 % Wilson interval. Experts alone: "
        "accuracy on clean images, each expert answering everything. Load: mean gate weight on clean images, of a hard gate the "
        "share of images that the expert answers. Entropy: of an image's gate weights, as a share of the largest there can "
        "be, the mean over images; of a hard gate, that of the load. Attacked: the images that the run's attacks ended with."
    )


def _row(group: Group) -> tuple[str, ...] | None:
    seen = [record.experts() for record in group.records]
    if any(rows is None for rows in seen):
        return None
    # of several seeds the first: experts have no names by which those of two trainings could be paired
    clean, attacked = (usage(seen[0], at) for at in (CLEAN, ATTACKED))  # type: ignore[arg-type]
    soft = group.records[0].model.mixture == "soft"
    return (
        f"{group.label} ({doubt(group)})" if doubt(group) else group.label,
        str(len(group.images)),
        *_hidden(group),
        f"{100 * clean.alone.max():.1f}",
        f"{100 * clean.alone.mean():.1f}",
        " ".join(f"{100 * load:.0f}" for load in clean.load),
        _entropy(clean, soft),
        _entropy(attacked, soft),
    )


def _hidden(group: Group) -> tuple[str, str, str]:
    """PGD alone, the worst case, and what lies between them; empty where the protocol does not ask both at one radius."""
    pgd = next((c for c in group.columns if c.attack == "pgd" and not c.survivors), None)
    worst = group.column(WORST_CASE)
    if pgd is None or worst is None or pgd.epsilon != worst.epsilon:
        return "", "", ""
    fell = float(np.clip(held(group, pgd.name) - held(group, WORST_CASE), 0, None).sum())
    low, high = (100 * float(end) for end in wilson(fell, len(group.images)))
    share = 100 * fell / len(group.images)
    return f"{pgd.accuracy:.1f}", f"{worst.accuracy:.1f}", f"{share:.1f} [{low:.1f}, {high:.1f}]"


def _entropy(seen: Usage, soft: bool) -> str:
    if not len(seen.labels):
        return ""
    return f"{float(seen.entropy.mean()) if soft else seen.load_entropy:.2f}"
