"""Do a model's gradients say how its logits change?

Nearly every attack follows gradients, and four things can be wrong with them: they point elsewhere, because a surrogate
takes the gradient's place; they hold for a step too small to be of use, because the surface is shattered; they are zero;
or cross-entropy is so flat where the model is sure of itself that float32 rounds its gradient away.

Derivatives are compared with central differences along random sign directions, in a float64 copy of the model where there
can be one; networks of ReLUs agree in 99 to 100 % of the signs. The points are the images pulled inwards a little, so that
no difference leaves the box: a model may clamp its input. A random model is asked under one seed each time, which makes a
function of it; where even that does not repeat its answers, differences mean nothing and are not taken.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from bench.arithmetic import exact_arithmetic
from bench.attacks.gradient import input_gradient
from bench.attacks.losses import LOSSES, cross_entropy, margin
from bench.audit.check import Check, Evidence, check, findings
from bench.errors import NonFinite, VoidRun
from bench.finding import Finding
from bench.judge import ask, seeded
from bench.rng import Rng
from bench.types import Images, Labels, Logits

#: a largest absolute derivative below this is no gradient
NOTHING = 1e-12
#: the share of images without a gradient above which gradient attacks alone tell nothing
TOO_MANY = 0.05
#: a gap between the two best logits above which cross-entropy and its gradient underflow in float32
SURE = 80.0
#: the steps of differences, in pixel units: one that a gradient must hold for, and one that would make it of use
STEP, LONGER = 1e-4, 1e-3
#: the least share of equal signs, and the largest median relative error, of derivatives against differences
SIGNS, ERROR = 0.9, 0.1
#: what two losses must differ by to be told apart, in units of the logits
RESOLVED = {torch.float64: 1e-12, torch.float32: 3e-6}


def gradient_checks(
    model: nn.Module,
    x: Images,
    y: Labels,
    *,
    black_box: bool = False,
    adaptive: bool = False,
    directions: int = 8,
) -> list[Finding]:
    """What speaks against following this model's gradients; none without images.

    Args:
        model: in eval mode, its parameters needing no gradient; a deterministic one is left as it was.
        x, y: a few images that it classifies correctly, and their labels.
        black_box: whether the run also has an attack without gradients.
        adaptive: whether there are attacks that do without this model's own gradient.
        directions: random directions for each image.
    """
    if not len(x):
        return []
    with exact_arithmetic():
        return findings(CHECKS, Subject(model, x, y, black_box, adaptive, directions))


def saturation(logits: Logits, y: Labels) -> tuple[float, float]:
    """Two shares of the images: the two best logits are more than 80 apart; float32 cross-entropy is exactly 0."""
    if not len(y):
        return 0.0, 0.0
    best = logits.topk(2, dim=1).values
    lost = cross_entropy(logits.float(), y) == 0
    return share(best[:, 0] - best[:, 1] > SURE), share(lost)


def share(holds: Tensor) -> float:
    """How often it holds, in [0,1]."""
    return float(holds.double().mean())


@dataclass(frozen=True)
class Agreement:
    """Derivatives against differences, over images and directions."""

    signs: float
    """share of equal signs"""
    error: float
    """median of |a - b| / max(|a|, |b|)"""
    step: float
    count: int
    """how many were large enough to be compared"""

    def __str__(self) -> str:
        return (
            f"over {self.step:g}, signs of derivatives and differences agree in {100 * self.signs:.1f} % "
            f"of {self.count} directions, median relative error {self.error:.2g}"
        )


@dataclass
class Subject:
    """A model and correctly classified images; what several checks ask is measured once.

    Args:
        model, x, y, black_box, adaptive, directions: as in `gradient_checks`.
    """

    model: nn.Module
    x: Images
    y: Labels
    black_box: bool = False
    adaptive: bool = False
    directions: int = 8

    @cached_property
    def logits(self) -> Logits:
        """What the model says to the images."""
        with torch.no_grad():
            return OneSeed(self.model)(self.x)  # type: ignore[no-any-return]

    @cached_property
    def repeats(self) -> bool:
        """Whether one seed makes a function of the model."""
        with torch.no_grad():
            again = OneSeed(self.model)(self.x)
        return bool((again - self.logits).abs().max() <= 1e-6 * self.logits.abs().max())

    @cached_property
    def exact(self) -> nn.Module | None:
        """A copy in float64, if there can be one."""
        try:
            copy = deepcopy(self.model).double()
            with torch.no_grad():
                logits = OneSeed(copy)(self.x.double())
        except Exception:
            # a stranger's model may refuse to be copied or to run in float64, in any way
            return None
        # what answers otherwise in float64 is another function, whose gradient says nothing of this one's
        same = (logits - self.logits).abs().max() <= 0.05 * self.logits.abs().max()
        return copy if logits.dtype == torch.float64 and same else None

    @cached_property
    def inside(self) -> Images:
        """The images pulled inwards, off the grid of stored pixels and at least 0.03 from the walls."""
        return 0.9 * self.x + 0.05 + 0.04 * (Rng("gradients", "inside").uniform(self.x) - 0.5)

    @cached_property
    def largest(self) -> dict[str, Tensor | VoidRun]:
        """The largest absolute derivative of each loss in the model's own precision, `(b,)`, or why there is none.

        The smaller one of those at the image and at the point inside: attacks start from either.
        """
        return {name: self._largest(self.model, name, (self.x, self.inside)) for name in LOSSES}

    def _largest(self, model: nn.Module, loss: str, points: tuple[Images, ...]) -> Tensor | VoidRun:
        try:
            gradients = [input_gradient(OneSeed(model), x, self.y, LOSSES[loss])[0] for x in points]
        except VoidRun as error:
            return error
        return torch.stack([gradient.abs().flatten(1).amax(1) for gradient in gradients]).amin(0)

    @cached_property
    def short(self) -> Agreement | None:
        """Derivatives against differences over 1e-4; over 1e-3 where there is no float64 copy."""
        return self._agreement(STEP if self.exact is not None else LONGER)

    @cached_property
    def long(self) -> Agreement | None:
        """The same over 1e-3, where there is a float64 copy."""
        return self._agreement(LONGER) if self.exact is not None else None

    @cached_property
    def jumps(self) -> bool:
        """Whether derivatives are right but do not last: over ten times the step the signs agree less, and too little."""
        if self.short is None or self.long is None or self.short.error > ERROR:
            return False
        lost = self.short.signs - self.long.signs
        return self.long.signs < SIGNS and (self.short.signs >= SIGNS or lost > 1 - SIGNS)

    def _agreement(self, step: float) -> Agreement | None:
        """Of the margin; None where there is nothing to compare."""
        if not self.repeats or isinstance(self.largest["margin"], VoidRun):
            return None
        exact = self.exact is not None
        model, x = OneSeed(self.exact or self.model), self.inside.double() if exact else self.inside
        gradient, logits = input_gradient(model, x, self.y, margin)
        derivatives, differences = [], []
        with torch.no_grad():
            for i in range(self.directions):
                direction = (Rng("gradients", "direction", i).uniform(x) - 0.5).sign()
                derivatives.append((gradient * direction).flatten(1).sum(1))
                ahead, behind = (margin(model(x + s * direction), self.y) for s in (step, -step))
                differences.append((ahead - behind) / (2 * step))
        a, b = torch.stack(derivatives), torch.stack(differences)
        larger = torch.maximum(a.abs(), b.abs())
        told = larger > RESOLVED[x.dtype] * logits.abs().amax(1) / step
        if not told.any():
            return None
        return Agreement(
            signs=share((a.sign() == b.sign())[told]),
            error=float(((a - b).abs() / larger)[told].median()),
            step=step,
            count=int(told.sum()),
        )


class OneSeed(nn.Module):
    """A model that is asked under one seed each time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, x: Images) -> Logits:
        """What it says; the global generator of torch is left as it was."""
        with seeded(("gradients",), 0, x.device):
            return ask(self.model, x.clone())


