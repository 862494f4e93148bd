"""What papers print, for display beside our own numbers; never a target, never part of a comparison.

The files lie in `results/published` of the repository and in `bench/published` of an installed package. The DWF paper's
Table 3 is one of them; `reported.csv` has what is reported of other defenses, line by line with its source.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

from bench.config import number
from bench.record import ColumnRecord

#: what the paper's tables call an attack, and what we do
_ATTACKS = {"pgd_multirestart": "ms-pgd", "pgd_adaptive_eot": "a-pgd"}
#: how far a radius may lie from another and still stand in its column: 0.031 is printed for 8/255
_SAME_RADIUS = 0.02


@dataclass(frozen=True)
class Printed:
    """One accuracy as a paper prints it, in percent; `std` where it prints one."""

    accuracy: float
    std: float | None


def published_dir() -> Path:
    """Where the files of published numbers are: in the package if it is installed, else in the repository."""
    installed = Path(__file__).parent / "published"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "results" / "published"


#: what is printed of a network, by attack and its radius or steps
PublishedRow = Mapping[tuple[str, float], Printed]
PublishedRows = Mapping[str, PublishedRow]


def rows(dataset: str) -> dict[str, dict[tuple[str, float], Printed]]:
    """The rows of the DWF paper's Table 3 on a dataset, in its order; none for a dataset it does not use.

    Returns:
        By the row's name: by attack and its radius (`fgsm`) or steps (the kinds of PGD), what is printed.
    """
    found: dict[str, dict[tuple[str, float], Printed]] = {}
    for name in ("paper_table_fgsm.csv", "paper_table_pgd.csv"):
        with (published_dir() / name).open(encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                if line["dataset"] == dataset:
                    asked = (_ATTACKS.get(line["attack"], line["attack"]), float(line["setting"]))
                    std = float(line["accuracy_std"]) if line["accuracy_std"] else None
                    found.setdefault(line["model"], {})[asked] = Printed(float(line["accuracy_mean"]), std)
    return found


def row_of(defense: str, published_as: str | None, rows: Iterable[str]) -> str | None:
    """The row that prints a defense: the one it names, or the one whose letters and digits are its name's."""

    def letters(name: str) -> str:
        return "".join(c for c in name.lower() if c.isalnum())

    known = list(rows)
    if published_as in known:
        return published_as
    return next((row for row in known if letters(row) == letters(defense)), None)


def doubts(row: Mapping[tuple[str, float], Printed]) -> list[str]:
    """What a row contradicts in itself: accuracy that rises where the attack can only have grown stronger."""

    def along(attack: str) -> list[float]:
        return [row[asked].accuracy for asked in sorted(row) if asked[0] == attack]

    said = []
    if _rises(along("fgsm")):
        said.append("as printed, accuracy rises with the radius of FGSM")
    if _rises(along("pgd")):
        said.append("as printed, accuracy rises with the steps of PGD")
    if any(_rises([*along("pgd")[-1:], *along(attack)]) for attack in ("ms-pgd", "a-pgd")):
        said.append(
            "as printed, 100 steps with restarts or of the adaptive attack leave more than 50 steps of PGD"
        )
    return said


@dataclass(frozen=True)
class Reported:
    """One accuracy that is reported of a defense, in percent, and the attack; `steps` and `restarts` of PGD alone."""

    norm: str
    eps: float
    """in pixel units; on clean images, what was trained for"""
    attack: str
    steps: int | None
    restarts: int | None
    accuracy: float
    source: str
    note: str
    """what is known against it; empty where nothing is"""

    def answers(self, column: ColumnRecord) -> bool:
        """Whether the column asks what this accuracy is reported for, but for a radius that was rounded."""
        if self.attack != column.attack:
            return False
        if self.attack == "clean":
            return True
        same = (self.norm, self.steps or column.steps, self.restarts or column.restarts)
        near = column.epsilon is not None and abs(self.eps - column.epsilon) <= _SAME_RADIUS * self.eps
        return near and same == (column.norm, column.steps, column.restarts)


@dataclass(frozen=True)
class Report:
    """What is reported of one network of a defense: a row of a table."""

    name: str
    architecture: str
    eps: str
    """the radius as it is written there"""
    numbers: tuple[Reported, ...]

    def of(self, column: ColumnRecord) -> Reported | None:
        """What is reported for this column, if anything is."""
        return next((one for one in self.numbers if one.answers(column)), None)


def reports(dataset: str, defense: str) -> Iterator[Report]:
    """What is reported of a defense on a dataset, in the file's order; nothing where no source prints any."""
    with (published_dir() / "reported.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(line for line in file if not line.startswith("#")))
    own = [line for line in lines if (line["dataset"], line["defense"]) == (dataset, defense)]
    for (name, architecture, eps), same in groupby(own, lambda x: (x["row"], x["architecture"], x["eps"])):
        yield Report(name, architecture, eps, tuple(map(_reported, same)))


def _reported(line: Mapping[str, str]) -> Reported:
    return Reported(
        norm=line["norm"],
        eps=float(str(number(line["eps"]))),
        attack=line["attack"],
        steps=int(line["steps"]) if line["steps"] else None,
        restarts=int(line["restarts"]) if line["restarts"] else None,
        accuracy=float(line["accuracy"]),
        source=line["source"],
        note=line["note"],
    )


def _rises(values: Sequence[float]) -> bool:
    return any(after > before for before, after in pairwise(values))


def taxonomy() -> dict[str, dict[str, str]]:
    """The DWF paper's Table 1: by row, what each of its columns says."""
    with (published_dir() / "paper_table_taxonomy.csv").open(encoding="utf-8", newline="") as file:
        return {line.pop("defense"): line for line in csv.DictReader(file)}
