"""What papers print, for display beside our own numbers; never a target, never part of a comparison.

The files lie in `results/published` of the repository and in `bench/published` of an installed package.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

#: what the paper's tables call an attack, and what we do
_ATTACKS = {"pgd_multirestart": "ms-pgd", "pgd_adaptive_eot": "a-pgd"}


@dataclass(frozen=True)
class Printed:
    """One accuracy as a paper prints it, in percent; `std` where it prints one."""

    accuracy: float
    std: float | None


def published_dir() -> Path:
    """Where the files of published numbers are: in the package if it is installed, else in the repository."""
    installed = Path(__file__).parent / "published"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "results" / "published"


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


def _rises(values: Sequence[float]) -> bool:
    return any(after > before for before, after in pairwise(values))
