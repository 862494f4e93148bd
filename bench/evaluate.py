"""Model and plan to outcomes: for every image and column, was the image still classified as it should be?

A batch goes through every program before the next one begins, so that a finished batch can be put away. Attacks take
gradients from a fast copy of the model; whether they succeeded is decided by the model itself, in float32, in a forward
pass of its own, after the images were checked to lie in the ball. Nothing an attack says about itself is used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from bench import graphs
from bench.arithmetic import exact_arithmetic
from bench.attacks.gradient import input_gradient
from bench.attacks.losses import LOSSES
from bench.audit.contract import contract
from bench.compiled import compiled, may_compile, pays
from bench.data import Split
from bench.data.resident import resident
from bench.draws import DRAWS, RandomTrial, score
from bench.errors import AttackCrash, BenchError, VoidRun
from bench.experts import used
from bench.fast import Fast, Precision, fast, fast_expectation, fast_mixture
from bench.finding import verdict
from bench.graphs import graphed
from bench.judge import Cost, Judge, before_any_attack, seeded
from bench.model import LogProbabilities
from bench.moe import RoutedModel, as_mixture
from bench.outcome import Batch, Outcome
from bench.plan import Program
from bench.protocol import EIGHT_BIT, Column
from bench.rng import Rng
from bench.threat import threat_model
from bench.trial import Found, Trial, rounded
from bench.types import Images, Labels
from bench.usage import ATTACKED, CLEAN

#: how many pixels a CPU takes gradients of in one pass; of half the bytes each, twice as many
PIXELS_AT_ONCE = 65536
#: how many images are asked again when everything is done
REPEATED = 32
#: how far its logits may then differ, relative to the largest: another order of the batch rounds differently
SAME = 1e-3


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
        surrogates: other trained models, by the column that crafts on them.
        trained: whether the model is; of one that is not, only the cost is of interest.

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
        surrogates: Mapping[str, nn.Module] | None = None,
        trained: bool = True,
    ) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.classes, self.split, self.seed, self.success = classes, resident(split, device), seed, success
        self.device, self.precision = torch.device(device), precision
        #: told of each program before it is run, with what the batch has come to so far
        self.begins: Callable[[Program, Batch], None] = lambda program, batch: None
        self.surrogates = {
            name: one.to(device).eval().requires_grad_(False) for name, one in (surrogates or {}).items()
        }
        # a CPU is quickest, and lean, where a pass of a layer fits its caches; 64 images of 32×32 are about that
        h, w = split.images.shape[1:3]
        few = max(1, PIXELS_AT_ONCE // (h * w)) if self.device.type == "cpu" else None
        self.judged_at_once, self.at_once = few, few and few * (2 if precision == "bf16" else 1)
        self.mixture = as_mixture(self.model)
        # any of them: a model must not know which images will be looked at
        self._asked_twice = np.sort(Rng(seed, "contract").permutation(len(split)).numpy()[:REPEATED])
        x, y = self.split.batch(self._asked_twice, self.device)
        judge = Judge(self.model, classes, Cost())
        with exact_arithmetic(), before_any_attack(), seeded((seed, "probe"), 0, self.device):
            self._first = judge.logits(x, x, None)
            self._parameters = fingerprint(self.model)
            found = contract(self.model, x, y, classes=classes, adaptive=self.mixture is not None)
            self.contract = found if trained else found.untrained()
            self.random = self.contract.facts.randomness == "stochastic"
            # noise too small to matter, or always the same: such a model is attacked like any other
            self.draws = self.contract.facts.randomness != "deterministic"
            self.facts = self.contract.facts.model_copy(
                update={
                    "mixture": None if self.mixture is None else "soft" if self.mixture.soft else "hard",
                    "draws": DRAWS if self.random else 1,
                    "classes": classes,
                }
            )
            # probabilities are attacked as their logarithms
            shown = self.facts.output == "probabilities"
            self.attacked: nn.Module = LogProbabilities(self.model) if shown else self.model
            void = verdict(self.contract.findings) == "void"
            quicker = fast_expectation if self.random else fast
            made = (
                Fast(self.attacked, "as it is") if void else quicker(self.attacked, x[:8], y[:8], precision)
            )
            self.gradient_model, self.about = made.model, made.about
            #: what adaptive attacks take gradients of; a random mixture's gate and experts are asked without its dice
            self.gradient_mixture = (
                self.mixture
                if self.mixture is None or void
                else fast_mixture(self.model, x[:8], y[:8], precision)
            )

    def unchanged(self) -> None:
        """Asks the first images again, in another order: the model must still be the one that was attacked.

        Raises:
            VoidRun: its answers, its parameters or its buffers changed.
        """
        if not torch.equal(self._parameters, fingerprint(self.model)):
            raise VoidRun(
                "the model's parameters or buffers changed while it was attacked; it must not learn or count",
                code="stateful",
            )
        if self.random:
            return
        x, _ = self.split.batch(self._asked_twice, self.device)
        with exact_arithmetic():
            again = Judge(self.model, self.classes, Cost()).logits(x.flip(0), x.flip(0), None).flip(0)
        difference = float((again - self._first).abs().max() / self._first.abs().max().clamp_min(1e-12))
        if difference > SAME:
            raise VoidRun(
                f"asked again after the attacks, the model answers the same images differently (by {difference:.2g} of its "
                "largest logit); what it says must depend on the image alone",
                code="stateful",
            )

    def clean_accuracy(self, index: np.ndarray, batch_size: int) -> float:
        """The share of these images that is classified as labelled."""
        judge, right = Judge(self.model, self.classes, Cost()), 0
        with exact_arithmetic():
            for start in range(0, len(index), batch_size):
                x, y = self.split.batch(index[start : start + batch_size], self.device)
                right += int((judge(x, x, None) == y).sum())
        return right / len(index)

    def prepare(self, programs: Sequence[Program], n: int, batch_size: int) -> None:
        """Compiles and records the copy that gradients come from, if that pays back on `n` images; `about` says so, or why not."""
        if not may_compile(self.device) or self.draws or not isinstance(self.gradient_model, nn.Module):
            return
        span = self.estimate(programs, n, batch_size)
        made = Fast(self.gradient_model, self.about)
        x, y = self.split.batch(self._asked_twice, self.device)
        with exact_arithmetic(), before_any_attack():
            if self.compiling(*span)[0]:
                made = compiled(made, x, y, self.precision)
            if self.recording(*span)[0]:
                made = graphed(made, x, y, self.precision, batch_size)
        self.gradient_model, self.about = made.model, made.about

    def compiling(self, low: float, high: float) -> tuple[bool, str]:
        """Whether compiling pays back in a run of so many seconds, at least and at most, and why."""
        return pays(self.device, self._likely(low, high))

    def recording(self, low: float, high: float) -> tuple[bool, str]:
        """Whether CUDA graphs pay back in a run of so many seconds, at least and at most, and why."""
        return graphs.pays(self.device, self._likely(low, high))

    def _likely(self, low: float, high: float) -> float:
        # most images cost far less than the most: they fall and leave, or their iterates go round
        return low if self.success == "last" else high / 4

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
        """Every program on the images at these dataset positions; `begins` is told of each before it is run.

        Raises:
            VoidRun: a non-finite logit or gradient, or an illegal perturbation; names image, column and cause.
        """
        x, y = self.split.batch(index, self.device)
        columns = [column for program in programs for column in program.columns]
        batch = Batch(index, y.cpu().numpy(), columns={column.name: column for column in columns})
        radius = next((column.eps for column in columns if column.family == EIGHT_BIT), None)
        if radius is None and self.mixture is not None:
            radius = columns[-1].eps
        # the images found at the radius, for whoever wants them rounded, or the experts asked about them
        found = None if radius is None else Found(x)
        with exact_arithmetic():
            for program in sorted(programs, key=lambda program: program.first.family == EIGHT_BIT):
                self.begins(program, batch)
                cost, started = Cost(), time.perf_counter()
                address = (self.seed, "judge", program.name, int(index[0])) if self.draws else None
                judge = Judge(self.model, self.classes, cost, seed=address, at_once=self.judged_at_once)
                draws = (self.seed, program.name, int(index[0])) if self.draws else None
                with named(program, index), seeded(draws, 0, self.device):
                    self._answer(program, judge, x, y, batch, found, radius or 0.0)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                cost.seconds = time.perf_counter() - started
                batch.costs[program.name] = cost
            if self.mixture is not None and found is not None:
                batch.experts = self._experts(self.mixture, x, y, batch, found)
        return batch

    def _experts(self, mixture: RoutedModel, x: Images, y: Labels, batch: Batch, found: Found) -> pa.Table:
        """What the experts make of the clean images, and of what became of those that were attacked."""
        rows = batch.outcomes["clean"].robust.nonzero().flatten()
        attacked = found.images[rows], y[rows], batch.index[rows.cpu().numpy()]
        address = (self.seed, "experts", int(batch.index[0])) if self.draws else None
        try:
            with seeded(address, 0, self.device):
                clean = used(mixture, x, y, batch.index, CLEAN, self.judged_at_once)
                return pa.concat_tables([clean, used(mixture, *attacked, ATTACKED, self.judged_at_once)])
        except BenchError:
            raise
        except Exception as error:
            raise AttackCrash(
                f"run void: asked for its gate and its experts, the mixture raised {type(error).__name__}: {error} "
                f"(among images {batch.index[0]}…{batch.index[-1]})"
            ) from error

    def _answer(
        self,
        program: Program,
        judge: Judge,
        x: Images,
        y: Labels,
        batch: Batch,
        found: Found | None,
        radius: float,
    ) -> None:
        first, outcomes = program.first, batch.outcomes
        if first.family == "clean":
            outcomes[first.name] = score(judge, x, x, y, None) if self.random else _of(judge(x, x, None), y)
            return
        clean = outcomes["clean"]
        # a misclassified image needs no attack: it is broken, by start 0, as it stands
        right = clean.robust if clean.share is None else clean.share > 0
        for column in program.columns:
            outcomes[column.name] = Outcome.of(clean.prediction, right)
        if first.family == EIGHT_BIT:
            self._eight_bit(first.norm, first.eps, judge, x, y, outcomes[first.name], found)
            return
        trial = (RandomTrial if self.random else Trial)(
            program=program,
            judge=judge,
            attacked=self.attacked,
            quick=self.gradient_model,
            x=x,
            y=y,
            index=batch.index,
            outcomes={column.name: outcomes[column.name] for column in program.columns},
            seed=self.seed,
            success=self.success,
            at_once=self.at_once,
            mixture=self.mixture,
            quick_mixture=self.gradient_mixture,
            surrogate=self.surrogates.get(first.family),
            found=found,
            radius=radius,
            rounds=not self.draws,
        )
        if any(column.survivors for column in program.columns) and not self.random:
            for column in program.columns:
                if column.survivors:
                    outcomes[column.name].after(standing_so_far(batch, program, column), right)
        trial.run()

    def _eight_bit(
        self,
        norm: str,
        eps: float,
        judge: Judge,
        x: Images,
        y: Labels,
        outcome: Outcome,
        found: Found | None,
    ) -> None:
        assert found is not None
        threat = threat_model(norm, eps)
        if self.random:
            outcome.__dict__.update(score(judge, rounded(found.images, x, threat), x, y, threat).__dict__)
            return
        for away in (False, True):
            rows = outcome.robust.nonzero().flatten()
            if len(rows):
                levels = rounded(found.images[rows], x[rows], threat, away=away)
                outcome.settle(rows, judge(levels, x[rows], threat), y[rows], 0, -1)


def _of(prediction: Tensor, y: Labels) -> Outcome:
    return Outcome.of(prediction, prediction == y)


def standing_so_far(batch: Batch, program: Program, column: Column) -> Outcome:
    """What earlier programs left standing at this column's radius: what fell in a larger ball may stand in a smaller one."""
    own = {one.name for one in program.columns}
    so_far = batch.outcomes["clean"]
    together = Outcome(so_far.prediction.clone(), so_far.robust.clone(), so_far.restart, so_far.step)
    for name, outcome in batch.outcomes.items():
        other = batch.columns[name]
        if name not in own and not other.diagnostic and other.eps <= column.eps:
            fell = together.robust & ~outcome.robust
            together.prediction[fell] = outcome.prediction[fell]
            together.robust &= outcome.robust
    return together


def fingerprint(model: nn.Module) -> Tensor:
    """Sums over every parameter and buffer that change when one of their numbers does, float64 `(t, 2)`."""
    tensors = [t.detach() for t in (*model.parameters(), *model.buffers())]
    sums = [(t.double().sum().cpu(), t.double().square().sum().cpu()) for t in tensors]
    return torch.tensor([[float(a), float(b)] for a, b in sums], dtype=torch.float64)


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
        raise VoidRun(f"run void: {error} ({where}, column {columns})", code=error.code) from error
    except BenchError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise AttackCrash(
            f"run void: the attack raised {what} (among images {index[0]}…{index[-1]}, column {columns})"
        ) from error
