"""FGSM: one step to the edge of the ball (Goodfellow, Shlens and Szegedy, ICLR 2015, arXiv 1412.6572, §4).

    x_adv = Π(x + eps · sign ∇ₓ L(f(x), y))

The gradient is taken at `x` and does not depend on eps, so a sweep over radii is one gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.attacks.gradient import input_gradient
from bench.attacks.losses import AttackLoss, cross_entropy
from bench.rng import Rng
from bench.threat import ThreatModel
from bench.types import Images, Labels, Model


def fgsm(
    model: Model,
    x: Images,
    y: Labels,
    threat: ThreatModel,
    *,
    rng: Rng | None = None,
    loss: AttackLoss = cross_entropy,
    eot: int = 1,
) -> Images:
    """Adversarial images `(b, c, h, w)`; draws nothing, so `rng` may be left out."""
    ((_, x_adv),) = sweep(model, x, y, [threat], loss=loss, eot=eot)
    return x_adv


def sweep(
    model: Model,
    x: Images,
    y: Labels,
    threats: Sequence[ThreatModel],
    *,
    loss: AttackLoss = cross_entropy,
    eot: int = 1,
) -> Iterator[tuple[ThreatModel, Images]]:
    """`(threat, images)` for each threat model, all from one gradient."""
    gradient, _ = input_gradient(model, x, y, loss, eot)
    for threat in threats:
        yield threat, threat.project(x + threat.eps * threat.ascent(gradient), x)
