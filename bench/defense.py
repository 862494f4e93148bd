"""What a defense is: a network to build, and the stages of its training.

A defense is one file in `defenses/` (or a plugin) with a config and a class:

    @config
    class Config: ...

    @bench.register("mine")
    class Mine(Defense[Config]):
        recipes = {"tiny": Config(...), "fast": Config(...), "paper": Config(...)}

        def build(self, data): ...      # -> nn.Module: pixels in [0,1] to logits
        def stages(self, data): ...     # -> what is trained, in order

The smallest one is a function, a model with nothing to train:

    @bench.register("mine")
    def mine(data): return nn.Module...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypedDict, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import SGD

from bench.config import config
from bench.data import Dataset
from bench.errors import UsageError
from bench.held_out import HeldOut
from bench.rng import Rng
from bench.types import Images, Labels

C = TypeVar("C")

#: the mean loss of one batch: `(model, x, y, rng) -> ()`; the model is in train mode
Loss = Callable[[nn.Module, Images, Labels, Rng], Tensor]
#: a whole step on one batch, by the paper's own rule: `(model, x, y, rng, optimisers) -> mean loss ()`
Update = Callable[[nn.Module, Images, Labels, Rng, Sequence[SGD]], Tensor]
#: what to log of an epoch: `(model, held-out images, this stage's rows so far, this epoch's last) -> numbers by name`
Observe = Callable[[nn.Module, HeldOut, Sequence[Mapping[str, Any]]], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stretch of training: a loss, what it moves, and for how long.

    Args:
        name: what progress and checkpoints call it.
        loss: the mean loss of a batch, on which one step of SGD is taken; given unless `update` is.
        update: the one hook for a paper that owns its step (alternating players, replayed batches, moved weights). It
            zeroes, differentiates and steps the optimisers itself and returns a loss to show.
        epochs: passes over the training images that are not held out.
        batch_size: clean images per step.
        lr, momentum, weight_decay: of SGD; the rate follows a cosine to 0, step by step.
        warmup: epochs of linear rise before the cosine.
        groups: what moves, a list of parameters for each optimiser; one list of all of them by default.
        select: what decides the epoch to keep, measured on held-out training images: clean accuracy, accuracy
            under PGD-10 at the dataset's radius, or nothing (`last`).
        ema: decay of an exponential moving average of the weights, which is then what is kept; none by default.
        observe: looks at the network after each epoch and names numbers, which join the epoch's row in the history.
        memory: what `loss`, `update` and `observe` remember from one call to the next, tensors and numbers by name, beside
            the weights: it is kept with them, so that a training that was stopped goes on as if it had not been.
            `stages` makes it anew each time; stages that share it hand it on.

    Raises:
        UsageError: a number is out of its range, or not one of `loss` and `update` is given.
    """

    name: str
    loss: Loss | None = None
    update: Update | None = None
    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0
    groups: Callable[[nn.Module], Sequence[Sequence[nn.Parameter]]] | None = None
    select: Literal["clean", "robust", "last"] = "last"
    ema: float | None = None
    observe: Observe | None = None
    memory: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for holds, needed in (
            ((self.loss is None) != (self.update is None), "either a loss or an update"),
            (self.epochs >= 0, f"epochs of at least 0, not {self.epochs}"),
            (self.batch_size >= 1, f"a batch_size of at least 1, not {self.batch_size}"),
            (0 < self.lr < math.inf, f"an lr above 0, not {self.lr}"),
            (0 <= self.momentum < 1, f"a momentum from 0 to below 1, not {self.momentum}"),
            (0 <= self.weight_decay < math.inf, f"a weight_decay of at least 0, not {self.weight_decay}"),
            (0 <= self.warmup < math.inf, f"a warmup of at least 0 epochs, not {self.warmup}"),
            (self.ema is None or 0 <= self.ema < 1, f"an ema from 0 to below 1, not {self.ema}"),
            (
                self.select in ("clean", "robust", "last"),
                f"select to be clean, robust or last, not {self.select!r}",
            ),
        ):
            if not holds:
                raise UsageError(f"stage {self.name!r} needs {needed}")

    def step(self, model: nn.Module, x: Images, y: Labels, rng: Rng, optimisers: Sequence[SGD]) -> Tensor:
        """One step on one batch: the paper's own, or the gradient of the loss followed once; the loss.

        Raises:
            UsageError: the loss is not one number.
        """
        if self.update is not None:
            return self._one_number(self.update(model, x, y, rng, optimisers))
        assert self.loss is not None
        loss = self._one_number(self.loss(model, x, y, rng))
        follow(loss, optimisers)
        return loss

    def _one_number(self, loss: Tensor) -> Tensor:
        if not isinstance(loss, Tensor) or loss.shape != ():
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise UsageError(
                f"stage {self.name!r} must return its mean loss as a tensor of shape (), not {what}"
            )
        return loss


