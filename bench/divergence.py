"""The Kullback-Leibler divergence between two softmax distributions, finite however far apart the logits are."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(softmax p ‖ softmax q) = Σ exp(log p) · (log p - log q), from logits `(…, k)` to `(…)`; both get gradients.

    It is computed from log-probabilities. With p · log p, a logit some 104 below the largest makes p exactly 0 in
    float32 and the gradient NaN.
    """
    return F.kl_div(F.log_softmax(q, -1), F.log_softmax(p, -1), reduction="none", log_target=True).sum(-1)
