"""SoE, Synergy-of-Experts: whole networks, of which the one that trusts itself most answers (NeurIPS 2022).

Cui, Zhang, Liang, Han, Sugiyama and Zhang, openreview.net/forum?id=tuC6teLFZD. Only the paper's abstract and
Definition 1 were readable to us; what is marked (code) follows the authors' program at commit a3d9477.

    best(x, y) = argminᵢ CE(fᵢ(x), y)                                  the sub-model that ought to answer (Definition 1)
    cᵢ(x) = maxₖ softmax(fᵢ(x))ₖ · σ(aᵢ(x))                            how far sub-model i trusts itself (code)
    F(x) = fᵢ(x) with i = argmaxᵢ cᵢ(x)                                the sub-model that answers

    L_sub = Σᵢ sg softmaxᵢ(-lᵢ) lᵢ,   lᵢ = CE(fᵢ(x), y)                each learns most from what it does best (code)
    L_col = Σᵢ sg softmaxᵢ(T cᵢ) lᵢ                                    each learns most from what it would be asked (code)
    L_pred = meanᵢ BCE(mᵢ σ(aᵢ), sg pᵢ(y)),   mᵢ = maxₖ softmax(fᵢ)ₖ   cᵢ shall be the true class's probability (code)

where sg stops the gradient, as it does in mᵢ where fᵢ is right. With Aᵢ what PGD finds against fᵢ and A what it finds
against F, the mean over the batch's images of

    soe-sub     L_sub on x and on the Aᵢ,                            + λ L_pred on both
    soe-col     L_col on x and on A,                                 + λ L_pred on both
    soe-full    L_sub on x and on the Aᵢ, L_col on x and on A,       + λ L_pred on all three

    M ↔ `experts`      aᵢ ↔ `trust`      log cᵢ ↔ `gate`      T ↔ `sharpness`      λ ↔ `predictor`
    Aᵢ ↔ `one_by_one`      A ↔ `together`      recipe of the method ↔ `variant`

The selection has no gradient: PGD is shown the answering sub-model alone, and where the answer passes to another it
turns about. So a flat line over its steps is no sign of robustness; `--protocol adaptive` attacks the selection too.

Kind: hard mixture.
Cost: 750 passes of 1.7 G.
Reported: CIFAR-10, three ResNet-20, radii up to 0.04: figures not readable to us. Retrained with ResNet-18:
    clean 81.69 %, PGD-50 62.31 % at a radius that is not printed (Divided We Fall, arXiv 2512.20821, Table 3).
Expect: digits with the recipe `tiny`, one CPU core, under a minute, and several points less under the attacks on the
    selection than under PGD. CIFAR-10 with the recipe `paper`, at 8/255: clean 78 to 84 %, worst case 42 to 52 % (a
    guess, not a run); much more means that gradients are masked.
Differs:
- How the paper joins L_sub and L_col is not readable, and the program that its main script calls was never published.
  `soe-full`, the default, is their sum; `soe-col` is the published model file with its run script; `soe-sub` is what
  that file has commented out.
- ResNet-18 sub-models, as in the DWF paper; the authors' are ResNet-20. Only the predictor that reads the classifier's
  own features is built, not the one with residual stages of its own; nor is the optional distillation of features.
- Images are crafted with BatchNorm in eval mode (theirs: train mode). Clean and crafted images then pass through the
  networks once, as one batch, and that is what BatchNorm learns from.
- The training images are shuffled; theirs are not. A cosine schedule in place of steps at epochs 50 and 75. One
  optimiser in place of one for each sub-model, which is the same, as they share no weight.
- The radius and step of training: the dataset's, and a third of it; their script's are 0.03 and 0.01.
- cᵢ is computed from logarithms, so that losses stay finite and sub-models that are all but certain can still be told
  apart; a cᵢ that is NaN is an error. T enters the weights of L_col and nothing else; theirs also scales cᵢ when the
  network answers.
- The epoch is chosen by PGD-10 on held-out training images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.resnet import resnet18
from bench.attacks.losses import cross_entropy
from bench.attacks.mixture import Aim
from bench.attacks.pgd import pgd
from bench.config import AtLeastOne, NotNegative, Radius, Rate, config
from bench.crafting import crafting
from bench.data import Dataset
from bench.defense import Defense, Stage
from bench.errors import NonFinite
from bench.model import Normalize, evaluating
from bench.moe import Experts, each_loss
from bench.registry import register
from bench.rng import Rng
from bench.threat import Linf
from bench.types import Images, Labels, Logits


@config
class Config:
    """`eps` and `step_size` in pixel units: the dataset's radius and a third of it by default."""

    variant: Literal["soe-sub", "soe-col", "soe-full"] = "soe-full"
    experts: AtLeastOne = 3
    sharpness: NotNegative = 1.0
    predictor: NotNegative = 1.0
    eps: Radius | None = None
    step_size: Radius | None = None
    steps: AtLeastOne = 10
    width: AtLeastOne = 64
    epochs: AtLeastOne = 200
    batch_size: AtLeastOne = 128
    lr: Rate = 0.1
    weight_decay: NotNegative = 1e-4


