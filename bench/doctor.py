"""What this machine has, where data and results are, and what would make it faster."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

#: what brings something more where it is installed, and what that is
OPTIONAL = {
    "torchattacks": "--attack torchattacks:NAME",
    "robustbench": "robustbench:NAME as a defense",
    "autoattack": "the authors' own package in place of pyautoattack",
    "nbclient": "runs examples/own_model.ipynb as a test does",
    "mkdocs": "tox run -e docs",
}
#: the datasets that need files, and what shows in the data folder that they are there
FILES = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
    "svhn": ("train_32x32.mat", "test_32x32.mat"),
    "tiny-imagenet": ("tiny-imagenet-200",),
}
#: instructions of a CPU that multiply matrices of small numbers, by what /proc/cpuinfo calls them
MATRIX = {"amx_bf16": "AMX bf16", "avx512_bf16": "AVX-512 bf16", "avx512f": "AVX-512", "avx2": "AVX2"}
GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """An accelerator."""

    name: str
    memory: int
    """bytes"""
    bf16: bool


@dataclass(frozen=True)
class Machine:
    """What there is to compute with."""

    system: str
    cpu: str
    cores: int
    """that this process may use"""
    load: float
    """processes that ran or waited during the last minute, on average"""
    memory: int
    """bytes, that this process may use"""
    free: int
    """bytes of it that nobody uses"""
    instructions: list[str]
    """of the CPU, for matrices"""
    gpus: list[Gpu]
    threads: int
    """that torch uses"""
    python: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Place:
    """Where something is, and what is there."""

    path: str
    there: list[str]


@dataclass(frozen=True)
class Health:
    """Everything that `bench doctor` says."""

    machine: Machine
    data: Place
    checkpoints: Place
    runs: Place
    disk: int
    """bytes that are free where results go"""
    packages: dict[str, str | None]
    """optional ones: their version, or None where they are not installed"""
    advice: list[str]

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def examine(results: Path, data_dir: Path | None = None) -> Health:
    """Looks at the machine, the data and the results; changes nothing."""
    machine = this_machine()
    data_dir = data_dir or Path(os.environ.get("BENCH_DATA") or "data")
    packages = {name: version(name) for name in OPTIONAL}
    disk = shutil.disk_usage(existing(results)).free
    return Health(
        machine=machine,
        data=Place(str(data_dir), datasets(data_dir)),
        checkpoints=Place(str(results / "checkpoints"), trainings(results)),
        runs=Place(str(results / "runs"), runs(results)),
        disk=disk,
        packages=packages,
        advice=advice(machine, disk),
    )


def this_machine() -> Machine:
    """The machine as torch and the system see it."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        # from Ampere on the hardware has it; torch calls what it emulates supported too
        gpus.append(Gpu(properties.name, properties.total_memory, properties.major >= 8))
    about, flags = cpu(read("/proc/cpuinfo"))
    memory = meminfo(read("/proc/meminfo"))
    total, free = memory.get("MemTotal", physical()), memory.get("MemAvailable", 0)
    limit = read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        total = min(total, int(limit))
    versions = {name: version(name) or "not installed" for name in ("torch", "torchvision", "timm", "numpy")}
    if torch.version.cuda:
        versions["CUDA"] = torch.version.cuda
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        cpu=about or platform.processor() or platform.machine(),
        cores=cores(read("/sys/fs/cgroup/cpu.max")),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        memory=total,
        free=min(free, total),
        instructions=[name for flag, name in MATRIX.items() if flag in flags],
        gpus=gpus,
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        versions=versions,
    )


def advice(machine: Machine, disk: int) -> list[str]:
    """What would make it faster, the most first."""
    said = []
    bf16 = any("bf16" in name for name in machine.instructions) or any(gpu.bf16 for gpu in machine.gpus)
    torch = machine.versions.get("torch", "")
    if not machine.gpus:
        said.append("no GPU: with one, everything but digits is much faster")
        if "+cpu" in torch:
            said.append(f"torch {torch} cannot use a GPU; where there is one, install torch with CUDA")
    if bf16:
        said.append("bf16 is quick here: --precision bf16 for gradients (judging stays fp32)")
    if not machine.gpus and machine.threads < machine.cores:
        said.append(
            f"torch uses {machine.threads} of {machine.cores} cores; unset OMP_NUM_THREADS, or set it to {machine.cores}, for networks larger than those of digits"
        )
    if machine.threads > machine.cores:
        said.append(
            f"torch uses {machine.threads} threads on {machine.cores} core(s); set OMP_NUM_THREADS={machine.cores}"
        )
    if machine.load > 1.5 * machine.cores:
        said.append(
            f"the machine is busy: {machine.load:.1f} processes for {machine.cores} core(s) during the last minute"
        )
    if 0 < machine.free < 2 * GIB:
        said.append(
            f"{machine.free / GIB:.1f} GiB of memory are free; a smaller --batch-size keeps it from swapping"
        )
    if disk < GIB:
        said.append(f"{disk / GIB:.2f} GiB are free on the disk of the results; checkpoints may not fit")
    said.append("`bench speed` measures how long each protocol and training takes here")
    return said


