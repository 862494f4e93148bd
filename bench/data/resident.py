"""A split that lies on a GPU, so that batches need not be carried there: as it was stored, one byte a pixel.

It is put there once, where it takes no more than a share of what is free. What a batch holds is the same either way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench.data import Split, pixels
from bench.types import Images, Labels

#: the share of a device's free memory that a split may take
SHARE = 0.25


@dataclass(frozen=True, eq=False)
class Resident(Split):
    """A split with its images uint8 `(n, h, w, c)` and labels int64 `(n,)` on a device as well."""

    stored: Tensor
    labelled: Tensor

    def batch(self, index: np.ndarray | slice, device: torch.device | str = "cpu") -> tuple[Images, Labels]:
        """As `Split.batch`; on the device where the images lie none are carried there."""
        asked, there = torch.device(device), self.stored.device
        if asked.type != there.type or asked.index not in (None, there.index):
            return super().batch(index, device)
        if isinstance(index, slice):
            return pixels(self.stored[index]), self.labelled[index].clone()
        at = torch.from_numpy(np.ascontiguousarray(index)).to(there)
        return pixels(self.stored[at]), self.labelled[at]


def resident(split: Split, device: torch.device | str) -> Split:
    """The split on the device, if that has memory of its own and enough of it; else the split."""
    if isinstance(split, Resident) or split.images.nbytes > SHARE * free(torch.device(device)):
        return split
    return Resident(
        split.images,
        split.labels,
        torch.from_numpy(np.require(split.images, requirements=["C", "W"])).to(device),
        torch.from_numpy(np.require(split.labels, requirements=["C", "W"])).to(device),
    )


def free(device: torch.device) -> int:
    """Bytes that are free on a device with memory of its own; 0 for any other."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
