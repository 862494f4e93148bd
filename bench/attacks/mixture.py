"""Adaptive attacks on mixtures of experts, written once against `bench.moe.RoutedModel`.

A hard gate has no gradient: end-to-end PGD follows the expert that happens to be chosen and never learns that another
one, reached by flipping the gate, is wrong. Each attack here replaces what PGD ascends by something that knows:

| name          | ascends                                                                        | against |
|---------------|--------------------------------------------------------------------------------|---------|
| `frozen-gate` | the output with the gate held constant at each step (the exact gradient almost everywhere) | hard, soft |
| `soft-gate`   | log Σₖ softmax(s/τ)ₖ softmax(fₖ), τ a multiple of the gap between the two best scores (BPDA) | hard |
| `per-route`   | first the gate's margin for expert k, then fₖ's error and that margin together; every k | hard |
| `all-experts` | the error of all experts at once: when all are wrong the gate does not matter  | hard, soft |
| `sticky`      | the error of the expert chosen at the start, whatever is chosen later          | hard |
| `per-expert`  | each expert's error alone, the gate ignored                                    | hard, soft |
| `legacy`      | the authors' own loss, where the defense names one, for comparison             | those   |

Success counts under the deployed model alone. `per-expert` also tells, expert by expert, whether it survives its own
attack: the images on which all do bound the robust accuracy from below, since a mixture errs only where an expert does.

The temperature and the weight of the gate's margin are scaled by each image's own gap, not by the batch's: what
happens to an image must not depend on the batch it sits in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.attacks.losses import AttackLoss, cross_entropy, margin
from bench.moe import RoutedModel, output_of
from bench.types import Images, Labels, Model

#: multiples of an image's gap that serve as temperature
TEMPERATURES = (0.3, 1.0, 3.0)
#: weights of the gate's margin, in units of an image's gap
GATE_WEIGHTS = (0.1, 1.0, 10.0)
#: the gate's margin that is enough, in units of an image's gap
ENOUGH = 0.1


@dataclass(frozen=True)
class Aim:
    """What a trajectory ascends, and when it may have succeeded.

    Args:
        output: images to `(b, m)`: whatever `loss` and `wrong` need.
        loss: that and labels to `(b,)`.
        wrong: that and labels to whether the deployed model seems to err, bool `(b,)`.
        share: of the steps that this aim is given.
    """

    output: Model
    loss: AttackLoss
    wrong: Callable[[Tensor, Labels], Tensor]
    share: float = 1.0


@dataclass(frozen=True)
class Run:
    """One start of an attack: aims pursued one after another, on the images for which `serves` holds."""

    name: str
    aims: tuple[Aim, ...]
    serves: Callable[[Images], Tensor] | None = None
    """images to bool `(b,)`; all of them by default"""
    expert: int | None = None
    """the expert that the run is against, where it is against one alone"""


def runs(name: str, model: RoutedModel) -> list[Run]:
    """The runs of the attack of that name; none where it does not apply to this kind of mixture."""
    experts = range(model.experts_count)
    if name == "frozen-gate":
        losses: dict[str, AttackLoss] = {"ce": cross_entropy, "margin": margin}
        return [Run(loss, (frozen_gate(model, how),)) for loss, how in losses.items()]
    if name == "all-experts":
        return [Run(how, (all_experts(model, how),)) for how in ("sum", "least")]
    if name == "per-expert":
        return [Run(f"expert{k}", (one_expert(model, k),), expert=k) for k in experts]
    if name == "legacy":
        legacy = getattr(model, "legacy_aims", None)
        return [Run(label, (aim,)) for label, aim in legacy().items()] if legacy else []
    if model.soft:
        return []
    if name == "soft-gate":
        return [Run(f"tau{c:g}", (soft_gate(model, c),)) for c in TEMPERATURES]
    if name == "per-route":
        return [
            Run(f"route{k}-weight{weight:g}", (flip(model, k), joint(model, k, weight)))
            for k in experts
            for weight in GATE_WEIGHTS
        ]
    if name == "sticky":
        return [Run(f"expert{k}", (one_expert(model, k),), serves=_chosen(model, k)) for k in experts]
    raise AssertionError(f"no attack on mixtures named {name!r}")


def frozen_gate(model: RoutedModel, loss: AttackLoss) -> Aim:
    """The gate's weights taken as constants at each step."""

    def output(x: Images) -> Tensor:
        with torch.no_grad():
            weights = deployed_weights(model, x)
        return mixed(model, weights, model.all_outputs(x))

    return Aim(output, loss, _errs)


