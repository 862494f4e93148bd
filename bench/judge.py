"""The deployed model as judge: is a perturbation legal, and what does the model say to it?

Nothing an attack says of itself is used. What a model may do wrong, from a NaN to an exception, is named here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.arithmetic import arithmetic_of, exact_arithmetic
from bench.errors import BenchError, NonFinite, VoidRun
from bench.rng import Rng
from bench.threat import ThreatModel
from bench.types import Images, Model


@dataclass
class Cost:
    """What a program did: images times passes, and seconds."""

    gradients: int = 0
    forwards: int = 0
    seconds: float = 0.0


class Judge:
    """The deployed model in float32: is a perturbation legal, and what does the model say to it?

    `judge(x_adv, x, threat)` gives predictions `(b,)`; without a threat model the images are taken as they are. The model
    is given `at_once` images at a time, which on a CPU is quicker; one that draws random numbers, at its `seed`, all of them.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: int,
        cost: Cost,
        seed: tuple[int | str, ...] | None = None,
        at_once: int | None = None,
    ) -> None:
        self.model, self.classes, self.cost, self.seed = model, classes, cost, seed
        self.at_once = at_once if seed is None else None

    def __call__(self, x_adv: Images, x: Images, threat: ThreatModel | None) -> Tensor:
        """Predictions `(b,)`; raises as `logits` does."""
        return self.logits(x_adv, x, threat).argmax(1)

    def logits(self, x_adv: Images, x: Images, threat: ThreatModel | None) -> Tensor:
        """What the model says to legal images, `(b, k)`.

        Raises:
            VoidRun: an image outside ball or box, logits of the wrong form, an input changed in place.
            NonFinite: a logit is NaN or infinite.
        """
        if x_adv.shape != x.shape or x_adv.dtype != x.dtype:
            raise VoidRun(
                f"the attack returned {tuple(x_adv.shape)} {x_adv.dtype} for images {tuple(x.shape)} {x.dtype}",
                code="illegal-perturbation",
            )
        if threat is not None:
            legal = threat.contains(x_adv, x)
            if not legal.all():
                raise illegal(x_adv, x, threat, legal)
        given = x_adv.clone()
        self.cost.forwards += len(x_adv)
        # whatever gradients are taken in around it
        with exact_arithmetic(), torch.no_grad(), seeded(self.seed, self.cost.forwards, x.device):
            logits = _joined(
                [ask(self.model, some) for some in torch.split(given, self.at_once or len(given) or 1)]
            )
        if (
            not isinstance(logits, Tensor)
            or logits.shape != (len(x), self.classes)
            or not logits.is_floating_point()
        ):
            found = (
                f"{tuple(logits.shape)} {logits.dtype}"
                if isinstance(logits, Tensor)
                else f"a {type(logits).__name__}"
            )
            raise VoidRun(
                f"the model must return float logits {(len(x), self.classes)} for {self.classes} classes, but returned {found}",
                code="signature",
            )
        if not torch.equal(given, x_adv):
            raise VoidRun(
                "the model changed its input in place; it must leave the images as they are",
                code="mutates-input",
            )
        finite = logits.isfinite().all(1)
        if not finite.all():
            raise NonFinite("logits", (~finite).nonzero().flatten().tolist())
        return logits


def _joined(answers: list[Tensor]) -> Tensor:
    """The answers to parts of a batch as one; what is no tensor is left to be complained of."""
    if len(answers) == 1 or not all(isinstance(answer, Tensor) for answer in answers):
        return answers[0]
    return torch.cat(answers)


def illegal(x_adv: Images, x: Images, threat: ThreatModel, legal: Tensor) -> VoidRun:
    """What to say of images that are not allowed."""
    size = (x_adv - x)[~legal].flatten(1)
    size = size.abs().amax() if threat.norm == "Linf" else size.norm(dim=1).amax()
    low, high = float(x_adv[~legal].min()), float(x_adv[~legal].max())
    return VoidRun(
        f"a perturbation of {threat.norm} size {size:.6g} (pixels {low:.4g} to {high:.4g}) leaves the ball of "
        f"{threat.eps:.6g} or the box [0,1]",
        (~legal).nonzero().flatten().tolist(),
        code="illegal-perturbation",
    )


class Counted(nn.Module):
    """The model that gradients come from, counting the images passed through it."""

    def __init__(self, model: Model, cost: Cost, at_once: int | None = None) -> None:
        super().__init__()
        self.model, self.cost, self.at_once = model, cost, at_once
        self.eval()

    def forward(self, x: Images) -> Tensor:
        """What the model says."""
        # FAB and Square ask without wanting a gradient
        if torch.is_grad_enabled() and x.requires_grad:
            self.cost.gradients += len(x)
        else:
            self.cost.forwards += len(x)
        return ask(self.model, x)

    def arithmetic(self) -> AbstractContextManager[object]:
        """What its passes are multiplied in, the model's own."""
        return arithmetic_of(self.model)


def ask(model: Model, x: Images) -> Tensor:
    """What the model says.

    Raises:
        VoidRun: it raises something.
    """
    try:
        return model(x)
    except BenchError:
        raise
    except torch.OutOfMemoryError as error:
        raise VoidRun(
            f"out of memory with {len(x)} images at a time; choose a smaller --batch-size"
        ) from error
    except Exception as error:
        # a stranger's forward may raise anything; whatever it is, there is no number
        raise VoidRun(
            f"the model raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            code="model-crash",
        ) from error


@contextmanager
def seeded(address: tuple[int | str, ...] | None, call: int, device: torch.device) -> Iterator[None]:
    """The global generator at an address, put back afterwards; left alone without one."""
    if address is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(Rng(*address, call).seed())
        yield


@contextmanager
def before_any_attack() -> Iterator[None]:
    """Says that it is the model, as it was handed over, that cannot be evaluated."""
    try:
        yield
    except VoidRun as error:
        raise VoidRun(
            f"this model cannot be evaluated: {error} (first images, before any attack)", code=error.code
        ) from error
