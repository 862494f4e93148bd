"""A trained network, and what an attack makes of it: what figures of one defense share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from bench.arithmetic import exact_arithmetic
from bench.attacks.pgd import pgd
from bench.errors import UsageError
from bench.provenance import code_hash
from bench.rng import Rng
from bench.session import Job, Session
from bench.threat import Linf
from bench.types import Images, Labels
from bench.weights import FILES, Weights, _training_folder, build, stages, weigh

#: of PGD, in steps of a quarter of the radius from a uniform start; of a random model each step is the mean of so many passes
STEPS, RANDOM_EOT = 50, 20


@dataclass(frozen=True)
class Attacked:
    """The first test images, and what PGD at this radius made of them, on the CPU."""

    x: Images
    x_adv: Images
    y: Labels
    eps: float

    @property
    def attack(self) -> str:
        """What was done, as a figure says it."""
        return f"PGD-{STEPS}, eps {self.eps:g}"


def only(session: Session, what: str) -> Job:
    """The one defense that a figure is of.

    Raises:
        UsageError: there are several.
    """
    if len(session.jobs) != 1:
        raise UsageError(f"{what} drawn of one defense, not of {len(session.jobs)}")
    return session.jobs[0]


def images_of(session: Session, default: int, most: int) -> int:
    """How many images are shown.

    Raises:
        UsageError: more than fit.
    """
    samples = min(default, len(session.data.test)) if session.samples is None else session.samples
    if samples > most:
        raise UsageError(f"{samples} images are too many for a figure; --samples must be at most {most}")
    return samples


def as_trained(session: Session, job: Job) -> Weights:
    """The network with the weights that there are, of its checkpoint or of an earlier training; none are made.

    Raises:
        UsageError: it was not trained yet.
    """
    model = build(job, session.data, session.seeds[0])
    if session.checkpoint is None and stages(job, session.data):
        folder = _training_folder(session, job, session.seeds[0], code_hash(job.kind, model))
        # the best network is the last that a training writes
        if not (folder / FILES["best"]).is_file():
            raise UsageError(
                f"{job.name!r} ({job.recipe}, seed {session.seeds[0]}) was not trained with these settings in {str(session.results)!r}; "
                f"`bench train --defense {job.name} --dataset {session.data.name}` first, with the same options, or give --checkpoint"
            )
    return weigh(session, job, session.seeds[0])


def ready(session: Session, job: Job) -> nn.Module:
    """The trained network on its device, in eval mode, its parameters at rest."""
    return as_trained(session, job).model.to(session.device).eval().requires_grad_(False)


def attacked(session: Session, job: Job, model: nn.Module, samples: int) -> Attacked:
    """The first test images and what PGD against the deployed model makes of them, batch by batch."""
    eps = session.eps or session.data.eps
    eot = RANDOM_EOT if job.kind.random else 1
    parts = []
    for first in range(0, samples, session.batch_size):
        last = min(first + session.batch_size, samples)
        x, y = session.data.test.batch(slice(first, last), session.device)
        rng = Rng(session.seeds[0], "pgd", 0, images=list(range(first, last)))
        with exact_arithmetic():
            x_adv = pgd(model, x, y, Linf(eps), rng=rng, steps=STEPS, eot=eot)
        parts.append((x.cpu(), x_adv.cpu(), y.cpu()))
    clean, adversarial, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return Attacked(clean, adversarial, labels, eps)
