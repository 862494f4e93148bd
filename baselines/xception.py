"""Xception for small images (Chollet, CVPR 2017, arXiv 1610.02357, Figure 5).

timm's blocks and flows; in the stem the first convolution has stride 1, and both convolutions are padded.
The three blocks of the entry flow and the one of the exit flow still halve the image: 32, 16, 8, 4, 2.

Parameters with ten classes: 20,827,442. Multiply-adds of one 32×32 image: 375 M.
No public checkpoint for small images is known to us; keys are timm's: conv1, bn1, block1.rep.0.conv1, …, fc.
"""

from __future__ import annotations

from torch import nn

from baselines import plain
from bench.data import Dataset
from bench.registry import register


def xception(*, channels: int, classes: int) -> nn.Module:
    """timm's Xception with a stem for small images."""
    from timm.models.xception import Xception

    net: nn.Module = Xception(num_classes=classes, in_chans=channels)
    net.add_module("conv1", nn.Conv2d(channels, 32, 3, 1, 1, bias=False))
    net.add_module("conv2", nn.Conv2d(32, 64, 3, 1, 1, bias=False))
    return net


@register("xception")
class XceptionNetwork(plain.PlainNetwork[plain.Config]):
    """Xception with a CIFAR stem, plain (Chollet 2017).

    Cost: 30 passes of 0.37 G.
    """

    def network(self, data: Dataset) -> nn.Module:
        """The Xception for this dataset."""
        return xception(channels=data.shape[0], classes=len(data.classes))
