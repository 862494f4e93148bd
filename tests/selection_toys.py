"""A mixture that looks robust to whoever follows its gradient, and is not."""

import torch
from torch import nn

SHAPE = (3, 8, 8)


class SelectionToy(nn.Module):
    """Two experts and a selection that the adversary can move; classes 0 and 1.

    The left half of an image is its evidence: expert 0 reads the class off it and is right, expert 1 answers the
    opposite and is always wrong. The right half is a lure: expert 1 is selected once its mean exceeds 1/2 + `guard`.

    Expert 0 is the surer the larger the mean of the lure, so while it is selected the gradient of the answer leads away
    from the selection of expert 1; expert 1 does not look at the lure. What expert 0 says turns only beyond 0.2.

    The L∞ distance of `x` to a wrong answer is `margin(x)`, for radii up to 0.2 on `images()`. A random start within
    0.05 does not get there by chance: that takes the mean of 96 pixels.
    """

    soft = False
    experts_count = 2

    soft = False
    experts_count = 2

    def __init__(self, guard: float = 0.02, steepness: float = 100.0) -> None:
        super().__init__()
        self.guard, self.steepness = guard, steepness

    def forward(self, x):
        outputs, chosen = self.all_outputs(x), self.selected(x)
        return outputs.gather(1, chosen[:, None, None].expand(-1, 1, 2)).squeeze(1)

    def gate(self, x):
        ahead = self.steepness * (self._lure(x) - 0.5 - self.guard)
        return torch.stack([-ahead, ahead], 1) / 2

    def all_outputs(self, x):
        z = 10 * (x[..., : SHAPE[2] // 2].flatten(1).mean(1) - 0.5)
        sure = z * (1 + self._lure(x))
        return torch.stack([torch.stack([sure, -sure], 1), torch.stack([-z, z], 1)], 1)

    def selected(self, x):
        return self.gate(x).argmax(1)

    @torch.no_grad()
    def margin(self, x):
        return (0.5 + self.guard - self._lure(x)).clamp_min(0)

    @torch.no_grad()
    def labels(self, x):
        """What expert 0 says, `(b,)`."""
        return self.all_outputs(x)[:, 0].argmax(1)

    @staticmethod
    def images(n: int = 24, seed: int = 0) -> torch.Tensor:
        """`(n, 3, 8, 8)` on the 1/255 grid, half of each class; `margin` is `guard` give or take 0.003."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.empty(n, *SHAPE)
        x.copy_(torch.randint(116, 140, x.shape, generator=generator))
        x[::2, ..., : SHAPE[2] // 2] += 64
        x[1::2, ..., : SHAPE[2] // 2] -= 64
        # the mean of the grid's numbers 116 to 139 is 127.5, the middle of the box
        return x / 255

    @staticmethod
    def _lure(x):
        return x[..., SHAPE[2] // 2 :].flatten(1).mean(1)
