"""Sparse mixtures inside a network's last stage, adversarially trained ("Robust Experts", ICCV workshops 2025, arXiv 2509.05086).

The paper's text was readable in part; what is marked (code) follows the authors' program at commit ed22e81.

    h' = Σ_{e ∈ top-k of s(h)} w_e E_e(h),   p = softmax(s(h))                                    one sparse layer
    w_e = 1, with the gradient of p_e                     for k = 1: straight-through (code)
    w_e = p_e / Σ_{chosen} p                              for k > 1 (code)

An expert E_e is a residual block or a convolution of the last stage of a ResNet-18, and s a router at the layer's input:
a linear layer on the channels' means, or a 3×3 convolution whose outputs are averaged over positions (code). Images are
routed one by one, each layer anew. Training is PGD-AT of the whole, with a loss against unequal use of the experts:

    min  CE(F(x'), y) + λ L_balance,   x' = argmax CE(F(x'), y) over ‖x' - x‖∞ ≤ eps
    `switch`    E Σₑ (share of images that e gets) · (its mean probability) - 1                    (code)
    `entropy`   mean entropy of an image's p - entropy of the mean p                               (code)
    `column`    - entropy of the mean p                                                            (code)

    E ↔ `experts`      k ↔ `top`      λ ↔ `balance_weight`      BlockMoE, ConvMoE ↔ `layer`      GALRN, CGARN ↔ `router`

The choice is hard: PGD follows the experts that are chosen and never learns what another would have said. For k = 1 the
network is therefore a hard mixture of its routes, one expert a layer, to the attacks on mixtures: route r's score is how
far its experts lag behind the best of their layers, summed over the layers, so that the route with the largest score, 0,
is the one that is taken. Asking all routes takes Eᴸ passes of the last stage. With more than 64 of them (four
convolutions of four experts), or k > 1, the network does not pose as a mixture and PGD and AutoAttack are all there is;
prefer `where="layer4.1"`, of which one block or two convolutions are sparse.

Kind: hard mixture.
Cost: 240 passes of 0.56 G.
Reported: CIFAR-100, ResNet-18, 8/255, from the plotting script (code), clean / PGD-20 / AutoPGD in %: dense 52.14 /
    16.87 / 17.99; blocks, entropy, linear router 51.76 / 19.75 / 22.31; blocks, switch 51.36 / 22.69 / 21.22;
    convolutions, entropy 50.96 / 25.03 / 24.03. AutoPGD above PGD-20 there means that it ran weaker than it should, so
    take these as upper bounds. The authors: under the switch loss a few experts take all images, and these alone are
    more robust than the whole; `observe` says so or not.
Expect: digits with the recipe `tiny`, one CPU core, under a minute; on training images that were held out, clean 99 %,
    PGD-20 86 %. The first sparse layer sends every image to one expert, the entropy loss notwithstanding, the second uses all four.
    CIFAR-10 with the recipe `paper`: as a PGD-AT ResNet-18, within two points (a guess, not a run).
Differs:
- Of the three ways of adversarial training in the code only PGD-7 is built; its Free variant adds the balancing loss twice.
- Random crop and mirroring without colour jitter; a cosine in place of a polynomial schedule.
- A layer's balancing losses are averaged over the layers.
- With `switch`, training adds noise to the scores, brought to variance 1 over the batch, and no expert takes more than
  `capacity` times its fair share, in the order of the batch; an image that is turned away goes to its next choice. In eval
  mode, attacks included, there is neither (code: as here, but which images are turned away was not readable).
- An expert that gets a single image in training normalises it by its running statistics: one image has no variance.
- A router's softmax is taken once; the code takes a second one to rank with, which changes no rank.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.resnet import BasicBlock, every, resnet18
from bench.attacks.pgd import pgd
from bench.config import AtLeastOne, NotNegative, Radius, Rate, config
from bench.crafting import crafting
from bench.data import Dataset
from bench.defense import Defense, Stage
from bench.errors import NonFinite, UsageError
from bench.model import Normalize, evaluating
from bench.registry import register
from bench.rng import Rng
from bench.threat import Linf
from bench.types import Images, Labels, Logits

#: the most routes that are asked one by one
MOST_ROUTES = 64


@config
class Config:
    """`eps` and `step_size` in pixel units: the dataset's radius and a quarter of it by default.

    `noise` is a standard deviation, of scores brought to variance 1; `capacity` is in units of a fair share.
    """

    layer: Literal["block", "conv"] = "block"
    where: Literal["layer4", "layer4.1"] = "layer4"
    router: Literal["linear", "conv"] = "linear"
    experts: AtLeastOne = 4
    top: AtLeastOne = 1
    balance: Literal["switch", "entropy", "column"] = "entropy"
    balance_weight: NotNegative = 0.5
    noise: NotNegative = 0.1
    capacity: Rate = 1.5
    eps: Radius | None = None
    step_size: Radius | None = None
    steps: AtLeastOne = 7
    width: AtLeastOne = 64
    epochs: AtLeastOne = 100
    batch_size: AtLeastOne = 128
    lr: Rate = 0.1
    weight_decay: NotNegative = 5e-4


@dataclass
class Journey:
    """One pass through the sparse layers: what their routers said, and whom they were told to ask, if they were told."""

    forced: Sequence[int] | None = None
    """an expert for each layer"""
    scores: list[Tensor] = field(default_factory=list)
    """of each layer, `(b, e)`"""
    chosen: list[Tensor] = field(default_factory=list)
    """of each layer, int64 `(b, k)`"""


class SparseLayer(nn.Module):
    """Experts of one form and a router that asks `top` of them for each image."""

    def __init__(self, make: Callable[[], nn.Module], width_in: int, config: Config) -> None:
        super().__init__()
        self.top = config.top
        self.noise, self.capacity = config.noise, config.capacity
        self.limited = config.balance == "switch"
        self.experts = nn.ModuleList(make() for _ in range(config.experts))
        self.averaged_first = config.router == "linear"
        self.router: nn.Module = (
            nn.Linear(width_in, config.experts)
            if self.averaged_first
            else nn.Conv2d(width_in, config.experts, 3, padding=1)
        )

    def forward(self, h: Tensor, journey: Journey) -> Tensor:
        """`(b, c, h, w)` to what the experts make of it, weighed."""
        scores = self.scores(h)
        if journey.forced is not None:
            expert = journey.forced[len(journey.scores)]
            chosen = scores.new_full((len(h), 1), expert, dtype=torch.long)
            weights = torch.ones_like(scores[:, :1])
        else:
            chosen = self.choose(scores)
            weights = of_chosen(scores, chosen)
        journey.scores.append(scores)
        journey.chosen.append(chosen)
        return self.dispatch(h, chosen, weights)

    def scores(self, h: Tensor) -> Tensor:
        """What the router thinks of each expert, `(b, e)`.

        Raises:
            NonFinite: a score is NaN or infinite; top-k would take that expert for the best.
        """
        scores: Tensor = self.router(h.mean((2, 3))) if self.averaged_first else self.router(h).mean((2, 3))
        finite = scores.isfinite().all(1)
        if not finite.all():
            raise NonFinite("the router's scores", (~finite).nonzero().flatten().tolist())
        return scores

    def choose(self, scores: Tensor) -> Tensor:
        """The experts of each image, int64 `(b, k)`: those of the largest scores, the best first."""
        if not (self.training and self.limited):
            # stable, so that a tie goes to the lowest index, as in argmax
            return scores.argsort(dim=1, descending=True, stable=True)[:, : self.top]
        spread = scores.detach() - scores.detach().mean()
        spread = spread / spread.square().mean().sqrt().clamp_min(1e-6)
        return within_capacity(spread + self.noise * torch.randn_like(spread), self.top, self.capacity)

    def dispatch(self, h: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Each expert on its own images, put together in the order they came in; `chosen` and `weights` are `(b, k)`."""
        out: Tensor | None = None
        for e, expert in enumerate(self.experts):
            rows, place = (chosen == e).nonzero(as_tuple=True)
            if len(rows) == 0 and (len(h) or e):
                continue
            # one image has no variance, and BatchNorm refuses it where it is one pixel
            with evaluating(expert) if len(rows) == 1 else nullcontext():
                part = expert(h[rows])
            part = part * weights[rows, place].to(part.dtype)[:, None, None, None]
            out = part.new_zeros(len(h), *part.shape[1:]) if out is None else out
            out = out.index_add(0, rows, part)
        assert out is not None
        return out


