"""What this machine does: its matrix rate, how much of that each model reaches, and how long things will take.

A multiply-add is two floating-point operations, and `bench.passes` counts a forward pass's. The backward pass to the images
is about the same amount again, a product of the same size for every layer (no weight needs a gradient), so that a
gradient is four operations for each multiply-add. The measure is a product of two large square matrices. Convolutions may
do with fewer multiplications than are counted (Winograd's do), so that a share above one is no error.

Every network is as built, untrained: a trained one is as fast. Of several runs the fastest counts, since whatever else a
machine does only ever adds. Nothing is trained and nothing is written.
"""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from torch import nn

from bench import protocol as protocols
from bench.arithmetic import exact_arithmetic, multiplies_in_tf32, tf32
from bench.attacks.autoattack import FULL
from bench.attacks.gradient import input_gradient
from bench.attacks.losses import LOSSES
from bench.attacks.mixture import runs
from bench.audit.contract import is_random
from bench.data import Dataset, Split
from bench.draws import DRAWS
from bench.errors import BenchError, DataError, VoidRun
from bench.evaluate import PIXELS_AT_ONCE
from bench.fast import Fast, Precision, fast, fast_expectation
from bench.judge import Cost, Judge, before_any_attack
from bench.moe import RoutedModel, as_mixture
from bench.passes import one_pass
from bench.pipeline import columns_of, explain_training, training_told
from bench.plan import Program, plan
from bench.progress import duration
from bench.provenance import size
from bench.rng import Rng
from bench.session import Job, Say, Session
from bench.types import Images, Labels, Model
from bench.weights import build, naming_defense, stages

#: images of datasets whose pixels are not read, training and test; how fast they pass does not depend on what they show
NOISE = {
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "svhn": (73_257, 26_032),
    "tiny-imagenet": (100_000, 10_000),
}
#: the side of the matrices that are multiplied
SIDE = {"cpu": 2048, "cuda": 8192}
#: seconds for which a piece of work is repeated
ENOUGH = 0.5
#: images of the first batch that is tried on a CPU
FEW = 8
#: operations of a forward pass and of a gradient, for each multiply-add of the forward pass
FORWARD, GRADIENT = 2, 4


#: what is timed, with images and labels
Work = Callable[[Images, Labels], object]


@dataclass(frozen=True)
class Machine:
    """What the work runs on."""

    device: str
    name: str
    """of the GPU or the CPU"""
    threads: int
    """that torch uses on the CPU"""
    torch: str
    flops: dict[str, float]
    """floating-point operations a second in a product of matrices, by precision"""


@dataclass(frozen=True)
class Rate:
    """How fast a model does one thing."""

    what: str
    """`forward`, `gradient` (of the model itself) or `fast gradient` (of the copy that attacks follow)"""
    how: str
    """what was done to the model"""
    precision: Precision
    images_per_second: float
    flops: float
    """operations a second"""
    share: float
    """of the machine's, in the same precision"""


@dataclass(frozen=True)
class Span:
    """Seconds that a protocol takes where every clean image is right: all fall at the first start, or none ever does.

    A trajectory that comes to rest ends sooner, and an image that is wrong as it stands costs nothing.
    """

    protocol: str
    at_least: float
    at_most: float


@dataclass(frozen=True)
class Speed:
    """How fast a defense's network is on images of a dataset."""

    defense: str
    recipe: str
    """whose network it is"""
    parameters: int
    multiply_adds: int
    """of one image's forward pass"""
    batch: int
    """the most images that were passed at once"""
    rates: list[Rate]
    samples: int
    """test images that the spans are told for"""
    protocols: list[Span]


@dataclass(frozen=True)
class Seconds:
    """What one image costs: to judge it, and a gradient of the model itself and of the copy that attacks follow."""

    judged: float
    plain: float
    quick: float


