"""MART: adversarial training that minds the images it gets wrong (Wang et al., ICLR 2020, openreview.net rklOg6EFwS).

Wang, Zou, Yi, Bailey, Ma and Gu. (code) below is their program at commit 2d83e17.

    min_θ  E [ BCE(p(x'), y) + β · KL(p(x) ‖ p(x')) · (1 - p_y(x)) ]
    BCE(p(x'), y) = -log p_y(x') - log(1 - max_{k≠y} p_k(x')),   x' by PGD on CE

    p ↔ softmax of the logits      β ↔ `beta`, λ in the paper      x' ↔ `x_adv`, by `steps` steps of `step_size`

Kind: adversarial training.
Cost: 360 passes of 0.56 G.
Reported: CIFAR-10, no further data, L∞ 8/255, ResNet-18: PGD-10 54.73 %, AutoAttack 47.51 % (MAIR). A gap of seven
    points between the two is usual for MART: quote AutoAttack.
Expect: digits with the recipe `tiny`, one CPU core, about a minute; 12 passes a step with `steps=10`.
Differs: the logarithms are computed from logits and need no small constants, which (code) adds inside them; the
    dataset's radius, 8/255 in place of 0.031, in steps of a quarter of it, 0.0078 in place of 0.007; the start is clipped
    to the box; a cosine schedule in place of steps at epochs 75, 90 and 100. `tiny` and `fast` have PGD-AT's learning rate
    and weight decay, so that they compare; `paper` has the authors'.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from baselines.resnet import resnet18
from bench.attacks.pgd import pgd
from bench.config import AtLeastOne, NotNegative, Radius, Rate, config
from bench.crafting import crafting
from bench.data import Dataset
from bench.defense import Defense, Stage
from bench.divergence import kl
from bench.model import Normalized
from bench.registry import register
from bench.rng import Rng
from bench.threat import Linf
from bench.types import Images, Labels, Logits


@config
class Config:
    """`eps`, `step_size` and `noise` in pixel units: the dataset's radius and a quarter of it by default.

    `noise` is the standard deviation of a start.
    """

    beta: NotNegative = 5.0
    eps: Radius | None = None
    step_size: Radius | None = None
    steps: AtLeastOne = 10
    noise: NotNegative = 0.001
    width: AtLeastOne = 64
    epochs: AtLeastOne = 120
    batch_size: AtLeastOne = 128
    lr: Rate = 0.1
    weight_decay: NotNegative = 5e-4


@register("mart")
class MART(Defense[Config]):
    """MART: a ResNet-18 trained with more weight on images it gets wrong (ICLR 2020)."""

    taxonomy = {"gating": "none", "routing": "none", "training": "adversarial", "activation": "whole"}
    recipes = {
        "tiny": Config(width=8, epochs=30, steps=4),
        "fast": Config(epochs=30),
        "paper": Config(lr=0.01, weight_decay=3.5e-3),
    }

    def build(self, data: Dataset) -> nn.Module:
        """A ResNet-18 behind the dataset's normalisation."""
        net = resnet18(channels=data.shape[0], classes=len(data.classes), width=self.config.width)
        return Normalized(net, data.mean, data.std)

    def stages(self, data: Dataset) -> Sequence[Stage]:
        """One stage; the epoch with the best held-out accuracy under PGD-10 is kept."""
        c = self.config
        threat = Linf(c.eps or data.eps)

        def loss(model: nn.Module, x: Images, y: Labels, rng: Rng) -> Tensor:
            start = x + c.noise * rng.at("start").normal(x)
            with crafting(model):
                x_adv = pgd(model, x, y, threat, rng=rng, steps=c.steps, step_size=c.step_size, start=start)
            clean, attacked = model(x), model(x_adv)
            wrong = 1 - clean.softmax(1).gather(1, y[:, None]).squeeze(1)
            of_images: Tensor = boosted_cross_entropy(attacked, y) + c.beta * kl(clean, attacked) * wrong
            return of_images.mean()

        return [
            Stage(
                name="mart",
                loss=loss,
                epochs=c.epochs,
                batch_size=c.batch_size,
                lr=c.lr,
                weight_decay=c.weight_decay,
                select="robust",
            )
        ]


def boosted_cross_entropy(logits: Logits, y: Labels) -> Tensor:
    """BCE, `(b,)`. With k the best wrong class, log(1 - p_k) is the logsumexp of the others less that of all."""
    best_wrong = logits.scatter(1, y[:, None], -float("inf")).argmax(1, keepdim=True)
    others = logits.scatter(1, best_wrong, -float("inf"))
    log_not_wrong = others.logsumexp(1) - logits.logsumexp(1)
    value: Tensor = F.cross_entropy(logits, y, reduction="none") - log_not_wrong
    return value
