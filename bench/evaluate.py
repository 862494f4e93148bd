"""Model and plan to outcomes: for every image and column, was the image still classified as it should be?

A batch goes through every program before the next one begins, so that a finished batch can be put away. Attacks take
gradients from a fast copy of the model; whether they succeeded is decided by the model itself, in float32, in a forward
pass of its own, after the images were checked to lie in the ball. Nothing an attack says about itself is used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from bench.attacks import mixture as mixtures
from bench.attacks.autoattack import autoattack
from bench.attacks.fgsm import sweep
from bench.attacks.gradient import input_gradient, naming
from bench.attacks.losses import LOSSES
from bench.attacks.pgd import trajectory
from bench.attacks.torchattacks import from_torchattacks
from bench.data import Split
from bench.errors import AttackCrash, BenchError, VoidRun
from bench.fast import Precision, fast
from bench.judge import (
    Cost,
    Counted,
    Judge,
    before_any_attack,
    exact_arithmetic,
    is_random,
    seeded,
)
from bench.moe import Expert, as_mixture
from bench.plan import Program
from bench.protocol import Column
from bench.rng import Rng
from bench.threat import ThreatModel, threat_model
from bench.types import Images, Labels, Model

#: how many pixels a CPU takes gradients of in one pass
PIXELS_AT_ONCE = 65536


@dataclass
class Outcome:
    """What became of a batch's images in one column; all `(b,)`."""

    prediction: Tensor
    robust: Tensor
    restart: Tensor
    """the start that broke the image; -1 where none did"""


@dataclass
class Batch:
    """A finished batch: dataset positions, labels, an outcome for every column, a cost for every program."""

    index: np.ndarray
    labels: np.ndarray
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)


