"""The grid behind results/README.md: trains every row, then attacks it, stage after stage.

    python tests/grid.py                          # two CPU cores, some hours; stop and go on at will
    python tests/grid.py --list                   # the stages
    python tests/grid.py 'train:*' '*:dwf-paper'  # some of them; several processes may share the work
    python tests/grid.py --scale gpu --minutes 9  # begin no stage after nine minutes
    python tests/grid.py --keep results/measured  # copies the finished records; weights stay where they are

A stage is `train:ROW` or `ROW:PROTOCOL`. A finished one is found again; one that was stopped goes on, a training from its last
epoch, an evaluation from its last batch.

`--scale cpu` learns from the 5,085 exact training images that a few megabytes hold, `npz:cifar10-exact`: the first 1,017 of each of
CIFAR-10's five training files, and is asked about the first test images. All networks have about 1.6 million parameters, those
of nine ResNet-18 of width 8, and epochs are chosen so that all trainings cost about as many multiply-adds as DWF's: the steps of
one method are not those of another, but what they cost is. `--scale gpu` is the recipe `fast` as it is, on all of CIFAR-10,
and beside it PGD-AT and its kin at nine times the parameters and at DWF's cost.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import click

#: what the paper asks, and what is asked of a mixture; the number to quote comes last, since it costs most
PROTOCOLS = ("dwf-paper", "quick", "adaptive", "calibration", "standard")


@dataclass(frozen=True, eq=False)
class Row:
    """One network of the grid: what is trained, and under which protocols it is evaluated."""

    name: str
    defense: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    protocols: tuple[str, ...] = ("dwf-paper", "adaptive", "standard")
    samples: dict[str, int] = field(default_factory=dict)
    """where it is asked about fewer test images than the others"""


@dataclass(frozen=True)
class Scale:
    """What the machine allows: the images, the test images of each protocol, and the rows."""

    dataset: str
    device: str
    precision: str
    samples: dict[str, int]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Stage:
    """One step of the grid; `protocol` is None for a training."""

    row: Row
    protocol: str | None

    def __str__(self) -> str:
        return f"train:{self.row.name}" if self.protocol is None else f"{self.row.name}:{self.protocol}"


#: of what the paper prints a row of: the radius that would explain it is looked for
ALL = ("dwf-paper", "adaptive", "calibration", "standard")
#: of soft gates, whose gradient PGD has
ABLATION = ("quick",)
#: many attacks for each expert
FEWER = {"adaptive": 250}
#: of a random model; the paper's protocol, which follows single draws, is refused of one
RANDOM = ("adaptive", "standard")
#: nine experts of width 8 are the size of one network of width 24
DENSE = {"width": 24, "batch_size": 64}
DWF = {
    "width": 8,
    "batch_size": 64,
    "pgd_steps": (1, 2, 3, 4, 5),
    "expert_epochs": 6,
    "joint_epochs": 3,
    "joint_lr": 0.05,
}
#: a third of the cost, for the questions that the number of experts does not decide
THREE = DWF | {"fgsm": 1, "pgd": 1}

CPU = Scale(
    dataset="npz:cifar10-exact",
    device="cpu",
    # many processors have no bf16 and are a dozen times slower in it
    precision="fp32",
    samples={"dwf-paper": 1000, "quick": 1000, "adaptive": 1000, "calibration": 500, "standard": 100},
    rows=(
        Row("dwf", "dwf", DWF, (*ALL, *ABLATION)),
        Row("pgd_at", "pgd_at", DENSE | {"epochs": 6, "steps": 5}, ALL),
        Row("trades", "trades", DENSE | {"epochs": 6, "steps": 4}),
        Row("trades-awp", "awp", DENSE | {"base": "trades", "epochs": 5, "steps": 4}),
        Row("fgsm_at", "fgsm_at", DENSE | {"epochs": 19}, ALL),
        Row("resnet18", "resnet18", DENSE | {"epochs": 38}, ALL),
        Row("advmoe", "advmoe", {"width": 32, "batch_size": 64, "epochs": 8}, ALL, FEWER),
        Row("soe", "soe", {"width": 14, "batch_size": 64, "steps": 4, "epochs": 3}, ALL, FEWER),
        Row("rter", "rter", {"width": 12, "batch_size": 64, "steps": 4, "epochs": 6}, samples=FEWER),
        Row("immunity", "immunity", {"width": 12, "batch_size": 64, "steps": 4, "epochs": 6}, RANDOM, FEWER),
        Row("dwf-3", "dwf", THREE, ABLATION),
        Row("dwf-3-fixed", "dwf", THREE | {"fgsm_eps": (8 / 255,), "pgd_steps": (3,)}, ABLATION),
        Row("dwf-3-frozen", "dwf", THREE | {"frozen_experts": True}, ABLATION),
        Row("dwf-3-uniform", "dwf", THREE | {"gate": "uniform"}, ABLATION),
        Row("dwf-1", "dwf", DWF | {"benign": 0, "fgsm": 0, "pgd": 1}, ABLATION),
        Row("dwf-5", "dwf", DWF | {"fgsm": 2, "pgd": 2}, ABLATION),
    ),
)

GPU = Scale(
    dataset="cifar10",
    device="cuda",
    precision="bf16",
    samples={"dwf-paper": 1000, "quick": 1000, "adaptive": 1000, "calibration": 1000, "standard": 1000},
    rows=(
        Row("dwf", "dwf", {}, (*ALL, *ABLATION)),
        Row("pgd_at", "pgd_at", {}, ALL),
        Row("trades", "trades", {}),
        Row("trades-awp", "awp", {"base": "trades"}),
        Row("fgsm_at", "fgsm_at", {}, ALL),
        Row("resnet18", "resnet18", {}, ALL),
        Row("advmoe", "advmoe", {}, ALL),
        Row("soe", "soe", {}, ALL),
        Row("rter", "rter"),
        Row("immunity", "immunity", {}, RANDOM),
        # nine times the parameters of a network of width 64, and 173 passes of that size, which is what DWF's training costs
        Row("pgd_at-large", "pgd_at", {"width": 192, "epochs": 16}),
        Row("trades-large", "trades", {"width": 192, "epochs": 14}),
        Row("trades-awp-large", "awp", {"base": "trades", "width": 192, "epochs": 12}),
        Row("dwf-fixed", "dwf", {"fgsm_eps": (8 / 255,), "pgd_steps": (5,)}, ABLATION),
        Row("dwf-frozen", "dwf", {"frozen_experts": True}, ABLATION),
        Row("dwf-uniform", "dwf", {"gate": "uniform"}, ABLATION),
        Row("dwf-1", "dwf", {"benign": 0, "fgsm": 0, "pgd": 1}, ABLATION),
        Row("dwf-3", "dwf", {"fgsm": 1, "pgd": 1}, ABLATION),
        Row("dwf-5", "dwf", {"fgsm": 2, "pgd": 2}, ABLATION),
    ),
)
SCALES = {"cpu": CPU, "gpu": GPU}


def stages(scale: Scale) -> Iterator[Stage]:
    """Everything there is to do: the trainings, then protocol after protocol."""
    for row in scale.rows:
        yield Stage(row, None)
    for protocol in PROTOCOLS:
        for row in scale.rows:
            if protocol in row.protocols:
                yield Stage(row, protocol)


def session_of(
    scale: Scale,
    stage: Stage,
    *,
    results: Path,
    seed: int = 0,
    data_dir: Path | None = None,
    precision: str | None = None,
):
    """The stage as `bench train` or `bench run` would ask it."""
    from bench.session import prepare

    return prepare(
        stage.row.defense,
        scale.dataset,
        stage.protocol or "adaptive",
        recipe="fast",
        settings=dict(stage.row.settings),
        seed=seed,
        samples=None if stage.protocol is None else (scale.samples | stage.row.samples)[stage.protocol],
        device=scale.device,
        precision=precision or scale.precision,
        data_dir=data_dir,
        results=results,
        quiet=True,
        say=click.echo,
    )


def do(scale: Scale, stage: Stage, **where: Any) -> str:
    """Does a stage, or finds it done; what it came to, in a line."""
    from bench.long import groups
    from bench.pipeline import run_session
    from bench.weights import weigh

    session = session_of(scale, stage, **where)
    if stage.protocol is None:
        made = weigh(session, session.jobs[0], session.seeds[0]).training
        return f"{made.parameters:,} parameters, {made.passes} passes of {made.multiply_adds / 1e6:.1f} M, {made.seconds:.0f} s"
    records = run_session(session)
    group = groups(records)[0]
    last = group.columns[-1]
    return f"{last.name} {last.accuracy:.2f} %, {records[0].verdict}, {records[0].where.seconds:.0f} s"


def name_of(record) -> str:
    """The row of the grid whose network a record is of; the defense's own name where there is none."""
    for row in (
        row for scale in SCALES.values() for row in scale.rows if row.defense == record.asked.defense
    ):
        if asked_of(row) == record.asked.config:
            return row.name
    return record.asked.defense


