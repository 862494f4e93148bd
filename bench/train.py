"""The only training loop: stages, SGD with a cosine schedule, augmentation on the device, a checkpoint every epoch.

Everything random is addressed by (seed, stage, epoch, step), so a training that was stopped at any step and taken up
again ends with the same weights, bit for bit on a CPU. What decides which epoch is kept is measured on training images
that were held out, never on test images.
"""

from __future__ import annotations

import copy
import hashlib
import io
import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench import processes
from bench.arithmetic import exact_arithmetic, tf32
from bench.crafting import find_folds
from bench.data import Dataset, Split
from bench.data.resident import resident
from bench.defense import Defense, Stage
from bench.errors import CheckpointError, Interrupted, UsageError, VoidRun
from bench.fast import Precision
from bench.held_out import HeldOut, hold_out, pgd10
from bench.overrun import sound
from bench.passes import Work, counting, one_pass
from bench.progress import Meter, progress
from bench.record import atomic
from bench.rng import Rng
from bench.sharing import shareable, sharing
from bench.tensors import tensors
from bench.types import Images

#: seconds after which the state is written in the middle of an epoch: what a kill costs at most, where epochs are long
OFTEN = 600.0


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
    memory: list[dict[str, Any]] = field(default_factory=list)
    """what each stage remembers"""
    best: dict[str, Tensor] = field(default_factory=dict)
    best_score: float = -1.0
    best_epoch: int = 0
    last: dict[str, Tensor] = field(default_factory=dict)
    """the weights after the last epoch of the last stage, once it is over"""
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    learning: dict[str, int] = field(default_factory=dict)
    """the work of all steps"""
    checking: dict[str, int] = field(default_factory=dict)
    """the work on held-out images"""