class Collaboration(nn.Module):
    """The sub-models, each with a predictor of its own performance; pixels to logits.

    Classifier and predictor of a sub-model are one linear layer: its last output is aᵢ.
    """

    soft = False

    def __init__(self, config: Config, data: Dataset) -> None:
        super().__init__()
        self.experts_count = config.experts
        self.normalize = Normalize(data.mean, data.std)
        self.experts = Experts(
            partial(resnet18, channels=data.shape[0], classes=len(data.classes) + 1, width=config.width),
            config.experts,
        )

    def forward(self, x: Images) -> Logits:
        """The logits of the sub-model that trusts itself most: `(b, c, h, w)` to `(b, k)`."""
        return answer(*self.scored(x))

    def gate(self, x: Images) -> Tensor:
        """log cᵢ, `(b, e)`."""
        return self.scored(x)[1]

    def all_outputs(self, x: Images) -> Tensor:
        """Every sub-model's logits, `(b, e, k)`."""
        return self.heads(x)[0]

    def one_output(self, x: Images, expert: int) -> Logits:
        """One sub-model's logits, `(b, k)`."""
        return split(self.experts.one(self.normalize(x), expert))[0]

    def selected(self, x: Images) -> Tensor:
        """The sub-model that answers, the first of several, `(b,)`."""
        return self.gate(x).argmax(1)

    def scored(self, x: Images) -> tuple[Tensor, Tensor]:
        """Every sub-model's logits `(b, e, k)`, and log cᵢ `(b, e)`.

        Raises:
            NonFinite: a confidence is NaN or infinite; argmax would take that sub-model for the surest.
        """
        logits, trust = self.heads(x)
        scores = log_confidence(logits, trust)
        finite = scores.isfinite().all(1)
        if not finite.all():
            raise NonFinite("the sub-models' confidences", (~finite).nonzero().flatten().tolist())
        return logits, scores

    def heads(self, x: Images) -> tuple[Tensor, Tensor]:
        """Every sub-model's logits `(b, e, k)`, and its aᵢ `(b, e)`."""
        return split(self.experts(self.normalize(x)))

    def legacy_aims(self) -> dict[str, Aim]:
        """What the authors' code sketches as an attack on the selection: CE(F(x), y) + w · BCE(c, 1), c of the one that answers."""

        def output(x: Images) -> Tensor:
            logits, scores = self.scored(x)
            return torch.cat([answer(logits, scores), scores.amax(1, keepdim=True)], 1)

        def of_weight(w: float) -> Aim:
            return Aim(
                output,
                lambda found, y: cross_entropy(found[:, :-1], y) - w * found[:, -1],
                lambda found, y: found[:, :-1].argmax(1) != y,
            )

        return {f"weight{w:g}": of_weight(w) for w in (0.2, 0.6, 1.0)}

    def own_outputs(self, x: Tensor) -> Tensor:
        """Every sub-model's logits on images of its own, `(b, e·c, h, w)` to `(b, e, k)`."""
        b, _, h, w = x.shape
        normal = self.normalize(x.reshape(b * self.experts_count, -1, h, w))
        return split(self.experts.some(normal.reshape(b, -1, h, w), 0, self.experts_count))[0]