def follow(loss: Tensor, optimisers: Sequence[SGD]) -> None:
    """Steps the optimisers along the gradient of a loss."""
    for optimiser in optimisers:
        optimiser.zero_grad(set_to_none=True)
    # the types of the backward pass follow from the forward pass; autocast has no say in it
    with torch.autocast(loss.device.type, enabled=False):
        loss.backward()  # type: ignore[no-untyped-call]
    for optimiser in optimisers:
        optimiser.step()


class Taxonomy(TypedDict):
    """Where a method stands among mixtures of experts, in the words of the DWF paper's Table 1 and a few more.

    `gating`: `soft` weighs all experts, `hard` chooses. `routing`: once for an image (`flat`), anew in each layer (`layered`),
    or in two mixtures side by side (`dual`). `training`: of a mixture, experts and gate at once (`joint`), in turns
    (`alternating`), experts first and then all (`pretrained+joint`) or then the gate and their heads (`pretrained+gate`); of
    one network, on clean images (`standard`) or attacked ones (`adversarial`). `activation`: what answers an image, one
    expert (`single`), a part of the weights (`sparse`), every expert by its weight (`fractional`), or the whole network.
    """

    gating: Literal["none", "soft", "hard"]
    routing: Literal["none", "flat", "layered", "dual"]
    training: Literal[
        "standard", "adversarial", "joint", "alternating", "pretrained+joint", "pretrained+gate"
    ]
    activation: Literal["whole", "single", "sparse", "fractional"]


class Defense(Generic[C]):
    """A method: its settings, its network and its training."""

    #: the settings of each recipe: `tiny` (two CPU cores), `fast` (one GPU), `paper`, and others of its own
    recipes: ClassVar[Mapping[str, object]] = {}
    #: how the paper's tables call it, for `--published`; None where no paper prints it
    published_as: ClassVar[str | None] = None
    #: where it stands among mixtures of experts; a fact for tables, which no weight depends on
    taxonomy: ClassVar[Taxonomy] = {
        "gating": "none",
        "routing": "none",
        "training": "standard",
        "activation": "whole",
    }
    #: fields of the config that only the deployed model reads: one training serves all their values
    evaluation_only: ClassVar[frozenset[str]] = frozenset()
    #: whether the deployed model draws random numbers, so that a protocol for deterministic ones says too much for it
    random: ClassVar[bool] = False

    def __init__(self, config: C) -> None:
        self.config = config

    def build(self, data: Dataset) -> nn.Module:
        """The network, untrained: pixels in [0,1] to logits `(b, len(data.classes))`."""
        raise NotImplementedError

    def stages(self, data: Dataset) -> Sequence[Stage]:
        """What is trained, in order; nothing by default."""
        return ()


@config
class NoSettings:
    """A defense with nothing to set."""


class FunctionDefense(Defense[NoSettings]):
    """A function `data -> nn.Module` as a defense: a model with nothing to train."""

    recipes: ClassVar[Mapping[str, object]] = {recipe: NoSettings() for recipe in ("tiny", "fast", "paper")}
    function: ClassVar[Callable[[Dataset], nn.Module]]

    @classmethod
    def of(cls, name: str, function: Callable[[Dataset], nn.Module]) -> type[FunctionDefense]:
        """The defense class of that function."""
        return type(name, (cls,), {"function": staticmethod(function), "__doc__": function.__doc__})

    def build(self, data: Dataset) -> nn.Module:
        """What the function returns.

        Raises:
            UsageError: it returns no module.
        """
        model = type(self).function(data)
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"{type(self).__name__!r} returned a {type(model).__name__}; a registered function must return an nn.Module"
            )
        return model