@dataclass(frozen=True)
class Trained:
    """A finished training: the network, what each epoch was like, and what it cost.

    Passes are in units of one pass of the whole network in eval mode, per image that is learnt from, over the whole
    training; None where the network has no layer that `bench.passes` counts.

    Args:
        model: with the weights that were selected.
        history: a row an epoch: `stage`, `epoch`, `loss`, `held_out` where the stage selects, and what it observes.
        seconds: it took.
        last: the state after the last epoch, which is that of `model` where nothing was selected.
        epoch, epochs: of the last stage: the one whose weights `model` has, and how many there were.
        passes: forward-backward passes of all steps, those that craft images included.
        forwards: forward passes of all steps with no backward pass.
        checks: forward-backward passes of looking at held-out images.
        multiply_adds: of one image's forward pass.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    seconds: float
    last: dict[str, Tensor]
    epoch: int = 0
    epochs: int = 0
    passes: float | None = None
    forwards: float | None = None
    checks: float | None = None
    multiply_adds: int | None = None


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
    together: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Trained:
    """Trains the defense through all its stages; goes on where a training in the same folder stopped.

    Args:
        defense: what is trained.
        data: its training images.
        seed: of weights, order, augmentation and whatever the losses draw.
        folder: where the state is kept while training, as `state.pt`.
        device, precision: `bf16` runs losses under autocast, `tf32` lets a GPU multiply in TF32, and `fp32` does not.
        quiet: no progress.
        name: what progress calls it.
        together: whether all processes of this command train this network, each on its share of every batch; all of them call.
        say: hears of stages that cannot be shared.

    Raises:
        Interrupted: SIGINT or SIGTERM; the state is kept and the same call goes on from it.
        VoidRun: a loss, a weight or a buffer is NaN or infinite.
        CheckpointError: the kept state is damaged or of another network.
        UsageError: a stage observes something other than finite numbers.
    """
    stages = list(defense.stages(data))
    model = initial(defense, data, seed).to(device).to(memory_format=torch.channels_last)
    if not stages:
        return Trained(model, [], 0.0, model.state_dict())
    file = folder / "state.pt"
    together = together and processes.count() > 1
    shared = _shared(stages, model, data, device, name, say) if together else None
    state = _read(file, model)
    if together:
        _agree(file, state)
    for stage, remembered in zip(stages, state.memory, strict=False):
        stage.memory.update(remembered)
    kept, held = (resident(split, device) for split in hold_out(data.train, data.classes))
    find_folds(model, kept.batch(slice(0, 2), device)[0])
    with stopping() as stop, torch.random.fork_rng(devices=_generators()):
        loop = Loop(
            stages=stages,
            model=model,
            state=state,
            file=file,
            data=data,
            kept=kept,
            held=HeldOut(held, device),
            seed=seed,
            device=device,
            precision=precision,
            quiet=quiet,
            name=name,
            stop=stop,
            began=time.monotonic() - state.seconds,
            learning=Work(**state.learning),
            checking=Work(**state.checking),
            shared=shared,
        )
        for number in range(state.stage, len(stages)):
            loop.run(number)
    state = loop.state
    unit = one_pass(model, kept.batch(slice(0, 2), device)[0])
    passes, forwards, checks = (
        round(work / unit / len(kept), 3) if unit else None
        for work in (loop.learning.graph, loop.learning.plain, loop.checking.graph)
    )
    return Trained(
        model.eval(),
        state.history,
        state.seconds,
        state.last,
        epoch=state.best_epoch,
        epochs=stages[-1].epochs,
        passes=passes,
        forwards=forwards,
        checks=checks,
        multiply_adds=round(unit) or None,
    )


@dataclass(kw_only=True)
class Loop:
    """A training under way: what all of its stages share, and how one of them is run."""

    stages: Sequence[Stage]
    model: nn.Module
    state: State
    file: Path
    data: Dataset
    kept: Split
    held: HeldOut
    seed: int
    device: torch.device | str
    precision: Precision
    quiet: bool
    name: str
    stop: threading.Event
    began: float
    learning: Work
    checking: Work
    saved: float = field(default_factory=time.monotonic)
    """when the state was last written"""
    shared: Sequence[bool] | None = None
    """which stages all processes train together, process 0 training the others alone; None for a training of this one"""

    def run(self, number: int) -> None:
        """One stage, from the epoch and step where the state stands to its end."""
        if self.shared is None:
            self._stage(number)
        elif self.shared[number]:
            processes.alike(self.model.state_dict().values())
            with sharing():
                self._stage(number)
        else:
            self._stage_by_one(number)

    def _stage_by_one(self, number: int) -> None:
        """One stage trained by process 0; the others wait, and go on from its state."""
        shared, self.shared = self.shared, None
        if processes.rank() == 0:
            self._stage(number)
        self.shared = shared
        processes.barrier()
        if processes.rank():
            self.state = _read(self.file, self.model)
            self.learning, self.checking = Work(**self.state.learning), Work(**self.state.checking)
            for stage, remembered in zip(self.stages, self.state.memory, strict=False):
                stage.memory.clear()
                stage.memory.update(remembered)
        _agree(self.file, self.state)

    def stopped(self) -> bool:
        """Whether a stop was asked for, of any process that trains this network."""
        asked = self.stop.is_set()
        return asked if self.shared is None else processes.anyone(asked)

    def _stage(self, number: int) -> None:
        """One stage, from the epoch and step where the state stands to its end."""
        stage, state = self.stages[number], self.state
        part = Part(self, number, stage)
        what = f"training {self.name}, {stage.name}"
        with progress(what, part.total, done=part.done, images=stage.batch_size, quiet=self.quiet) as meter:
            for epoch in range(state.epoch, stage.epochs):
                part.learn(epoch, meter)
                part.look(epoch, meter)
                state.epoch, state.step, state.loss = epoch + 1, 0, 0.0
                if epoch + 1 < stage.epochs:
                    self.save(part)
                    self.obey(f"after epoch {epoch + 1} of {stage.name}")
        part.choose()
        state.stage, state.epoch, state.best, state.best_score = number + 1, 0, {}, -1.0
        self.save(None)
        self.obey(f"after {stage.name}")

    def save(self, part: Part | None) -> None:
        """Writes the state: that of a stage under way, or that between two stages."""
        state = self.state
        state.model = self.model.state_dict()
        state.optimisers = [optimiser.state_dict() for optimiser in part.optimisers] if part else []
        state.average = part.average.state if part and part.average else {}
        state.memory = [stage.memory for stage in self.stages]
        state.learning, state.checking = vars(self.learning), vars(self.checking)
        state.seconds = time.monotonic() - self.began
        if self.shared is None or processes.rank() == 0:
            _write(self.file, state)
        self.saved = time.monotonic()

    def obey(self, where: str) -> None:
        """Stops if that was asked; the state has been kept.

        Raises:
            Interrupted: it was.
        """
        if self.stopped():
            # before one of many tells the others to go, process 0 has written the state
            if self.shared is not None:
                processes.barrier()
            raise Interrupted(f"stopped {where}; the state is kept, the same command goes on from there")


class Part:
    """One stage under way: its optimisers, its average of the weights, and how many steps it has."""

    def __init__(self, loop: Loop, number: int, stage: Stage) -> None:
        self.loop, self.number, self.stage = loop, number, stage
        model, state = loop.model, loop.state
        groups = stage.groups(model) if stage.groups else [list(model.parameters())]
        self.optimisers = [
            torch.optim.SGD(group, lr=stage.lr, momentum=stage.momentum, weight_decay=stage.weight_decay)
            for group in groups
        ]
        if state.optimisers:
            _restore(self.optimisers, state.optimisers, loop.file)
        self.average = _Average(model, stage.ema, state.average) if stage.ema is not None else None
        self.batches = max(1, len(loop.kept) // stage.batch_size)
        self.total = stage.epochs * self.batches
        self.done = state.epoch * self.batches + state.step

    def learn(self, epoch: int, meter: Meter) -> None:
        """The steps of an epoch.

        Raises:
            Interrupted: a stop was asked for.
            VoidRun: a loss is NaN or infinite.
        """
        loop, state, size = self.loop, self.loop.state, self.stage.batch_size
        loop.model.train()
        order = Rng(loop.seed, "order", self.number, epoch).permutation(len(loop.kept)).numpy()
        with counting(loop.learning):
            for step in range(state.step, self.batches):
                value = self.step(epoch, step, order[step * size : (step + 1) * size])
                state.loss += value
                state.step = step + 1
                meter.advance(note=f"epoch {epoch + 1} of {self.stage.epochs}, loss {value:.3f}")
                if state.step < self.batches and loop.stopped():
                    state.epoch = epoch
                    loop.save(self)
                    loop.obey(f"in {self.stage.name}, epoch {epoch + 1}")
                elif time.monotonic() - loop.saved > OFTEN and state.step < self.batches:
                    state.epoch = epoch
                    loop.save(self)

    def step(self, epoch: int, step: int, rows: np.ndarray) -> float:
        """One step on these images; its loss."""
        loop, stage = self.loop, self.stage
        rng = Rng(loop.seed, "train", self.number, epoch, step)
        x, y = loop.kept.batch(rows, loop.device)
        x = augment(x, loop.data, rng.at("augment")).contiguous(memory_format=torch.channels_last)
        lr = stage.lr * rate(epoch * self.batches + step, self.total, round(stage.warmup * self.batches))
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr
        # layers that draw from the global generator, such as dropout, are addressed too
        torch.manual_seed(rng.at("global").seed())
        with _arithmetic(loop.device, loop.precision), sound(loop.model, loop.device):
            loss = stage.step(loop.model, x, y, rng, self.optimisers)
        if self.average:
            self.average.update(loop.model)
        value = loss.item()
        if not math.isfinite(value):
            raise VoidRun(
                f"training void: the loss of {stage.name} is {value} in epoch {epoch + 1}, step {step + 1}; a smaller lr may help"
            )
        return value

    def look(self, epoch: int, meter: Meter) -> None:
        """What an epoch has come to: its row in the history, and whether its weights are the best so far.

        Raises:
            VoidRun: a weight or a buffer is NaN or infinite.
            UsageError: the stage observes something other than finite numbers.
        """
        loop, stage, state = self.loop, self.stage, self.loop.state
        for key, value in loop.model.state_dict().items():
            if value.is_floating_point() and not value.isfinite().all():
                raise VoidRun(
                    f"training void: {key} is NaN or infinite after epoch {epoch + 1} of {stage.name}; a smaller lr may help"
                )
        row: dict[str, Any] = {"stage": stage.name, "epoch": epoch + 1, "loss": state.loss / self.batches}
        state.history.append(row)
        looked_at = self.average.on(loop.model) if self.average else loop.model
        with counting(loop.checking):
            if stage.select != "last":
                row["held_out"] = score(looked_at, loop.held, loop.data, stage.select)
            if stage.observe is not None:
                rows = [one for one in state.history if one["stage"] == stage.name]
                row |= _numbers(stage, stage.observe(looked_at, loop.held, rows))
        if stage.select != "last" and row["held_out"] >= state.best_score:
            state.best_score, state.best_epoch = row["held_out"], epoch + 1
            state.best = {key: value.clone() for key, value in looked_at.state_dict().items()}
        said = [_said(name, value) for name, value in row.items() if name not in ("stage", "epoch")]
        meter.advance(0, note=", ".join(filter(None, said)))

    def choose(self) -> None:
        """Gives the network the weights that its stage keeps; those of the last epoch of the last stage stay in the state."""
        model, state = self.loop.model, self.loop.state
        if self.average:
            model.load_state_dict(self.average.state)
        if self.number + 1 == len(self.loop.stages):
            state.last = {key: value.clone() for key, value in model.state_dict().items()}
        if state.best:
            model.load_state_dict(state.best)
        else:
            state.best_epoch = self.stage.epochs


def _numbers(stage: Stage, observed: Mapping[str, float]) -> dict[str, float]:
    for name, value in observed.items():
        if not isinstance(value, (bool, int, float)) or not math.isfinite(value):
            raise UsageError(f"stage {stage.name!r} must observe finite numbers, not {name}={value!r}")
    return dict(observed)


def _said(name: str, value: float) -> str:
    """A number of an epoch in words; a claim that does not hold goes without saying."""
    words = name.replace("_", " ")
    if isinstance(value, bool):
        return words if value else ""
    return f"{words} {value:.3f}"


def score(model: nn.Module, held: HeldOut, data: Dataset, select: str) -> float:
    """Accuracy on held-out images, clean or under PGD-10 at the dataset's radius; in [0,1]."""
    return held.accuracy(model, pgd10(data.eps) if select == "robust" else None)


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
        stored = tensors(io.BytesIO(raw[64:]))
    except Exception as error:
        # the hash is no proof of origin: whoever made the file made it too, and a reader of tensors may raise anything
        raise CheckpointError(
            f"{path} is no state of a training ({type(error).__name__}); delete it to train from the start"
        ) from None
    blank = State()
    if not isinstance(stored, dict) or set(stored) != {one.name for one in fields(State)}:
        raise CheckpointError(f"{path} was written by another version; delete it to train from the start")
    for name, value in stored.items():
        kinds = (int, float) if isinstance(getattr(blank, name), float) else type(getattr(blank, name))
        if not isinstance(value, kinds):
            raise CheckpointError(
                f"{path}: its {name} is a {type(value).__name__}; delete it to train from the start"
            )
    state = State(**stored)
    try:
        model.load_state_dict(state.model)
    except (RuntimeError, TypeError, AttributeError):
        raise CheckpointError(
            f"{path} belongs to another network; delete it to train from the start"
        ) from None
    return state


