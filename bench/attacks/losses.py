"""What an attack ascends: one number per image, larger where the model is more wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor
from torch.nn import functional as F

from bench.types import Labels, Logits

#: logits `(b, k)` and labels `(b,)` to losses `(b,)`
AttackLoss: TypeAlias = Callable[[Logits, Labels], Tensor]


def cross_entropy(logits: Logits, y: Labels) -> Tensor:
    """-log softmax of the true class, `(b,)`."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Logits, y: Labels) -> Tensor:
    """The best wrong logit less the true one, `(b,)`; positive exactly where the model errs.

    Unlike cross-entropy its gradient does not vanish where the model is confident (Carlini and Wagner 2017, f6).
    """
    true = logits.gather(1, y[:, None]).squeeze(1)
    wrong = logits.scatter(1, y[:, None], -float("inf")).amax(1)
    return wrong - true


LOSSES: dict[str, AttackLoss] = {"ce": cross_entropy, "margin": margin}
