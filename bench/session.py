"""What was asked, settled: every name, number and file checked before anything is trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from bench import data as datasets
from bench import processes, registry
from bench import protocol as protocols
from bench.arithmetic import emulates_bf16, multiplies_in_tf32
from bench.config import number, replaced
from bench.data import Dataset
from bench.defense import Defense
from bench.errors import UsageError, meant
from bench.fast import Precision
from bench.protocol import Protocol
from bench.threat import threat_model

#: how many images are attacked at once, where nothing else is said
BATCH_SIZE = {"cpu": 256, "cuda": 512}


#: more seeds than this are a slip of the finger
MOST_SEEDS = 10_000

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
    weights: Literal["best", "last"]
    """which network of a training is evaluated"""
    insist: bool
    """whether a random model is evaluated under a protocol for deterministic ones all the same"""
    device: torch.device
    batch_size: int
    precision: Precision
    surrogates: Mapping[str, Job]
    """what `transfer:` columns craft on, by their family"""
    results: Path
    quiet: bool
    say: Say
    ask: Ask | None


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
    weights: Literal["best", "last"] | None = None,
    insist: bool = False,
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
            if column.family.startswith("images:"):
                from bench.attacks.stored import stored

                stored(column.family.split(":", 1)[1])
    if checkpoint is not None and len(kinds) > 1:
        raise UsageError(f"one checkpoint for {len(kinds)} defenses; give --defense one name")
    if weights not in (None, "best", "last"):
        raise UsageError(
            f"no weights {weights!r}; choose best or last{meant(str(weights), ('best', 'last'))}"
        )
    if checkpoint is not None and weights is not None:
        raise UsageError("--weights chooses between two networks of a training; a checkpoint is one")
    if seeds < 1 or seed < 0:
        raise UsageError(f"seed must be at least 0 and seeds at least 1, not {seed} and {seeds}")
    if seeds > MOST_SEEDS or seed + seeds > 2**63:
        raise UsageError(
            f"--seeds counts runs, at most {MOST_SEEDS}, and --seed is less than 2^63; got {seeds} and {seed}"
        )
    jobs = tuple(
        _job(name, kind, _recipe(dataset) if recipe is None else recipe, settings or {})
        for name, kind in kinds.items()
    )
    surrogates = {
        family: _surrogate(family, _recipe(dataset))
        for family in {
            spec.attack for one in asked for spec in one.specs if spec.attack.startswith("transfer:")
        }
    }
    where = _device(device)
    _refuse_precision(precision, where)
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch size must be at least 1, not {batch_size}")
    if samples is not None and not 1 <= samples <= len(data.test):
        raise UsageError(
            f"{data.name} has {len(data.test)} test images; --samples must be from 1 to {len(data.test)}, not {samples}"
        )
    # of many processes one speaks
    say = say if say is not None and processes.rank() == 0 else lambda line: None
    if precision == "bf16" and emulates_bf16(where):
        say(f"{where} has no bf16 and emulates it, many times slower; --precision fp32 is quicker here")
    return Session(
        data=data,
        jobs=jobs,
        protocols=tuple(asked),
        seeds=tuple(range(seed, seed + seeds)),
        samples=samples,
        eps=radius,
        checkpoint=checkpoint,
        weights=weights or "best",
        insist=insist,
        device=where,
        batch_size=batch_size or BATCH_SIZE[where.type],
        precision=precision,
        surrogates=surrogates,
        results=Path(results),
        quiet=quiet or processes.rank() > 0,
        say=say,
        ask=ask if processes.rank() == 0 else None,
    )


def _recipe(dataset: str) -> str:
    """What is trained by where nothing is said."""
    return "tiny" if dataset == "digits" else "fast"


def _surrogate(family: str, recipe: str) -> Job:
    name = family.split(":", 1)[1]
    return _job(name, registry.get(name), recipe, {})


def _job(name: str, kind: type[Defense[Any]], recipe: str, settings: Mapping[str, object]) -> Job:
    if recipe not in kind.recipes:
        there = (
            f"it has {', '.join(kind.recipes)}"
            if kind.recipes
            else "it needs recipes = {'tiny': Config(), ...}"
        )
        raise UsageError(f"{name!r} has no recipe {recipe!r}; {there}{meant(recipe, kind.recipes)}")
    try:
        return Job(name, kind, recipe, replaced(kind.recipes[recipe], settings))
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None


def samples_of(session: Session) -> int:
    """How many test images are evaluated."""
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
    if processes.count() > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        return _own_gpu(processes.local_rank())
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise _no_device(name) from None
    if device.type not in BATCH_SIZE:
        raise _no_device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {name!r} is not there; this machine has {torch.cuda.device_count()} GPUs")
    if device.type == "cuda" and processes.count() > 1:
        raise UsageError(
            f"{name!r} names one GPU for {processes.count()} processes; --device cuda gives each its own"
        )
    return device


def _no_device(name: str) -> UsageError:
    return UsageError(
        f"no device {name!r}; choose auto, cpu, cuda or cuda:0{meant(name, ('auto', 'cpu', 'cuda', 'cuda:0'))}"
    )


def _refuse_precision(precision: str, device: torch.device) -> None:
    """Refuses what is no precision, and TF32 where no GPU multiplies in it.

    Raises:
        UsageError: it is one of these.
    """
    if precision not in get_args(Precision):
        raise UsageError(
            f"no precision {precision!r}; choose fp32, tf32 or bf16{meant(precision, get_args(Precision))}"
        )
    if precision == "tf32" and not multiplies_in_tf32(device):
        raise UsageError(
            f"precision tf32 is how NVIDIA GPUs from Ampere on multiply, and {device} is none of them; choose fp32 or bf16, or --device cuda where there is one"
        )


def _own_gpu(place: int) -> torch.device:
    """The GPU of this one of its machine's processes, which becomes the current one."""
    if place >= torch.cuda.device_count():
        raise UsageError(
            f"this machine has {torch.cuda.device_count()} GPUs and at least {place + 1} processes; choose --nproc-per-node gpu, or --device cpu"
        )
    torch.cuda.set_device(place)
    return torch.device("cuda", place)