def _shared(
    stages: Sequence[Stage],
    model: nn.Module,
    data: Dataset,
    device: torch.device | str,
    name: str,
    say: Callable[[str], None],
) -> list[bool]:
    """Which stages are trained by all processes together: found on untrained weights, so that a resumed training agrees."""
    fresh = copy.deepcopy(model)
    find_folds(fresh, data.train.batch(slice(0, 2), device)[0])
    shared = [shareable(stage, fresh, data, device) for stage in stages]
    for stage, holds in zip(stages, shared, strict=True):
        if not holds:
            say(
                f"{name}: {stage.name} cannot be shared among processes so that it comes to the same; process 0 trains it alone"
            )
    return shared


def _agree(path: Path, state: State) -> None:
    """Sees that all processes read the same state.

    Raises:
        UsageError: they did not: they share no file system, or its caches are behind.
    """
    mine = [state.stage, state.epoch, state.step, len(state.history)]
    if processes.anyone(processes.agreed(mine) != mine):
        raise UsageError(
            f"not all processes find the same training in {path.parent}; all hosts of a command must share the folder that --results names"
        )


def _restore(optimisers: Sequence[torch.optim.SGD], kept: Sequence[dict[str, Any]], path: Path) -> None:
    try:
        for optimiser, state in zip(optimisers, kept, strict=True):
            optimiser.load_state_dict(state)
    except (ValueError, TypeError, LookupError, AttributeError):
        raise CheckpointError(
            f"{path} belongs to a training of other parameters; delete it to train from the start"
        ) from None


