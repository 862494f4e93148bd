"""What a model is in this harness: pixels in [0,1] in, logits out, normalisation inside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bench.types import Images, Logits


class Normalize(nn.Module):
    """`(x - mean) / std` per channel; the constants are no part of the checkpoint."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Images) -> Tensor:
        """`(b, c, h, w)` to the same shape."""
        return (x - self.mean) / self.std


class Normalized(nn.Module):
    """A network that was trained on normalised images, taking pixels: `net(normalize(x))`."""

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.net = net

    def forward(self, x: Images) -> Logits:
        """Pixels `(b, c, h, w)` to logits `(b, k)`."""
        logits: Logits = self.net(self.normalize(x))
        return logits


class LogProbabilities(nn.Module):
    """A model that gives probabilities, as one that gives their logarithms: logits of the same answers.

    Cross-entropy takes a softmax of what it is given; of probabilities that would be a second one, whose gradient hides
    how wrong the model is. The softmax of log p is p again.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Images) -> Logits:
        """`(b, c, h, w)` to `log p`, `(b, k)`; of a probability of 0 the logarithm of the least positive float."""
        p: Tensor = self.model(x)
        return p.clamp_min(torch.finfo(p.dtype).tiny).log()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model with every part in eval mode; each part's own mode is put back afterwards."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for part, training in modes:
            part.training = training