@check(
    "wrong-direction",
    rule="M12",
    severity="warns",
    threshold=SIGNS,
    advice="the gradient is a surrogate: attack what it stands for, and attack without gradients (Square)",
)
def wrong_direction(s: Subject, threshold: float) -> Evidence:
    """Derivatives agree with differences over 1e-4 in fewer than 90 % of the signs, or are off by over 10 % in the median."""
    if not s.repeats:
        return "not looked at, nor for shattered gradients: one seed does not repeat the answers", "informs"
    if s.short is None or s.jumps or (s.short.signs >= threshold and s.short.error <= ERROR):
        return None
    return (f"{s.short}; adaptive attacks do without", "informs") if s.adaptive else str(s.short)


@check(
    "shattered-gradient",
    rule="M12",
    severity="warns",
    threshold=SIGNS,
    advice="take the mean gradient over noise (EoT) and many restarts, and attack without gradients (Square)",
)
def shattered_gradient(s: Subject, threshold: float) -> Evidence:
    """Derivatives are right for a step of 1e-4, but over 1e-3 fewer than 90 % of the signs agree with differences."""
    return f"{s.long}; {s.short}" if s.jumps else None


@check(
    "zero-gradient",
    rule="M13",
    severity="warns",
    threshold=0.01,
    advice="gradient attacks stand still: attack the part before what is flat, and attack without gradients (Square)",
)
def zero_gradient(s: Subject, threshold: float) -> Evidence:
    """The input gradient of the margin is zero, or below 1e-12, for more than 1 % of the images."""
    found, of_ce = s.largest["margin"], s.largest["ce"]
    if isinstance(found, VoidRun):
        return None if isinstance(found, NonFinite) else (str(found), "blocks")
    zero = share(found < NOTHING)
    if zero <= threshold:
        return None
    evidence = f"the margin's input gradient is zero for {100 * zero:.1f} % of {len(found)} images"
    exactly = None if s.exact is None else s._largest(s.exact, "margin", (s.x.double(), s.inside.double()))
    if isinstance(exactly, Tensor):
        evidence += f", in float64 for {100 * share(exactly < NOTHING):.1f} %"
    if isinstance(of_ce, Tensor):
        evidence += f"; cross-entropy's for {100 * share(of_ce < NOTHING):.1f} %"
    return (evidence, "blocks") if zero > TOO_MANY and not s.black_box else evidence


@check(
    "non-finite",
    rule="M13",
    severity="blocks",
    advice="find the square root, division or logarithm at its singular point, and keep away from it",
)
def non_finite_gradient(s: Subject, threshold: float) -> Evidence:
    """An input gradient, or a logit on the way to it, is NaN or infinite."""
    for loss, found in s.largest.items():
        if isinstance(found, NonFinite):
            return f"{loss}: {found}"
    return None


@check(
    "saturated-loss",
    rule="M13",
    severity="warns",
    threshold=0.01,
    advice="believe attacks on the margin; cross-entropy needs the logits divided by a constant first",
)
def saturated_loss(s: Subject, threshold: float) -> Evidence:
    """The two best logits are more than 80 apart for more than 1 % of the images."""
    apart, lost = saturation(s.logits, s.y)
    if apart <= threshold:
        return None
    return (
        f"the two best logits are more than {SURE:g} apart for {100 * apart:.1f} % of {len(s.y)} images; "
        f"cross-entropy is exactly 0 for {100 * lost:.1f} %"
    )


CHECKS: tuple[Check[Subject], ...] = (
    wrong_direction,
    shattered_gradient,
    zero_gradient,
    non_finite_gradient,
    saturated_loss,
)
