"""Contestants that take turns on the same batches: libraries attack by attack, and the harness with its merged plan.

A busy machine slows all of them alike, as they take turns batch by batch; of several rounds a batch's fastest counts.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from peers_attacks import Peer
from torch import Tensor, nn

from bench import pipeline, weights
from bench.data import Split
from bench.errors import UsageError
from bench.evaluate import Evaluator
from bench.plan import plan
from bench.protocol import Column

#: what rounding may add to a perturbation
SLACK = 1e-6


class Clock:
    """Seconds inside `with`, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    def __enter__(self) -> Clock:
        self._wait()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *raised: object) -> None:
        self._wait()
        self.seconds += time.perf_counter() - self._started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass
class Subject:
    """A model that is attacked: as training leaves it, with its images and its radius."""

    label: str
    about: str
    model: nn.Module
    split: Split
    classes: int
    eps: float
    device: torch.device
    clean: np.ndarray = field(init=False)
    """which images it classifies as they should be, bool `(n,)`"""

    def __post_init__(self) -> None:
        with torch.no_grad():
            right = [
                self.model(x).argmax(1) == y for x, y in (self.batch(index) for index in self.batches(128))
            ]
        self.clean = torch.cat(right).cpu().numpy()

    def batch(self, index: np.ndarray) -> tuple[Tensor, Tensor]:
        return self.split.batch(index, self.device)

    def batches(self, size: int, n: int | None = None, start: int = 0) -> list[np.ndarray]:
        """Positions of the images from `start` to `n`, `size` at a time."""
        n = len(self.split) if n is None else min(n, len(self.split))
        return [np.arange(at, min(at + size, n)) for at in range(start, n, size)]


def subject(label: str, words: Sequence[str], *, samples: int, device: str, results: str) -> Subject:
    """The model that `DEFENSE KEY=VALUE …` names; a key is an argument of `bench.run` or a setting of the defense."""
    defense, *pairs = words
    for pair in pairs:
        if "=" not in pair:
            raise UsageError(f"{pair!r} is no setting; write KEY=VALUE, such as width=16")
    given = dict(pair.split("=", 1) for pair in pairs)
    own = {key: given.pop(key, None) for key in ("dataset", "checkpoint", "eps", "recipe", "data_dir")}
    dataset = own.pop("dataset") or "digits"
    session = pipeline.prepare(defense, dataset, settings=given, device=device, results=Path(results), **own)
    model = weights.weigh(session, session.jobs[0], 0).model
    data = session.data
    split = data.test
    if len(split) < samples and dataset == "digits":
        # the speed of an attack does not care whether an image was learnt from
        split = Split(
            np.concatenate([split.images, data.train.images]),
            np.concatenate([split.labels, data.train.labels]),
        )
    eps = data.eps if session.eps is None else session.eps
    return Subject(
        label=label,
        about=f"{' '.join(words)} on {data.name}, eps {eps:.4g}",
        # a library is given a model whose parameters still need their gradients
        model=model.to(session.device).eval().requires_grad_(True),
        split=split.take(np.arange(min(samples, len(split)))),
        classes=len(data.classes),
        eps=eps,
        device=session.device,
    )


#: positions of a batch to robustness in each column, and seconds
Work = Callable[[np.ndarray], tuple[dict[str, np.ndarray], float]]


def standing(model: nn.Module, x_adv: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x_adv).argmax(1) == y


