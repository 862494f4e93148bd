"""Further cheap attacks on a sample of a run's images, chosen to find what its own attacks may have missed.

Each probe attacks otherwise than the run did: in a ball that has no edge, in one step, without gradients, along gradients
averaged over a neighbourhood, from another start, with twice the samples. Where one breaks images that the run's attacks
left standing, those were the weaker ones, though they had more to go on.

A probe states what it costs per image, and the budget says how many images it may look at. An image counts as broken if the
deployed model errs on a legal image; that of a random model, if it errs in more than three of four draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median

import torch
from torch import Tensor, nn

from bench.attacks.fgsm import sweep
from bench.attacks.losses import AttackLoss, cross_entropy, margin
from bench.attacks.pgd import trajectory
from bench.attacks.random_search import random_search
from bench.audit.check import Check, Evidence, check, findings
from bench.audit.outcomes import Outcomes, above_chance, exceeds
from bench.errors import VoidRun
from bench.finding import Finding
from bench.judge import Cost, Counted, Judge
from bench.rng import Rng
from bench.threat import Linf, ThreatModel, threat_model
from bench.types import Images, Labels, Model

#: what a gradient costs in forward passes
GRADIENT = 3
#: how many pixels a CPU takes gradients of in one pass
PIXELS_AT_ONCE = 65536
#: fewer images than these void no run
FEW = 8
#: draws by which an image of a random model is judged
DRAWS = 16
#: step sizes, and how many steps of each, in the ball that has no edge
UNBOUNDED = ((0.02, 20), (0.1, 10))
#: into how many pieces the way to another image is cut
PIECES = 64
#: guesses: noise from inside the ball and from its corners, then a random search
NOISES, QUERIES = 8, 80
#: noisy copies whose gradients are averaged, their noise as a share of the radius, and steps
COPIES, SMOOTHING, SMOOTH_STEPS = 4, 0.5, 8
#: the level of the tests; half of what sixteen images say has to do
LEVEL = 0.02
#: steps of the attacks that are compared by their samples per gradient
SAMPLED_STEPS = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """Correctly classified images of a run, and the model that was attacked.

    Args:
        model: the deployed one.
        gradient_model: where gradients come from: logits or log-probabilities.
        x, y: images `(b, c, h, w)` and labels.
        standing: which of them every attack of the run at the radius left standing, bool `(b,)`.
        pgd_standing: the same of its PGD columns alone.
        threat: of the run, at the radius that is looked at.
        classes: how many there are.
        random: whether the model's answers differ from call to call.
        rng: one stream per image.
        cost: where passes are counted.
        steps: of the run's longest PGD; 0 where it had none.
        eot: the run's samples per gradient.
        weight: the share of all right images that these are a sample of.
    """

    model: nn.Module
    gradient_model: Model
    x: Images
    y: Labels
    standing: Tensor
    pgd_standing: Tensor
    threat: ThreatModel
    classes: int
    random: bool
    rng: Rng
    cost: Cost
    steps: int
    eot: int
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: Tensor) -> Subject:
        """The same of some images alone; `rows` are positions."""
        return dataclasses.replace(
            self,
            x=self.x[rows],
            y=self.y[rows],
            standing=self.standing[rows],
            pgd_standing=self.pgd_standing[rows],
            rng=self.rng.take(rows),
        )

    def many(self, broken: Tensor, of_these: float, of_all: float | None = None) -> bool:
        """Whether more of these images are broken, beyond chance, than a share of them and a share of all allow."""
        allowed = max(of_these, (of_these if of_all is None else of_all) / self.weight)
        return exceeds(int(broken.sum()), len(self), allowed, LEVEL)

    @property
    def differentiable(self) -> Counted:
        """The model that gradients come from, counted."""
        h, w = self.x.shape[-2:]
        at_once = max(1, PIXELS_AT_ONCE // (h * w)) if self.x.device.type == "cpu" else None
        return Counted(self.gradient_model, self.cost, at_once)

    def share(self, x_adv: Images, rows: Tensor, threat: ThreatModel, draws: int) -> Tensor:
        """The share of draws in which the deployed model is right about these rows, float `(len(rows),)`."""
        judge = Judge(self.model, self.classes, self.cost)
        right = [judge(x_adv, self.x[rows], threat) == self.y[rows] for _ in range(draws)]
        return torch.stack(right).float().mean(0)

    def wrong(self, x_adv: Images, rows: Tensor, threat: ThreatModel) -> Tensor:
        """Which of these rows the deployed model gets wrong, bool `(len(rows),)`."""
        return self.share(x_adv, rows, threat, DRAWS if self.random else 1) < (0.25 if self.random else 0.5)

    def ascend(
        self,
        model: Model,
        threat: ThreatModel,
        *,
        steps: int,
        step_size: float,
        loss: AttackLoss = margin,
        rng: Rng | None = None,
        eot: int = 1,
        leave: bool = True,
    ) -> Tensor:
        """Which images PGD breaks at any step, bool `(b,)`; from the image itself without `rng`; broken ones stop if they `leave`."""
        broken = torch.zeros_like(self.standing)

        def witness(step: int, rows: Tensor, x_adv: Images) -> Tensor:
            found = self.wrong(x_adv, rows, threat)
            broken[rows] |= found
            return found & leave

        ends = trajectory(
            model,
            self.x,
            self.y,
            threat,
            rng=self.rng if rng is None else rng,
            milestones=[steps],
            loss=loss,
            step_size=step_size,
            random_start=rng is not None,
            eot=eot,
            witness=witness,
        )
        for _, x_adv in ends:
            rows = (~broken).nonzero().flatten()
            if len(rows):
                broken[rows] = self.wrong(x_adv[rows], rows, threat)
        return broken

    @cached_property
    def ascent(self) -> Ascent:
        """PGD with the margin loss from a start that the run did not try, every step on record."""
        seen: list[Tensor] = []

        def recorded(logits: Tensor, y: Labels) -> Tensor:
            values = margin(logits, y)
            seen.append(values.detach())
            return values

        steps = max(20, min(self.steps, 100))
        broken = self.ascend(
            self.differentiable,
            self.threat,
            steps=steps,
            step_size=self.threat.eps / 8,
            loss=recorded,
            rng=self.rng.at("another"),
            leave=False,
        )
        return Ascent(torch.cat(seen).view(steps, len(self)), broken)


@dataclass(frozen=True, eq=False)
class Ascent:
    """One attack: the loss before each step, `(steps, b)`, and which images it broke, bool `(b,)`."""

    losses: Tensor
    broken: Tensor

    @property
    def stuck(self) -> Tensor:
        """Which images' loss never rose above that of the start, bool `(b,)`."""
        return self.losses[1:].amax(0) <= self.losses[0]

    @property
    def climbing(self) -> Tensor:
        """Which images' loss still rises at the end, bool `(b,)`.

        By the rule of Pintor et al. 2022 (arXiv 2106.09947, incomplete optimisation): the best loss so far, rescaled to
        [0,1], gains more than 0.05 in the last ten steps.
        """
        best = self.losses.cummax(0).values
        span = (best[-1] - best[0]).clamp_min(1e-12)
        return (best[-1] - best[-10]) / span > 0.05


