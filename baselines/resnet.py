"""ResNet-18, 34 and 50 with a CIFAR stem (He et al., CVPR 2016, arXiv 1512.03385, Table 1 and Figure 5).

The stem is one 3×3 convolution of stride 1 and no pooling, so 32×32 images keep their size until the second
stage.
Parameters at width 64 and ten classes: 11,173,962 (18), 21,282,122 (34), 23,520,842 (50).
Multiply-adds of one 32×32 image: 555, 1,159 and 1,298 M.
Keys are laid out as in kuangliu/pytorch-cifar: conv1, bn1, layer1.0.conv1, …, layer2.0.shortcut.0, …, linear.

`copies` networks can lie side by side in one: every convolution is grouped by copy and every BatchNorm
normalises each channel alone, so the copies never meet. Each tensor is the copies' tensors joined along its
first dimension.

With `pool`, a 3×3 max pool of stride 2 follows the stem: the networks of huyvnphan/PyTorch_CIFAR10 have
kept it, and nothing in their weights shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines import plain
from bench.checkpoint import Source, renamed
from bench.config import config
from bench.data import Dataset
from bench.registry import register


@config
class Config(plain.Config):
    """`width` is that of the first stage; `pool` puts a max pool of stride 2 after the stem."""

    width: int = 64
    pool: bool = False


class CopiedLinear(nn.Module):
    """`copies` linear layers: features `(b, copies·d)` to `(b, copies, k)`, or `(b, k)` for one copy."""

    def __init__(self, features: int, classes: int, copies: int) -> None:
        super().__init__()
        one = [nn.Linear(features, classes) for _ in range(copies)]
        self.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in one]))
        self.bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in one]))
        self.copies = copies

    def forward(self, h: Tensor) -> Tensor:
        """`(b, copies·d)` to `(b, copies, k)`."""
        if self.copies == 1:
            return F.linear(h, self.weight, self.bias)
        copies, features = self.copies, self.weight.shape[1]
        h = h.view(-1, copies, features)
        logits = torch.einsum("bed,ekd->bek", h, self.weight.view(copies, -1, features))
        return logits + self.bias.view(copies, -1)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions."""

    expansion = 1

    def __init__(self, width_in: int, width: int, stride: int, copies: int) -> None:
        super().__init__()
        self.conv1 = _conv(width_in, width, 3, stride, copies)
        self.bn1 = nn.BatchNorm2d(width * copies)
        self.conv2 = _conv(width, width, 3, 1, copies)
        self.bn2 = nn.BatchNorm2d(width * copies)
        self.stride = stride
        self.shortcut = _shortcut(width_in, width, stride, copies)

    def forward(self, x: Tensor) -> Tensor:
        """`(b, copies·width_in, h, w)` to `(b, copies·width, h/stride, w/stride)`."""
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(every(x, self.stride)))


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1; the outer width is four times the inner."""

    expansion = 4

    def __init__(self, width_in: int, width: int, stride: int, copies: int) -> None:
        super().__init__()
        self.conv1 = _conv(width_in, width, 1, 1, copies)
        self.bn1 = nn.BatchNorm2d(width * copies)
        self.conv2 = _conv(width, width, 3, stride, copies)
        self.bn2 = nn.BatchNorm2d(width * copies)
        self.conv3 = _conv(width, 4 * width, 1, 1, copies)
        self.bn3 = nn.BatchNorm2d(4 * width * copies)
        self.stride = stride
        self.shortcut = _shortcut(width_in, 4 * width, stride, copies)

    def forward(self, x: Tensor) -> Tensor:
        """`(b, copies·width_in, h, w)` to `(b, copies·4·width, h/stride, w/stride)`."""
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        return F.relu(self.bn3(self.conv3(h)) + self.shortcut(every(x, self.stride)))


class ResNet(nn.Module):
    """`copies` ResNets side by side.

    Args:
        block: the residual block.
        blocks: how many of them in each of the four stages, of `width`, 2, 4 and 8 times `width` channels.
        channels: of one copy's input.
        classes: logits of one copy.
        width: channels of the first stage; 64 in the paper.
        copies: how many independent networks.
        pool: whether a 3×3 max pool of stride 2 follows the stem.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        *,
        channels: int,
        classes: int,
        width: int = 64,
        copies: int = 1,
        pool: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = _conv(channels, width, 3, 1, copies)
        self.bn1 = nn.BatchNorm2d(width * copies)
        self.pool = nn.MaxPool2d(3, 2, 1) if pool else nn.Identity()
        width_in = width
        stages = []
        for stage, depth in enumerate(blocks):
            inner = width * 2**stage
            layers: list[nn.Module] = []
            for i in range(depth):
                layers.append(block(width_in, inner, 2 if stage > 0 and i == 0 else 1, copies))
                width_in = inner * block.expansion
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = CopiedLinear(width_in, classes, copies)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images `(b, copies·c, h, w)` to logits `(b, k)`, or `(b, copies, k)`."""
        h = self.pool(F.relu(self.bn1(self.conv1(x))))
        h = self.layer4(self.layer3(self.layer2(self.layer1(h))))
        logits: Tensor = self.linear(h.mean((2, 3)))
        return logits


def resnet18(*, channels: int, classes: int, width: int = 64, copies: int = 1, pool: bool = False) -> ResNet:
    """Two basic blocks a stage."""
    return ResNet(
        BasicBlock, (2, 2, 2, 2), channels=channels, classes=classes, width=width, copies=copies, pool=pool
    )


def resnet34(*, channels: int, classes: int, width: int = 64, copies: int = 1, pool: bool = False) -> ResNet:
    """3, 4, 6, 3 basic blocks."""
    return ResNet(
        BasicBlock, (3, 4, 6, 3), channels=channels, classes=classes, width=width, copies=copies, pool=pool
    )


def resnet50(*, channels: int, classes: int, width: int = 64, copies: int = 1, pool: bool = False) -> ResNet:
    """3, 4, 6, 3 bottlenecks."""
    return ResNet(
        Bottleneck, (3, 4, 6, 3), channels=channels, classes=classes, width=width, copies=copies, pool=pool
    )


def _conv(width_in: int, width: int, kernel: int, stride: int, copies: int) -> nn.Conv2d:
    return nn.Conv2d(
        width_in * copies, width * copies, kernel, stride, kernel // 2, bias=False, groups=copies
    )


def _shortcut(width_in: int, width: int, stride: int, copies: int) -> nn.Sequential:
    if stride == 1 and width_in == width:
        return nn.Sequential()
    # of pixels that were picked before
    return nn.Sequential(_conv(width_in, width, 1, 1, copies), nn.BatchNorm2d(width * copies))


def every(x: Tensor, stride: int) -> Tensor:
    """Every `stride`-th pixel: what a 1×1 convolution of that stride looks at.

    Picked before it, since oneDNN overwrites memory where it does both at once for few channels (bench.overrun).
    """
    return x if stride == 1 else x[:, :, ::stride, ::stride]


#: how most people build it
PLAIN_STEM = {"width": 64, "pool": False}
#: torchvision's names, which timm shares, as ours
FROM_TORCHVISION = renamed((r"\.downsample\.", ".shortcut."), (r"^fc\.", "linear."))


def _sources(
    name: str, huyvnphan: float, cifar10: float, svhn: float, robustbench: tuple[Source, ...]
) -> tuple[Source, ...]:
    """The public origins; clean accuracies in percent, from README, model card and model card."""
    return (
        # It publishes no weights; a file that its training wrote states its accuracy.
        Source(
            name="kuangliu/pytorch-cifar",
            dataset="cifar10",
            mean=plain.KUANGLIU_MEAN,
            std=plain.KUANGLIU_STD,
            settings=PLAIN_STEM,
            states="acc",
        ),
        Source(
            name="huyvnphan/PyTorch_CIFAR10",
            dataset="cifar10",
            mean=plain.HUYVNPHAN_MEAN,
            std=plain.HUYVNPHAN_STD,
            clean=huyvnphan,
            translate=FROM_TORCHVISION,
            settings={"width": 64, "pool": True},
            modules=("layer1.0.relu",),
        ),
        Source(
            name=f"edadaltocg/{name}_cifar10",
            dataset="cifar10",
            mean=plain.KUANGLIU_MEAN,
            std=plain.KUANGLIU_STD,
            clean=cifar10,
            translate=FROM_TORCHVISION,
            settings=PLAIN_STEM,
            files=(f"*edadaltocg*{name}_cifar10*",),
            modules=("layer1.0.act1",),
        ),
        Source(
            name=f"edadaltocg/{name}_svhn",
            dataset="svhn",
            mean=(0.4377, 0.4438, 0.4728),
            std=(0.1980, 0.2010, 0.1970),
            clean=svhn,
            translate=FROM_TORCHVISION,
            settings=PLAIN_STEM,
            files=(f"*edadaltocg*{name}_svhn*",),
            modules=("layer1.0.act1",),
        ),
        *robustbench,
    )


def _robustbench(
    name: str,
    clean: float | None,
    mean: tuple[float, ...] = (0.0, 0.0, 0.0),
    std: tuple[float, ...] = (1.0, 1.0, 1.0),
) -> Source:
    """A network of RobustBench's CIFAR-10 zoo: kuangliu's keys, and in the file no word of normalisation.

    The L∞ and the L2 network of one paper have one name in two folders; without the folder no accuracy is
    stated.
    """
    return Source(
        name=f"robustbench/{name}",
        dataset="cifar10",
        mean=mean,
        std=std,
        clean=clean,
        settings=PLAIN_STEM,
        files=(f"*/{name}.pt",),
        by_name=True,
    )


class Network(plain.PlainNetwork[Config]):
    """What the three have in common."""

    scale = ("width", "conv1.weight", 1)
    recipes: ClassVar[Mapping[str, object]] = {
        "tiny": Config(width=8, epochs=30),
        "fast": Config(epochs=30),
        "paper": Config(),
    }


@register("resnet18")
class ResNet18(Network):
    """ResNet-18 with a CIFAR stem, plain (He et al. 2016).

    Cost: 30 passes of 0.56 G.
    """

    sources = _sources(
        "resnet18",
        93.07,
        94.98,
        95.95,
        (
            _robustbench("Linf/Sehwag2021Proxy_R18", 84.38),
            _robustbench("L2/Sehwag2021Proxy_R18", 89.52),
            _robustbench("Sehwag2021Proxy_R18", None),
            _robustbench("Addepalli2021Towards_RN18", 80.24),
            _robustbench("Addepalli2022Efficient_RN18", 85.71),
        ),
    )

    def network(self, data: Dataset) -> nn.Module:
        """The ResNet for this dataset."""
        c = self.config
        return resnet18(channels=data.shape[0], classes=len(data.classes), width=c.width, pool=c.pool)


@register("resnet34")
class ResNet34(Network):
    """ResNet-34 with a CIFAR stem, plain (He et al. 2016).

    Cost: 30 passes of 1.2 G.
    """

    sources = _sources("resnet34", 93.34, 95.40, 96.26, ())

    def network(self, data: Dataset) -> nn.Module:
        """The ResNet for this dataset."""
        c = self.config
        return resnet34(channels=data.shape[0], classes=len(data.classes), width=c.width, pool=c.pool)


@register("resnet50")
class ResNet50(Network):
    """ResNet-50 with a CIFAR stem, plain (He et al. 2016).

    Cost: 30 passes of 1.3 G.
    """

    sources = _sources(
        "resnet50",
        93.65,
        94.65,
        96.32,
        (
            _robustbench("Linf/Engstrom2019Robustness", 87.03, plain.KUANGLIU_MEAN, plain.KUANGLIU_STD),
            _robustbench("L2/Engstrom2019Robustness", 90.83, plain.KUANGLIU_MEAN, plain.KUANGLIU_STD),
            _robustbench("Engstrom2019Robustness", None, plain.KUANGLIU_MEAN, plain.KUANGLIU_STD),
            _robustbench(
                "Augustin2020Adversarial",
                91.08,
                (0.4913997551666284, 0.48215855929893703, 0.4465309133731618),
                (0.24703225141799082, 0.24348516474564, 0.26158783926049628),
            ),
        ),
    )

    def network(self, data: Dataset) -> nn.Module:
        """The ResNet for this dataset."""
        c = self.config
        return resnet50(channels=data.shape[0], classes=len(data.classes), width=c.width, pool=c.pool)
