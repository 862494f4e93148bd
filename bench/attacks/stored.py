"""Adversarial images that somebody found elsewhere, as a column: `images:FILE`.

They stand in the dataset's order, and go the way of every other attack: what leaves the ball or the box voids the run, and
the deployed model decides.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.data.npz import header
from bench.errors import UsageError
from bench.tensors import tensors
from bench.types import Images

#: what an array of images may be called in an npz
NAMES = ("x_adv", "images")


def stored(path: str | Path) -> Images:
    """The images in a file, float32 `(n, c, h, w)` in [0,1].

    An `.npz` holds `x_adv` or `images`: uint8 `(n, h, w, c)`, or floats `(n, c, h, w)`. A `.pt` holds such a tensor, or a pair of
    images and labels as AutoAttack saves them; nothing but tensors is unpickled.

    Raises:
        UsageError: the file is missing, damaged or of another form.
    """
    file = Path(path)
    try:
        found: object = tensors(file) if file.suffix == ".pt" else _array(file)
    except FileNotFoundError:
        raise UsageError(f"no file {str(path)!r} of adversarial images") from None
    except Exception:
        # a damaged file can make either reader raise anything
        raise UsageError(
            f"{str(path)!r} holds no images that can be read; expected an .npz with x_adv or images, or a .pt with a tensor"
        ) from None
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor) or found.dim() != 4:
        raise UsageError(f"{str(path)!r} holds no batch of images (n, c, h, w); got {_form(found)}")
    if found.dtype == torch.uint8:
        return found.permute(0, 3, 1, 2).float() / 255
    if not found.is_floating_point():
        raise UsageError(f"{str(path)!r}: images must be uint8 or floats in [0,1]; got {found.dtype}")
    return found.float()


def digest(path: str | Path) -> str:
    """Sixteen hex digits of the file's sha256; empty where there is none."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError:
        return ""


def _array(file: Path) -> Tensor:
    # opened here: numpy leaves open what it cannot read
    with file.open("rb") as raw, np.load(raw, allow_pickle=False) as arrays:
        name = next(name for name in (*NAMES, "") if name in arrays or not name)
        header(arrays, name)
        return torch.from_numpy(np.ascontiguousarray(arrays[name]))


def _form(found: object) -> str:
    return f"{tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
