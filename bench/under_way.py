"""What a run says of itself while it attacks: which program is at work, and the robust accuracy so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bench.outcome import Batch
from bench.plan import Program
from bench.progress import Meter

#: passes of AutoAttack on an image that it does not break: 1,900 gradients and 5,000 queries, about
AUTOATTACK = 10_000


class UnderWay:
    """Turns what an evaluator tells into progress.

    A program that is done counts as its share of the batch's images: a batch may take an hour, and it should be seen how
    much of it is over. The share is that of its passes where no image falls, and once a batch is done that of its seconds.
    """

    def __init__(self, meter: Meter, programs: Sequence[Program]) -> None:
        self.meter = meter
        self.shares = _shares({program.name: passes(program) for program in programs})
        self.before: Program | None = None
        #: right answers and images of the finished batches, and what was counted of the one under way
        self.robust, self.n, self.counted = 0.0, 0, 0.0

    def begins(self, program: Program, batch: Batch) -> None:
        """A program is about to be run."""
        robust, n = self.robust, self.n
        if batch.outcomes:
            robust, n = robust + float(standing(batch).sum()), n + len(batch.index)
        self.meter.advance(self._over(batch), f"{named(program)}{_said(robust, n)}")
        self.before = program

    def ends(self, batch: Batch) -> None:
        """A batch is done."""
        self.robust, self.n = self.robust + float(standing(batch).sum()), self.n + len(batch.index)
        last = len(batch.index) - self.counted
        self.shares = _shares({name: cost.seconds for name, cost in batch.costs.items()})
        self.before, self.counted = None, 0.0
        self.meter.advance(last, f"batch done{_said(self.robust, self.n)}")

    def _over(self, batch: Batch) -> float:
        """Images' worth of work that the program before came to."""
        if self.before is None:
            return 0.0
        amount = len(batch.index) * self.shares[self.before.name]
        self.counted += amount
        return amount


def standing(batch: Batch) -> Tensor:
    """Of each image the share of right answers in the worst of the columns so far, float `(b,)`."""
    shares = [
        outcome.robust.float() if outcome.share is None else outcome.share.float()
        for name, outcome in batch.outcomes.items()
        if not batch.columns[name].diagnostic
    ]
    return torch.stack(shares).amin(0)


def passes(program: Program) -> float:
    """Passes of an image that nothing breaks, a gradient counting as three."""
    if program.first.family == "autoattack":
        return AUTOATTACK
    return 3 * program.gradients()[1] + program.forwards()[1]


def named(program: Program) -> str:
    """What a program does, in words."""
    first = program.first
    kind, _, other = first.family.partition(":")
    if kind == "clean":
        return "clean images"
    if kind == "fgsm":
        radii = len({column.eps for column in program.columns})
        return "FGSM" if radii == 1 else f"FGSM at {radii} radii"
    if kind == "pgd":
        steps = f"PGD-{max(column.steps for column in program.columns)}"
        starts = f", {program.restarts} starts" if program.restarts > 1 else ""
        return f"{steps}{starts}, {'margin loss' if first.loss == 'margin' else 'cross-entropy'}"
    if kind == "mixture":
        return f"on the mixture: {first.name}"
    words = {"autoattack": "AutoAttack", "8-bit": "rounding to 8 bits", "transfer": f"transfer from {other}"}
    return words.get(kind, first.name)


def _shares(work: Mapping[str, float]) -> dict[str, float]:
    total = sum(work.values()) or 1.0
    return {name: one / total for name, one in work.items()}


def _said(robust: float, n: int) -> str:
    return f", RA so far {100 * robust / n:.1f} % of {n}" if n else ""
