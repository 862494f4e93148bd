"""MoRE, Mixture of Robust Experts: experts for different perturbations, frozen behind a trained gate (arXiv 2104.10586).

Only the abstract was readable to us; what is marked (code) follows the authors' program at commit f489497.

    f(x) = Σᵢ wᵢ(x) fᵢ(x)   over expert logits,   w(x) = softmax(g(x))                                     (code)

Stage 1 trains the experts apart, one on clean images and one on what PGD finds in each L2 and each L∞ ball. Stage 2
freezes them but for their last linear layers, and trains these and the gate, a whole ResNet-18, on clean images and on
what PGD finds against the whole mixture in each of those balls:

    min over g and the heads   Σ_t v_t CE(f(x_t), y) / Σ_t v_t,   x_t clean (v = 2) or crafted in ball t (v = 1)

    N ↔ `clean + len(l2) + len(linf)`      g ↔ `gating`      a ball's radius ↔ `l2`, `linf`      v of clean images ↔ `clean_weight`

It is the frozen relative of DWF: the same sum over logits, with a larger gate in front of experts that stay what they are.

Kind: soft mixture.
Cost: 350 passes of 3.3 G.
Reported: no figure was readable to us. Those of the program would not be robust accuracies: it trains and evaluates the
    gate on images crafted against a ResNet-18 that was never trained, and clips them to [0,1] after normalisation.
Expect: digits with the recipe `tiny`, one CPU core, little over a minute; on training images that were held out, clean
    99 %, PGD-20 82 %.
    CIFAR-10 with the recipe `paper`: at 8/255 no more than its best expert, 45 to 52 % under PGD-50 (a guess, not a run).
Differs:
- Images of stage 2 are crafted against the mixture, gate included (code: against the untrained network).
- L2 images follow the gradient's direction (code: its signs, then projected). A step is a quarter of the radius (code: 2/255
  for every ball). The box is that of pixels.
- Frozen means frozen: BatchNorm's statistics too. The gate learns in train mode throughout (code: eval mode after an epoch).
- All parts of stage 2 are one batch and one step (code: one pass over the data after another). SGD at 0.01 (code: Adam, from
  0.1). A cosine schedule.
- Experts against fog and snow are left out: corruptions, no perturbations in a ball.
- The epoch of stage 2 is chosen by PGD-10 in the dataset's L∞ ball (code: the mean over clean, L2 and L∞ images).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.resnet import resnet18
from bench.attacks.pgd import pgd
from bench.config import AtLeastOne, NotNegative, Radius, Rate, Whole, config
from bench.crafting import crafting
from bench.data import Dataset
from bench.defense import Defense, Stage
from bench.errors import UsageError
from bench.model import Normalize, evaluating
from bench.moe import Experts, each_loss
from bench.registry import register
from bench.rng import Rng
from bench.threat import L2, Linf
from bench.types import Images, Labels, Logits


@config
class Config:
    """One expert for each radius of `l2` and of `linf`, in pixel units, and `clean` ones for clean images."""

    clean: Whole = 1
    l2: tuple[Rate, ...] = (60 / 255, 80 / 255)
    linf: tuple[Radius, ...] = (6 / 255, 8 / 255)
    steps: AtLeastOne = 10
    clean_weight: Rate = 2.0
    width: AtLeastOne = 64
    gate_width: AtLeastOne = 64
    expert_epochs: Whole = 100
    expert_lr: Rate = 0.1
    gate_epochs: Whole = 100
    gate_lr: Rate = 0.01
    batch_size: AtLeastOne = 128
    weight_decay: NotNegative = 5e-4


class Mixture(nn.Module):
    """The experts and their gate; pixels to logits."""

    soft = True

    def __init__(self, config: Config, data: Dataset) -> None:
        super().__init__()
        channels = data.shape[0]
        self.experts_count = config.clean + len(config.l2) + len(config.linf)
        self.normalize = Normalize(data.mean, data.std)
        self.experts = Experts(
            partial(resnet18, channels=channels, classes=len(data.classes), width=config.width),
            self.experts_count,
        )
        self.gating = resnet18(channels=channels, classes=self.experts_count, width=config.gate_width)

    def forward(self, x: Images) -> Logits:
        """Σᵢ wᵢ fᵢ: `(b, c, h, w)` to `(b, k)`."""
        return torch.einsum("be,bek->bk", self.gate(x).softmax(1), self.all_outputs(x))

    def gate(self, x: Images) -> Tensor:
        """Scores `(b, e)`; their softmax weighs the experts."""
        scores: Tensor = self.gating(self.normalize(x))
        return scores

    def all_outputs(self, x: Images) -> Tensor:
        """Every expert's logits, `(b, e, k)`."""
        outputs: Tensor = self.experts(self.normalize(x))
        return outputs

    def one_output(self, x: Images, expert: int) -> Logits:
        """One expert's logits, `(b, k)`."""
        return self.experts.one(self.normalize(x), expert)

    def selected(self, x: Images) -> Tensor:
        """The expert of the largest weight, `(b,)`."""
        return self.gate(x).argmax(1)

    def own_outputs(self, x: Tensor, first: int, last: int) -> Tensor:
        """Experts `first … last-1`, each on images of its own: `(b, m·c, h, w)` to `(b, m, k)`."""
        b, _, h, w = x.shape
        normal = self.normalize(x.reshape(b * (last - first), -1, h, w))
        return self.experts.some(normal.reshape(b, -1, h, w), first, last)


