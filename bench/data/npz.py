"""`npz:DIR`: a user's own images as numpy archives.

    DIR/test.npz    required
    DIR/train.npz   only for training
        images      uint8 `(n, h, w, c)` with c 1 or 3, or `(n, h, w)`
        labels      integers from 0, `(n,)`
        classes     optional: the names of the labels

Nothing is unpickled. An archive is read one array at a time, and for the statistics a few images at a time.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib.npyio import NpzFile

from bench.data import Dataset, Split
from bench.data.undescribed import mean_std, padding, radius
from bench.errors import DataError

#: bytes of pixels that are looked at together
CHUNK = 2**20
#: an array beyond so many bytes, packed to less than this share of them, is a bomb: photographs hardly pack at all
LARGE, PACKED = 2**28, 200
#: a label beyond this is somebody's id, not a class
MOST_CLASSES = 2**16


@dataclass(frozen=True)
class _Facts:
    """What an archive says without its pixels being decoded."""

    shape: tuple[int, int, int, int]
    highest_label: int
    classes: tuple[str, ...] | None


def load(directory: str) -> Dataset:
    """The images of a folder with `test.npz` and perhaps `train.npz`.

    Mean and deviation are those of the training images, or of the test images where there are no others.

    Raises:
        DataError: a file is missing, damaged, or holds something else than images and their labels.
    """
    root = Path(directory).expanduser()
    if not directory or not root.is_dir():
        raise DataError(f"no folder {directory!r}; npz:DIR wants a folder that holds test.npz")
    files = {"test": root / "test.npz"}
    if (root / "train.npz").exists():
        files["train"] = root / "train.npz"
    facts = {which: _inspected(path) for which, path in files.items()}

    _, h, w, c = facts["test"].shape
    classes = _classes(files, facts)
    for which, path in files.items():
        if facts[which].shape[1:] != (h, w, c):
            raise DataError(
                f"{path} holds images (h, w, c) = {facts[which].shape[1:]} and {files['test']} {(h, w, c)}; "
                "train and test must have one shape"
            )
        if facts[which].highest_label >= len(classes):
            raise DataError(
                f"{path} has the label {facts[which].highest_label}, "
                f"but `classes` has only {len(classes)} names, for 0 to {len(classes) - 1}"
            )
    mean, std = mean_std(_chunks(files.get("train", files["test"])))
    return Dataset(
        name=f"npz:{directory}",
        classes=classes,
        shape=(c, h, w),
        mean=mean,
        std=std,
        eps=radius((c, h, w)),
        crop=padding((c, h, w)),
        flip=False,
        read=partial(_read, files, root),
    )


def _read(files: dict[str, Path], root: Path, which: str) -> Split:
    if which not in files:
        raise DataError(f"{root} has no {which}.npz; put the training images there, beside test.npz")
    with _opened(files[which]) as file:
        shape = _shape(files[which], file)
        labels = _labels(files[which], file, shape[0])
        images = np.ascontiguousarray(file["images"]).reshape(shape)
    return Split(images, labels)


def _inspected(path: Path) -> _Facts:
    with _opened(path) as file:
        shape = _shape(path, file)
        labels = _labels(path, file, shape[0])
        classes = None
        if "classes" in file.files:
            names = header(file, "classes")
            if names.dtype.kind != "U" or len(names.shape) != 1 or names.shape[0] < 2:
                raise DataError(
                    f"{path}: `classes` must be two or more names, a text array (k,); "
                    f"got {names.dtype} {names.shape}"
                )
            classes = tuple(str(name) for name in file["classes"])
    return _Facts(shape, int(labels.max()), classes)


def _classes(files: dict[str, Path], facts: dict[str, _Facts]) -> tuple[str, ...]:
    """The names that an archive gives, else the numbers up to the highest label, and at least two."""
    given = {which: fact.classes for which, fact in facts.items() if fact.classes is not None}
    if len(set(given.values())) > 1:
        raise DataError(
            f"{files['train']} and {files['test']} name different `classes`; they must be the same"
        )
    for classes in given.values():
        return classes
    return tuple(
        str(label) for label in range(max(2, 1 + max(fact.highest_label for fact in facts.values())))
    )


@contextmanager
def _opened(path: Path) -> Iterator[NpzFile]:
    """The archive, its arrays still on disk.

    Raises:
        DataError: there is no such file, it is no archive, or something in it cannot be decoded.
    """
    if not path.is_file():
        raise DataError(f"no file {path}; npz:DIR wants DIR/test.npz with `images` and `labels`")
    try:
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path} is no npz archive, or was cut short; write it again with numpy.savez")
        # opened here: numpy leaves open what it cannot read
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            for key in ("images", "labels"):
                if f"{key}.npy" not in file.zip.namelist():
                    found = ", ".join(file.files) or "nothing"
                    raise DataError(
                        f"{path} has no `{key}`; it needs `images` and `labels`, and holds {found}"
                    )
            yield file
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} is damaged ({reason}); write it again with numpy.savez") from None


def _member(file: NpzFile, key: str) -> IO[bytes]:
    """The bytes of an array's file inside the archive."""
    assert file.zip is not None, "the archive is closed"
    return file.zip.open(f"{key}.npy")


