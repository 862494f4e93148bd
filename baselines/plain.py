"""A plain network: cross-entropy on clean images, or somebody's checkpoint.

The recipe is the standard one for CIFAR (SGD, momentum 0.9, weight decay 5e-4, cosine from 0.1, random crop
and flip).
A network of `baselines/` subclasses `PlainNetwork`, says what to build, and lists where its public
checkpoints are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, TypeVar

import pydantic
from torch import Tensor, nn
from torch.nn import functional as F

from bench.checkpoint import Source
from bench.config import config
from bench.data import Dataset
from bench.defense import Defense, Stage
from bench.errors import UsageError
from bench.model import Normalized
from bench.rng import Rng
from bench.types import Images, Labels

#: what kuangliu/pytorch-cifar normalises CIFAR-10 with, and many after it
KUANGLIU_MEAN, KUANGLIU_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
#: what huyvnphan/PyTorch_CIFAR10 normalises CIFAR-10 with (`data.py`)
HUYVNPHAN_MEAN, HUYVNPHAN_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)

#: one positive number per channel
Scale = Annotated[float, pydantic.Field(gt=0)]


@config
class Config:
    """How a plain network is trained, or how somebody's checkpoint is read.

    `source` names where a checkpoint is from when its file does not tell (`plain` for nobody's); `mean` and
    `std`, one number per channel, stand in for the source's or the dataset's.
    """

    epochs: int = 200
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    source: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[Scale, ...] | None = None


P = TypeVar("P", bound=Config)


class PlainNetwork(Defense[P]):
    """An undefended network; `network` says which."""

    #: where its public checkpoints are, how their keys are laid out and what they state
    sources: ClassVar[tuple[Source, ...]] = ()
    #: a field of the config that a checkpoint tells: its name, a weight, and channels of the weight per unit
    scale: ClassVar[tuple[str, str, int] | None] = None
    #: the smallest side of an image that leaves something to pool, in pixels
    smallest: ClassVar[int] = 8

    recipes: ClassVar[Mapping[str, object]] = {
        "tiny": Config(epochs=15),
        "fast": Config(epochs=30),
        "paper": Config(),
    }

    def network(self, data: Dataset) -> nn.Module:
        """Normalised images `(b, c, h, w)` to logits `(b, k)`."""
        raise NotImplementedError

    def build(self, data: Dataset) -> nn.Module:
        """The network behind the dataset's normalisation, or the config's.

        Raises:
            UsageError: the images are too small for the network, or `mean` and `std` are not one number per
                channel.
        """
        channels, *sides = data.shape
        if min(sides) < self.smallest:
            raise UsageError(
                f"{type(self).__name__} needs images of at least {self.smallest}×{self.smallest} pixels, "
                f"{data.name} has {sides[0]}×{sides[1]}; choose another network or dataset"
            )
        mean, std = self.config.mean or data.mean, self.config.std or data.std
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != channels:
                raise UsageError(
                    f"{name} has {len(values)} number(s), {data.name} has {channels} channel(s); "
                    "give one for each"
                )
        return Normalized(self.network(data), mean, std)

    def stages(self, data: Dataset) -> Sequence[Stage]:
        """Cross-entropy on clean images."""
        c = self.config
        return [
            Stage(
                name="clean",
                loss=clean_loss,
                epochs=c.epochs,
                batch_size=c.batch_size,
                lr=c.lr,
                weight_decay=c.weight_decay,
                select="clean",
            )
        ]


def clean_loss(model: nn.Module, x: Images, y: Labels, rng: Rng) -> Tensor:
    """Mean cross-entropy of the batch."""
    return F.cross_entropy(model(x), y)
