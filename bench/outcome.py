"""What became of images: one outcome per column, collected batch by batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from bench.judge import Cost
from bench.protocol import Column
from bench.types import Labels


@dataclass
class Outcome:
    """What became of a batch's images in one column; all `(b,)`."""

    prediction: Tensor
    robust: Tensor
    """whether the answer was right; of a random model, in every draw"""
    restart: Tensor
    """the start that broke the image; -1 where this column's attack broke none"""
    step: Tensor
    """the step of that start after which it was broken, likewise"""
    share: Tensor | None = None
    """of a random model: the share of fresh draws that were right, float"""
    selected: Tensor | None = None
    """of a random model: the same over the draws by which the attack chose its image"""

    @classmethod
    def of(cls, prediction: Tensor, right: Tensor) -> Outcome:
        """The outcome before any attack: a misclassified image is broken as it stands, by start 0 after 0 steps."""
        place = torch.where(right, -1, 0)
        return cls(prediction.clone(), right.clone(), place, place.clone())

    def after(self, earlier: Outcome, right: Tensor) -> Outcome:
        """This outcome, where only images that stand in `earlier` are left to attack; `right` is the clean outcome."""
        fallen = right & ~earlier.robust
        self.prediction[fallen] = earlier.prediction[fallen]
        self.robust &= earlier.robust
        self.restart[fallen] = self.step[fallen] = -1
        return self

    def settle(
        self,
        rows: Tensor,
        prediction: Tensor,
        y: Labels,
        restart: int,
        step: int,
        *,
        only_broken: bool = False,
    ) -> None:
        """Enters what was found for these rows; an image that fell stays charged to what felled it first.

        With `only_broken` the prediction of an image that still stands is left as it was.
        """
        broken = prediction != y
        standing = self.robust[rows]
        entered = standing & broken if only_broken else standing
        self.prediction[rows] = torch.where(entered, prediction, self.prediction[rows])
        self.restart[rows] = torch.where(standing & broken, restart, self.restart[rows])
        self.step[rows] = torch.where(standing & broken, step, self.step[rows])
        self.robust[rows] = standing & ~broken


@dataclass
class Batch:
    """A finished batch: dataset positions, labels, an outcome for every column, a cost for every program."""

    index: np.ndarray
    labels: np.ndarray
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)
    columns: dict[str, Column] = field(default_factory=dict)
    """what was asked, by name"""
    experts: pa.Table | None = None
    """of a mixture: what each expert did, as `bench.usage` tells it"""
