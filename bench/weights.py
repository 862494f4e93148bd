"""A defense's network with its weights: from a checkpoint, from an earlier training, or trained now."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pydantic
import torch
from torch import nn

import bench
from bench import checkpoint as checkpoints
from bench import processes, registry
from bench import record as records
from bench.claim import claim
from bench.config import as_json, complaint
from bench.data import Dataset
from bench.defense import Stage
from bench.errors import AttackCrash, BenchError, CheckpointError, Interrupted, UsageError, VoidRun
from bench.fast import Precision
from bench.judge import Cost, Judge, before_any_attack
from bench.progress import duration
from bench.provenance import code_hash, size
from bench.record import Training
from bench.session import Job, Session
from bench.train import Trained, estimate, initial, train

#: which of the two networks of a training: of the epoch that did best on held-out images, or of the last one
Which = Literal["best", "last"]
FILES: dict[Which, str] = {"best": "model.safetensors", "last": "last.safetensors"}

#: a training that is longer is announced, and asked about where there is somebody to ask
LONG = 3600.0


@dataclasses.dataclass
class Weights:
    """A network with its weights, and where they come from."""

    model: nn.Module
    training: Training
    code: str
    """hash of the files that define defense and network"""
    path: Path | None = None
    """where they lie, if they were trained here"""
    findings: tuple[str, ...] = ()
    loaded: checkpoints.Loaded | None = None
    confirmed: bool = False
    """whether the accuracy that a checkpoint states was found on these images"""


def weigh(session: Session, job: Job, seed: int, *, together: bool = False) -> Weights:
    """The network of a job with its weights: from the checkpoint given, from an earlier training, or trained now.

    Which of a training's two networks it is, `session.weights` says. What is trained now, is trained by all processes of this
    command if they are `together`, and else by this one.

    Raises:
        CheckpointError: an earlier training kept the best epoch alone, and the last one is asked for.
    """
    defense, data = job.defense, session.data
    model = build(job, data, seed).to(session.device)
    code = code_hash(job.kind, model)
    if session.checkpoint is not None:
        loaded = checkpoints.load(session.checkpoint, model, defense=defense, data=data)
        for note in loaded.notes:
            session.say(note)
        training = Training(source=session.checkpoint, parameters=size(model))
        return Weights(model, training, code, findings=loaded.notes, loaded=loaded)
    if not stages(job, data):
        return Weights(model, Training(source="as built", seed=seed, parameters=size(model)), code)
    folder = _training_folder(session, job, seed, code)
    path = folder / FILES[session.weights]
    if not path.is_file():
        if (folder / FILES["best"]).is_file():
            raise CheckpointError(
                f"{folder} keeps the best epoch alone; delete it to train again and keep the last"
            )
        if seed == session.seeds[0] and job in session.jobs:
            for later in session.jobs[session.jobs.index(job) :]:
                _try(session, later)
        with claim(session.results, folder, session.say, together=together):
            if together:
                # process 0 has the claim for all
                processes.barrier()
            # whoever was waited for may have trained it
            done = path.is_file()
            if not (processes.agreed(done) if together else done):
                _train(session, job, seed, folder, together)
        if together:
            processes.barrier()
            processes.seen(path)
    if (folder / FILES["best"]).is_file():
        # one that was killed after it had finished may have left it
        (folder / "state.pt").unlink(missing_ok=True)
    # a network just trained is read like one of yesterday's, so that both give the same outcomes, bit for bit
    checkpoints.load(str(path), model, defense=defense, data=data)
    return Weights(model, _training_of(path, model), code, path)


def untrained(session: Session, job: Job, seed: int) -> Path | None:
    """Where a network will lie that has yet to be trained; None where there is nothing to train, or it was done before."""
    if session.checkpoint is not None or not stages(job, session.data):
        return None
    code = code_hash(job.kind, build(job, session.data, seed))
    path = _training_folder(session, job, seed, code) / FILES[session.weights]
    return None if path.is_file() else path


def _train(session: Session, job: Job, seed: int, folder: Path, together: bool = False) -> None:
    """Trains a network into its folder."""
    writes = not together or processes.rank() == 0
    with charging(job):
        if writes:
            _announce(session, job)
        trained = train(
            job.defense,
            session.data,
            seed=seed,
            folder=folder,
            device=session.device,
            precision=precision_of(session, job),
            quiet=session.quiet,
            name=job.name,
            together=together,
            say=session.say,
        )
    if not writes:
        return
    # the best network is written last: a folder that has it is complete
    _save(folder, session, job, seed, trained, "last")
    _save(folder, session, job, seed, trained, "best")
    for row in (row for row in trained.history if row.get("collapsed")):
        session.say(
            f"{job.name}: its robustness collapsed in epoch {row['epoch']} of {row['stage']}: {100 * row['held_out']:.0f} % of the held-out images are left under PGD-10"
        )
    session.say(f"trained {job.name} in {duration(trained.seconds)}: {folder / FILES['best']}")


def _save(folder: Path, session: Session, job: Job, seed: int, trained: Trained, which: Which) -> None:
    """Writes one of the two networks of a training, with how it came about."""
    made = Training(
        source="trained",
        seed=seed,
        seconds=round(trained.seconds, 1),
        parameters=size(trained.model),
        stages=trained.history,
        weights=which,
        epoch=trained.epoch if which == "best" else trained.epochs,
        passes=trained.passes,
        forwards=trained.forwards,
        checks=trained.checks,
        multiply_adds=trained.multiply_adds,
    )
    checkpoints.save(
        folder / FILES[which],
        trained.model.state_dict() if which == "best" else trained.last,
        {
            "bench": bench.__version__,
            "defense": job.name,
            "dataset": session.data.name,
            "recipe": job.recipe,
            "config": json.dumps(as_json(job.config)),
            "training": made.model_dump_json(),
        },
    )


def build(job: Job, data: Dataset, seed: int) -> nn.Module:
    """The untrained network; what a stranger's build raises is one line."""
    try:
        with charging(job):
            model = initial(job.defense, data, seed)
    except BenchError:
        raise
    except Exception as error:
        # whatever a build raises for some dataset, it must be heard of in one line
        raise UsageError(
            f"{job.name!r} cannot be built for {data.name}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{job.name!r}: build must return an nn.Module, not a {type(model).__name__}")
    if any(nn.parameter.is_lazy(parameter) for parameter in model.parameters()):
        raise UsageError(f"{job.name!r} has lazy layers; give them the sizes that `data` tells")
    return model


