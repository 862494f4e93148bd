"""From a name to a record: registry, training or checkpoint, plan, outcomes, record.

    names → settle everything that was asked → for each defense and seed: weights → for each protocol: outcomes → record

All that can be wrong with what was asked is found before anything is trained.
"""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

from bench import checkpoint as checkpoints
from bench import record as records
from bench.config import as_json
from bench.errors import BenchError, Interrupted, UsageError, VoidRun
from bench.evaluate import Batch, Evaluator
from bench.judge import Cost
from bench.moe import RoutedModel, as_mixture
from bench.parts import Parts
from bench.plan import Program, explain, plan
from bench.progress import duration, progress
from bench.protocol import BOUND, Column, Mixture, Protocol
from bench.provenance import weights_hash, where
from bench.record import Asked, ProgramRecord, Record
from bench.session import Job, Session, prepare, samples_of
from bench.weights import Weights, build, naming_defense, stages, weigh

if TYPE_CHECKING:
    import pandas as pd


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
    samples_of(session)
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
        if not stages(job, session.data):
            raise UsageError(f"{job.name!r} has nothing to train; `bench run` evaluates it as it is")
    paths = [weigh(session, job, seed).path for job in session.jobs for seed in session.seeds]
    return [path for path in paths if path is not None]


def explain_session(session: Session) -> str:
    """The plan of every protocol, with an estimate of the time it takes on this machine."""
    lines = []
    for job in session.jobs:
        model = build(job, session.data, 0).to(session.device)
        n = samples_of(session)
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


def evaluate(session: Session, job: Job, seed: int, weights: Weights, protocol: Protocol) -> Record:
    """One defense under one protocol: the finished record, or the outcomes that make it."""
    data, n = session.data, samples_of(session)
    radius = protocol.radius(data.eps, session.eps)
    columns = _columns(protocol, radius, weights.model)
    asked = Asked(
        dataset=data.name,
        data_hash=data.test.hash,
        defense=job.name,
        config=as_json(job.config),
        recipe=job.recipe if weights.training.source == "trained" else None,
        model_hash=weights_hash(weights.model),
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
    with naming_defense(job):
        _attack_all(evaluator, programs, parts, n, session, f"{job.name}: {protocol.name}")
    outcomes = parts.outcomes([column.name for column in columns])
    record = Record(
        asked=asked,
        columns=[column.record() for column in columns],
        programs=_programs(programs, parts.costs()),
        training=weights.training,
        where=where(session.device, started, time.perf_counter() - began),
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
    with naming_defense(job), progress(f"{job.name}: clean accuracy", n, quiet=session.quiet) as meter:
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


def _evaluator(session: Session, job: Job, model: nn.Module, seed: int, protocol: Protocol) -> Evaluator:
    try:
        with naming_defense(job):
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
    if any(column.family not in ("clean", "fgsm", "pgd", "mixture") for column in columns):
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
