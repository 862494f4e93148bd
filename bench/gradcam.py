"""Where the evidence for a class lies: Grad-CAM (Selvaraju et al., ICCV 2017, arXiv 1610.02391, equations 1 and 2).

wₖ = (1/hw) Σᵤᵥ ∂s/∂Aₖᵤᵥ        H = ReLU(Σₖ wₖ Aₖ)

A ↔ `activations`, a layer's feature maps      s ↔ `scores`, a class's logit      H ↔ the heatmap
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.errors import UsageError
from bench.model import evaluating
from bench.types import Images, Labels


class Explained(Protocol):
    """A mixture whose experts can be looked into; `e` experts, `k` classes."""

    def with_activations(self, x: Images) -> tuple[Tensor, Tensor]:
        """Every expert's feature maps `(b, e, c, h, w)`, and its logits `(b, e, k)` computed from them."""
        ...


def gradcam(activations: Tensor, scores: Tensor, *, differentiable: bool = False) -> Tensor:
    """Heatmaps `(…, h, w)` of at least 0, in float32 at least, from feature maps `(…, c, h, w)`.

    Args:
        activations: what the scores were computed from.
        scores: of the class in question, of any shape; an entry is explained in the maps that it depends on.
        differentiable: whether the heatmaps have gradients of their own; a loss on them then differentiates twice.
    """
    # a backward pass under autocast would choose other types than the forward pass did
    with torch.autocast(activations.device.type, enabled=False):
        (slopes,) = torch.autograd.grad(
            scores.sum(), activations, create_graph=differentiable, retain_graph=True
        )
        wide = torch.promote_types(activations.dtype, torch.float32)
        weights = slopes.to(wide).mean((-2, -1), keepdim=True)
        return F.relu((weights * activations.to(wide)).sum(-3))


def of_labels(logits: Tensor, y: Labels) -> Tensor:
    """Every expert's score for the label: logits `(b, e, k)` to `(b, e)`."""
    return logits.gather(2, y[:, None, None].expand(-1, logits.shape[1], 1)).squeeze(2)


def heatmaps(model: object, x: Images, y: Labels) -> Tensor:
    """Where each expert sees class `y`: `(b, e, h, w)` of at least 0, detached; the model's modes stay as they are.

    Raises:
        UsageError: the model does not show its activations.
    """
    if not (isinstance(model, torch.nn.Module) and hasattr(model, "with_activations")):
        raise UsageError(
            f"heatmaps need a model with a method `with_activations`, which {type(model).__name__} has not; draw those of immunity"
        )
    with evaluating(model), torch.enable_grad():
        activations, logits = cast(Explained, model).with_activations(x.detach().requires_grad_())
        return gradcam(activations, of_labels(logits, y)).detach()