@dataclass(frozen=True)
class Probe:
    """Checks that share an attack.

    Args:
        checks: what they are.
        passes: what the attack costs an image, in forward passes.
        among: the images it is for, bool `(b,)`.
    """

    checks: tuple[Check[Subject], ...]
    passes: Callable[[Subject], int]
    among: Callable[[Subject], Tensor]


def probe(
    model: nn.Module,
    gradient_model: Model,
    x: Images,
    y: Labels,
    *,
    threat: ThreatModel,
    outcomes: Outcomes,
    classes: int,
    random: bool,
    seed: int,
    budget: int,
) -> tuple[list[Finding], Cost]:
    """What further attacks on these images find, and what they cost.

    Args:
        model: the deployed one, in eval mode.
        gradient_model: where gradients come from.
        x, y: correctly classified images and their labels.
        threat: where to look: its radius is one at which the run says that images hold.
        outcomes: of these images, in this order.
        classes: how many there are.
        random: whether the model's answers differ from call to call.
        seed: of every start.
        budget: in forward passes, a gradient counting three; each probe looks at as many images as its part of what is
            left allows.
    """
    at_radius = outcomes.attacks_at(threat.norm, threat.eps)
    iterated = [column for column in outcomes.iterated if column in at_radius]
    subject = Subject(
        model=model,
        gradient_model=gradient_model,
        x=x,
        y=y,
        standing=torch.from_numpy(outcomes.all_hold(at_radius)).to(x.device),
        pgd_standing=torch.from_numpy(outcomes.all_hold(iterated)).to(x.device),
        threat=threat,
        classes=classes,
        random=random,
        rng=Rng(seed, "audit", images=[int(i) for i in outcomes.labels.index]),
        cost=Cost(),
        steps=max((column.steps or 0 for column in iterated), default=0),
        eot=max((column.eot or 1 for column in iterated), default=1),
    )
    return run(subject, budget), subject.cost


