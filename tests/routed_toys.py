"""A routed model that looks robust to whoever follows its gradient, and is not."""

import torch
from oracles import SHAPE
from torch import nn


class RouteToy(nn.Module):
    """Two pathways and a router that each look at pixels of their own; classes 0 and 1.

    The router takes the mean of the first channel, and sends an image down pathway 1 once that exceeds 1/2 by `guard`.
    Pathway 0 takes the other channels and is right, by far more than a radius of twice the guard; pathway 1 says the
    opposite and is always wrong.

    So inside a route the gradient of every loss on the logits is exactly 0 on the first channel, and no step along it
    ever changes the route, while moving the first channel by `guard` makes every image wrong. The gap between the scores
    is `gain` times as large as the way to the switch, so that their softmax is 0 and 1 and has no gradient either.

    The L∞ distance of `x` to a wrong answer is `margin(x)`.
    """

    soft = False
    experts_count = 2

    def __init__(self, guard: float = 0.08, gain: float = 1e4) -> None:
        super().__init__()
        self.guard, self.gain = guard, gain

    def forward(self, x):
        chosen = self.selected(x)[:, None, None].expand(-1, 1, 2)
        return self.all_outputs(x).gather(1, chosen).squeeze(1)

    def gate(self, x):
        beyond = self.gain * (x[:, 0].flatten(1).mean(1) - 0.5 - self.guard)
        return torch.stack([-beyond, beyond], 1) / 2

    def all_outputs(self, x):
        z = 20 * (x[:, 1:].flatten(1).mean(1) - 0.5)
        right = torch.stack([z, -z], 1)
        return torch.stack([right, -right], 1)

    def selected(self, x):
        return self.gate(x).argmax(1)

    @torch.no_grad()
    def margin(self, x):
        """`(b,)`; that of images which pathway 0 has."""
        return (0.5 + self.guard - x[:, 0].flatten(1).mean(1)).clamp_min(0)

    @torch.no_grad()
    def labels(self, x):
        """What pathway 0 says, `(b,)`."""
        return self.all_outputs(x)[:, 0].argmax(1)

    @staticmethod
    def images(n: int = 24, seed: int = 0) -> torch.Tensor:
        """`(n, 3, 4, 4)` on the 1/255 grid, half of each class; the mean of their first channels is 1/2 give or take 0.005."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(-24, 25, (n, *SHAPE), generator=generator).float()
        x[:, 0] -= x[:, 0].mean((1, 2), keepdim=True).round()
        x[::2, 1:] += 64
        x[1::2, 1:] -= 64
        return (x + 128) / 255
