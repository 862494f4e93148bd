"""How cost grows: time with images, with gradient passes and with records, and memory with images.

    python tests/perf/growth.py [--images 128 256 512 1024 2048] [--steps 10 20 40 80 160] [--records 10 30 100 300]
                                [--batch-size 128] [--rounds 5] [--out DIR]

A small network is attacked by PGD through `bench.evaluate`, batch by batch as `bench run` does it, on digits, repeated where
there are too few. Times are those of one thread's CPU, so that others on a busy machine count for little; sizes take turns, and
each one's median round counts. A fixed cost a is what t = a + b·n leaves at n = 0 (least squares of relative errors), and
growth is the slope of log(t - a) against log n. Time should be linear in images, in gradient passes and in records: a slope from 0.9 to 1.1.
Memory should not grow with images: more of them, of 48×48 pixels, may take less than the images themselves would as floats.
An exit code of 1 says that something grows otherwise. With --out the curves are drawn, as growth.png and growth.pdf.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from baselines.resnet import resnet18
from bench.data import Split, load
from bench.evaluate import Evaluator
from bench.model import Normalized
from bench.plan import plan
from bench.protocol import Column
from bench.table import render

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SLOPES = (0.9, 1.1)
#: of the images whose memory is measured; they must be large beside what an allocator keeps to itself
SHAPE = (48, 48, 3)
EPS = 1e-4


def repeated(n: int) -> np.ndarray:
    """Digits, uint8 `(n, 8, 8, 1)`, as many as asked for."""
    data = load("digits")
    images = np.concatenate([data.test.images, data.train.images])
    return images[np.arange(n) % len(images)]


def subject(images: np.ndarray) -> Evaluator:
    """A small untrained network, every image labelled as it says, so that all of them are attacked to the end."""
    torch.manual_seed(0)
    c = images.shape[3]
    model = Normalized(resnet18(channels=c, classes=10, width=8), (0.3,) * c, (0.4,) * c).eval()
    split = Split(images, np.zeros(len(images), dtype=np.int64))
    with torch.no_grad():
        starts = range(0, len(images), 128)
        labels = [model(split.batch(slice(i, i + 128))[0]).argmax(1).numpy() for i in starts]
    split = Split(images, np.concatenate(labels))
    return Evaluator(model, classes=10, split=split, seed=0, success="last", trained=False)


def evaluate(evaluator: Evaluator, n: int, steps: int, batch_size: int) -> int:
    """The first `n` images under PGD of so many steps; the gradients it took."""
    pgd = Column(
        name="pgd", attack="pgd", family="pgd", eps=EPS, steps=steps, step_size=EPS / 400, random_start=False
    )
    programs = plan([Column(name="clean", attack="clean", family="clean"), pgd])
    batches = [np.arange(i, min(i + batch_size, n)) for i in range(0, n, batch_size)]
    return sum(evaluator.run(programs, index).costs["pgd"].gradients for index in batches)


def in_turn(sizes: Sequence[int], rounds: int, work: Callable[[int], object]) -> list[float]:
    """CPU seconds of each size's median round, after one that counts for nothing."""
    took: dict[int, list[float]] = {size: [] for size in sizes}
    work(sizes[0])
    for turn in range(rounds):
        for size in sizes if turn % 2 else reversed(sizes):
            started = time.process_time()
            work(size)
            took[size].append(time.process_time() - started)
    return [statistics.median(took[size]) for size in sizes]


