"""CIFAR-10, CIFAR-100 and SVHN as their authors publish them, read by torchvision.

Files are looked for in one folder, and fetched into it when they are not there. torchvision compares each
file with its official md5 before it reads it: CIFAR's are pickles, and only the authors' own get unpickled.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np

from bench.data import Dataset, Split
from bench.errors import DataError

NAMES = ("cifar10", "cifar100", "svhn")

CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"

CIFAR100_CLASSES = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
    camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup
    dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower
    leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid
    otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray
    road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
    sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm
"""


def load(name: str, data_dir: Path) -> Dataset:
    """The dataset of that name (one of `NAMES`); no file in `data_dir` is touched until a split is asked for.

    Reading a split raises DataError if one of its files is damaged, or missing and not to be had.
    """
    data_dir = data_dir.expanduser()
    if name == "cifar10":
        return Dataset(
            name=name,
            classes=tuple(CIFAR10_CLASSES.split()),
            shape=(3, 32, 32),
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            eps=8 / 255,
            crop=4,
            flip=True,
            read=partial(_read_cifar, "CIFAR10", data_dir),
        )
    if name == "cifar100":
        return Dataset(
            name=name,
            classes=tuple(CIFAR100_CLASSES.split()),
            shape=(3, 32, 32),
            mean=(0.5071, 0.4865, 0.4409),
            std=(0.2673, 0.2564, 0.2762),
            eps=8 / 255,
            crop=4,
            flip=True,
            read=partial(_read_cifar, "CIFAR100", data_dir),
        )
    return Dataset(
        name=name,
        classes=tuple(str(digit) for digit in range(10)),
        shape=(3, 32, 32),
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1980, 0.2010, 0.1970),
        eps=8 / 255,
        crop=4,
        flip=False,
        read=partial(_read_svhn, data_dir),
    )


def _read_cifar(class_name: str, root: Path, which: str) -> Split:
    import torchvision.datasets
    from torchvision.datasets.utils import check_integrity, extract_archive

    official: Any = getattr(torchvision.datasets, class_name)
    # torchvision hashes the files of both splits, whichever it reads; one split must not need the other's
    other = "test_list" if which == "train" else "train_list"
    one_split: Any = type(class_name, (official,), {other: []})

    folder = root / official.base_folder
    batches = official.train_list if which == "train" else official.test_list
    files = [
        (folder / file, md5) for file, md5 in [*batches, (official.meta["filename"], official.meta["md5"])]
    ]
    if missing := _missing(files):
        archive = root / official.filename
        with _arriving(missing, official.url, archive) as arrivals:
            if not archive.is_file():
                archive = _download(official.url, arrivals / official.filename, official.tgz_md5)
            elif not check_integrity(archive, official.tgz_md5):
                raise _damaged(archive)
            extract_archive(archive, arrivals)
            _keep((arrivals / official.base_folder).iterdir(), folder)

    data = _verified(partial(one_split, root, train=which == "train"), files)
    return Split(np.ascontiguousarray(data.data), np.asarray(data.targets, dtype=np.int64))


def _read_svhn(root: Path, which: str) -> Split:
    from torchvision.datasets import SVHN

    url, name, md5 = SVHN.split_list[which]
    files = [(root / name, md5)]
    if missing := _missing(files):
        with _arriving(missing, url, root / name) as arrivals:
            _keep([_download(url, arrivals / name, md5)], root)

    data = _verified(partial(SVHN, root, split=which), files)
    return Split(np.ascontiguousarray(data.data.transpose(0, 2, 3, 1)), data.labels)


def _missing(files: Iterable[tuple[Path, str]]) -> Path | None:
    """The first file that is not there."""
    return next((path for path, _ in files if not path.is_file()), None)


def _verified(read: Any, files: Iterable[tuple[Path, str]]) -> Any:
    """What torchvision's loader makes of the files."""
    from torchvision.datasets.utils import check_integrity

    try:
        return read()
    except RuntimeError:
        for path, md5 in files:
            if not check_integrity(path, md5):
                raise _damaged(path) from None
        raise


def _damaged(path: Path) -> DataError:
    return DataError(
        f"{path} is damaged: its md5 is not that of the official file; "
        "delete it and run again to download it, or put the official file in its place"
    )


@contextmanager
def _arriving(missing: Path, url: str, wanted: Path) -> Iterator[Path]:
    """A folder beside the data for what is under way: no broken download or rival process leaves half a file.

    Raises:
        DataError: something inside failed for want of a network, of room, or of the right to write.
    """
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=wanted.parent, prefix=".download-") as arrivals:
            yield Path(arrivals)
    except (OSError, RuntimeError, HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{missing} is missing and {url} could not be fetched ({reason}); "
            f"put that file at {wanted}, or choose the folder where the data is with --data-dir"
        ) from None


def _download(url: str, path: Path, md5: str) -> Path:
    """`path`, fetched and compared with its md5; progress goes to stderr."""
    from torchvision.datasets.utils import download_url

    download_url(url, path.parent, path.name, md5)
    return path


def _keep(arrived: Iterable[Path], folder: Path) -> None:
    """Moves what arrived into the folder, but never over a file that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in arrived:
        if not (folder / path.name).exists():
            path.replace(folder / path.name)
