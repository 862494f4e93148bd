"""The small ResNets that He et al. made for CIFAR (CVPR 2016, arXiv 1512.03385, section 4.2).

One 3×3 convolution of 16 channels, three stages of n basic blocks with 16, 32 and 64 channels (6n+2
layers), mean pool, one linear layer. Where the shape changes, the shortcut is parameter-free (option A of
section 3.3): every second pixel, new channels zero; half of them are put before the old ones and half
after, as akamaster/pytorch_resnet_cifar10 does.
With `shortcut` B it is a 1×1 convolution.

Parameters at width 16 and ten classes: 269,722 (20), 464,154 (32), 658,586 (44), 853,018 (56).
Multiply-adds of one 32×32 image: 41, 69, 97 and 125 M.
Keys are laid out as in akamaster/pytorch_resnet_cifar10: conv1, bn1, layer1.0.conv1, …, linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from baselines import plain
from baselines.resnet import every
from bench.checkpoint import Source, renamed
from bench.config import config
from bench.data import Dataset
from bench.registry import register


@config
class Config(plain.Config):
    """`width` is that of the first stage; `shortcut` is what the paper calls option A or B."""

    width: int = 16
    shortcut: Literal["A", "B"] = "A"


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut."""

    def __init__(self, width_in: int, width: int, stride: int, shortcut: Literal["A", "B"]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Sequential()
        #: of a projection, before which the pixels are picked; the other shortcut picks them itself
        self.stride = stride if shortcut == "B" else 1
        if stride > 1 or width_in != width:
            self.shortcut = (
                Padded(width_in, width, stride)
                if shortcut == "A"
                else nn.Sequential(nn.Conv2d(width_in, width, 1, bias=False), nn.BatchNorm2d(width))
            )

    def forward(self, x: Tensor) -> Tensor:
        """`(b, width_in, h, w)` to `(b, width, h/stride, w/stride)`."""
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(every(x, self.stride)))


class Padded(nn.Module):
    """Every `stride`-th pixel, with zero channels on both sides."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (width - width_in) // 2
        self.after = width - width_in - self.before

    def forward(self, x: Tensor) -> Tensor:
        """`(b, width_in, h, w)` to `(b, width, h/stride, w/stride)`."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class CifarResNet(nn.Module):
    """Three stages of `blocks` blocks: 6·`blocks` + 2 layers."""

    def __init__(
        self, blocks: int, *, channels: int, classes: int, width: int, shortcut: Literal["A", "B"]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages, width_in = [], width
        for stage in range(3):
            layers = []
            for i in range(blocks):
                layers.append(Block(width_in, width * 2**stage, 2 if stage > 0 and i == 0 else 1, shortcut))
                width_in = width * 2**stage
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(width_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images `(b, c, h, w)` to logits `(b, k)`."""
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.layer3(self.layer2(self.layer1(h)))
        logits: Tensor = self.linear(h.mean((2, 3)))
        return logits


class Network(plain.PlainNetwork[Config]):
    """What the four have in common."""

    blocks: ClassVar[int]
    scale = ("width", "conv1.weight", 1)
    recipes: ClassVar[Mapping[str, object]] = {
        "tiny": Config(width=8, epochs=30),
        "fast": Config(epochs=30),
        "paper": Config(),
    }

    def network(self, data: Dataset) -> nn.Module:
        """The ResNet for this dataset."""
        c = self.config
        return CifarResNet(
            self.blocks, channels=data.shape[0], classes=len(data.classes), width=c.width, shortcut=c.shortcut
        )


def _sources(name: str, akamaster: tuple[float, str], chenyaofo: tuple[float, str]) -> tuple[Source, ...]:
    """The two public origins: clean accuracy in percent, and the first digits of the file's sha256."""
    return (
        Source(
            name="akamaster/pytorch_resnet_cifar10",
            dataset="cifar10",
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            clean=akamaster[0],
            settings={"width": 16, "shortcut": "A"},
            states="best_prec1",
            files=(f"*/{name}-{akamaster[1]}.th",),
            sha256=akamaster[1],
        ),
        Source(
            name="chenyaofo/pytorch-cifar-models",
            dataset="cifar10",
            mean=plain.KUANGLIU_MEAN,
            std=plain.KUANGLIU_STD,
            clean=chenyaofo[0],
            translate=renamed((r"\.downsample\.", ".shortcut."), (r"^fc\.", "linear.")),
            settings={"width": 16, "shortcut": "B"},
            files=(f"*/cifar10_{name}-{chenyaofo[1]}.pt",),
            sha256=chenyaofo[1],
        ),
    )


@register("resnet20")
class ResNet20(Network):
    """ResNet-20 for CIFAR, plain (He et al. 2016, section 4.2).

    Cost: 30 passes of 0.041 G.
    """

    blocks = 3
    sources = _sources("resnet20", (91.73, "12fca82f"), (92.60, "4118986f"))


@register("resnet32")
class ResNet32(Network):
    """ResNet-32 for CIFAR, plain (He et al. 2016, section 4.2).

    Cost: 30 passes of 0.069 G.
    """

    blocks = 5
    sources = _sources("resnet32", (92.63, "d509ac18"), (93.53, "ef93fc4d"))


@register("resnet44")
class ResNet44(Network):
    """ResNet-44 for CIFAR, plain (He et al. 2016, section 4.2).

    Cost: 30 passes of 0.097 G.
    """

    blocks = 7
    sources = _sources("resnet44", (93.10, "014dd654"), (94.01, "2a3cabcb"))


@register("resnet56")
class ResNet56(Network):
    """ResNet-56 for CIFAR, plain (He et al. 2016, section 4.2).

    Cost: 30 passes of 0.13 G.
    """

    blocks = 9
    sources = _sources("resnet56", (93.39, "4bfd9763"), (94.37, "187c023a"))
