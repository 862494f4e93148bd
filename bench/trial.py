"""One attack program on one batch: images to outcomes, for a deterministic model.

Whatever an attack returns, or shows on its way, is judged by the deployed model and entered here; what it says about itself
is not used. An image broken by a column leaves that column at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bench.attacks import mixture as mixtures
from bench.attacks.fgsm import sweep
from bench.attacks.gradient import naming
from bench.attacks.losses import LOSSES
from bench.attacks.pgd import trajectory
from bench.attacks.stored import stored
from bench.errors import UsageError
from bench.judge import Counted, Judge
from bench.moe import Expert, RoutedModel
from bench.outcome import Outcome
from bench.plan import Program
from bench.protocol import BOUND, CERTIFIED, EXPERT_ATTACKED, ROUTER_ATTACKED, Column
from bench.rng import Rng
from bench.threat import ThreatModel, threat_model
from bench.types import Images, Labels, Model


class Found:
    """For each image of a batch the adversarial image to show for it: one that broke it, else the last that was tried."""

    def __init__(self, x: Images) -> None:
        self.images = x.clone()
        self.broke = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def keep(self, rows: Tensor, x_adv: Images, broke: Tensor) -> None:
        """Takes these images for these rows, unless they broke nothing and something before did."""
        taken = broke | ~self.broke[rows]
        self.images[rows[taken]] = x_adv[taken]
        self.broke[rows] |= broke


class Entry(NamedTuple):
    """What columns are to be told of some rows after a start and a number of steps."""

    restart: int
    step: int
    columns: list[Column]
    rows: Tensor
    x_adv: Images
    prediction: Tensor
    only_broken: bool


@dataclass
class Trial:
    """A program, the batch it is run on, and where its outcomes are entered.

    Args:
        program: what to run.
        judge: the deployed model; counts what it is asked.
        attacked: the deployed model as logits, for attacks that must see the model itself.
        quick: a faster copy for gradients.
        x, y, index: the batch; `index` are dataset positions.
        outcomes: of this program's columns, with misclassified and fallen images already entered.
        seed: of every start.
        success: `last` or `any`.
        at_once: how many images gradients are taken of in one pass.
        found: if wanted, where the adversarial images at the protocol's radius are kept.
        radius: that radius.
        mixture: the deployed model, where it is one.
        quick_mixture: a faster copy of it for gradients.
        rounds: whether gradients are a function of the image alone, so that iterates that come again need no more of them.
    """

    program: Program
    judge: Judge
    attacked: nn.Module
    quick: Model
    x: Images
    y: Labels
    index: np.ndarray
    outcomes: dict[str, Outcome]
    seed: int
    success: str
    at_once: int | None = None
    mixture: RoutedModel | None = None
    quick_mixture: RoutedModel | None = None
    surrogate: nn.Module | None = None
    found: Found | None = None
    radius: float = 0.0
    rounds: bool = False

    #: whether an image that is broken is attacked no further
    leaves = True

    def run(self) -> None:
        """Runs the program."""
        family = self.program.first.family
        if family == "fgsm":
            self._fgsm()
        elif family == "pgd":
            self._pgd()
        elif self.program.first.name == ROUTER_ATTACKED:
            self._router()
        elif self.program.first.name == CERTIFIED:
            self._certified()
        elif family == "mixture":
            self._mixture()
        elif family == "autoattack":
            self._autoattack()
        elif family.startswith("transfer:"):
            self._transfer()
        elif family.startswith("images:"):
            self._stored()
        else:
            self._torchattacks()

    def standing(self, columns: tuple[Column, ...] | list[Column]) -> Tensor:
        """The images that some of these columns have not broken, as positions in the batch."""
        return torch.stack([self.outcomes[c.name].robust for c in columns]).any(0).nonzero().flatten()

    def starts(self, *address: int | str, rows: Tensor) -> Rng:
        """The streams of these images at an address of this run."""
        return Rng(self.seed, *address, images=self.index[rows.cpu().numpy()].tolist())

    def samples(self, eot: int) -> int:
        """Passes per gradient where a column asks for this many."""
        return eot

    def ask(self, x_adv: Images, rows: Tensor, threat: ThreatModel) -> Tensor:
        """The deployed model's answer to legal images for these rows of the batch."""
        with naming(rows):
            return self.judge(x_adv, self.x[rows], threat)

    def enter(
        self,
        columns: list[Column] | tuple[Column, ...],
        rows: Tensor,
        x_adv: Images,
        prediction: Tensor,
        restart: int,
        step: int,
        *,
        only_broken: bool = False,
    ) -> None:
        """Settles columns by the answer to images, and keeps the images if they are wanted."""
        if self.found is not None and columns[0].eps == self.radius:
            self.found.keep(rows, x_adv, prediction != self.y[rows])
        for column in columns:
            self.outcomes[column.name].settle(
                rows, prediction, self.y[rows], restart, step, only_broken=only_broken
            )

    def _fgsm(self) -> None:
        columns = self.program.columns
        rows = self.standing(columns)
        if len(rows) == 0:
            return
        # one gradient of hundreds: taken from the model itself, so that no rounding of the copy can turn a sign
        model = Counted(self.attacked, self.judge.cost, self.at_once)
        threats = [threat_model(column.norm, column.eps) for column in columns]
        first = self.program.first
        with naming(rows):
            found = sweep(
                model,
                self.x[rows],
                self.y[rows],
                threats,
                loss=LOSSES[first.loss],
                eot=self.samples(first.eot),
            )
        for column, (threat, x_adv) in zip(columns, found, strict=True):
            self.enter([column], rows, x_adv, self.ask(x_adv, rows, threat), 0, 1)

    def _pgd(self) -> None:
        # what withstands one start nearly always withstands the others: they are run side by side, as one large batch
        later = [list(same) for _, same in groupby(range(1, self.program.restarts), self._wanted)]
        for restarts in [[0], *(later if self.leaves else ([one] for same in later for one in same))]:
            rows = self.standing(self._wanted(restarts[0]))
            for some in torch.split(rows, max(1, max(len(self.x), self.at_once or 0) // len(restarts))):
                if len(some):
                    self._starts(some, restarts)

    def _wanted(self, restart: int) -> list[Column]:
        """The columns that ask for this start."""
        return [column for column in self.program.columns if column.restarts > restart]

    def _starts(self, rows: Tensor, restarts: list[int]) -> None:
        """PGD from these starts, all of which the same columns ask for: the outcomes are as if they came one by one."""
        first, wanted, n = self.program.first, self._wanted(restarts[0]), len(rows)
        threat = threat_model(first.norm, first.eps)
        copies = rows.repeat(len(restarts))
        # what a witness confirmed stays as it is, and need not be asked about again
        fallen = torch.zeros_like(copies, dtype=torch.bool)
        found: list[Entry] = []
        # of several starts, the first that breaks an image is to be named, and not the one of the fewest steps
        tell = self._tell if len(restarts) == 1 else found.append

        def note(columns: list[Column], which: Tensor, x_adv: Images, step: int, only_broken: bool) -> Tensor:
            with naming(which):
                prediction = self.judge(x_adv, self.x[copies[which]], threat)
            for place, restart in enumerate(restarts):
                own = which // n == place
                if own.any():
                    at = copies[which[own]]
                    tell(Entry(restart, step, columns, at, x_adv[own], prediction[own], only_broken))
            return prediction != self.y[copies[which]]

        def witness(step: int, which: Tensor, x_adv: Images) -> Tensor:
            broken = note([column for column in wanted if column.steps >= step], which, x_adv, step, True)
            fallen[which] = broken
            return broken

        rngs = [self.starts("pgd", first.loss, restart, rows=rows) for restart in restarts]
        start = None
        if first.random_start and len(restarts) > 1:
            start = torch.cat([threat.random_start(self.x[rows], rng.at("start")) for rng in rngs])
        runs = trajectory(
            Counted(self.quick, self.judge.cost, self.at_once),
            self.x[copies],
            self.y[copies],
            threat,
            rng=rngs[0],
            milestones=self.program.milestones(restarts[0]),
            loss=LOSSES[first.loss],
            step_size=first.step_size,
            random_start=first.random_start,
            start=start,
            eot=self.samples(first.eot),
            witness=witness if self.leaves and self.success == "any" else None,
            rounds=self.rounds,
        )
        with naming(copies):
            for step, x_adv in runs:
                asked = [column for column in wanted if column.steps == step]
                left = (~fallen).nonzero().flatten()
                if len(left):
                    note(asked, left, x_adv[left], step, False)
        for entry in sorted(found, key=lambda entry: (entry.restart, entry.step)):
            self._tell(entry)

    def _tell(self, entry: Entry) -> None:
        restart, step, columns, rows, x_adv, prediction, only_broken = entry
        self.enter(columns, rows, x_adv, prediction, restart, step, only_broken=only_broken)

    def _mixture(self) -> None:
        assert self.mixture is not None and self.quick_mixture is not None
        column = next(c for c in self.program.columns if not c.diagnostic)
        outcome = self.outcomes[column.name]
        bound, chosen_alone = self.outcomes.get(BOUND), self.outcomes.get(EXPERT_ATTACKED)
        cost, classes = self.judge.cost, self.judge.classes
        experts = [Judge(Expert(self.mixture, k), classes, cost) for k in range(self.mixture.experts_count)]
        x, y = self.x, self.y
        if bound is not None:
            # an expert's errors are its own, whatever the mixture makes of them
            alone = torch.stack([expert(x, x, None) == y for expert in experts])
            bound.robust = alone.all(0)
            bound.restart = torch.where(bound.robust, -1, 0)
            bound.step = bound.restart.clone()
        threat = threat_model(column.norm, column.eps)
        for restart in range(column.restarts):
            for run in mixtures.runs(column.attack, self.quick_mixture):
                standing = outcome.robust if bound is None else outcome.robust | bound.robust
                rows = standing.nonzero().flatten()
                rng = self.starts(column.name, run.name, restart, rows=rows)
                here = threat.random_start(x[rows], rng.at("start"))
                if run.serves is not None and len(rows):
                    chosen = run.serves(here)
                    rows, here, rng = rows[chosen], here[chosen], rng.take(chosen)
                if len(rows) == 0:
                    continue
                done = 0

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
                        prediction = self.judge(x_adv, x[at], threat)
                    at_step = done + step  # noqa: B023 (called before `done` moves on)
                    self.enter([column], at, x_adv, prediction, restart, at_step, only_broken=True)
                    if expert is None:
                        return prediction != y[at]
                    with naming(which):
                        own = experts[expert](x_adv, x[at], threat)
                    if bound is not None:
                        bound.settle(at, own, y[at], restart, at_step, only_broken=True)
                        alone[expert, at] &= own == y[at]
                    return own != y[at]

                for aim in run.aims:
                    left = column.steps - done
                    steps = left if aim is run.aims[-1] else max(1, round(aim.share * column.steps))
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
                        eot=self.samples(column.eot),
                        witness=witness if self.leaves else None,
                        wrong=aim.wrong,
                        rounds=self.rounds,
                    )
                    with naming(rows):
                        ((_, here),) = ends
                        witness(steps, torch.arange(len(rows), device=x.device), here)
                    done += steps

        if chosen_alone is not None:
            # only what the mixture has right is attacked; the expert is the one that the clean image is given to
            with torch.no_grad():
                route = self.mixture.selected(x)
            chosen_alone.robust &= alone[route, torch.arange(len(x), device=x.device)]

    def _router(self) -> None:
        """The gate attacked alone; then the expert it chooses is asked for the clean image."""
        assert self.mixture is not None and self.quick_mixture is not None
        (column,) = self.program.columns
        rows = self.standing([column])
        if len(rows) == 0:
            return
        threat = threat_model(column.norm, column.eps)
        x, everyone = self.x[rows], torch.arange(len(rows), device=self.x.device)
        with torch.no_grad():
            route = self.mixture.selected(x)
        gate = Counted(self.quick_mixture.gate, self.judge.cost, self.at_once)
        ends = trajectory(
            gate,
            x,
            route,
            threat,
            rng=self.starts(column.name, rows=rows),
            milestones=[column.steps],
            loss=LOSSES["margin"],
            step_size=column.step_size,
            rounds=self.rounds,
        )
        with naming(rows):
            ((step, x_adv),) = ends
            self.judge(x_adv, x, threat)
        with torch.no_grad():
            then = self.mixture.selected(x_adv)
            prediction = self.mixture.all_outputs(x)[everyone, then].argmax(1)
        self.outcomes[column.name].settle(rows, prediction, self.y[rows], 0, step)

    def _certified(self) -> None:
        """Which correctly classified images lie further inside than the radius, by the mixture's own certificate."""
        (column,) = self.program.columns
        outcome = self.outcomes[column.name]
        rows = outcome.robust.nonzero().flatten()
        if len(rows):
            radius = self.attacked.certificate(self.x[rows]).radius  # type: ignore[operator]
            # nothing is broken by a certificate that does not reach so far: it only says nothing
            outcome.robust[rows] = False if radius is None else radius >= column.eps

    def _autoattack(self) -> None:
        from bench.attacks.autoattack import component

        *parts, whole = self.program.columns
        threat = threat_model(whole.norm, whole.eps)
        model = Counted(self.quick, self.judge.cost)
        for part in parts:
            rows = self.standing([whole])
            if len(rows):
                rng = self.starts(part.attack, rows=rows)
                with naming(rows), model.arithmetic():
                    x_adv = component(
                        part.attack, model, self.x[rows], self.y[rows], threat, rng=rng, **part.settings
                    )
                self.enter([part, whole], rows, x_adv, self.ask(x_adv, rows, threat), 0, -1)
            # what an earlier component broke, this one was not shown
            mine, all_so_far = self.outcomes[part.name], self.outcomes[whole.name]
            taken = mine.robust & ~all_so_far.robust
            mine.robust &= all_so_far.robust
            mine.prediction[taken] = all_so_far.prediction[taken]

    def _transfer(self) -> None:
        (column,) = self.program.columns
        rows = self.standing([column])
        if len(rows) == 0:
            return
        assert self.surrogate is not None
        threat = threat_model(column.norm, column.eps)
        for restart in range(column.restarts):
            rows = self.standing([column])
            if len(rows) == 0:
                return
            runs = trajectory(
                Counted(self.surrogate, self.judge.cost, self.at_once),
                self.x[rows],
                self.y[rows],
                threat,
                rng=self.starts(column.name, restart, rows=rows),
                milestones=[column.steps],
                loss=LOSSES[column.loss],
                step_size=column.step_size,
                random_start=column.random_start,
            )
            with naming(rows):
                ((step, x_adv),) = runs
            self.enter([column], rows, x_adv, self.ask(x_adv, rows, threat), restart, step)

    def _stored(self) -> None:
        (column,) = self.program.columns
        rows = self.standing([column])
        if len(rows) == 0:
            return
        images = stored(column.family.split(":", 1)[1])
        index = torch.from_numpy(self.index)[rows.cpu()]
        if images.shape[1:] != self.x.shape[1:] or len(images) <= int(index.max()):
            raise UsageError(
                f"{column.family}: images {tuple(images.shape)} are not those of this dataset, {tuple(self.x.shape[1:])} each, "
                f"{int(index.max()) + 1} at least"
            )
        x_adv = images[index].to(self.x.device)
        threat = threat_model(column.norm, column.eps)
        self.enter([column], rows, x_adv, self.ask(x_adv, rows, threat), 0, -1)

    def _torchattacks(self) -> None:
        from bench.attacks.torchattacks import from_torchattacks

        (column,) = self.program.columns
        rows = self.standing([column])
        if len(rows) == 0:
            return
        threat = threat_model(column.norm, column.eps)
        with naming(rows):
            x_adv = from_torchattacks(
                Counted(self.attacked, self.judge.cost),
                self.x[rows],
                self.y[rows],
                threat,
                rng=Rng(self.seed, column.name, int(self.index[0])),
                name=column.family.split(":", 1)[1],
                **column.settings,
            )
        self.enter([column], rows, x_adv, self.ask(x_adv, rows, threat), 0, -1)


#: images to whole pixel levels
LEVELS = 255


def rounded(x_adv: Images, x: Images, threat: ThreatModel, *, away: bool = False) -> Images:
    """The images that can be stored with eight bits a pixel and lie in the ball, nearest to `x_adv`.

    With `away` each pixel goes to the next level further from `x`: an attack that stopped just across the boundary would
    else be rounded back over it. In L∞ a level outside the ball gives way to the nearest one inside; in other norms the
    pixels that rounding moved furthest out are rounded towards `x` until the image is in. Where no level is in the ball,
    the image stays `x`, which only images that are not stored in eight bits themselves come to.
    """
    levels = x * LEVELS
    change = x_adv * LEVELS - levels
    # a step this small is float32's own rounding and no reason to go to the next level
    further = change.sign() * (change.abs() - 1e-3).ceil().clamp_min(0) if away else change
    wanted = (levels + further).round().clamp(0, LEVELS)
    if threat.norm == "Linf":
        low, high = ((levels + side * threat.eps * LEVELS) for side in (-1, 1))
        inside = torch.minimum(torch.maximum(wanted, (low - 1e-4).ceil()), (high + 1e-4).floor())
        wanted = inside.clamp(0, LEVELS)
    else:
        toward = (levels.round() + change.trunc()).clamp(0, LEVELS)
        outward = ((wanted - levels).abs() - (toward - levels).abs()).flatten(1)
        order = outward.argsort(1, descending=True)
        length = (wanted - levels).flatten(1).square()
        gain = (length - (toward - levels).flatten(1).square()).gather(1, order).cumsum(1)
        # a hair inside, for the division by 255 rounds as well
        too_long = length.sum(1, keepdim=True) - (threat.eps * LEVELS * (1 - 1e-6)) ** 2
        back = torch.zeros_like(outward, dtype=torch.bool)
        back.scatter_(1, order, (gain - gain.diff(dim=1, prepend=gain.new_zeros(len(gain), 1))) < too_long)
        wanted = torch.where(back.view_as(wanted), toward, wanted)
    legal = threat.contains(wanted / LEVELS, x)
    return torch.where(legal[:, None, None, None], wanted / LEVELS, x)
