"""DWF, Divided We Fall: a soft mixture of nine experts under randomised adversarial training (arXiv 2512.20821 v2).

    f(x) = Σᵢ wᵢ(x) fᵢ(x)          over expert logits   (eq. 1)
    w(x) = softmax(g(x))           the gate             (eq. 2)

Phase 1 (Algorithms 1 and 2) trains the experts apart: one on clean images; four on FGSM images, eps drawn anew for
each batch from {0.01, …, 0.09}; four on PGD images, the number of steps drawn anew for each batch from {10, …, 50}.
Phase 2 (Algorithm 3) trains experts and gate together, nothing frozen: each batch is the clean images, an FGSM copy and
a PGD copy of them, both crafted against the whole mixture, with plain cross-entropy on the three parts.

    N = 9 ↔ `benign + fgsm + pgd`      U{…} of eps ↔ `fgsm_eps`      U{…} of k ↔ `pgd_steps`      g ↔ `gate`

Kind: soft mixture.
Cost: 180 passes of 5 G.
Reported: CIFAR-10, ResNet-18 experts: Table 3 (`bench table --published`); 240 GPU-hours on two H100.
Expect: digits with the recipe `tiny`, two CPU cores, about a minute: see the README's table.
Differs:
- The gate's layers are not readable in the paper. Ours: normalised image, 8×8 average pool, Linear → 128, ReLU,
  Linear → experts.
- PGD's eps and step size are not readable. Ours: the dataset's radius, a quarter of it, uniform start.
- Optimiser settings are not readable. Recipe `paper`: experts 200 epochs at lr 0.1, end to end 100 epochs at 0.01.
  Recipe `fast`: k from 1…10 and a tenth of the epochs.
- The experts are trained side by side on the same order of clean images; the four PGD experts share each batch's k,
  the four FGSM experts draw their own eps.
- Images are crafted with BatchNorm in eval mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.resnet import resnet18
from bench.attacks.fgsm import fgsm
from bench.attacks.gradient import input_gradient
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
from bench.threat import Linf
from bench.types import Images, Labels, Logits

#: what a batch's radius, or its number of steps, is drawn from
Radii = Annotated[tuple[Radius, ...], Field(min_length=1)]
StepCounts = Annotated[tuple[AtLeastOne, ...], Field(min_length=1)]


@config
class Config:
    """Radii and `step_size` in pixel units; `eps` is PGD's, by default the dataset's, `step_size` a quarter of it.

    `mix_clean` shows FGSM experts the second half of each batch as it is. Two ablations: with `gate="uniform"` every expert
    weighs the same, and with `frozen_experts` the second phase trains the gate alone.
    """

    benign: Whole = 1
    fgsm: Whole = 4
    pgd: Whole = 4
    width: AtLeastOne = 64
    gate: Literal["soft", "uniform"] = "soft"
    gate_width: AtLeastOne = 128
    frozen_experts: bool = False
    mix_clean: bool = False
    fgsm_eps: Radii = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09)
    pgd_steps: StepCounts = (10, 20, 30, 40, 50)
    eps: Radius | None = None
    step_size: Radius | None = None
    expert_epochs: Whole = 200
    expert_lr: Rate = 0.1
    joint_epochs: Whole = 100
    joint_lr: Rate = 0.01
    batch_size: AtLeastOne = 128
    weight_decay: NotNegative = 5e-4


class Mixture(nn.Module):
    """The nine experts and their gate; pixels to logits."""

    soft = True

    def __init__(self, config: Config, data: Dataset) -> None:
        super().__init__()
        channels = data.shape[0]
        self.experts_count = config.benign + config.fgsm + config.pgd
        self.normalize = Normalize(data.mean, data.std)
        self.experts = Experts(
            partial(resnet18, channels=channels, classes=len(data.classes), width=config.width),
            self.experts_count,
        )
        self.gating = (
            nn.Sequential(
                nn.AdaptiveAvgPool2d(8),
                nn.Flatten(),
                nn.Linear(64 * channels, config.gate_width),
                nn.ReLU(),
                nn.Linear(config.gate_width, self.experts_count),
            )
            if config.gate == "soft"
            else None
        )

    def forward(self, x: Images) -> Logits:
        """Σᵢ wᵢ fᵢ: `(b, c, h, w)` to `(b, k)` (eq. 1)."""
        return mixed(self.gate(x), self.all_outputs(x))

    def gate(self, x: Images) -> Tensor:
        """Scores `(b, e)`; their softmax weighs the experts (eq. 2). All 0 where the gate is uniform."""
        if self.gating is None:
            return x.new_zeros(len(x), self.experts_count)
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


@register("dwf")
class DWF(Defense[Config]):
    """Divided We Fall: nine experts, a soft gate, randomised adversarial training."""

    taxonomy = {
        "gating": "soft",
        "routing": "flat",
        "training": "pretrained+joint",
        "activation": "fractional",
    }
    recipes = {
        "tiny": Config(
            width=8, pgd_steps=(1, 2, 3, 4, 5), step_size=0.05, expert_epochs=14, joint_epochs=6, joint_lr=0.1
        ),
        "fast": Config(pgd_steps=tuple(range(1, 11)), expert_epochs=20, joint_epochs=10),
        "paper": Config(),
    }
    published_as = "DWF"

    def build(self, data: Dataset) -> Mixture:
        """The mixture, untrained.

        Raises:
            UsageError: there is no expert, or nothing for the second phase to train.
        """
        c = self.config
        if c.gate == "uniform" and c.frozen_experts:
            raise UsageError(
                "a uniform gate over frozen experts leaves nothing to train end to end; set one of gate and frozen_experts"
            )
        if c.benign + c.fgsm + c.pgd == 0:
            raise UsageError("a mixture needs an expert; set at least one of benign, fgsm and pgd above 0")
        return Mixture(self.config, data)

    def stages(self, data: Dataset) -> Sequence[Stage]:
        """The experts apart, then all of it together."""
        c = self.config
        threat = Linf(c.eps or data.eps)

        def apart(model: nn.Module, x: Images, y: Labels, rng: Rng) -> Tensor:
            assert isinstance(model, Mixture)
            images = own_images(model, x, y, c, threat, rng)
            logits = model.own_outputs(images, 0, model.experts.experts)
            # experts share no weight, so the sum gives each the gradient of its own mean
            return summed(logits, y).mean()

        def together(model: nn.Module, x: Images, y: Labels, rng: Rng) -> Tensor:
            with crafting(model):
                x_fgsm = fgsm(model, x, y, Linf(rng.at("eps").choice(c.fgsm_eps)))
                k = rng.at("k").choice(c.pgd_steps)
                x_pgd = pgd(model, x, y, threat, rng=rng.at("pgd"), steps=k, step_size=c.step_size)
            images, labels = torch.cat([x, x_fgsm, x_pgd]), y.repeat(3)
            if not c.frozen_experts:
                return F.cross_entropy(model(images), labels)
            assert isinstance(model, Mixture)
            with evaluating(model.experts), torch.no_grad():
                outputs = model.all_outputs(images)
            return F.cross_entropy(mixed(model.gate(images), outputs), labels)

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
                name="end to end",
                loss=together,
                epochs=c.joint_epochs,
                batch_size=c.batch_size,
                lr=c.joint_lr,
                weight_decay=c.weight_decay,
                groups=(lambda model: [list(model.gating.parameters())]) if c.frozen_experts else None,  # type: ignore[union-attr]
                select="robust",
            ),
        ]


def mixed(scores: Tensor, outputs: Tensor) -> Logits:
    """Σᵢ wᵢ fᵢ (eq. 1) of scores `(b, e)` and the experts' logits `(b, e, k)`."""
    return torch.einsum("be,bek->bk", scores.softmax(1), outputs)


