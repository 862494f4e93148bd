"""The model contract: is a model a function from pixels to logits at all?

About fifteen forward passes over at most 64 images, no attack. What does not hold here would falsify every number after it:
a model that answers by the batch, by the call or by whether somebody wants its gradient has no accuracy, let alone a robust
one. Whatever is done to the model and to the global generators on the way is undone.

Differences are measured in units of the logits' size: the largest distance of a logit from the mean of its row.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from bench.arithmetic import exact_arithmetic
from bench.attacks.mixture import deployed_weights, mixed
from bench.audit.check import Check, Evidence, check
from bench.audit.untouched import State, frozen, generator_states, generators_kept, seed_all, seeded_states
from bench.audit.watch import Watched, watching
from bench.errors import BenchError, VoidRun
from bench.finding import Finding
from bench.judge import ask
from bench.model import evaluating
from bench.moe import as_mixture, output_of
from bench.record import Facts
from bench.rng import Rng
from bench.types import Images, Labels, Logits

#: the images that are looked at
IMAGES = 64
#: passes over the same images, two of them watched
REPEATS = 4
#: differences below this are rounding, which may depend on the order of a machine's additions
ROUNDING = 1e-5
#: a quarter of a grey level, in pixel units
QUARTER = 0.25 / 255
#: draws that a stated expectation is compared with, and how many times the variance that chance explains it may be off
MEANS, CHANCE = 50, 3.0


@dataclass(frozen=True)
class Contract:
    """What came of it."""

    findings: list[Finding]
    facts: Facts
    """`mixture` and `draws` are left as they are by default"""
    forwards: int
    """images times forward passes that it took"""

    def untrained(self) -> Contract:
        """What of it holds before training: saying one thing of everything is then no fault."""
        kept = [finding for finding in self.findings if finding.code != "constant-prediction"]
        return replace(self, findings=kept)


def contract(model: nn.Module, x: Images, y: Labels, *, classes: int, adaptive: bool = False) -> Contract:
    """Looks at a model before it is attacked; leaves it, and the global generators, as they were.

    Args:
        model: any module; it is looked at in eval mode, on the device of the images.
        x, y: images of the dataset and their labels; the first 64 are used.
        classes: how many the dataset has.
        adaptive: whether there are attacks that know where this model hides a choice from its gradient.
    """
    with generators_kept(x.device), exact_arithmetic(), evaluating(model), frozen(model), torch.no_grad():
        assert len(x), "there must be an image to look at"
        subject = Subject(model, x[:IMAGES], y[:IMAGES], classes, adaptive)
        facts = Facts()
        try:
            found = [_one(basic, subject) for basic in BASIC]
            if subject.refused is None:
                found += [_one(further, subject) for further in FURTHER]
                with suppress(VoidRun):
                    facts = Facts(
                        randomness=subject.randomness,
                        output=subject.output,
                        passes=subject.first.watched.passes,
                    )
        finally:
            subject.before.restore()
    return Contract([finding for finding in found if finding is not None], facts, subject.forwards)


def is_random(model: nn.Module, x: Images, y: Labels, classes: int) -> bool:
    """Whether a model's answers differ from call to call by more than rounding, or may: it is enough that it draws anew.

    Raises:
        VoidRun: the model cannot be asked.
    """
    with generators_kept(x.device), exact_arithmetic(), evaluating(model), frozen(model), torch.no_grad():
        subject = Subject(model, x, y, classes)
        try:
            return subject.randomness == "stochastic"
        finally:
            subject.before.restore()


@dataclass(frozen=True)
class Pass:
    """A forward pass that was watched."""

    logits: Logits
    watched: Watched
    states: dict[str, object]
    """of the global generators, after it"""


@dataclass
class Subject:
    """A model in eval mode and a few images; what several checks ask is measured once.

    Args:
        model: on the device of the images, its parameters needing no gradient.
        x, y: images `(b, c, h, w)` and their labels `(b,)`.
        classes: how many the dataset has.
        adaptive: as in `contract`.
    """

    model: nn.Module
    x: Images
    y: Labels
    classes: int
    adaptive: bool = False
    forwards: int = 0
    mutated: bool = False
    """whether a pass changed the images that it was given"""
    before: State = field(init=False)
    """of the model, before anything was asked of it"""
    training: list[str] = field(init=False)
    """the parts that were in training mode then"""

    def __post_init__(self) -> None:
        self.before = State.of(self.model)
        self.training = in_training(self.model)

    def logits(self, x: Images, what: str) -> Logits:
        """What the model says to images, in float32 at least; `what` they are is told where it fails.

        Raises:
            VoidRun: it raises something, or returns anything but finite logits.
        """
        given = x.clone(memory_format=torch.preserve_format)
        logits = self._formed(self._ask(given, what), len(x), what)
        self.mutated |= not torch.equal(given, x)
        return logits

    def _ask(self, x: Images, what: str) -> Tensor:
        self.forwards += len(x)
        try:
            return ask(self.model, x)
        except BenchError as error:
            code = error.code if isinstance(error, VoidRun) else "model-crash"
            raise VoidRun(f"{what}: {error}", code=code) from error

    def _formed(self, logits: object, n: int, what: str) -> Logits:
        expected = (n, self.classes)
        if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.shape != expected:
            raise VoidRun(
                f"{what}: forward returns {described(logits)}, expected floats {expected}", code="signature"
            )
        bad = int((~logits.isfinite()).any(1).sum())
        if bad:
            raise VoidRun(f"{what}: logits are NaN or infinite for {bad} of {len(logits)}", code="non-finite")
        return logits.detach().to(torch.promote_types(logits.dtype, torch.float32))

    @cached_property
    def refused(self) -> VoidRun | None:
        """What the model did in place of answering, asked the same again and again."""
        try:
            _ = self.answers
        except VoidRun as error:
            return error
        return None

    def _watch(self, seed: int) -> Pass:
        seed_all(seed)
        with watching(self.model) as watched:
            logits = self.logits(self.x, "the same images again")
        return Pass(logits, watched, generator_states(self.x.device))

    @cached_property
    def first(self) -> Pass:
        """A pass over the images after seeding every global generator."""
        return self._watch(1)

    @cached_property
    def second(self) -> Pass:
        """Another, after seeding them differently."""
        return self._watch(2)

    @cached_property
    def answers(self) -> Tensor:
        """The same images again and again, nobody watching, `(r, b, k)`."""
        first = self.logits(self.x, "the first images")
        again = [self.logits(self.x, "the same images again") for _ in range(REPEATS - 1)]
        return torch.stack([first, *again])

    @property
    def reference(self) -> Logits:
        """The first answer."""
        return self.answers[0]

    @cached_property
    def spread(self) -> float:
        """How far the answers to the same images lie apart."""
        return self.differ(self.answers.amax(0), self.answers.amin(0))

    @cached_property
    def changed(self) -> list[str]:
        """The parameters and buffers that are not what they were before the first pass."""
        _ = self.answers
        return self.before.changed()

    @cached_property
    def scale(self) -> float:
        """The logits' size."""
        logits = self.reference
        return float((logits - logits.mean(1, keepdim=True)).abs().max().clamp_min(1e-12))

    def differ(self, a: Logits, b: Logits) -> float:
        """The largest difference, in units of the logits' size."""
        return float((a - b).abs().max()) / self.scale

    @cached_property
    def sources(self) -> list[str]:
        """The generators that a pass draws from or seeds."""
        fresh = seeded_states(self.x.device, 1)
        touched = [name for name, state in self.first.states.items() if state != fresh[name]]
        if self.first.watched.draws and not any(name.startswith("torch") for name in touched):
            touched.append("a generator of its own")
        return touched

    @cached_property
    def drifts(self) -> bool:
        """Whether its answers differ, and are repeated once its attributes are put back: a state, not chance."""
        if self.spread <= ROUNDING or self.sources:
            return False
        with generators_kept(self.x.device):
            self.before.restore()
            torch.manual_seed(0)
            once = self.logits(self.x, "the same images again")
            moved = self.logits(self.x, "the same images again")
            self.before.restore()
            torch.manual_seed(0)
            again = self.logits(self.x, "the same images again")
        return self.differ(once, again) <= ROUNDING < self.differ(once, moved)

    @cached_property
    def randomness(self) -> Literal["deterministic", "noisy", "stochastic", "re-seeded"]:
        """How far two passes over the same images agree."""
        spread = self.spread
        if spread > ROUNDING and not self.drifts:
            return "stochastic"
        if self.sources:
            a, b = self.first, self.second
            same = len(a.watched.draws) == len(b.watched.draws) and all(
                torch.equal(m, n) for m, n in zip(a.watched.draws, b.watched.draws, strict=True)
            )
            fresh = any(a.states[name] != b.states[name] for name in self.sources if name in a.states)
            if fresh or not same:
                # it draws anew; that these few passes agree may be luck
                return "noisy" if 0 < spread <= ROUNDING else "stochastic"
            return "re-seeded"
        return "noisy" if 0 < spread <= ROUNDING else "deterministic"

    @cached_property
    def stated(self) -> float | None:
        """How far the mean answer that the model states lies from that of its draws, squared, over the variance of those.

        None where it states none as `expected_log_probabilities`.
        """
        expected = getattr(self.model, "expected_log_probabilities", None)
        if expected is None:
            return None
        answers = torch.stack([self.logits(self.x, "the same images again") for _ in range(MEANS)])
        draws = answers if self.output == "probabilities" else answers.softmax(2)
        self.forwards += len(self.x)
        stated = self._formed(ask(expected, self.x), len(self.x), "its expectation").exp()
        chance = draws.var(0) / MEANS
        return float((draws.mean(0) - stated).square().mean() / chance.mean().clamp_min(ROUNDING**2))

    @cached_property
    def settled(self) -> bool:
        """Whether passes can be compared with each other at all."""
        return self.randomness != "stochastic" and not self.drifts

    @cached_property
    def output(self) -> Literal["logits", "probabilities", "log-probabilities"]:
        """What kind of numbers it returns."""
        values = self.reference
        if float(values.logsumexp(1).abs().max()) < 1e-3:
            return "log-probabilities"
        sums = values.sum(1)
        spread = float(sums.max() - sums.min())
        constant = spread < 1e-2 * float(sums.mean()) and spread < 0.1 * float(values.std())
        inside = float(values.min()) >= -1e-3 and float(values.max()) <= 1 + 1e-3
        return "probabilities" if inside and constant else "logits"

    @cached_property
    def with_gradient(self) -> tuple[Logits | VoidRun, Watched]:
        """The logits when a gradient with respect to the images is wanted, or what was raised; and what was seen."""
        what = "when a gradient is wanted"
        with torch.enable_grad(), watching(self.model) as watched:
            try:
                returned = self._ask(self.x.clone().requires_grad_(True), what)
                watched.escaped |= watched.hidden_in(returned)
                return self._formed(returned, len(self.x), what), watched
            except VoidRun as error:
                return error, watched

    @cached_property
    def nearby(self) -> tuple[Logits, Logits]:
        """The logits of the images after two draws of a quarter of a grey level each."""
        rng = Rng("contract", "quarter")
        moved = [(self.x + QUARTER * (2 * rng.at(i).uniform(self.x) - 1)).clamp(0, 1) for i in range(2)]
        a, b = (self.logits(some, "images moved by a quarter of a grey level") for some in moved)
        return a, b

    def confirmed(
        self, measure: Callable[[Subject], dict[str, float]], threshold: float
    ) -> dict[str, float] | None:
        """What was measured, where it exceeds the threshold in float32, and in float64 too if the model runs in it.

        Rounding alone can pass an image on to another expert; in float64 that is as good as impossible.
        """
        seen = measure(self)
        if max(seen.values()) > threshold:
            with suppress(Exception):
                # a stranger's model may refuse to be copied or to run in float64, in any way
                twin = Subject(deepcopy(self.model).double(), self.x.double(), self.y, self.classes)
                seen = measure(twin)
                self.forwards += twin.forwards
        return seen if max(seen.values()) > threshold else None