@cache
def asked_of(row: Row) -> dict[str, Any]:
    """The config of a row, as a record has it."""
    from bench import registry
    from bench.config import as_json, replaced

    return as_json(replaced(registry.get(row.defense).recipes["fast"], row.settings))


def keep(results: Path, out: Path) -> int:
    """Copies the records of finished runs, and nothing else; how many there are."""
    found = sorted(results.glob("runs/*/*/*/record.json"))
    for record in found:
        to = out / record.parent.relative_to(results)
        to.mkdir(parents=True, exist_ok=True)
        for file in record.parent.iterdir():
            if file.is_file():
                shutil.copyfile(file, to / file.name)
    return len(found)


@click.command()
@click.argument("patterns", nargs=-1)
@click.option("--scale", "name", type=click.Choice(list(SCALES)), default="cpu", show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default="results/grid", show_default=True)
@click.option("--data-dir", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--precision",
    type=click.Choice(["bf16", "fp32"]),
    help="Of the gradients: fp32, or bf16 at the scale gpu, where nothing is said.",
)
@click.option("--minutes", type=float, help="Begin no stage after so many.")
@click.option("--list", "listed", is_flag=True, help="Print the stages, and do nothing.")
@click.option("--keep", "out", type=click.Path(path_type=Path), help="Copy the finished records there.")
def main(
    patterns: tuple[str, ...],
    name: str,
    results: Path,
    data_dir: Path | None,
    seed: int,
    precision: str | None,
    minutes: float | None,
    listed: bool,
    out: Path | None,
) -> None:
    """Runs the grid, or those of its stages that a pattern names."""
    if out is not None:
        click.echo(f"{keep(results, out)} records are in {out}")
        return
    scale, began = SCALES[name], time.monotonic()
    where = {"results": results, "seed": seed, "data_dir": data_dir, "precision": precision}
    asked = [s for s in stages(scale) if not patterns or any(fnmatch(str(s), p) for p in patterns)]
    if not asked:
        raise click.UsageError(f"no stage is called {' or '.join(patterns)}; see --list")
    for stage in asked:
        if listed:
            click.echo(str(stage))
        elif minutes is not None and time.monotonic() - began > 60 * minutes:
            click.echo(f"{minutes:g} minutes are over; the same command goes on with {stage}")
            return
        else:
            click.echo(f"{stage}: {do(scale, stage, **where)}")


if __name__ == "__main__":
    main()
