"""How float32 numbers are multiplied: as float32, or on a GPU, where that was asked for, as TF32.

TF32 keeps float32's range and ten bits of the mantissa; NVIDIA's GPUs from Ampere on multiply matrices several times as fast
in it. torch has switches for it, of the whole process and of two generations, and also for bfloat16 products on CPUs. A
stranger's module may have turned any of them; what is set here holds inside `with`, and what there was is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypeVar

import torch

_T = TypeVar("_T")

# torch's stubs know few of their parts
_GPU: Any = torch.backends.cudnn
_CPU: Any = torch.backends.mkldnn
#: what multiplies float32 on a GPU, and on a CPU
ON_GPUS: tuple[Any, ...] = (torch.backends.cuda.matmul, _GPU.conv, _GPU.rnn)
ON_CPUS: tuple[Any, ...] = (_CPU.matmul, _CPU.conv, _CPU.rnn)


def exact_arithmetic() -> AbstractContextManager[None]:
    """Float32 as float32: no product of fewer bits anywhere."""
    return _multiplying("ieee")


def tf32() -> AbstractContextManager[None]:
    """Float32 products in TF32 on a GPU; on a CPU as float32."""
    return _multiplying("tf32")


def multiplies_in_tf32(device: torch.device) -> bool:
    """Whether the device has TF32."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def emulates_bf16(device: torch.device) -> bool:
    """Whether bf16 products are made up of others on this device, many times slower than float32: where torch can tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) < (8, 0)
    told: Callable[[], bool] | None = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return device.type == "cpu" and told is not None and not told()


def arithmetic_of(model: object) -> AbstractContextManager[object]:
    """How gradients of a model are multiplied: as its `arithmetic()` says, if it has one."""
    chosen: Callable[[], AbstractContextManager[object]] = getattr(model, "arithmetic", nullcontext)
    return chosen()


@contextmanager
def _multiplying(on_gpus: Literal["ieee", "tf32"]) -> Iterator[None]:
    older = _told(torch.get_float32_matmul_precision), _told(lambda: torch.backends.cudnn.allow_tf32)
    before = [(one, one.fp32_precision) for one in (*ON_GPUS, *ON_CPUS)]
    quick = on_gpus == "tf32"
    try:
        # the older switches first: they turn some of the newer ones, and what reads them refuses where the two disagree
        _turn("high" if quick else "highest", quick)
        for one in ON_GPUS:
            one.fp32_precision = on_gpus
        for one in ON_CPUS:
            one.fp32_precision = "ieee"
        yield
    finally:
        _turn(*older)
        for one, precision in before:
            one.fp32_precision = precision


def _turn(products: str | None, convolutions: bool | None) -> None:
    """Sets the older switches that are given."""
    if products is not None:
        torch.set_float32_matmul_precision(products)
    if convolutions is not None:
        torch.backends.cudnn.allow_tf32 = convolutions


def _told(read: Callable[[], _T]) -> _T | None:
    """What an older switch says; None where torch refuses to, because a newer one was turned another way."""
    try:
        return read()
    except RuntimeError:
        return None
