"""Immunity: experts whose weights are dealt anew for every answer, and that look at different places (arXiv 2402.18787).

Of the paper only the abstract was readable to us, and no program of its authors was found. What the abstract says: a
mixture of experts; Random Switch Gates, whose parameters are permuted at evaluation; two losses on the experts'
Grad-CAM heatmaps, the mutual information between them and their position stability. Everything else, the equations
below included, is our reading of it, and so is every setting.

    F(x) = Σᵢ g_π(i)(x) softmax(fᵢ(x)),   π uniform over the permutations, drawn for each image and each answer
    Hᵢ = Grad-CAM of fᵢ for class y (`bench.gradcam`),   qᵢ = (Hᵢ + δ) / Σᵤᵥ (Hᵢ + δ)
    L_MI = 2 / (N(N-1)) Σ_{i<j} I(Hᵢ; Hⱼ)               experts shall see different evidence
    L_PS = 1/N Σᵢ E ‖cᵢ(x) - cᵢ(x̃)‖²,   cᵢ = Σᵤᵥ qᵢ(u, v) · (u, v)     and see it where it was
    min  CE(log Σᵢ gᵢ softmax(fᵢ), y) + λ₁ L_MI + λ₂ L_PS + λ₀ 1/N Σᵢ CE(fᵢ, y)

x̃ is a second view. `variant="at"` learns from what PGD finds against the mixture as it is trained, and its second view
is the clean image; `variant="clean"` learns from clean images and views them a second time under uniform noise.

    N ↔ `experts`      λ₁, λ₂, λ₀ ↔ `mi`, `ps`, `expert_loss`      g ↔ `gating`      π ↔ `dealt`      layer of A ↔ `heat_stage`
    cᵢ ↔ `centroids`      I ↔ `mutual_information`      stages followed by a Random Switch Gate ↔ `switches`

Where a gate sits is open. Reading A, the default (`switches=[]`): at the output alone. Reading B (`switches=[1,2,3]`):
behind residual stages too, where branch i goes on with Σⱼ M_π(i)j hⱼ, M a trained matrix whose rows sum to 1 and are
permuted at evaluation: N!^L wirings for L such gates.

What π hides is known. A gate's weights sum to 1, so under reading A

    E_π F(x) = 1/N Σᵢ softmax(fᵢ(x))

exactly, whatever the gate says. `expected_log_probabilities` is its logarithm, a deterministic network of the usual
kind, and an attack on it is an attack on what is deployed: robustness beyond it is the noise of one draw. `draws` goes
through all N! answers. Under reading B the expectation is exact as long as the wirings can be enumerated (one gate of
four experts: 24); beyond that the model does not offer it, and an attack has to sample.

Kind: random mixture.
Cost: 360 passes of 2.2 G.
Reported: on CIFAR-10 and CIFAR-100 gains under FGSM, BIM, MIM and PGD that are largest with adversarial training; no
    figure was readable to us, so there is none to compare with.
Expect: digits with the recipe `tiny`, one CPU core, under a minute; on training images that were held out, clean 99 %,
    PGD-20 89 % against the expectation. With `expert_loss=0` as the abstract has it, clean 87 %, PGD-20 74 %, and only
    56 % of clean images are right in all 24 answers. About a tenth of its heatmaps is 0 everywhere, more than the few
    that could be overlooked.
    CIFAR-10 with the recipe `paper`: under attacks on the expectation about what an ensemble of four adversarially
    trained ResNet-18 has, clean 80 to 86 %, PGD-50 at 8/255 48 to 54 % (a guess, not a run).
Differs: as nothing but the abstract was readable, these are choices, not departures.
- Four CIFAR ResNet-18, the gate of the DWF recipe: 8×8 average pool, Linear → 64, ReLU, Linear → experts.
- Heatmaps behind the third stage; the fourth has too few positions to speak of information.
- I is that of a joint histogram of 8×8 soft bins (Gaussian, σ one bin) over the positions of all images of a batch,
  each map first scaled to [0,1]. Constant heatmaps have none: the history counts those that are all zero, epoch by epoch.
- `anchored` takes the other reading of position stability: the distance to each expert's own running mean.
- λ₀ = 1 is ours. Training deals no weights, so without it gate and experts specialise, and answer worse in another's
  place. `permute_training`, off by default, is another remedy; it is then one draw that PGD meets at each step.
- Both views of an image pass through the network as one batch, and that is what BatchNorm learns from.
- Images are crafted with BatchNorm in eval mode.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.resnet import BasicBlock, CopiedLinear
from bench.attacks.pgd import pgd
from bench.config import AtLeastOne, NotNegative, Radius, Rate, config
from bench.crafting import crafting
from bench.data import Dataset
from bench.defense import Defense, Stage
from bench.errors import UsageError
from bench.gradcam import gradcam, of_labels
from bench.held_out import AT_ONCE, HeldOut
from bench.model import Normalize, evaluating
from bench.moe import Experts, each_loss
from bench.registry import register
from bench.rng import Rng
from bench.threat import Linf
from bench.types import Images, Labels, Logits

#: the most wirings that are enumerated for an exact expectation: the permutations of five experts
MOST_WIRINGS = 120
#: soft bins of a heatmap's values in [0,1]
BINS = 8
#: what is added to a heatmap before it is made a density
DELTA = 1e-6
#: how far an anchor moves towards the batch's mean
ANCHOR_STEP = 0.1
#: the diagonal of a trained wiring before its softmax, at the start: four branches keep 0.87 of themselves
OWN_BRANCH = 3.0


@config
class Config:
    """`eps` and `step_size` in pixel units: the dataset's radius and a quarter of it by default.

    `mi` and `ps` weigh the two losses on heatmaps, which are read behind residual stage `heat_stage`, and `expert_loss` each
    expert's own; `switches` are the stages behind which a Random Switch Gate sits besides the one at the output.
    """

    variant: Literal["at", "clean"] = "at"
    switches: tuple[Literal[1, 2, 3], ...] = ()
    experts: AtLeastOne = 4
    mi: NotNegative = 0.1
    ps: NotNegative = 0.1
    anchored: bool = False
    heat_stage: Literal[1, 2, 3] = 3
    expert_loss: NotNegative = 1.0
    permute_training: bool = False
    eps: Radius | None = None
    step_size: Radius | None = None
    steps: AtLeastOne = 10
    width: AtLeastOne = 64
    gate_width: AtLeastOne = 64
    epochs: AtLeastOne = 200
    batch_size: AtLeastOne = 128
    lr: Rate = 0.1
    weight_decay: NotNegative = 5e-4


class Part(nn.Module):
    """One residual stage of `copies` ResNet-18 side by side, the first with the stem and the last with the head."""

    def __init__(self, stage: int, *, channels: int, classes: int, width: int, copies: int) -> None:
        super().__init__()
        self.copies = copies
        inner = width * 2 ** (stage - 1)
        layers: list[nn.Module] = []
        if stage == 1:
            layers += [
                nn.Conv2d(channels * copies, width * copies, 3, padding=1, bias=False, groups=copies),
                nn.BatchNorm2d(width * copies),
                nn.ReLU(),
            ]
        before = inner if stage == 1 else inner // 2
        layers += [
            BasicBlock(before, inner, 1 if stage == 1 else 2, copies),
            BasicBlock(inner, inner, 1, copies),
        ]
        self.layers = nn.Sequential(*layers)
        self.linear = CopiedLinear(inner, classes, copies) if stage == 4 else None

    def forward(self, h: Tensor) -> Tensor:
        """`(b, copies·c, h, w)` to `(b, copies, c', h', w')`, or logits `(b, copies, k)`; one copy has no such axis."""
        out: Tensor = self.layers(h)
        if self.linear is not None:
            logits: Tensor = self.linear(out.mean((2, 3)))
            return logits
        return out if self.copies == 1 else torch.unflatten(out, 1, (self.copies, -1))


class Switched(nn.Module):
    """The experts and their Random Switch Gates; pixels to log-probabilities, in eval mode random."""

    def __init__(self, config: Config, data: Dataset) -> None:
        super().__init__()
        channels = data.shape[0]
        self.experts_count = config.experts
        self.heat_stage = config.heat_stage
        self.permute_training = config.permute_training
        self.normalize = Normalize(data.mean, data.std)
        make = partial(Part, channels=channels, classes=len(data.classes), width=config.width)
        self.parts = nn.ModuleList(Experts(partial(make, stage), config.experts) for stage in (1, 2, 3, 4))
        self.switches = sorted(config.switches)
        self.wiring = nn.ParameterList(OWN_BRANCH * torch.eye(config.experts) for _ in self.switches)
        self.gating = nn.Sequential(
            nn.AdaptiveAvgPool2d(8),
            nn.Flatten(),
            nn.Linear(64 * channels, config.gate_width),
            nn.ReLU(),
            nn.Linear(config.gate_width, config.experts),
        )
        self.anchors: Tensor
        self.register_buffer("anchors", torch.full((config.experts, 2), 0.5))

    def forward(self, x: Images) -> Logits:
        """Log-probabilities `(b, k)` of one draw for each image; while training, of the gates as they are."""
        if self.training and not self.permute_training:
            return self.as_trained(x)
        weights, orders = self.dealt(x), [self.order(x) for _ in self.switches]
        return mixed(weights, self.branches(x, orders)[1])

    def as_trained(self, x: Images) -> Logits:
        """Log-probabilities `(b, k)` with nothing permuted, deterministic."""
        return mixed(self.scores(x).log_softmax(1), self.branches(x)[1])

    def draws(self, x: Images) -> Iterator[Logits]:
        """Every answer that the images may be given, log-probabilities `(b, k)` each, all equally likely: N!^(L+1) of them.

        The same permutation for all images at a time; those of one wiring follow each other.
        """
        weights = self.scores(x).log_softmax(1)
        for orders in self.wirings(x):
            logits = self.branches(x, orders)[1]
            for permutation in itertools.permutations(range(self.experts_count)):
                yield mixed(weights[:, list(permutation)], logits)

    def with_activations(self, x: Images) -> tuple[Tensor, Tensor]:
        """Every expert's feature maps `(b, e, c, h, w)`, and its logits `(b, e, k)`, with nothing permuted."""
        return self.branches(x)

    def scores(self, x: Images) -> Tensor:
        """The gate's scores `(b, e)`; their softmax is g."""
        scores: Tensor = self.gating(self.normalize(x))
        return scores

    def dealt(self, x: Images) -> Tensor:
        """log g, dealt to the experts at random, `(b, e)`. To permute it is to permute the rows of the gate's last layer."""
        return self.scores(x).log_softmax(1).gather(1, self.order(x))

    def order(self, x: Images) -> Tensor:
        """A uniform permutation for each image, int64 `(b, e)`.

        From the global generator of the images' device: the harness seeds it before every call, judge and attack at
        addresses of their own, so that a run can be repeated and no attack knows the draw it will be judged by. Draws of
        a private generator would come to the attack as to the judge, one after the other.
        """
        return torch.rand(len(x), self.experts_count, device=x.device).argsort(1)

    def wirings(self, x: Images) -> Iterator[list[Tensor]]:
        """All ways to permute the inner gates: for each gate an order `(b, e)`, the same for all images."""
        orders = [
            torch.tensor(permutation, device=x.device).expand(len(x), -1)
            for permutation in itertools.permutations(range(self.experts_count))
        ]
        for wiring in itertools.product(orders, repeat=len(self.switches)):
            yield list(wiring)

    def branches(self, x: Images, orders: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Feature maps `(b, e, c, h, w)` behind `heat_stage` and logits `(b, e, k)`, the inner gates permuted by `orders`."""
        e = self.experts_count
        h = self.normalize(x).repeat(1, e, 1, 1)
        for stage, part in enumerate(self.parts, 1):
            h = part.some(h, 0, e)  # type: ignore[operator]
            if stage in self.switches:
                at = self.switches.index(stage)
                rows: Tensor = self.wiring[at].softmax(1)
                rows = rows.expand(len(x), -1, -1) if orders is None else rows[orders[at]]
                h = torch.einsum("bij,bjchw->bichw", rows, h)
            if stage == self.heat_stage:
                activations = h
            if stage < len(self.parts):
                h = h.flatten(1, 2)
        return activations, h


class Enumerable(Switched):
    """One whose wirings are few enough to be gone through: its expectation is exact."""

    def expected_log_probabilities(self, x: Images) -> Logits:
        """log E_π F, `(b, k)`: deterministic and differentiable. Dealt out at random, each expert weighs 1/N on average."""
        means = [uniform(self.branches(x, orders)[1]) for orders in self.wirings(x)]
        return torch.logsumexp(torch.stack(means), 0) - math.log(len(means))


class Mixture(Enumerable):
    """Reading A, where an expert is a network of its own: what attacks on mixtures ask for.

    Its answer is the mean of the experts' probabilities, not of their logits, and the weights that `gate` gives are those
    before they are dealt out.
    """

    soft = True
    mixes_probabilities = True

    def gate(self, x: Images) -> Tensor:
        """Scores `(b, e)`, before any permutation."""
        return self.scores(x)

    def all_outputs(self, x: Images) -> Tensor:
        """Every expert's logits, `(b, e, k)`."""
        return self.branches(x)[1]

    def one_output(self, x: Images, expert: int) -> Logits:
        """One expert's logits, `(b, k)`: no switch leads from one to another."""
        h: Tensor = self.normalize(x)
        for part in self.parts:
            h = part.one(h, expert)  # type: ignore[operator]
        return h

    def selected(self, x: Images) -> Tensor:
        """The expert that weighs most before any permutation, `(b,)`."""
        return self.gate(x).argmax(1)


def mixed(log_weights: Tensor, logits: Tensor) -> Logits:
    """log Σᵢ gᵢ softmax(fᵢ): `(b, e)` and `(b, e, k)` to `(b, k)`."""
    return torch.logsumexp(log_weights[:, :, None] + logits.log_softmax(2), 1)


def uniform(logits: Tensor) -> Logits:
    """log 1/N Σᵢ softmax(fᵢ): `(b, e, k)` to `(b, k)`."""
    return torch.logsumexp(logits.log_softmax(2), 1) - math.log(logits.shape[1])


@register("immunity")
class Immunity(Defense[Config]):
    """Immunity: gates permuted at random for every answer, experts that look at different places."""

    taxonomy = {"gating": "soft", "routing": "flat", "training": "joint", "activation": "fractional"}
    random = True
    recipes = {
        "tiny": Config(width=8, epochs=15, steps=4, heat_stage=2),
        "fast": Config(epochs=30),
        "paper": Config(),
    }

    def build(self, data: Dataset) -> Switched:
        """The mixture, untrained: of reading A, or of reading B with or without an exact expectation.

        Raises:
            UsageError: a stage is named twice in `switches`.
        """
        c = self.config
        if len(set(c.switches)) < len(c.switches):
            raise UsageError(f"switches must name each stage once, not {list(c.switches)}")
        if not c.switches:
            return Mixture(c, data)
        enumerable = math.factorial(c.experts) ** len(c.switches) <= MOST_WIRINGS
        return Enumerable(c, data) if enumerable else Switched(c, data)

    def stages(self, data: Dataset) -> Sequence[Stage]:
        """One stage; the epoch that is kept is chosen by the deployed, random model on held-out images."""
        c = self.config
        threat = Linf(c.eps or data.eps)

        def loss(model: nn.Module, x: Images, y: Labels, rng: Rng) -> Tensor:
            assert isinstance(model, Switched)
            return objective(model, x, y, c, threat, rng)

        def watch(model: nn.Module, held: HeldOut, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
            assert isinstance(model, Switched)
            seen = observe(model, *held.split.batch(slice(0, AT_ONCE), held.device))
            return {"information": seen.information, "zero_heatmaps": seen.zero}

        return [
            Stage(
                name=f"immunity-{c.variant}",
                loss=loss,
                epochs=c.epochs,
                batch_size=c.batch_size,
                lr=c.lr,
                weight_decay=c.weight_decay,
                select="robust" if c.variant == "at" else "clean",
                observe=watch,
            )
        ]


def objective(model: Switched, x: Images, y: Labels, c: Config, threat: Linf, rng: Rng) -> Tensor:
    """CE + λ₁ L_MI + λ₂ L_PS of one batch, `()`."""
    learnt, view = views(model, x, y, c, threat, rng)
    compared = c.ps > 0 and not c.anchored
    activations, logits = model.branches(torch.cat([learnt, view]) if compared else learnt)
    own = logits[: len(x)]
    weights = model.dealt(learnt) if c.permute_training else model.scores(learnt).log_softmax(1)
    total = F.nll_loss(mixed(weights, own), y)
    if c.expert_loss:
        total = total + c.expert_loss * each_loss(own, y).mean()
    if c.mi or c.ps:
        labels = y.repeat(len(logits) // len(y))
        heat = gradcam(activations, of_labels(logits, labels), differentiable=True)
        total = total + c.mi * information(heat[: len(x)])
        if compared:
            total = total + c.ps * instability(*heat.chunk(2))
        elif c.ps:
            total = total + c.ps * straying(model, heat)
    return total


def views(model: Switched, x: Images, y: Labels, c: Config, threat: Linf, rng: Rng) -> tuple[Images, Images]:
    """The images that are learnt from, and a second view of them, `(b, c, h, w)` each."""
    if c.variant == "clean":
        return x, threat.random_start(x, rng.at("view"))
    with crafting(model):
        x_adv = pgd(
            model if c.permute_training else model.as_trained,
            x,
            y,
            threat,
            rng=rng,
            steps=c.steps,
            step_size=c.step_size,
        )
    return x_adv, x


def information(heat: Tensor) -> Tensor:
    """L_MI: the mean of I(Hᵢ; Hⱼ) over the pairs of experts, `(b, e, h, w)` to `()`; 0 where there is no pair."""
    e = heat.shape[1]
    pairs = mutual_information(heat).triu(1).sum()
    return pairs * 2 / max(1, e * (e - 1))


def mutual_information(heat: Tensor) -> Tensor:
    """I(Hᵢ; Hⱼ) in nats between all experts, `(b, e, h, w)` to `(e, e)`, over the positions of all images."""
    low, high = heat.amin((2, 3), keepdim=True), heat.amax((2, 3), keepdim=True)
    values = ((heat - low) / (high - low + DELTA)).transpose(0, 1).flatten(1)
    centres = (torch.arange(BINS, device=heat.device) + 0.5) / BINS
    member = (-0.5 * ((values[:, :, None] - centres) * BINS) ** 2).softmax(2)
    joint = torch.einsum("isp,jsq->ijpq", member, member) / values.shape[1]
    apart = joint.sum(3, keepdim=True) * joint.sum(2, keepdim=True)
    return torch.xlogy(joint, joint / apart.clamp_min(torch.finfo(joint.dtype).tiny)).sum((2, 3))


def centroids(heat: Tensor) -> Tensor:
    """cᵢ: where each heatmap has its mean, `(b, e, h, w)` to `(b, e, 2)` in [0,1]², down and across."""
    h, w = heat.shape[2:]
    density = (heat + DELTA) / (heat + DELTA).sum((2, 3), keepdim=True)
    down, across = (torch.linspace(0, 1, n, device=heat.device, dtype=heat.dtype) for n in (h, w))
    return torch.stack([density.sum(3) @ down, density.sum(2) @ across], 2)


def instability(heat: Tensor, other: Tensor) -> Tensor:
    """L_PS: the mean squared distance between the centroids of two views, `(b, e, h, w)` twice to `()`."""
    return (centroids(heat) - centroids(other)).square().sum(2).mean()


def straying(model: Switched, heat: Tensor) -> Tensor:
    """L_PS of `anchored`: the mean squared distance to each expert's running mean, which moves on by this batch."""
    found = centroids(heat)
    loss = (found - model.anchors).square().sum(2).mean()
    model.anchors.lerp_(found.detach().mean(0).to(model.anchors), ANCHOR_STEP)
    return loss


@dataclass(frozen=True)
class Observed:
    """How the experts divide their attention on some images; shares in [0,1]."""

    information: float
    """L_MI, in nats"""
    zero: float
    """heatmaps that are 0 everywhere: they share no information and say nothing; more than 0.05 is too many"""
    expert_accuracy: tuple[float, ...]
    expected_weight: tuple[float, ...]
    """the gate's mean weight of each expert before it is dealt out"""
    mean_accuracy: float
    """over all N! answers, or over 10 draws where the inner gates are permuted too"""
    every_accuracy: float
    """images that each of those answers gets right"""


def observe(model: Switched, x: Images, y: Labels) -> Observed:
    """What the experts look at and how much hangs on the deal; draws from the global generator under reading B."""
    with evaluating(model), torch.enable_grad():
        activations, logits = model.with_activations(x.detach().requires_grad_())
        heat = gradcam(activations, of_labels(logits, y)).detach()
    with evaluating(model), torch.no_grad():
        answers = (model(x) for _ in range(10)) if model.switches else model.draws(x)
        right = torch.stack([answer.argmax(1) == y for answer in answers]).float()
        weights = model.scores(x).softmax(1)
    return Observed(
        information=float(information(heat)),
        zero=float((heat.amax((2, 3)) == 0).float().mean()),
        expert_accuracy=tuple((logits.argmax(2) == y[:, None]).float().mean(0).tolist()),
        expected_weight=tuple(weights.mean(0).tolist()),
        mean_accuracy=float(right.mean()),
        every_accuracy=float(right.amin(0).mean()),
    )