class SparseBlock(nn.Module):
    """A basic block whose two convolutions are sparse layers; BatchNorm and shortcut belong to all experts together."""

    def __init__(self, width_in: int, width: int, stride: int, config: Config) -> None:
        super().__init__()
        first = partial(nn.Conv2d, width_in, width, 3, stride, 1, bias=False)
        second = partial(nn.Conv2d, width, width, 3, 1, 1, bias=False)
        plain = BasicBlock(width_in, width, stride, 1)
        self.conv1, self.bn1 = SparseLayer(first, width_in, config), plain.bn1
        self.conv2, self.bn2 = SparseLayer(second, width, config), plain.bn2
        self.shortcut, self.stride = plain.shortcut, stride

    def forward(self, h: Tensor, journey: Journey) -> Tensor:
        """`(b, width_in, h, w)` to `(b, width, h/stride, w/stride)`."""
        out = F.relu(self.bn1(self.conv1(h, journey)))
        return F.relu(self.bn2(self.conv2(out, journey)) + self.shortcut(every(h, self.stride)))


class SparseNet(nn.Module):
    """A ResNet-18 whose last blocks are sparse; pixels to logits."""

    def __init__(self, config: Config, data: Dataset) -> None:
        super().__init__()
        plain = resnet18(channels=data.shape[0], classes=len(data.classes), width=config.width)
        self.normalize = Normalize(data.mean, data.std)
        self.body = nn.Sequential(plain.conv1, plain.bn1, nn.ReLU(), plain.layer1, plain.layer2, plain.layer3)
        inner, outer = 4 * config.width, 8 * config.width
        blocks = [(inner, outer, 2), (outer, outer, 1)]
        if config.where == "layer4.1":
            self.body.append(plain.layer4[0])
            blocks = blocks[1:]
        self.tail = nn.ModuleList(
            SparseLayer(partial(BasicBlock, *block, 1), block[0], config)
            if config.layer == "block"
            else SparseBlock(*block, config)
            for block in blocks
        )
        self.linear = plain.linear

    def forward(self, x: Images) -> Logits:
        """`(b, c, h, w)` to `(b, k)`."""
        return self.travelled(x)[0]

    def travelled(self, x: Images, forced: Sequence[int] | None = None) -> tuple[Logits, Journey]:
        """The logits `(b, k)` and how they came about; `forced` names an expert for each layer in place of the routers."""
        return self.behind_body(self.body(self.normalize(x)), forced)

    def behind_body(self, h: Tensor, forced: Sequence[int] | None = None) -> tuple[Logits, Journey]:
        """The same from what the dense part made of the images."""
        journey = Journey(forced)
        for block in self.tail:
            h = block(h, journey)
        return self.linear(h.mean((2, 3))), journey

    def sparse_layers(self) -> list[SparseLayer]:
        """The layers that route, in the order in which an image meets them."""
        return [part for part in self.modules() if isinstance(part, SparseLayer)]