def split(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs `(b, e, k+1)` as logits `(b, e, k)` and aᵢ `(b, e)`, in float32 at least."""
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    return outputs[..., :-1], outputs[..., -1]


def answer(logits: Tensor, scores: Tensor) -> Logits:
    """The logits of the sub-model with the highest score: `(b, e, k)` and `(b, e)` to `(b, k)`."""
    chosen = scores.argmax(1)
    return logits.gather(1, chosen[:, None, None].expand(-1, 1, logits.shape[2])).squeeze(1)


def lead(logits: Tensor) -> Tensor:
    """How far the largest logit is ahead of the others' logsumexp, `(…, k)` to `(…)`: σ of it is maxₖ softmaxₖ."""
    top, where = logits.max(-1)
    others = logits.scatter(-1, where.unsqueeze(-1), -float("inf"))
    return top - others.logsumexp(-1)


def log_confidence(logits: Tensor, trust: Tensor) -> Tensor:
    """log cᵢ: logits `(b, e, k)` and aᵢ `(b, e)` to `(b, e)`."""
    return F.logsigmoid(lead(logits)) + F.logsigmoid(trust)


@register("soe")
class SoE(Defense[Config]):
    """Synergy-of-Experts: three whole networks, of which the most confident answers."""

    taxonomy = {"gating": "hard", "routing": "flat", "training": "joint", "activation": "single"}
    recipes = {
        "tiny": Config(width=8, epochs=12, steps=4, lr=0.03),
        "fast": Config(epochs=30),
        "paper": Config(),
    }
    published_as = "SoE"

    def build(self, data: Dataset) -> Collaboration:
        """The sub-models, untrained."""
        return Collaboration(self.config, data)

    def stages(self, data: Dataset) -> Sequence[Stage]:
        """One stage; the epoch with the best held-out accuracy under PGD-10 is kept."""
        c = self.config
        threat = Linf(c.eps or data.eps)

        def loss(model: nn.Module, x: Images, y: Labels, rng: Rng) -> Tensor:
            assert isinstance(model, Collaboration)
            return objective(model, x, y, c, threat, rng)

        return [
            Stage(
                name=c.variant,
                loss=loss,
                epochs=c.epochs,
                batch_size=c.batch_size,
                lr=c.lr,
                weight_decay=c.weight_decay,
                select="robust",
            )
        ]


def objective(model: Collaboration, x: Images, y: Labels, c: Config, threat: Linf, rng: Rng) -> Tensor:
    """What a variant minimises on one batch, `()`."""
    sub, col = c.variant != "soe-col", c.variant != "soe-sub"
    parts = {"clean": x}
    if sub:
        parts["one by one"] = one_by_one(model, x, y, c, threat, rng)
    if col:
        parts["together"] = together(model, x, y, c, threat, rng)
    logits, trust = model.heads(torch.cat(list(parts.values())))
    sizes = [len(images) for images in parts.values()]
    total = torch.zeros((), device=x.device)
    for name, f, a in zip(parts, torch.split(logits, sizes), torch.split(trust, sizes), strict=True):
        labels = y.repeat(len(f) // len(y))
        losses = each_loss(f, labels)
        if sub and name != "together":
            total = total + (sub_model_weights(losses) * losses).sum(1).mean()
        if col and name != "one by one":
            total = total + (collaboration_weights(f, a, c.sharpness) * losses).sum(1).mean()
        total = total + c.predictor * predictor_loss(f, a, labels).mean()
    return total


def one_by_one(model: Collaboration, x: Images, y: Labels, c: Config, threat: Linf, rng: Rng) -> Images:
    """Against each sub-model the images that PGD finds: `(e·b, c, h, w)`, those of the first sub-model first."""
    experts = model.experts_count
    with crafting(model):
        found = pgd(
            model.own_outputs,
            x.repeat(1, experts, 1, 1),
            y,
            threat,
            rng=rng,
            # sub-models share no weight, so the sum gives each image the gradient of its own
            loss=lambda logits, labels: each_loss(logits, labels).sum(1),
            steps=c.steps,
            step_size=c.step_size or threat.eps / 3,
            random_start=False,
        )
    return torch.cat(found.chunk(experts, 1))


def together(model: Collaboration, x: Images, y: Labels, c: Config, threat: Linf, rng: Rng) -> Images:
    """Against the network as it answers the images that PGD finds, `(b, c, h, w)`; each step may meet another sub-model."""
    with crafting(model):
        return pgd(
            model,
            x,
            y,
            threat,
            rng=rng,
            steps=c.steps,
            step_size=c.step_size or threat.eps / 3,
            random_start=False,
        )


def sub_model_weights(losses: Tensor) -> Tensor:
    """sg softmaxᵢ(-lᵢ), `(b, e)`. With it Σ wᵢ lᵢ has the gradient of the soft minimum -log Σᵢ exp(-lᵢ)."""
    return (-losses.detach()).softmax(1)


def collaboration_weights(logits: Tensor, trust: Tensor, sharpness: float) -> Tensor:
    """sg softmaxᵢ(T cᵢ), `(b, e)`."""
    return (sharpness * log_confidence(logits, trust).detach().exp()).softmax(1)


def predictor_loss(logits: Tensor, trust: Tensor, y: Labels) -> Tensor:
    """BCE(mᵢ σ(aᵢ), sg pᵢ(y)), `(b, e)`.

    With g the lead of the largest logit, mᵢ = σ(g) and 1 - mᵢ σ(aᵢ) = σ(-g) + σ(g) σ(-aᵢ).
    """
    right = logits.argmax(-1) == y[:, None]
    target = (-each_loss(logits, y)).detach().exp()
    g = lead(logits)
    # where the sub-model is right its peak is as it should be, and only the predictor learns
    g = torch.where(right, g.detach(), g)
    log_m = F.logsigmoid(g)
    log_c = log_m + F.logsigmoid(trust)
    log_not_c = torch.logaddexp(F.logsigmoid(-g), log_m + F.logsigmoid(-trust))
    return -(target * log_c + (1 - target) * log_not_c)


@dataclass(frozen=True)
class Observed:
    """How the collaboration fares on some images; shares in [0,1]."""

    accuracy: float
    """of the sub-model that answers"""
    expert_accuracy: tuple[float, ...]
    oracle: float
    """some sub-model is right; it takes the label to find it, so this is no accuracy of the defense"""
    load: tuple[float, ...]
    """how often each sub-model answers"""
    hit_rate: float
    """the sub-model of the smallest loss answers"""
    effective_experts: float
    """exp of the entropy of L_col's weights, mean: 1 where one sub-model takes all, M where all share"""
    calibration_error: float
    """of the answering sub-model's cᵢ against its being right, ten bins"""


@torch.no_grad()
def observe(model: Collaboration, x: Images, y: Labels, *, sharpness: float = 1.0) -> Observed:
    """What became of images, clean or crafted, sub-model by sub-model; `sharpness` is T."""
    with evaluating(model):
        logits, trust = model.heads(x)
    scores, right = log_confidence(logits, trust), logits.argmax(-1) == y[:, None]
    top, chosen = scores.max(1)
    answered = right.gather(1, chosen[:, None]).squeeze(1)
    weights = collaboration_weights(logits, trust, sharpness)
    bins = (10 * top.exp()).long().clamp(max=9)
    gaps = [(top.exp() - answered.float())[bins == i].sum().abs() for i in range(10)]
    return Observed(
        accuracy=float(answered.float().mean()),
        expert_accuracy=tuple(right.float().mean(0).tolist()),
        oracle=float(right.any(1).float().mean()),
        load=tuple(F.one_hot(chosen, right.shape[1]).float().mean(0).tolist()),
        hit_rate=float((chosen == each_loss(logits, y).argmin(1)).float().mean()),
        effective_experts=float(torch.special.entr(weights).sum(1).exp().mean()),
        calibration_error=float(torch.stack(gaps).sum() / len(y)),
    )
