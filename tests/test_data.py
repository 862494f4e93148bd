"""Datasets: what they hold, what they cost, and what they say when something is wrong with them."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image
from scipy.io import savemat

from bench.data import Dataset, Split, load, names
from bench.data.official import CIFAR100_CLASSES
from bench.data.undescribed import mean_std, padding, radius
from bench.errors import DataError, UnknownName


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- names


def test_names_are_known_without_importing_torch():
    code = "import sys, bench.data; bench.data.names(); sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
    assert list(names()) == [
        "digits",
        "cifar10",
        "cifar100",
        "svhn",
        "tiny-imagenet",
        "npz:DIR",
        "folder:DIR",
    ]


@pytest.mark.parametrize(
    ("given", "near"),
    [("cifar11", "cifar10"), ("digit", "digits"), ("npz", "npz:DIR"), ("SVHN:x", "known: ")],
)
def test_an_unknown_name_is_refused_with_a_suggestion(given, near):
    with pytest.raises(UnknownName, match=f"no dataset named '{given}'.*{near}"):
        load(given)


# --- Split, Dataset


@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [
        (np.zeros((2, 4, 4, 1), np.float32), np.zeros(2, np.int64), "uint8 .*float32"),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.int64), r"\(n, h, w, c\).*\(2, 4, 4\)"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, np.int32), "int64 .*int32"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros((2, 1), np.int64), r"\(n,\).*\(2, 1\)"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, np.int64), "2 images and 3 labels"),
    ],
)
def test_a_split_refuses_arrays_that_do_not_fit(images, labels, says):
    with pytest.raises(DataError, match=says):
        Split(images, labels)


@pytest.mark.parametrize(
    ("split", "says"),
    [
        (
            Split(np.zeros((1, 4, 4, 1), np.uint8), np.array([2])),
            "from 2 to 2; 2 classes allow 0 to 1",
        ),
        (Split(np.zeros((1, 4, 4, 1), np.uint8), np.array([-1])), "labels run from -1"),
        (Split(np.zeros((1, 4, 5, 1), np.uint8), np.array([0])), r"\(4, 5, 1\), not \(4, 4, 1\)"),
        (Split(np.zeros((0, 4, 4, 1), np.uint8), np.array([], np.int64)), "no images"),
    ],
)
def test_a_dataset_refuses_a_split_that_is_not_what_it_declares(split, says):
    data = Dataset(
        name="mine",
        classes=("a", "b"),
        shape=(1, 4, 4),
        mean=(0.5,),
        std=(0.5,),
        eps=0.1,
        crop=0,
        flip=False,
        read=lambda which: split,
    )
    with pytest.raises(DataError, match=says):
        _ = data.test


def test_a_batch_is_channels_first_in_the_unit_interval():
    split = Split(noise(5, 2, 3, 3), np.arange(5))
    x, y = split.batch(np.array([4, 1]))
    assert x.dtype == torch.float32
    assert x.shape == (2, 3, 2, 3)
    assert x[1, 2, 0, 1] * 255 == split.images[1, 0, 1, 2]
    assert y.tolist() == [4, 1]


def test_what_is_done_to_a_batch_does_not_reach_the_split():
    split = Split(noise(5, 2, 3, 3), np.arange(5))
    before = split.hash
    x, y = split.batch(slice(0, 3))
    x.zero_()
    y.zero_()
    assert Split(split.images, split.labels).hash == before


def test_a_slice_is_read_without_a_copy_of_the_split():
    split = Split(noise(1000, 32, 32, 3), np.zeros(1000, np.int64))
    split.batch(slice(0, 1))
    tracemalloc.start()
    split.batch(slice(0, 8))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < split.images.nbytes / 20


def test_the_hash_tells_pixels_labels_and_shapes_apart():
    images, labels = np.zeros((2, 2, 4, 1), np.uint8), np.array([0, 1])
    changed = images.copy()
    changed[1, 1, 3, 0] = 1
    splits = [
        (images, labels),
        (changed, labels),
        (images, labels[::-1]),
        (images.reshape(2, 4, 2, 1), labels),
    ]
    assert len({Split(*split).hash for split in splits}) == 4


def test_taken_positions_come_in_the_order_they_were_named():
    split = Split(noise(5, 2, 2, 1), np.arange(5))
    taken = split.take(np.array([3, 0]))
    assert taken.labels.tolist() == [3, 0]
    assert np.array_equal(taken.images[0], split.images[3])


# --- digits


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


def test_digits_are_split_1437_to_360(digits):
    assert digits.train.images.shape == (1437, 8, 8, 1)
    assert digits.test.images.shape == (360, 8, 8, 1)
    assert (digits.shape, digits.eps, digits.crop, digits.flip) == ((1, 8, 8), 0.1, 0, False)


def test_digits_give_a_fifth_of_each_class_to_the_test_set(digits):
    train, test = np.bincount(digits.train.labels), np.bincount(digits.test.labels)
    assert len(test) == len(digits.classes) == 10
    assert np.all(np.abs(test - (train + test) * 360 / 1797) < 1)


def test_digits_share_no_image_between_train_and_test(digits):
    train = {image.tobytes() for image in digits.train.images}
    assert len(train) == 1437
    assert not train & {image.tobytes() for image in digits.test.images}


def test_the_first_test_digits_are_a_fair_sample(digits):
    assert np.all(np.bincount(digits.test.labels[:100], minlength=10) >= 5)


def test_digits_never_change(digits):
    assert load("digits").test.hash == digits.test.hash
    assert digits.test.hash[:8] == "8c02c11e"
    assert digits.train.hash[:8] == "75924116"


def test_digits_are_255ths(digits):
    x, y = digits.test.batch(slice(None))
    assert x.shape == (360, 1, 8, 8)
    assert torch.equal(x, torch.from_numpy(digits.test.images[:, None, :, :, 0]).float() / 255)
    assert (x.min(), x.max()) == (0, 1)
    assert y.tolist() == digits.test.labels.tolist()


def test_the_mean_and_deviation_of_digits_are_those_of_the_training_pixels(digits):
    pixels = digits.train.images / 255
    assert digits.mean == pytest.approx([pixels.mean()], abs=1e-6)
    assert digits.std == pytest.approx([pixels.std()], abs=1e-6)


# --- cifar, svhn


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.fixture
def offline(monkeypatch):
    """Any use of the network fails as it does without one."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A folder in CIFAR-10's layout, its md5s taken for the official ones, and its 20 + 6 images."""
    official = torchvision.datasets.CIFAR10
    folder = tmp_path / official.base_folder
    folder.mkdir()
    planes = noise(26, 3, 32, 32)

    def write(name: str, content: object) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return [name, md5(folder / name)]

    def batch(name: str, rows: range) -> list[str]:
        return write(name, {"data": planes[rows].reshape(-1, 3072), "labels": [i % 10 for i in rows]})

    train = [batch(f"data_batch_{i + 1}", range(4 * i, 4 * i + 4)) for i in range(5)]
    test = [batch("test_batch", range(20, 26))]
    name, checksum = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(official, "train_list", train)
    monkeypatch.setattr(official, "test_list", test)
    monkeypatch.setattr(official, "meta", {"filename": name, "key": "label_names", "md5": checksum})
    return tmp_path, planes


