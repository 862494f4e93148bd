"""The gradient of an attack's loss with respect to the images, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bench.arithmetic import arithmetic_of
from bench.attacks.losses import AttackLoss
from bench.errors import NonFinite, VoidRun
from bench.types import Images, Labels, Logits, Model


def input_gradient(
    model: Model, x: Images, y: Labels, loss: AttackLoss, eot: int = 1
) -> tuple[Tensor, Logits]:
    """The gradient at `x`, shaped like it, and the logits `(b, k)` found on the way.

    With `eot` > 1 both are means over that many passes (expectation over transformation, Athalye et al. 2018): the
    gradient of a random model's expected loss. A model with an attribute `at_once` is given that many images at a
    time, which bounds memory and changes nothing else, images being independent. One with a method `arithmetic` is passed
    forward and backward inside the context that it gives.

    Raises:
        NonFinite: a logit or a gradient is NaN or infinite.
        VoidRun: the model's output does not depend differentiably on its input.
    """
    gradient, logits = unchecked_gradient(model, x, y, loss, eot)
    refuse_nonfinite(~finite(logits), ~finite(gradient))
    return gradient, logits


def unchecked_gradient(
    model: Model, x: Images, y: Labels, loss: AttackLoss, eot: int = 1
) -> tuple[Tensor, Logits]:
    """As `input_gradient`, but without waiting for the device to see that all is finite."""
    assert eot >= 1, f"eot must be at least 1, not {eot}"
    at_once = getattr(model, "at_once", None) or len(x)
    with arithmetic_of(model):
        found = [
            _mean([_one_pass(model, some, labels, loss) for _ in range(eot)])
            for some, labels in zip(torch.split(x, at_once), torch.split(y, at_once), strict=True)
        ]
    if len(found) == 1:
        return found[0]
    return torch.cat([g for g, _ in found]), torch.cat([z for _, z in found])


def finite(values: Tensor) -> Tensor:
    """Which rows are without NaN and infinity, bool `(b,)`."""
    # NaN and infinity survive any sum; where there is nothing to wait for, a quick one clears nearly all
    if not waits(values):
        quick = values.flatten(1).sum(1).isfinite()
        if quick.all():
            return quick
    # finite float32 numbers cannot exceed a float64 together
    return values.flatten(1).sum(1, dtype=torch.float64).isfinite()


def waits(values: Tensor) -> bool:
    """Whether reading one of these numbers holds up a device that is still at work."""
    return values.device.type != "cpu"


def refuse_nonfinite(logits: Tensor, gradients: Tensor) -> None:
    """Raises if a row was marked, in either of these bool `(b,)`.

    Raises:
        NonFinite: a logit or a gradient is NaN or infinite.
    """
    for what, odd in (("logits", logits), ("gradients", gradients)):
        if odd.any():
            raise NonFinite(what, odd.nonzero().flatten().tolist())


def _one_pass(model: Model, x: Images, y: Labels, loss: AttackLoss) -> tuple[Tensor, Logits]:
    with torch.enable_grad():
        point = x.detach().requires_grad_(True)
        logits = model(point)
        total = loss(logits, y).sum()
    if not total.requires_grad:
        raise VoidRun(
            "the model's logits carry no gradient to its input (a no_grad or detach inside?); gradient attacks would see nothing",
            code="zero-gradient",
        )
    (gradient,) = torch.autograd.grad(total, point, allow_unused=True)
    if gradient is None:
        raise VoidRun("the model's logits do not depend on its input", code="zero-gradient")
    return gradient, logits.detach()


def _mean(passes: list[tuple[Tensor, Logits]]) -> tuple[Tensor, Logits]:
    if len(passes) == 1:
        return passes[0]
    return torch.stack([g for g, _ in passes]).mean(0), torch.stack([z for _, z in passes]).mean(0)


@contextmanager
def naming(rows: Tensor) -> Iterator[None]:
    """Turns positions among `rows`, in what goes wrong inside, into positions of the batch that `rows` index."""
    try:
        yield
    except VoidRun as error:
        error.rows = [int(rows[row]) for row in error.rows if row < len(rows)]
        raise