def own_images(model: Mixture, x: Images, y: Labels, c: Config, threat: Linf, rng: Rng) -> Tensor:
    """Every expert's training images, side by side: `(b, e·c, h, w)`, clean, then FGSM, then PGD."""
    parts = [x.repeat(1, c.benign, 1, 1)] if c.benign else []
    with crafting(model):
        if c.fgsm:
            copies = x.repeat(1, c.fgsm, 1, 1)
            first = c.benign
            gradient, _ = input_gradient(
                lambda z: model.own_outputs(z, first, first + c.fgsm), copies, y, summed
            )
            eps = torch.tensor([rng.at("eps", i).choice(c.fgsm_eps) for i in range(c.fgsm)], device=x.device)
            reach = eps.repeat_interleave(x.shape[1])[None, :, None, None]
            crafted = (copies + reach * gradient.sign()).clamp(0, 1)
            if c.mix_clean:
                crafted[len(x) // 2 :] = copies[len(x) // 2 :]
            parts.append(crafted)
        if c.pgd:
            copies = x.repeat(1, c.pgd, 1, 1)
            first = c.benign + c.fgsm
            parts.append(
                pgd(
                    lambda z: model.own_outputs(z, first, first + c.pgd),
                    copies,
                    y,
                    threat,
                    rng=rng.at("pgd"),
                    loss=summed,
                    steps=rng.at("k").choice(c.pgd_steps),
                    step_size=c.step_size,
                )
            )
    return torch.cat(parts, 1)


def summed(logits: Tensor, y: Labels) -> Tensor:
    """The experts' cross-entropies summed, `(b,)`: each expert's images get the gradient of its own."""
    return each_loss(logits, y).sum(1)