def stages(job: Job, data: Dataset) -> Sequence[Stage]:
    """What is trained, in order."""
    with charging(job):
        return job.defense.stages(data)


@contextmanager
def charging(job: Job) -> Iterator[None]:
    """Charges what the code of a stranger's defense raises to its file and line; what ours raises is our bug."""
    try:
        yield
    except BenchError:
        raise
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"{job.name!r} runs out of memory; a smaller batch helps: --set batch_size=N"
        ) from error
    except Exception as error:
        written = getattr(job.kind, "function", job.kind)
        module = str(written.__module__)
        line = registry.line_of(error, module)
        if line is None or module.split(".")[0] in registry.PACKAGES:
            raise
        file = Path(getattr(sys.modules.get(module), "__file__", None) or module).name
        raise UsageError(
            f"{job.name!r} ({file}, line {line}) raises {type(error).__name__}: {error}"
        ) from error


def _try(session: Session, job: Job) -> None:
    """Builds a network and shows it two images.

    Raises:
        UsageError: it cannot be built, or its training is not what it must be.
        VoidRun: it does not give logits.
    """
    model = build(job, session.data, session.seeds[0]).to(session.device).eval()
    stages(job, session.data)
    x, _ = session.data.train.batch(slice(0, 2), session.device)
    with naming_defense(job), before_any_attack():
        Judge(model, len(session.data.classes), Cost())(x, x, None)


def _announce(session: Session, job: Job) -> None:
    """Says that a training will take long, and asks whether it shall."""
    seconds = estimate(job.defense, session.data, device=session.device, precision=precision_of(session, job))
    if seconds < LONG:
        return
    quicker = [
        r for r in ("tiny", "fast") if r in job.kind.recipes and r != job.recipe and job.recipe != "tiny"
    ]
    advice = f"--recipe {quicker[0]}" if quicker else "a smaller width or fewer epochs with --set"
    if session.device.type == "cpu":
        advice += ", or a GPU"
    session.say(
        f"training {job.name} ({job.recipe}) on {session.data.name} will take about {duration(seconds)} on this machine; quicker: {advice}"
    )
    if session.ask is not None and not session.ask("train it all the same?"):
        raise Interrupted("nothing was trained")


def precision_of(session: Session, job: Job) -> Precision:
    """What a training runs in: the recipe `fast` is made for a GPU, and there in bfloat16 where nothing else is asked for."""
    unasked = session.precision == "fp32"
    return "bf16" if unasked and job.recipe == "fast" and session.device.type == "cuda" else session.precision


def _training_folder(session: Session, job: Job, seed: int, code: str) -> Path:
    learnt = {k: v for k, v in as_json(job.config).items() if k not in job.kind.evaluation_only}
    asked = {
        "config": learnt,
        "data": session.data.train.hash,
        "seed": seed,
        "precision": precision_of(session, job),
        "code": code,
    }
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
    return (
        session.results
        / "checkpoints"
        / records.safe(session.data.name)
        / records.safe(job.name)
        / f"{job.recipe}-{key}"
    )


def _training_of(path: Path, model: nn.Module) -> Training:
    import safetensors

    with safetensors.safe_open(path, "pt") as file:
        stored = (file.metadata() or {}).get("training")
    if stored is None:
        raise CheckpointError(f"{path} says nothing of its training; delete it to train again")
    try:
        return Training.model_validate_json(stored)
    except pydantic.ValidationError as error:
        raise CheckpointError(
            f"{path} says of its training what cannot be ({complaint(error)}); delete it to train again"
        ) from None


@contextmanager
def naming_defense(job: Job) -> Iterator[None]:
    """Says of which defense a run became void: several may have been asked for."""
    try:
        yield
    except VoidRun as error:
        said = f"{job.name}: {error}"
        if isinstance(error, AttackCrash):
            raise AttackCrash(said, error.rows) from error
        raise VoidRun(said, error.rows, code=error.code) from error