def slope(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Of log(t - a) against log n, and the fixed cost a, which is at least 0 and below the least time."""
    n, t = np.array(sizes, dtype=float), np.array(seconds)
    _, fixed = np.polyfit(n, t, 1, w=1 / t)
    fixed = min(max(fixed, 0.0), 0.9 * t.min())
    return float(np.polyfit(np.log(n), np.log(t - fixed), 1)[0]), float(fixed)


def tables(folder: Path, counts: Sequence[int]) -> Callable[[int], object]:
    """What `bench table` does with that many made-up records, once Python has started."""
    from made_up import run as made_up

    for count in counts:
        for i in range(count):
            made_up(folder / str(count), defense=f"d{i}", n=1000)
    return lambda count: render(folder / str(count))


def peaks(counts: Sequence[int], batch_size: int) -> list[float]:
    """MB that a process of its own has taken at most when it has evaluated so many images of shape `SHAPE`."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import numpy, growth\n"
        f"images = numpy.random.default_rng(0).integers(0, 256, {(max(counts), *SHAPE)}, dtype='uint8')\n"
        "evaluator = growth.subject(images)\n"
        f"for n in {sorted(counts)}:\n"
        f"    growth.evaluate(evaluator, n, 2, {batch_size})\n"
        "    print(growth.most_memory())"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return [float(line) for line in done.stdout.split()]


def most_memory() -> float:
    """MB that this process has taken at most."""
    status = Path("/proc/self/status")
    if status.exists():
        # on Linux getrusage would tell of the parent's as well
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    # bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def draw(curves: dict[str, tuple[Sequence[int], Sequence[float], str]], out: Path) -> None:
    import matplotlib.pyplot as plt

    out.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, len(curves), figsize=(3.2 * len(curves), 3), layout="constrained")
    for ax, (what, (sizes, values, label)) in zip(axes, curves.items(), strict=True):
        ax.loglog(sizes, values, "o-", label="measured")
        if label == "s":
            ax.loglog(sizes, np.array(sizes) * values[-1] / sizes[-1], ":", color="grey", label="slope 1")
            ax.legend(frameon=False)
        else:
            ax.set_ylim(min(values) / 3, max(values) * 3)
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.minorticks_off()
        ax.set(xlabel=what, ylabel="peak memory, MB" if label == "MB" else "seconds")
    for end in ("png", "pdf"):
        figure.savefig(out / f"growth.{end}")
        print(out / f"growth.{end}")


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables; 1 where something does not grow as it should."""
    parser = argparse.ArgumentParser(description="how time and memory grow")
    parser.add_argument("--images", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 40, 80, 160])
    parser.add_argument("--records", type=int, nargs="+", default=[10, 30, 100, 300])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where the curves are drawn; nowhere by default")
    given = parser.parse_args(arguments)
    for sizes in (given.images, given.steps, given.records):
        if sizes != sorted(set(sizes)) or len(sizes) < 2:
            parser.error("give two sizes or more, rising")
    torch.set_num_threads(1)
    size = given.batch_size
    evaluator = subject(repeated(max(given.images)))
    curves: dict[str, tuple[Sequence[int], Sequence[float], str]] = {}
    bad = False

    def grows(what: str, sizes: Sequence[int], work: Callable[[int], object], rounds: int) -> None:
        nonlocal bad
        seconds = in_turn(sizes, rounds, work)
        found, fixed = slope(sizes, seconds)
        bad |= not SLOPES[0] <= found <= SLOPES[1]
        for n, t in zip(sizes, seconds, strict=True):
            print(f"{n:6} {what:18} {t:8.3f} s   {1000 * (t - fixed) / n:8.3f} ms each")
        print(
            f"slope of log time {found:.2f} beyond {fixed:.3f} s, to be {SLOPES[0]} to {SLOPES[1]}\n",
            flush=True,
        )
        curves[what] = (sizes, seconds, "s")

    grows("images", given.images, lambda n: evaluate(evaluator, n, 10, size), given.rounds)
    for steps in given.steps:
        taken = evaluate(evaluator, size, steps, size)
        if taken != size * steps:
            raise AssertionError(f"PGD-{steps} took {taken} gradients of {size} images")
    grows("gradient passes", given.steps, lambda k: evaluate(evaluator, size, k, size), given.rounds)
    memory = peaks(given.images, size)
    for n, megabytes in zip(given.images, memory, strict=True):
        print(f"{n:6} {'images':18} {megabytes:8.1f} MB at most")
    more = memory[-1] - memory[0]
    allowed = np.prod(SHAPE) * (given.images[-1] - given.images[0]) * 4 / 2**20
    bad |= more > allowed
    print(
        f"{more:.1f} MB more for the most, to be less than {allowed:.1f} MB, once these images as floats\n",
        flush=True,
    )
    curves["images in memory"] = (given.images, memory, "MB")
    with tempfile.TemporaryDirectory() as folder:
        grows("records in a table", given.records, tables(Path(folder), given.records), given.rounds)
    if given.out:
        draw(curves, given.out)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