def run(subject: Subject, budget: int, probes: Sequence[Probe] | None = None) -> list[Finding]:
    """Every probe that has images to look at, cheap ones first, each on what it can afford of `budget` forward passes."""
    left = [one for one in (PROBES if probes is None else probes) if one.among(subject).any()]
    found: list[Finding] = []
    while left:
        one, among = left[0], left[0].among(subject)
        spent = GRADIENT * subject.cost.gradients + subject.cost.forwards
        affordable = (budget - spent) // (len(left) * one.passes(subject))
        sample = subject.take(among.nonzero().flatten()[: max(0, affordable)])
        del left[0]
        if unbounded_survives in one.checks and len(sample) < FEW:
            evidence = f"{len(sample)} image(s) are too few to look for failing gradients in the ball that has no edge"
            found.append(Finding(code="few-probed", severity="informs", evidence=evidence, advice=PROBE_MORE))
        if len(sample) == 0:
            continue
        try:
            found += findings(one.checks, dataclasses.replace(sample, weight=float(among.float().mean())))
        except VoidRun as error:
            codes = ", ".join(dict.fromkeys(check.code for check in one.checks))
            evidence = f"{error} (while looking for {codes})"
            found.append(Finding(code=error.code, severity="warns", evidence=evidence, advice=CRASHED))
    return found


PROBE_MORE = "the audit may cost 15 % of a run and no more; take more images or a longer protocol"
CRASHED = "a model must answer every image in [0,1] with finite logits and finite gradients; make it do so and run again"


@check(
    "weaker-gradients",
    rule="M15",
    threshold=0.005,
    severity="warns",
    advice="gradients of the quick copy (bf16, TF32, folded layers) attack less well than the model's own: run with --precision fp32",
)
def weaker_gradients(subject: Subject, threshold: float) -> Evidence:
    """PGD-10 by the deployed model's own gradients breaks more than 0.5 points and two paired standard errors more than by the quick copy's."""
    quick = subject.ascend(subject.differentiable, subject.threat, steps=10, step_size=subject.threat.eps / 4)
    own = dataclasses.replace(subject, gradient_model=subject.model)
    exact = own.ascend(own.differentiable, subject.threat, steps=10, step_size=subject.threat.eps / 4)
    more = exact.double() - quick.double()
    error = float(more.std()) / len(more) ** 0.5 if len(more) > 1 else 1.0
    if float(more.mean()) <= max(threshold, 2 * error):
        return None
    return f"{int(exact.sum())} of {len(more)} images fall to the model's own gradients, {int(quick.sum())} to the quick copy's"


@check(
    "unbounded-survives",
    rule="A8",
    threshold=0.5,
    severity="blocks",
    advice="an attacker who may change every pixel at will must succeed, so it is the gradients that fail: no accuracy at a "
    "smaller radius can be believed until an attack gets through here",
)
def unbounded_survives(subject: Subject, threshold: float) -> Evidence:
    """At radius 1 (any image at all), accuracy under PGD with the margin loss, from the image itself, is above chance (lower end of the interval); warns up to 50 %."""
    if len(subject) < FEW:
        return None
    anywhere = Linf(1.0)
    held = torch.ones_like(subject.standing)
    for step_size, steps in UNBOUNDED:
        rows = held.nonzero().flatten()
        if len(rows):
            left = subject.take(rows)
            eot = 4 if subject.random else 1
            held[rows] = ~left.ascend(
                left.differentiable, anywhere, steps=steps, step_size=step_size, eot=eot
            )
    return above_chance(int(held.sum()), len(subject), subject.classes, threshold, "radius 1")


