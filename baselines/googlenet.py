"""GoogLeNet with BatchNorm for small images (Szegedy et al., CVPR 2015, arXiv 1409.4842, Table 1).

torchvision's inception modules. The stem is one 3×3 convolution of stride 1 to 192 channels; the two max
pools between the groups of modules are padded; there are no auxiliary classifiers.
`towers` is what stands for the paper's 5×5 convolution: one 3×3 (torchvision's) or `two` 3×3 in a row
(kuangliu's).

Parameters with ten classes: 5,490,986. Multiply-adds of one 32×32 image: 1,337 M.
Keys are laid out as in torchvision: conv1.conv, inception3a.branch1.conv, …, fc.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import Tensor, nn

from baselines import plain
from bench.checkpoint import Source, renamed
from bench.config import config
from bench.data import Dataset
from bench.registry import register


@config
class Config(plain.Config):
    """`towers` is how many 3×3 convolutions stand for a 5×5 one."""

    towers: Literal["one", "two"] = "one"


def googlenet(*, channels: int, classes: int, towers: Literal["one", "two"] = "one") -> nn.Module:
    """torchvision's GoogLeNet with a stem for small images."""
    from torchvision.models.googlenet import BasicConv2d, GoogLeNet, Inception

    net: nn.Module = GoogLeNet(num_classes=classes, aux_logits=False, init_weights=False)
    net.add_module("conv1", BasicConv2d(channels, 192, kernel_size=3, padding=1))
    for name in ("maxpool1", "conv2", "conv3", "maxpool2"):
        net.add_module(name, nn.Identity())
    for name in ("maxpool3", "maxpool4"):
        net.add_module(name, nn.MaxPool2d(3, 2, 1))
    if towers == "two":
        for module in list(net.modules()):
            if isinstance(module, Inception):
                width = module.branch3[1].conv.out_channels
                module.branch3.append(BasicConv2d(width, width, kernel_size=3, padding=1))
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-5
    return net


_STEPS = {"0": "0.conv", "1": "0.bn", "3": "1.conv", "4": "1.bn", "6": "2.conv", "7": "2.bn"}
_KUANGLIU_NAMES = renamed(
    (r"^pre_layers\.0\.", "conv1.conv."),
    (r"^pre_layers\.1\.", "conv1.bn."),
    (r"^([a-e])([345])\.b1\.0\.", r"inception\2\1.branch1.conv."),
    (r"^([a-e])([345])\.b1\.1\.", r"inception\2\1.branch1.bn."),
    (
        r"^([a-e])([345])\.b([23])\.([013467])\.",
        lambda m: f"inception{m[2]}{m[1]}.branch{m[3]}.{_STEPS[m[4]]}.",
    ),
    (r"^([a-e])([345])\.b4\.1\.", r"inception\2\1.branch4.1.conv."),
    (r"^([a-e])([345])\.b4\.2\.", r"inception\2\1.branch4.1.bn."),
    (r"^linear\.", "fc."),
)


def from_kuangliu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """kuangliu's GoogLeNet as torchvision's with two towers.

    Its convolutions have biases; a BatchNorm follows each, and subtracting one from the running mean is the
    same.
    """
    state = _KUANGLIU_NAMES(state)
    for key in [key for key in state if key.endswith(".conv.bias")]:
        mean = key.replace(".conv.bias", ".bn.running_mean")
        if mean in state and state[mean].shape == state[key].shape:
            state[mean] = state[mean] - state.pop(key)
    return state


@register("googlenet")
class GoogLeNet(plain.PlainNetwork[Config]):
    """GoogLeNet with a CIFAR stem, plain (Szegedy et al. 2015).

    Cost: 30 passes of 1.3 G.
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
            translate=from_kuangliu,
            settings={"towers": "two"},
            states="acc",
        ),
        Source(
            name="huyvnphan/PyTorch_CIFAR10",
            dataset="cifar10",
            mean=plain.HUYVNPHAN_MEAN,
            std=plain.HUYVNPHAN_STD,
            clean=92.85,
            settings={"towers": "one"},
        ),
    )

    def network(self, data: Dataset) -> nn.Module:
        """The GoogLeNet for this dataset."""
        return googlenet(channels=data.shape[0], classes=len(data.classes), towers=self.config.towers)