def packed(root: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The made-up CIFAR-10 as the archive it is published in; the folder itself is removed."""
    official = torchvision.datasets.CIFAR10
    folder, archive = root / official.base_folder, root / official.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, official.base_folder)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    monkeypatch.setattr(official, "tgz_md5", md5(archive))
    content = archive.read_bytes()
    archive.unlink()
    return content


class Response(io.BytesIO):
    """As much of an HTTP response as a download looks at."""

    url = None

    @property
    def length(self) -> int:
        return len(self.getvalue())


def test_intact_cifar_files_are_read_without_network(cifar, offline):
    root, planes = cifar
    data = load("cifar10", root)
    assert np.array_equal(data.train.images, planes[:20].transpose(0, 2, 3, 1))
    assert np.array_equal(data.test.images, planes[20:].transpose(0, 2, 3, 1))
    assert data.test.labels.tolist() == [0, 1, 2, 3, 4, 5]
    x, _ = data.test.batch(slice(0, 1))
    assert torch.equal(x[0], torch.from_numpy(planes[20]).float() / 255)


def test_a_split_is_held_once(cifar, offline):
    images = load("cifar10", cifar[0]).train.images
    assert images.base is None
    assert images.nbytes == 20 * 32 * 32 * 3


def test_the_test_split_needs_no_training_files(cifar, offline):
    root, _ = cifar
    for i in range(1, 6):
        (root / "cifar-10-batches-py" / f"data_batch_{i}").unlink()
    data = load("cifar10", root)
    assert len(data.test) == 6
    with pytest.raises(DataError, match=r"data_batch_1 is missing"):
        _ = data.train


def test_the_data_folder_comes_from_the_environment_if_it_is_not_given(cifar, offline, monkeypatch):
    monkeypatch.setenv("BENCH_DATA", str(cifar[0]))
    assert len(load("cifar10").test) == 6


def test_the_data_folder_is_data_if_nothing_names_another(cifar, offline, monkeypatch):
    root, _ = cifar
    monkeypatch.delenv("BENCH_DATA", raising=False)
    monkeypatch.chdir(root)
    (root / "data").mkdir()
    (root / "cifar-10-batches-py").rename(root / "data" / "cifar-10-batches-py")
    assert len(load("cifar10").test) == 6


def test_a_tilde_stands_for_the_home_folder(cifar, offline, monkeypatch):
    root, _ = cifar
    archive(root)
    monkeypatch.setenv("HOME", str(root))
    monkeypatch.setenv("USERPROFILE", str(root))
    assert len(load("cifar10", Path("~")).test) == 6
    assert len(load("npz:~").test) == 6


def test_a_damaged_file_is_named_and_never_unpickled(cifar, offline):
    root, _ = cifar
    trap = root / "unpickled"
    file = root / "cifar-10-batches-py" / "test_batch"

    class Trap:
        def __reduce__(self):
            return Path.touch, (trap,)

    file.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match=r"test_batch is damaged: its md5 .* delete it") as raised:
        _ = load("cifar10", root).test
    assert str(file) in str(raised.value)
    assert not trap.exists()


def test_a_damaged_list_of_classes_is_named(cifar, offline):
    root, _ = cifar
    (root / "cifar-10-batches-py" / "batches.meta").write_bytes(b"")
    with pytest.raises(DataError, match=r"batches\.meta is damaged"):
        _ = load("cifar10", root).test


@pytest.mark.parametrize(
    ("name", "missing", "wanted"),
    [
        ("cifar10", "cifar-10-batches-py/test_batch", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python/test", "cifar-100-python.tar.gz"),
        ("svhn", "test_32x32.mat", "test_32x32.mat"),
    ],
)
def test_without_files_and_network_it_says_which_file_goes_where(name, missing, wanted, tmp_path, offline):
    root = tmp_path / "not" / "yet"
    with pytest.raises(DataError) as raised:
        _ = load(name, root).test
    message = str(raised.value)
    assert "\n" not in message
    assert f"{root / missing} is missing" in message
    assert "Name or service not known" in message
    assert f"put that file at {root / wanted}" in message
    assert "--data-dir" in message
    assert list(root.iterdir()) == []


def test_an_archive_that_was_put_there_is_unpacked_without_network(cifar, offline, monkeypatch):
    root, _ = cifar
    (root / "cifar-10-python.tar.gz").write_bytes(packed(root, monkeypatch))
    assert len(load("cifar10", root).test) == 6
    assert len(load("cifar10", root).train) == 20


def test_a_damaged_archive_is_named(cifar, offline, monkeypatch):
    root, _ = cifar
    (root / "cifar-10-python.tar.gz").write_bytes(packed(root, monkeypatch)[:-10])
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz is damaged"):
        _ = load("cifar10", root).test


def test_a_missing_set_is_downloaded_with_progress_on_stderr(cifar, monkeypatch, capsys):
    root, planes = cifar
    content = packed(root, monkeypatch)
    monkeypatch.setattr(urllib.request, "urlopen", lambda request: Response(content))
    assert np.array_equal(load("cifar10", root).test.images, planes[20:].transpose(0, 2, 3, 1))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "100%" in printed.err
    assert [path.name for path in root.iterdir()] == ["cifar-10-batches-py"]
    assert len(load("cifar10", root).train) == 20


def test_a_broken_download_leaves_nothing_behind(cifar, monkeypatch):
    root, _ = cifar
    content = packed(root, monkeypatch)
    monkeypatch.setattr(urllib.request, "urlopen", lambda request: Response(content[:-10]))
    with pytest.raises(DataError, match="could not be fetched"):
        _ = load("cifar10", root).test
    assert list(root.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told_like_a_download_that_fails(tmp_path, offline):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"test_batch is missing .*could not be fetched .*--data-dir"):
        _ = load("cifar10", tmp_path / "file").test


def test_svhn_is_read_with_its_tens_as_zeros(tmp_path, monkeypatch, offline):
    images = noise(5, 32, 32, 3)
    path = tmp_path / "test_32x32.mat"
    savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": np.array([[10], [1], [9], [10], [3]], np.uint8)})
    official = torchvision.datasets.SVHN
    monkeypatch.setattr(official, "split_list", {"test": ["http://nowhere", path.name, md5(path)]})
    data = load("svhn", tmp_path)
    assert np.array_equal(data.test.images, images)
    assert data.test.labels.tolist() == [0, 1, 9, 0, 3]
    assert data.test.images.base is None

    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"test_32x32\.mat is damaged"):
        _ = load("svhn", tmp_path).test


def test_cifar100_has_a_hundred_classes_in_alphabetical_order():
    classes = CIFAR100_CLASSES.split()
    assert len(set(classes)) == 100
    assert classes == sorted(classes)


@pytest.mark.parametrize(
    ("name", "crop", "flip"), [("cifar10", 4, True), ("cifar100", 4, True), ("svhn", 4, False)]
)
def test_what_is_known_of_an_official_set_is_known_before_its_files_are_there(name, crop, flip, tmp_path):
    data = load(name, tmp_path)
    assert (data.name, data.shape, data.eps) == (name, (3, 32, 32), 8 / 255)
    assert (data.crop, data.flip) == (crop, flip)
    assert len(data.mean) == len(data.std) == 3


# --- tiny-imagenet


@pytest.fixture(scope="module")
def tiny_imagenet(tmp_path_factory):
    """A data folder with 200 classes of one training image each, and 6 validation images, the second of them grey."""
    root = tmp_path_factory.mktemp("data") / "tiny-imagenet-200"
    wnids = [f"n{(7919 * i) % 100_000:08}" for i in range(200)]
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("\n".join(wnids) + "\n")
    for i, wnid in enumerate(wnids):
        (root / "train" / wnid / "images").mkdir(parents=True)
        Image.fromarray(noise(64, 64, 3, seed=i)).save(
            root / "train" / wnid / "images" / f"{wnid}_0.JPEG", "JPEG"
        )
    for i in range(6):
        image = Image.fromarray(noise(64, 64, 3, seed=1000 + i))
        (image.convert("L") if i == 1 else image).save(root / "val" / "images" / f"val_{i}.JPEG", "JPEG")
    lines = [f"val_{i}.JPEG\t{wnids[(3 * i) % 200]}\t0\t0\t62\t62\n" for i in (4, 0, 1, 2, 3, 5)]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root.parent, wnids


def spoilt(data: Path, folder: Path) -> Path:
    """A copy of the data to spoil, file by file: its files are links."""
    shutil.copytree(data, folder, copy_function=os.link, dirs_exist_ok=True)
    return folder / "tiny-imagenet-200"


def decoded(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_tiny_imagenet_comes_in_the_order_of_its_annotations_numbered_as_imagefolder_numbers(tiny_imagenet):
    root, wnids = tiny_imagenet
    data = load("tiny-imagenet", root)
    assert data.shape == (3, 64, 64) and len(data.classes) == 200 and data.classes == tuple(sorted(wnids))
    images = root / "tiny-imagenet-200" / "val" / "images"
    for i, n in enumerate((4, 0, 1, 2, 3, 5)):
        assert np.array_equal(data.test.images[i], decoded(images / f"val_{n}.JPEG"))
        assert data.classes[data.test.labels[i]] == wnids[3 * n]


def test_every_training_image_of_tiny_imagenet_has_its_folders_class(tiny_imagenet):
    root, _ = tiny_imagenet
    data = load("tiny-imagenet", root)
    assert sorted(data.train.labels) == list(range(200))
    for i in (0, 77, 199):
        wnid = data.classes[data.train.labels[i]]
        file = root / "tiny-imagenet-200" / "train" / wnid / "images" / f"{wnid}_0.JPEG"
        assert np.array_equal(data.train.images[i], decoded(file))


def test_grey_photographs_of_tiny_imagenet_have_three_equal_channels(tiny_imagenet):
    grey = load("tiny-imagenet", tiny_imagenet[0]).test.images[2]
    assert (grey == grey[:, :, :1]).all()


def test_validation_images_of_tiny_imagenet_need_no_training_images(tiny_imagenet, tmp_path):
    root = spoilt(tiny_imagenet[0], tmp_path)
    shutil.rmtree(root / "train")
    data = load("tiny-imagenet", tmp_path)
    assert len(data.test) == 6
    with pytest.raises(DataError, match=r"cannot read .*images \(No such file.*--data-dir"):
        _ = data.train


def rewritten(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda r: (r / "wnids.txt").unlink(), r"cannot read .*wnids.txt \(No such file"),
        (lambda r: rewritten(r / "wnids.txt", "n1\n" * 200), "names 1 in 200 lines"),
        (lambda r: rewritten(r / "wnids.txt", "n1\nn2\n"), "must name 200 classes, .* names 2 in 2 lines"),
        (lambda r: (r / "val" / "val_annotations.txt").unlink(), r"cannot read .*val_annotations.txt"),
        (
            lambda r: rewritten(r / "val" / "val_annotations.txt", "a.JPEG\tn0\t0\n"),
            "line 1: .*a class of wnids",
        ),
        (
            lambda r: rewritten(r / "val" / "val_annotations.txt", "../a n0"),
            "line 1: '../a n0' is not a file",
        ),
        (lambda r: rewritten(r / "val" / "val_annotations.txt", ""), "the test split has no images"),
        (lambda r: (r / "val" / "images" / "val_3.JPEG").unlink(), "val_3.JPEG is no image that can be read"),
        (lambda r: rewritten(r / "val" / "images" / "val_3.JPEG", "x"), "val_3.JPEG is no image"),
    ],
)
def test_a_tiny_imagenet_with_a_fault_is_refused_with_the_file_named(spoil, says, tiny_imagenet, tmp_path):
    spoil(spoilt(tiny_imagenet[0], tmp_path))
    with pytest.raises(DataError, match=says) as raised:
        _ = load("tiny-imagenet", tmp_path).test
    assert "\n" not in str(raised.value)


def test_an_image_of_another_size_is_refused_by_tiny_imagenet(tiny_imagenet, tmp_path):
    file = spoilt(tiny_imagenet[0], tmp_path) / "val" / "images" / "val_0.JPEG"
    file.unlink()
    Image.fromarray(noise(64, 65, 3)).save(file, "JPEG")
    with pytest.raises(DataError, match="val_0.JPEG is 65×64"):
        _ = load("tiny-imagenet", tmp_path).test


def test_a_class_without_training_images_is_refused_by_tiny_imagenet(tiny_imagenet, tmp_path):
    folder = spoilt(tiny_imagenet[0], tmp_path) / "train" / tiny_imagenet[1][5] / "images"
    next(folder.iterdir()).unlink()
    with pytest.raises(DataError, match=f"{tiny_imagenet[1][5]}.images has no images"):
        _ = load("tiny-imagenet", tmp_path).train


# --- npz


def archive(folder: Path, split: str = "test", **changes: object) -> Path:
    """A small good archive, but for the changes; an array that is None is left out."""
    arrays = {"images": noise(6, 8, 8, 3), "labels": np.array([0, 1, 2, 0, 1, 2]), **changes}
    np.savez(folder / f"{split}.npz", **{key: value for key, value in arrays.items() if value is not None})
    return folder / f"{split}.npz"


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (28, 28), (5, 7, 3)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_archive_comes_back_as_it_was_stored(shape, order, tmp_path):
    images = {which: noise(6, *shape, seed=seed) for seed, which in enumerate(("train", "test"))}
    for which, stored in images.items():
        archive(tmp_path, which, images=np.asarray(stored, order=order))
    data = load(f"npz:{tmp_path}")
    h, w, c = (*shape, 1)[:3]
    assert data.name == f"npz:{tmp_path}"
    assert data.shape == (c, h, w)
    for which in ("train", "test"):
        split = getattr(data, which)
        assert np.array_equal(split.images, images[which].reshape(6, h, w, c))
        assert split.images.flags.c_contiguous
        assert split.labels.tolist() == [0, 1, 2, 0, 1, 2]
    pixels = images["train"].reshape(-1, c) / 255
    assert data.mean == pytest.approx(pixels.mean(0))
    assert data.std == pytest.approx(pixels.std(0))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64, ">i4"])
def test_labels_may_be_any_integers(dtype, tmp_path):
    archive(tmp_path, labels=np.array([0, 1, 2, 0, 1, 4], dtype))
    data = load(f"npz:{tmp_path}")
    assert data.test.labels.tolist() == [0, 1, 2, 0, 1, 4]
    assert data.classes == ("0", "1", "2", "3", "4")


def test_without_training_images_the_test_images_tell_the_mean_and_train_is_refused(tmp_path):
    archive(tmp_path, images=np.full((6, 8, 8, 3), 51, np.uint8))
    data = load(f"npz:{tmp_path}")
    assert data.mean == pytest.approx((0.2, 0.2, 0.2))
    assert data.std == (1, 1, 1)
    with pytest.raises(DataError, match=r"has no train\.npz"):
        _ = data.train


def test_classes_are_counted_over_both_splits(tmp_path):
    archive(tmp_path, "train", labels=np.array([0, 0, 0, 0, 0, 6]))
    archive(tmp_path, "test")
    assert len(load(f"npz:{tmp_path}").classes) == 7


def test_there_are_always_two_classes(tmp_path):
    archive(tmp_path, labels=np.zeros(6, int))
    assert load(f"npz:{tmp_path}").classes == ("0", "1")


def test_classes_may_have_names(tmp_path):
    archive(tmp_path, classes=np.array(["Katze", "犬", "oiseau", "never seen"]))
    assert load(f"npz:{tmp_path}").classes == ("Katze", "犬", "oiseau", "never seen")


def test_an_archive_is_measured_without_holding_it(tmp_path):
    images = np.zeros((6000, 32, 32, 3), np.uint8)
    np.savez_compressed(tmp_path / "train.npz", images=images, labels=np.zeros(6000, int))
    archive(tmp_path, images=noise(6, 32, 32, 3))
    tracemalloc.start()
    data = load(f"npz:{tmp_path}")
    _ = data.test
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < images.nbytes / 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"images": None}, "has no `images`; it needs `images` and `labels`, and holds labels"),
        ({"labels": None, "y": np.arange(6)}, "has no `labels`; .*holds images, y"),
        (
            {"images": np.zeros((6, 8, 8, 3), np.float32)},
            r"float32; store them as uint8, 0 to 255; .*rint\(255",
        ),
        ({"images": np.zeros((6, 8, 8, 3), np.int64)}, "int64; store them as uint8, 0 to 255$"),
        ({"images": np.array([None] * 6)}, "object; store them as uint8"),
        ({"images": noise(6, 64)}, r"must be \(n, h, w, c\) or \(n, h, w\); got \(6, 64\)"),
        ({"images": noise(6, 8, 8, 4)}, r"1 or 3 channels, .*got \(6, 8, 8, 4\)$"),
        ({"images": noise(6, 3, 8, 8)}, r"got \(6, 3, 8, 8\); channels come last"),
        ({"images": noise(0, 8, 8, 3), "labels": np.zeros(0, int)}, "has no images"),
        ({"images": noise(6, 0, 8, 3)}, "has no images"),
        ({"labels": np.arange(5)}, "6 images and 5 labels"),
        ({"labels": np.array([0, 1, 2, 0, 1, -1])}, "has the label -1; labels count from 0"),
        ({"labels": np.array([0, 1, 2, 0, 1, 10**9])}, "has the label 1000000000; number the classes"),
        ({"labels": np.array([0, 1, 2, 0, 1, 2**64 - 1], np.uint64)}, "has the label 18446744073709551615"),
        ({"labels": np.zeros(6)}, "`labels` are float64; they must be integers"),
        ({"labels": np.zeros(6, bool)}, "`labels` are bool; they must be integers"),
        ({"labels": np.zeros((6, 1), int)}, r"one number per image, \(n,\); got \(6, 1\)"),
        ({"classes": np.array(["a", "b"])}, "has the label 2, but `classes` has only 2 names, for 0 to 1"),
        ({"classes": np.array(["a"])}, "`classes` must be two or more names"),
        ({"classes": np.arange(3)}, "`classes` must be two or more names.*int64"),
        ({"classes": np.array(["a", "b", "c"], object)}, "`classes` must be two or more names.*object"),
    ],
)
def test_an_archive_that_holds_something_else_is_refused(changes, says, tmp_path):
    path = archive(tmp_path, **changes)
    with pytest.raises(DataError, match=says) as raised:
        load(f"npz:{tmp_path}")
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("train", "test", "says"),
    [
        (
            {"images": noise(6, 9, 9, 3)},
            {},
            r"\(9, 9, 3\) and .*\(8, 8, 3\); train and test must have one shape",
        ),
        ({"labels": np.arange(6)}, {"classes": np.array(["a", "b", "c"])}, "train.*label 5, .*only 3 names"),
        (
            {"classes": np.array(["a", "b", "d"])},
            {"classes": np.array(["a", "b", "c"])},
            "different `classes`; they must be the same",
        ),
    ],
)
def test_archives_that_do_not_belong_together_are_refused(train, test, says, tmp_path):
    archive(tmp_path, "train", **train)
    archive(tmp_path, "test", **test)
    with pytest.raises(DataError, match=says):
        load(f"npz:{tmp_path}")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no npz archive, or was cut short"),
        (b"images,labels", "no npz archive, or was cut short"),
        (pickle.dumps({"images": 0}), "no npz archive, or was cut short"),
    ],
)
def test_a_file_that_is_no_archive_is_refused(content, says, tmp_path):
    (tmp_path / "test.npz").write_bytes(content)
    with pytest.raises(DataError, match=says):
        load(f"npz:{tmp_path}")


def test_an_archive_that_was_cut_short_is_refused(tmp_path):
    path = archive(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="no npz archive, or was cut short"):
        load(f"npz:{tmp_path}")


def test_a_flipped_bit_is_noticed(tmp_path):
    path = archive(tmp_path)
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"test\.npz is damaged .*CRC"):
        load(f"npz:{tmp_path}")


@pytest.mark.parametrize("kind", ["npz", "folder"])
@pytest.mark.parametrize("directory", ["", "nowhere", "file"])
def test_a_folder_that_is_not_there_is_refused(kind, directory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=f"no folder '{directory}'; {kind}:DIR wants a folder"):
        load(f"{kind}:{directory}")


def test_a_folder_without_test_archive_is_refused(tmp_path):
    archive(tmp_path, "train")
    with pytest.raises(DataError, match=r"no file .*test\.npz; npz:DIR wants"):
        load(f"npz:{tmp_path}")


# --- folder


def pictures(root: Path, split: str, images: np.ndarray, classes: str = "abc") -> None:
    """PNG files, class by class in turn."""
    for i, image in enumerate(images):
        folder = root / split / classes[i % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:03}.png")


def test_a_folder_comes_back_as_it_was_stored(tmp_path):
    train, test = noise(12, 5, 7, 3), noise(30, 5, 7, 3, seed=1)
    pictures(tmp_path, "train", train)
    pictures(tmp_path, "test", test)
    data = load(f"folder:{tmp_path}")
    assert (data.name, data.classes, data.shape) == (f"folder:{tmp_path}", ("a", "b", "c"), (3, 5, 7))
    assert len(data.train) == 12
    stored = {image.tobytes(): i % 3 for i, image in enumerate(test)}
    assert {image.tobytes(): label for image, label in zip(*pair(data.test), strict=True)} == stored
    assert data.mean == pytest.approx((train / 255).mean((0, 1, 2)))
    assert data.std == pytest.approx((train / 255).std((0, 1, 2)))


def pair(split: Split) -> tuple[np.ndarray, list[int]]:
    return split.images, split.labels.tolist()


def test_the_first_images_of_a_folder_are_not_one_class_and_always_the_same(tmp_path):
    pictures(tmp_path, "test", noise(60, 4, 4, 3))
    first, again = load(f"folder:{tmp_path}").test, load(f"folder:{tmp_path}").test
    assert set(first.labels[:20].tolist()) == {0, 1, 2}
    assert first.hash == again.hash


def test_a_folder_without_training_images_refuses_train(tmp_path):
    pictures(tmp_path, "test", noise(6, 4, 4, 3))
    data = load(f"folder:{tmp_path}")
    with pytest.raises(DataError, match="has no folder train/"):
        _ = data.train


def test_grey_pictures_become_colour_and_hidden_files_are_passed_over(tmp_path):
    grey = noise(6, 4, 4)
    pictures(tmp_path, "test", grey)
    (tmp_path / "test" / ".cache").mkdir()
    (tmp_path / "test" / "a" / "._000.png").write_bytes(b"resource fork")
    (tmp_path / "test" / "a" / "notes.txt").write_text("not a picture")
    data = load(f"folder:{tmp_path}")
    assert data.shape == (3, 4, 4)
    assert {image.tobytes() for image in data.test.images} == {np.stack([g] * 3, -1).tobytes() for g in grey}


def spoil_size(root: Path) -> None:
    Image.fromarray(noise(4, 5, 3)).save(root / "test" / "a" / "000.png")


def spoil_bytes(root: Path) -> None:
    (root / "test" / "a" / "000.png").write_bytes(b"not a picture")


def spoil_end(root: Path) -> None:
    file = root / "test" / "a" / "000.png"
    file.write_bytes(file.read_bytes()[:-30])


def spoil_depth(root: Path) -> None:
    Image.fromarray(np.full((4, 4), 1000, np.uint16)).save(root / "test" / "a" / "000.png")


def spoil_class(root: Path) -> None:
    pictures(root, "train", noise(4, 4, 4, 3), "abcd")


def spoil_empty(root: Path) -> None:
    (root / "test" / "empty").mkdir()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_size, "000.png is 5×4 and other images are 4×4; all must have one size"),
        (spoil_bytes, "000.png is no image that can be read"),
        (spoil_end, "000.png is no image that can be read"),
        (spoil_depth, "000.png has more than 8 bits per channel"),
        (spoil_class, "train has a class 'd' and .*test has not; they must agree"),
        (spoil_empty, "empty has no images; known are .*png"),
    ],
)
def test_a_folder_with_a_fault_is_refused_with_the_file_named(spoil, says, tmp_path):
    pictures(tmp_path, "test", noise(12, 4, 4, 3))
    spoil(tmp_path)
    with pytest.raises(DataError, match=says):
        load(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("folders", "says"),
    [
        ([], "has no folder test/"),
        (["test"], "two or more classes; it has 0"),
        (["test/a"], "two or more classes"),
    ],
)
def test_a_folder_without_classes_is_refused(folders, says, tmp_path):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(DataError, match=says):
        load(f"folder:{tmp_path}")


# --- undescribed


@pytest.mark.parametrize(
    ("shape", "eps", "crop"),
    [
        ((1, 8, 8), 0.1, 1),
        ((1, 4, 4), 0.1, 0),
        ((1, 28, 28), 0.3, 4),
        ((1, 16, 16), 8 / 255, 1),
        ((3, 32, 32), 8 / 255, 4),
        ((3, 8, 8), 8 / 255, 1),
        ((3, 7, 64), 8 / 255, 0),
    ],
)
def test_the_radius_and_the_crop_follow_from_the_shape(shape, eps, crop):
    assert (radius(shape), padding(shape)) == (eps, crop)


def test_the_mean_does_not_depend_on_how_the_images_are_cut():
    images = noise(20, 6, 6, 3)
    whole = mean_std([images])
    assert mean_std(images[i : i + 3] for i in range(0, 20, 3)) == whole
    assert whole[0] == pytest.approx((images / 255).mean((0, 1, 2)))
    assert whole[1] == pytest.approx((images / 255).std((0, 1, 2)))
