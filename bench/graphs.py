"""The network that gradients come from as CUDA graphs: on a GPU a small batch takes less time to compute than to ask for.

A graph is one pass, forward or backward, over a fixed number of images, recorded once and then asked for as a whole. It is
recorded for a few numbers of images, compared with the network as it was, and timed beside it; a batch between two of them is
filled up to the larger. It is used for a batch where it took less time than the network itself took for as many images or
fewer. Whatever goes wrong, the network is used as it was, and why is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bench.arithmetic import arithmetic_of
from bench.attacks.gradient import input_gradient
from bench.compiled import APART, apart, seconds
from bench.errors import VoidRun
from bench.fast import Fast, projection
from bench.progress import duration
from bench.types import Images, Labels, Logits

#: numbers of images that graphs are recorded for; beyond them a GPU is busy with what it computes
SIZES = (1, 4, 8, 16, 32, 64, 128, 256)
#: seconds that recording takes, and the share of gradients' time that it saves; assumed, not measured
TAKES, SAVES = 10.0, 0.1
#: passes before one is recorded, in which libraries choose their programs
WARM = 3


class Recording(Protocol):
    """A network on a fixed number of images; what it returns is overwritten when it is asked again."""

    def forward(self, x: Images) -> Logits:
        """Logits of that many images."""
        ...

    def backward(self, upstream: Tensor) -> Tensor:
        """The gradient to the images of the last forward pass, once for each such pass."""
        ...


class CudaGraphs:
    """A network on as many images as `x`, recorded as two graphs."""

    def __init__(self, model: nn.Module, x: Images) -> None:
        self.x = x.detach().clone().requires_grad_(True)
        side = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side), torch.enable_grad():
            for _ in range(WARM):
                logits = model(self.x)
                torch.autograd.grad(logits, self.x, torch.zeros_like(logits))
        torch.cuda.current_stream(x.device).wait_stream(side)
        there, back = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.enable_grad(), torch.cuda.graph(there):
            self.logits: Logits = model(self.x)
        self.upstream = torch.zeros_like(self.logits)
        with torch.cuda.graph(back, pool=there.pool()):
            (self.gradient,) = torch.autograd.grad(self.logits, self.x, self.upstream)
        self.there, self.back = there, back

    def forward(self, x: Images) -> Logits:
        """Logits of that many images."""
        with torch.no_grad():
            self.x.copy_(x)
        self.there.replay()
        return self.logits.detach()

    def backward(self, upstream: Tensor) -> Tensor:
        """The gradient to the images of the last forward pass."""
        self.upstream.copy_(upstream)
        self.back.replay()
        return self.gradient


#: what records
RECORD: Callable[[nn.Module, Images], Recording] = CudaGraphs


def pays(device: torch.device, gradients: float) -> tuple[bool, str]:
    """Whether to record where gradients take so many seconds, and why, in words."""
    if device.type != "cuda":
        return False, "no CUDA graphs (there is no GPU)"
    saved = SAVES * gradients
    why = f"recording takes about {duration(TAKES)} and would save about {duration(saved)}"
    return saved > TAKES, f"{'CUDA graphs' if saved > TAKES else 'no CUDA graphs'} ({why})"


def graphed(made: Fast, x: Images, y: Labels, precision: str, most: int) -> Fast:
    """The network with graphs for the numbers of images where they are quicker; else as it was, and why.

    Args:
        made: what gradients come from now.
        x, y: a few images.
        precision: of its gradients.
        most: images that are ever passed at once.
    """
    assert isinstance(made.model, nn.Module)
    plain, took, held = made.model, {}, {}
    try:
        for size in [size for size in SIZES if size <= most]:
            some, labels = filled(x, size), filled(y, size)
            with arithmetic_of(plain):
                held[size] = Held(RECORD(plain, some), size)
            model = Graphed(plain, {size: held[size]}, {1: (2.0, 1.0), size: (2.0, 1.0)})
            for n in {size, max(1, size - 1)}:
                for found, expected in zip(
                    input_gradient(model, some[:n], labels[:n], projection),
                    input_gradient(plain, some[:n], labels[:n], projection),
                    strict=True,
                ):
                    off = apart(found, expected)
                    if not off <= APART[precision]:
                        return Fast(plain, f"{made.about}, no CUDA graphs (they differ by {off:.2g})")
            took[size] = seconds(plain, some, labels), seconds(model, some, labels)
    except VoidRun as error:
        return Fast(plain, f"{made.about}, no CUDA graphs (recorded, it fails: {error})")
    except Exception as error:
        # recording may fail in any way, and the network has run without it
        first = (str(error).splitlines() or [""])[0]
        return Fast(plain, f"{made.about}, no CUDA graphs ({type(error).__name__}: {first})")
    kept = {size: one for size, one in held.items() if serving(size, took) == size}
    if not kept:
        return Fast(plain, f"{made.about}, no CUDA graphs (they were no quicker)")
    return Fast(
        Graphed(plain, kept, took), f"{made.about}, CUDA graphs of {', '.join(map(str, kept))} images"
    )


def serving(n: int, took: Mapping[int, tuple[float, float]]) -> int | None:
    """Of how many images the graph for a batch of `n` is; None where the network itself is not known to be slower.

    Args:
        took: by number of images, 1 among them, seconds of the network as it was and of its graph.
    """
    size = min((size for size in took if size >= n), default=None)
    if size is None:
        return None
    # the network takes at least as long for this batch as for fewer images
    below = max(size for size in took if size <= n)
    return size if took[size][1] < took[below][0] else None


def filled(rows: Tensor, size: int) -> Tensor:
    """So many rows: these, again and again."""
    return rows if len(rows) == size else rows[torch.arange(size, device=rows.device) % len(rows)]


class Held:
    """A recording, and whose forward pass it holds."""

    def __init__(self, recording: Recording, size: int) -> None:
        self.recording, self.size = recording, size
        self.of: object = None

    def forward(self, x: Images, of: object) -> Logits:
        """Logits of these images, to keep."""
        logits = self.recording.forward(filled(x, self.size))[: len(x)].clone()
        self.of = of
        return logits

    def backward(self, x: Images, of: object, upstream: Tensor) -> Tensor:
        """The gradient to these images, to keep."""
        if self.of is not of:
            # another pass came in between, or this one's has been followed back before
            self.forward(x, of)
        self.of = None
        n = len(x)
        return self.recording.backward(F.pad(upstream, (0, 0, 0, self.size - n)))[:n].clone()


class _Replay(torch.autograd.Function):
    """A pass through a recording."""

    @staticmethod
    def forward(ctx: Any, x: Images, held: Held) -> Logits:
        ctx.held, ctx.token = held, object()
        ctx.save_for_backward(x)
        return held.forward(x, ctx.token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.held.backward(x, ctx.token, upstream), None


class Graphed(nn.Module):
    """A network whose gradients come from recordings, for batches that they serve; everything else it does as it was."""

    def __init__(
        self, model: nn.Module, held: Mapping[int, Held], took: Mapping[int, tuple[float, float]]
    ) -> None:
        super().__init__()
        self.model, self.held, self.took = model, held, took

    def forward(self, x: Images) -> Logits:
        """`(b, c, h, w)` to `(b, k)`."""
        logits: Logits
        if torch.is_grad_enabled() and x.requires_grad:
            held = self.held.get(serving(len(x), self.took) or 0)
            if held is not None:
                logits = _Replay.apply(x, held)
                return logits
        logits = self.model(x)
        return logits

    def arithmetic(self) -> AbstractContextManager[object]:
        """What its passes are multiplied in, the network's own."""
        return arithmetic_of(self.model)
