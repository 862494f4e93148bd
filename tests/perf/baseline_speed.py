"""Input-gradient speed of the plain networks against torchvision's and timm's, built for the same images.

    python tests/perf/baseline_speed.py [--batch 32] [--rounds 5] [--device cpu] [NAME ...]

Three are timed in turn, round by round, so that a busy machine slows all of them: the network of `baselines/`
as it is, its folded copy that attacks take gradients from (`bench.fast`), and the plain counterpart; all
channels-last, eval mode, fp32, parameters without gradient. The table shows the median images per second, and
ours as shares of the plain one. A share of `fast` below 0.9 is an exit code of 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from bench import registry
from bench.attacks.gradient import input_gradient
from bench.attacks.losses import cross_entropy
from bench.data import Dataset
from bench.fast import fast

CLASSES = 10


def torchvision_resnet(name: str) -> nn.Module:
    import torchvision

    net: nn.Module = torchvision.models.get_model(name, num_classes=CLASSES)
    net.add_module("conv1", nn.Conv2d(3, 64, 3, 1, 1, bias=False))
    net.add_module("maxpool", nn.Identity())
    return net


def torchvision_vgg() -> nn.Module:
    from torchvision.models.vgg import VGG, cfgs, make_layers

    net: nn.Module = VGG(make_layers(cfgs["E"], batch_norm=True), init_weights=False)
    net.add_module("avgpool", nn.Identity())
    net.add_module("classifier", nn.Linear(512, CLASSES))
    return net


def torchvision_densenet(blocks: tuple[int, int, int, int]) -> nn.Module:
    from torchvision.models.densenet import DenseNet

    net: nn.Module = DenseNet(32, blocks, num_classes=CLASSES)
    net.get_submodule("features").add_module("conv0", nn.Conv2d(3, 64, 3, 1, 1, bias=False))
    net.get_submodule("features").add_module("pool0", nn.Identity())
    return net


def torchvision_googlenet() -> nn.Module:
    from torchvision.models.googlenet import BasicConv2d, GoogLeNet

    net: nn.Module = GoogLeNet(CLASSES, aux_logits=False, init_weights=False)
    net.add_module("conv1", BasicConv2d(3, 192, kernel_size=3, padding=1))
    for name in ("maxpool1", "conv2", "conv3", "maxpool2"):
        net.add_module(name, nn.Identity())
    for name in ("maxpool3", "maxpool4"):
        net.add_module(name, nn.MaxPool2d(3, 2, 1))
    return net


def torchvision_inception() -> nn.Module:
    from torchvision.models.inception import BasicConv2d, Inception3

    net: nn.Module = Inception3(CLASSES, aux_logits=False, init_weights=False)
    net.add_module("Conv2d_1a_3x3", BasicConv2d(3, 192, kernel_size=3, padding=1))
    for name in ("Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2"):
        net.add_module(name, nn.Identity())
    return net


def timm_xception() -> nn.Module:
    from timm.models.xception import Xception

    net: nn.Module = Xception(CLASSES)
    net.add_module("conv1", nn.Conv2d(3, 32, 3, 1, 1, bias=False))
    net.add_module("conv2", nn.Conv2d(32, 64, 3, 1, 1, bias=False))
    return net


def torchvision_mobilenet() -> nn.Module:
    from torchvision.models.mobilenetv2 import MobileNetV2

    groups = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 3, 2]]
    net: nn.Module = MobileNetV2(CLASSES, inverted_residual_setting=[*groups, [6, 320, 1, 1]])
    net.get_submodule("features.0").add_module("0", nn.Conv2d(3, 32, 3, 1, 1, bias=False))
    return net


#: the resnets 20 to 56 have no counterpart in either package
PLAIN: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: torchvision_resnet("resnet18"),
    "resnet34": lambda: torchvision_resnet("resnet34"),
    "resnet50": lambda: torchvision_resnet("resnet50"),
    "vgg19": torchvision_vgg,
    "densenet121": lambda: torchvision_densenet((6, 12, 24, 16)),
    "densenet169": lambda: torchvision_densenet((6, 12, 32, 32)),
    "googlenet": torchvision_googlenet,
    "inception_v3": torchvision_inception,
    "xception": timm_xception,
    "mobilenet_v2": torchvision_mobilenet,
}


def no_images(split: str) -> object:
    raise AssertionError("a speed table needs no images")


def cifar_shape() -> Dataset:
    """A dataset that has the shape of CIFAR-10 and no images."""
    return Dataset(
        name="cifar10",
        classes=tuple(map(str, range(CLASSES))),
        shape=(3, 32, 32),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        eps=8 / 255,
        crop=4,
        flip=True,
        read=no_images,  # type: ignore[arg-type]
    )


def prepared(net: nn.Module, device: torch.device) -> nn.Module:
    return net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def rate(model: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> float:
    """Input gradients per second, of one batch."""
    start = time.perf_counter()
    input_gradient(model, x, y, cross_entropy)
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return len(x) / (time.perf_counter() - start)


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 1 where a network is more than a tenth slower than its counterpart."""
    parser = argparse.ArgumentParser(description="input-gradient speed of the plain networks")
    parser.add_argument(
        "names", nargs="*", default=[], metavar="NAME", help=f"of {', '.join(PLAIN)}; default: all"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    unknown = set(given.names) - set(PLAIN)
    if unknown:
        parser.error(f"no counterpart for {', '.join(sorted(unknown))}")
    device, data = torch.device(given.device), cifar_shape()
    torch.manual_seed(0)
    x = torch.rand(given.batch, *data.shape, device=device).to(memory_format=torch.channels_last)
    y = torch.arange(given.batch, device=device) % CLASSES
    print(
        f"{given.batch} images a batch, {given.rounds} rounds, {torch.get_num_threads()} thread(s), {device}"
    )
    print(
        f"{'network':14}{'plain':>10}{'ours':>10}{'fast':>10}{'ours/plain':>12}{'fast/plain':>12}   images/s"
    )
    slow = []
    for name in given.names or PLAIN:
        cls = registry.get(name)
        ours = prepared(cls(cls.recipes["paper"]).build(data), device)
        models = [prepared(PLAIN[name](), device), ours, fast(ours, x[:4], y[:4]).model]
        for model in models:
            rate(model, x, y)
        rounds = [[rate(model, x, y) for model in models] for _ in range(given.rounds)]
        plain, own, quick = (statistics.median(column) for column in zip(*rounds, strict=True))
        shares = f"{own / plain:12.2f}{quick / plain:12.2f}"
        print(f"{name:14}{plain:10.1f}{own:10.1f}{quick:10.1f}{shares}", flush=True)
        if quick < 0.9 * plain:
            slow.append(name)
    if slow:
        print(f"more than a tenth slower than their counterparts: {', '.join(slow)}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