class RoutedNet(SparseNet):
    """One whose layers ask one expert each, and whose routes are few enough to be asked one by one."""

    soft = False

    def __init__(self, config: Config, data: Dataset) -> None:
        super().__init__(config, data)
        layers = len(self.sparse_layers())
        self.routes = list(itertools.product(range(config.experts), repeat=layers))
        self.experts_count = len(self.routes)

    def every_route(self, x: Images) -> tuple[Tensor, Logits]:
        """How far each route lags behind, `(b, r)`, at most 0; and its logits, `(b, r, k)`; in eval mode."""
        h = self.body(self.normalize(x))
        lags, outputs = [], []
        for route in self.routes:
            logits, journey = self.behind_body(h, route)
            behind = [s[:, e] - s.amax(1) for s, e in zip(journey.scores, route, strict=True)]
            lags.append(torch.stack(behind).sum(0))
            outputs.append(logits)
        return torch.stack(lags, 1), torch.stack(outputs, 1)

    def gate(self, x: Images) -> Tensor:
        """How far each route lags behind the experts that it meets, `(b, r)`; 0 for the one that is taken."""
        return self.every_route(x)[0]

    def all_outputs(self, x: Images) -> Tensor:
        """Every route's logits, `(b, r, k)`; in eval mode, since BatchNorm would learn from all of them."""
        return self.every_route(x)[1]

    def selected(self, x: Images) -> Tensor:
        """The route that is taken, `(b,)`."""
        route = torch.zeros(len(x), dtype=torch.long, device=x.device)
        for layer, chosen in zip(self.sparse_layers(), self.travelled(x)[1].chosen, strict=True):
            route = route * len(layer.experts) + chosen[:, 0]
        return route


def of_chosen(scores: Tensor, chosen: Tensor) -> Tensor:
    """What the chosen experts weigh, `(b, k)`: 1 with the gradient of its probability for one, shares for more."""
    own = scores.softmax(1).gather(1, chosen)
    if chosen.shape[1] == 1:
        return 1 + (own - own.detach())
    return own / own.sum(1, keepdim=True)


def within_capacity(scores: Tensor, top: int, capacity: float) -> Tensor:
    """The experts of each image, int64 `(b, k)`, none asked by more than `capacity` fair shares of the batch.

    First choices are served before second ones, each in the order of the batch. An image that no expert has room for
    (with k > 1 that can happen) goes where it wants.
    """
    b, experts = scores.shape
    room = math.ceil(capacity * b * top / experts)
    served = torch.zeros_like(scores, dtype=torch.bool)
    for choice in scores.argsort(dim=1, descending=True, stable=True).T:
        asking = F.one_hot(choice, experts).bool() & (served.sum(1, keepdim=True) < top)
        served |= asking & (asking.cumsum(0) + served.sum(0) <= room)
    ahead = scores.amax() - scores.amin() + 1
    return (scores + ahead * served).topk(top, dim=1).indices


