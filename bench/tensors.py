"""Tensors from a file of torch's, and nothing else: no object of a stranger's is built, and no file can make it wait."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import torch
import torch._weights_only_unpickler as reader

#: characters of a complaint that are kept
SHORT = 1000


class _Refused(pickle.UnpicklingError):
    """What torch's reader refuses, in few words.

    torch searches its own complaint with expressions that take the square of its length, and a file may put a name of
    megabytes into it: hours.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(str(message)[:SHORT])


setattr(reader, "UnpicklingError", _Refused)  # noqa: B010


def tensors(file: Path | io.BytesIO) -> object:
    """What a file that `torch.save` wrote holds, on the CPU.

    Raises:
        pickle.UnpicklingError: it wants more than tensors.
        Exception: it is damaged; torch's reader then raises almost anything.
    """
    found: object = torch.load(file, map_location="cpu", weights_only=True)
    return found