@register("more")
class MoRE(Defense[Config]):
    """MoRE: frozen experts for clean, L2 and L∞ images behind a trained gate."""

    taxonomy = {
        "gating": "soft",
        "routing": "flat",
        "training": "pretrained+gate",
        "activation": "fractional",
    }
    recipes = {
        "tiny": Config(
            l2=(0.3, 0.4),
            linf=(0.075, 0.1),
            steps=4,
            width=8,
            gate_width=8,
            expert_epochs=12,
            gate_epochs=3,
            gate_lr=0.03,
        ),
        "fast": Config(expert_epochs=20, gate_epochs=5),
        "paper": Config(),
    }

    def build(self, data: Dataset) -> Mixture:
        """The mixture, untrained.

        Raises:
            UsageError: there is no expert.
        """
        c = self.config
        if c.clean + len(c.l2) + len(c.linf) == 0:
            raise UsageError("a mixture needs an expert; set clean above 0 or give a radius in l2 or linf")
        return Mixture(c, data)

    def stages(self, data: Dataset) -> Sequence[Stage]:
        """The experts apart, then the gate and the experts' heads."""
        c = self.config
        threats: list[L2 | Linf] = [*map(L2, c.l2), *map(Linf, c.linf)]

        def apart(model: nn.Module, x: Images, y: Labels, rng: Rng) -> Tensor:
            assert isinstance(model, Mixture)
            images = own_images(model, x, y, c, threats, rng)
            # experts share no weight, so the sum gives each the gradient of its own mean
            return each_loss(model.own_outputs(images, 0, model.experts_count), y).sum(1).mean()

        def together(model: nn.Module, x: Images, y: Labels, rng: Rng) -> Tensor:
            assert isinstance(model, Mixture)
            parts, weights = [x], [c.clean_weight]
            with crafting(model):
                for i, threat in enumerate(threats):
                    parts.append(pgd(model, x, y, threat, rng=rng.at(i), steps=c.steps))
                    weights.append(1.0)
            logits = behind_frozen(model, torch.cat(parts))
            losses = F.cross_entropy(logits, y.repeat(len(parts)), reduction="none").view(len(parts), -1)
            weighed = losses.mean(1) @ losses.new_tensor(weights)
            return weighed / sum(weights)

        return [
            Stage(
                name="experts",
                loss=apart,
                epochs=c.expert_epochs,
                batch_size=c.batch_size,
                lr=c.expert_lr,
                weight_decay=c.weight_decay,
                groups=lambda model: [list(model.experts.parameters())],  # type: ignore[union-attr]
            ),
            Stage(
                name="gate and heads",
                loss=together,
                epochs=c.gate_epochs,
                batch_size=c.batch_size,
                lr=c.gate_lr,
                weight_decay=c.weight_decay,
                groups=lambda model: [trained_last(model)],
                select="robust",
            ),
        ]


def own_images(
    model: Mixture, x: Images, y: Labels, c: Config, threats: Sequence[L2 | Linf], rng: Rng
) -> Tensor:
    """Every expert's training images, side by side: `(b, e·c, h, w)`, clean, then L2, then L∞."""
    parts = [x] * c.clean
    with crafting(model):
        for i, threat in enumerate(threats, c.clean):

            def one(z: Images, i: int = i) -> Logits:
                return model.own_outputs(z, i, i + 1)[:, 0]

            parts.append(pgd(one, x, y, threat, rng=rng.at(i), steps=c.steps))
    return torch.cat(parts, 1)


def trained_last(model: nn.Module) -> list[nn.Parameter]:
    """What stage 2 moves: the gate, and the last linear layer of every expert."""
    assert isinstance(model, Mixture)
    head = model.experts.net.linear
    assert isinstance(head, nn.Module)
    return [*model.gating.parameters(), *head.parameters()]


def behind_frozen(model: Mixture, x: Images) -> Logits:
    """The mixture's logits `(b, k)` in stage 2: the experts' backbones in eval mode and without gradient."""
    moved = set(trained_last(model))
    frozen = [parameter for parameter in model.parameters() if parameter not in moved]
    for parameter in frozen:
        parameter.requires_grad_(False)
    with evaluating(model.experts):
        logits: Logits = model(x)
    for parameter in frozen:
        parameter.requires_grad_(True)
    return logits