@dataclass(frozen=True)
class _Header:
    """What an array is, without its values."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype
    #: where the values begin
    offset: int


def header(file: NpzFile, key: str) -> _Header:
    """What an array is, compared with the room that it takes: nothing is unpacked that its shape does not ask for.

    Raises:
        ValueError: the array claims another size than it has, or is packed as no images are.
    """
    with _member(file, key) as member:
        old = np.lib.format.read_magic(member) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        found = _Header(*read(member), member.tell())
    assert file.zip is not None, "the archive is closed"
    info = file.zip.getinfo(f"{key}.npy")
    claimed = math.prod(found.shape) * found.dtype.itemsize
    if not found.dtype.hasobject and found.offset + claimed != info.file_size:
        raise ValueError(f"`{key}` claims {claimed} bytes and has {info.file_size - found.offset}")
    if info.file_size > LARGE and info.file_size > PACKED * info.compress_size:
        raise ValueError(f"`{key}` unpacks {info.compress_size} bytes to {info.file_size}, as no images do")
    return found


def _shape(path: Path, file: NpzFile) -> tuple[int, int, int, int]:
    """`(n, h, w, c)` of the images."""
    images = header(file, "images")
    if images.dtype != np.uint8:
        remedy = "; for pixels in [0,1] that is numpy.rint(255 * images)" if images.dtype.kind == "f" else ""
        raise DataError(f"{path}: `images` are {images.dtype}; store them as uint8, 0 to 255{remedy}")
    if len(images.shape) not in (3, 4):
        raise DataError(f"{path}: `images` must be (n, h, w, c) or (n, h, w); got {images.shape}")
    n, h, w, c = (*images.shape, 1)[:4]
    if c not in (1, 3):
        remedy = "; channels come last" if images.shape[1] in (1, 3) else ""
        raise DataError(
            f"{path}: `images` must have 1 or 3 channels, (n, h, w, c); got {images.shape}{remedy}"
        )
    if 0 in images.shape:
        raise DataError(f"{path} has no images: their shape is {images.shape}")
    return n, h, w, c


def _labels(path: Path, file: NpzFile, n: int) -> np.ndarray:
    """The labels of `n` images, int64 `(n,)`."""
    header_ = header(file, "labels")
    if header_.dtype.kind not in "iu":
        raise DataError(f"{path}: `labels` are {header_.dtype}; they must be integers, 0 for the first class")
    if len(header_.shape) != 1:
        raise DataError(f"{path}: `labels` must be one number per image, (n,); got {header_.shape}")
    if header_.shape[0] != n:
        raise DataError(f"{path} has {n} images and {header_.shape[0]} labels; every image needs one")
    labels = file["labels"]
    if labels.min() < 0:
        raise DataError(f"{path} has the label {labels.min()}; labels count from 0")
    if labels.max() >= MOST_CLASSES:
        raise DataError(
            f"{path} has the label {labels.max()}; number the classes from 0, at most {MOST_CLASSES}"
        )
    return np.asarray(labels, dtype=np.int64)


def _chunks(path: Path) -> Iterator[np.ndarray]:
    """All images in order, uint8 `(m, h, w, c)`, few enough at a time to weigh at most `CHUNK` bytes."""
    with _opened(path) as file:
        n, h, w, c = _shape(path, file)
        size = h * w * c
        step = max(1, CHUNK // size)
        header_ = header(file, "images")
        if header_.fortran_order:
            # an image's pixels lie far apart in such a file, so it has to be read as a whole
            whole = file["images"].reshape(n, h, w, c)
            yield from (whole[i : i + step] for i in range(0, n, step))
            return
        with _member(file, "images") as member:
            member.read(header_.offset)
            for i in range(0, n, step):
                pixels = member.read(min(step, n - i) * size)
                yield np.frombuffer(pixels, np.uint8).reshape(-1, h, w, c)
