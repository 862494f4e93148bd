"""Convolutions whose gradient a processor's library writes beyond its memory, and how a network with them is trained all the same.

On a CPU the gradient of a strided 1×1 convolution's weights, laid channels-last and with fewer input channels than fill a
vector register, is wrong, or the process dies (github.com/uxlfoundation/oneDNN/issues/6035; seen with torch 2.14 on AVX2).
Images of one channel count as channels-last, however they lie. Gradients of images are not concerned, so attacks need not ask.
Our own ResNets pick the pixels first and are not concerned either; a stranger's network may be.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn


def sound(model: nn.Module, device: torch.device | str) -> AbstractContextManager[object]:
    """The context in which a step of this network's training is sound: slower, without oneDNN, where it must be."""
    if torch.device(device).type == "cpu" and overruns(model):
        return _without_onednn()
    return nullcontext()


@contextmanager
def _without_onednn() -> Iterator[None]:
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def overruns(model: nn.Module) -> bool:
    """Whether a convolution of this network may be written beyond its memory."""
    return any(
        isinstance(part, nn.Conv2d)
        and part.kernel_size == (1, 1)
        and max(part.stride) > 1
        and part.in_channels // part.groups < vector_floats()
        for part in model.modules()
    )


def vector_floats() -> int:
    """How many float32 numbers a register of this processor holds."""
    return 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