def measure(
    session: Session,
    settings: Mapping[str, object] | None = None,
    *,
    every_recipe: bool = False,
    samples: int | None = None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """The machine, and of each defense its speed, its protocols' times and its recipes' training times, as JSON has them.

    Args:
        session: what was asked; all built-in protocols are told of, whichever it names.
        settings: changes to a recipe's settings, those that the session's jobs have.
        every_recipe: whether every training of a defense is told of, not only that of the session's recipe.
        samples: test images that protocols' times are told for, any number; the whole test set by default.
        say: told of each part in words as soon as it is known.

    Raises:
        VoidRun: a model cannot be run.
        DataError: the images are to be read, and cannot be.
    """
    machine = this_machine(session.device)
    say(_machine_told(machine))
    if session.data.name in NOISE:
        session = dataclasses.replace(session, data=noise(session.data, *NOISE[session.data.name]))
    n = len(session.data.test) if samples is None else samples
    models = []
    for job in session.jobs:
        speed = of_defense(session, job, machine, n)
        say(f"\n{_told(speed, session.data.name)}")
        training: list[dict[str, Any]] = []
        if _trains(session, job):
            recipe = None if every_recipe else job.recipe
            training = explain_training(dataclasses.replace(session, jobs=(job,)), recipe, settings)
            say(f"training:\n{training_told(training)}")
        models.append({**dataclasses.asdict(speed), "training": training})
    return {"machine": dataclasses.asdict(machine), "dataset": session.data.name, "models": models}


def _trains(session: Session, job: Job) -> bool:
    """Whether there is something to train, and there are images to train on."""
    try:
        return len(session.data.train) > 0 and bool(stages(job, session.data))
    except DataError:
        return False


def noise(data: Dataset, train: int, test: int) -> Dataset:
    """The dataset with noise for pixels, and with so many images; no file is read."""
    c, h, w = data.shape

    def read(which: str) -> Split:
        n = train if which == "train" else test
        stream = np.frombuffer(np.random.default_rng(0).bytes(n + h * w * c), dtype=np.uint8)
        # every window of the stream is an image, so that 100,000 of them need no memory of their own
        images = as_strided(stream, (n, h, w, c), (1, w * c, c, 1), writeable=False)
        return Split(images, np.arange(n) % len(data.classes))

    return dataclasses.replace(data, read=read)


def this_machine(device: torch.device) -> Machine:
    """The device and its matrix rate."""
    return Machine(
        device=str(device),
        name=torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        flops={precision: matrix_rate(device, precision) for precision in precisions(device)},
    )


def precisions(device: torch.device) -> list[Precision]:
    """What a device multiplies in."""
    return ["fp32", "tf32", "bf16"] if multiplies_in_tf32(device) else ["fp32", "bf16"]


def matrix_rate(device: torch.device, precision: Precision) -> float:
    """Operations a second in a product of two large square matrices."""
    side = SIDE[device.type]
    a = Rng("matrix").normal(torch.empty(side, side, device=device))
    a = a.bfloat16() if precision == "bf16" else a
    with tf32() if precision == "tf32" else exact_arithmetic():
        return 2 * side**3 / fastest(lambda: a @ a, device)


def fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several runs, after one that chooses programs and takes memory."""

    def once() -> float:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    once()
    times: list[float] = []
    while sum(times) < ENOUGH:
        times.append(once())
    return min(times)


def images_per_second(work: Work, x: Images, y: Labels) -> float:
    """How many of these images the work does in a second: all at once, or on a CPU as many as take half a second."""
    n = len(x) if x.device.type == "cuda" else min(FEW, len(x))
    while True:
        some, labels = x[:n], y[:n]
        took = fastest(lambda: work(some, labels), x.device)  # noqa: B023 (called before they change)
        if n == len(x) or took > ENOUGH:
            return n / took
        n = min(4 * n, len(x))


def of_defense(session: Session, job: Job, machine: Machine, n: int) -> Speed:
    """How fast the network of a defense is, and what the protocols take with it on `n` images.

    Raises:
        VoidRun: it cannot be run.
    """
    data = session.data
    model = build(job, data, 0).to(session.device).eval().requires_grad_(False)
    batch = session.batch_size
    if session.device.type == "cpu":
        # as many as the evaluator passes at once
        batch = min(batch, max(1, PIXELS_AT_ONCE // (data.shape[1] * data.shape[2])))
    x, y = data.test.batch(slice(0, batch), session.device)
    judge = Judge(model, len(data.classes), Cost())
    try:
        with naming_defense(job), exact_arithmetic():
            with before_any_attack():
                judge(x[:FEW], x[:FEW], None)
                random = is_random(model, x[:FEW], y[:FEW], len(data.classes))
            multiply_adds = round(one_pass(model, x[:FEW]))
            rates = _rates(judge, x, y, session.precision, random, multiply_adds, machine)
    except BenchError:
        raise
    except Exception as error:
        # a stranger's model was run forward and backward here, and may raise anything
        raise VoidRun(
            f"{job.name}: this model cannot be measured: {type(error).__name__}: {error}", code="model-crash"
        ) from error
    forward, plain, *copies = rates
    quick = next(rate for rate in copies if rate.precision == ("fp32" if random else session.precision))
    judged, own, followed = (1 / rate.images_per_second for rate in (forward, plain, quick))
    cost = Seconds(judged * (DRAWS if random else 1), own, followed)
    return Speed(
        defense=job.name,
        recipe=job.recipe,
        parameters=size(model),
        multiply_adds=multiply_adds,
        batch=len(x),
        rates=rates,
        samples=n,
        protocols=[_span(session, model, name, random, cost, n) for name in protocols.names()],
    )


def _rates(
    judge: Judge,
    x: Images,
    y: Labels,
    precision: Precision,
    random: bool,
    multiply_adds: int,
    machine: Machine,
) -> list[Rate]:
    """A forward pass, a gradient, and a gradient of the copy that attacks follow.

    The last alone is told in the precision that was asked for, on a GPU of several in each of them.
    """
    model = judge.model
    told = precisions(x.device) if multiplies_in_tf32(x.device) else [precision]
    copies: dict[Precision, Fast] = (
        {"fp32": fast_expectation(model, x[:FEW], y[:FEW])}
        if random
        else {one: fast(model, x[:FEW], y[:FEW], one) for one in told}
    )

    def rate(what: str, how: str, precision: Precision, operations: int, work: Work) -> Rate:
        speed = images_per_second(work, x, y)
        flops = operations * multiply_adds * speed
        return Rate(what, how, precision, speed, flops, flops / machine.flops[precision])

    return [
        rate("forward", "as it is", "fp32", FORWARD, lambda x, y: judge(x, x, None)),
        rate("gradient", "as it is", "fp32", GRADIENT, _gradient(model)),
        *(rate("fast gradient", c.about, one, GRADIENT, _gradient(c.model)) for one, c in copies.items()),
    ]


def _gradient(model: Model) -> Work:
    return lambda x, y: input_gradient(model, x, y, LOSSES["ce"])


def _span(session: Session, model: nn.Module, name: str, random: bool, cost: Seconds, n: int) -> Span:
    """The time of a protocol on `n` images that are all classified as they should be."""
    protocol = protocols.load(name)
    programs = plan(columns_of(protocol, session, model), random=random)
    mixture = as_mixture(model)
    low, high = cost.judged, 0.0
    for program in programs:
        gradients, forwards = most(program, mixture, len(session.data.classes))
        # attacks on a mixture's parts follow the model itself
        gradient = cost.plain if program.first.family == "mixture" else cost.quick
        high += gradients * gradient + forwards * cost.judged
        if protocol.success == "last" and program.first.family in ("fgsm", "pgd"):
            low += program.gradients()[0] * gradient + program.forwards()[0] * cost.judged
    return Span(name, n * low, n * high)


def most(program: Program, mixture: RoutedModel | None, classes: int) -> tuple[int, int]:
    """Gradients and forward passes of an image that nothing breaks; what a library's own attack needs is not counted."""
    first, judged = program.first, program.forwards()[1]
    if first.family == "mixture" and mixture is not None:
        attack = next((column.attack for column in program.columns if not column.diagnostic), None)
        # the gate's own attack is one run of one aim; a certificate is about one pass
        aims = [1] if attack is None else [len(run.aims) for run in runs(attack, mixture)]
        # every aim's last images are shown to the mixture, and to the expert they are against
        shown = mixture.experts_count + 2 * first.restarts * sum(aims)
        return first.restarts * len(aims) * first.steps * first.eot, judged + shown
    if first.family != "autoattack":
        return program.gradients()[1], judged
    gradients = forwards = 0
    for part in program.columns[:-1]:
        set_to = {**FULL, **part.settings}
        targets = min(set_to["targets"], classes - 1) if part.attack.endswith("-t") else 1
        tries = set_to["restarts"] * targets
        # each asks about its images a few times before it begins and when it has ended
        forwards += 4 * tries
        if part.attack == "square":
            forwards += set_to["queries"]
        elif part.attack.startswith("apgd"):
            gradients += tries * (set_to["steps"] + 1) * set_to["eot"]
        else:
            # FAB without a target follows every class at each step
            gradients += tries * set_to["steps"] * (1 if part.attack == "fab-t" else classes)
            forwards += tries * set_to["steps"]
    return gradients, forwards + judged


def _machine_told(machine: Machine) -> str:
    rates = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in machine.flops.items())
    threads = f", {machine.threads} thread(s)" if machine.device == "cpu" else ""
    return f"{machine.device}: {machine.name}{threads}, torch {machine.torch}\nproduct of matrices: {rates}"


def _told(speed: Speed, dataset: str) -> str:
    lines = [
        f"{speed.defense} ({speed.recipe}) on {dataset}: {speed.parameters:,} parameters, "
        f"{speed.multiply_adds:,} multiply-adds an image, at most {speed.batch} images at once",
        f"  {'':14}{'images/s':>12} {'GFLOP/s':>10} {'of matrices':>12}",
    ]
    lines += [
        f"  {r.what:14}{r.images_per_second:12,.1f} {r.flops / 1e9:10,.1f} {100 * r.share:10.1f} %  {r.precision}, {r.how}"
        for r in speed.rates
    ]
    if any(rate.share > 1 for rate in speed.rates):
        lines.append(
            "  above 100 %: convolutions that need fewer multiplications than are counted, such as Winograd's"
        )
    lines.append(f"protocols, {speed.samples:,} test images:")
    lines += [
        f"  {span.protocol:14} at least {duration(span.at_least)}, at most {duration(span.at_most)}"
        for span in speed.protocols
    ]
    return "\n".join(lines)


def _cpu() -> str:
    """What the CPU calls itself, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