# ---------------------------------------------------------------------------------------------------------------------
# a function at all


@check(
    "train-mode",
    rule="M1",
    severity="blocks",
    advice="call model.eval(), let train() and eval() reach every part, and do not change the mode in forward",
)
def train_mode(s: Subject, threshold: float) -> Evidence:
    """A part is in training mode after `.eval()`, or a forward pass updates BatchNorm statistics."""
    if s.training:
        return f"in training mode although eval() was called: {listed(s.training)}"
    if s.refused is not None:
        return None
    again = in_training(s.model)
    if again:
        return f"a forward pass puts into training mode: {listed(again)}"
    updated = [name for name in s.changed if _is_statistic(s.model, name)]
    return f"a forward pass changes the statistics {listed(updated)}" if updated else None


@check(
    "model-crash",
    rule="M2",
    severity="blocks",
    advice="make forward(x) run for images of this dataset in [0,1]",
)
def model_crash(s: Subject, threshold: float) -> Evidence:
    """The forward pass raises something."""
    return _if_code(s.refused, "model-crash", "void")


@check(
    "signature",
    rule="M2",
    severity="blocks",
    advice="return one float tensor (images, classes) from forward(x)",
)
def signature(s: Subject, threshold: float) -> Evidence:
    """The model returns anything but a float tensor with one logit for each class."""
    return _if_code(s.refused, "signature")


