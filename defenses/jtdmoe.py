"""JTDMoE: a standard and a robust mixture of experts, answering together and trained in turns (ICML 2025).

Zhang, Xu, Hu and Wang, Optimizing Robustness and Accuracy in Mixture of Experts: A Dual-Model Approach, PMLR
267:76436-76450, arXiv 2502.06832. (code) is their program at commit 30ef94d; the paper's equations were not readable to us.

    F_D(x) = (1-α) F_S(x) + α F_R(x)                           F_S, F_R: mixtures as in RT-ER, `defenses/rter.py`

    lower:  θ_R* = argmin  CE(F_R(x + d), y) + β/B · Σᵢ Σₙ KL(p_Ri(xₙ) ‖ p_Ri(xₙ + dᵢₙ))     over all E experts (code)
    upper:  θ_S  = argmin  CE((1-α) F_S(x) + α F_R*(x), y)                                    on clean images

One step of each on every batch: d is PGD's against F_R, dᵢ PGD's against expert i alone, and θ_R moves; then θ_S moves, with
θ_R and its BatchNorm statistics at rest. Each has an optimiser of its own.

    α ↔ `alpha`      F_S ↔ `standard`      F_R ↔ `robust`      β ↔ `beta`      E ↔ `experts`      d, dᵢ ↔ `crafted`

`mix` says what α weighs: `logits` (code), or `probabilities`, for which alone the paper's bound holds. `deployed_alpha` is
the α that the model answers with, where that is not the one it was trained with: it changes no weight.

Two hard mixtures of E experts are one of E² pairs, and that is how attacks on mixtures see them: the scores of a pair are the
sum of its experts', its logits what the two make together. Two soft ones are one of 2E.

Kind: hard mixture.
Cost: 360 passes of 1.1 G.
Reported: no figure of the dual model was readable to us.
Expect: digits with the recipe `tiny` (two experts in each mixture), one CPU core, under a minute. CIFAR-10, recipe `sgd`, α = 0.7: clean 82 to 88 %,
    AutoAttack 35 to 47 % (a guess, not a run). 67 passes of an expert a step.
Differs: what RT-ER's file says, and
- Two optimisers. The released script has one, and clears gradients only after the step of θ_R, so that the step of θ_S is
  taken twice.
- Both begin untrained.
- The epoch is chosen by PGD-10 against F_D on held-out training images, with the α of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from bench.attacks.pgd import pgd
from bench.certify import Certificate, dual_radius, gate_slopes, margin, pixel_rows
from bench.config import Number, config
from bench.crafting import crafting
from bench.data import Dataset
from bench.defense import Defense, Stage
from bench.divergence import kl
from bench.model import evaluating
from bench.moe import each_loss
from bench.registry import register
from bench.rng import Rng
from bench.threat import Linf
from bench.types import Images, Labels, Logits
from defenses import rter
from defenses.rter import MoE, counted, crafted, learning, move

#: a number in [0,1]
Share = Annotated[Number, Field(ge=0, le=1)]


@config
class Config(rter.Config):
    """What RT-ER has, for both mixtures; `alpha` is the robust one's share."""

    alpha: Share = 0.7
    deployed_alpha: Share | None = None
    mix: Literal["logits", "probabilities"] = "logits"


