"""Inception-V3 for small images (Szegedy et al., CVPR 2016, arXiv 1512.00567, Table 1).

torchvision's inception modules. The stem is one 3×3 convolution of stride 1 to 192 channels and no pooling;
there is no auxiliary classifier.

Parameters with ten classes: 21,638,954. Multiply-adds of one 32×32 image: 3,460 M.
Keys are laid out as in torchvision: Conv2d_1a_3x3.conv, Mixed_5b.branch1x1.conv, …, fc.
"""

from __future__ import annotations

from torch import nn

from baselines import plain
from bench.checkpoint import Source
from bench.data import Dataset
from bench.registry import register


def inception_v3(*, channels: int, classes: int) -> nn.Module:
    """torchvision's Inception-V3 with a stem for small images."""
    from torchvision.models.inception import BasicConv2d, Inception3

    net: nn.Module = Inception3(num_classes=classes, aux_logits=False, init_weights=False)
    net.add_module("Conv2d_1a_3x3", BasicConv2d(channels, 192, kernel_size=3, padding=1))
    for name in ("Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2"):
        net.add_module(name, nn.Identity())
    return net


@register("inception_v3")
class InceptionV3(plain.PlainNetwork[plain.Config]):
    """Inception-V3 with a CIFAR stem, plain (Szegedy et al. 2016).

    Cost: 30 passes of 3.5 G.
    """

    sources = (
        Source(
            name="huyvnphan/PyTorch_CIFAR10",
            dataset="cifar10",
            mean=plain.HUYVNPHAN_MEAN,
            std=plain.HUYVNPHAN_STD,
            clean=93.74,
        ),
    )

    def network(self, data: Dataset) -> nn.Module:
        """The Inception-V3 for this dataset."""
        return inception_v3(channels=data.shape[0], classes=len(data.classes))
