"""Training images that are not learnt from: what decides between epochs is measured on them, never on test images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bench.attacks.pgd import pgd
from bench.crafting import crafting
from bench.data import Split
from bench.model import evaluating
from bench.rng import Rng
from bench.threat import Linf
from bench.types import Images, Labels

#: the share of the training images that is held out, and the most there ever are
SHARE, MOST = 0.1, 1000
#: images that are checked at once
AT_ONCE = 250

#: `(model, x, y, rng) -> x_adv`; the model is in eval mode
Attack = Callable[[nn.Module, Images, Labels, Rng], Images]


def hold_out(split: Split, classes: Sequence[str]) -> tuple[Split, Split]:
    """The training images that are learnt from, and those held out: the same share of every class, whatever the seed."""
    share = min(SHARE, MOST / len(split))
    out = []
    for label in range(len(classes)):
        mine = np.flatnonzero(split.labels == label)
        order = Rng(0, "held-out", label).permutation(len(mine)).numpy()
        out.append(mine[order[: round(share * len(mine))]])
    held = np.sort(np.concatenate(out)) if out else np.empty(0, int)
    if len(held) == 0:
        return split, split
    return split.take(np.setdiff1d(np.arange(len(split)), held)), split.take(held)


def pgd10(eps: float) -> Attack:
    """PGD-10 of that radius, in pixel units: the attack that epochs are compared under."""
    return lambda model, x, y, rng: pgd(model, x, y, Linf(eps), rng=rng, steps=10)


@dataclass(frozen=True)
class HeldOut:
    """The images held out, and where they are looked at."""

    split: Split
    device: torch.device | str = "cpu"

    @property
    def labels(self) -> Labels:
        """Int64 `(n,)`."""
        return torch.from_numpy(self.split.labels)

    def right(self, model: nn.Module, attack: Attack | None = None) -> Tensor:
        """Which images the model answers rightly, bool `(n,)`: as they are, or as an attack changes them."""
        found = []
        with evaluating(model):
            for start in range(0, len(self.split), AT_ONCE):
                x, y = self.split.batch(slice(start, start + AT_ONCE), self.device)
                if attack is not None:
                    with crafting(model):
                        x = attack(model, x, y, Rng(0, "held-out", start))
                with torch.no_grad():
                    found.append(model(x).argmax(1) == y)
        return torch.cat(found).cpu()

    def accuracy(self, model: nn.Module, attack: Attack | None = None) -> float:
        """The share of them, in [0,1]."""
        return int(self.right(model, attack).sum()) / len(self.split)
