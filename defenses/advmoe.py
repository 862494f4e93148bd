"""ADVMoE: robust training of a mixture of convolutional experts, one pathway an image (ICCV 2023, arXiv 2308.10110).

Zhang, Cai, Chen, Zhang, Zhang, Chen, Chang, Wang and Liu. (code) below is their program at commit c50796f.

    F(x) = f_k(x),   k = argmaxⱼ s(x)ⱼ

A router s picks one of N experts in every routed convolution; the chosen filters through depth form a pathway, a thin
network f_k. Experts φ and router ψ take turns, each minimising its own TRADES loss (Zhang et al. 2019):

    x' = argmax  KL(F(x) ‖ F(x')) + KL(s(x) ‖ s(x'))       over ‖x' - x‖∞ ≤ eps, crafted anew for each of the two
    φ:   min  CE(F(x), y) + β · KL(F(x) ‖ F(x'))
    ψ:   min  α · CE(s(x), y mod N) + β · KL(s(x) ‖ s(x'))                     (`variant="code"`; code)
    ψ:   min  CE(F(x), y) + β · KL(F(x) ‖ F(x')) on other images than φ's      (`variant="paper"`)

    N ↔ `experts`      r, a pathway's share of the dense width ↔ `ratio`      φ ↔ `backbone`      ψ, s ↔ `router`
    α ↔ `alpha`        β ↔ `beta`

The choice k is hard. Backwards, s_k gets Σ ⟨∂L/∂h, h⟩ over the outputs h of all routed convolutions, and every other
score 0 (straight-through): whether the chosen expert should speak louder, nothing of what another would have said. So a
gradient never shows that flipping the route is fatal; attack `all_outputs` and `gate` as well as the model.

Equations and settings follow (code), the abstract and the definitions; the method and result sections of the paper were
not readable to us, so no equation number is given.

Kind: hard mixture.
Cost: 180 passes of 0.19 G.
Reported: CIFAR-10, ResNet-18: Table 3 of Divided We Fall, arXiv 2512.20821 (`bench table --published`): clean 88.27 %,
    PGD-50 44.01 %, PGD-100 with three starts 42.47 %, at a radius that is not printed. The authors' abstract: 1 to 4
    points of robust accuracy above the dense network, at less than half of its cost. Accuracies above 90 % under
    attack that their code has been seen to print come from a router that is NaN, under an attack that then stands still.
Expect: digits with the recipe `tiny`, one CPU core, under a minute.
    CIFAR-10 with the recipe `paper`, 100 epochs: clean 78 to 86 %, PGD-50 at 8/255 44 to 53 % (a guess, not a run).
    5,565,450 parameters and a router of 269,202; a pathway has 2,809,866, the dense network 11,173,962.
Differs:
- Which variant is the paper's is open: it speaks of routing inside the network and of a bi-level problem; the code
  routes once an image and trains the router to tell `y mod N`. Default: `code`. Its router accuracy is supervision and
  no sign that experts specialise.
- `variant="paper"` needs something against collapse (an untrained router sends nearly all images one way): the load
  loss of Switch Transformers (Fedus et al. 2022, eq. 4) on scores brought to one size, weighed by `balance`; with 3 in
  place of 10, digits ended on one route. ψ learns through softmax(s) in place of s: no loss depends on the size of a
  score, so nothing pulls it back, and on digits it grew until it was infinite. φ and ψ each get half of a batch of
  twice the size, and twice the epochs, so the steps are as many.
- The player that does not move is in eval mode, so that its BatchNorm statistics stay; each player sees one clean and
  one adversarial pass a step. The released code feeds them 3:1 and 4:2, partly from passes whose result is unused.
- Images are crafted with everything in eval mode, the router's clean scores too, and the start is clipped to the box.
- KL is computed from log-probabilities, and a score that is NaN or infinite is an error.
- Images are normalised inside the model, for backbone and router alike; the code's default is raw pixels.
- Radii other than 8/255 keep the code's step size of 5/8 of the radius.
- The last layer's bias starts at 0, a choice of ours.
- A standard cosine, step by step, to 0; the code's is one epoch late.
- The epoch is chosen by PGD-10 on held-out training images; the code chooses on the test set.
- DWF trained its row for 200 epochs; `paper` has the code's 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from baselines.resnet import every
from baselines.resnet_cifar import CifarResNet
from bench.attacks.losses import cross_entropy
from bench.attacks.mixture import Aim
from bench.attacks.pgd import pgd
from bench.config import AtLeastOne, NotNegative, Radius, Rate, config
from bench.crafting import crafting
from bench.data import Dataset
from bench.defense import Defense, Stage, follow
from bench.divergence import kl
from bench.errors import NonFinite, UsageError
from bench.model import Normalize, evaluating
from bench.registry import register
from bench.rng import Rng
from bench.threat import Linf
from bench.types import Images, Labels, Logits


@config
class Config:
    """`eps`, `step_size` and `noise` in pixel units: the dataset's radius and 5/8 of it by default.

    `width` of the dense network's first stage, of which a pathway has the share `ratio`; the router is a CIFAR ResNet
    with `router_blocks` blocks a stage, 3 of which are ResNet-20; `noise` is the standard deviation of a start.
    """

    variant: Literal["code", "paper"] = "code"
    routing: Literal["global"] = "global"
    experts: AtLeastOne = 2
    ratio: Rate = 0.5
    width: AtLeastOne = 64
    router_width: AtLeastOne = 16
    router_blocks: AtLeastOne = 3
    alpha: NotNegative = 6.0
    beta: NotNegative = 6.0
    balance: NotNegative = 10.0
    eps: Radius | None = None
    step_size: Radius | None = None
    steps: AtLeastOne = 2
    noise: NotNegative = 0.001
    epochs: AtLeastOne = 100
    batch_size: AtLeastOne = 128
    lr: Rate = 0.1
    weight_decay: NotNegative = 5e-4


@dataclass(frozen=True)
class Routes:
    """Which expert each image of a batch takes.

    Args:
        sizes: images per expert; the batch has to be sorted by expert.
        order: that sorts it; None where it is sorted.
        through: 1 for each image of the sorted batch, `(b, 1, 1, 1)`, with the gradient of the chosen score; None where
            none is wanted.
    """

    sizes: list[int]
    order: Tensor | None = None
    through: Tensor | None = None

    @classmethod
    def hard(cls, scores: Tensor) -> Routes:
        """The largest of the scores `(b, e)`, the lowest index where several are."""
        chosen = scores.argmax(1)
        order = chosen.argsort(stable=True)
        through = None
        if scores.requires_grad:
            score = scores.gather(1, chosen[:, None]).index_select(0, order)
            through = (1 + (score - score.detach()))[:, :, None, None]
        return cls(torch.bincount(chosen, minlength=scores.shape[1]).tolist(), order, through)

    @classmethod
    def all_through(cls, expert: int, experts: int, images: int) -> Routes:
        """The same expert for every image."""
        return cls([images if j == expert else 0 for j in range(experts)])

    def sort(self, x: Tensor) -> Tensor:
        """The batch sorted by expert."""
        return x if self.order is None else x.index_select(0, self.order)

    def restore(self, h: Tensor) -> Tensor:
        """A sorted batch in the order it had."""
        return h if self.order is None else h.index_select(0, self.order.argsort())


class RoutedConv(nn.Module):
    """A 3×3 convolution with disjoint groups of filters: expert j owns the rows `j·width … (j+1)·width - 1`."""

    def __init__(self, width_in: int, width: int, stride: int, experts: int) -> None:
        super().__init__()
        self.stride = stride
        self.experts = experts
        self.weight = nn.Parameter(torch.empty(experts * width, width_in, 3, 3))

    def forward(self, h: Tensor, routes: Routes) -> Tensor:
        """The chosen expert's channels alone: a sorted `(b, width_in, h, w)` to `(b, width, h/stride, w/stride)`."""
        parts = [
            F.conv2d(part, weight, stride=self.stride, padding=1)
            for part, weight in zip(
                torch.split(h, routes.sizes), self.weight.chunk(self.experts), strict=True
            )
            if len(part) or not len(h)
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out if routes.through is None else out * routes.through.to(out.dtype)


class RoutedBlock(nn.Module):
    """Two routed convolutions; BatchNorm and shortcut belong to all experts together."""

    def __init__(self, width_in: int, width: int, stride: int, experts: int) -> None:
        super().__init__()
        self.conv1 = RoutedConv(width_in, width, stride, experts)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = RoutedConv(width, width, 1, experts)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        self.stride = stride
        if stride > 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, h: Tensor, routes: Routes) -> Tensor:
        """`(b, width_in, h, w)` to `(b, width, h/stride, w/stride)`."""
        out = F.relu(self.bn1(self.conv1(h, routes)))
        return F.relu(self.bn2(self.conv2(out, routes)) + self.shortcut(every(h, self.stride)))