def _arithmetic(device: torch.device | str, precision: Precision) -> AbstractContextManager[object]:
    """What a step is computed in."""
    if precision == "fp32":
        return exact_arithmetic()
    if precision == "tf32":
        return tf32()
    # without the cache: it would keep the weights of before an optimiser's step for what a stage computes after it
    return torch.autocast(torch.device(device).type, torch.bfloat16, cache_enabled=False)


def _generators() -> Sequence[int]:
    """The GPUs whose generators a seed would change: all of them, or none while nobody has used one."""
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return range(torch.cuda.device_count()) if used else ()


@dataclass(frozen=True)
class Pace:
    """How fast a stage is trained, and how long all of it takes."""

    stage: str
    epochs: int
    images_per_second: float
    """that are learnt from, whatever is crafted of them"""
    seconds: float


#: images of the step that is tried first; larger ones follow while a step takes no more than so many seconds
FEW, ENOUGH = 8, 0.5
#: seconds of a first step beside which what only a first step does is little
LONG = 5.0


def paces(
    defense: Defense[Any], data: Dataset, *, device: torch.device | str, precision: Precision
) -> list[Pace]:
    """How fast each stage is trained on this device, from a few steps of an untrained network.

    On a GPU they are whole ones. On a CPU a step of few images is tried, and larger ones while that takes half a second; a
    step of fewer images than a batch says too little by what a step costs whatever its size. Where the number of PGD's
    steps is drawn, so is the pace.
    """
    model = initial(defense, data, 0).to(device).to(memory_format=torch.channels_last).train()
    stages = list(defense.stages(data))
    with torch.random.fork_rng(devices=_generators()):
        if stages:
            find_folds(model, data.train.batch(slice(0, 2), device)[0])
        return [_pace(stage, number, model, data, device, precision) for number, stage in enumerate(stages)]


