"""The network that gradients come from, compiled, where that pays back within the run.

Compiling fuses what lies between convolutions; it takes about as long whatever the network. So it is tried only where the
run is long enough, before any attack, and what comes out is compared with the network as it was, on a few images, and
timed beside it. Whatever goes wrong, or is no quicker, the network is used as it was, and why is said. Batches of any size
are one program: their size is the only thing about them that changes.
"""

from __future__ import annotations

import time
import warnings
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from bench.arithmetic import arithmetic_of
from bench.attacks.gradient import input_gradient
from bench.errors import VoidRun
from bench.fast import Fast, projection
from bench.moe import ByBatch, most_grouped, small
from bench.progress import duration
from bench.types import Images, Labels, Logits

#: seconds that compiling takes, and the share of gradients' time that it saves; measured on CPUs, on GPUs assumed
TAKES = {"cpu": 45.0, "cuda": 60.0}
SAVES = {"cpu": 0.05, "cuda": 0.2}
#: the largest difference of gradients and of logits from those of the network as it was, relative to their length
APART = {"fp32": 0.05, "tf32": 0.1, "bf16": 0.3}
#: what compiles
BACKEND = "inductor"


def may_compile(device: torch.device) -> bool:
    """Whether compiling is tried at all: not on a CPU, where outcomes are the same bit for bit however long a run takes."""
    return device.type != "cpu"


def pays(device: torch.device, gradients: float) -> tuple[bool, str]:
    """Whether to compile where gradients take so many seconds, and why, in words."""
    takes, saved = TAKES[device.type], SAVES[device.type] * gradients
    worth = saved > takes and may_compile(device)
    why = f"compiling takes about {duration(takes)} and would save about {duration(saved)}"
    if not may_compile(device):
        why += ", and on a CPU outcomes are to be the same bit for bit"
    return worth, f"{'compiled' if worth else 'not compiled'} ({why})"


def compiled(made: Fast, x: Images, y: Labels, precision: str) -> Fast:
    """The network compiled, if it then says the same of these images and is quicker; else as it was, and why.

    Args:
        made: what gradients come from now.
        x, y: two images or more.
        precision: of its gradients.
    """
    assert isinstance(made.model, nn.Module)
    model = Compiled(made.model)
    try:
        with warnings.catch_warnings():
            # a compiler's advice on how to be faster still is no error of this run
            warnings.simplefilter("ignore")
            for n in (len(x), 1, len(x) - 1):
                found = input_gradient(model, x[:n], y[:n], projection)
                expected = input_gradient(made.model, x[:n], y[:n], projection)
                for a, b in zip(found, expected, strict=True):
                    off = apart(a, b)
                    if not off <= APART[precision]:
                        return Fast(made.model, f"{made.about}, not compiled (it then differs by {off:.2g})")
            before, after = (seconds(one, x, y) for one in (made.model, model))
    except VoidRun as error:
        return Fast(made.model, f"{made.about}, not compiled (it then fails: {error})")
    except Exception as error:
        # a compiler may fail in any way, and the network has run without it
        first = (str(error).splitlines() or [""])[0]
        return Fast(made.model, f"{made.about}, not compiled ({type(error).__name__}: {first})")
    if after >= before:
        return Fast(made.model, f"{made.about}, not compiled (it was no quicker)")
    return Fast(model, f"{made.about}, compiled")


class Compiled(nn.Module):
    """A network whose forward and backward passes are one program each; without a gradient it runs as it was."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.ways = tuple(part for part in model.modules() if isinstance(part, ByBatch))
        self.program = torch.compile(model, fullgraph=True, backend=BACKEND)

    def forward(self, x: Images) -> Logits:
        """`(b, c, h, w)` to `(b, k)`."""
        logits: Logits
        if not (torch.is_grad_enabled() and x.requires_grad):
            logits = self.model(x)
            return logits
        few = most_grouped(x) if self.ways and not small(x) else 0
        if 0 < len(x) <= few:
            # experts that answer small batches otherwise are two programs, and of that one there is little to fuse
            logits = self.model(x)
            return logits
        # one image would be a program of its own
        given = x if len(x) > 1 else torch.cat([x, x])
        torch._dynamo.mark_dynamic(given, 0)
        # a program that asked for the number of images would not be one for any
        for part in self.ways:
            part.splits = False
        try:
            logits = self.program(given)
        finally:
            for part in self.ways:
                part.splits = True
        return logits[: len(x)]

    def arithmetic(self) -> AbstractContextManager[object]:
        """What its passes are multiplied in, the network's own."""
        return arithmetic_of(self.model)


def apart(found: Tensor, expected: Tensor) -> float:
    """The length of their difference, relative to that of what is expected."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


def seconds(model: nn.Module, x: Images, y: Labels) -> float:
    """Of the fastest of a few gradients."""

    def once() -> float:
        started = time.perf_counter()
        gradient: Tensor = input_gradient(model, x, y, projection)[0]
        gradient[0, 0, 0, 0].item()  # waits for the device
        return time.perf_counter() - started

    return min(once() for _ in range(5))
