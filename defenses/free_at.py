"""Free-AT: each batch is replayed, and one backward pass moves weights and images alike (Shafahi et al., NeurIPS 2019).

Shafahi, Najibi, Ghiasi, Xu, Dickerson, Studer, Davis, Taylor and Goldstein, arXiv 1904.12843, Algorithm 1. (code) below is
their program at commit c42cac2.

    for each batch, m times:   g_θ, g_x = ∇ CE(f(x + d), y)
                               θ ← θ - lr · g_θ,   d ← Π(d + eps · sign g_x)

    m ↔ `replays`      d ↔ `memory["d"]`, handed on from batch to batch      eps ↔ `eps`, as a step too: `step_size`

Kind: adversarial training.
Cost: 80 passes of 0.56 G.
Reported: CIFAR-10, L∞ 8/255, WRN-32-10 with m = 8: clean 85.96 %, PGD-100 46.19 %; m = 4: 87.83 and 40.35 %; m = 10:
    83.94 and 45.79 % (code).
Expect: digits with the recipe `tiny`, one CPU core, about a minute: as many passes as PGD-AT's. One pass a replay: epochs
    are those of natural training divided by m.
Differs: d is kept inside the box too, image by image, as the PyTorch program of Wong et al. (2020) does; a cosine schedule,
    constant through a batch's replays, in place of steps at half and three quarters; ResNet-18 in place of WRN-32-10.
    The forward pass serves both gradients, so images are crafted with BatchNorm in train mode.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from baselines.resnet import resnet18
from bench.config import AtLeastOne, NotNegative, Radius, Rate, config
from bench.data import Dataset
from bench.defense import Defense, Stage, follow
from bench.model import Normalized
from bench.registry import register
from bench.rng import Rng
from bench.threat import Linf
from bench.types import Images, Labels


@config
class Config:
    """`eps` and `step_size` in pixel units: the dataset's radius, and that once more, by default.

    `epochs` count batches once, however often they are replayed.
    """

    replays: AtLeastOne = 8
    eps: Radius | None = None
    step_size: Radius | None = None
    width: AtLeastOne = 64
    epochs: AtLeastOne = 26
    batch_size: AtLeastOne = 128
    lr: Rate = 0.1
    weight_decay: NotNegative = 5e-4


@register("free_at")
class FreeAT(Defense[Config]):
    """Free-AT: a ResNet-18 trained on replayed batches, weights and images moved together (NeurIPS 2019)."""

    taxonomy = {"gating": "none", "routing": "none", "training": "adversarial", "activation": "whole"}
    recipes = {
        "tiny": Config(width=8, epochs=30, replays=5),
        "fast": Config(epochs=10, lr=0.04),
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
        memory = {"d": torch.zeros(c.batch_size, *data.shape)}

        def update(model: nn.Module, x: Images, y: Labels, rng: Rng, optimisers: Sequence[SGD]) -> Tensor:
            carried = memory["d"].to(x)
            # in a shorter batch the last images of d wait
            d = threat.project(x + carried[: len(x)], x) - x
            for _ in range(c.replays):
                x_adv = (x + d).requires_grad_()
                loss = F.cross_entropy(model(x_adv), y)
                follow(loss, optimisers)
                assert x_adv.grad is not None
                d = threat.project(x + d + (c.step_size or threat.eps) * x_adv.grad.sign(), x) - x
            memory["d"] = torch.cat([d, carried[len(x) :]])
            return loss.detach()

        return [
            Stage(
                name="free-at",
                update=update,
                epochs=c.epochs,
                batch_size=c.batch_size,
                lr=c.lr,
                weight_decay=c.weight_decay,
                select="robust",
                memory=memory,
            )
        ]
