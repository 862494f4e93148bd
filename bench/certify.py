"""What can be proved of a mixture without attacking it: radii in L∞, in pixel units, the box left out of account.

**Soft routing.** F(x) = Σᵢ aᵢ(x) pᵢ(x), the experts' probabilities weighed by the gate. Let m(x) be F's probability of a
class less its largest other one, rᵢ a Lipschitz constant of aᵢ, and Lᵢ one of pᵢ(class) - pᵢ(other). A change d turns

    m(x + d) - m(x) = Σᵢ (aᵢ(x + d) - aᵢ(x)) mᵢ(x + d) + Σᵢ aᵢ(x) (mᵢ(x + d) - mᵢ(x)),     |mᵢ| ≤ 1
    |m(x + d) - m(x)| ≤ D ‖d‖∞     with D = Σᵢ rᵢ + aᵢ(x) Lᵢ
    radius = m(x) / D

**Two models**, (1-α) F_S + α F_R on probabilities, nothing known of F_S but that its outputs lie in [0,1]:

    radius = (α m_R(x) - (1-α)) / (α D_R)      where that is positive; for α ≤ 1/2 it never is

**Hard routing** answers with one expert and jumps where the route turns: there are no constants rᵢ, and no radius of this
kind. How far off the turn is can be told exactly where the gate is linear, with W its rows in pixel units:

    ρ(x) = min over j ≠ i of (sᵢ - sⱼ) / ‖Wᵢ - Wⱼ‖₁,     i the route; reached at x - ρ · sign(Wᵢ - Wⱼ)

The first two are our own re-derivation of what arXiv 2502.06832 states as Theorems 5.4 and 5.5, whose text was not
readable to us. A network's Lipschitz constant is bounded by the product of its layers', which is far too much: such radii
are a diagnostic and say nothing against a model whose radius is small.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.errors import UsageError
from bench.finding import Finding
from bench.types import Images

#: what a certificate without a radius is called in tables
NOT_APPLICABLE = "NOT APPLICABLE"
#: how far a gate may be from affine, relative to its largest score
AFFINE = 1e-3


@dataclass(frozen=True)
class Certificate:
    """A proof, or why there is none."""

    radius: Tensor | None
    """`(b,)`, within which the model's answer cannot change; None where nothing can be said of this kind of model"""
    about: str
    """what it rests on; begins with `NOT APPLICABLE` where there is no radius"""

    @classmethod
    def none(cls, why: str) -> Certificate:
        """No certificate, and why."""
        return cls(None, f"{NOT_APPLICABLE}: {why}")


def soft_radius(margins: Tensor, weights: Tensor, gate: Tensor, experts: Tensor) -> Tensor:
    """m(x) / D, `(b,)`; 0 where m(x) is not positive.

    Args:
        margins: m(x), `(b,)`.
        weights: aᵢ(x), `(b, e)`.
        gate: rᵢ, `(e,)`.
        experts: Lᵢ, `(e,)`.
    """
    return dual_radius(margins, weights, gate, experts, alpha=1.0)


def dual_radius(margins: Tensor, weights: Tensor, gate: Tensor, experts: Tensor, alpha: float) -> Tensor:
    """(α m_R(x) - (1-α)) / (α D_R), `(b,)`; 0 where that is not positive, as it is everywhere for α ≤ 1/2.

    Args:
        margins: m_R(x), of the robust model alone, `(b,)`.
        weights: its gate's aᵢ(x), `(b, e)`.
        gate: its rᵢ, `(e,)`.
        experts: its Lᵢ, `(e,)`.
        alpha: the robust model's share, in [0,1].
    """
    if alpha <= 0.5:
        return torch.zeros_like(margins)
    slope = gate.sum() + weights @ experts
    return (alpha * margins - (1 - alpha)).clamp_min(0) / (alpha * slope)


def gate_slopes(rows: Tensor) -> Tensor:
    """rᵢ of the softmax of a linear gate with rows `(e, d)`: a quarter of the largest ‖Wᵢ - Wⱼ‖₁, `(e,)`.

    The gradient of aᵢ is aᵢ Σⱼ aⱼ (Wᵢ - Wⱼ), whose length is at most aᵢ (1 - aᵢ) times the largest of them.
    """
    return _distances(rows).amax(1) / 4