class Backbone(nn.Module):
    """A ResNet-18 whose 16 3×3 convolutions behind the stem are routed; stem, 1×1 shortcuts and head are shared."""

    def __init__(self, *, channels: int, classes: int, width: int, ratio: float, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        blocks, width_in = [], width
        for stage in range(4):
            inner = int(ratio * width * 2**stage)
            for i in range(2):
                blocks.append(RoutedBlock(width_in, inner, 2 if stage > 0 and i == 0 else 1, experts))
                width_in = inner
        self.blocks = nn.ModuleList(blocks)
        self.linear = nn.Linear(width_in, classes)
        for part in self.modules():
            if isinstance(part, (nn.Conv2d, RoutedConv)):
                # the fan-out is that of all experts together, as in the released code
                nn.init.kaiming_normal_(part.weight, mode="fan_out")
        nn.init.normal_(self.linear.weight, 0, 0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, routes: Routes) -> Logits:
        """Normalised images `(b, c, h, w)`, each along its route, to logits `(b, k)`."""
        return routes.restore(self.behind_stem(self.stem(routes.sort(x)), routes))

    def every_route(self, x: Tensor) -> Tensor:
        """Normalised images along each route, `(b, e, k)`."""
        h = self.stem(x)
        return torch.stack([self._all_through(h, j) for j in range(self.experts)], 1)

    def one_route(self, x: Tensor, expert: int) -> Logits:
        """Normalised images, all along the same route, `(b, k)`."""
        return self._all_through(self.stem(x), expert)

    def _all_through(self, h: Tensor, expert: int) -> Logits:
        return self.behind_stem(h, Routes.all_through(expert, self.experts, len(h)))

    def behind_stem(self, h: Tensor, routes: Routes) -> Logits:
        """What the stem made of a sorted batch to logits `(b, k)`."""
        for block in self.blocks:
            h = block(h, routes)
        logits: Tensor = self.linear(h.mean((2, 3)))
        return logits


class RoutedNet(nn.Module):
    """Router and backbone; pixels to logits."""

    soft = False

    def __init__(self, config: Config, data: Dataset) -> None:
        super().__init__()
        channels, classes = data.shape[0], len(data.classes)
        self.experts_count = config.experts
        self.alpha = config.alpha
        self.normalize = Normalize(data.mean, data.std)
        self.backbone = Backbone(
            channels=channels,
            classes=classes,
            width=config.width,
            ratio=config.ratio,
            experts=config.experts,
        )
        self.router = CifarResNet(
            config.router_blocks,
            channels=channels,
            classes=config.experts,
            width=config.router_width,
            shortcut="A",
        )

    def forward(self, x: Images) -> Logits:
        """`(b, c, h, w)` to `(b, k)`, with the straight-through gradient of the scores."""
        return self.routed(x, self.gate(x))

    def routed(self, x: Images, scores: Tensor) -> Logits:
        """The logits `(b, k)` along the routes that the scores `(b, e)` choose."""
        return self.backbone(self.normalize(x), Routes.hard(scores))  # type: ignore[no-any-return]

    def gate(self, x: Images) -> Tensor:
        """Scores `(b, e)`.

        Raises:
            NonFinite: a score is NaN or infinite; argmax would call it expert 0.
        """
        scores: Tensor = self.router(self.normalize(x))
        finite = scores.isfinite().all(1)
        if not finite.all():
            raise NonFinite("the router's scores", (~finite).nonzero().flatten().tolist())
        return scores

    def all_outputs(self, x: Images) -> Tensor:
        """Every pathway's logits, `(b, e, k)`; in eval mode, since BatchNorm would learn from all of them."""
        return self.backbone.every_route(self.normalize(x))

    def one_output(self, x: Images, expert: int) -> Logits:
        """One pathway's logits, `(b, k)`."""
        return self.backbone.one_route(self.normalize(x), expert)

    def selected(self, x: Images) -> Tensor:
        """The expert of the largest score, the lowest of several, `(b,)`."""
        return self.gate(x).argmax(1)

    def legacy_aims(self) -> dict[str, Aim]:
        """What the authors' code ascends to evaluate: CE(F(x), y) + α · CE(s(x), y mod N), straight-through."""
        e = self.experts_count

        def output(x: Images) -> Tensor:
            scores = self.gate(x)
            return torch.cat([self.routed(x, scores), scores], 1)

        def loss(found: Tensor, y: Labels) -> Tensor:
            return cross_entropy(found[:, :-e], y) + self.alpha * cross_entropy(found[:, -e:], y % e)

        return {"router": Aim(output, loss, lambda found, y: found[:, :-e].argmax(1) != y)}


@register("advmoe")
class ADVMoE(Defense[Config]):
    """ADVMoE: a router, one pathway an image, alternating TRADES updates (ICCV 2023)."""

    taxonomy = {"gating": "hard", "routing": "flat", "training": "alternating", "activation": "sparse"}
    recipes = {
        "tiny": Config(width=12, router_width=4, router_blocks=1, epochs=12, batch_size=64, lr=0.03),
        "fast": Config(epochs=30),
        "paper": Config(),
    }
    published_as = "ADVMoE"

    def build(self, data: Dataset) -> RoutedNet:
        """Router and backbone, untrained.

        Raises:
            UsageError: a pathway would have no channel.
        """
        c = self.config
        if int(c.ratio * c.width) < 1:
            raise UsageError(
                f"a pathway has int(ratio · width) = int({c.ratio:g} · {c.width}) = 0 channels; it needs at least 1, so raise one of them"
            )
        return RoutedNet(c, data)

    def stages(self, data: Dataset) -> Sequence[Stage]:
        """One stage in which experts and router take turns."""
        c = self.config
        threat = Linf(c.eps or data.eps)
        players = 2 if c.variant == "paper" else 1

        def update(model: nn.Module, x: Images, y: Labels, rng: Rng, optimisers: Sequence[SGD]) -> Tensor:
            assert isinstance(model, RoutedNet)
            (first, y_first), (last, y_last) = _of_each(x, y, players)
            of_experts, of_router = optimisers
            x_adv = crafted(model, first, threat, c, rng.at("experts"))
            loss = experts_loss(model, first, x_adv, y_first, c)
            moved(loss, of_experts)
            x_adv = crafted(model, last, threat, c, rng.at("router"))
            judged = router_loss if c.variant == "code" else mixture_loss
            other = judged(model, last, x_adv, y_last, c)
            moved(other, of_router)
            # a NaN in either must reach the trainer, which stops at it
            return loss.detach() + other.detach()

        return [
            Stage(
                name="advmoe",
                update=update,
                epochs=players * c.epochs,
                batch_size=players * c.batch_size,
                lr=c.lr,
                weight_decay=c.weight_decay,
                groups=lambda model: [
                    list(model.backbone.parameters()),  # type: ignore[union-attr]
                    list(model.router.parameters()),  # type: ignore[union-attr]
                ],
                select="robust",
            )
        ]


def crafted(model: RoutedNet, x: Images, threat: Linf, c: Config, rng: Rng) -> Images:
    """The images `x'` whose logits and scores are furthest from those of `x`, `(b, c, h, w)`."""

    def both(images: Images) -> Tensor:
        scores = model.gate(images)
        return torch.cat([model.routed(images, scores), scores], 1)

    def divergence(now: Tensor, clean: Tensor) -> Tensor:
        e = model.experts_count
        return kl(clean[:, :-e], now[:, :-e]) + kl(clean[:, -e:], now[:, -e:])

    with crafting(model):
        with torch.no_grad():
            clean = both(x)
        return pgd(
            both,
            x,
            clean,  # in place of labels: what an image is to be driven away from
            threat,
            rng=rng,
            loss=divergence,
            steps=c.steps,
            step_size=5 / 8 * threat.eps if c.step_size is None else c.step_size,
            start=x + c.noise * rng.at("noise").normal(x),
        )


def experts_loss(model: RoutedNet, x: Images, x_adv: Images, y: Labels, c: Config) -> Tensor:
    """What φ minimises; the router chooses as it would when deployed, and learns nothing."""
    with evaluating(model.router), torch.no_grad():
        scores, scores_adv = model.gate(x), model.gate(x_adv)
    return trades(model.routed(x, scores), model.routed(x_adv, scores_adv), y, c.beta)


def router_loss(model: RoutedNet, x: Images, x_adv: Images, y: Labels, c: Config) -> Tensor:
    """What ψ minimises in the released code: the backbone has no part in it."""
    scores, scores_adv = model.gate(x), model.gate(x_adv)
    return c.alpha * F.cross_entropy(scores, y % c.experts) + c.beta * kl(scores, scores_adv).mean()


def mixture_loss(model: RoutedNet, x: Images, x_adv: Images, y: Labels, c: Config) -> Tensor:
    """What ψ minimises in the paper's words: the loss of the whole, through the straight-through scores."""
    scores, scores_adv = model.gate(x), model.gate(x_adv)
    model.backbone.requires_grad_(False)
    with evaluating(model.backbone):
        # the largest score has the largest probability, and a probability cannot grow without end
        logits, logits_adv = (
            model.routed(x, scores.softmax(1)),
            model.routed(x_adv, scores_adv.softmax(1)),
        )
    model.backbone.requires_grad_(True)
    return trades(logits, logits_adv, y, c.beta) + c.balance * load_loss(scores)


def trades(logits: Logits, logits_adv: Logits, y: Labels, beta: float) -> Tensor:
    """Mean CE on clean images + β · mean KL(clean ‖ adversarial), with gradients to both sides of the KL."""
    return F.cross_entropy(logits, y) + beta * kl(logits, logits_adv).mean()


def load_loss(scores: Tensor) -> Tensor:
    """N · Σⱼ (share of images that expert j gets) · (its mean probability): 1 when balanced, more when not.

    The probabilities are those of scores brought to one size: a collapsed router is sure of itself, and the softmax of its
    scores as they are has no slope.
    """
    experts = scores.shape[1]
    share = F.one_hot(scores.argmax(1), experts).to(scores.dtype).mean(0)
    size = (scores - scores.mean(1, keepdim=True)).abs().mean().detach().clamp_min(1e-6)
    return experts * (share * (scores / size).softmax(1).mean(0)).sum()


def moved(loss: Tensor, optimiser: SGD) -> None:
    """One step of one player."""
    follow(loss, [optimiser])
    # autocast keeps the weights it has cast until its context ends, and these have just changed
    torch.clear_autocast_cache()


def _of_each(x: Images, y: Labels, players: int) -> list[tuple[Images, Labels]]:
    """Each player's images and labels: the same for both, or a half each."""
    if players == 1:
        return [(x, y), (x, y)]
    half = len(x) // 2
    return [(x[:half], y[:half]), (x[half:], y[half:])]
