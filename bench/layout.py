"""How images and weights lie in memory while a network learns: channels-last, unless that is unsafe."""

from __future__ import annotations

import torch
from torch import nn


def layout(model: nn.Module, device: torch.device | str) -> torch.memory_format:
    """The memory format in which this network may be trained on this device.

    Channels-last is the quicker one. But on a CPU the gradient of a strided 1×1 convolution's weights, channels-last and with
    fewer input channels than fill a vector register, is written beyond the memory it was given: it is wrong, or the
    process dies (github.com/uxlfoundation/oneDNN/issues/6035, seen with torch 2.14 on AVX2). Gradients of images are not
    concerned, so attacks need not ask.
    """
    unsafe = torch.device(device).type == "cpu" and any(_overruns(part) for part in model.modules())
    return torch.contiguous_format if unsafe else torch.channels_last


def _overruns(part: nn.Module) -> bool:
    # those of grouped convolutions are few for each group, and where experts run one by one they are of one expert
    return (
        isinstance(part, nn.Conv2d)
        and part.kernel_size == (1, 1)
        and max(part.stride) > 1
        and part.in_channels // part.groups < vector_floats()
    )


def vector_floats() -> int:
    """How many float32 numbers a register of this processor holds."""
    return 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