@check(
    "cliff",
    rule="A4",
    threshold=0.5,
    severity="warns",
    advice="the answer jumps between plateaus, which a gradient cannot see across: attack what lies before the steep part "
    "(the network without its last squashing, or without what draws images together)",
)
def cliff(subject: Subject, threshold: float) -> Evidence:
    """On the way from an image to one of another class, more than half of all change of the margin falls into 3 of 64 pieces (median)."""
    judge = Judge(subject.model, subject.classes, subject.cost)
    steepest = []
    for row in range(len(subject)):
        different = (subject.y != subject.y[row]).nonzero().flatten()
        if len(different) == 0:
            continue
        end = subject.x[different[row % len(different)]]
        way = torch.linspace(0, 1, PIECES + 1, device=end.device)[:, None, None, None]
        points = subject.x[row] + way * (end - subject.x[row])
        change = margin(judge.logits(points, points, None), subject.y[row].expand(len(points))).diff().abs()
        if float(change.sum()) > 0:
            steepest.append(float(change.topk(3).values.sum() / change.sum()))
    if len(steepest) < FEW // 2 or median(steepest) <= threshold:
        return None
    return f"{100 * median(steepest):.0f} % of the margin's change on the way to another image falls into 3 of {PIECES} pieces"


@check(
    "one-step-beats-many",
    rule="A5",
    threshold=0.01,
    severity="warns",
    advice="the gradient misleads an attack that follows it for long: run a black-box attack, average gradients over a "
    "neighbourhood, and look for parts of the model whose gradient is not that of its output",
)
def one_step_beats_many(subject: Subject, threshold: float) -> Evidence:
    """One step, of the radius or half of it, breaks more than 1 % of the images that PGD left standing, and of all, beyond chance."""
    half = threat_model(subject.threat.norm, subject.threat.eps / 2)
    rows = torch.arange(len(subject), device=subject.x.device)
    broken = torch.zeros_like(subject.standing)
    for loss in (cross_entropy, margin):
        steps = sweep(
            subject.differentiable, subject.x, subject.y, [half, subject.threat], loss=loss, eot=subject.eot
        )
        for threat, x_adv in steps:
            broken |= subject.wrong(x_adv, rows, threat)
    return _beaten(subject, broken, threshold, "one step breaks", "PGD")


@check(
    "black-box-beats-white-box",
    rule="A10",
    threshold=0.01,
    severity="warns",
    advice="a gradient attack knows more than one that guesses and must not do worse: the gradients are masked; attack with "
    'a differentiable substitute for what hides them, and add Square at 5,000 queries (attack = "autoattack")',
)
def black_box_beats_white_box(subject: Subject, threshold: float) -> Evidence:
    """Noise or a short random search breaks more than 1 % of the images that every attack of the run left standing, and of all, beyond chance."""
    rows = torch.arange(len(subject), device=subject.x.device)
    broken = torch.zeros_like(subject.standing)
    for draw in range(NOISES):
        noise = subject.rng.at("noise", draw)
        if draw % 2:
            guess = subject.threat.random_start(subject.x, noise)
        else:
            corner = subject.threat.ascent((noise.uniform(subject.x) - 0.5).sign())
            guess = subject.threat.project(subject.x + subject.threat.eps * corner, subject.x)
        broken |= subject.wrong(guess, rows, subject.threat)
    judge = Judge(subject.model, subject.classes, subject.cost)

    def ask(x: Images) -> Tensor:
        # whether the guess is legal is asked when the best one is judged
        return judge.logits(x, x, None)

    rows = (~broken).nonzero().flatten()
    left = subject.take(rows)
    if len(rows):
        guess = random_search(ask, left.x, left.y, left.threat, rng=left.rng.at("search"), queries=QUERIES)
        broken[rows] = left.wrong(guess, torch.arange(len(rows), device=rows.device), left.threat)
    return _beaten(subject, broken, threshold, "guessing breaks", "the run's attacks")