def soft_gate(model: RoutedModel, c: float) -> Aim:
    """Backward through a soft gate of temperature `c` times the gap, forward through the hard one."""

    def output(x: Images) -> Tensor:
        scores, outputs = model.gate(x), model.all_outputs(x)
        weights = F.log_softmax(scores / (c * gap(scores))[:, None], 1)
        mixed = torch.logsumexp(weights[:, :, None] + F.log_softmax(outputs, 2), 1)
        return torch.cat([mixed, _hard(model, x, outputs).detach()], 1)

    def loss(found: Tensor, y: Labels) -> Tensor:
        return F.nll_loss(found[:, : found.shape[1] // 2], y, reduction="none")

    return Aim(output, loss, lambda found, y: _errs(found[:, found.shape[1] // 2 :], y))


def flip(model: RoutedModel, k: int) -> Aim:
    """The gate's margin for expert `k`, until it is chosen: where the attack on that route starts from."""
    return Aim(
        lambda x: gate_margin(model.gate(x), k)[:, None],
        lambda found, y: found[:, 0],
        lambda found, y: torch.zeros(len(y), dtype=torch.bool, device=y.device),
        share=0.25,
    )


def joint(model: RoutedModel, k: int, weight: float) -> Aim:
    """Expert `k` wrong, and chosen: its error, less what its gate margin lacks."""

    def output(x: Images) -> Tensor:
        scores = model.gate(x)
        return torch.cat([output_of(model, x, k), (gate_margin(scores, k) / gap(scores))[:, None]], 1)

    def loss(found: Tensor, y: Labels) -> Tensor:
        return margin(found[:, :-1], y) - weight * F.relu(ENOUGH - found[:, -1])

    return Aim(output, loss, lambda found, y: _errs(found[:, :-1], y) & (found[:, -1] >= 0))


def all_experts(model: RoutedModel, how: str) -> Aim:
    """Every expert wrong: the sum of their margins, or the least of them."""

    def output(x: Images) -> Tensor:
        outputs = model.all_outputs(x)
        with torch.no_grad():
            deployed = mixed(model, deployed_weights(model, x), outputs)
        return torch.cat([outputs.flatten(1), deployed], 1)

    def loss(found: Tensor, y: Labels) -> Tensor:
        k = found.shape[1] // (model.experts_count + 1)
        outputs = found[:, :-k].reshape(-1, k)
        margins = margin(outputs, y.repeat_interleave(model.experts_count)).view(len(y), -1)
        return margins.sum(1) if how == "sum" else margins.amin(1)

    def wrong(found: Tensor, y: Labels) -> Tensor:
        return _errs(found[:, -(found.shape[1] // (model.experts_count + 1)) :], y)

    return Aim(output, loss, wrong)


def one_expert(model: RoutedModel, k: int) -> Aim:
    """Expert `k` wrong, whoever is chosen."""
    return Aim(lambda x: output_of(model, x, k), margin, _errs)


def deployed_weights(model: RoutedModel, x: Images) -> Tensor:
    """What the experts weigh in the deployed output, `(b, e)`: the softmax of the scores, or one for the chosen."""
    if model.soft:
        return model.gate(x).softmax(1)
    return F.one_hot(model.selected(x), model.experts_count).to(x.dtype)


def mixed(model: RoutedModel, weights: Tensor, outputs: Tensor) -> Tensor:
    """What a mixture makes of its experts' logits `(b, e, k)` under these weights `(b, e)`: `(b, k)`."""
    if model.soft and getattr(model, "mixes_probabilities", False):
        return torch.logsumexp(weights.clamp_min(1e-30).log()[:, :, None] + outputs.log_softmax(2), 1)
    return torch.einsum("be,bek->bk", weights, outputs)


def gate_margin(scores: Tensor, k: int) -> Tensor:
    """Expert `k`'s score less the best other one, `(b,)`."""
    others = scores.clone()
    others[:, k] = -float("inf")
    return scores[:, k] - others.amax(1)


def gap(scores: Tensor) -> Tensor:
    """The two best scores' distance, `(b,)`, a constant; never so small that dividing by it overflows."""
    best = scores.detach().topk(2, dim=1).values
    return (best[:, 0] - best[:, 1]).clamp_min(1e-4 * scores.detach().abs().amax(1).clamp_min(1e-6))


def _hard(model: RoutedModel, x: Images, outputs: Tensor) -> Tensor:
    return outputs[torch.arange(len(x), device=x.device), model.selected(x)]


def _chosen(model: RoutedModel, k: int) -> Callable[[Images], Tensor]:
    def serves(x: Images) -> Tensor:
        with torch.no_grad():
            return model.selected(x) == k

    return serves


def _errs(logits: Tensor, y: Labels) -> Tensor:
    return logits.argmax(1) != y
