"""Datasets by name: `digits`, `cifar10`, `cifar100`, `svhn`, `tiny-imagenet`, `npz:DIR`, `folder:DIR`.

A dataset is images as they were stored (uint8) with what a model and a protocol must know about them. Pixels
become float32 in [0,1] a batch at a time, so that a test set costs its own size in memory and no more.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.errors import DataError, UnknownName

if TYPE_CHECKING:
    import torch

    from bench.types import Images, Labels


@dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 `(n, h, w, c)` and labels int64 `(n,)`, checked against each other.

    Raises:
        DataError: a type or a shape is another, or the lengths differ.
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or images.ndim != 4:
            raise DataError(f"images must be uint8 (n, h, w, c); got {images.dtype} {images.shape}")
        if labels.dtype != np.int64 or labels.ndim != 1:
            raise DataError(f"labels must be int64 (n,); got {labels.dtype} {labels.shape}")
        if len(images) != len(labels):
            raise DataError(f"every image needs a label; got {len(images)} images and {len(labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: np.ndarray | slice, device: torch.device | str = "cpu") -> tuple[Images, Labels]:
        """The images at these positions as float32 `(b, c, h, w)` in [0,1], and their labels int64 `(b,)`."""
        import torch

        images = torch.from_numpy(np.ascontiguousarray(self.images[index])).to(device)
        # a slice of an array is a view: what the caller does to a batch must not reach the dataset
        labels = torch.from_numpy(np.ascontiguousarray(self.labels[index])).to(device, copy=True)
        return pixels(images), labels

    @cached_property
    def hash(self) -> str:
        """sha256 of shape, pixels and labels."""
        digest = hashlib.sha256(repr((self.images.shape, "uint8")).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        digest.update(np.ascontiguousarray(self.labels, dtype="<i8").data)
        return digest.hexdigest()

    def take(self, index: np.ndarray) -> Split:
        """The split of these positions alone."""
        return Split(self.images[index], self.labels[index])


def pixels(images: torch.Tensor) -> Images:
    """Images as they were stored, uint8 `(b, h, w, c)`, as float32 `(b, c, h, w)` in [0,1]."""
    return images.permute(0, 3, 1, 2).float().div_(255).contiguous()


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What a model and a protocol must know of a dataset; a split is read when it is first asked for.

    Args:
        name: as it is typed.
        classes: one name per label.
        shape: `(c, h, w)`.
        mean, std: per channel, of pixels in [0,1].
        eps: the L∞ radius that is telling for PGD on these images, in pixel units.
        crop: padding of the random crop that training uses; 0 for none.
        flip: whether a mirrored image is still of its class.
        read: `"train"` or `"test"` to a Split; raises DataError where there is none.
    """

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    eps: float
    crop: int
    flip: bool
    read: Callable[[str], Split] = field(repr=False)

    @cached_property
    def train(self) -> Split:
        """The training images; raises DataError where the dataset has none."""
        return self._checked("train")

    @cached_property
    def test(self) -> Split:
        """The test images."""
        return self._checked("test")

    def _checked(self, which: str) -> Split:
        split = self.read(which)
        c, h, w = self.shape
        if split.images.shape[1:] != (h, w, c):
            raise DataError(
                f"{self.name}: {which} images are (h, w, c) = {split.images.shape[1:]}, not {(h, w, c)}"
            )
        if len(split) == 0:
            raise DataError(f"{self.name}: the {which} split has no images")
        if split.labels.min() < 0 or split.labels.max() >= len(self.classes):
            raise DataError(
                f"{self.name}: {which} labels run from {split.labels.min()} to {split.labels.max()}; "
                f"{len(self.classes)} classes allow 0 to {len(self.classes) - 1}"
            )
        return split


def names() -> dict[str, str]:
    """What `load` accepts, each with one line about it; DIR stands for a folder."""
    return {
        "digits": "handwritten digits, 8×8 grey, 10 classes: 1,437 train, 360 test; comes with scikit-learn",
        "cifar10": "small photographs, 32×32 colour, 10 classes: 50,000 train, 10,000 test",
        "cifar100": "small photographs, 32×32 colour, 100 classes: 50,000 train, 10,000 test",
        "svhn": "house numbers, 32×32 colour, 10 classes: 73,257 train, 26,032 test",
        "tiny-imagenet": "photographs, 64×64 colour, 200 classes: 100,000 train, 10,000 test; DATA/tiny-imagenet-200/ as unpacked",
        "npz:DIR": "DIR/test.npz and perhaps DIR/train.npz, each with images (uint8) and labels",
        "folder:DIR": "DIR/test/CLASS/*.png and perhaps DIR/train/CLASS/*.png",
    }


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """The dataset of that name.

    Args:
        name: one of `names()`, with a folder of the user's in place of DIR.
        data_dir: where the files of cifar10, cifar100, svhn and tiny-imagenet are, or those of the first three go when
            they are downloaded; by default the environment variable BENCH_DATA, else `./data`.

    Raises:
        UnknownName: there is no such dataset.
        DataError: its files are missing, damaged or of the wrong form; what is read only when a split is
            first asked for raises it then.
    """
    from bench.data import digits, folder, npz, official, tiny_imagenet

    kind, colon, path = name.partition(":")
    if colon and kind == "npz":
        return npz.load(path)
    if colon and kind == "folder":
        return folder.load(path)
    if name == "digits":
        return digits.load()
    data_dir = data_dir or Path(os.environ.get("BENCH_DATA") or "data")
    if name in official.NAMES:
        return official.load(name, data_dir)
    if name == tiny_imagenet.NAME:
        return tiny_imagenet.load(data_dir)
    raise UnknownName("dataset", name, names())