def switch_loss(scores: Tensor, top: int = 1) -> Tensor:
    """E Σₑ (its share of what is asked) · (its mean probability) - 1, `(b, e)` to `()`: 0 when both are even."""
    experts = scores.shape[1]
    share = F.one_hot(scores.topk(top, dim=1).indices, experts).to(scores.dtype).mean((0, 1))
    return experts * (share * scores.softmax(1).mean(0)).sum() - 1


def column_loss(scores: Tensor) -> Tensor:
    """Minus the entropy of the mean probabilities, `(b, e)` to `()`: least, -log E, when they are even."""
    spread: Tensor = torch.special.entr(scores.softmax(1).mean(0)).sum()
    return -spread


def entropy_loss(scores: Tensor) -> Tensor:
    """The mean entropy of an image's probabilities, less the entropy of their mean: least when each is sure and all are used."""
    log_p = scores.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).mean() + column_loss(scores)


@register("sparse_moe")
class SparseMoE(Defense[Config]):
    """Robust Experts: sparse mixtures in the last stage of an adversarially trained ResNet-18."""

    taxonomy = {"gating": "hard", "routing": "layered", "training": "joint", "activation": "sparse"}
    recipes = {
        "tiny": Config(width=8, epochs=30, steps=4),
        "fast": Config(epochs=30),
        "paper": Config(batch_size=640),
    }

    def build(self, data: Dataset) -> SparseNet:
        """The network, untrained; a hard mixture of its routes where these can be asked one by one.

        Raises:
            UsageError: more experts are to be asked than there are.
        """
        c = self.config
        if c.top > c.experts:
            raise UsageError(f"top={c.top} asks for more than the {c.experts} expert(s) there are; lower it")
        layers = (1 if c.where == "layer4.1" else 2) * (2 if c.layer == "conv" else 1)
        routed = c.top == 1 and c.experts**layers <= MOST_ROUTES
        return RoutedNet(c, data) if routed else SparseNet(c, data)

    def stages(self, data: Dataset) -> Sequence[Stage]:
        """One stage; the epoch with the best held-out accuracy under PGD-10 is kept."""
        c = self.config
        threat = Linf(c.eps or data.eps)

        def loss(model: nn.Module, x: Images, y: Labels, rng: Rng) -> Tensor:
            assert isinstance(model, SparseNet)
            with crafting(model):
                x_adv = pgd(model, x, y, threat, rng=rng, steps=c.steps, step_size=c.step_size)
            logits, journey = model.travelled(x_adv)
            return F.cross_entropy(logits, y) + c.balance_weight * balancing(journey, c)

        return [
            Stage(
                name=f"sparse-{c.balance}",
                loss=loss,
                epochs=c.epochs,
                batch_size=c.batch_size,
                lr=c.lr,
                weight_decay=c.weight_decay,
                select="robust",
            )
        ]


def balancing(journey: Journey, c: Config) -> Tensor:
    """L_balance, the mean over the layers, `()`."""
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "switch": partial(switch_loss, top=c.top),
        "entropy": entropy_loss,
        "column": column_loss,
    }
    # under bf16 the entropies of sure routers would round to 0
    return torch.stack([losses[c.balance](scores.float()) for scores in journey.scores]).mean()


@dataclass(frozen=True)
class Observed:
    """How the experts are used on some images; shares in [0,1]."""

    accuracy: float
    load: tuple[tuple[float, ...], ...]
    """layer by layer, the share of images that each expert gets"""
    fixed_accuracy: dict[tuple[int, ...], float]
    """of each route for all images, whatever the routers say; none where the routes are too many"""


@torch.no_grad()
def observe(model: SparseNet, x: Images, y: Labels) -> Observed:
    """Who was asked, and how each route would do alone: the paper's "robust experts" are those that beat the whole."""
    with evaluating(model):
        logits, journey = model.travelled(x)
        fixed = {}
        if isinstance(model, RoutedNet):
            right = model.all_outputs(x).argmax(2) == y[:, None]
            fixed = dict(zip(model.routes, right.float().mean(0).tolist(), strict=True))
    load = tuple(
        tuple(F.one_hot(chosen, scores.shape[1]).float().sum(1).mean(0).tolist())
        for chosen, scores in zip(journey.chosen, journey.scores, strict=True)
    )
    return Observed(float((logits.argmax(1) == y).float().mean()), load, fixed)
