"""Randomness that is addressed, not consumed.

A draw is a function of its address alone: `Rng(seed, "pgd", 0).at("start").uniform(x)` gives the same numbers
whenever it is asked, whatever was drawn before. With `images` every image has a stream of its own, so what an
image is given depends neither on the batch it sits in nor on the process that handles it.

Two draws at one address are equal; draw anew at another one: `rng.at("step", 3)`.

Counter-based generation is numpy's Philox (Salmon et al., SC 2011); an address is hashed to its key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


class Rng:
    """The stream at an address; `images` are the dataset positions of a batch's rows, if it has any."""

    def __init__(self, *address: int | str, images: Sequence[int] | None = None) -> None:
        self.address = address
        self.images = images

    def at(self, *address: int | str) -> Rng:
        """The stream at an address below this one."""
        return Rng(*self.address, *address, images=self.images)

    def take(self, rows: Tensor) -> Rng:
        """The same streams for some rows of the batch; `rows` is a mask or a list of positions."""
        if self.images is None:
            return self
        positions = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        return Rng(*self.address, images=[self.images[i] for i in positions.tolist()])

    def uniform(self, like: Tensor) -> Tensor:
        """U[0,1) of the shape, type and device of `like`."""
        return self._draw(like, lambda generator, shape: generator.random(shape, dtype=np.float32))

    def normal(self, like: Tensor) -> Tensor:
        """N(0,1) of the shape, type and device of `like`."""
        return self._draw(like, lambda generator, shape: generator.standard_normal(shape, dtype=np.float32))

    def permutation(self, n: int) -> Tensor:
        """The numbers 0..n-1 in random order, int64 `(n,)`."""
        return torch.from_numpy(self._generator().permutation(n))

    def integers(self, low: int, high: int, size: int) -> Tensor:
        """`size` integers from low..high-1, int64."""
        return torch.from_numpy(self._generator().integers(low, high, size))

    def choice(self, values: Sequence[T]) -> T:
        """One of the values, all equally likely."""
        return values[int(self._generator().integers(len(values)))]

    def seed(self) -> int:
        """A 63-bit seed for a generator of somebody else's."""
        return self._key(None) & (2**63 - 1)

    def _draw(self, like: Tensor, draw: object) -> Tensor:
        assert callable(draw)
        shape = tuple(like.shape)
        if self.images is None:
            values = draw(self._generator(), shape)
        else:
            assert len(self.images) == shape[0], f"{len(self.images)} streams for {shape[0]} rows"
            values = np.empty(shape, dtype=np.float32)
            for row, image in enumerate(self.images):
                values[row] = draw(self._generator(image), shape[1:])
        return torch.from_numpy(values).to(device=like.device, dtype=like.dtype)

    def _generator(self, image: int | None = None) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=self._key(image)))

    def _key(self, image: int | None) -> int:
        text = json.dumps([*self.address, image])
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