def cores(quota: str = "") -> int:
    """How many this process may use: those it is bound to, or fewer where a container has a quota."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most, _, period = quota.strip().partition(" ")
    if most.isdigit() and period.isdigit():
        there = min(there, max(1, int(most) // int(period)))
    return there


def cpu(info: str) -> tuple[str, set[str]]:
    """The name and the flags of the first CPU in the text of /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in info.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields.get("model name", ""), set(fields.get("flags", fields.get("Features", "")).split())


def meminfo(info: str) -> dict[str, int]:
    """Bytes by name, from the text of /proc/meminfo."""
    found = {}
    for line in info.splitlines():
        name, _, value = line.partition(":")
        amount, _, unit = value.strip().partition(" ")
        if amount.isdigit():
            found[name] = int(amount) * (1024 if unit == "kB" else 1)
    return found


def physical() -> int:
    """Bytes of memory where there is no /proc; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def read(path: str) -> str:
    """The text of a file of the system; empty where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def version(package: str) -> str | None:
    """The version of an installed package, which is not imported; None where it is not installed."""
    # not what can be found on the path: the wheel of torchattacks leaves a broken `robustbench` there
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def existing(path: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.is_dir())


def datasets(data_dir: Path) -> list[str]:
    """The datasets whose files are there; digits come with scikit-learn."""
    return [
        "digits",
        *(name for name, files in FILES.items() if any((data_dir / file).exists() for file in files)),
    ]


def trainings(results: Path) -> list[str]:
    """What is trained: defense, dataset, recipe."""
    from bench.listing import trained

    return [f"{name} on {one}" for name, found in trained(results).items() for one in found]


def runs(results: Path) -> list[str]:
    """The finished runs."""
    return [
        file.parent.relative_to(results / "runs").as_posix()
        for file in sorted(results.glob("runs/*/*/*/record.json"))
    ]


def as_text(health: Health) -> str:
    """In words, a fact a line."""
    m = health.machine
    gpus = [f"{gpu.name}, {gpu.memory / GIB:.0f} GiB, {'bf16' if gpu.bf16 else 'no bf16'}" for gpu in m.gpus]
    rows: list[tuple[str, str]] = [
        ("machine", f"{m.system}, {m.cpu}"),
        ("cores", f"{m.cores}, torch uses {m.threads} thread(s); load {m.load:.1f}"),
        ("memory", f"{m.memory / GIB:.1f} GiB, {m.free / GIB:.1f} GiB free"),
        ("accelerator", "; ".join(gpus) or "none"),
        ("instructions", ", ".join(m.instructions) or "none that are known"),
        ("versions", _pairs({"python": m.python, **m.versions})),
        ("data", f"{health.data.path}: {', '.join(health.data.there)}"),
        ("checkpoints", f"{health.checkpoints.path}: {_some(health.checkpoints.there)}"),
        ("runs", f"{health.runs.path}: {_some(health.runs.there)}"),
        ("disk", f"{health.disk / GIB:.0f} GiB free"),
    ]
    rows += [
        (name, version or f"not installed; it brings: {OPTIONAL[name]}")
        for name, version in health.packages.items()
    ]
    lines = [f"{name:13} {said}" for name, said in rows]
    return "\n".join([*lines, "what would help:", *(f"  {line}" for line in health.advice)])


def _pairs(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _some(names: Iterable[str], most: int = 4) -> str:
    """How many there are, and the first of them."""
    names = list(names)
    if not names:
        return "none yet"
    return f"{len(names)}: {', '.join(names[:most])}{', …' if len(names) > most else ''}"
