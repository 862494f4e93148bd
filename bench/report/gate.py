"""How a mixture's gate used its experts, class by class, and what each of them answers alone; of a group's first record."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from bench.errors import UsageError
from bench.long import Group
from bench.per_class import names
from bench.record import Record
from bench.stats import wilson
from bench.usage import ATTACKED, CLEAN


@dataclass(frozen=True, kw_only=True)
class Alone:
    """The share of images that one expert answers rightly by itself, with its 95 % Wilson interval, in percent."""

    accuracy: float
    ci_low: float
    ci_high: float


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """Some images: how many, and each expert's mean weight on them, in percent."""

    name: str
    weights: tuple[float, ...]
    images: int


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the gate made of images, clean or attacked."""

    at: str
    """`clean`, or `attacked`: what the run's attacks made of those that were right"""
    classes: tuple[Weighed, ...]
    whole: Weighed
    """all images"""
    entropy: float
    """of an image's weights, the mean over images, in bits: 0 where one expert decides"""
    spread: float
    """the entropy of the mean weights, in bits: how evenly the experts are used over all images"""
    moved: float | None
    """the share of images, in percent, on which another expert weighs most than on the same image clean; None of clean ones"""
    alone: tuple[Alone, ...]
    """by expert"""

    @property
    def most(self) -> float:
        """The largest mean weight of a class, in percent."""
        return max(max(row.weights) for row in self.classes)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The usage of one trained gate: experts of another seed are others, so seeds are not averaged."""

    seed: int
    hard: bool
    experts: int
    seen: tuple[Seen, ...]
    """clean images first"""

    @property
    def bits(self) -> float:
        """The largest entropy that there can be: all experts alike."""
        return math.log2(self.experts)

    @property
    def most(self) -> float:
        """The largest mean weight of a class anywhere, in percent, to which heat maps are scaled alike."""
        return max(seen.most for seen in self.seen)


def usage(group: Group) -> Gate | None:
    """What the first record that tells says of its gate; None where none does.

    Raises:
        UsageError: its experts.parquet is not of the form that `Record.experts` tells of.
    """
    for record in group.records:
        frame = record.experts()
        if frame is not None and len(frame):
            return _gate(record, frame)
    return None


def _gate(record: Record, frame: pd.DataFrame) -> Gate:
    frame = frame.assign(at=frame["at"].astype(object)).sort_values(["index", "expert"], kind="stable")
    parts = {at: frame[frame["at"] == at] for at in (CLEAN, ATTACKED) if (frame["at"] == at).any()}
    experts = frame["expert"].nunique()
    first: dict[int, int] = {}
    seen = []
    for at, part in parts.items():
        if len(part) % experts or (part["expert"].to_numpy() != np.arange(len(part)) % experts).any():
            raise UsageError(
                f"{record._folder}/experts.parquet does not tell of each of {experts} experts for every image of {at!r}; "
                "delete the folder and run again"
            )
        seen.append(_seen(record.asked.dataset, at, part, experts, first))
        if at == CLEAN:
            first = dict(_foremost(part, experts))
    if not seen:
        raise UsageError(
            f"{record._folder}/experts.parquet tells of neither clean nor attacked images; delete the folder and run again"
        )
    return Gate(
        seed=record.asked.seed,
        hard=record.model.mixture == "hard",
        experts=experts,
        seen=tuple(seen),
    )


def _seen(dataset: str, at: str, part: pd.DataFrame, experts: int, first: dict[int, int]) -> Seen:
    weights = part["weight"].to_numpy(dtype=np.float64).reshape(-1, experts)
    right = part["right"].to_numpy(dtype=bool).reshape(-1, experts)
    labels = part["label"].to_numpy(dtype=np.int64)[::experts]
    classes = np.unique(labels)
    called = zip(names(dataset, classes), classes, strict=True)
    moved = [expert != first[image] for image, expert in _foremost(part, experts) if image in first]
    low, high = wilson(right.sum(0), len(right))
    return Seen(
        at=at,
        classes=tuple(_weighed(name, weights[labels == label]) for name, label in called),
        whole=_weighed("all", weights),
        entropy=float(_bits(weights).mean()),
        spread=float(_bits(weights.mean(0))),
        moved=100 * float(np.mean(moved)) if moved else None,
        alone=tuple(
            Alone(accuracy=100 * float(mean), ci_low=100 * float(a), ci_high=100 * float(b))
            for mean, a, b in zip(right.mean(0), low, high, strict=True)
        ),
    )


def _weighed(name: str, weights: NDArray[np.float64]) -> Weighed:
    return Weighed(name=name, weights=tuple((100 * weights.mean(0)).tolist()), images=len(weights))


def _foremost(part: pd.DataFrame, experts: int) -> list[tuple[int, int]]:
    """Each image with the expert that weighs most there."""
    weights = part["weight"].to_numpy(dtype=np.float64).reshape(-1, experts)
    images = part["index"].to_numpy(dtype=np.int64)[::experts]
    return list(zip(images.tolist(), weights.argmax(1).tolist(), strict=True))


def _bits(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The entropy of weights that add up to 1 along the last dimension, in bits; 0 · log 0 is 0."""
    bits: NDArray[np.float64] = -(weights * np.log2(np.where(weights > 0, weights, 1))).sum(-1)
    return bits