def _pace(
    stage: Stage,
    number: int,
    model: nn.Module,
    data: Dataset,
    device: torch.device | str,
    precision: Precision,
) -> Pace:
    groups = stage.groups(model) if stage.groups else [model.parameters()]
    still = [torch.optim.SGD(group, lr=0.0) for group in groups]

    def seconds(images: int, draw: int) -> float:
        """What a step of so many images takes."""
        x, y = data.train.batch(slice(0, images), device)
        x = x.contiguous(memory_format=torch.channels_last)
        started = time.perf_counter()
        with _arithmetic(device, precision), sound(model, device):
            loss = stage.step(model, x, y, Rng(0, "estimate", number, draw), still)
        # waits until the device has done what it was told
        loss.item()
        return time.perf_counter() - started

    batch = min(stage.batch_size, len(data.train))
    images = batch if torch.device(device).type == "cuda" else min(FEW, batch)
    for draw in itertools.count():
        # the first step of a size is slower than those to come: programs are chosen in it, on a GPU for seconds
        took = seconds(images, 2 * draw)
        if took < LONG:
            took = seconds(images, 2 * draw + 1)
        if images == batch or took > ENOUGH:
            break
        images = min(4 * images, batch)
    return Pace(stage.name, stage.epochs, images / took, stage.epochs * len(data.train) * took / images)


def estimate(
    defense: Defense[Any], data: Dataset, *, device: torch.device | str, precision: Precision
) -> float:
    """Seconds that training will take."""
    return sum(pace.seconds for pace in paces(defense, data, device=device, precision=precision))
