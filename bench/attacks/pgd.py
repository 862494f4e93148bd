"""PGD: projected gradient ascent from a random start (Madry et al., ICLR 2018, arXiv 1706.06083, §2.1).

    x₀ ~ U(ball),   xₜ = Π(xₜ₋₁ + step_size · sign ∇ₓ L(f(xₜ₋₁), y))

PGD-10, PGD-20 and PGD-100 with one start and one step size are one trajectory, read at its milestones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bench.attacks.gradient import input_gradient, naming
from bench.attacks.losses import AttackLoss, cross_entropy
from bench.rng import Rng
from bench.threat import ThreatModel
from bench.types import Images, Labels, Model

#: output and labels to what is believed broken, bool `(b,)`
Belief = Callable[[Tensor, Labels], Tensor]
#: `(step, rows, images of those rows) -> which of them are broken`, bool
Witness = Callable[[int, Tensor, Images], Tensor]


def pgd(
    model: Model,
    x: Images,
    y: Labels,
    threat: ThreatModel,
    *,
    rng: Rng,
    loss: AttackLoss = cross_entropy,
    steps: int = 10,
    step_size: float | None = None,
    random_start: bool = True,
    start: Images | None = None,
    eot: int = 1,
) -> Images:
    """The last iterate, `(b, c, h, w)`; `step_size` in pixel units, a quarter of eps by default.

    `start` are images to begin at in place of a random start, once they are projected into the ball.

    Raises:
        NonFinite: a logit or a gradient is NaN or infinite.
    """
    found = trajectory(
        model,
        x,
        y,
        threat,
        rng=rng,
        loss=loss,
        milestones=[steps],
        step_size=step_size,
        random_start=random_start,
        start=start,
        eot=eot,
    )
    (x_adv,) = (images for _, images in found)
    return x_adv


def trajectory(
    model: Model,
    x: Images,
    y: Labels,
    threat: ThreatModel,
    *,
    rng: Rng,
    milestones: Sequence[int],
    loss: AttackLoss = cross_entropy,
    step_size: float | None = None,
    random_start: bool = True,
    start: Images | None = None,
    eot: int = 1,
    witness: Witness | None = None,
    wrong: Belief | None = None,
) -> Iterator[tuple[int, Images]]:
    """`(step, images)` at each milestone in rising order; the images are the iterate after that many steps.

    Given a `witness`, it is shown each iterate that `model` already gets wrong, and the images it confirms as broken
    stay as they are and cost no further gradient. Which iterates it is shown follows from the logits that the gradient
    needs anyway; the iterate at a milestone it is not shown. `wrong` says what that is where `model` gives something other
    than logits.
    """
    step_size = threat.eps / 4 if step_size is None else step_size
    if start is not None:
        x_adv = threat.project(start, x)
    else:
        x_adv = threat.random_start(x, rng.at("start")) if random_start else x.clone()
    rows = torch.arange(len(x), device=x.device)
    for step in range(1, max(milestones, default=0) + 1):
        if len(rows) > 0:
            here = x_adv[rows]
            with naming(rows):
                gradient, logits = input_gradient(model, here, y[rows], loss, eot)
            if witness is not None:
                believed = logits.argmax(1) != y[rows] if wrong is None else wrong(logits, y[rows])
                broken = torch.zeros_like(believed)
                if believed.any():
                    broken[believed] = witness(step - 1, rows[believed], here[believed])
                rows, here, gradient = rows[~broken], here[~broken], gradient[~broken]
            x_adv[rows] = threat.project(here + step_size * threat.ascent(gradient), x[rows])
        if step in milestones:
            yield step, x_adv.clone()