def one_by_one(kind: type[Peer], on: Subject, columns: Sequence[Column], batch_size: int) -> Work:
    """Each attack on all images, as a user of that library runs it; the plain model says what still stands."""
    shape = on.batch(np.arange(1))[0].shape[1:]
    peer = kind(copy.deepcopy(on.model), shape=shape, classes=on.classes, batch_size=batch_size)

    def attacked(column: Column, x: Tensor, y: Tensor) -> Tensor:
        if column.attack == "clean":
            return x
        if column.attack == "fgsm":
            return peer.fgsm(x, y, column.eps)
        if column.attack == "a-pgd":
            return peer.eot_pgd(x, y, column.eps, column.step_size, column.steps)
        return peer.pgd(x, y, column.eps, column.step_size, column.steps, column.restarts)

    def work(index: np.ndarray) -> tuple[dict[str, np.ndarray], float]:
        x, y = on.batch(index)
        robust, clock = {}, Clock(on.device)
        for column in columns:
            with clock:
                x_adv = attacked(column, x, y)
                if not peer.told:
                    standing(peer.model, x_adv, y)
            beyond = torch.stack([(x_adv - x).abs().max() - column.eps, -x_adv.min(), x_adv.max() - 1]).max()
            if beyond > SLACK:
                raise AssertionError(f"{peer.name}, {column.name}: an image outside the ball or the box")
            # on both sides an image that is misclassified as it is counts as broken
            robust[column.name] = standing(on.model, x_adv, y).cpu().numpy() & on.clean[index]
        return robust, clock.seconds

    return work


class Ours:
    """The harness on the same columns; `setup` is what an evaluation costs once, whatever the number of images."""

    def __init__(self, on: Subject, columns: Sequence[Column], success: str, precision: str) -> None:
        model = copy.deepcopy(on.model)
        with Clock(on.device) as clock:
            self.evaluator = Evaluator(
                model,
                classes=on.classes,
                split=on.split,
                seed=0,
                success=success,
                precision=precision,
                device=on.device,
            )
            self.programs = plan(columns, random=self.evaluator.random)
        self.setup, self.device = clock.seconds, on.device

    def __call__(self, index: np.ndarray) -> tuple[dict[str, np.ndarray], float]:
        with Clock(self.device) as clock:
            outcomes = self.evaluator.run(self.programs, index).outcomes
        return {name: outcome.robust.cpu().numpy() for name, outcome in outcomes.items()}, clock.seconds


@dataclass
class Result:
    """What a contestant came to: outcomes `(n,)` in each column, and seconds an image.

    `setup` are the seconds that it takes once, whatever the number of images; their share is in `seconds`.
    """

    robust: dict[str, np.ndarray]
    seconds: float
    setup: float = 0.0

    def accuracy(self, column: str) -> float:
        return 100 * float(self.robust[column].mean())

    def difference(self, other: Result) -> float:
        """The largest difference of two accuracies in one column, in points, on the images that both had."""
        n = min(len(found.robust["clean"]) for found in (self, other))
        return max(
            100 * abs(float(self.robust[c][:n].mean() - other.robust[c][:n].mean())) for c in self.robust
        )


def in_turn(
    contestants: Mapping[str, Work], batches: Sequence[np.ndarray], rounds: int, samples: int
) -> dict[str, Result]:
    """Every contestant on every batch, another one first each time; a set-up is spread over `samples` images."""
    names = list(contestants)
    found: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in names}
    seconds = dict.fromkeys(names, 0.0)
    for number, index in enumerate(batches):
        best = dict.fromkeys(names, float("inf"))
        for turn in range(rounds):
            first = (number + turn) % len(names)
            for name in names[first:] + names[:first]:
                robust, took = contestants[name](index)
                best[name] = min(best[name], took)
                if turn == 0:
                    found[name].append(robust)
        for name in names:
            seconds[name] += best[name]
        told = ", ".join(f"{name} {took:.1f} s" for name, took in best.items())
        print(f"batch {number + 1} of {len(batches)}: {told}", file=sys.stderr, flush=True)
    n = sum(map(len, batches))
    setups = {name: getattr(contestants[name], "setup", 0.0) for name in names}
    return {
        name: Result(
            {column: np.concatenate([robust[column] for robust in found[name]]) for column in found[name][0]},
            seconds[name] / n + setups[name] / samples,
            setups[name],
        )
        for name in names
    }
