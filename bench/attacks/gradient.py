"""The gradient of an attack's loss with respect to the images, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bench.attacks.losses import AttackLoss
from bench.errors import NonFinite, VoidRun
from bench.types import Images, Labels, Logits, Model


def input_gradient(
    model: Model, x: Images, y: Labels, loss: AttackLoss, eot: int = 1
) -> tuple[Tensor, Logits]:
    """The gradient at `x`, shaped like it, and the logits `(b, k)` found on the way.

    With `eot` > 1 both are means over that many passes (expectation over transformation, Athalye et al. 2018): the
    gradient of a random model's expected loss.

    Raises:
        NonFinite: a logit or a gradient is NaN or infinite.
        VoidRun: the model's output does not depend differentiably on its input.
    """
    gradient, mean_logits = torch.zeros_like(x), None
    for _ in range(eot):
        with torch.enable_grad():
            point = x.detach().requires_grad_(True)
            logits = model(point)
            total = loss(logits, y).sum()
        if not total.requires_grad:
            raise VoidRun(
                "the model's logits carry no gradient to its input (a no_grad or detach inside?); gradient attacks would see nothing"
            )
        (found,) = torch.autograd.grad(total, point, allow_unused=True)
        if found is None:
            raise VoidRun("the model's logits do not depend on its input")
        gradient += found / eot
        part = logits.detach() / eot
        mean_logits = part if mean_logits is None else mean_logits + part
    assert mean_logits is not None, f"eot must be at least 1, not {eot}"
    for what, values in (("logits", mean_logits), ("gradients", gradient)):
        finite = values.flatten(1).isfinite().all(1)
        if not finite.all():
            raise NonFinite(what, (~finite).nonzero().flatten().tolist())
    return gradient, mean_logits


@contextmanager
def naming(rows: Tensor) -> Iterator[None]:
    """Turns positions among `rows`, in what goes wrong inside, into positions of the batch that `rows` index."""
    try:
        yield
    except VoidRun as error:
        error.rows = [int(rows[row]) for row in error.rows if row < len(rows)]
        raise
