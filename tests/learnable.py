"""Small data that can be learnt in a few steps."""

import numpy as np

from bench.data import Dataset, Split


def dataset(
    n: int = 60,
    *,
    classes: int = 3,
    channels: int = 1,
    side: int = 8,
    crop: int = 0,
    flip: bool = False,
    eps: float = 0.1,
    noise: int = 40,
) -> Dataset:
    """Every class is a pattern of its own under noise; `n` training and 12 test images, classes in turn."""
    patterns = np.random.default_rng(0).integers(60, 196, (classes, side, side, channels))

    def read(which: str) -> Split:
        count, seed = (n, 1) if which == "train" else (12, 2)
        labels = np.arange(count) % classes
        added = np.random.default_rng(seed).integers(-noise, noise + 1, (count, side, side, channels))
        return Split((patterns[labels] + added).astype(np.uint8), labels)

    return Dataset(
        name="patterns",
        classes=tuple(str(i) for i in range(classes)),
        shape=(channels, side, side),
        mean=(0.5,) * channels,
        std=(0.25,) * channels,
        eps=eps,
        crop=crop,
        flip=flip,
        read=read,
    )
