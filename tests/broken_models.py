"""A zoo of models whose verdict is known: honest ones, and every way we know to look robust without being so.

`ZOO` maps a name to a `Specimen`: how it is made of an honest network, what the audit must come to, and which findings
the model contract and the gradient checks owe it. `images()` are the digits that all of them were made for.
"""

import os
import random
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from bench import data
from bench.attacks.pgd import pgd
from bench.model import evaluating
from bench.rng import Rng
from bench.threat import Linf

CLASSES = 10
EPS = 0.1


def images(n: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """The first test images `(n, 1, 8, 8)` and their labels."""
    return data.load("digits").test.batch(slice(0, n))


def layers(activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """A small convolutional network, untrained."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        activation(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        activation(),
        nn.Flatten(),
        nn.Linear(256, CLASSES),
    )


def trained(net: nn.Module, epochs: int, eps: float = 0.0, seed: int = 0) -> nn.Module:
    """The network after a second or two on digits, in eval mode; against PGD-4 of radius `eps` where that is not 0."""
    x, y = data.load("digits").train.batch(slice(None))
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
    for epoch in range(epochs):
        order = Rng(seed, epoch).permutation(len(x))
        for step, rows in enumerate(order.split(64)):
            shown = x[rows]
            if eps:
                with evaluating(net):
                    shown = pgd(net, shown, y[rows], Linf(eps), rng=Rng(seed, epoch, step), steps=4)
            net.train()
            loss = F.cross_entropy(net(shown), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return net.eval().requires_grad_(False)


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


@cache
def undefended(seed: int = 0) -> nn.Module:
    """About 97 % right on clean digits; copy it before changing it."""
    return trained(seeded(layers, seed), epochs=3, seed=seed)


@cache
def adversarially_trained() -> nn.Module:
    return trained(seeded(layers), epochs=4, eps=EPS)


@cache
def linear() -> nn.Module:
    return trained(seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))), epochs=8)


@cache
def winners_take_all() -> nn.Module:
    return trained(seeded(lambda: layers(KWinners)), epochs=3)


class Wrapper(nn.Module):
    """Something around an honest network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.after(self.net(self.before(x)))

    def before(self, x):
        return x

    def after(self, logits):
        return logits


# ---------------------------------------------------------------------------------------------------------------------
# honest


class SoftMixture(Wrapper):
    """Two experts and a soft gate."""

    def __init__(self, net):
        super().__init__(net)
        self.other = deepcopy(undefended(1))
        self.gating = seeded(lambda: nn.Linear(64, 2)).requires_grad_(False)

    def forward(self, x):
        weights = self.gating(x.flatten(1)).softmax(1)
        return torch.einsum("be,bek->bk", weights, torch.stack([self.net(x), self.other(x)], 1))


class Clamps(Wrapper):
    """Brings its input into the box, as it may."""

    def before(self, x):
        return x.clamp(0, 1)


class LogProbabilities(Wrapper):
    def after(self, logits):
        return logits.log_softmax(1)


class Sigmoid(Wrapper):
    """In [0,1], but no probabilities of classes that exclude each other."""

    def after(self, logits):
        return torch.sigmoid(logits / 10)


class KeepsFeatures(Wrapper):
    """Remembers its last logits for whoever wants to look at them; nothing depends on that."""

    def after(self, logits):
        self.last = logits.detach()
        return logits


# ---------------------------------------------------------------------------------------------------------------------
# masked gradients


class Loud(Wrapper):
    """Logits so large that cross-entropy underflows."""

    def after(self, logits):
        return 300 * logits


class TanhSaturated(Wrapper):
    def after(self, logits):
        return 10 * torch.tanh(50 * logits)


class Quantised(Wrapper):
    """Eight grey levels; rounding has derivative 0."""

    def before(self, x):
        return (7 * x).round() / 7


class QuantisedStraightThrough(Wrapper):
    """Eight grey levels, and a gradient as if there were no rounding."""

    def before(self, x):
        return x + ((7 * x).round() / 7 - x).detach()


class Staircase(Wrapper):
    """Jumps that carry the signal, on a slope that carries the gradient."""

    def before(self, x):
        return (16 * x).floor() / 16 + 0.01 * x


class KWinners(nn.Module):
    """Keeps the largest fifth of each image's activations: discontinuous everywhere (k-WTA, Xiao et al. 2020)."""

    def forward(self, h):
        flat = h.flatten(1)
        least = flat.topk(flat.shape[1] // 5, dim=1).values[:, -1:]
        return (flat * (flat >= least)).view_as(h)


class _Negate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class NegatedGradient(Wrapper):
    def before(self, x):
        return _Negate.apply(x)


class ZeroingHook(Wrapper):
    def before(self, x):
        x = x * 1.0
        if x.requires_grad:
            x.register_hook(lambda gradient: 0 * gradient)
        return x


class Detaching(Wrapper):
    def before(self, x):
        return x.detach()


class Blindfolded(Wrapper):
    """Its answer depends on the image by a path without gradients, and hardly by the other."""

    def forward(self, x):
        with torch.no_grad():
            answer = self.net(x)
        return answer + 1e-3 * self.net(x)


class Memoriser(Wrapper):
    """Answers with the label of the nearest training image, as one-hot vector."""

    def __init__(self, net):
        super().__init__(net)
        x, y = data.load("digits").train.batch(slice(None))
        self.register_buffer("x", x.flatten(1))
        self.register_buffer("y", y)

    def forward(self, x):
        nearest = torch.cdist(x.flatten(1), self.x).argmin(1)
        return F.one_hot(self.y[nearest], CLASSES).float()


class Decoy(Wrapper):
    """Squashed until it is flat, with a slight slope of no meaning laid over it: gradients are exact and lead nowhere."""

    def __init__(self, net):
        super().__init__(net)
        self.slope = nn.Parameter(1e-3 * torch.randn(64, CLASSES, generator=torch.Generator().manual_seed(3)))

    def forward(self, x):
        return 8 * (20 * self.net(x)).softmax(1) + x.flatten(1) @ self.slope


class DrawsTogether(Wrapper):
    """Moves what it is shown most of the way to the test images around it, which it carries."""

    def __init__(self, net):
        super().__init__(net)
        self.register_buffer("seen", data.load("digits").test.batch(slice(None))[0].flatten(1))

    def before(self, x):
        near = torch.softmax(-20 * torch.cdist(x.flatten(1), self.seen).square(), 1) @ self.seen
        return 0.2 * x + 0.8 * near.view_as(x)


class FakeMixture(Wrapper):
    """Calls itself a mixture, of experts that have nothing to do with its answer."""

    soft = False
    experts_count = 2

    def gate(self, x):
        return x.flatten(1)[:, :2]

    def all_outputs(self, x):
        return x.flatten(1)[:, None, : 2 * CLASSES].reshape(len(x), 2, CLASSES)

    def selected(self, x):
        return self.gate(x).argmax(1)


class FakeExpert(Wrapper):
    """A mixture of twice the same network, which says something else when it is asked alone."""

    soft = True
    experts_count = 2

    def gate(self, x):
        return x.flatten(1)[:, :2]

    def all_outputs(self, x):
        return torch.stack([self(x)] * 2, 1)

    def one_output(self, x, expert):
        return x.flatten(1)[:, :CLASSES]

    def selected(self, x):
        return self.gate(x).argmax(1)


# ---------------------------------------------------------------------------------------------------------------------
# random


class GaussianNoise(Wrapper):
    def __init__(self, net, size=0.1):
        super().__init__(net)
        self.size = size

    def before(self, x):
        return x + self.size * torch.randn_like(x)


class Reseeded(Wrapper):
    """Noise that is the same in every pass, whatever the seed of the attack."""

    def before(self, x):
        torch.manual_seed(0)
        return x + 0.1 * torch.randn_like(x)


class RareMisroute(Wrapper):
    """Turns its answer about in one pass of a hundred."""

    def after(self, logits):
        return -logits if torch.rand(()) < 0.01 else logits


class PrivateRareMisroute(Wrapper):
    """The same with a generator of its own, of which the global ones know nothing."""

    def __init__(self, net):
        super().__init__(net)
        self.generator = torch.Generator().manual_seed(0)

    def __deepcopy__(self, memo):
        return PrivateRareMisroute(deepcopy(self.net, memo))

    def after(self, logits):
        return -logits if torch.rand((), generator=self.generator) < 0.01 else logits


class NumpyNoise(Wrapper):
    def before(self, x):
        return x + torch.from_numpy(0.1 * np.random.standard_normal(x.shape)).to(x)


class PrivateNumpyNoise(Wrapper):
    def __init__(self, net):
        super().__init__(net)
        self.rng = np.random.default_rng(0)

    def before(self, x):
        return x + torch.from_numpy(0.1 * self.rng.standard_normal(x.shape)).to(x)


class PythonNoise(Wrapper):
    def before(self, x):
        return x + 0.1 * random.random()


class SystemNoise(Wrapper):
    def before(self, x):
        return x + 0.1 * os.urandom(1)[0] / 255


class Clock(Wrapper):
    def before(self, x):
        return x + 0.1 * (time.perf_counter_ns() % 9973) / 9973


# ---------------------------------------------------------------------------------------------------------------------
# no function from an image to logits


class Probabilities(Wrapper):
    def after(self, logits):
        return logits.softmax(1)


class ScaledProbabilities(Wrapper):
    def after(self, logits):
        return 1.001 * logits.softmax(1)


class HalfProbabilities(Wrapper):
    def after(self, logits):
        return logits.bfloat16().softmax(1).float()


class OneHot(Wrapper):
    def after(self, logits):
        return F.one_hot(logits.argmax(1), CLASSES).float()


class StaysInTraining(Wrapper):
    """`.eval()` does not reach its BatchNorm."""

    def train(self, mode=True):
        return super().train(True)


class TrainsAgain(Wrapper):
    """Its forward pass puts it back into training mode."""

    def before(self, x):
        self.net.train()
        return x


class BatchStatistics(Wrapper):
    def before(self, x):
        return F.batch_norm(x, None, None, training=True)


class SubtractsBatchMean(Wrapper):
    def before(self, x):
        return x - x.mean(0)


class CountsCalls(Wrapper):
    def __init__(self, net):
        super().__init__(net)
        self.calls = 0

    def after(self, logits):
        self.calls += 1
        return logits.roll(self.calls, 1)


class ChangesBuffer(Wrapper):
    def __init__(self, net):
        super().__init__(net)
        self.register_buffer("seen", torch.zeros(()))

    def before(self, x):
        self.seen += len(x)
        return x


class MutatesInput(Wrapper):
    def before(self, x):
        return x.mul_(0.9)


class GradientDetector(Wrapper):
    """Turns its answer about when somebody wants its gradient."""

    def forward(self, x):
        return -self.net(x) if x.requires_grad else self.net(x)


class OffGridDetector(Wrapper):
    """Shows the network another image where pixels are no multiples of 1/255."""

    def before(self, x):
        off = ((255 * x - (255 * x).round()).abs() > 1e-2).flatten(1).any(1)
        return torch.where(off[:, None, None, None], x.roll(1, 3), x)


class NanOffData(Wrapper):
    """Divides by the contrast, which an image of one colour does not have."""

    def before(self, x):
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        return (x - low) / (high - low)


class Constant(Wrapper):
    def after(self, logits):
        return 0 * logits + torch.arange(float(CLASSES))


class Tuple(Wrapper):
    def after(self, logits):
        return logits, None


class WholeNumbers(Wrapper):
    def after(self, logits):
        return logits.long()


class ElevenClasses(Wrapper):
    def after(self, logits):
        return F.pad(logits, (0, 1))


class AlwaysNan(Wrapper):
    def after(self, logits):
        return logits * float("nan")


class Crashes(Wrapper):
    def before(self, x):
        raise RuntimeError("no such layer")


class WantsContiguous(Wrapper):
    """Reads memory in an order that a tensor need not have."""

    def before(self, x):
        return x.view(len(x), -1).view(x.shape)


# ---------------------------------------------------------------------------------------------------------------------
# loops and routes


class Purifier(Wrapper):
    """Descends its own entropy before it answers."""

    def before(self, x):
        for _ in range(3):
            with torch.enable_grad():
                z = x.detach().requires_grad_(True)
                entropy = torch.special.entr(self.net(z).softmax(1)).sum()
                (gradient,) = torch.autograd.grad(entropy, z)
            x = (x - 0.01 * gradient.sign()).clamp(0, 1)
        return x


class Loop(Wrapper):
    """The mean over a few shifted images; no gradient is hidden, but a pass is five."""

    def forward(self, x):
        return torch.stack([self.net(x + 0.01 * i) for i in range(-2, 3)]).mean(0)


class ArgmaxMixture(SoftMixture):
    """One expert an image, and nothing that says so."""

    def forward(self, x):
        chosen = self.gating(x.flatten(1)).argmax(1)
        both = torch.stack([self.net(x), self.other(x)], 1)
        return both[torch.arange(len(x), device=x.device), chosen]


class StraightThroughMixture(SoftMixture):
    """One expert an image, with the gradient of a soft gate that changes its mind quickly."""

    def forward(self, x):
        soft = torch.sin(40 * self.gating(x.flatten(1))).softmax(1)
        hard = F.one_hot(soft.argmax(1), 2).to(soft)
        both = torch.stack([self.net(x), self.other(x)], 1)
        return torch.einsum("be,bek->bk", hard + soft - soft.detach(), both)


# ---------------------------------------------------------------------------------------------------------------------
# what is known of them


@dataclass(frozen=True)
class Specimen:
    """A model with a known verdict.

    Args:
        make: an honest network to the model.
        verdict: what its findings must come to, those of contract and gradient checks together.
        contract: the codes of the findings that the model contract owes it, those that only inform left out.
        gradients: the same of the gradient checks.
    """

    make: Callable[[nn.Module], nn.Module]
    verdict: str = "credible"
    contract: frozenset[str] = frozenset()
    gradients: frozenset[str] = frozenset()

    def build(self) -> nn.Module:
        """The model in eval mode, its parameters needing no gradient."""
        return self.make(deepcopy(undefended())).eval().requires_grad_(False)


def _odd(make, verdict, contract="", gradients=""):
    return Specimen(make, verdict, frozenset(contract.split()), frozenset(gradients.split()))


HONEST = {
    "undefended": Specimen(lambda net: net),
    "linear": Specimen(lambda net: deepcopy(linear())),
    "adversarially trained": Specimen(lambda net: deepcopy(adversarially_trained())),
    "soft mixture": Specimen(SoftMixture),
    "clamps": Specimen(Clamps),
    "log-probabilities": Specimen(LogProbabilities),
    "sigmoid": Specimen(Sigmoid),
    "keeps features": Specimen(KeepsFeatures),
}

BROKEN = {
    "loud": _odd(Loud, "suspect", "", "saturated-loss"),
    "tanh saturated": _odd(TanhSaturated, "void", "plateau", "zero-gradient"),
    "quantised": _odd(Quantised, "void", "plateau hidden-choice", "zero-gradient"),
    "quantised straight through": _odd(
        QuantisedStraightThrough, "suspect", "plateau hidden-choice", "wrong-direction"
    ),
    "staircase": _odd(Staircase, "suspect", "hidden-choice", "shattered-gradient"),
    "k-wta": _odd(lambda net: deepcopy(winners_take_all()), "suspect", "hidden-choice", "shattered-gradient"),
    "negated gradient": _odd(NegatedGradient, "suspect", "", "wrong-direction"),
    "zeroing hook": _odd(ZeroingHook, "void", "", "zero-gradient"),
    "detaching": _odd(Detaching, "void", "hidden-choice", "zero-gradient"),
    "blindfolded": _odd(Blindfolded, "suspect", "hidden-choice looped-forward", "wrong-direction"),
    "memoriser": _odd(Memoriser, "void", "not-logits plateau hidden-choice", "zero-gradient"),
    "decoy": _odd(Decoy, "suspect"),
    "draws together": _odd(DrawsTogether, "void", "memorised-images"),
    "fake mixture": _odd(FakeMixture, "void", "mixture-mismatch"),
    "fake expert": _odd(FakeExpert, "void", "mixture-mismatch"),
    "gaussian noise": _odd(GaussianNoise, "suspect", "random-forward"),
    "tiny noise": _odd(lambda net: GaussianNoise(net, 1e-6), "suspect", "random-forward"),
    "re-seeded noise": _odd(Reseeded, "suspect", "random-forward"),
    "rare misroute": _odd(RareMisroute, "suspect", "random-forward"),
    "private rare misroute": _odd(PrivateRareMisroute, "suspect", "random-forward"),
    "numpy noise": _odd(NumpyNoise, "suspect", "random-forward"),
    "private numpy noise": _odd(PrivateNumpyNoise, "suspect", "random-forward"),
    "python noise": _odd(PythonNoise, "suspect", "random-forward"),
    "system noise": _odd(SystemNoise, "suspect", "random-forward"),
    "clock": _odd(Clock, "suspect", "random-forward"),
    "probabilities": _odd(Probabilities, "suspect", "not-logits"),
    "scaled probabilities": _odd(ScaledProbabilities, "suspect", "not-logits"),
    "half-precision probabilities": _odd(HalfProbabilities, "suspect", "not-logits plateau"),
    "one-hot": _odd(OneHot, "void", "not-logits plateau hidden-choice", "zero-gradient"),
    "stays in training": _odd(StaysInTraining, "void", "train-mode batch-dependent"),
    "trains again": _odd(TrainsAgain, "void", "train-mode batch-dependent"),
    "batch statistics": _odd(BatchStatistics, "void", "batch-dependent"),
    "subtracts batch mean": _odd(SubtractsBatchMean, "void", "batch-dependent"),
    "counts calls": _odd(CountsCalls, "void", "stateful"),
    "changes buffer": _odd(ChangesBuffer, "void", "stateful"),
    "mutates input": _odd(MutatesInput, "void", "mutates-input grad-dependent"),
    "gradient detector": _odd(GradientDetector, "void", "grad-dependent"),
    "off-grid detector": _odd(OffGridDetector, "suspect", "off-grid hidden-choice"),
    "nan off data": _odd(NanOffData, "void", "non-finite"),
    "constant": _odd(Constant, "void", "constant-prediction plateau", "zero-gradient"),
    "tuple": _odd(Tuple, "void", "signature"),
    "whole numbers": _odd(WholeNumbers, "void", "signature"),
    "eleven classes": _odd(ElevenClasses, "void", "signature"),
    "always nan": _odd(AlwaysNan, "void", "non-finite"),
    "crashes": _odd(Crashes, "void", "model-crash"),
    "wants contiguous": _odd(WantsContiguous, "void", "layout-dependent"),
    "purifier": _odd(Purifier, "suspect", "test-time-optimisation looped-forward hidden-choice"),
    "loop": _odd(Loop, "suspect", "looped-forward"),
    "argmax mixture": _odd(ArgmaxMixture, "suspect", "hidden-choice"),
    "straight-through mixture": _odd(StraightThroughMixture, "suspect", "hidden-choice", "wrong-direction"),
}

ZOO = {**HONEST, **BROKEN}

#: what only further attacks find out
NEEDS_PROBES = {"decoy"}
