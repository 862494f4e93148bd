"""PGD: projected gradient ascent from a random start (Madry et al., ICLR 2018, arXiv 1706.06083, §2.1).

    x₀ ~ U(ball),   xₜ = Π(xₜ₋₁ + step_size · sign ∇ₓ L(f(xₜ₋₁), y))

PGD-10, PGD-20 and PGD-100 with one start and one step size are one trajectory, read at its milestones. Where the network
is close to linear within the ball, the iterates soon go round among the same few images; these are then known for every
later step, and cost no further gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bench.attacks.gradient import finite, naming, refuse_nonfinite, unchecked_gradient, waits
from bench.attacks.losses import AttackLoss, cross_entropy
from bench.rng import Rng
from bench.threat import ThreatModel
from bench.types import Images, Labels, Model

#: output and labels to what is believed broken, bool `(b,)`
Belief = Callable[[Tensor, Labels], Tensor]
#: `(step, rows, images of those rows) -> which of them are broken`, bool
Witness = Callable[[int, Tensor, Images], Tensor]

#: the longest round of iterates that is recognised; rounds of one and of two are found as well
PERIOD = 4
#: after how many steps a GPU is waited for, to see which images are done
EVERY = 8


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
    rounds: bool = False,
    every: int | None = None,
) -> Iterator[tuple[int, Images]]:
    """`(step, images)` at each milestone in rising order; the images are the iterate after that many steps.

    Given a `witness`, it is shown each iterate that `model` already gets wrong, and the images it confirms as broken
    stay as they are and cost no further gradient. Which iterates it is shown follows from the logits that the gradient
    needs anyway; the iterate at a milestone it is not shown. `wrong` says what that is where `model` gives something other
    than logits.

    With `rounds`, an image whose iterate is the one of `PERIOD` steps before, bit for bit, costs no further gradient
    either: its iterates go round from there on. Only where the gradient is a function of the image alone is that so.

    Every so many steps (`every`: 1 on a CPU, else `EVERY`) and at milestones the images that are done leave the batch; in
    between nothing waits for the device. The witness is then shown the iterates since, step by step, so that what is found
    does not depend on how often that is.

    Raises:
        NonFinite: a logit or a gradient is NaN or infinite.
    """
    step_size = threat.eps / 4 if step_size is None else step_size
    every = every or (1 if x.device.type == "cpu" else EVERY)
    if start is not None:
        start = threat.project(start, x)
    else:
        start = threat.random_start(x, rng.at("start")) if random_start else x.clone()
    rows, labels = torch.arange(len(x), device=x.device), y
    own, project = x, threat.projection(x)
    # of images still under attack, and of those that are done: step t at place t modulo their number
    iterates = [start, *(torch.full_like(x, torch.nan) for _ in range((PERIOD if rounds else 2) - 1))]
    # the next iterate is written where the oldest was, once the two are compared
    spare = torch.empty_like(x)
    done: list[tuple[Tensor, list[Images]]] = []
    seen = _Seen(rows)
    for step in range(1, max(milestones, default=0) + 1):
        here, there = iterates[(step - 1) % len(iterates)], iterates[step % len(iterates)]
        if len(rows) > 0:
            with naming(rows):
                gradient, logits = unchecked_gradient(model, here, labels, loss, eot)
            seen.odd_logits |= ~finite(logits)
            seen.odd_gradients |= ~finite(gradient)
            if witness is not None:
                believed = logits.argmax(1) != labels if wrong is None else wrong(logits, labels)
                # an image that goes round shows nothing new
                seen.shown.append((step - 1, believed & ~seen.again, here if every == 1 else here.clone()))
            moved = project(torch.add(here, threat.ascent(gradient), alpha=step_size, out=spare))
            if rounds:
                seen.again |= _same(moved, there)
            iterates[step % len(iterates)], spare = moved, there
            if step % every == 0 or step in milestones:
                with naming(rows):
                    refuse_nonfinite(seen.odd_logits, seen.odd_gradients)
                fell = _confirmed(seen, rows, witness)
                caught = seen.again.cpu()
                for which, _ in fell:
                    caught[which] = False
                stay = ~caught
                for which, images in fell:
                    stay[which] = False
                    done.append((rows[which.to(rows.device)], [images]))
                if caught.any():
                    some = caught.nonzero().flatten().to(rows.device)
                    done.append((rows[some], [images[some] for images in iterates]))
                if not stay.all():
                    left = stay.nonzero().flatten().to(rows.device)
                    rows, own, labels = rows[left], own[left], labels[left]
                    project, iterates = threat.projection(own), [images[left] for images in iterates]
                    spare = torch.empty_like(own)
                seen = _Seen(rows)
        if step in milestones:
            x_adv = torch.empty_like(x)
            x_adv[rows] = iterates[step % len(iterates)]
            for which, turns in done:
                x_adv[which] = turns[step % len(turns)]
            yield step, x_adv


class _Seen:
    """What was seen of the images in the batch since it was last asked, none of which waits for the device.

    Of each step, the iterates before it and which of them were believed broken; whether an iterate came `again`; what was
    not finite.
    """

    def __init__(self, rows: Tensor) -> None:
        self.again, self.odd_logits, self.odd_gradients = torch.zeros(
            (3, len(rows)), dtype=torch.bool, device=rows.device
        )
        self.shown: list[tuple[int, Tensor, Images]] = []


def _confirmed(seen: _Seen, rows: Tensor, witness: Witness | None) -> list[tuple[Tensor, Images]]:
    """The images that are confirmed as broken: their places in the batch, on the CPU, and what broke them, step by step."""
    if witness is None or not seen.shown:
        return []
    # one wait for all steps
    beliefs = torch.stack([believed for _, believed, _ in seen.shown]).cpu()
    standing, fell = torch.ones(len(rows), dtype=torch.bool), []
    for (step, _, images), believed in zip(seen.shown, beliefs, strict=True):
        which = (believed & standing).nonzero().flatten()
        if len(which) > 0:
            there = which.to(rows.device)
            confirmed = witness(step, rows[there], images[there]).cpu()
            which = which[confirmed]
            standing[which] = False
            fell.append((which, images[which.to(rows.device)]))
    return fell


def _same(moved: Images, there: Images) -> Tensor:
    """Which images are the same, pixel by pixel, bool `(b,)`."""
    if waits(moved):
        return (moved == there).flatten(1).all(1)
    # one row of pixels tells most of them apart
    row = moved.shape[2] // 2
    same = (moved[:, :, row] == there[:, :, row]).flatten(1).all(1)
    likely = same.nonzero().flatten()
    if len(likely) > 0:
        same[likely] = (moved[likely] == there[likely]).flatten(1).all(1)
    return same