@check(
    "non-finite",
    rule="M11",
    severity="blocks",
    advice="find the division, logarithm or overflow; an attack may go to any image in [0,1]",
)
def non_finite(s: Subject, threshold: float) -> Evidence:
    """A logit is NaN or infinite on images of the dataset, on noise, or on images of one grey."""
    if s.refused is not None:
        return _if_code(s.refused, "non-finite")
    greys = torch.stack([torch.full_like(s.x[0], grey) for grey in (0, 0.5, 1)])
    s.logits(Rng("contract", "noise").uniform(s.x), "images of uniform noise")
    s.logits(greys, "images of all 0, all 0.5 and all 1")
    return None


@check(
    "mutates-input",
    rule="M2",
    severity="blocks",
    advice="work on a copy; no in-place operation on x in forward",
)
def mutates_input(s: Subject, threshold: float) -> Evidence:
    """The forward pass changes the images that it is given."""
    return "the images are not the same after the forward pass" if s.mutated else None


# ---------------------------------------------------------------------------------------------------------------------
# one answer to one image


@check(
    "stateful",
    rule="M7",
    severity="blocks",
    advice="let forward depend on x and fixed weights alone, and change neither parameters nor buffers",
)
def stateful(s: Subject, threshold: float) -> Evidence:
    """A forward pass changes parameters or buffers, or answers depend on the calls before."""
    changed = [name for name in s.changed if not _is_statistic(s.model, name)]
    if changed:
        return f"a forward pass changes {listed(changed)}"
    if s.drifts:
        moved = s.differ(s.answers[0], s.answers[-1])
        return f"{REPEATS} calls with the same images drift apart by {moved:.2g} of the logits' size, and no chance is involved"
    return None


