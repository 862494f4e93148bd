"""From a name to a record: registry, training or checkpoint, plan, outcomes, record.

    names → settle everything that was asked → for each defense and seed: weights → for each protocol: outcomes → record

All that can be wrong with what was asked is found before anything is trained.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import platform
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

import bench
from bench import checkpoint as checkpoints
from bench import data as datasets
from bench import protocol as protocols
from bench import record as records
from bench import registry
from bench.config import as_json, number, replaced
from bench.data import Dataset
from bench.defense import Defense, Stage
from bench.errors import AttackCrash, BenchError, CheckpointError, Interrupted, UsageError, VoidRun
from bench.evaluate import Batch, Cost, Evaluator, Judge, before_any_attack
from bench.fast import Precision
from bench.moe import RoutedModel, as_mixture
from bench.parts import Parts
from bench.plan import Program, explain, plan
from bench.progress import duration, progress
from bench.protocol import BOUND, Column, Mixture, Protocol
from bench.record import Asked, ProgramRecord, Record, Training, Where
from bench.threat import threat_model
from bench.train import estimate, initial, train

if TYPE_CHECKING:
    import pandas as pd

#: a training that is longer is announced, and asked about where there is somebody to ask
LONG = 3600.0

#: how many images are attacked at once, where nothing else is said
BATCH_SIZE = {"cpu": 128, "cuda": 512}

Say = Callable[[str], None]
Ask = Callable[[str], bool]


@dataclasses.dataclass(frozen=True)
class Job:
    """One defense with its settings."""

    name: str
    kind: type[Defense[Any]]
    recipe: str
    config: Any

    @property
    def defense(self) -> Defense[Any]:
        """The defense, ready to build."""
        return self.kind(self.config)


@dataclasses.dataclass(frozen=True)
class Session:
    """Everything that was asked, checked: what a command hands on."""

    data: Dataset
    jobs: tuple[Job, ...]
    protocols: tuple[Protocol, ...]
    seeds: tuple[int, ...]
    samples: int | None
    eps: float | None
    checkpoint: str | None
    device: torch.device
    batch_size: int
    precision: Precision
    results: Path
    quiet: bool
    say: Say
    ask: Ask | None


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


def prepare(
    defense: str | Sequence[str] = "dwf",
    dataset: str = "digits",
    protocol: str | Sequence[str] = "dwf-paper",
    *,
    seed: int = 0,
    seeds: int = 1,
    samples: int | None = None,
    eps: float | str | None = None,
    recipe: str | None = None,
    checkpoint: str | None = None,
    settings: Mapping[str, object] | None = None,
    attacks: Sequence[str] = (),
    plugin: str | Path | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    precision: Precision = "fp32",
    data_dir: str | Path | None = None,
    results: str | Path = "results",
    quiet: bool = False,
    say: Say | None = None,
    ask: Ask | None = None,
) -> Session:
    """What was asked, checked; see `run`.

    Raises:
        UsageError: anything that is not as it must be.
    """
    if plugin is not None:
        registry.load_plugin(plugin)
    names = defense.split(",") if isinstance(defense, str) else list(defense)
    kinds = {name.strip(): registry.get(name.strip()) for name in names}
    asked = [
        protocols.with_attacks(protocols.load(p), attacks)
        for p in dict.fromkeys([protocol] if isinstance(protocol, str) else protocol)
    ]
    data = datasets.load(dataset, Path(data_dir) if data_dir is not None else None)
    radius = _radius(eps)
    for one in asked:
        if radius is not None:
            threat_model(one.norm, radius)
        for column in one.columns(one.radius(data.eps, radius)):
            if column.attack != "clean":
                threat_model(column.norm, column.eps)
            if column.family.startswith("torchattacks:"):
                from bench.attacks.torchattacks import attack_class

                attack_class(column.family.split(":", 1)[1])
    if checkpoint is not None and len(kinds) > 1:
        raise UsageError(f"one checkpoint for {len(kinds)} defenses; give --defense one name")
    if seeds < 1 or seed < 0:
        raise UsageError(f"seed must be at least 0 and seeds at least 1, not {seed} and {seeds}")
    if precision not in ("fp32", "bf16"):
        raise UsageError(f"no precision {precision!r}; choose fp32 or bf16")
    jobs = tuple(
        _job(name, kind, recipe or ("tiny" if dataset == "digits" else "fast"), settings or {})
        for name, kind in kinds.items()
    )
    where = _device(device)
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch size must be at least 1, not {batch_size}")
    if samples is not None and not 1 <= samples <= len(data.test):
        raise UsageError(
            f"{data.name} has {len(data.test)} test images; --samples must be from 1 to {len(data.test)}, not {samples}"
        )
    return Session(
        data=data,
        jobs=jobs,
        protocols=tuple(asked),
        seeds=tuple(range(seed, seed + seeds)),
        samples=samples,
        eps=radius,
        checkpoint=checkpoint,
        device=where,
        batch_size=batch_size or BATCH_SIZE[where.type],
        precision=precision,
        results=Path(results),
        quiet=quiet,
        say=say or (lambda line: None),
        ask=ask,
    )


def run(
    defense: str | Sequence[str] = "dwf",
    dataset: str = "digits",
    protocol: str | Sequence[str] = "dwf-paper",
    **asked: Any,
) -> pd.DataFrame:
    """Trains what has no weights yet, evaluates it, and gives the long table of these runs.

    A finished run is not run again; a stopped one goes on where it stopped.

    Args:
        defense: names, in a list or separated by commas.
        dataset: its name.
        protocol: names or TOML files.
        asked: `seed` and `seeds` (that many, from `seed` on); `samples` (the first N test images; all by default);
            `eps` (the radius, such as "8/255"); `recipe` (`tiny`, `fast`, `paper`); `checkpoint` (weights instead of
            training); `settings` (fields of the defense's config); `attacks` (further columns); `plugin` (a file);
            `device`, `batch_size`, `precision`, `data_dir`, `results`, `quiet`.

    Raises:
        UsageError: anything that is not as it must be.
        VoidRun: a NaN, a crash or an illegal perturbation; there is no result then.
        Interrupted: stopped; what was finished is kept.
    """
    from bench.long import frame, groups

    return frame(groups(run_session(prepare(defense, dataset, protocol, **asked))))


def run_session(session: Session) -> list[Record]:
    """The records of everything that was asked, run or found."""
    records.writable(session.results)
    # the images are read before hours are spent on training what could then not be evaluated
    _samples(session)
    found = []
    for job in session.jobs:
        for seed in session.seeds:
            weights = weigh(session, job, seed)
            found += [evaluate(session, job, seed, weights, protocol) for protocol in session.protocols]
    return found


def train_session(session: Session) -> list[Path]:
    """Trains what was asked; the checkpoints' paths."""
    records.writable(session.results)
    for job in session.jobs:
        if not _stages(job, session.data):
            raise UsageError(f"{job.name!r} has nothing to train; `bench run` evaluates it as it is")
    paths = [weigh(session, job, seed).path for job in session.jobs for seed in session.seeds]
    return [path for path in paths if path is not None]


def explain_session(session: Session) -> str:
    """The plan of every protocol, with an estimate of the time it takes on this machine."""
    lines = []
    for job in session.jobs:
        model = _build(job, session.data, 0).to(session.device)
        n = _samples(session)
        for protocol in session.protocols:
            evaluator = _evaluator(session, job, model, 0, protocol)
            columns = _columns(protocol, protocol.radius(session.data.eps, session.eps), model)
            programs = plan(columns, random=evaluator.random)
            lines.append(f"{job.name} on {session.data.name}, {n} images, protocol {protocol.name}:")
            lines.append(explain(programs, protocol.success))
            low, high = evaluator.estimate(programs, n, session.batch_size)
            lines.append(
                f"gradients: {evaluator.about}; about {duration(low)} to {duration(high)} on this machine\n"
            )
    return "\n".join(lines).rstrip()


def weigh(session: Session, job: Job, seed: int) -> Weights:
    """The network of a job with its weights: from the checkpoint given, from an earlier training, or trained now."""
    defense, data = job.defense, session.data
    model = _build(job, data, seed).to(session.device)
    code = _code(job.kind, model)
    if session.checkpoint is not None:
        loaded = checkpoints.load(session.checkpoint, model, defense=defense, data=data)
        for note in loaded.notes:
            session.say(note)
        training = Training(source=session.checkpoint, parameters=_size(model))
        return Weights(model, training, code, findings=loaded.notes, loaded=loaded)
    if not _stages(job, data):
        return Weights(model, Training(source="as built", seed=seed, parameters=_size(model)), code)
    folder = _training_folder(session, job, seed, code)
    path = folder / "model.safetensors"
    if not path.is_file():
        if seed == session.seeds[0]:
            for later in session.jobs[session.jobs.index(job) :]:
                _try(session, later)
        _train(session, job, seed, folder)
    # a network just trained is read like one of yesterday's, so that both give the same outcomes, bit for bit
    checkpoints.load(str(path), model, defense=defense, data=data)
    return Weights(model, _training_of(path, model), code, path)


def _train(session: Session, job: Job, seed: int, folder: Path) -> None:
    """Trains a network into its folder."""
    with _charging(job):
        _announce(session, job)
        trained = train(
            job.defense,
            session.data,
            seed=seed,
            folder=folder,
            device=session.device,
            precision=session.precision,
            quiet=session.quiet,
            name=job.name,
        )
    made = Training(
        source="trained",
        seed=seed,
        seconds=round(trained.seconds, 1),
        parameters=_size(trained.model),
        stages=trained.history,
    )
    checkpoints.save(
        folder / "model.safetensors",
        trained.model.state_dict(),
        {
            "bench": bench.__version__,
            "defense": job.name,
            "dataset": session.data.name,
            "recipe": job.recipe,
            "config": json.dumps(as_json(job.config)),
            "training": made.model_dump_json(),
        },
    )
    (folder / "state.pt").unlink(missing_ok=True)
    session.say(f"trained {job.name} in {duration(trained.seconds)}: {folder / 'model.safetensors'}")


def evaluate(session: Session, job: Job, seed: int, weights: Weights, protocol: Protocol) -> Record:
    """One defense under one protocol: the finished record, or the outcomes that make it."""
    data, n = session.data, _samples(session)
    radius = protocol.radius(data.eps, session.eps)
    columns = _columns(protocol, radius, weights.model)
    asked = Asked(
        dataset=data.name,
        data_hash=data.test.hash,
        defense=job.name,
        config=as_json(job.config),
        recipe=job.recipe if weights.training.source == "trained" else None,
        model_hash=_hash(weights.model),
        protocol=_protocol(protocol, radius, columns, session.batch_size),
        seed=seed,
        samples=n,
        precision=session.precision,
        code=weights.code,
    )
    folder = records.folder(session.results, asked)
    finished = records.read(folder)
    if finished is not None:
        session.say(f"{job.name}, {protocol.name}, seed {seed}: done before, {folder}")
        return finished
    started, began = datetime.now(timezone.utc), time.perf_counter()
    evaluator = _evaluator(session, job, weights.model, seed, protocol)
    _confirm(session, job, weights, evaluator)
    programs = plan(columns, random=evaluator.random)
    parts = Parts(folder / "parts")
    with _naming(job):
        _attack_all(evaluator, programs, parts, n, session, f"{job.name}: {protocol.name}")
    outcomes = parts.outcomes([column.name for column in columns])
    record = Record(
        asked=asked,
        columns=[column.record() for column in columns],
        programs=_programs(programs, parts.costs()),
        training=weights.training,
        where=_where(session.device, started, time.perf_counter() - began),
        published_as=job.kind.published_as,
        footnotes=protocol.footnotes,
        findings=[*weights.findings, *evaluator.findings, *sandwich(outcomes, columns, evaluator.mixture)],
        outcomes_sha256=hashlib.sha256(outcomes).hexdigest(),
    )
    records.finish(folder, record, outcomes)
    parts.remove()
    again = records.read(folder)
    assert again is not None
    return again


def sandwich(outcomes: bytes, columns: Sequence[Column], mixture: RoutedModel | None) -> list[str]:
    """What a mixture's outcomes say of the attacks on it.

    RA(all experts hold) ≤ RA(deployed) ≤ RA(gate frozen). The right half holds by counting worst cases. The left one is
    a check: where the mixture falls an expert has fallen, and if the attack on the experts found none it was too weak.
    """
    if mixture is None:
        return []
    names = [column.name for column in columns]
    if BOUND not in names:
        if mixture.soft:
            return []
        return [
            "hard routing, and no attack that knows of it: gradients do not see the gate; ask for --protocol adaptive"
        ]
    file = pq.ParquetFile(pa.BufferReader(outcomes), pre_buffer=False)
    table = file.read(columns=["index", "column", "robust"], use_threads=False).to_pandas()
    robust = table.pivot(index="index", columns="column", values="robust")
    counted = [column.name for column in columns if not column.diagnostic]
    missed = int((robust[BOUND] & ~robust[counted].all(axis=1)).sum())
    if missed == 0:
        return []
    return [
        f"under-optimised: {missed} of {len(robust)} images fool the mixture though every expert survived the attack on it alone"
    ]


def _columns(protocol: Protocol, radius: float, model: nn.Module) -> list[Column]:
    """The protocol's columns for this model: a mixture is asked more."""
    mixture = as_mixture(model)
    kind: Mixture | None = None if mixture is None else "soft" if mixture.soft else "hard"
    return protocol.columns(radius, kind, legacy=hasattr(model, "legacy_aims"))


def _confirm(session: Session, job: Job, weights: Weights, evaluator: Evaluator) -> None:
    """Compares the clean accuracy that a checkpoint states with the one it has: on all test images, as it was stated."""
    loaded, n = weights.loaded, len(session.data.test)
    if loaded is None or loaded.clean is None or weights.confirmed:
        return
    right = 0.0
    with _naming(job), progress(f"{job.name}: clean accuracy", n, quiet=session.quiet) as meter:
        for start in range(0, n, session.batch_size):
            index = np.arange(start, min(start + session.batch_size, n))
            right += evaluator.clean_accuracy(index, session.batch_size) * len(index)
            meter.advance(len(index))
    checkpoints.check_clean(loaded, 100 * right / n, n)
    weights.confirmed = True


def _attack_all(
    evaluator: Evaluator, programs: Sequence[Program], parts: Parts, n: int, session: Session, what: str
) -> None:
    """Every image that no earlier call has finished, batch by batch, each put away when it is done."""
    left = np.setdiff1d(np.arange(n), parts.done())
    try:
        with terminable(), progress(what, n, done=n - len(left), quiet=session.quiet) as meter:
            for start in range(0, len(left), session.batch_size):
                batch: Batch = evaluator.run(programs, left[start : start + session.batch_size])
                parts.add(batch)
                meter.advance(len(batch.index))
    except KeyboardInterrupt:
        kept = len(parts.done())
        raise Interrupted(
            f"stopped with {kept} of {n} images done; they are kept, the same command goes on from there"
        ) from None


@contextmanager
def terminable() -> Iterator[None]:
    """Makes SIGTERM what Ctrl-C is; the handler there was is put back. In the main thread only: no other may ask."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        # None stands for a handler that is not Python's, which Python cannot put back
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _job(name: str, kind: type[Defense[Any]], recipe: str, settings: Mapping[str, object]) -> Job:
    if recipe not in kind.recipes:
        there = (
            f"it has {', '.join(kind.recipes)}"
            if kind.recipes
            else "it needs recipes = {'tiny': Config(), ...}"
        )
        raise UsageError(f"{name!r} has no recipe {recipe!r}; {there}")
    try:
        return Job(name, kind, recipe, replaced(kind.recipes[recipe], settings))
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None


def _build(job: Job, data: Dataset, seed: int) -> nn.Module:
    try:
        with _charging(job):
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


def _stages(job: Job, data: Dataset) -> Sequence[Stage]:
    with _charging(job):
        return job.defense.stages(data)


@contextmanager
def _charging(job: Job) -> Iterator[None]:
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
    model = _build(job, session.data, session.seeds[0]).to(session.device).eval()
    _stages(job, session.data)
    x, _ = session.data.train.batch(slice(0, 2), session.device)
    with _naming(job), before_any_attack():
        Judge(model, len(session.data.classes), Cost())(x, x, None)


@contextmanager
def _naming(job: Job) -> Iterator[None]:
    """Says of which defense a run became void: several may have been asked for."""
    try:
        yield
    except VoidRun as error:
        kind = AttackCrash if isinstance(error, AttackCrash) else VoidRun
        raise kind(f"{job.name}: {error}", error.rows) from error


def _announce(session: Session, job: Job) -> None:
    """Says that a training will take long, and asks whether it shall."""
    seconds = estimate(job.defense, session.data, device=session.device, precision=session.precision)
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


def _training_folder(session: Session, job: Job, seed: int, code: str) -> Path:
    asked = {
        "config": as_json(job.config),
        "data": session.data.train.hash,
        "seed": seed,
        "precision": session.precision,
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
    return Training.model_validate_json(stored)


def _evaluator(session: Session, job: Job, model: nn.Module, seed: int, protocol: Protocol) -> Evaluator:
    try:
        with _naming(job):
            return Evaluator(
                model,
                classes=len(session.data.classes),
                split=session.data.test,
                seed=seed,
                success=protocol.success,
                precision=session.precision,
                device=session.device,
            )
    except BenchError:
        raise
    except Exception as error:
        # the model was run forward and backward here: whatever it raises, there is no number
        raise VoidRun(
            f"{job.name}: this model cannot be evaluated: {type(error).__name__}: {error}"
        ) from error


def _samples(session: Session) -> int:
    return len(session.data.test) if session.samples is None else session.samples


def _radius(eps: float | str | None) -> float | None:
    if eps is None:
        return None
    try:
        value = float(number(eps))  # type: ignore[arg-type]
    except ValueError as error:
        raise UsageError(f"eps: {error}") from None
    except TypeError:
        raise UsageError(f"eps: {eps!r} is not a number; write 0.03 or 8/255") from None
    if not math.isfinite(value):
        raise UsageError(f"eps: {eps!r} is not a finite number; write 0.03 or 8/255")
    return value


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"no device {name!r}; choose auto, cpu, cuda or cuda:0") from None
    if device.type not in BATCH_SIZE:
        raise UsageError(f"no device {name!r}; choose auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {name!r} is not there; this machine has {torch.cuda.device_count()} GPUs")
    return device


def _protocol(
    protocol: Protocol, radius: float, columns: Sequence[Column], batch_size: int
) -> dict[str, Any]:
    stated: dict[str, Any] = {
        "name": protocol.name,
        "norm": protocol.norm,
        "success": protocol.success,
        "eps": radius,
        "columns": [column.record().model_dump(mode="json") for column in columns],
    }
    if any(column.family not in ("clean", "fgsm", "pgd") for column in columns):
        # libraries draw noise for whole batches, so there the batch size is part of the question
        stated["batch_size"] = batch_size
    return stated


def _programs(programs: Sequence[Program], costs: Mapping[str, Cost]) -> list[ProgramRecord]:
    return [
        ProgramRecord(
            name=program.name,
            columns=[column.name for column in program.columns],
            gradients=costs[program.name].gradients,
            forwards=costs[program.name].forwards,
            seconds=round(costs[program.name].seconds, 3),
        )
        for program in programs
    ]


def _hash(model: nn.Module) -> str:
    """sha256 of everything a model computes with: parameters and buffers, those outside its checkpoint too."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda pair: pair[0]):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _code(kind: type[Defense[Any]], model: nn.Module) -> str:
    """A hash of the files that define a defense and the parts of its network; libraries and the harness have versions."""
    written: Any = getattr(kind, "function", kind)
    parts = {*kind.__mro__, *(type(part) for part in model.modules())}
    sources = {_source(written), *(_source(part) for part in parts if _is_local(part))}
    return _sha256("\n".join(sorted(sources)))[:16]


def _is_local(thing: type) -> bool:
    """Whether a class is of a defense or a baseline, or of the user's own files."""
    root = thing.__module__.split(".")[0]
    if root in ("bench", "builtins"):
        return False
    if root in registry.PACKAGES:
        return True
    try:
        file = Path(inspect.getfile(thing)).resolve()
    except (TypeError, OSError):
        return True
    paths = sysconfig.get_paths()
    return not any(
        file.is_relative_to(Path(paths[name]).resolve()) for name in ("stdlib", "purelib", "platlib")
    )


@functools.cache
def _source(thing: Callable[..., Any]) -> str:
    """A hash of the file that defines a class or a function, blind to comments, docstrings and layout.

    It is read once, near the import: what is edited while a training runs is not what runs.
    """
    try:
        source = Path(inspect.getfile(thing)).read_bytes()
        tree = ast.parse(source)
    except (TypeError, OSError, SyntaxError):
        # defined in a console or a notebook: there is no file, but there is what it was compiled to
        return _sha256(repr([_compiled(code) for code in _codes(thing)]))
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:]
    return _sha256(ast.dump(tree))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _codes(thing: Any) -> list[CodeType]:
    members = (
        [thing] if inspect.isfunction(thing) else [value for _, value in sorted(vars(thing).items(), key=str)]
    )
    return [member.__code__ for member in members if inspect.isfunction(member)]


def _compiled(code: CodeType) -> str:
    """What a function does, without where it stands."""
    constants = [
        _compiled(value)
        if isinstance(value, CodeType)
        else repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)
        for value in code.co_consts
    ]
    return repr((code.co_code.hex(), code.co_names, code.co_varnames, constants))


def _where(device: torch.device, started: datetime, seconds: float) -> Where:
    import torchvision

    commit, dirty = _commit()
    return Where(
        bench=bench.__version__,
        commit=commit,
        dirty=dirty,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": np.__version__,
        },
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        threads=torch.get_num_threads(),
        started=started.isoformat(timespec="seconds"),
        seconds=round(seconds, 2),
    )


def _commit() -> tuple[str | None, bool | None]:
    """The commit of the harness and whether its files differ from it; nothing outside a checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD") if (root / ".git").exists() else None
    changes = git("status", "--porcelain", "--", "bench", "defenses", "baselines") if commit else None
    return commit, None if changes is None else bool(changes)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