@check(
    "masked-gradient",
    rule="A9",
    threshold=0.01,
    severity="warns",
    advice="the model's own gradient leads nowhere where that of its average over a neighbourhood leads out: attack the "
    "average (expectation over transformation), or substitute what is discontinuous",
)
def masked_gradient(subject: Subject, threshold: float) -> Evidence:
    """PGD along gradients averaged over noisy copies of the image breaks more than 1 % of the images that every attack of the run left standing, and of all, beyond chance."""
    smooth = Smooth(subject.differentiable, subject.threat, subject.x)
    broken = subject.ascend(smooth, subject.threat, steps=SMOOTH_STEPS, step_size=subject.threat.eps / 4)
    return _beaten(subject, broken, threshold, "PGD along averaged gradients breaks", "the run's attacks")


@check(
    "not-converged",
    rule="A6",
    threshold=0.05,
    severity="warns",
    advice="the attack was stopped too early, so the accuracy is too high: ask for more steps or more restarts until the last "
    "ones find nothing",
)
def not_converged(subject: Subject, threshold: float) -> Evidence:
    """One more start of PGD with the margin loss breaks more than 5 % of the images that the run left standing, and 2 % of all, beyond chance; informs from 1 % and 0.5 % on, or where the loss still climbs on more than 10 %."""
    ascent = subject.ascent
    count, climbing = int(ascent.broken.sum()), ascent.climbing & ~ascent.broken
    sentence = f"one more start of PGD breaks {count} of {len(subject)} images that the run left standing"
    if subject.many(ascent.broken, threshold, 0.02):
        return sentence
    if subject.many(ascent.broken, 0.01, 0.005):
        return sentence, "informs"
    if subject.many(climbing, 0.1, 0.0):
        many = f"{int(climbing.sum())} of {len(subject)} images"
        return f"the loss still climbs after {len(ascent.losses)} steps on {many}", "informs"
    return None


@check(
    "loss-stuck",
    rule="A1",
    threshold=0.05,
    severity="warns",
    advice="a loss that does not move has no gradient worth following: look for saturated, rounded or discontinuous parts, "
    "and attack with another loss, a smooth substitute or without gradients",
)
def loss_stuck(subject: Subject, threshold: float) -> Evidence:
    """PGD never raises the margin loss above that of its start on more than 5 % of the images that the run left standing, and of all, beyond chance."""
    stuck = subject.ascent.stuck & ~subject.ascent.broken
    if not subject.many(stuck, threshold):
        return None
    return f"the loss never rises on {int(stuck.sum())} of {len(subject)} images that the run left standing"


@check(
    "unstable-landscape",
    rule="A4",
    threshold=0.1,
    severity="informs",
    advice="average gradients over a neighbourhood (expectation over transformation) and compare",
)
def unstable_landscape(subject: Subject, threshold: float) -> Evidence:
    """Noise of half the radius changes the margin loss by more than 10 % on average (Pintor et al. 2022, unstable predictions)."""
    changes = []
    judge = Judge(subject.model, subject.classes, subject.cost)
    here = margin(judge.logits(subject.x, subject.x, None), subject.y)
    half = threat_model(subject.threat.norm, subject.threat.eps / 2)
    for draw in range(NOISES):
        near = half.random_start(subject.x, subject.rng.at("near", draw))
        there = margin(judge.logits(near, subject.x, half), subject.y)
        changes.append(((there - here).abs() / here.abs().clamp_min(1e-12)).clamp_max(1))
    change = float(torch.stack(changes).mean())
    if change <= threshold:
        return None
    return f"noise of half the radius changes the margin loss by {100 * change:.0f} % on average"


