"""DenseNet-121 and 169 with a CIFAR stem (Huang et al., CVPR 2017, arXiv 1608.06993, Table 1).

torchvision's dense blocks and transitions; the stem is one 3×3 convolution of stride 1. `stem` says what
follows it:
`norm` a BatchNorm and ReLU, `pool` these and a 3×3 max pool of stride 2, `bare` nothing. `growth` is the
paper's k.

Parameters with ten classes: 6,956,426 (121), 12,493,450 (169). Multiply-adds of one 32×32 image: 888 and
1,060 M.
Keys are laid out as in torchvision: features.conv0, features.denseblock1.denselayer1.norm1, …, classifier.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from baselines import plain
from bench.checkpoint import Source, renamed
from bench.config import config
from bench.data import Dataset
from bench.errors import UsageError
from bench.registry import register


@config
class Config(plain.Config):
    """`growth` is channels per layer; `stem` is what follows the first convolution."""

    growth: int = 32
    stem: Literal["norm", "pool", "bare"] = "norm"


def densenet(
    blocks: tuple[int, int, int, int],
    *,
    channels: int,
    classes: int,
    growth: int,
    stem: Literal["norm", "pool", "bare"],
) -> nn.Module:
    """torchvision's DenseNet with a stem for small images."""
    from torchvision.models.densenet import DenseNet

    net: nn.Module = DenseNet(growth, blocks, num_init_features=2 * growth, num_classes=classes)
    features = net.get_submodule("features")
    features.add_module("conv0", nn.Conv2d(channels, 2 * growth, 3, 1, 1, bias=False))
    if stem != "pool":
        features.add_module("pool0", nn.Identity())
    if stem == "bare":
        features.add_module("norm0", nn.Identity())
        features.add_module("relu0", nn.Identity())
    return net


_KUANGLIU_NAMES = renamed(
    (r"^conv1\.", "features.conv0."),
    (
        r"^dense(\d)\.(\d+)\.bn(\d)\.",
        lambda m: f"features.denseblock{m[1]}.denselayer{int(m[2]) + 1}.norm{m[3]}.",
    ),
    (
        r"^dense(\d)\.(\d+)\.conv(\d)\.",
        lambda m: f"features.denseblock{m[1]}.denselayer{int(m[2]) + 1}.conv{m[3]}.",
    ),
    (r"^trans(\d)\.bn\.", r"features.transition\1.norm."),
    (r"^trans(\d)\.conv\.", r"features.transition\1.conv."),
    (r"^bn\.", "features.norm5."),
    (r"^linear\.", "classifier."),
)


def from_kuangliu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """kuangliu's DenseNet as torchvision's.

    It puts a layer's new channels before the old ones and torchvision puts them after, so that whatever
    reads them has its input channels in another order.
    """
    state = _KUANGLIU_NAMES(state)
    for block in range(1, 5):
        layer = f"features.denseblock{block}.denselayer"
        depth = sum(key.startswith(layer) and key.endswith("conv2.weight") for key in state)
        if not depth or f"{layer}1.norm1.weight" not in state:
            continue
        first = len(state[f"{layer}1.norm1.weight"])
        growth = len(state[f"{layer}1.conv2.weight"])
        for i in range(2, depth + 1):
            _reorder(state, f"{layer}{i}.norm1", f"{layer}{i}.conv1", first, growth, i - 1)
        if block < 4:
            _reorder(
                state,
                f"features.transition{block}.norm",
                f"features.transition{block}.conv",
                first,
                growth,
                depth,
            )
        else:
            _reorder(state, "features.norm5", "classifier", first, growth, depth)
    return state


def _reorder(state: dict[str, Tensor], norm: str, reader: str, first: int, growth: int, layers: int) -> None:
    """Oldest channels first, in a BatchNorm after `layers` layers and in the input of what reads it."""
    # newest, …, oldest, input  ->  input, oldest, …, newest
    starts = [*range(0, layers * growth + 1, growth)]
    lengths = [growth] * layers + [first]
    pieces = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    order = torch.cat(pieces[::-1])
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = state.get(f"{norm}.{name}")
        if value is not None and value.shape == order.shape:
            state[f"{norm}.{name}"] = value[order]
    weight = state.get(f"{reader}.weight")
    if weight is not None and weight.dim() > 1 and weight.shape[1] == len(order):
        state[f"{reader}.weight"] = weight[:, order]


def _sources(*more: Source, huyvnphan: float) -> tuple[Source, ...]:
    return (
        Source(
            name="kuangliu/pytorch-cifar",
            dataset="cifar10",
            mean=plain.KUANGLIU_MEAN,
            std=plain.KUANGLIU_STD,
            translate=from_kuangliu,
            settings={"stem": "bare", "growth": 32},
            states="acc",
        ),
        # The max pool of ImageNet is still there; the weights do not show it.
        Source(
            name="huyvnphan/PyTorch_CIFAR10",
            dataset="cifar10",
            mean=plain.HUYVNPHAN_MEAN,
            std=plain.HUYVNPHAN_STD,
            clean=huyvnphan,
            settings={"stem": "pool", "growth": 32},
        ),
        *more,
    )


class Network(plain.PlainNetwork[Config]):
    """What the two have in common."""

    blocks: ClassVar[tuple[int, int, int, int]]
    scale = ("growth", "features.conv0.weight", 2)
    recipes: ClassVar[Mapping[str, object]] = {
        "tiny": Config(growth=8, epochs=15),
        "fast": Config(epochs=30),
        "paper": Config(),
    }

    def build(self, data: Dataset) -> nn.Module:
        """The network behind a normalisation.

        Raises:
            UsageError: the images are too small for the pool of the stem.
        """
        if self.config.stem == "pool" and min(data.shape[1:]) < 16:
            raise UsageError(
                f"stem=pool needs images of 16×16 pixels or more, {data.name} has smaller ones; set stem=norm"
            )
        return super().build(data)

    def network(self, data: Dataset) -> nn.Module:
        """The DenseNet for this dataset."""
        c = self.config
        return densenet(
            self.blocks, channels=data.shape[0], classes=len(data.classes), growth=c.growth, stem=c.stem
        )


@register("densenet121")
class DenseNet121(Network):
    """DenseNet-121 with a CIFAR stem, plain (Huang et al. 2017).

    Cost: 30 passes of 0.89 G.
    """

    blocks = (6, 12, 24, 16)
    sources = _sources(
        Source(
            name="edadaltocg/densenet121_cifar10",
            dataset="cifar10",
            mean=plain.KUANGLIU_MEAN,
            std=plain.KUANGLIU_STD,
            clean=93.91,
            settings={"stem": "bare", "growth": 12},
        ),
        Source(
            name="edadaltocg/densenet121_svhn",
            dataset="svhn",
            mean=(0.4377, 0.4438, 0.4728),
            std=(0.1980, 0.2010, 0.1970),
            clean=96.18,
            settings={"stem": "bare", "growth": 12},
        ),
        huyvnphan=94.06,
    )


@register("densenet169")
class DenseNet169(Network):
    """DenseNet-169 with a CIFAR stem, plain (Huang et al. 2017).

    Cost: 30 passes of 1.1 G.
    """

    blocks = (6, 12, 32, 32)
    sources = _sources(huyvnphan=94.05)
