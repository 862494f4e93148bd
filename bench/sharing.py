"""One training step on several processes: each passes its share of the images through the network.

All processes take the same step on the same whole batch: the loss, the attack in it and what they draw are computed in each
of them alike, and need not know. What is shared is what costs: a call of the network, or of a part of it, on b images passes
b / count of them in each process, and the answers are put together again. So any loss will do, batch statistics and all, and a
paper's own update too.

Tensors are whole (the same in every process), or rows (each has its own), or terms (each has one of a sum). Four maps lead
from one to another, and the gradient of each is another of them, so that gradients of gradients are right as well:

    rows of a whole      ↔ whole of the rows
    a whole used by all  ↔ whole, the sum of terms

    logits = whole(network(rows(x)));   parameters are wholes used by all;   BatchNorm's statistics are sums of terms

Sums are added in another order than in one process, so a training matches that of one process to rounding. Whether a stage
can be shared at all, `shareable` tries out: a layer that draws random numbers, or looks across the batch in a way of its own,
cannot, and such a stage is trained by process 0 alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from bench import processes
from bench.data import Dataset
from bench.defense import Stage
from bench.errors import Elsewhere, Interrupted
from bench.rng import Rng

#: images for each process in the step that is tried out
TRIED = 4
#: how far its weights may differ in float64 from those of one process, relative to the largest of a tensor
SAME = 1e-9


class Unshareable(Exception):
    """A network answers its share of the images with something other than rows."""


class _Rows(torch.autograd.Function):
    """Whole to rows: this process's share."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.n = len(x)
        return x[_share(len(x))].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _whole(grad, ctx.n)


class _Whole(torch.autograd.Function):
    """Rows to whole: every process's, one after the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int) -> Tensor:
        shares = [len(range(n)[_share(n, process)]) for process in range(processes.count())]
        # collectives want equal shapes: the shorter shares are filled up
        mine = x.new_zeros((shares[0], *x.shape[1:]))
        mine[: len(x)] = x
        return torch.cat([part[:m] for part, m in zip(processes.gathered(mine), shares, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _rows(grad), None


class _Used(torch.autograd.Function):
    """Wholes, each to be used by every process on its rows; their gradients are summed, in one message."""

    @staticmethod
    def forward(ctx: Any, *wholes: Tensor) -> tuple[Tensor, ...]:
        return tuple(one.view_as(one) for one in wholes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return _summed(*grads)


class _Summed(torch.autograd.Function):
    """Terms to whole: their sums over the processes, in one message."""

    @staticmethod
    def forward(ctx: Any, *terms: Tensor) -> tuple[Tensor, ...]:
        flat = processes.summed(torch.cat([one.reshape(-1) for one in terms]))
        pieces = torch.split(flat, [one.numel() for one in terms])
        return tuple(piece.view(one.shape) for piece, one in zip(pieces, terms, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return _used(*grads)


# torch's stubs do not type `apply`
_rows: Callable[[Tensor], Tensor] = _Rows.apply
_whole: Callable[[Tensor, int], Tensor] = _Whole.apply
_used: Callable[..., tuple[Tensor, ...]] = _Used.apply
_summed: Callable[..., tuple[Tensor, ...]] = _Summed.apply


def _share(n: int, process: int | None = None) -> slice:
    """Which of n rows are a process's; the first ones have one more where they do not come out even."""
    process = processes.rank() if process is None else process
    each, more = divmod(n, processes.count())
    start = process * each + min(process, more)
    return slice(start, start + each + (process < more))


class _Statistics(TorchFunctionMode):
    """BatchNorm in train mode takes its mean and variance from the rows of all processes; dropout draws for all of them."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return _batch_norm(self.n, *args, **kwargs)
        if func is F.dropout:
            return _dropout(self.n, *args, **kwargs)
        return func(*args, **kwargs)


def _dropout(n: int, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """torch's `dropout` on rows of a batch of n: drawn for the whole batch, as one process would."""
    if not training:
        return x
    mine = _share(n)
    # several rows of x may be one image's, such as one for each expert
    each = len(x) // (mine.stop - mine.start)
    drawn = F.dropout(x.new_ones((n * each, *x.shape[1:])), p)
    return x * drawn[mine.start * each : mine.stop * each]


