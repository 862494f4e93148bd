"""From a name to a record: registry, training or checkpoint, plan, outcomes, record.

    names → settle everything that was asked → for each defense and seed: weights → for each protocol: outcomes → record

All that can be wrong with what was asked is found before anything is trained.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import io
import json
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
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
from bench.defense import Defense
from bench.errors import BenchError, CheckpointError, Interrupted, UsageError
from bench.evaluate import Batch, Cost, Evaluator
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


@dataclasses.dataclass(frozen=True)
class Weights:
    """A network with its weights, and where they come from."""

    model: nn.Module
    training: Training
    findings: tuple[str, ...] = ()
    loaded: checkpoints.Loaded | None = None


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
        for p in ([protocol] if isinstance(protocol, str) else protocol)
    ]
    data = datasets.load(dataset, Path(data_dir) if data_dir is not None else None)
    radius = _radius(eps)
    for one in asked:
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
    out = Path(results)
    records.writable(out)
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
        results=out,
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
    found = []
    for job in session.jobs:
        for seed in session.seeds:
            weights = weigh(session, job, seed)
            found += [evaluate(session, job, seed, weights, protocol) for protocol in session.protocols]
    return found


def train_session(session: Session) -> list[Path]:
    """Trains what was asked; the checkpoints' paths."""
    paths = []
    for job in session.jobs:
        if not job.defense.stages(session.data):
            raise UsageError(f"{job.name!r} has nothing to train; `bench run` evaluates it as it is")
        for seed in session.seeds:
            weigh(session, job, seed)
            paths.append(_training_folder(session, job, seed) / "model.safetensors")
    return paths


def explain_session(session: Session) -> str:
    """The plan of every protocol, with an estimate of the time it takes on this machine."""
    lines = []
    for job in session.jobs:
        model = _build(job, session.data, 0).to(session.device)
        evaluator = _evaluator(session, model, 0, session.protocols[0])
        n = _samples(session)
        for protocol in session.protocols:
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
    if session.checkpoint is not None:
        loaded = checkpoints.load(session.checkpoint, model, defense=defense, data=data)
        for note in loaded.notes:
            session.say(note)
        return Weights(
            model, Training(source=session.checkpoint, parameters=_size(model)), loaded.notes, loaded
        )
    if not defense.stages(data):
        return Weights(model, Training(source="as built", seed=seed, parameters=_size(model)))
    folder = _training_folder(session, job, seed)
    path = folder / "model.safetensors"
    if path.is_file():
        checkpoints.load(str(path), model, defense=defense, data=data)
        return Weights(model, _training_of(path, model))
    _announce(session, job)
    trained = train(
        defense,
        data,
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
        path,
        trained.model.state_dict(),
        {
            "bench": bench.__version__,
            "defense": job.name,
            "dataset": data.name,
            "recipe": job.recipe,
            "config": json.dumps(as_json(job.config)),
            "training": made.model_dump_json(),
        },
    )
    (folder / "state.pt").unlink(missing_ok=True)
    session.say(f"trained {job.name} in {duration(trained.seconds)}: {path}")
    return Weights(trained.model, made)


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
        recipe=job.recipe if len(job.kind.recipes) and session.checkpoint is None else None,
        model_hash=_hash(weights.model),
        protocol=_protocol(protocol, radius, columns, session.batch_size),
        seed=seed,
        samples=n,
        precision=session.precision,
        code=_code(job.kind),
    )
    folder = records.folder(session.results, asked)
    finished = records.read(folder)
    if finished is not None:
        session.say(f"{job.name}, {protocol.name}, seed {seed}: done before, {folder}")
        return finished
    started, began = datetime.now(timezone.utc), time.perf_counter()
    evaluator = _evaluator(session, weights.model, seed, protocol)
    if weights.loaded is not None:
        checkpoints.check_clean(
            weights.loaded, 100 * evaluator.clean_accuracy(np.arange(n), session.batch_size), n
        )
    programs = plan(columns, random=evaluator.random)
    parts = Parts(folder / "parts")
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
    table = pq.read_table(io.BytesIO(outcomes), columns=["index", "column", "robust"]).to_pandas()
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


def _attack_all(
    evaluator: Evaluator, programs: Sequence[Program], parts: Parts, n: int, session: Session, what: str
) -> None:
    """Every image that no earlier call has finished, batch by batch, each put away when it is done."""
    left = np.setdiff1d(np.arange(n), parts.done())
    try:
        with progress(what, n, done=n - len(left), quiet=session.quiet) as meter:
            for start in range(0, len(left), session.batch_size):
                batch: Batch = evaluator.run(programs, left[start : start + session.batch_size])
                parts.add(batch)
                meter.advance(len(batch.index))
    except KeyboardInterrupt:
        kept = len(parts.done())
        raise Interrupted(
            f"stopped with {kept} of {n} images done; they are kept, the same command goes on from there"
        ) from None


def _job(name: str, kind: type[Defense[Any]], recipe: str, settings: Mapping[str, object]) -> Job:
    if recipe not in kind.recipes:
        raise UsageError(f"{name!r} has no recipe {recipe!r}; it has {', '.join(kind.recipes)}")
    try:
        return Job(name, kind, recipe, replaced(kind.recipes[recipe], settings))
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None


def _build(job: Job, data: Dataset, seed: int) -> nn.Module:
    try:
        return initial(job.defense, data, seed)
    except BenchError:
        raise
    except Exception as error:
        # whatever a stranger's build raises, its author must hear of it in one line
        raise UsageError(
            f"{job.name!r} cannot be built for {data.name}: {type(error).__name__}: {error}"
        ) from error


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


def _training_folder(session: Session, job: Job, seed: int) -> Path:
    asked = {
        "config": as_json(job.config),
        "data": session.data.train.hash,
        "seed": seed,
        "precision": session.precision,
        "code": _code(job.kind),
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


def _evaluator(session: Session, model: nn.Module, seed: int, protocol: Protocol) -> Evaluator:
    return Evaluator(
        model,
        classes=len(session.data.classes),
        split=session.data.test,
        seed=seed,
        success=protocol.success,
        precision=session.precision,
        device=session.device,
    )


def _samples(session: Session) -> int:
    there = len(session.data.test)
    if session.samples is None:
        return there
    if not 1 <= session.samples <= there:
        raise UsageError(
            f"{session.data.name} has {there} test images; --samples must be from 1 to {there}, not {session.samples}"
        )
    return session.samples


def _radius(eps: float | str | None) -> float | None:
    if eps is None:
        return None
    try:
        value = number(eps)
    except ValueError as error:
        raise UsageError(f"eps: {error}") from None
    assert isinstance(value, (int, float))
    return float(value)


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


def _code(kind: type[Defense[Any]]) -> str:
    """A hash of the file that defines a defense, blind to comments, docstrings and layout."""
    written = getattr(kind, "function", kind)
    try:
        source = Path(inspect.getfile(written)).read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (TypeError, OSError, SyntaxError):
        # defined in a console or a notebook: there is no file to hash
        return ""
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


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