class Dual(nn.Module):
    """The two mixtures; pixels to logits."""

    def __init__(self, config: Config, data: Dataset) -> None:
        super().__init__()
        self.standard = MoE(config, data)
        self.robust = MoE(config, data)
        self.mix = config.mix
        self.alpha = config.alpha if config.deployed_alpha is None else config.deployed_alpha
        self.soft = self.robust.soft
        self.mixes_probabilities = self.soft and config.mix == "probabilities"
        self.experts_count = 2 * config.experts if self.soft else config.experts**2

    def forward(self, x: Images) -> Logits:
        """F_D, `(b, c, h, w)` to `(b, k)`."""
        return self.mixed(self.standard(x), self.robust(x))

    def mixed(self, of_standard: Logits, of_robust: Logits) -> Logits:
        """What two models' logits, `(…, k)`, come to."""
        if self.mix == "logits":
            return (1 - self.alpha) * of_standard + self.alpha * of_robust
        shares = self.shares(of_robust)
        return torch.logaddexp(shares[0] + of_standard.log_softmax(-1), shares[1] + of_robust.log_softmax(-1))

    def shares(self, like: Tensor) -> Tensor:
        """The logarithms of 1-α and α, `(2,)`."""
        return like.new_tensor([1 - self.alpha, self.alpha]).log()

    def gate(self, x: Images) -> Tensor:
        """Scores `(b, e²)` of the pairs, the robust expert running faster; soft: of all experts, `(b, 2e)`."""
        of_standard, of_robust = self.standard.gate(x), self.robust.gate(x)
        if self.soft:
            shares = self.shares(of_robust)
            return torch.cat(
                [shares[0] + of_standard.log_softmax(1), shares[1] + of_robust.log_softmax(1)], 1
            )
        return (of_standard[:, :, None] + of_robust[:, None, :]).flatten(1)

    def all_outputs(self, x: Images) -> Tensor:
        """Every pair's logits `(b, e², k)`; soft: every expert's, `(b, 2e, k)`."""
        of_standard, of_robust = self.standard.all_outputs(x), self.robust.all_outputs(x)
        if self.soft:
            return torch.cat([of_standard, of_robust], 1)
        return self.mixed(of_standard[:, :, None], of_robust[:, None, :]).flatten(1, 2)

    def one_output(self, x: Images, expert: int) -> Logits:
        """One pair's logits, `(b, k)`; soft: one expert's."""
        e = self.standard.experts_count
        if self.soft:
            mixture, own = (self.standard, expert) if expert < e else (self.robust, expert - e)
            return mixture.one_output(x, own)
        return self.mixed(self.standard.one_output(x, expert // e), self.robust.one_output(x, expert % e))

    def selected(self, x: Images) -> Tensor:
        """The pair, or of soft mixtures the expert, that weighs most, `(b,)`."""
        return self.gate(x).argmax(1)

    def route_radius(self, x: Images) -> Tensor:
        """How far off, in L∞, the nearest turn of either route is, `(b,)`; the box is left out of account."""
        return torch.minimum(self.standard.route_radius(x), self.robust.route_radius(x))

    @torch.no_grad()
    def certificate(self, x: Images) -> Certificate:
        """The radius within which the robust model holds the answer whatever the standard one says, in eval mode."""
        if self.mix == "logits":
            return Certificate.none(
                "the bound is for a mix of probabilities, and logits have no largest value"
            )
        single = self.robust.certificate(x)
        slopes = self.robust.slopes()
        if single.radius is None or slopes is None:
            return single
        weights, gate = self.robust.gate(x).softmax(1), gate_slopes(pixel_rows(self.robust.gate, x))
        margins = margin(self.robust(x).softmax(1))
        return Certificate(dual_radius(margins, weights, gate, slopes.to(weights), self.alpha), single.about)


@register("jtdmoe")
class JTDMoE(Defense[Config]):
    """JTDMoE: a standard and a robust mixture answer together, trained in turns (ICML 2025)."""

    taxonomy = {"gating": "hard", "routing": "dual", "training": "alternating", "activation": "single"}
    recipes = {
        "tiny": Config(experts=2, width=8, steps=3, epochs=8, batch_size=32),
        "fast": Config(epochs=30),
        "sgd": Config(drops=(100, 105)),
        "paper": Config(optimiser="adam", epochs=130, batch_size=512, lr=1e-4, weight_decay=0.0),
    }
    #: settings that no weight depends on
    evaluation_only: ClassVar[frozenset[str]] = frozenset({"deployed_alpha"})

    def build(self, data: Dataset) -> Dual:
        """Both mixtures, untrained; raises as RT-ER's does."""
        return Dual(self.config, data)

    def stages(self, data: Dataset) -> Sequence[Stage]:
        """One stage in which the two take turns."""
        c = self.config
        threat = Linf(c.eps or data.eps)
        memory: dict[str, Any] = {"epochs": 0}

        def update(model: nn.Module, x: Images, y: Labels, rng: Rng, optimisers: Sequence[SGD]) -> Tensor:
            assert isinstance(model, Dual)
            # while it learns it answers as it is trained, so that no weight, nor the epoch kept, depends on another alpha
            model.alpha = c.alpha
            of_standard, of_robust = optimisers
            lower = lower_loss(model.robust, x, y, c, threat, rng)
            move(lower, [of_robust], c, memory["epochs"])
            upper = upper_loss(model, x, y)
            move(upper, [of_standard], c, memory["epochs"])
            return lower.detach() + upper.detach()

        return [
            Stage(
                name="jtdmoe",
                update=update,
                epochs=c.epochs,
                batch_size=c.batch_size,
                lr=c.lr,
                weight_decay=c.weight_decay,
                groups=lambda model: [learning(part, c) for part in (model.standard, model.robust)],  # type: ignore[arg-type]
                select="robust",
                observe=counted(memory),
                memory=memory,
            )
        ]


def lower_loss(model: MoE, x: Images, y: Labels, c: Config, threat: Linf, rng: Rng) -> Tensor:
    """What θ_R minimises on one batch, `()`; PGD-AT of the robust mixture where β is 0."""
    x_adv = crafted(model, model, x, y, c, threat, rng.at("mixture"))
    if c.beta == 0:
        return F.cross_entropy(model(x_adv), y)
    experts = model.experts_count
    with crafting(model):
        own = pgd(
            model.own_outputs,
            x.repeat(1, experts, 1, 1),
            y,
            threat,
            rng=rng.at("experts"),
            # experts share no weight, so the sum gives each image the gradient of its own
            loss=lambda logits, labels: each_loss(logits, labels).sum(1),
            steps=c.steps,
            step_size=c.step_size,
        )
    shown = torch.cat([x_adv.repeat(1, experts, 1, 1), x.repeat(1, experts, 1, 1), own])
    of_adv, of_clean, of_own = model.own_outputs(shown).chunk(3)
    stability = kl(of_clean, of_own).sum(1)
    return F.cross_entropy(model.answer(model.gate(x_adv), of_adv), y) + c.beta * stability.mean()


def upper_loss(model: Dual, x: Images, y: Labels) -> Tensor:
    """What θ_S minimises on one batch, `()`: the two models' together, the robust one as it is."""
    with evaluating(model.robust), torch.no_grad():
        of_robust = model.robust(x)
    return F.cross_entropy(model.mixed(model.standard(x), of_robust), y)
