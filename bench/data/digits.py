"""scikit-learn's handwritten digits: 1,797 real 8×8 grey images, always at hand.

They are the test half of the UCI optical digits (Alpaydin and Kaynak, 1998). Pixels are counts from 0 to 16;
here they are scaled to 0…255.
"""

from __future__ import annotations

import numpy as np

from bench.data import Dataset, Split

#: of the pixels of the 1,437 training images
MEAN, STD = 0.305434, 0.375957


def load() -> Dataset:
    """The digits, split once and for all: each class gives a fifth of its images to the test set."""
    return Dataset(
        name="digits",
        classes=tuple(str(digit) for digit in range(10)),
        shape=(1, 8, 8),
        mean=(MEAN,),
        std=(STD,),
        eps=0.1,
        crop=0,
        flip=False,
        read=_read,
    )


def _read(which: str) -> Split:
    # scikit-learn takes a second to import
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    positions = np.arange(len(digits.target))
    # both halves come back shuffled, so the first images of either are a fair sample
    train, test = train_test_split(positions, test_size=360, random_state=0, stratify=digits.target)
    chosen = train if which == "train" else test
    images = np.rint(digits.images[chosen, :, :, None] * (255 / 16)).astype(np.uint8)
    return Split(images, digits.target[chosen].astype(np.int64))
