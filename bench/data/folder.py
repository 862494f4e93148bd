"""`folder:DIR`: a user's own image files, one folder per class, as torchvision's ImageFolder lays them out.

    DIR/test/cat/001.png    required
    DIR/train/cat/001.png   only for training

Classes are numbered in the order of their folders' names. Files may lie deeper; hidden ones are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from bench.data import Dataset, Split
from bench.data.undescribed import mean_std, padding, radius
from bench.errors import DataError

SUFFIXES = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
#: keys the order of the images
ORDER = 20_240_229
#: how many training images tell mean and deviation; decoding all of a large set would take minutes
SAMPLE = 5_000


def load(directory: str) -> Dataset:
    """The images of a folder with `test/` and perhaps `train/`.

    Images become RGB and must be of one size. Each split is in a fixed random order, so that its first images
    are a fair sample. Mean and deviation are those of the first 5,000 training images, or test images where
    there are no others.

    Raises:
        DataError: a folder is missing or empty, or an image cannot be read or has another size. Images that
            were not needed for mean and deviation are found out when their split is read.
    """
    root = Path(directory).expanduser()
    if not directory or not root.is_dir():
        raise DataError(
            f"no folder {directory!r}; folder:DIR wants a folder that holds test/, with a folder per class"
        )
    if not (root / "test").is_dir():
        raise DataError(f"{root} has no folder test/; folder:DIR wants DIR/test/CLASS/IMAGE")
    classes = _classes(root / "test")
    files = {"test": _files(root / "test", classes)}
    if (root / "train").is_dir():
        if (trained := _classes(root / "train")) != classes:
            odd = sorted(set(trained) ^ set(classes))[0]
            where, where_not = ("train", "test") if odd in trained else ("test", "train")
            raise DataError(
                f"{root / where} has a class {odd!r} and {root / where_not} has not; they must agree"
            )
        files["train"] = _files(root / "train", classes)

    size = _size(files["test"][0][0])
    sample = files.get("train", files["test"])[:SAMPLE]
    mean, std = mean_std(_decoded(path, size)[None] for path, _ in sample)
    shape = (3, size[1], size[0])
    return Dataset(
        name=f"folder:{directory}",
        classes=classes,
        shape=shape,
        mean=mean,
        std=std,
        eps=radius(shape),
        crop=padding(shape),
        flip=False,
        read=partial(_read, root, files, size),
    )


def _read(root: Path, files: dict[str, list[tuple[Path, int]]], size: tuple[int, int], which: str) -> Split:
    if which not in files:
        raise DataError(f"{root} has no folder {which}/; put the training images there, beside test/")
    images = np.empty((len(files[which]), size[1], size[0], 3), dtype=np.uint8)
    for i, (path, _) in enumerate(files[which]):
        images[i] = _decoded(path, size)
    return Split(images, np.array([label for _, label in files[which]], dtype=np.int64))


def _classes(split: Path) -> tuple[str, ...]:
    """The names of the class folders, sorted."""
    names = tuple(sorted(path.name for path in _seen(split) if path.is_dir()))
    if len(names) < 2:
        raise DataError(f"{split} must have a folder for each of two or more classes; it has {len(names)}")
    return names


def _files(split: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    """Every image of the split with its label, in the fixed random order."""
    found = []
    for label, name in enumerate(classes):
        images = sorted(_images(split / name), key=lambda path: path.as_posix())
        if not images:
            raise DataError(f"{split / name} has no images; known are {', '.join(sorted(SUFFIXES))}")
        found += [(path, label) for path in images]
    order = np.random.Generator(np.random.Philox(key=ORDER)).permutation(len(found))
    return [found[i] for i in order]


def _images(folder: Path) -> Iterator[Path]:
    for path in _seen(folder):
        if path.is_dir():
            yield from _images(path)
        elif path.suffix.lower() in SUFFIXES:
            yield path


def _seen(folder: Path) -> list[Path]:
    """What is in the folder and not hidden: no `.ipynb_checkpoints`, no `._cat.png`."""
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _size(path: Path) -> tuple[int, int]:
    """Width and height."""
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from None


def _decoded(path: Path, size: tuple[int, int]) -> np.ndarray:
    """The image as uint8 `(h, w, 3)`, which must be of this width and height."""
    try:
        with Image.open(path) as image:
            if image.size != size:
                raise DataError(
                    f"{path} is {image.size[0]}×{image.size[1]} and other images are {size[0]}×{size[1]}; "
                    "all must have one size (width×height)"
                )
            if image.mode.startswith(("I", "F")):
                # Pillow would cut such values off at 255
                raise DataError(f"{path} has more than 8 bits per channel; save it with 8")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is no image that can be read ({error}); replace or remove it")
