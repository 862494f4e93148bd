"""FGSM-AT: training on one-step adversarial images (Goodfellow, Shlens and Szegedy, ICLR 2015, arXiv 1412.6572, §6).

    min_θ  E [ a · CE(f(x), y) + (1 - a) · CE(f(x + eps · sign ∇ₓ CE(f(x), y)), y) ]

    a ↔ the clean share: 0, or 1/2 with `half_batch`      eps ↔ `eps`

Reported: ResNet-18, CIFAR-10, half of each batch adversarial: clean 89.22 %, PGD-50 58.13 % at a radius that is not
    printed (Divided We Fall, arXiv 2512.20821, Table 3).
Expect: robust to FGSM; under PGD often nothing is left once training overfits to the single step.
Differs: images are crafted with BatchNorm in eval mode; the paper of 2015 weighs the two halves within one loss, the
    half batch of 2025 splits the images.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from baselines.resnet import resnet18
from bench.attacks.fgsm import fgsm
from bench.config import AtLeastOne, NotNegative, Radius, Rate, config
from bench.data import Dataset
from bench.defense import Defense, Stage
from bench.model import Normalized, evaluating
from bench.registry import register
from bench.rng import Rng
from bench.threat import Linf
from bench.types import Images, Labels


@config
class Config:
    """`eps` in pixel units, the dataset's own radius by default; `width` of the ResNet-18's first stage."""

    eps: Radius | None = None
    half_batch: bool = True
    width: AtLeastOne = 64
    epochs: AtLeastOne = 200
    batch_size: AtLeastOne = 128
    lr: Rate = 0.1
    weight_decay: NotNegative = 5e-4


@register("fgsm_at")
class FGSMAT(Defense[Config]):
    """ResNet-18 trained on one-step adversarial images."""

    recipes = {
        "tiny": Config(width=8, epochs=30),
        "fast": Config(epochs=30),
        "paper": Config(),
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
            with evaluating(model):
                x_adv = fgsm(model, x[:adversarial], y[:adversarial], threat)
            x = x.clone()
            x[:adversarial] = x_adv
            return F.cross_entropy(model(x), y)

        return [
            Stage(
                name="fgsm-at",
                loss=loss,
                epochs=c.epochs,
                batch_size=c.batch_size,
                lr=c.lr,
                weight_decay=c.weight_decay,
                select="robust",
            )
        ]
