"""AWP: adversarial training at the worst weights nearby (Wu, Xia and Wang, NeurIPS 2020, arXiv 2004.05884).

(code) below is their program at commit a7acf5d.

    min_w  max_v  L(w + v),   ‖vₗ‖ ≤ γ ‖wₗ‖ for every layer l,   L = E CE(f(x'), y)      or that of TRADES

by one step:   vₗ = γ ‖wₗ‖ gₗ / ‖gₗ‖,  g = ∇_w L(w);     w ← w - lr · ∇L(w + v)

    γ ↔ `gamma`      v ↔ `away`      L ↔ `base`: `pgd` (AT-AWP) or `trades` (TRADES-AWP)      β of TRADES ↔ `beta`

Kind: adversarial training.
Cost: 360 passes of 0.56 G.
Reported: CIFAR-10, no further data, L∞ 8/255: PreAct ResNet-18, AT-AWP, best epoch clean 81.18 %, PGD-20 55.39 %, last
    epoch 81.65 and 54.30 % (code's log); ResNet-18, AT-AWP PGD-10 55.52 %, AutoAttack 50.80 %, TRADES-AWP 55.91 and 51.62 %
    (MAIR).
Expect: PGD-AT's or TRADES's cost and one pass a step more (two with TRADES), a point or two of robust accuracy above
    them, and hardly any robust overfitting. Digits with the recipe `tiny`, one CPU core, about a minute.
Differs: v comes from the gradient itself, (code) takes it from a step of SGD on a copy of the network, which is the same
    direction; BatchNorm's statistics of that pass are thrown away in both. Images, radius and schedule as in `pgd_at` and
    `trades`; TRADES's warm-up without v, 10 of 200 epochs in (code), is a twentieth of whatever is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import SGD

from baselines.resnet import resnet18
from bench.attacks.pgd import pgd
from bench.config import AtLeastOne, NotNegative, Radius, Rate, Whole, config
from bench.crafting import crafting
from bench.data import Dataset
from bench.defense import Defense, Stage, follow
from bench.divergence import furthest, kl
from bench.held_out import HeldOut
from bench.model import Normalized
from bench.registry import register
from bench.rng import Rng
from bench.threat import Linf
from bench.types import Images, Labels, Model

#: what is minimised, as a function of the network
Objective = Callable[[Model], Tensor]


@config
class Config:
    """`eps` and `step_size` in pixel units: the dataset's radius and a quarter of it by default.

    `gamma` is 0.01 for `pgd` and 0.005 for `trades` by default; `warmup`, epochs without perturbed weights, is none for
    `pgd` and a twentieth of all for `trades`.
    """

    base: Literal["pgd", "trades"] = "pgd"
    gamma: NotNegative | None = None
    warmup: Whole | None = None
    beta: NotNegative = 6.0
    eps: Radius | None = None
    step_size: Radius | None = None
    steps: AtLeastOne = 10
    width: AtLeastOne = 64
    epochs: AtLeastOne = 200
    batch_size: AtLeastOne = 128
    lr: Rate = 0.1
    weight_decay: NotNegative = 5e-4


@register("awp")
class AWP(Defense[Config]):
    """AWP: a ResNet-18 trained adversarially at the worst weights nearby (NeurIPS 2020)."""

    taxonomy = {"gating": "none", "routing": "none", "training": "adversarial", "activation": "whole"}
    recipes = {
        "tiny": Config(width=8, epochs=30, steps=4),
        "fast": Config(epochs=30),
        "paper": Config(),
    }

    def build(self, data: Dataset) -> nn.Module:
        """A ResNet-18 behind the dataset's normalisation."""
        net = resnet18(channels=data.shape[0], classes=len(data.classes), width=self.config.width)
        return Normalized(net, data.mean, data.std)

    def stages(self, data: Dataset) -> Sequence[Stage]:
        """One stage; the epoch with the best held-out accuracy under PGD-10 is kept."""
        c = self.config
        threat = Linf(c.eps or data.eps)
        default_gamma, default_warmup = (0.01, 0) if c.base == "pgd" else (0.005, c.epochs // 20)
        gamma = default_gamma if c.gamma is None else c.gamma
        warmup = default_warmup if c.warmup is None else c.warmup
        memory = {"epochs": 0}

        def update(model: nn.Module, x: Images, y: Labels, rng: Rng, optimisers: Sequence[SGD]) -> Tensor:
            objective = against_pgd if c.base == "pgd" else against_furthest
            loss = objective(model, x, y, c, threat, rng)
            away = worst_weights(model, loss, gamma) if memory["epochs"] >= warmup else {}
            with torch.no_grad():
                for weight, v in away.items():
                    weight.add_(v)
            value = loss(model)
            follow(value, optimisers)
            with torch.no_grad():
                for weight, v in away.items():
                    weight.sub_(v)
            return value

        def count(model: nn.Module, held: HeldOut, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
            memory["epochs"] = rows[-1]["epoch"]
            return {}

        return [
            Stage(
                name=f"{c.base}-awp",
                update=update,
                epochs=c.epochs,
                batch_size=c.batch_size,
                lr=c.lr,
                weight_decay=c.weight_decay,
                select="robust",
                observe=count,
                memory=memory,
            )
        ]


def against_pgd(model: nn.Module, x: Images, y: Labels, c: Config, threat: Linf, rng: Rng) -> Objective:
    """PGD-AT's loss on images crafted at the weights as they are."""
    with crafting(model):
        x_adv = pgd(model, x, y, threat, rng=rng, steps=c.steps, step_size=c.step_size)
    return lambda f: F.cross_entropy(f(x_adv), y)


def against_furthest(model: nn.Module, x: Images, y: Labels, c: Config, threat: Linf, rng: Rng) -> Objective:
    """TRADES's loss on images crafted at the weights as they are."""
    x_adv = furthest(model, x, threat, rng=rng, steps=c.steps, step_size=c.step_size)

    def loss(f: Model) -> Tensor:
        clean, attacked = f(x), f(x_adv)
        return F.cross_entropy(clean, y) + c.beta * kl(clean, attacked).mean()

    return loss


def worst_weights(model: nn.Module, loss: Objective, gamma: float) -> dict[nn.Parameter, Tensor]:
    """vₗ for every weight of two dimensions or more; BatchNorm learns nothing from the pass it takes."""
    weights = [weight for weight in model.parameters() if weight.dim() > 1]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = torch.autograd.grad(loss(lambda x: functional_call(model, buffers, (x,))), weights)
    return {
        weight: gamma * weight.detach().norm() * g / g.norm().clamp_min(1e-20)
        for weight, g in zip(weights, gradients, strict=True)
    }
