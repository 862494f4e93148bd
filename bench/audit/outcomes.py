"""What a run's outcomes alone say against it: which images fell in which column, at which start, after how many steps.

An attack that is stronger by construction must break at least as many images. Where it does not, it is the gradient that
fails and not the attacker: fewer images for many steps than for one, for the gradient than for guesses, for a larger ball
than for a smaller one (Athalye et al. 2018, Carlini et al. 2019). `beyond chance` is one of two exact one-sided tests:

- `exceeds`: of a share. Would so many images be seen if the true share were no more than what is allowed?
- `outnumber`: McNemar's, paired. Would so many more fall here than there if each discordant image were a fair coin?
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from bench.audit.best import best
from bench.audit.check import Check, Evidence, check, findings
from bench.finding import Finding
from bench.protocol import ADAPTIVE, BOUND, EIGHT_BIT, PGD_FAMILY
from bench.record import ColumnRecord, Facts, Record
from bench.stats import wilson

if TYPE_CHECKING:
    import pandas as pd

#: the level of every test here
LEVEL = 0.01
#: attacks that ask for answers and never for a gradient
BLACK_BOX = (
    "square",
    "random",
    "torchattacks:Square",
    "torchattacks:Pixle",
    "torchattacks:OnePixel",
    "torchattacks:GN",
)
#: attacks that aim at one wrong class after another
TARGETED = ("apgd-t", "fab-t")

#: what is told of every image in every column
MATRICES = ("robust", "share", "selected", "restart", "step", "prediction")

Held = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Outcomes:
    """A run, as its outcomes tell it.

    Args:
        columns: the protocol's, in order.
        labels: `(n,)`, by image.
        robust, share, selected, restart, step, prediction: one row per image, one column per column of the protocol, as
            `Record.outcomes` describes them.
        dataset, protocol: their names.
        norm, eps: of the protocol; `eps` in pixel units.
        success: `last` or `any`.
        facts: what the model was found to be.
    """

    columns: tuple[ColumnRecord, ...]
    labels: pd.Series[int]
    robust: pd.DataFrame
    share: pd.DataFrame
    selected: pd.DataFrame
    restart: pd.DataFrame
    step: pd.DataFrame
    prediction: pd.DataFrame
    dataset: str
    protocol: str
    norm: str
    eps: float
    success: Literal["last", "any"]
    facts: Facts

    @classmethod
    def read(cls, table: pd.DataFrame, record: Record) -> Outcomes:
        """A record with its outcomes: one row per image and column, as `Record.outcomes` gives them."""
        names = [column.name for column in record.columns]
        matrices = {
            name: table.pivot(index="index", columns="column", values=name)[names] for name in MATRICES
        }
        labels = table.drop_duplicates("index").set_index("index")["label"].sort_index()
        protocol = record.asked.protocol
        return cls(
            columns=tuple(record.columns),
            labels=labels,
            **matrices,
            dataset=record.asked.dataset,
            protocol=str(protocol["name"]),
            norm=str(protocol["norm"]),
            eps=float(protocol["eps"]),
            success=protocol["success"],
            facts=record.model,
        )

    def at(self, index: NDArray[np.int64]) -> Outcomes:
        """The outcomes of these images alone, in this order; `index` are dataset positions."""
        some = {name: getattr(self, name).loc[index] for name in (*MATRICES, "labels")}
        return dataclasses.replace(self, **some)

    def with_zero_loss(self, share: float) -> Outcomes:
        """The same, with the share of right images on which cross-entropy is exactly 0 filled in."""
        return dataclasses.replace(self, facts=self.facts.model_copy(update={"zero_loss": share}))

    @property
    def black_box(self) -> bool:
        """Whether an attack that asks for no gradient is among them."""
        return any(_black(column) for column in self.attacks)

    @property
    def iterated(self) -> list[ColumnRecord]:
        """The columns of PGD."""
        return [column for column in self.attacks if _iterated(column)]

    @property
    def n(self) -> int:
        """How many images."""
        return len(self.labels)

    @property
    def attacks(self) -> list[ColumnRecord]:
        """The columns that count for the worst case, without the clean one."""
        return [column for column in self.columns if not column.diagnostic and column.attack != "clean"]

    def held(self, column: ColumnRecord) -> Held:
        """Which images stand after it, `(n,)`; of a random model, those answered rightly in more than half of the draws."""
        return (self.share[column.name] > 0.5).to_numpy(dtype=bool)

    def broke(self, column: ColumnRecord) -> Held:
        """Which correctly classified images this very column broke, `(n,)`, not those that fell before it."""
        fell: Held = ~self.held(column) & (self.restart[column.name] >= 0).to_numpy(dtype=bool) & self.right
        return fell

    @property
    def right(self) -> Held:
        """Which images are classified as labelled before any attack, `(n,)`."""
        return (self.share["clean"] > 0.5).to_numpy(dtype=bool)

    def all_hold(self, columns: Sequence[ColumnRecord]) -> Held:
        """Which correctly classified images stand after every one of these columns, `(n,)`."""
        stand: Held = np.logical_and.reduce([self.right, *(self.held(column) for column in columns)])
        return stand

    @property
    def claimed(self) -> float | None:
        """The largest radius at which this run says that more images hold than by chance; None where it says so of none.

        It is the protocol's, unless nothing is left there: then the next smaller one that PGD was run at. A stronger attack
        could matter there, and at a radius that breaks everything it could not.
        """
        smaller = {c.epsilon or 0 for c in self.iterated if c.norm == self.norm and not _same(c, self.eps)}
        for eps in (self.eps, *sorted((e for e in smaller if e < self.eps), reverse=True)):
            columns = self.attacks_at(self.norm, eps)
            low, _ = wilson(int(self.all_hold(columns).sum()), self.n)
            if columns and float(low) > 1 / self.facts.classes:
                return eps
        return None

    def attacks_at(self, norm: str, eps: float) -> list[ColumnRecord]:
        """The attacks of this radius, or where there is none, of larger ones; those of a smaller one say nothing of it."""
        alike = [column for column in self.attacks if column.norm == norm]
        exactly = [column for column in alike if _same(column, eps)]
        return exactly or [column for column in alike if (column.epsilon or 0) > eps]

    def worst(self, columns: Sequence[ColumnRecord] | None = None) -> NDArray[np.float64]:
        """Per image the share of right answers in the worst of these columns, of all by default, `(n,)`.

        The draws that tell which column is worst are not those that its share is of.
        """
        names = ["clean", *(column.name for column in (self.attacks if columns is None else columns))]
        chosen = self.selected[names].to_numpy().argmin(1)
        worst: NDArray[np.float64] = self.share[names].to_numpy(dtype=np.float64)[np.arange(self.n), chosen]
        return worst


def outcome_findings(outcomes: Outcomes) -> list[Finding]:
    """What the outcomes say against the run."""
    return findings(CHECKS, outcomes)


def exceeds(count: int, n: int, allowed: float, level: float = LEVEL) -> bool:
    """Whether `count` of `n` is more than a true share of `allowed` explains: the exact binomial test, one-sided."""
    if count <= allowed * n:
        return False
    from scipy.stats import binomtest

    return bool(binomtest(count, n, allowed, alternative="greater").pvalue < level)


def outnumber(here: int, there: int, level: float = LEVEL) -> bool:
    """Whether `here` exceeds `there` by more than fair coins explain: the exact sign test, one-sided (McNemar's)."""
    return exceeds(here, here + there, 0.5, level)


def _iterated(column: ColumnRecord) -> bool:
    return column.attack.removesuffix("-margin") in PGD_FAMILY


def _black(column: ColumnRecord) -> bool:
    return column.attack in BLACK_BOX or column.attack.startswith("transfer:")


def _white(outcomes: Outcomes) -> list[ColumnRecord]:
    """The columns that follow a gradient; an ensemble is left out, its components stand for it."""
    wholes = {column.part_of for column in outcomes.columns}
    return [
        column
        for column in outcomes.attacks
        if not _black(column) and column.attack != EIGHT_BIT and column.name not in wholes
    ]


def _same(column: ColumnRecord, eps: float) -> bool:
    """Whether a column's radius is this one; in JSON and in a protocol it may differ in its last digits."""
    return abs((column.epsilon or 0) - eps) < 1e-9


def _covers(strong: ColumnRecord, weak: ColumnRecord) -> bool:
    """Whether every image that `weak` may return `strong` may return too."""
    return strong.norm == weak.norm and (strong.epsilon or 0) >= (weak.epsilon or 0) * (1 - 1e-9)


def _alike(columns: Sequence[ColumnRecord], by: str) -> Iterator[list[ColumnRecord]]:
    """Groups of columns that differ in `by` alone, weakest first; groups of one are left out."""
    groups: dict[tuple[object, ...], list[ColumnRecord]] = {}
    for column in columns:
        same = {"epsilon": column.epsilon, "steps": column.steps, "restarts": column.restarts}
        # a step size that is a fraction of the radius belongs to it
        size = column.step_size and column.epsilon and round(column.step_size / column.epsilon, 9)
        rest = (
            column.attack,
            column.norm,
            column.loss,
            column.eot,
            size,
            column.survivors,
            str(column.settings),
        )
        key = (*rest, *(value for name, value in same.items() if name != by))
        groups.setdefault(key, []).append(column)
    for group in groups.values():
        if len(group) > 1:
            yield sorted(group, key=lambda column: getattr(column, by) or 0)


def _percent(count: float, n: int) -> str:
    return f"{100 * count / n:.3g} %"


@check(
    "one-step-beats-many",
    rule="A5",
    threshold=0.01,
    severity="warns",
    advice="the gradient misleads an attack that follows it for long: run a black-box attack, average gradients over a "
    "neighbourhood, and look for parts of the model whose gradient is not that of its output",
)
def one_step_beats_many(outcomes: Outcomes, threshold: float) -> Evidence:
    """FGSM breaks more images than PGD at its radius or a larger one, or more than 1 % that PGD leaves, beyond chance."""
    single = [column for column in outcomes.attacks if column.attack.removesuffix("-margin") == "fgsm"]
    iterated = outcomes.iterated
    for column in sorted(single, key=lambda one: -(one.epsilon or 0)):
        many = [strong for strong in iterated if _covers(strong, column)]
        if not many or column.survivors:
            continue
        once, long = outcomes.all_hold([column]), outcomes.all_hold(many)
        only_once, only_long = int((long & ~once).sum()), int((once & ~long).sum())
        if outnumber(only_once, only_long) or exceeds(only_once, outcomes.n, threshold):
            return (
                f"{column.name} breaks {only_once} images ({_percent(only_once, outcomes.n)}) that PGD at radius "
                f"{many[0].epsilon:.4g} leaves standing; PGD breaks {only_long} that it leaves"
            )
    return None


@check(
    "black-box-beats-white-box",
    rule="A9",
    threshold=0.002,
    severity="warns",
    advice="a gradient attack knows more than one that guesses and must not do worse: the gradients are masked; attack with "
    "a differentiable substitute for what hides them, and believe the black-box number until then",
)
def black_box_beats_white_box(outcomes: Outcomes, threshold: float) -> Evidence:
    """Square, random or transferred images break more than 0.2 % of all images, beyond chance, that no gradient attack broke."""
    white = _white(outcomes)
    for column in outcomes.attacks:
        rivals = [strong for strong in white if _covers(strong, column)]
        if not _black(column) or not rivals:
            continue
        only = int((outcomes.broke(column) & outcomes.all_hold(rivals)).sum())
        if exceeds(only, outcomes.n, threshold):
            return (
                f"{column.name} breaks {only} images ({_percent(only, outcomes.n)}) that none of {len(rivals)} gradient "
                "attacks broke"
            )
    return None


@check(
    "saturated-loss",
    rule="A11",
    threshold=0.05,
    severity="warns",
    advice="cross-entropy has no gradient where the model is sure; report the worst case over both losses, and attack with "
    "the margin loss or with rescaled logits",
)
def saturated_loss(outcomes: Outcomes, threshold: float) -> Evidence:
    """Cross-entropy leaves 5 % more of all images than the margin loss of the same attack does (2 % more where it is seen to underflow), beyond chance."""
    if outcomes.facts.zero_loss > 0.01:
        threshold = 0.02
    attacks = outcomes.iterated
    for entropy in (column for column in attacks if column.loss == "ce"):
        for margin in (column for column in attacks if column.loss == "margin"):
            if (entropy.epsilon, entropy.steps, entropy.restarts, entropy.eot) != (
                *(margin.epsilon, margin.steps, margin.restarts),
                margin.eot,
            ):
                continue
            only_margin = int((outcomes.held(entropy) & ~outcomes.held(margin)).sum())
            only_entropy = int((outcomes.held(margin) & ~outcomes.held(entropy)).sum())
            more = only_margin - only_entropy
            if exceeds(more, outcomes.n, threshold) and outnumber(only_margin, only_entropy):
                return (
                    f"{entropy.name} leaves {_percent(more, outcomes.n)} more of all images than {margin.name}; cross-entropy "
                    f"is as good as 0 on {100 * outcomes.facts.zero_loss:.3g} % of the clean ones"
                )
    return None


@check(
    "not-converged",
    rule="A6",
    threshold=0.005,
    severity="warns",
    advice="the attack was stopped too early, so the accuracy is too high: ask for more steps or more restarts until the last "
    "ones find nothing",
)
def not_converged(outcomes: Outcomes, threshold: float) -> Evidence:
    """The last quarter of PGD's steps, its last restart, or twice the steps still break more than 0.5 % of all images; beyond chance it warns."""
    if outcomes.facts.draws > 1:
        # of a random model every restart may find a better candidate by luck; the probe with twice the samples tells
        return None
    seen: list[tuple[int, str]] = []
    attacks = [column for column in outcomes.attacks if _iterated(column) and column.steps]
    for column in attacks:
        broke, restarts, steps = outcomes.broke(column), column.restarts or 1, column.steps or 0
        if restarts > 1:
            late = broke & (outcomes.restart[column.name] == restarts - 1)
            seen.append((int(late.sum()), f"the last of {restarts} restarts of {column.name}"))
        elif outcomes.success == "any" and steps == max(other.steps or 0 for other in attacks):
            late = broke & (outcomes.step[column.name] > 0.75 * steps)
            seen.append((int(late.sum()), f"the last quarter of the {steps} steps of {column.name}"))
    single = [column for column in attacks if (column.restarts or 1) == 1]
    for group in _alike(single, "steps"):
        long = group[-1]
        half = next((c for c in reversed(group) if 2 * (c.steps or 0) <= (long.steps or 0)), None)
        if half is not None and outcomes.success == "last":
            gained = int(outcomes.held(half).sum()) - int(outcomes.held(long).sum())
            seen.append((gained, f"the steps of {long.name} beyond those of {half.name}"))
    late_count, what = max(seen, default=(0, ""))
    if late_count < 2 or late_count <= threshold * outcomes.n:
        return None
    sentence = f"{what} break {late_count} more images ({_percent(late_count, outcomes.n)})"
    return sentence if exceeds(late_count, outcomes.n, threshold) else (sentence, "informs")


@check(
    "not-monotone",
    rule="A7",
    severity="warns",
    advice="a larger ball, more steps or more starts can only help an attacker who finds what is there: look at gradient "
    "masking, and read the running minimum in place of the curve",
)
def not_monotone(outcomes: Outcomes, threshold: float) -> Evidence:
    """Accuracy rises with the radius, the steps or the restarts of one attack, beyond chance; informs where only FGSM's does with the radius."""
    compared: list[tuple[str, ColumnRecord, ColumnRecord]] = []
    single = [column for column in outcomes.attacks if column.attack.removesuffix("-margin") == "fgsm"]
    iterated = outcomes.iterated
    for by, columns in (
        ("steps", iterated),
        ("restarts", iterated),
        ("epsilon", iterated),
        ("epsilon", single),
    ):
        for group in _alike([column for column in columns if not column.survivors], by):
            compared += [(by, weak, strong) for weak, strong in pairwise(group)]
    for by, weak, strong in compared:
        rises = int((~outcomes.held(weak) & outcomes.held(strong)).sum())
        falls = int((outcomes.held(weak) & ~outcomes.held(strong)).sum())
        if outnumber(rises, falls, LEVEL / len(compared)):
            sentence = (
                f"{strong.name} breaks {rises - falls} images fewer ({_percent(rises - falls, outcomes.n)}) than {weak.name}, "
                f"which has fewer {by}"
                if by != "epsilon"
                else f"{strong.name} breaks {rises - falls} images fewer ({_percent(rises - falls, outcomes.n)}) than {weak.name}, "
                "whose radius is smaller"
            )
            # one step may well overshoot what lies nearer, so this alone proves nothing
            return (sentence, "informs") if strong in single else sentence
    return None


@check(
    "gate-masks",
    rule="E3",
    threshold=0.01,
    severity="warns",
    advice="attacks that do not know of the gate overstate this mixture: read the worst case over the adaptive attacks, and "
    "give those more steps and restarts",
)
def gate_masks(outcomes: Outcomes, threshold: float) -> Evidence:
    """On a mixture, attacks that know of the gate break more than 1 % of all images, beyond chance, that those which take it as frozen leave."""
    frozen = [column for column in outcomes.attacks if column.attack == "frozen-gate"]
    aware = [column for column in outcomes.attacks if column.attack in ADAPTIVE - {"frozen-gate"}]
    if not frozen or not aware:
        return None
    # a soft gate has a gradient, so that plain PGD through the whole model is no blinder than with the gate frozen
    blind = frozen if outcomes.facts.mixture == "hard" else [*frozen, *outcomes.iterated]
    blind = [column for column in blind if _covers(frozen[0], column)]
    only = int((outcomes.all_hold(blind) & ~outcomes.all_hold(aware)).sum())
    if not exceeds(only, outcomes.n, threshold):
        return None
    return f"attacks that know of the gate break {only} images ({_percent(only, outcomes.n)}) that hold while it is frozen"


@check(
    "gate-masks",
    rule="E4",
    threshold=0.005,
    severity="warns",
    advice="a mixture errs only where one of its experts does, so the attack on the experts alone was too weak: give the "
    "adaptive attacks more steps and restarts",
)
def sandwich(outcomes: Outcomes, threshold: float) -> Evidence:
    """Images fool the mixture though every expert survived the attack on it alone; warns from two images and 0.5 % on."""
    bound = next((column for column in outcomes.columns if column.attack == BOUND), None)
    if bound is None:
        return None
    columns = [column for column in outcomes.attacks if _covers(bound, column)]
    missed = int((outcomes.held(bound) & ~outcomes.all_hold(columns)).sum())
    if missed == 0:
        return None
    sentence = f"{missed} of {outcomes.n} images fool the mixture though every expert survived the attack on it alone"
    return sentence if missed >= 2 and missed > threshold * outcomes.n else (sentence, "informs")


@check(
    "no-adaptive-attack",
    rule="E1",
    severity="warns",
    advice="gradients do not see a hard gate: ask for --protocol standard or --protocol adaptive",
)
def no_adaptive_attack(outcomes: Outcomes, threshold: float) -> Evidence:
    """A mixture with a hard gate, and no attack that knows of it."""
    aware = [column for column in outcomes.attacks if column.attack in ADAPTIVE - {"frozen-gate"}]
    if outcomes.facts.mixture != "hard" or aware or not outcomes.attacks:
        return None
    return f"routing is hard and none of {len(outcomes.attacks)} attacks knows of the gate"


@check(
    "too-good",
    rule="M4",
    threshold=1.0,
    severity="warns",
    advice="compare data, radius, preprocessing and checkpoint with what was published before anything else; then attack "
    "with all that the harness has (--protocol standard)",
)
def too_good(outcomes: Outcomes, threshold: float) -> Evidence:
    """The worst case lies above the best published without extra data at that radius (lower end of the interval, at least 100 images), or the clean accuracy is further from the stated one than 1 point and 3 standard errors."""
    clean = 100 * float(outcomes.share["clean"].mean())
    if outcomes.facts.stated_clean is not None:
        p = outcomes.facts.stated_clean / 100
        reach = max(threshold, 300 * math.sqrt(p * (1 - p) / outcomes.n))
        if abs(clean - outcomes.facts.stated_clean) > reach:
            return f"clean accuracy is {clean:.2f} %, and {outcomes.facts.stated_clean:.2f} % is stated (± {reach:.2g} points)"
    known = best(outcomes.dataset, outcomes.norm, max((c.epsilon or 0 for c in outcomes.attacks), default=0))
    if known is None or outcomes.n < 100:
        return None
    at = min(c.epsilon for c in outcomes.attacks if c.epsilon is not None and c.epsilon >= known.eps - 1e-9)
    columns = [c for c in outcomes.attacks if c.epsilon == at]
    accuracy = float(outcomes.worst(columns).mean())
    low, _ = wilson(accuracy * outcomes.n, outcomes.n)
    if 100 * float(low) <= known.accuracy:
        return None
    return (
        f"robust accuracy is {100 * accuracy:.1f} % (at least {100 * float(low):.1f} %); the best published at {known.norm} "
        f"{known.eps:.4g} is {known.accuracy:.2f} % ({known.model}, {known.source})"
    )


@check(
    "few-images",
    rule="S2",
    threshold=1000,
    severity="informs",
    advice="take more images (--samples) before telling apart what differs by less than this interval",
)
def few_images(outcomes: Outcomes, threshold: float) -> Evidence:
    """Fewer than 1,000 images; says how wide that leaves the interval."""
    if outcomes.n >= threshold:
        return None
    low, high = wilson(float(outcomes.worst().sum()), outcomes.n)
    return f"{outcomes.n} images: the worst case is known to ± {50 * float(high - low):.1f} points"


@check(
    "at-chance",
    rule="S8",
    threshold=0.05,
    severity="blocks",
    advice="this is a failed training or a wrong checkpoint, not a result; look at the clean accuracy first",
)
def at_chance(outcomes: Outcomes, threshold: float) -> Evidence:
    """Clean accuracy that guessing explains (binomial test at 5 %), or one class predicted for all images; informs below 20 images."""
    right, n = int(outcomes.right.sum()), outcomes.n
    predicted = outcomes.prediction["clean"]
    if predicted.nunique() == 1 and outcomes.labels.nunique() > 1:
        sentence = f"class {predicted.iloc[0]} is predicted for all {n} images"
    elif not exceeds(right, n, 1 / outcomes.facts.classes, threshold):
        sentence = f"{right} of {n} clean images are right, which guessing among {outcomes.facts.classes} classes explains"
    else:
        return None
    return sentence if n >= 20 else (sentence, "informs")


@check(
    "degenerate-settings",
    rule="A12",
    severity="warns",
    advice="let the steps reach across the ball without leaping over it: step_size = eps/4 with 10 steps or more; eps is in "
    "pixel units of [0,1]; eot above 1 for random models alone",
)
def degenerate_settings(outcomes: Outcomes, threshold: float) -> Evidence:
    """Steps that cannot reach the edge of the ball or leap across it, a radius above 1, or samples of a random model that are too few (for a deterministic one several inform)."""
    told: list[str] = []
    for column in outcomes.attacks:
        eps, size, steps = column.epsilon or 0, column.step_size, column.steps
        if column.norm == "Linf" and eps > 1:
            told.append(f"{column.name} has radius {eps:g}, more than the whole range of a pixel")
        if size and steps and size * steps < eps * (1 - 1e-9):
            told.append(
                f"{column.name}: {steps} steps of {size:.3g} do not reach the edge of a ball of {eps:.3g}"
            )
        if size and size >= 2 * eps * (1 - 1e-9):
            told.append(f"{column.name}: steps of {size:.3g} leap across a ball of {eps:.3g}")
    sampled = [column.eot for column in outcomes.attacks if column.eot is not None]
    if outcomes.facts.randomness in ("stochastic", "re-seeded") and sampled and max(sampled) == 1:
        told.append("the model is random, and no attack averages its gradient over several passes")
    if told:
        return "; ".join(told[:3]) + (f"; {len(told) - 3} more" if len(told) > 3 else "")
    if outcomes.facts.randomness == "deterministic" and max(sampled, default=1) > 1:
        return (
            "the model is deterministic, so that several passes per gradient (eot) are one pass repeated",
            "informs",
        )
    return None


@check(
    "untargeted-only",
    rule="A16",
    severity="informs",
    advice='targeted attacks break images that untargeted ones leave; add attack = "autoattack" or use --protocol standard',
)
def untargeted_only(outcomes: Outcomes, threshold: float) -> Evidence:
    """A security evaluation (`any`) that claims accuracy above chance without a targeted attack."""
    targeted = any(c.attack in (*TARGETED, "autoattack", "per-route") for c in outcomes.attacks)
    if outcomes.success != "any" or targeted or outcomes.claimed is None:
        return None
    return f"none of {len(outcomes.attacks)} attacks is targeted"


@check(
    "single-loss",
    rule="A11",
    severity="informs",
    advice="cross-entropy and the margin loss fail on different models; ask for both",
)
def single_loss(outcomes: Outcomes, threshold: float) -> Evidence:
    """Accuracy above chance is claimed, and every gradient attack ascends cross-entropy."""
    white = _white(outcomes)
    if not white or outcomes.claimed is None:
        return None
    entropy = all(c.attack == "apgd-ce" or (c.loss == "ce" and c.attack not in ADAPTIVE) for c in white)
    return "every gradient attack ascends cross-entropy" if entropy else None


@check(
    "rounding-matters",
    rule="V5",
    threshold=0.01,
    severity="warns",
    advice="what breaks the model is lost when the image is stored in 8 bits: report the 8-bit column as well, and look for a "
    "model that answers to differences below a pixel level",
)
def rounding_matters(outcomes: Outcomes, threshold: float) -> Evidence:
    """Adversarial images rounded to pixel levels leave more than 1 % of all images standing, beyond chance, that fell before rounding."""
    rounded = next((column for column in outcomes.columns if column.attack == EIGHT_BIT), None)
    others = [column for column in outcomes.attacks if column is not rounded]
    if rounded is None or not others:
        return None
    back = int(
        (outcomes.held(rounded) & ~outcomes.all_hold([c for c in others if _covers(rounded, c)])).sum()
    )
    if not exceeds(back, outcomes.n, threshold):
        return None
    return f"{back} images ({_percent(back, outcomes.n)}) that fell hold again once rounded to whole pixel levels"


@check(
    "unbounded-survives",
    rule="A8",
    threshold=0.5,
    severity="blocks",
    advice="in so large a ball every image can be made into another one, so it is the attack that fails: no accuracy at a "
    "smaller radius can be believed until one gets through",
)
def unbounded_survives(outcomes: Outcomes, threshold: float) -> Evidence:
    """Accuracy under PGD at a radius of 0.5 or more (L∞) is above chance (lower end of the interval); warns up to 50 %."""
    columns = [c for c in outcomes.attacks if _iterated(c) and c.norm == "Linf" and (c.epsilon or 0) >= 0.5]
    if not columns:
        return None
    return above_chance(
        int(outcomes.all_hold(columns).sum()), outcomes.n, outcomes.facts.classes, threshold, "radius 0.5"
    )


@check(
    "few-draws",
    rule="R1",
    threshold=100,
    severity="informs",
    advice="score each image by at least 100 fresh draws",
)
def few_draws(outcomes: Outcomes, threshold: float) -> Evidence:
    """A random model whose images are scored by fewer than 100 draws each."""
    if outcomes.facts.randomness not in ("stochastic", "re-seeded") or outcomes.facts.draws >= threshold:
        return None
    return f"each image is scored by {outcomes.facts.draws} draw(s) of a random model"


def above_chance(held: int, n: int, classes: int, blocks: float, where: str) -> Evidence:
    """What it says of a model that `held` of `n` images survive where none should; blocks above the share `blocks`."""
    low, _ = wilson(held, n)
    if float(low) <= 1 / classes:
        return None
    sentence = f"{_percent(held, n)} of {n} images hold at {where}, where chance is {100 / classes:.3g} %"
    return (sentence, "blocks") if held / n > blocks else (sentence, "warns")


CHECKS: tuple[Check[Outcomes], ...] = (
    at_chance,
    unbounded_survives,
    one_step_beats_many,
    black_box_beats_white_box,
    saturated_loss,
    not_converged,
    not_monotone,
    gate_masks,
    sandwich,
    no_adaptive_attack,
    too_good,
    rounding_matters,
    degenerate_settings,
    few_draws,
    untargeted_only,
    single_loss,
    few_images,
)