@check(
    "random-forward",
    rule="M6",
    severity="warns",
    advice="attack with expectation over transformation, and score the mean over at least 100 fresh draws",
)
def random_forward(s: Subject, threshold: float) -> Evidence:
    """Two passes over the same images differ, or random numbers are drawn or seeded in a pass."""
    if s.randomness == "deterministic":
        return None
    flips = float((s.answers.argmax(2) != s.answers[0].argmax(1)).any(0).float().mean())
    source = (
        f"it draws from or seeds {listed(s.sources)}" if s.sources else "no generator that could be watched"
    )
    evidence = (
        f"{s.randomness}: {REPEATS} passes over the same images differ by {s.spread:.2g} of the logits' size, "
        f"{100 * flips:.1f} % of the answers change; {source}"
    )
    if s.stated is not None:
        off = f"its exact expectation is off the mean over {MEANS} draws by {s.stated:.2g} times what chance explains"
        # what is attacked is then no sample of the model but all of it, and what is scored are fresh draws
        return (f"{evidence}; {off}", "informs") if s.stated < CHANCE else f"{evidence}; {off}"
    # without a generator it is the machine that rounds differently, which no attack can hide behind
    return (evidence, "informs") if s.randomness == "noisy" and not s.sources else evidence


@check(
    "batch-dependent",
    rule="M8",
    severity="blocks",
    threshold=1e-4,
    advice="judge every image alone: no statistics of the batch, no capacity limits over it",
)
def batch_dependent(s: Subject, threshold: float) -> Evidence:
    """An image's logits depend on the batch it sits in."""
    if s.sources or not s.settled:
        return None
    return _moved(s.confirmed(_batches, threshold))


