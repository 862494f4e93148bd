"""The Kullback-Leibler divergence between two answers, and the image of a ball where it is largest."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.attacks.pgd import pgd
from bench.crafting import crafting
from bench.rng import Rng
from bench.threat import ThreatModel
from bench.types import Images


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(softmax p ‖ softmax q) = Σ exp(log p) · (log p - log q), from logits `(…, k)` to `(…)`; both get gradients.

    It is computed from log-probabilities. With p · log p, a logit some 104 below the largest makes p exactly 0 in
    float32 and the gradient NaN.
    """
    return F.kl_div(F.log_softmax(q, -1), F.log_softmax(p, -1), reduction="none", log_target=True).sum(-1)


def furthest(
    model: nn.Module,
    x: Images,
    threat: ThreatModel,
    *,
    rng: Rng,
    steps: int,
    step_size: float | None = None,
    noise: float = 0.001,
) -> Images:
    """x' = argmax KL(f(x) ‖ f(x')) over the ball, `(b, c, h, w)`: the inner maximum of TRADES, by PGD with f in eval mode.

    At x itself the gradient is 0, so it begins at `x + noise · N(0,1)`; `noise` and `step_size` in pixel units.
    """
    with crafting(model):
        with torch.no_grad():
            clean = model(x)
        return pgd(
            model,
            x,
            clean,
            threat,
            rng=rng,
            loss=lambda logits, clean: kl(clean, logits),
            steps=steps,
            step_size=step_size,
            start=x + noise * rng.at("start").normal(x),
        )
