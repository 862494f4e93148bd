"""Models whose robustness is known exactly."""

from itertools import product

import numpy as np
import torch
from scipy.optimize import linprog
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


class Sphere(nn.Module):
    """Classes 0 and 1 lie inside and outside a sphere, the others are idle: logits are quadratic in the image.

    The L2 distance of `x` to the other class is `|r - ‖x - c‖|`, while the box does not bind.
    """

    def __init__(self, radius: float = 0.48, classes: int = 10) -> None:
        super().__init__()
        self.classes, self.radius = classes, radius
        self.c = nn.Parameter(torch.full(SHAPE, 0.5))

    def z(self, x):
        return self.radius**2 - (x - self.c).square().flatten(1).sum(1)

    def forward(self, x):
        z = self.z(x)
        return torch.cat([torch.stack([z, -z], 1), z.new_full((len(z), self.classes - 2), -1e3)], 1)

    @torch.no_grad()
    def margin(self, x):
        return (self.radius - (x - self.c).flatten(1).norm(dim=1)).abs()

    @torch.no_grad()
    def labels(self, x):
        return (self.z(x) < 0).long()


class TwoLayer(nn.Module):
    """A rectified network with so few hidden units that its exact L∞ margin is found by trying all activation patterns."""

    def __init__(self, hidden: int = 5, classes: int = 10, seed: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.classes = classes
        self.w = nn.Parameter(torch.randn(hidden, int(np.prod(SHAPE)), generator=generator))
        self.b = nn.Parameter(-0.5 * self.w.detach().sum(1) + 0.3 * torch.randn(hidden, generator=generator))
        self.a = nn.Parameter(torch.randn(hidden, generator=generator))
        self.c = nn.Parameter(torch.tensor(0.0))

    def z(self, x):
        return (x.flatten(1) @ self.w.T + self.b).relu() @ self.a + self.c

    def forward(self, x):
        z = self.z(x)
        return torch.cat([torch.stack([z, -z], 1), z.new_full((len(z), self.classes - 2), -1e3)], 1)

    @torch.no_grad()
    def labels(self, x):
        return (self.z(x) < 0).long()

    def margin(self, x):
        """The distance of each image to the other class: on every activation pattern a linear program, the least of all."""
        w, b, a, c = (p.detach().double().numpy() for p in (self.w, self.b, self.a, self.c))
        d = w.shape[1]
        found = []
        for image, sign in zip(
            x.flatten(1).double().numpy(), np.sign(self.z(x).detach().numpy()), strict=True
        ):
            best = np.inf
            for pattern in product((0.0, 1.0), repeat=len(a)):
                on = np.array(pattern)
                # unknowns: the image and its distance t; t is least
                rows = [np.hstack([np.eye(d), -np.ones((d, 1))]), np.hstack([-np.eye(d), -np.ones((d, 1))])]
                bounds = [image, -image]
                # each unit on its side of zero
                rows.append(np.hstack([(1 - 2 * on)[:, None] * w, np.zeros((len(a), 1))]))
                bounds.append(-(1 - 2 * on) * b)
                # and the score on the other side
                rows.append(np.hstack([sign * (a * on) @ w, 0.0])[None])
                bounds.append(np.array([-sign * ((a * on) @ b + c)]))
                answer = linprog(
                    np.r_[np.zeros(d), 1.0],
                    np.vstack(rows),
                    np.hstack(bounds),
                    bounds=[(0, 1)] * d + [(0, None)],
                )
                if answer.status == 0:
                    best = min(best, answer.fun)
            found.append(best)
        return torch.tensor(found)


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