class Evaluator:
    """A model, ready to be attacked.

    Args:
        model: pixels to logits; put into eval mode, parameters frozen, for good.
        classes: how many logits it must give.
        split: the images.
        seed: of every start.
        success: `last` or `any`.
        precision: of gradients; judging is float32.
        device: where.

    Raises:
        VoidRun: the model does not give finite float logits `(b, classes)`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        classes: int,
        split: Split,
        seed: int,
        success: str,
        precision: Precision = "fp32",
        device: torch.device | str = "cpu",
    ) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.classes, self.split, self.seed, self.success = classes, split, seed, success
        self.device = torch.device(device)
        # a CPU is quickest, and lean, where a pass of a layer fits its caches; 64 images of 32×32 are about that
        h, w = split.images.shape[1:3]
        self.at_once = max(1, PIXELS_AT_ONCE // (h * w)) if self.device.type == "cpu" else None
        self.mixture = as_mixture(self.model)
        self.findings: list[str] = []
        x, y = split.batch(slice(0, 8), self.device)
        judge = Judge(self.model, classes, Cost())
        with exact_arithmetic(), before_any_attack(), seeded((seed, "probe"), 0, self.device):
            judge(x, x, None)
            self.random = is_random(self.model, x)
            if self.random:
                self.gradient_model: Model = self.model
                self.about = "as it is (random)"
                self.findings.append(
                    "the model is random: outcomes are those of one draw, and of one batch size"
                )
            else:
                made = fast(self.model, x, y, precision)
                self.gradient_model, self.about = made.model, made.about

    def clean_accuracy(self, index: np.ndarray, batch_size: int) -> float:
        """The share of these images that is classified as labelled."""
        judge, right = Judge(self.model, self.classes, Cost()), 0
        with exact_arithmetic():
            for start in range(0, len(index), batch_size):
                x, y = self.split.batch(index[start : start + batch_size], self.device)
                right += int((judge(x, x, None) == y).sum())
        return right / len(index)

    def estimate(self, programs: Sequence[Program], n: int, batch_size: int) -> tuple[float, float]:
        """Seconds that the programs will take on `n` images, at least and at most, from one timed batch."""
        x, y = self.split.batch(slice(0, min(n, batch_size, 32)), self.device)

        def timed(work: Callable[[], object]) -> float:
            work()
            started = time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return (time.perf_counter() - started) / len(x) * n

        with exact_arithmetic():
            gradient = timed(lambda: input_gradient(self.gradient_model, x, y, LOSSES["ce"]))
            forward = timed(lambda: Judge(self.model, self.classes, Cost())(x, x, None))
        low, high = (
            sum(program.gradients()[i] * gradient + program.forwards()[i] * forward for program in programs)
            for i in (0, 1)
        )
        return (low if self.success == "last" else forward), high

    def run(self, programs: Sequence[Program], index: np.ndarray) -> Batch:
        """Every program on the images at these dataset positions.

        Raises:
            VoidRun: a non-finite logit or gradient, or an illegal perturbation; names image, column and cause.
        """
        x, y = self.split.batch(index, self.device)
        batch = Batch(index, y.cpu().numpy())
        correct = torch.ones_like(y, dtype=torch.bool)
        with exact_arithmetic():
            for program in programs:
                cost, started = Cost(), time.perf_counter()
                judge = Judge(
                    self.model,
                    self.classes,
                    cost,
                    seed=(self.seed, "judge", int(index[0])) if self.random else None,
                )
                draws = (self.seed, program.name, int(index[0])) if self.random else None
                with named(program, index), seeded(draws, 0, self.device):
                    if program.first.family == "clean":
                        prediction = judge(x, x, None)
                        correct = prediction == y
                        outcome = Outcome(prediction, correct, torch.full_like(y, -1))
                        batch.outcomes[program.first.name] = outcome
                    else:
                        clean = batch.outcomes["clean"]
                        self._attack(program, judge, cost, x, y, index, clean, batch.outcomes)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                cost.seconds = time.perf_counter() - started
                batch.costs[program.name] = cost
        return batch

    def _attack(
        self,
        program: Program,
        judge: Judge,
        cost: Cost,
        x: Images,
        y: Labels,
        index: np.ndarray,
        clean: Outcome,
        outcomes: dict[str, Outcome],
    ) -> None:
        # a misclassified image needs no attack: it is broken, by start 0, as it stands
        for column in program.columns:
            outcomes[column.name] = Outcome(
                clean.prediction.clone(), clean.robust.clone(), torch.where(clean.robust, -1, 0)
            )
        rows = clean.robust.nonzero().flatten()
        if len(rows) == 0:
            return
        if program.first.family == "fgsm":
            self._fgsm(program, judge, cost, x[rows], y[rows], rows, outcomes)
        elif program.first.family == "pgd":
            self._pgd(program, judge, cost, x, y, index, outcomes)
        elif program.first.family == "mixture":
            self._mixture(program, judge, cost, x, y, index, outcomes)
        else:
            (column,) = program.columns
            threat = threat_model(column.norm, column.eps)
            rng = Rng(self.seed, column.name, int(index[0]))
            with naming(rows):
                x_adv = library_attack(column, Counted(self.model, cost), x[rows], y[rows], threat, rng)
                settle(outcomes[column.name], rows, judge(x_adv, x[rows], threat), y[rows], 0)

    def _fgsm(
        self,
        program: Program,
        judge: Judge,
        cost: Cost,
        x: Images,
        y: Labels,
        rows: Tensor,
        outcomes: dict[str, Outcome],
    ) -> None:
        # one gradient of hundreds: taken from the model itself, so that no rounding of the copy can turn a sign
        model = Counted(self.model, cost, self.at_once)
        threats = [threat_model(column.norm, column.eps) for column in program.columns]
        found = sweep(model, x, y, threats, loss=LOSSES[program.first.loss], eot=program.first.eot)
        with naming(rows):
            for column, (threat, x_adv) in zip(program.columns, found, strict=True):
                settle(outcomes[column.name], rows, judge(x_adv, x, threat), y, 0)

    def _pgd(
        self,
        program: Program,
        judge: Judge,
        cost: Cost,
        x: Images,
        y: Labels,
        index: np.ndarray,
        outcomes: dict[str, Outcome],
    ) -> None:
        first = program.first
        threat = threat_model(first.norm, first.eps)
        model = Counted(self.gradient_model, cost, self.at_once)
        for restart in range(program.restarts):
            wanted = [column for column in program.columns if column.restarts > restart]
            standing = torch.stack([outcomes[column.name].robust for column in wanted]).any(0)
            rows = standing.nonzero().flatten()
            if len(rows) == 0:
                return
            start = Rng(self.seed, "pgd", first.loss, restart, images=index[rows.cpu().numpy()].tolist())

            def witness(
                step: int,
                which: Tensor,
                x_adv: Images,
                rows: Tensor = rows,
                wanted: list[Column] = wanted,
                restart: int = restart,
            ) -> Tensor:
                with naming(which):
                    prediction = judge(x_adv, x[rows[which]], threat)
                for column in wanted:
                    if column.steps >= step:
                        settle(
                            outcomes[column.name],
                            rows[which],
                            prediction,
                            y[rows[which]],
                            restart,
                            only_broken=True,
                        )
                return prediction != y[rows[which]]

            runs = trajectory(
                model,
                x[rows],
                y[rows],
                threat,
                rng=start,
                milestones=program.milestones(restart),
                loss=LOSSES[first.loss],
                step_size=first.step_size,
                random_start=first.random_start,
                eot=first.eot,
                witness=witness if self.success == "any" else None,
            )
            with naming(rows):
                for step, x_adv in runs:
                    prediction = judge(x_adv, x[rows], threat)
                    for column in wanted:
                        if column.steps == step:
                            settle(outcomes[column.name], rows, prediction, y[rows], restart)

    def _mixture(
        self,
        program: Program,
        judge: Judge,
        cost: Cost,
        x: Images,
        y: Labels,
        index: np.ndarray,
        outcomes: dict[str, Outcome],
    ) -> None:
        assert self.mixture is not None
        (column,) = (c for c in program.columns if not c.diagnostic)
        outcome = outcomes[column.name]
        bound = next((outcomes[c.name] for c in program.columns if c.diagnostic), None)
        experts = [
            Judge(Expert(self.mixture, k), self.classes, cost) for k in range(self.mixture.experts_count)
        ]
        if bound is not None:
            # an expert's errors are its own, whatever the mixture makes of them
            bound.robust = torch.stack([expert(x, x, None) == y for expert in experts]).all(0)
            bound.restart = torch.where(bound.robust, -1, 0)
        threat = threat_model(column.norm, column.eps)
        for restart in range(column.restarts):
            for run in mixtures.runs(column.attack, self.mixture):
                standing = outcome.robust if bound is None else outcome.robust | bound.robust
                rows = standing.nonzero().flatten()
                rng = Rng(
                    self.seed, column.name, run.name, restart, images=index[rows.cpu().numpy()].tolist()
                )
                here = threat.random_start(x[rows], rng.at("start"))
                if run.serves is not None and len(rows):
                    chosen = run.serves(here)
                    rows, here, rng = rows[chosen], here[chosen], rng.take(chosen)
                if len(rows) == 0:
                    continue

                def witness(
                    step: int,
                    which: Tensor,
                    x_adv: Images,
                    rows: Tensor = rows,
                    restart: int = restart,
                    expert: int | None = run.expert,
                ) -> Tensor:
                    at = rows[which]
                    with naming(which):
                        prediction = judge(x_adv, x[at], threat)
                        settle(outcome, at, prediction, y[at], restart, only_broken=True)
                        if expert is None:
                            return prediction != y[at]
                        own = experts[expert](x_adv, x[at], threat)
                    if bound is not None:
                        settle(bound, at, own, y[at], restart, only_broken=True)
                    return own != y[at]

                left = column.steps
                for aim in run.aims:
                    steps = left if aim is run.aims[-1] else max(1, round(aim.share * column.steps))
                    left -= steps
                    ends = trajectory(
                        Counted(aim.output, cost, self.at_once),
                        x[rows],
                        y[rows],
                        threat,
                        rng=rng,
                        milestones=[steps],
                        loss=aim.loss,
                        step_size=column.step_size,
                        start=here,
                        witness=witness,
                        wrong=aim.wrong,
                    )
                    with naming(rows):
                        ((_, here),) = ends
                        witness(steps, torch.arange(len(rows), device=x.device), here)


def settle(
    outcome: Outcome, rows: Tensor, prediction: Tensor, y: Labels, restart: int, *, only_broken: bool = False
) -> None:
    """Enters what was found for these rows; an image that fell stays charged to what felled it first."""
    broken = prediction != y
    standing = outcome.robust[rows]
    entered = standing & broken if only_broken else standing
    outcome.prediction[rows] = torch.where(entered, prediction, outcome.prediction[rows])
    outcome.restart[rows] = torch.where(standing & broken, restart, outcome.restart[rows])
    outcome.robust[rows] = standing & ~broken


def library_attack(
    column: Column, model: nn.Module, x: Images, y: Labels, threat: ThreatModel, rng: Rng
) -> Images:
    """The images that somebody else's attack finds."""
    if column.family == "autoattack":
        return autoattack(model, x, y, threat, rng=rng, **column.settings)
    return from_torchattacks(
        model, x, y, threat, rng=rng, name=column.family.split(":", 1)[1], **column.settings
    )


@contextmanager
def named(program: Program, index: np.ndarray) -> Iterator[None]:
    """Says in which program, and on which images, a run became void."""
    columns = ", ".join(column.name for column in program.columns[:3]) + (
        "…" if len(program.columns) > 3 else ""
    )
    try:
        yield
    except VoidRun as error:
        where = f"image {index[error.rows[0]]}" if error.rows else f"among images {index[0]}…{index[-1]}"
        raise VoidRun(f"run void: {error} ({where}, column {columns})") from error
    except BenchError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise AttackCrash(
            f"run void: the attack raised {what} (among images {index[0]}…{index[-1]}, column {columns})"
        ) from error