def route_radius(rows: Tensor, scores: Tensor) -> Tensor:
    """ρ(x), `(b,)`: how far the nearest change of the route is; exact where the box does not bind.

    Args:
        rows: W in pixel units, `(e, d)`.
        scores: of a linear gate, `(b, e)`.
    """
    lead, chosen = scores.max(1)
    gaps = lead[:, None] - scores
    distances = _distances(rows)[chosen]
    # two experts with the same row are told apart by their bias alone, which no image changes
    radii = torch.where(distances > 0, gaps / distances, float("inf"))
    return radii.scatter(1, chosen[:, None], float("inf")).amin(1)


def pixel_rows(gate: Callable[[Images], Tensor], x: Images) -> Tensor:
    """W in pixel units, `(e, c·h·w)`, of a gate that is linear in the pixels, whatever it does to them before.

    Args:
        gate: images to scores `(b, e)`.
        x: two or more images to take it at, and to check it on.

    Raises:
        UsageError: the gate is not linear.
    """
    with torch.enable_grad():
        point = x[:1].detach().clone().requires_grad_(True)
        scores = gate(point)[0]
        rows = torch.stack(
            [torch.autograd.grad(score, point, retain_graph=True)[0].flatten() for score in scores]
        )
    with torch.no_grad():
        found = gate(x)
        expected = scores + (x - x[:1]).flatten(1) @ rows.T
    if (found - expected).abs().max() > AFFINE * found.abs().max().clamp_min(1e-12):
        raise UsageError(
            "the route's radius is known of a linear gate alone, and this one's scores are not linear in the pixels"
        )
    return rows


def layer_slope(layer: nn.Module) -> float:
    """The Lipschitz constant from L∞ to L∞ of a convolution, a linear layer or a BatchNorm in eval mode.

    The largest sum of absolute weights that meet in one output: exact for zero padding and images larger than the
    kernel.

    Raises:
        UsageError: the layer is something else.
    """
    if isinstance(layer, nn.BatchNorm2d) and layer.running_var is not None:
        return float((layer.weight.detach().abs() / (layer.running_var + layer.eps).sqrt()).max())
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        raise UsageError(
            f"no Lipschitz constant is known of a {type(layer).__name__}; convolutions, linear layers and BatchNorm have one"
        )
    return float(weight.detach().flatten(1).abs().sum(1).max())


def margin(probabilities: Tensor) -> Tensor:
    """The largest probability less the second largest, `(b, k)` to `(b,)`."""
    best = probabilities.topk(2, dim=1).values
    return best[:, 0] - best[:, 1]


def told(model: nn.Module, x: Images) -> list[Finding]:
    """What a model's own certificate says of these images, and how near its route turns: notes, none of a model without one.

    Args:
        model: in eval mode; `certificate` and `gate` are asked for.
        x: two or more images.
    """
    certificate = getattr(model, "certificate", None)
    if certificate is None:
        return []
    found = certificate(x)
    said = found.about if found.radius is None else f"{_spread(found.radius)} certified; {found.about}"
    # a model of two mixtures has a gate over pairs of experts, which is linear in no image
    with suppress(UsageError):
        with torch.no_grad():
            scores = model.gate(x)  # type: ignore[operator]
        radii = route_radius(pixel_rows(model.gate, x), scores)  # type: ignore[arg-type]
        said += f"; the route of a linear router turns at {_spread(radii)}"
    advice = "a radius is a proof, and where there is none, attacks are all there is"
    return [Finding(code="certificate", severity="informs", evidence=said, advice=advice)]


def _spread(radii: Tensor) -> str:
    return f"{float(radii.median()):.2g} (median of {len(radii)} images; {float(radii.min()):.2g} to {float(radii.max()):.2g})"


def _distances(rows: Tensor) -> Tensor:
    """‖Wᵢ - Wⱼ‖₁, `(e, e)`."""
    return torch.cdist(rows, rows, p=1)
