"""From a name to a record: registry, training or checkpoint, plan, outcomes, record.

    names → settle everything that was asked → for each defense and seed: weights → for each protocol: outcomes → record

All that can be wrong with what was asked is found before anything is trained.
"""

from __future__ import annotations

import dataclasses
import hashlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from bench import checkpoint as checkpoints
from bench import processes
from bench import record as records
from bench.arithmetic import exact_arithmetic
from bench.attacks.stored import digest
from bench.audit.contract import Contract, contract, is_random
from bench.audit.gradients import gradient_checks
from bench.audit.run import audit
from bench.certify import told
from bench.claim import claim
from bench.config import as_json, replaced
from bench.errors import BenchError, Interrupted, UsageError, VoidRun
from bench.evaluate import Evaluator
from bench.finding import Finding, verdict
from bench.judge import Cost
from bench.moe import as_mixture
from bench.parts import Parts
from bench.plan import Program, explain, plan
from bench.progress import duration, progress
from bench.protocol import Column, Mixture, Protocol
from bench.provenance import weights_hash, where
from bench.record import Asked, ProgramRecord, Record
from bench.session import Job, Session, prepare, samples_of
from bench.train import paces
from bench.under_way import UnderWay
from bench.weights import (
    Weights,
    build,
    charging,
    naming_defense,
    precision_of,
    stages,
    untrained,
    weigh,
)

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
            `eps` (the radius, such as "8/255"); `recipe` (`tiny`, `fast`, `paper`, or another that the defense has); `checkpoint` (weights instead of
            training); `settings` (fields of the defense's config); `attacks` (further columns); `plugin` (a file);
            `device`, `batch_size`, `precision`, `data_dir`, `results`, `quiet`.

    Raises:
        UsageError: anything that is not as it must be.
        VoidRun: a NaN, a crash or an illegal perturbation; there is no result then.
        Interrupted: stopped; what was finished is kept.
    """
    from bench.long import frame, groups

    with processes.joined():
        return frame(groups(run_session(prepare(defense, dataset, protocol, **asked))))


def run_session(session: Session) -> list[Record]:
    """The records of everything that was asked, run or found."""
    with processes.joined():
        records.writable(session.results)
        processes.shared(session.results)
        # the images are read before hours are spent on training what could then not be evaluated
        samples_of(session)
        for job in session.jobs:
            _refuse_plain(session, job, job.kind.random)
        if processes.count() > 1:
            _train_all(session, [*session.jobs, *session.surrogates.values()])
        found = []
        for job in session.jobs:
            for seed in session.seeds:
                weights = weigh(session, job, seed)
                found += [evaluate(session, job, seed, weights, protocol) for protocol in session.protocols]
        processes.barrier()
        return [_finished(folder) for folder in found]


def _train_all(session: Session, jobs: Sequence[Job]) -> None:
    """Trains what has no weights yet: a network to each process while there is one for every process, the rest together."""
    places = [(place, seed) for place, _ in enumerate(jobs) for seed in session.seeds]
    # what is done, the first process to look says for all
    left = processes.agreed([p for p in places if untrained(_own(session, jobs, p), jobs[p[0]], p[1])])
    apart = len(left) - len(left) % processes.count()
    for _, (place, seed) in processes.share(left[:apart]):
        weigh(_own(session, jobs, (place, seed)), jobs[place], seed)
    processes.barrier()
    for place, seed in left[apart:]:
        weigh(_own(session, jobs, (place, seed)), jobs[place], seed, together=True)
    for place, seed in left:
        path = untrained(_own(session, jobs, (place, seed)), jobs[place], seed)
        if path is not None:
            processes.seen(path)


def _own(session: Session, jobs: Sequence[Job], place: tuple[int, int]) -> Session:
    """The session that a network is weighed in: a checkpoint is of the job, and not of what it is compared with."""
    return session if jobs[place[0]] in session.jobs else dataclasses.replace(session, checkpoint=None)


def _refuse_plain(session: Session, job: Job, random: bool) -> None:
    """Refuses to evaluate a random model by single passes, unless the user insists.

    Raises:
        UsageError: it is random, and a protocol takes one pass for a gradient.
    """
    for protocol in session.protocols:
        if random and protocol.random_eot == 1 and not session.insist:
            raise UsageError(
                f"{job.name!r} is random: its answers differ from call to call, and {protocol.name} follows the gradient of single "
                "draws, which overstates its robustness; use --protocol standard, which takes means, or --insist"
            )


def train_session(session: Session) -> list[Path]:
    """Trains what was asked; the checkpoints' paths."""
    with processes.joined():
        records.writable(session.results)
        processes.shared(session.results)
        for job in session.jobs:
            _refuse_untrained(session, job)
        if processes.count() > 1:
            _train_all(session, session.jobs)
        paths = [weigh(session, job, seed).path for job in session.jobs for seed in session.seeds]
        return [path for path in paths if path is not None]


def _refuse_untrained(session: Session, job: Job) -> None:
    if not stages(job, session.data):
        raise UsageError(f"{job.name!r} has nothing to train; `bench run` evaluates it as it is")


def explain_session(session: Session) -> str:
    """The plan of every protocol, with an estimate of the time it takes on this machine."""
    lines = []
    for job in session.jobs:
        model = build(job, session.data, 0).to(session.device)
        n = samples_of(session)
        for protocol in session.protocols:
            evaluator = _evaluator(session, job, model, 0, protocol, {}, trained=False)
            columns = columns_of(protocol, session, model)
            programs = plan(columns, random=evaluator.random)
            lines.append(f"{job.name} on {session.data.name}, {n} images, protocol {protocol.name}:")
            lines.append(explain(programs, protocol.success))
            low, high = evaluator.estimate(programs, n, session.batch_size)
            gradients = [evaluator.about, evaluator.compiling(low, high)[1]]
            if session.device.type == "cuda":
                gradients.append(evaluator.recording(low, high)[1])
            lines.append(
                f"gradients: {'; '.join(gradients)}; about {duration(low)} to {duration(high)} on this machine\n"
            )
    return "\n".join(lines).rstrip()


def explain_training(
    session: Session, recipe: str | None = None, settings: Mapping[str, object] | None = None
) -> list[dict[str, Any]]:
    """How fast each defense would be trained on this machine, and for how long; nothing is trained.

    One row for each recipe, for the one that is named or for all that the defense has, with these settings: `defense`, `dataset`,
    `recipe`, `device`, `precision`, `seconds`, and of its `stages` each `stage`, `epochs`, `images_per_second`, `seconds`.

    Raises:
        UsageError: a defense has nothing to train.
    """
    rows = []
    for job in session.jobs:
        for name in job.kind.recipes if recipe is None else [recipe]:
            config = replaced(job.kind.recipes[name], settings or {})
            one = dataclasses.replace(job, recipe=name, config=config)
            _refuse_untrained(session, one)
            precision = precision_of(session, one)
            with charging(one), naming_defense(one):
                found = paces(one.defense, session.data, device=session.device, precision=precision)
            rows.append(
                {
                    "defense": job.name,
                    "dataset": session.data.name,
                    "recipe": name,
                    "device": str(session.device),
                    "precision": precision,
                    "seconds": sum(pace.seconds for pace in found),
                    "stages": [dataclasses.asdict(pace) for pace in found],
                }
            )
    return rows


def training_told(rows: Sequence[Mapping[str, Any]]) -> str:
    """What `explain_training` found, in words."""
    lines = []
    for row in rows:
        lines.append(
            f"{row['defense']} ({row['recipe']}) on {row['dataset']}, {row['device']}, {row['precision']}: about {duration(row['seconds'])} on this machine"
        )
        for stage in row["stages"]:
            lines.append(
                f"  {stage['stage']:14} {stage['epochs']:4} epochs {stage['images_per_second']:10,.1f} images/s   {duration(stage['seconds'])}"
            )
    return "\n".join(lines)


def check_session(session: Session) -> list[tuple[str, Contract]]:
    """The model contract of every defense that was asked: as built, or with the checkpoint's weights."""
    found = []
    x, y = session.data.test.batch(slice(0, CHECKED), session.device)
    for job in session.jobs:
        trained = session.checkpoint is not None or not stages(job, session.data)
        model = weigh(session, job, session.seeds[0]).model if trained else build(job, session.data, 0)
        model = model.to(session.device).eval().requires_grad_(False)
        if not trained:
            session.say(f"{job.name}: untrained weights; --checkpoint gives it others")
        adaptive = as_mixture(model) is not None
        with exact_arithmetic():
            one = contract(model, x, y, classes=len(session.data.classes), adaptive=adaptive)
            if not trained:
                one = one.untrained()
            callable_ = not any(finding.severity == "blocks" for finding in one.findings)
            if callable_:
                doubts = gradient_checks(model, x[:16], y[:16], black_box=True, adaptive=adaptive)
                one = dataclasses.replace(one, findings=[*one.findings, *doubts])
        found.append((job.name, one))
    return found


#: how many images the model contract is checked on
CHECKED = 64


def evaluate(session: Session, job: Job, seed: int, weights: Weights, protocol: Protocol) -> Path:
    """One defense under one protocol: the folder of its record, found there or made.

    Of several processes each attacks the batches that it gets hold of; when all are done, process 0 makes the record of them.

    Raises:
        VoidRun: a NaN, a crash, an illegal perturbation, or a model that is no function of an image; why is kept beside
            where the record would be, for `bench audit`.
    """
    data, n = session.data, samples_of(session)
    weights.model.to(session.device).eval()
    random = _random(session, weights.model)
    _refuse_plain(session, job, random)
    columns = columns_of(protocol, session, weights.model)
    surrogates = _surrogates(session, columns, seed)
    asked = Asked(
        dataset=data.name,
        data_hash=data.test.hash,
        defense=job.name,
        config=as_json(job.config),
        recipe=job.recipe if weights.training.source == "trained" else None,
        model_hash=weights_hash(weights.model),
        protocol=_protocol(protocol, session, columns, surrogates, random),
        seed=seed,
        samples=n,
        precision=session.precision,
        weights=session.weights,
        code=weights.code,
    )
    folder = records.folder(session.results, asked)
    if processes.agreed(records.read(folder) is not None):
        session.say(f"{job.name}, {protocol.name}, seed {seed}: done before, {folder}")
        if not processes.agreed((folder / "parts").exists()):
            return folder
    with claim(session.results, folder, session.say, together=True):
        # process 0 has the claim for all
        processes.barrier()
        # whoever was waited for may have finished it
        if processes.agreed(records.read(folder) is not None):
            if processes.rank() == 0:
                records.forget(folder / "parts")
            return folder
        return _measure(session, job, seed, weights, protocol, columns, surrogates, asked)


def _measure(
    session: Session,
    job: Job,
    seed: int,
    weights: Weights,
    protocol: Protocol,
    columns: Sequence[Column],
    surrogates: Mapping[str, nn.Module],
    asked: Asked,
) -> Path:
    """The outcomes of what was asked, and the record that they make; the folder of both."""
    data, n, folder = session.data, samples_of(session), records.folder(session.results, asked)
    started, began = datetime.now(timezone.utc), time.perf_counter()
    try:
        evaluator = _evaluator(session, job, weights.model, seed, protocol, surrogates)
        _confirm(session, job, weights, evaluator)
        programs = plan(columns, random=evaluator.random)
        parts = Parts(folder / "parts")
        with naming_defense(job):
            evaluator.prepare(programs, n, session.batch_size)
            _attack_all(evaluator, programs, parts, n, session, f"attacking {job.name}, {protocol.name}")
            evaluator.unchanged()
            processes.arrive()
            if processes.rank():
                return folder
            parts = _all_parts(parts, n)
    except VoidRun as error:
        why = Finding(code=error.code, severity="blocks", evidence=str(error), advice=VOID)
        records.void(folder, asked, [why])
        raise
    outcomes, experts = parts.outcomes([column.name for column in columns]), parts.experts()
    facts = evaluator.facts
    compiling = [evaluator.about] if any(w in evaluator.about for w in ("compiled", "CUDA graphs")) else []
    if weights.loaded is not None:
        facts = facts.model_copy(update={"stated_clean": weights.loaded.clean})
    notes = [
        Finding(code="checkpoint", severity="informs", evidence=text, advice=NOTE)
        for text in weights.findings
    ]
    notes += [
        Finding(code="compiled", severity="informs", evidence=f"gradients: {text}", advice=COMPILED)
        for text in compiling
    ]
    x, _ = data.test.batch(slice(0, CHECKED), session.device)
    with naming_defense(job):
        doubts = [*notes, *told(weights.model, x), *evaluator.contract.findings]
    record = Record(
        asked=asked,
        columns=[column.record() for column in columns],
        programs=_programs(programs, parts.costs()),
        training=weights.training,
        where=where(session.device, started, time.perf_counter() - began, _libraries(columns)),
        published_as=job.kind.published_as,
        footnotes=protocol.footnotes,
        model=facts,
        findings=doubts,
        verdict=verdict(doubts),
        outcomes_sha256=hashlib.sha256(outcomes).hexdigest(),
        experts_sha256=None if experts is None else hashlib.sha256(experts).hexdigest(),
    )
    with naming_defense(job):
        record = audit(evaluator, record, outcomes)
    records.finish(folder, record, outcomes, experts)
    parts.remove()
    return folder


def _finished(folder: Path) -> Record:
    """The record in the folder of a run that has ended."""
    processes.seen(folder / "record.json")
    record = records.read(folder)
    assert record is not None
    return record


def _all_parts(parts: Parts, n: int) -> Parts:
    """The batches of all processes, once those of other hosts are seen too.

    Raises:
        UsageError: some are not.
    """
    since = time.monotonic()
    while len(parts.done()) < n:
        if time.monotonic() - since > processes.SEEN_WITHIN:
            raise UsageError(
                f"only {len(parts.done())} of {n} images are seen in {parts.folder}; all hosts of a command must share the folder that --results names"
            )
        time.sleep(0.2 if parts.done().size else 0)
        parts = Parts(parts.folder)
    return parts


#: what to do about a run that is void
VOID = "there is no number for this model until the cause is removed"
#: what to do about a note on compiling
COMPILED = (
    "nothing: attacks follow gradients that round otherwise than uncompiled ones; the network itself judges"
)
#: what to do about a note on a checkpoint
NOTE = "see that this is what was meant"


def columns_of(protocol: Protocol, session: Session, model: nn.Module) -> list[Column]:
    """The protocol's columns for this model: a mixture is asked more, and a random model otherwise."""
    data, mixture = session.data, as_mixture(model)
    kind: Mixture | None = None if mixture is None else "soft" if mixture.soft else "hard"
    return protocol.columns(
        protocol.radius(data.eps, session.eps),
        kind,
        legacy=hasattr(model, "legacy_aims"),
        certified=hasattr(model, "certificate"),
        random=_random(session, model),
        classes=len(data.classes),
    )


def _random(session: Session, model: nn.Module) -> bool:
    x, y = session.data.test.batch(slice(0, 8), session.device)
    with suppress(VoidRun):
        # what it was, is said when the model is examined
        return is_random(model, x, y, len(session.data.classes))
    return False


def _surrogates(session: Session, columns: Sequence[Column], seed: int) -> dict[str, nn.Module]:
    """The trained models that columns craft on, by the columns' family."""
    wanted = {column.family for column in columns if column.family in session.surrogates}
    plain = dataclasses.replace(session, checkpoint=None)
    return {family: weigh(plain, session.surrogates[family], seed).model for family in sorted(wanted)}


def _confirm(session: Session, job: Job, weights: Weights, evaluator: Evaluator) -> None:
    """Compares the clean accuracy that a checkpoint states with the one it has: on all test images, as it was stated."""
    loaded, n = weights.loaded, len(session.data.test)
    if loaded is None or loaded.clean is None or weights.confirmed or processes.rank():
        return
    right = 0.0
    with naming_defense(job), progress(f"clean accuracy of {job.name}", n, quiet=session.quiet) as meter:
        for start in range(0, n, session.batch_size):
            index = np.arange(start, min(start + session.batch_size, n))
            right += evaluator.clean_accuracy(index, session.batch_size) * len(index)
            meter.advance(len(index))
    checkpoints.check_clean(loaded, 100 * right / n, n)
    weights.confirmed = True


def _attack_all(
    evaluator: Evaluator, programs: Sequence[Program], parts: Parts, n: int, session: Session, what: str
) -> None:
    """Every image that no earlier call has finished, batch by batch, each put away when it is done.

    The batches are those of one process, however many share them: what a random model draws, and how a sum is rounded, may
    depend on which images go together.
    """
    left = np.array(processes.agreed(np.setdiff1d(np.arange(n), parts.done()).tolist()), dtype=int)
    batches = [left[start : start + session.batch_size] for start in range(0, len(left), session.batch_size)]
    if len(batches) < processes.count():
        session.say(
            f"{what}: {len(batches)} batches for {processes.count()} processes; a smaller --batch-size gives all of them work"
        )
    try:
        with terminable(), progress(what, n, done=n - len(left), quiet=session.quiet) as meter:
            under_way = UnderWay(meter, programs)
            evaluator.begins = under_way.begins
            told = 0
            for number, index in processes.share(batches):
                # those before this one are done or under way elsewhere
                meter.advance(sum(len(batch) for batch in batches[told:number]))
                told = number + 1
                batch = evaluator.run(programs, index)
                parts.add(batch)
                under_way.ends(batch)
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


def _evaluator(
    session: Session,
    job: Job,
    model: nn.Module,
    seed: int,
    protocol: Protocol,
    surrogates: Mapping[str, nn.Module],
    *,
    trained: bool = True,
) -> Evaluator:
    try:
        with naming_defense(job):
            evaluator = Evaluator(
                model,
                classes=len(session.data.classes),
                split=session.data.test,
                seed=seed,
                success=protocol.success,
                precision=session.precision,
                device=session.device,
                surrogates=surrogates,
                trained=trained,
            )
            for finding in evaluator.contract.findings:
                if finding.severity == "blocks":
                    raise VoidRun(
                        f"this model cannot be evaluated: {finding.evidence} (first images, before any attack)",
                        code=finding.code,
                    )
            return evaluator
    except BenchError:
        raise
    except Exception as error:
        # the model was run forward and backward here: whatever it raises, there is no number
        raise VoidRun(
            f"{job.name}: this model cannot be evaluated: {type(error).__name__}: {error}", code="model-crash"
        ) from error


def _protocol(
    protocol: Protocol,
    session: Session,
    columns: Sequence[Column],
    surrogates: Mapping[str, nn.Module],
    random: bool,
) -> dict[str, Any]:
    stated: dict[str, Any] = {
        "name": protocol.name,
        "norm": protocol.norm,
        "success": protocol.success,
        "eps": protocol.radius(session.data.eps, session.eps),
        "columns": [column.record().model_dump(mode="json") for column in columns],
    }
    if surrogates:
        stated["surrogates"] = {family: weights_hash(model) for family, model in surrogates.items()}
    files = sorted(
        {column.family.split(":", 1)[1] for column in columns if column.family.startswith("images:")}
    )
    if files:
        stated["images"] = {file: digest(file) for file in files}
    libraries = _libraries(columns)
    if libraries:
        stated["libraries"] = libraries
    if random or any(column.family.startswith("torchattacks:") for column in columns):
        # they draw noise for whole batches, so there the batch size is part of the question
        stated["batch_size"] = session.batch_size
    return stated


def _libraries(columns: Sequence[Column]) -> dict[str, str]:
    """Whose code runs some of these columns, and its version."""
    found = {}
    if any(column.family == "autoattack" for column in columns):
        from bench.attacks.autoattack import source

        code = source()
        found[code.name] = code.version
    if any(column.family.startswith("torchattacks:") for column in columns):
        found["torchattacks"] = metadata.version("torchattacks")
    return found


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