@check(
    "random-forward",
    rule="A14",
    threshold=0.005,
    severity="warns",
    advice="gradients of a random model must be averaged over enough passes: raise eot until twice as many change nothing",
)
def twice_the_samples(subject: Subject, threshold: float) -> Evidence:
    """A random model: twice the samples per gradient lower accuracy by more than 0.5 points and two paired standard errors; informs where they do not."""
    rows = torch.arange(len(subject), device=subject.x.device)
    shares = []
    for eot in (subject.eot, 2 * subject.eot):
        ends = trajectory(
            subject.differentiable,
            subject.x,
            subject.y,
            subject.threat,
            rng=subject.rng.at("samples"),
            milestones=[SAMPLED_STEPS],
            loss=margin,
            eot=eot,
        )
        ((_, x_adv),) = ends
        shares.append(subject.share(x_adv, rows, subject.threat, 2 * DRAWS))
    lost = shares[0] - shares[1]
    error = float(lost.std() / len(lost) ** 0.5) if len(lost) > 1 else 1.0
    evidence = (
        f"with {2 * subject.eot} samples per gradient in place of {subject.eot}, accuracy under {SAMPLED_STEPS} steps falls by "
        f"{100 * float(lost.mean()):.1f} points (± {200 * error:.1f})"
    )
    return evidence if float(lost.mean()) > max(threshold, 2 * error) else (evidence, "informs")


class Smooth(nn.Module):
    """The mean of a model's logits over noisy copies of its input, the noise always the same and about half the radius long."""

    def __init__(self, model: Counted, threat: ThreatModel, like: Images) -> None:
        super().__init__()
        noise = Rng("smooth").normal(like[:1].expand(COPIES, *like.shape[1:]))
        per_pixel = threat.eps if threat.norm == "Linf" else threat.eps / like[0].numel() ** 0.5
        self.model, self.noise, self.at_once = model, SMOOTHING * per_pixel * noise, model.at_once
        self.arithmetic = model.arithmetic

    def forward(self, x: Images) -> Tensor:
        """`(b, c, h, w)` to `(b, k)`."""
        return torch.stack([self.model((x + noise).clamp(0, 1)) for noise in self.noise]).mean(0)


def _beaten(subject: Subject, broken: Tensor, allowed: float, what: str, than: str) -> Evidence:
    if not subject.many(broken, allowed):
        return None
    return f"{what} {int(broken.sum())} of {len(subject)} images that {than} left standing"


def _never(subject: Subject) -> Tensor:
    return torch.zeros_like(subject.standing)


PROBES: tuple[Probe, ...] = (
    Probe(
        (unbounded_survives,),
        lambda s: sum(steps for _, steps in UNBOUNDED) * (GRADIENT * (4 if s.random else 1)),
        lambda s: torch.ones_like(s.standing),
    ),
    Probe(
        (one_step_beats_many,),
        lambda s: 2 * GRADIENT * s.eot + 4 * (DRAWS if s.random else 1),
        lambda s: s.pgd_standing if s.steps else _never(s),
    ),
    Probe((cliff,), lambda s: PIECES + 1, lambda s: _never(s) if s.random else torch.ones_like(s.standing)),
    Probe(
        (weaker_gradients,),
        lambda s: 2 * 10 * GRADIENT + 2,
        lambda s: _never(s) if s.random or s.gradient_model is s.model else torch.ones_like(s.standing),
    ),
    Probe((unstable_landscape,), lambda s: NOISES + 1, lambda s: _never(s) if s.random else s.standing),
    Probe(
        (black_box_beats_white_box,),
        lambda s: NOISES * (DRAWS if s.random else 1) + QUERIES + 1,
        lambda s: s.standing,
    ),
    Probe(
        (masked_gradient,),
        lambda s: GRADIENT * COPIES * SMOOTH_STEPS + (DRAWS if s.random else 1),
        lambda s: s.standing,
    ),
    Probe(
        (not_converged, loss_stuck),
        lambda s: GRADIENT * max(20, min(s.steps, 100)) + 1,
        lambda s: _never(s) if s.random else s.standing,
    ),
    Probe(
        (twice_the_samples,),
        lambda s: GRADIENT * 3 * s.eot * SAMPLED_STEPS + 4 * DRAWS,
        lambda s: torch.ones_like(s.standing) if s.random else _never(s),
    ),
)

CHECKS: tuple[Check[Subject], ...] = tuple(one for probe in PROBES for one in probe.checks)
