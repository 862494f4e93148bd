"""Models whose robustness is known exactly."""

import numpy as np
import torch
from torch import nn

from bench.data import Dataset, Split

SHAPE = (3, 4, 4)


class Hyperplane(nn.Module):
    """Classes 0 and 1 lie on the two sides of one hyperplane, the others are idle.

    The L∞ distance of `x` to the other class is `|z| / ‖w‖₁` with `z = w·x + b`, while the box does not bind.
    """

    def __init__(self, classes: int = 10, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.classes = classes
        self.w = nn.Parameter(torch.randn(SHAPE, generator=generator))
        self.b = nn.Parameter(-0.5 * self.w.detach().sum())

    def z(self, x):
        return (x * self.w).flatten(1).sum(1) + self.b

    def forward(self, x):
        z = self.z(x)
        idle = z.new_full((len(z), self.classes - 2), -1e3)
        return torch.cat([torch.stack([z, -z], 1), idle], 1)

    @torch.no_grad()
    def margin(self, x, norm="Linf"):
        length = self.w.abs().sum() if norm == "Linf" else self.w.norm()
        return self.z(x).abs() / length

    @torch.no_grad()
    def labels(self, x):
        return (self.z(x) < 0).long()


def points(n: int = 24, seed: int = 1) -> torch.Tensor:
    """Images in the middle of the box, `(n, 3, 4, 4)`, on the 1/255 grid."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(96, 160, (n, *SHAPE), generator=generator).float() / 255


def small_net(classes: int = 4, channels: int = 3, seed: int = 0) -> nn.Module:
    """A convolutional network with BatchNorm statistics that are not the initial ones, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, classes),
        )
        net.train()
        for _ in range(5):
            net(torch.rand(16, channels, 4, 4) * 2 - 0.5)
        net.eval().requires_grad_(False)
        # no class may win everywhere, or nothing could be broken
        net[-1].weight *= 5
        net[-1].bias -= net(torch.rand(64, channels, 4, 4) * 0.25 + 0.375).mean(0)
    return net


def dataset(n: int = 24, classes: int = 10, labels: torch.Tensor | None = None, seed: int = 1) -> Dataset:
    """`points` as a dataset, labelled by the hyperplane unless labels are given."""
    x = points(n, seed)
    y = Hyperplane().labels(x) if labels is None else labels
    images = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    split = Split(np.ascontiguousarray(images), y.numpy().astype(np.int64))
    return Dataset(
        name="points",
        classes=tuple(str(i) for i in range(classes)),
        shape=SHAPE,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        eps=8 / 255,
        crop=0,
        flip=False,
        read=lambda which: split,
    )
