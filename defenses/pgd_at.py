"""PGD-AT: training on the worst image of the ball that PGD finds (Madry et al., ICLR 2018, arXiv 1706.06083, eq. 2.1).

    min_θ  E [ max_{‖d‖∞ ≤ eps} CE(f(x + d), y) ],   the inner maximum by `steps` steps of `step_size` from a random start

    d ↔ `x_adv - x`      k ↔ `steps`      alpha ↔ `step_size`

Kind: adversarial training.
Cost: 330 passes of 0.56 G.
Reported: CIFAR-10, no further data, L∞ 8/255: PreAct ResNet-18, best epoch clean 82.92 %, PGD-10 53.49 %, last epoch 84.93
    and 45.59 % (the logs of Rice, Wong and Kolter 2020); ResNet-18, PGD-10 52.73 %, AutoAttack 48.67 % (MAIR). Half of
    each batch adversarial, ResNet-18: clean 87.99 %, PGD-50 58.26 % at a radius that is not printed (Divided We Fall, arXiv
    2512.20821, Table 3).
Expect: digits with the recipe `tiny`, one CPU core, under a minute: robust accuracy hardly falls from PGD-10 to
    PGD-100. ResNet-18 on CIFAR-10, recipe `paper`: 11 passes a step, some hours on one GPU (a guess, not a run).
Differs: images are crafted with BatchNorm in eval mode; a cosine schedule in place of steps at epochs 100 and 150.
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
from bench.model import Normalized
from bench.registry import register
from bench.rng import Rng
from bench.threat import Linf
from bench.types import Images, Labels


@config
class Config:
    """`eps` and `step_size` in pixel units: the dataset's radius and a quarter of it by default.

    `half_batch` attacks the first half of each batch and leaves the other clean, as the DWF paper does.
    """

    eps: Radius | None = None
    step_size: Radius | None = None
    steps: AtLeastOne = 10
    half_batch: bool = False
    width: AtLeastOne = 64
    epochs: AtLeastOne = 200
    batch_size: AtLeastOne = 128
    lr: Rate = 0.1
    weight_decay: NotNegative = 5e-4


@register("pgd_at")
class PGDAT(Defense[Config]):
    """ResNet-18 trained on the images that PGD finds."""

    taxonomy = {"gating": "none", "routing": "none", "training": "adversarial", "activation": "whole"}
    recipes = {
        "tiny": Config(width=8, epochs=30, steps=7, lr=0.05),
        "fast": Config(epochs=30),
        "paper": Config(half_batch=True),
    }
    published_as = "ResNet-18 (PGD-AT)"

    def build(self, data: Dataset) -> nn.Module:
        """A ResNet-18 behind the dataset's normalisation."""
        net = resnet18(channels=data.shape[0], classes=len(data.classes), width=self.config.width)
        return Normalized(net, data.mean, data.std)

    def stages(self, data: Dataset) -> Sequence[Stage]:
        """One stage; the epoch with the best held-out accuracy under PGD-10 is kept."""
        c = self.config
        threat = Linf(c.eps or data.eps)

        def loss(model: nn.Module, x: Images, y: Labels, rng: Rng) -> Tensor:
            adversarial = len(x) // 2 if c.half_batch else len(x)
            with crafting(model):
                x_adv = pgd(
                    model,
                    x[:adversarial],
                    y[:adversarial],
                    threat,
                    rng=rng,
                    steps=c.steps,
                    step_size=c.step_size,
                )
            x = x.clone()
            x[:adversarial] = x_adv
            return F.cross_entropy(model(x), y)

        return [
            Stage(
                name="pgd-at",
                loss=loss,
                epochs=c.epochs,
                batch_size=c.batch_size,
                lr=c.lr,
                weight_decay=c.weight_decay,
                select="robust",
            )
        ]