def _batch_norm(
    n: int,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """torch's `batch_norm` on rows of a batch of n images, of which `x` are this process's."""
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    shape = (1, -1, *(1 for _ in x.shape[2:]))
    over = [d for d in range(x.dim()) if d != 1]
    h = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    mine = _share(n)
    # how many numbers there are to a channel: as many to each of the n images
    number = n * (x.numel() // x.shape[1] // (mine.stop - mine.start))
    # a mean is whole, and is used on every process's rows
    (mean,) = _used(*_summed(h.sum(over) / number))
    h = h - mean.view(shape)
    (var,) = _used(*_summed(h.square().sum(over) / number))
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        if running_var is not None:
            unbiased = var * (number / max(1, number - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    h = h * (var + eps).rsqrt().view(shape)
    if weight is not None:
        h = h * weight.view(shape)
    if bias is not None:
        h = h + bias.view(shape)
    return h.to(x.dtype)


class _Call:
    """A call of the network, or of a part of it, from outside: what is changed while it runs, and put back."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.module = module
        self.n = _images(args)
        self.own: list[tuple[nn.Module, dict[str, nn.Parameter | None]]] = []
        self.mode = _Statistics(self.n)

    def enter(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments that the module is called with instead."""
        if torch.is_grad_enabled():
            self._use_parameters()
        self.mode.__enter__()  # type: ignore[no-untyped-call]
        return tuple(_rows(one) for one in args)

    def _use_parameters(self) -> None:
        places = [
            (part, name, one)
            for part in self.module.modules()
            for name, one in part._parameters.items()
            if one is not None and one.requires_grad
        ]
        # one that several parts share is one
        distinct = list({id(one): one for _, _, one in places}.values())
        if not distinct:
            return
        used = dict(zip(map(id, distinct), _used(*distinct), strict=True))
        for part in {id(part): part for part, _, _ in places}.values():
            self.own.append((part, dict(part._parameters)))
        for part, name, one in places:
            part._parameters[name] = used[id(one)]  # type: ignore[assignment]

    def leave(self) -> None:
        """Puts everything back."""
        self.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        for part, own in self.own:
            part._parameters.update(own)

    def gather(self, answer: Any) -> Any:
        """The whole of an answer.

        Raises:
            Unshareable: it does not consist of rows.
        """
        if isinstance(answer, Tensor):
            if answer.dim() == 0 or len(answer) != len(range(self.n)[_share(self.n)]):
                raise Unshareable(f"{tuple(answer.shape)} for {self.n} images in {processes.count()} shares")
            return _whole(answer, self.n)
        if isinstance(answer, dict):
            return type(answer)((key, self.gather(value)) for key, value in answer.items())
        if isinstance(answer, (tuple, list)):
            parts = [self.gather(one) for one in answer]
            return type(answer)(*parts) if hasattr(answer, "_fields") else type(answer)(parts)
        if answer is None:
            return None
        raise Unshareable(f"a {type(answer).__name__}")


def _images(args: tuple[Any, ...]) -> int:
    """How many images a call is about: 0 where it is none that can be shared."""
    if not args or not all(isinstance(one, Tensor) and one.dim() > 1 for one in args):
        return 0
    n = len(args[0])
    return n if n >= processes.count() and all(len(one) == n for one in args) else 0


_call: _Call | None = None


def in_all(amount: int) -> int:
    """What all processes together do while this one does `amount`: outside of a shared call, where all do the same, that much."""
    if _call is None or not _call.n:
        return amount
    return amount * _call.n // len(range(_call.n)[_share(_call.n)])


@contextmanager
def sharing() -> Iterator[None]:
    """Calls of networks with parameters are shared from here on; all processes must make the same ones."""

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        global _call
        if _call is not None or next(module.parameters(), None) is None:
            return None
        _call = _Call(module, args)
        return _call.enter(args) if _call.n else None

    def after(module: nn.Module, args: tuple[Any, ...], answer: Any) -> Any:
        global _call
        if _call is None or _call.module is not module:
            return None
        call, _call = _call, None
        if not call.n:
            return None
        call.leave()
        # None is what a call that raised has answered; that goes on its way
        return None if answer is None else call.gather(answer)

    handles = [
        register_module_forward_pre_hook(before),  # type: ignore[arg-type]
        register_module_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def shareable(stage: Stage, model: nn.Module, data: Dataset, device: torch.device | str) -> bool:
    """Whether a step of this stage, shared, moves the weights as one process does: tried on copies in float64, to rounding.

    The network, what the stage remembers and the global generators are left as they were.
    """
    some = slice(0, TRIED * processes.count())
    x, y = data.train.batch(some, device)
    remembered = copy.deepcopy(stage.memory)

    def step() -> dict[str, Tensor] | None:
        other = copy.deepcopy(model).double().train()
        groups = stage.groups(other) if stage.groups else [list(other.parameters())]
        optimisers = [torch.optim.SGD(group, lr=stage.lr, momentum=stage.momentum) for group in groups]
        torch.manual_seed(0)
        try:
            for number in range(2):
                stage.step(other, x.double(), y, Rng("shareable", number), optimisers)
        except (Elsewhere, Interrupted):
            raise
        except Exception:
            # a stranger's step may refuse float64, or half of the images, in any way; it is then not shared
            return None
        finally:
            stage.memory.clear()
            stage.memory.update(copy.deepcopy(remembered))
        return other.state_dict()

    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        alone = step()
        with sharing():
            together = step() if alone is not None else None
    fits = (
        alone is not None
        and together is not None
        and all(_same(together[key], value) for key, value in alone.items())
    )
    return not processes.anyone(not fits)


def _same(one: Tensor, other: Tensor) -> bool:
    if not other.is_floating_point():
        return torch.equal(one, other)
    return (
        bool((one - other).abs().max() <= SAME * other.abs().max().clamp_min(1e-12))
        if other.numel()
        else True
    )
