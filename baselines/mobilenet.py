"""MobileNet-V2 for small images (Sandler et al., CVPR 2018, arXiv 1801.04381, Table 2).

torchvision's inverted residuals; the first convolution and the first group of expanded blocks have stride
1, so that 32×32 images shrink to 4×4.
`blocks` as kuangliu builds them differ from the paper's: ReLU in place of ReLU6, a 1×1 convolution in the
first block too, and a projected shortcut wherever the stride is 1 and the width changes.

Parameters with ten classes: 2,236,682. Multiply-adds of one 32×32 image: 88 M.
Keys are laid out as in torchvision: features.0.0, features.1.conv.0.0, …, classifier.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from baselines import plain
from bench.checkpoint import Source
from bench.config import config
from bench.data import Dataset
from bench.registry import register

#: expansion, channels, blocks and stride of each group
GROUPS = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


@config
class Config(plain.Config):
    """`blocks` are the paper's, or those of kuangliu/pytorch-cifar."""

    blocks: Literal["paper", "kuangliu"] = "paper"


def mobilenet_v2(*, channels: int, classes: int) -> nn.Module:
    """torchvision's MobileNet-V2 with strides for small images."""
    from torchvision.models.mobilenetv2 import MobileNetV2

    net: nn.Module = MobileNetV2(
        num_classes=classes, inverted_residual_setting=[list(group) for group in GROUPS]
    )
    net.get_submodule("features.0").add_module("0", nn.Conv2d(channels, 32, 3, 1, 1, bias=False))
    return net


class ProjectedBlock(nn.Module):
    """1×1, depthwise 3×3 and 1×1 convolution; a projected shortcut where only the width changes."""

    def __init__(self, width_in: int, width: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = width_in * expansion
        self.stride = stride
        self.conv1 = nn.Conv2d(width_in, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride == 1 and width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """`(b, width_in, h, w)` to `(b, width, h/stride, w/stride)`."""
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        out: Tensor = self.bn3(self.conv3(h))
        return out + self.shortcut(x) if self.stride == 1 else out


class ProjectedMobileNet(nn.Module):
    """MobileNet-V2 as kuangliu builds it, with its keys: conv1, bn1, layers.0.conv1, …, linear."""

    def __init__(self, *, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        layers, width_in = [], 32
        for expansion, width, count, stride in GROUPS:
            for i in range(count):
                layers.append(ProjectedBlock(width_in, width, expansion, stride if i == 0 else 1))
                width_in = width
        self.layers = nn.Sequential(*layers)
        self.conv2 = nn.Conv2d(width_in, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images `(b, c, h, w)` to logits `(b, k)`."""
        h = self.layers(F.relu(self.bn1(self.conv1(x))))
        h = F.relu(self.bn2(self.conv2(h)))
        logits: Tensor = self.linear(h.mean((2, 3)))
        return logits


@register("mobilenet_v2")
class MobileNetV2(plain.PlainNetwork[Config]):
    """MobileNet-V2 with strides for CIFAR, plain (Sandler et al. 2018).

    Cost: 30 passes of 0.088 G.
    """

    recipes: ClassVar[Mapping[str, object]] = {
        "tiny": Config(epochs=15),
        "fast": Config(epochs=30),
        "paper": Config(),
    }
    sources = (
        Source(
            name="kuangliu/pytorch-cifar",
            dataset="cifar10",
            mean=plain.KUANGLIU_MEAN,
            std=plain.KUANGLIU_STD,
            settings={"blocks": "kuangliu"},
            states="acc",
        ),
        Source(
            name="huyvnphan/PyTorch_CIFAR10",
            dataset="cifar10",
            mean=plain.HUYVNPHAN_MEAN,
            std=plain.HUYVNPHAN_STD,
            clean=93.91,
            settings={"blocks": "paper"},
        ),
        Source(
            name="chenyaofo/pytorch-cifar-models",
            dataset="cifar10",
            mean=plain.KUANGLIU_MEAN,
            std=plain.KUANGLIU_STD,
            clean=93.79,
            settings={"blocks": "paper"},
            files=("*/cifar10_mobilenetv2_x1_0-fe6a5b48.pt",),
            sha256="fe6a5b48",
        ),
    )

    def network(self, data: Dataset) -> nn.Module:
        """The MobileNet for this dataset."""
        build = mobilenet_v2 if self.config.blocks == "paper" else ProjectedMobileNet
        net: nn.Module = build(channels=data.shape[0], classes=len(data.classes))
        return net
