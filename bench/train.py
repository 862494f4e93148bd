"""The only training loop: stages, SGD with a cosine schedule, augmentation on the device, a checkpoint every epoch.

Everything random is addressed by (seed, stage, epoch, step), so a training that was stopped at any step and taken up
again ends with the same weights, bit for bit on a CPU. What decides which epoch is kept is measured on training images
that were held out, never on test images.
"""

from __future__ import annotations

import copy
import hashlib
import io
import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.attacks.pgd import pgd
from bench.data import Dataset, Split
from bench.defense import Defense, Stage
from bench.errors import CheckpointError, Interrupted, VoidRun
from bench.fast import Precision
from bench.model import evaluating
from bench.progress import progress
from bench.record import atomic
from bench.rng import Rng
from bench.threat import Linf
from bench.types import Images

#: the share of the training images that is held out, and the most there ever are
HELD_OUT, HELD_OUT_MOST = 0.1, 1000


@dataclass
class State:
    """All that a training needs to go on; what a checkpoint holds."""

    stage: int = 0
    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    model: dict[str, Tensor] = field(default_factory=dict)
    optimisers: list[dict[str, Any]] = field(default_factory=list)
    average: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_score: float = -1.0
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Trained:
    """A finished training: the network, what each epoch was like, and what it cost."""

    model: nn.Module
    history: list[dict[str, Any]]
    seconds: float


def initial(defense: Defense[Any], data: Dataset, seed: int) -> nn.Module:
    """The untrained network; its weights are a function of the seed alone."""
    with torch.random.fork_rng(devices=_generators()):
        torch.manual_seed(Rng(seed, "init").seed())
        return defense.build(data)


def train(
    defense: Defense[Any],
    data: Dataset,
    *,
    seed: int,
    folder: Path,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    quiet: bool = False,
    name: str = "model",
) -> Trained:
    """Trains the defense through all its stages; goes on where a training in the same folder stopped.

    Args:
        defense: what is trained.
        data: its training images.
        seed: of weights, order, augmentation and whatever the losses draw.
        folder: where the state is kept while training, as `state.pt`.
        device, precision: `bf16` runs losses under autocast.
        quiet: no progress.
        name: what progress calls it.

    Raises:
        Interrupted: SIGINT or SIGTERM; the state is kept and the same call goes on from it.
        VoidRun: a loss, a weight or a buffer is NaN or infinite.
        CheckpointError: the kept state is damaged or of another network.
    """
    stages = list(defense.stages(data))
    model = initial(defense, data, seed).to(device).to(memory_format=torch.channels_last)
    if not stages:
        return Trained(model, [], 0.0)
    state = _read(folder / "state.pt", model)
    kept, held = hold_out(data.train, data.classes)
    with stopping() as stop, torch.random.fork_rng(devices=_generators()):
        for number in range(state.stage, len(stages)):
            _train_stage(
                number,
                stages[number],
                model,
                state,
                kept,
                held,
                data,
                seed,
                folder,
                device,
                precision,
                quiet,
                name,
                stop,
            )
    return Trained(model.eval(), state.history, state.seconds)