def _batches(s: Subject) -> dict[str, float]:
    """How far the logits move with the batch, by kind of batch."""
    reference, n, few = s.reference, len(s.x), min(len(s.x), 4)
    # behind a stranger, so that one image alone has company too
    reverse = s.logits(torch.cat([1 - s.x[:1], s.x.flip(0)]), "a batch in reverse order")[1:].flip(0)
    halves = [s.logits(half, "half a batch") for half in torch.split(s.x, (n + 1) // 2)]
    alone = [s.logits(s.x[i : i + 1], "one image alone") for i in range(few)]
    return {
        "in reverse order": s.differ(reverse, reference),
        "in half batches": s.differ(torch.cat(halves), reference),
        "alone": s.differ(torch.cat(alone), reference[:few]),
    }


def _moved(seen: dict[str, float] | None) -> Evidence:
    if seen is None:
        return None
    far = ", ".join(f"{much:.2g} {how}" for how, much in seen.items())
    return f"logits change by {far}, in units of their size"


@check(
    "grad-dependent",
    rule="M8",
    severity="blocks",
    threshold=1e-4,
    advice="answer alike whether or not a gradient is wanted; nothing may ask for x.requires_grad",
)
def grad_dependent(s: Subject, threshold: float) -> Evidence:
    """The logits are others when a gradient is wanted, or there are none."""
    if not s.settled:
        return None
    logits = s.with_gradient[0]
    if isinstance(logits, VoidRun):
        return str(logits)
    moved = s.differ(logits, s.reference)
    return (
        f"logits change by {moved:.2g} of their size when a gradient is wanted" if moved > threshold else None
    )


@check(
    "layout-dependent",
    rule="M10",
    severity="blocks",
    threshold=1e-4,
    advice="use reshape in place of view, and nothing that depends on strides",
)
def layout_dependent(s: Subject, threshold: float) -> Evidence:
    """The same pixels laid out otherwise in memory give other logits, or an error."""
    if s.sources or not s.settled:
        return None
    return _moved(s.confirmed(_layouts, threshold))


def _layouts(s: Subject) -> dict[str, float]:
    """How far the logits move with the layout of the images in memory."""
    same = {
        "for channels-last images": s.x.contiguous(memory_format=torch.channels_last),
        "for images transposed in memory": s.x.transpose(2, 3).contiguous().transpose(2, 3),
    }
    return {how: s.differ(s.logits(x, how), s.reference) for how, x in same.items()}


# ---------------------------------------------------------------------------------------------------------------------
# logits that an attack can work with


@check(
    "not-logits",
    rule="M5",
    severity="warns",
    advice="return the numbers before the softmax: cross-entropy of probabilities has no gradient worth the name",
)
def not_logits(s: Subject, threshold: float) -> Evidence:
    """The outputs are probabilities or one-hot."""
    values = s.reference
    if bool(((values != 0).sum(1) == 1).all()) and bool((values.amax(1) > 0).all()):
        return "every row is one-hot: a label, without anything an attack could follow", "blocks"
    if s.output != "probabilities":
        return None
    sums = values.sum(1)
    return (
        f"outputs lie in [{float(values.min()):.3g}, {float(values.max()):.3g}] "
        f"and sum to {float(sums.min()):.4g} … {float(sums.max()):.4g} in every row"
    )


@check(
    "plateau",
    rule="M14",
    severity="warns",
    threshold=0.01,
    advice="attack the model without its rounding (BPDA), and without gradients (Square)",
)
def plateau(s: Subject, threshold: float) -> Evidence:
    """Moving pixels by a quarter of a grey level leaves the logits of more than 1 % of the images exactly as they are."""
    seen = s.confirmed(_still, threshold) if s.settled else None
    if seen is None:
        return None
    return f"the logits of {100 * seen['share']:.1f} % of the images do not change at all under noise of ±0.25/255"


def _still(s: Subject) -> dict[str, float]:
    """The share of the images whose logits stay as they are when the pixels move."""
    a, b = s.nearby
    return {"share": float(((a == s.reference).all(1) | (a == b).all(1)).double().mean())}


@check(
    "off-grid",
    rule="M14",
    severity="warns",
    threshold=0.1,
    advice="find out what the model does to images that were not stored in 8 bits; attacks see nothing else",
)
def off_grid(s: Subject, threshold: float) -> Evidence:
    """Leaving the grid of stored pixels, or the stored image, matters ten times as much as moving as far off it."""
    if not s.settled:
        return None
    a, b = s.nearby
    leaving = torch.minimum(*((one - s.reference).abs().amax(1) for one in (a, b)))
    moving = (a - b).abs().amax(1).clamp_min(ROUNDING * s.scale)
    share = float((leaving > 10 * moving).double().mean())
    if share <= threshold:
        return None
    return f"for {100 * share:.1f} % of the images, noise of ±0.25/255 changes the logits over ten times as much as exchanging it for other noise"


@check(
    "hidden-choice",
    rule="E1",
    severity="warns",
    advice="attack what is chosen from as well: declare the mixture (gate, all_outputs, selected), or give adaptive_attacks",
)
def hidden_choice(s: Subject, threshold: float) -> Evidence:
    """The logits depend on the images by operations that a gradient cannot see."""
    if s.adaptive:
        return None
    escaped = s.with_gradient[1].escaped
    return f"the logits are computed from the images by {listed(sorted(escaped))}" if escaped else None


@check(
    "test-time-optimisation",
    rule="M9",
    severity="warns",
    advice="attack through the optimisation, and around it: a defense that adapts needs an attack that knows",
)
def test_time_optimisation(s: Subject, threshold: float) -> Evidence:
    """The forward pass takes gradients itself."""
    seen = s.first.watched.optimises | s.with_gradient[1].optimises
    return f"the forward pass calls {listed(sorted(seen))}" if seen else None


@check(
    "looped-forward",
    rule="M9",
    severity="warns",
    threshold=1,
    advice="attack through every iteration; vanishing or exploding gradients are no robustness",
)
def looped_forward(s: Subject, threshold: float) -> Evidence:
    """A layer with parameters is called more than once in one forward pass."""
    passes = s.first.watched.passes
    return f"one layer is called {passes} times in one forward pass" if passes > threshold else None


@check(
    "constant-prediction",
    rule="S8",
    severity="blocks",
    threshold=32,
    advice="train the model, or find what is wrong with its input; a constant answer is no classifier",
)
def constant_prediction(s: Subject, threshold: float) -> Evidence:
    """At least 32 images of several classes all get one and the same class."""
    predicted = s.reference.argmax(1)
    if len(s.x) < threshold or len(set(s.y.tolist())) < 2 or len(set(predicted.tolist())) > 1:
        return None
    return f"all {len(s.x)} images are of class {int(predicted[0])} to it, their labels of {len(set(s.y.tolist()))} classes"


@check(
    "classes",
    rule="M16",
    severity="informs",
    threshold=4,
    advice="nothing to do; read the columns accordingly",
)
def few_classes(s: Subject, threshold: float) -> Evidence:
    """There are fewer than four classes."""
    if s.classes >= threshold:
        return None
    left = "cross-entropy and margin alone" if s.classes < 3 else "the untargeted DLR loss, without targets"
    return f"{s.classes} classes: the targeted DLR loss needs 4 and DLR 3, so attacks use {left}"


@check(
    "memorised-images",
    rule="M2",
    severity="blocks",
    threshold=4,
    advice="a model that carries the test images cannot be tested on them; train it on others",
)
def memorised_images(s: Subject, threshold: float) -> Evidence:
    """At least four of the test images lie among its parameters and buffers, as they are."""
    images = s.x.flatten(1)
    size = images.shape[1]
    for name, tensor in (*s.model.named_parameters(), *s.model.named_buffers()):
        rows = tensor.detach().numel() // size
        if tensor.is_floating_point() and rows >= threshold and rows * size == tensor.numel():
            near = torch.cdist(images.float(), tensor.detach().reshape(rows, size).float()).amin(1)
            found = int((near < 1e-3 * size**0.5).sum())
            if found >= threshold:
                return f"{found} of {len(images)} test images lie in {name}"
    return None


@check(
    "mixture-mismatch",
    rule="E1",
    severity="blocks",
    threshold=1e-3,
    advice="gate, selected and all_outputs must be those of the model that is deployed, or the adaptive attacks are on another",
)
def mixture_mismatch(s: Subject, threshold: float) -> Evidence:
    """A mixture answers otherwise than its gate and its experts say."""
    mixture = as_mixture(s.model)
    if mixture is None or not s.settled or s.sources:
        return None
    said, outputs = s.logits(s.x, "the images"), mixture.all_outputs(s.x)
    for k in range(mixture.experts_count):
        alone, among = output_of(mixture, s.x, k), outputs[:, k]
        if s.differ(alone, among) > threshold and not torch.equal(alone.argmax(1), among.argmax(1)):
            return f"asked alone, expert {k} answers otherwise than among the others"
    told = mixed(mixture, deployed_weights(mixture, s.x), outputs).to(said.dtype)
    # what a softmax does not see may differ
    gap = s.differ(said.log_softmax(1), told.log_softmax(1))
    if gap <= threshold or torch.equal(said.argmax(1), told.argmax(1)):
        return None
    wrong = int((said.argmax(1) != told.argmax(1)).sum())
    return f"it answers {wrong} of {len(s.x)} images otherwise than its gate and its experts say"


BASIC: tuple[Check[Subject], ...] = (model_crash, signature, train_mode, non_finite)
FURTHER: tuple[Check[Subject], ...] = (
    stateful,
    random_forward,
    batch_dependent,
    grad_dependent,
    layout_dependent,
    not_logits,
    plateau,
    off_grid,
    hidden_choice,
    test_time_optimisation,
    looped_forward,
    constant_prediction,
    memorised_images,
    mixture_mismatch,
    few_classes,
    # last, since every pass is looked at for it
    mutates_input,
)
CHECKS = BASIC + FURTHER


def _one(one: Check[Subject], subject: Subject) -> Finding | None:
    """What a check finds; a model that fails under its questions has failed it."""
    try:
        return one(subject)
    except VoidRun as error:
        return Finding(code=one.code, severity="blocks", evidence=str(error), advice=one.advice)


def described(logits: object) -> str:
    """What was returned, in words."""
    if not isinstance(logits, Tensor):
        return f"a {type(logits).__name__}"
    return f"{tuple(logits.shape)} {str(logits.dtype).removeprefix('torch.')}"


def in_training(model: nn.Module) -> list[str]:
    """The parts that are in training mode."""
    return [name or "the model itself" for name, part in model.named_modules() if part.training]


def listed(names: list[str], most: int = 4) -> str:
    """The first few names."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _if_code(error: VoidRun | None, *codes: str) -> str | None:
    return str(error) if error is not None and error.code in codes else None


def _is_statistic(model: nn.Module, name: str) -> bool:
    part = model.get_submodule(name.rpartition(".")[0])
    return isinstance(part, nn.modules.batchnorm._NormBase)
