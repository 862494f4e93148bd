"""What is taken for granted about images that come without a description: `npz:DIR` and `folder:DIR`."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def radius(shape: tuple[int, int, int]) -> float:
    """The L∞ radius that is customary for images of shape `(c, h, w)`, in pixel units.

    0.1 for tiny grey images such as digits, 0.3 for those of MNIST's size, 8/255 for everything else.
    """
    c, h, w = shape
    if c == 1 and max(h, w) <= 8:
        return 0.1
    if shape == (1, 28, 28):
        return 0.3
    return 8 / 255


def padding(shape: tuple[int, int, int]) -> int:
    """The padding of the random crop for images of shape `(c, h, w)`: about an eighth, at most 4 pixels."""
    side = min(shape[1:])
    if side >= 28:
        return 4
    return 1 if side >= 8 else 0


def mean_std(chunks: Iterable[np.ndarray]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of images uint8 `(n, h, w, c)`, as pixels in [0,1].

    Counts how often each of the 256 values occurs: exact, and the same however the images are cut into
    chunks. A channel that never changes gets the deviation 1, so that one may divide by it.
    """
    counts: np.ndarray | int = 0
    for chunk in chunks:
        channels = np.moveaxis(chunk, -1, 0)
        counts = counts + np.stack([np.bincount(values.ravel(), minlength=256) for values in channels])
    values = np.arange(256) / 255
    weights = counts / np.sum(counts, axis=1, keepdims=True)
    mean = weights @ values
    variance = (weights * (values - mean[:, None]) ** 2).sum(axis=1)
    return tuple(mean.tolist()), tuple(np.sqrt(np.where(variance == 0, 1, variance)).tolist())
