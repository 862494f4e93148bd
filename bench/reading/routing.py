"""What a mixture's routing hides from PGD, and which expert does the work.

PGD end to end follows the expert that happens to weigh most. What the run's other attacks broke beyond that, PGD did not see.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.block import doubt
from bench.long import WORST_CASE, WORST_DRAW, Group, worst_of
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


#: end to end, with either loss
PGD = ("pgd", "pgd-margin")
#: columns that are made of others
DERIVED = (WORST_CASE, WORST_DRAW)

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
        f"{dataset}, protocol {protocol}: mixtures of experts, in % of the n images but for entropies. PGD alone: end to end, with "
        "every loss that was asked; hidden: what held there and fell to another attack of the same radius, with its 95 % Wilson interval (of a random model both are shares of draws, so that chance can put the worst case above PGD). Experts alone: "
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
    """PGD alone, the worst case, and what lies between them; the latter empty where nothing else was asked at one radius."""
    asked = [column for column in group.columns if column.epsilon is not None and column.name not in DERIVED]
    pgd = [column for column in asked if column.attack in PGD and not column.survivors]
    if not pgd or len({column.epsilon for column in asked}) > 1:
        return "", "", ""
    stood = worst_of(group.records[0], [column.name for column in pgd])
    alone, worst = f"{100 * stood.mean():.1f}", f"{100 * held(group, WORST_CASE).mean():.1f}"
    if len(pgd) == len(asked):
        return alone, worst, ""
    # of a random model both are shares of draws, and can differ by chance
    fell = max(0.0, float((stood - held(group, WORST_CASE)).sum()))
    low, high = (100 * float(end) for end in wilson(fell, len(group.images)))
    return alone, worst, f"{100 * fell / len(group.images):.1f} [{low:.1f}, {high:.1f}]"


def _entropy(seen: Usage, soft: bool) -> str:
    if not len(seen.labels):
        return ""
    return f"{float(seen.entropy.mean()) if soft else seen.load_entropy:.2f}"
