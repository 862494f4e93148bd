"""VGG-19 with BatchNorm for small images (Simonyan and Zisserman, ICLR 2015, arXiv 1409.1556, Table 1, E).

Sixteen 3×3 convolutions in torchvision's layers, with what CIFAR users put on top of them: mean pool and
one linear layer.
`head` gives hidden layers before it, each with ReLU and dropout; two of 4096 are the paper's, at a pooling
of 1×1.
The max pools round up, which changes nothing from 32×32 on and lets 8×8 images through.

Parameters with ten classes: 20,040,522. Multiply-adds of one 32×32 image: 398 M.
Keys are laid out as in kuangliu/pytorch-cifar: features.0, features.1, …, classifier.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from baselines import plain
from bench.checkpoint import Source
from bench.config import config
from bench.data import Dataset
from bench.registry import register

#: configuration E: channels, or M for a max pool
LAYERS: list[int | str] = [64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M"]


@config
class Config(plain.Config):
    """`head` is the widths of the hidden layers of the classifier."""

    head: tuple[int, ...] = ()


class VGG(nn.Module):
    """Configuration E, mean pool, classifier."""

    def __init__(self, *, channels: int, classes: int, head: tuple[int, ...]) -> None:
        from torchvision.models.vgg import make_layers

        super().__init__()
        self.features: nn.Sequential = make_layers(LAYERS, batch_norm=True)
        self.features[0] = nn.Conv2d(channels, 64, 3, padding=1)
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                layer.ceil_mode = True
        self.pool = nn.AdaptiveAvgPool2d(1)
        layers: list[nn.Module] = []
        width = 512
        for hidden in head:
            layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout()]
            width = hidden
        last = nn.Linear(width, classes)
        self.classifier: nn.Module = nn.Sequential(*layers, last) if layers else last
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images `(b, c, h, w)` to logits `(b, k)`."""
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits


@register("vgg19")
class VGG19(plain.PlainNetwork[Config]):
    """VGG-19 with BatchNorm, plain (Simonyan and Zisserman 2015).

    Cost: 30 passes of 0.4 G.
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
            settings={"head": ()},
            states="acc",
        ),
        Source(
            name="huyvnphan/PyTorch_CIFAR10",
            dataset="cifar10",
            mean=plain.HUYVNPHAN_MEAN,
            std=plain.HUYVNPHAN_STD,
            clean=93.95,
            settings={"head": (4096, 4096)},
        ),
        Source(
            name="chenyaofo/pytorch-cifar-models",
            dataset="cifar10",
            mean=plain.KUANGLIU_MEAN,
            std=plain.KUANGLIU_STD,
            clean=93.91,
            settings={"head": (512, 512)},
            files=("*/cifar10_vgg19_bn-57191229.pt",),
            sha256="57191229",
        ),
    )

    def network(self, data: Dataset) -> nn.Module:
        """The VGG for this dataset."""
        return VGG(channels=data.shape[0], classes=len(data.classes), head=self.config.head)