def _train_stage(
    number: int,
    stage: Stage,
    model: nn.Module,
    state: State,
    kept: Split,
    held: Split,
    data: Dataset,
    seed: int,
    folder: Path,
    device: torch.device | str,
    precision: Precision,
    quiet: bool,
    name: str,
    stop: threading.Event,
) -> None:
    groups = stage.groups(model) if stage.groups else [list(model.parameters())]
    optimisers = [
        torch.optim.SGD(group, lr=stage.lr, momentum=stage.momentum, weight_decay=stage.weight_decay)
        for group in groups
    ]
    if state.optimisers:
        _restore(optimisers, state.optimisers, folder / "state.pt")
    average = _Average(model, stage.ema, state.average) if stage.ema is not None else None
    batches = len(kept) // stage.batch_size if len(kept) >= stage.batch_size else 1
    autocast = _autocast(device, precision)
    total, done = stage.epochs * batches, state.epoch * batches + state.step
    began = time.monotonic() - state.seconds

    def save() -> None:
        state.model, state.optimisers = (
            model.state_dict(),
            [optimiser.state_dict() for optimiser in optimisers],
        )
        state.average = average.state if average else {}
        state.seconds = time.monotonic() - began
        _write(folder / "state.pt", state)

    with progress(f"{name}: {stage.name}", total, done=done, quiet=quiet) as meter:
        for epoch in range(state.epoch, stage.epochs):
            model.train()
            order = Rng(seed, "order", number, epoch).permutation(len(kept)).numpy()
            for step in range(state.step, batches):
                rng = Rng(seed, "train", number, epoch, step)
                x, y = kept.batch(order[step * stage.batch_size : (step + 1) * stage.batch_size], device)
                x = augment(x, data, rng.at("augment")).contiguous(memory_format=torch.channels_last)
                lr = stage.lr * rate(epoch * batches + step, total, round(stage.warmup * batches))
                for optimiser in optimisers:
                    for group in optimiser.param_groups:
                        group["lr"] = lr
                # layers that draw from the global generator, such as dropout, are addressed too
                torch.manual_seed(rng.at("global").seed())
                with autocast:
                    loss = stage.step(model, x, y, rng, optimisers)
                if average:
                    average.update(model)
                value = loss.item()
                if not math.isfinite(value):
                    raise VoidRun(
                        f"training void: the loss of {stage.name} is {value} in epoch {epoch + 1}, step {step + 1}; a smaller lr may help"
                    )
                state.loss += value
                meter.advance(note=f"loss {value:.3f}")
                state.step = step + 1
                if stop.is_set() and state.step < batches:
                    state.epoch = epoch
                    save()
                    raise Interrupted(
                        f"stopped in {stage.name}, epoch {epoch + 1}; the state is kept, the same command goes on from there"
                    )
            _end_epoch(stage, epoch, batches, model, average, state, held, data, device)
            state.epoch, state.step, state.loss = epoch + 1, 0, 0.0
            if epoch + 1 < stage.epochs:
                save()
                if stop.is_set():
                    raise Interrupted(
                        f"stopped after epoch {epoch + 1} of {stage.name}; the state is kept, the same command goes on from there"
                    )
    if state.best:
        model.load_state_dict(state.best)
    elif average:
        model.load_state_dict(average.state)
    state.stage, state.epoch, state.best, state.best_score = number + 1, 0, {}, -1.0
    state.model, state.optimisers, state.average = model.state_dict(), [], {}
    state.seconds = time.monotonic() - began
    _write(folder / "state.pt", state)
    if stop.is_set():
        raise Interrupted(
            f"stopped after {stage.name}; the state is kept, the same command goes on from there"
        )


def _end_epoch(
    stage: Stage,
    epoch: int,
    batches: int,
    model: nn.Module,
    average: _Average | None,
    state: State,
    held: Split,
    data: Dataset,
    device: torch.device | str,
) -> None:
    for key, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise VoidRun(
                f"training void: {key} is NaN or infinite after epoch {epoch + 1} of {stage.name}; a smaller lr may help"
            )
    row: dict[str, Any] = {"stage": stage.name, "epoch": epoch + 1, "loss": state.loss / batches}
    if stage.select != "last":
        scored = average.on(model) if average else model
        row["held_out"] = score(scored, held, data, stage.select, device)
        if row["held_out"] >= state.best_score:
            state.best_score = row["held_out"]
            state.best = {key: value.clone() for key, value in scored.state_dict().items()}
    state.history.append(row)


def score(model: nn.Module, held: Split, data: Dataset, select: str, device: torch.device | str) -> float:
    """Accuracy on held-out images, clean or under PGD-10 at the dataset's radius; in [0,1]."""
    right = 0
    with evaluating(model):
        for start in range(0, len(held), 250):
            x, y = held.batch(slice(start, start + 250), device)
            if select == "robust":
                x = pgd(model, x, y, Linf(data.eps), rng=Rng(0, "held-out", start), steps=10)
            with torch.no_grad():
                right += int((model(x).argmax(1) == y).sum())
    return right / len(held)


def hold_out(split: Split, classes: Sequence[str]) -> tuple[Split, Split]:
    """The training images that are learnt from, and those held out: the same share of every class, whatever the seed."""
    share = min(HELD_OUT, HELD_OUT_MOST / len(split))
    out = []
    for label in range(len(classes)):
        mine = np.flatnonzero(split.labels == label)
        order = Rng(0, "held-out", label).permutation(len(mine)).numpy()
        out.append(mine[order[: round(share * len(mine))]])
    held = np.sort(np.concatenate(out)) if out else np.empty(0, int)
    if len(held) == 0:
        return split, split
    return split.take(np.setdiff1d(np.arange(len(split)), held)), split.take(held)


