"""Two defenses on the same images: which are meant, may they be compared, and how many images would tell them apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.errors import UnknownName, UsageError, meant
from bench.long import Group, groups
from bench.record import read_all
from bench.stats import images_needed


@dataclass(frozen=True)
class Needed:
    """How many images McNemar's exact test needs where this is how the two differ."""

    case: str
    p10: float
    """share of the images on which only the first one holds"""
    p01: float
    """share on which only the second one does"""
    images: int


@dataclass(frozen=True)
class Answer:
    """What was compared, at which level and power, and what it takes."""

    what: str
    alpha: float
    power: float
    needed: tuple[Needed, ...]
    have: int | None = None
    """images there are"""

    def __str__(self) -> str:
        test = f"McNemar's exact test, two-sided, alpha {self.alpha:g}, power {self.power:g}"
        cases = ", ".join(f"{one.images:,} images {one.case}" for one in self.needed)
        have = "" if self.have is None else f"; there are {self.have:,}"
        return f"{self.what}: {cases}{have}\n({test})"

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def named(found: Sequence[Group], name: str) -> list[Group]:
    """The groups of this label; if there is none, those of this defense."""
    exact = [group for group in found if group.label == name]
    return exact or [group for group in found if group.records[0].asked.defense == name]


def untestable(a: Group, b: Group) -> str:
    """Why no paired test can be made between two groups; empty where it can."""
    if a.void or b.void:
        return "void"
    if len(a.records) > 1 or len(b.records) > 1:
        return "several seeds"
    return "" if np.array_equal(a.images, b.images) else "other images"


def asked(
    accuracies: Sequence[float],
    defense: str | None,
    results: Path,
    *,
    discordant: float | None,
    dataset: str,
    protocol: str,
    column: str,
    alpha: float,
    power: float,
) -> Answer:
    """What `bench power` is asked: of two accuracies, or of two defenses whose runs are kept.

    Raises:
        UsageError: neither or both are given, or one of them is wrong.
        UnknownName: no such defense or column.
    """
    if (len(accuracies) == 2) == (defense is not None) or len(accuracies) not in (0, 2):
        raise UsageError("give two accuracies in percent, such as 50.1 52.0, or --defense with two names")
    if defense is None:
        return needed(*accuracies, discordant=discordant, alpha=alpha, power=power)
    if discordant is not None:
        raise UsageError("--discordant is for accuracies; two runs say themselves where they differ")
    # a label may have commas of its own, within its brackets
    names = [name.strip() for name in re.split(r",(?![^\[]*\])", defense)]
    found = groups(read_all(results))
    return needed_between(found, names, dataset, protocol, column, alpha=alpha, power=power)


def needed(
    first: float, second: float, *, discordant: float | None = None, alpha: float = 0.05, power: float = 0.8
) -> Answer:
    """How many images tell two accuracies apart.

    Without `discordant` that depends on how alike the two are: the least if the better one holds on all that the other
    holds on, more if they fail independently.

    Args:
        first: an accuracy in percent.
        second: another.
        discordant: the percentage of images on which exactly one of the two is right.
        alpha: the level of the test.
        power: how often it shall find the difference.

    Raises:
        UsageError: no percentages, equal ones, or a discordance that two such accuracies cannot have.
    """
    for value in (first, second):
        if not 0 <= value <= 100:
            raise UsageError(f"{value:g} is no accuracy; expected percentages such as 50.1 52.0")
    if first == second:
        raise UsageError(f"both are {first:g} %; no number of images tells equals apart")
    a, b = first / 100, second / 100
    what = f"{first:g} % and {second:g} %"
    if discordant is None:
        cases = {
            "if the better one is right wherever the other is": (max(a - b, 0.0), max(b - a, 0.0)),
            "if the two fail independently": (a * (1 - b), b * (1 - a)),
        }
    else:
        share, least, most = discordant / 100, abs(a - b), min(a + b, 2 - a - b)
        if not least - 1e-12 <= share <= most + 1e-12:
            raise UsageError(
                f"accuracies of {what} differ on {100 * least:g} to {100 * most:g} % of the images, not on {discordant:g} %"
            )
        cases = {
            f"if they differ on {discordant:g} %": (max(share + a - b, 0) / 2, max(share - a + b, 0) / 2)
        }
    return Answer(
        what, alpha, power, tuple(_needed(case, *shares, alpha, power) for case, shares in cases.items())
    )


def needed_between(
    found: Sequence[Group],
    defenses: Sequence[str],
    dataset: str,
    protocol: str,
    column: str = "worst-case",
    *,
    alpha: float = 0.05,
    power: float = 0.8,
) -> Answer:
    """How many images tell two defenses apart that differ as these runs do.

    Args:
        found: groups to choose from.
        defenses: two of their labels or defenses.
        dataset: of the runs.
        protocol: of the runs.
        column: the name of a column that both have.
        alpha: the level of the test.
        power: how often it shall find the difference.

    Raises:
        UsageError: not two defenses, several runs of one, or runs on other images, of several seeds or void.
        UnknownName: no such defense or column.
    """
    if len(defenses) != 2:
        raise UsageError(
            f"{len(defenses)} defense(s) given; name the two that are compared, such as --defense a,b"
        )
    there = [group for group in found if (group.dataset, group.protocol) == (dataset, protocol)]
    if not there:
        known = dict.fromkeys(f"--dataset {group.dataset} --protocol {group.protocol}" for group in found)
        near = meant(protocol, {group.protocol for group in found}) if found else ""
        raise UsageError(
            f"no runs of {protocol} on {dataset}; there are {', '.join(known) or 'none at all'}{near}"
        )
    pair = [one(there, name) for name in defenses]
    why = untestable(*pair)
    if why:
        raise UsageError(f"{pair[0].label} and {pair[1].label} have no paired test: {why}")
    for group in pair:
        if group.column(column) is None:
            raise UnknownName(
                "column", column, [known.name for known in group.columns], f" (of {group.label})"
            )
    first, second = (group.outcomes(column) for group in pair)
    p10, p01 = float((first & ~second).mean()), float((second & ~first).mean())
    what = (
        f"{pair[0].label} {100 * first.mean():.2f} % and {pair[1].label} {100 * second.mean():.2f} % under {column} "
        f"({dataset}, {protocol})"
    )
    case = f"where only the first is right on {100 * p10:.2f} % and only the second on {100 * p01:.2f} %"
    return Answer(what, alpha, power, (_needed(case, p10, p01, alpha, power),), len(first))


def one(found: Sequence[Group], name: str) -> Group:
    """The only group of this name.

    Raises:
        UnknownName: there is none.
        UsageError: there are several.
    """
    fits = named(found, name)
    if not fits:
        raise UnknownName("defense", name, {group.label for group in found})
    if len(fits) > 1:
        raise UsageError(
            f"several rows of {name!r}: {', '.join(group.label for group in fits)}; name one of these"
        )
    return fits[0]


def _needed(case: str, p10: float, p01: float, alpha: float, power: float) -> Needed:
    return Needed(case, p10, p01, images_needed(p10, p01, alpha=alpha, power=power))
