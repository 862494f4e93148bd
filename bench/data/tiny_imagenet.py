"""Tiny-ImageNet (Stanford CS231n, 2015): 200 classes of ImageNet, photographs at 64×64, as its authors lay it out.

    tiny-imagenet-200/wnids.txt                          the classes, one WordNet id a line
    tiny-imagenet-200/train/n01443537/images/*.JPEG      500 of each class
    tiny-imagenet-200/val/images/*.JPEG                  10,000
    tiny-imagenet-200/val/val_annotations.txt            their classes: file, WordNet id, and a box that is not used

The test split is the validation set, in the order of its annotations: the authors' test images have no public labels.
Classes are numbered in the order of their sorted ids, as torchvision's ImageFolder numbers them and most networks know them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from bench.data import Dataset, Split
from bench.data.folder import SUFFIXES, _decoded
from bench.errors import DataError

NAME = "tiny-imagenet"
FOLDER = "tiny-imagenet-200"
CLASSES, SIDE = 200, 64


def load(data_dir: Path) -> Dataset:
    """The images in `data_dir`; grey ones become RGB. An image is read when its split is asked for.

    Raises:
        DataError: the folder is missing, or its list of classes is not one of 200; a split that is read raises it where
            a file is missing or damaged.
    """
    root = data_dir.expanduser() / FOLDER
    classes = _classes(root)
    return Dataset(
        name=NAME,
        classes=classes,
        shape=(3, SIDE, SIDE),
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        eps=8 / 255,
        crop=4,
        flip=True,
        read=partial(_read, root, {wnid: label for label, wnid in enumerate(classes)}),
    )


def _classes(root: Path) -> tuple[str, ...]:
    """The WordNet ids, sorted."""
    found = _lines(root / "wnids.txt")
    if len(found) != CLASSES or len(set(found)) != CLASSES:
        raise DataError(
            f"{root / 'wnids.txt'} must name {CLASSES} classes, one a line; it names {len(set(found))} in {len(found)} lines; unpack the archive again"
        )
    return tuple(sorted(found))


def _read(root: Path, labels: dict[str, int], which: str) -> Split:
    listed = _training(root / "train", labels) if which == "train" else _validation(root / "val", labels)
    images = np.empty((len(listed), SIDE, SIDE, 3), dtype=np.uint8)
    for i, (path, _) in enumerate(listed):
        images[i] = _decoded(path, (SIDE, SIDE))
    return Split(images, np.array([label for _, label in listed], dtype=np.int64))


def _training(folder: Path, labels: dict[str, int]) -> list[tuple[Path, int]]:
    """Every image with its label, class by class."""
    listed = []
    for wnid, label in labels.items():
        images = folder / wnid / "images"
        try:
            paths = sorted(path for path in images.iterdir() if _is_image(path))
        except OSError as error:
            raise _missing(images, error) from None
        if not paths:
            raise DataError(f"{images} has no images; unpack the archive again")
        listed += [(path, label) for path in paths]
    return listed


def _validation(folder: Path, labels: dict[str, int]) -> list[tuple[Path, int]]:
    """Every image with its label, in the order of the annotations."""
    annotations = folder / "val_annotations.txt"
    listed = []
    for number, line in enumerate(_lines(annotations), 1):
        name, wnid = [*line.split("\t"), "", ""][:2]
        if wnid not in labels or Path(name).name != name:
            raise DataError(
                f"{annotations}, line {number}: {line[:60]!r} is not a file and a class of wnids.txt, with a tab between; unpack the archive again"
            )
        listed.append((folder / "images" / name, labels[wnid]))
    return listed


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise _missing(path, error) from None


def _missing(path: Path, error: OSError | UnicodeDecodeError) -> DataError:
    reason = getattr(error, "strerror", None) or "it is no text"
    return DataError(
        f"cannot read {path} ({reason}); unpack tiny-imagenet-200.zip there, or choose the folder that holds {FOLDER}/ with --data-dir"
    )