def augment(x: Images, data: Dataset, rng: Rng) -> Images:
    """Random crop after padding with zeros, and random mirroring, as far as the dataset allows either."""
    b, _, h, w = x.shape
    if data.crop > 0:
        p = data.crop
        top = rng.at("top").integers(0, 2 * p + 1, b).to(x.device)
        left = rng.at("left").integers(0, 2 * p + 1, b).to(x.device)
        down = top[:, None] + torch.arange(h, device=x.device)
        across = left[:, None] + torch.arange(w, device=x.device)
        padded = nn.functional.pad(x, (p, p, p, p))
        x = padded[
            torch.arange(b, device=x.device)[:, None, None], :, down[:, :, None], across[:, None, :]
        ].permute(0, 3, 1, 2)
    if data.flip:
        mirrored = rng.at("flip").integers(0, 2, b).to(x.device).bool()
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
    return x


def rate(step: int, total: int, warmup: int) -> float:
    """The share of the learning rate at a step: a linear rise, then half a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


class _Average:
    """An exponential moving average of a model's state; integers are taken over as they are."""

    def __init__(self, model: nn.Module, decay: float, state: Mapping[str, Tensor]) -> None:
        self.decay = decay
        self.state = {key: value.clone() for key, value in model.state_dict().items()}
        for key, value in state.items():
            # copied, so that it lies where the model lies
            self.state[key].copy_(value)

    def update(self, model: nn.Module) -> None:
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                self.state[key].lerp_(value, 1 - self.decay)
            else:
                self.state[key].copy_(value)

    def on(self, model: nn.Module) -> nn.Module:
        other = copy.deepcopy(model)
        other.load_state_dict(self.state)
        return other


@contextmanager
def stopping() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, so that a step in progress is finished; a second one stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            # a handler that was not set from Python is not told, and cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _write(path: Path, state: State) -> None:
    buffer = io.BytesIO()
    torch.save(vars(state), buffer)
    content = buffer.getvalue()
    atomic(path, hashlib.sha256(content).hexdigest().encode() + content)


def _read(path: Path, model: nn.Module) -> State:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return State()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    if hashlib.sha256(raw[64:]).hexdigest().encode() != raw[:64]:
        raise CheckpointError(f"{path} is damaged; delete it to train from the start")
    try:
        state = State(**torch.load(io.BytesIO(raw[64:]), map_location="cpu", weights_only=True))
    except TypeError:
        raise CheckpointError(
            f"{path} was written by another version; delete it to train from the start"
        ) from None
    try:
        model.load_state_dict(state.model)
    except RuntimeError:
        raise CheckpointError(
            f"{path} belongs to another network; delete it to train from the start"
        ) from None
    return state


def _restore(optimisers: Sequence[torch.optim.SGD], kept: Sequence[dict[str, Any]], path: Path) -> None:
    try:
        for optimiser, state in zip(optimisers, kept, strict=True):
            optimiser.load_state_dict(state)
    except ValueError:
        raise CheckpointError(
            f"{path} belongs to a training of other parameters; delete it to train from the start"
        ) from None


def _autocast(device: torch.device | str, precision: Precision) -> AbstractContextManager[object]:
    if precision == "fp32":
        return nullcontext()
    # without the cache: it would keep the weights of before an optimiser's step for what a stage computes after it
    return torch.autocast(torch.device(device).type, torch.bfloat16, cache_enabled=False)


def _generators() -> Sequence[int]:
    """The GPUs whose generators a seed would change: all of them, or none while nobody has used one."""
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return range(torch.cuda.device_count()) if used else ()


def estimate(
    defense: Defense[Any], data: Dataset, *, device: torch.device | str, precision: Precision
) -> float:
    """Seconds that training will take, from one small step of each stage; on a GPU from the second of two whole ones."""
    model = initial(defense, data, 0).to(device).to(memory_format=torch.channels_last).train()
    seconds = 0.0
    autocast = _autocast(device, precision)
    gpu = torch.device(device).type == "cuda"
    with torch.random.fork_rng(devices=_generators()):
        for number, stage in enumerate(defense.stages(data)):
            x, y = data.train.batch(slice(0, stage.batch_size if gpu else 16), device)
            still = [
                torch.optim.SGD(group, lr=0.0)
                for group in (stage.groups(model) if stage.groups else [model.parameters()])
            ]
            # a GPU's first step of a kind spends seconds on choosing its programs
            for _ in range(2 if gpu else 1):
                started = time.perf_counter()
                with autocast:
                    loss = stage.step(model, x, y, Rng(0, "estimate", number), still)
                # waits until the device has done what it was told
                loss.item()
            seconds += (time.perf_counter() - started) / len(x) * stage.epochs * len(data.train)
    return seconds
