"""TRADES: clean accuracy, and answers that hardly change within the ball (Zhang et al., ICML 2019, arXiv 1901.08573).

Zhang, Yu, Jiao, Xing, El Ghaoui and Jordan. (code) below is their program at commit 6e8e11b.

    min_θ  E [ CE(f(x), y) + β · max_{‖x' - x‖∞ ≤ eps} KL(f(x) ‖ f(x')) ]

    β, 1/λ in the paper ↔ `beta`      x' ↔ `x_adv`, by `furthest`: PGD on the divergence, `steps` of `step_size`

Kind: adversarial training.
Cost: 360 passes of 0.56 G.
Reported: CIFAR-10, no further data, L∞: WRN-34-10 at 0.031 clean 84.92 %, PGD-20 56.43 %, AutoAttack 53.08 % (code,
    RobustBench); ResNet-18 at 8/255 PGD-10 53.47 %, AutoAttack 49.45 % (MAIR).
Expect: digits with the recipe `tiny`, one CPU core, about a minute; 12 passes a step with `steps=10`. ResNet-18 on
    CIFAR-10 at 8/255: clean 81 to 83 %, AutoAttack about 49 % (from what is reported, not from a run).
Differs: the dataset's radius, 8/255 in place of 0.031, in steps of a quarter of it, 0.0078 in place of 0.007; the start is
    clipped to the box; a cosine schedule in place of steps at epochs 75, 90 and 100, over the 76 epochs the authors train.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from baselines.resnet import resnet18
from bench.config import AtLeastOne, NotNegative, Radius, Rate, config
from bench.data import Dataset
from bench.defense import Defense, Stage
from bench.divergence import furthest, kl
from bench.model import Normalized
from bench.registry import register
from bench.rng import Rng
from bench.threat import Linf
from bench.types import Images, Labels


@config
class Config:
    """`eps` and `step_size` in pixel units: the dataset's radius and a quarter of it by default."""

    beta: NotNegative = 6.0
    eps: Radius | None = None
    step_size: Radius | None = None
    steps: AtLeastOne = 10
    width: AtLeastOne = 64
    epochs: AtLeastOne = 76
    batch_size: AtLeastOne = 128
    lr: Rate = 0.1
    weight_decay: NotNegative = 5e-4


@register("trades")
class TRADES(Defense[Config]):
    """TRADES: a ResNet-18 whose answers hardly change within the ball (ICML 2019)."""

    taxonomy = {"gating": "none", "routing": "none", "training": "adversarial", "activation": "whole"}
    recipes = {
        "tiny": Config(width=8, epochs=30, steps=4),
        "fast": Config(epochs=30),
        "paper": Config(weight_decay=2e-4),
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
            x_adv = furthest(model, x, threat, rng=rng, steps=c.steps, step_size=c.step_size)
            clean, attacked = model(x), model(x_adv)
            return F.cross_entropy(clean, y) + c.beta * kl(clean, attacked).mean()

        return [
            Stage(
                name="trades",
                loss=loss,
                epochs=c.epochs,
                batch_size=c.batch_size,
                lr=c.lr,
                weight_decay=c.weight_decay,
                select="robust",
            )
        ]
