"""FGSM-AT: training on one-step adversarial images, as in 2015 or from a random start (RS-FGSM, 2020).

Goodfellow, Shlens and Szegedy, ICLR 2015, arXiv 1412.6572, §6; Wong, Rice and Kolter, ICLR 2020, arXiv 2001.03994.

    min_θ  E [ a · CE(f(x), y) + (1 - a) · CE(f(x'), y) ]
    x' = Π(x + eps · sign ∇ₓ CE(f(x), y))                                               (`variant="classic"`)
    x' = Π(x₀ + alpha · sign ∇ CE(f(x₀), y)),   x₀ ~ x + U(-eps, eps)                   (`variant="rs"`)

    a ↔ `clean_weight`, 1/2 in 2015      eps ↔ `eps`      alpha ↔ `step_size`, 1.25 eps in 2020

Kind: adversarial training.
Cost: 60 passes of 0.56 G.
Reported: CIFAR-10, L∞ 8/255, RS-FGSM, PreAct ResNet-18: clean 83.34 %, PGD-50 with ten starts 46.06 %, AutoAttack 43.21 %
    (RobustBench). ResNet-18, half of each batch adversarial: clean 89.22 %, PGD-50 58.13 % at a radius that is not
    printed (Divided We Fall, arXiv 2512.20821, Table 3).
Expect: robust to FGSM; under PGD often nothing is left once training overfits to the single step (catastrophic
    overfitting). So each epoch's row in the history has the held-out accuracy under FGSM and under PGD-10, both at the radius
    that is trained at, and says `collapsed` where the second fell by more than 20 points within an epoch and the first is as far above it.
    Digits with the recipe `tiny`, one CPU core: under half a minute.
Differs: images are crafted with BatchNorm in eval mode; a cosine schedule in place of the cyclic one of 2020; a collapse
    does not stop the training, since the best epoch on held-out images is kept. `half_batch`, the way of 2025, leaves
    the second half of each batch clean in place of weighing two losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.resnet import resnet18
from bench.attacks.fgsm import fgsm
from bench.attacks.pgd import pgd
from bench.config import AtLeastOne, NotNegative, Radius, Rate, config
from bench.crafting import crafting
from bench.data import Dataset
from bench.defense import Defense, Stage
from bench.held_out import HeldOut, pgd10
from bench.model import Normalized
from bench.registry import register
from bench.rng import Rng
from bench.threat import Linf
from bench.types import Images, Labels

#: how far accuracy must fall to be called a collapse, as a share of the images
FALL = 0.2


@config
class Config:
    """`eps` and `step_size` in pixel units: the dataset's radius, and of `rs` 1.25 times that, by default.

    `half_batch` attacks the first half of each batch and leaves the other clean, as the DWF paper does; `width` of the
    ResNet-18's first stage.
    """

    variant: Literal["classic", "rs"] = "classic"
    eps: Radius | None = None
    step_size: Radius | None = None
    clean_weight: Annotated[NotNegative, Field(lt=1)] = 0.0
    half_batch: bool = False
    width: AtLeastOne = 64
    epochs: AtLeastOne = 200
    batch_size: AtLeastOne = 128
    lr: Rate = 0.1
    weight_decay: NotNegative = 5e-4


@register("fgsm_at")
class FGSMAT(Defense[Config]):
    """ResNet-18 trained on one-step adversarial images."""

    taxonomy = {"gating": "none", "routing": "none", "training": "adversarial", "activation": "whole"}
    recipes = {
        "tiny": Config(width=8, epochs=30),
        "fast": Config(epochs=30),
        "paper": Config(half_batch=True),
    }
    published_as = "ResNet-18 (FGSM-AT)"

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
            x_adv = x.clone()
            x_adv[:adversarial] = one_step(model, x[:adversarial], y[:adversarial], c, threat, rng)
            of_adversarial = F.cross_entropy(model(x_adv), y)
            if c.clean_weight == 0:
                return of_adversarial
            return c.clean_weight * F.cross_entropy(model(x), y) + (1 - c.clean_weight) * of_adversarial

        def observe(model: nn.Module, held: HeldOut, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
            under_fgsm = held.accuracy(model, lambda model, x, y, rng: fgsm(model, x, y, threat))
            # epochs are compared at the dataset's radius, but it is to the radius trained at that a network overfits
            under_pgd = held.accuracy(model, pgd10(threat.eps)) if c.eps else rows[-1]["held_out"]
            before = [row["held_out_pgd"] for row in rows[:-1]]
            return {
                "held_out_fgsm": under_fgsm,
                "held_out_pgd": under_pgd,
                "collapsed": collapsed([*before, under_pgd], under_fgsm),
            }

        return [
            Stage(
                name="fgsm-at",
                loss=loss,
                epochs=c.epochs,
                batch_size=c.batch_size,
                lr=c.lr,
                weight_decay=c.weight_decay,
                select="robust",
                observe=observe,
            )
        ]


def one_step(model: nn.Module, x: Images, y: Labels, c: Config, threat: Linf, rng: Rng) -> Images:
    """x', `(b, c, h, w)`."""
    step_size = c.step_size or threat.eps * (1.25 if c.variant == "rs" else 1)
    with crafting(model):
        return pgd(model, x, y, threat, rng=rng, steps=1, step_size=step_size, random_start=c.variant == "rs")


def collapsed(under_pgd: Sequence[float], under_fgsm: float) -> bool:
    """Whether the last epoch overfitted to the single step, from its accuracy under FGSM and those under PGD so far."""
    fell = max(under_pgd[-2:]) - under_pgd[-1]
    return fell > FALL and under_fgsm - under_pgd[-1] > FALL
