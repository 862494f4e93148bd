"""Killed at any moment, told to stop, or out of room: started again, everything ends as if nothing had happened."""

import hashlib
import io
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.cli import main
from bench.errors import UsageError
from bench.record import atomic, read_all

ROOT = Path(__file__).parent.parent
#: a network that is slow enough to be hit, and writes down what it is asked to do
PLUGIN = """
import os, time
import torch.nn.functional as F
from torch import nn
import bench
from bench.attacks import pgd
from bench.config import config
from bench.threat import Linf

@config
class Config:
    epochs: int = 30

class Slow(nn.Module):
    def forward(self, x):
        time.sleep(float(os.environ.get("SLOW", "0")))
        return x

@bench.register("mine")
class Mine(bench.Defense[Config]):
    recipes = {"tiny": Config()}

    def build(self, data):
        return nn.Sequential(Slow(), nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.Linear(16, 10))

    def stages(self, data):
        def loss(model, x, y, rng):
            return F.cross_entropy(model(pgd(model, x, y, Linf(0.1), rng=rng, steps=1)), y)
        return [
            bench.Stage(name="first", loss=loss, epochs=self.config.epochs // 2, batch_size=256, lr=0.1),
            bench.Stage(name="second", loss=loss, epochs=self.config.epochs // 2, batch_size=256, lr=0.05, ema=0.9),
        ]
"""
PROTOCOL = 'name = "two"\n[[column]]\nattack = "fgsm"\neps = 0.05\n[[column]]\nattack = "pgd"\nsteps = 5\nrestarts = 2\n'
RUN = [
    *[
        "run",
        "--plugin",
        "mine.py",
        "--defense",
        "mine",
        "--protocol",
        "two.toml",
        "--samples",
        "120",
        "--batch-size",
        "4",
        "--quiet",
    ]
]
TRAIN = [*["train", "--plugin", "mine.py", "--defense", "mine", "--quiet"]]


@pytest.fixture
def place(tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    (tmp_path / "two.toml").write_text(PROTOCOL)
    return tmp_path


#: children are forked from a process that has imported everything, so that what is hit is the work and not the imports
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["bench.cli", "bench.pipeline", "bench.plot", "bench.table", "sklearn.datasets", "test_kills"]
)


def _bench(place, words, slow):
    os.chdir(place)
    os.environ["SLOW"] = str(slow)
    for name, number in (("out.txt", 1), ("err.txt", 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)
    sys.argv = ["bench", *map(str, words)]
    main()


class Bench:
    """`bench` in a process of its own, on its way."""

    def __init__(self, place, words, slow=0.0):
        self.place = place
        self.process = FORKED.Process(target=_bench, args=(place, words, slow))
        self.process.start()

    @property
    def running(self):
        return self.process.is_alive()

    def send(self, number):
        os.kill(self.process.pid, number)

    def ended(self, seconds=120):
        """Exit code, standard output and error."""
        self.process.join(seconds)
        assert not self.running, "it does not end"
        return self.process.exitcode, *((self.place / name).read_text() for name in ("out.txt", "err.txt"))


def finished(place, words):
    code, out, err = Bench(place, words).ended(300)
    assert code == 0, err
    return out


def outcomes(results):
    (record,) = read_all(results)
    return (record._folder / "outcomes.parquet").read_bytes()


def kept(place, pattern):
    """What of it is finished: names and contents' hashes."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in place.glob(pattern)
        if not file.name.startswith(".")
    }


def alive_after(process, locks, seconds, state=None):
    """Whether the process still runs so long after it has claimed its run, or has written another state than this."""
    place = locks.parent.parent
    while not list(locks.glob("*.json")) or (
        state is not None and kept(place, "results/**/state.pt") == state
    ):
        if not process.running:
            return False
        time.sleep(0.002)
    time.sleep(seconds)
    return process.running


def moments(rng, kills, most):
    """After how long each kill comes: some at once, some late."""
    return [rng.uniform(0, most) * rng.choice((0.1, 1)) for _ in range(kills)]


@pytest.mark.slow
def test_an_evaluation_killed_twenty_times_at_random_moments_ends_with_the_same_bytes(place):
    whole = [*RUN, "--results", "whole"]
    finished(place, whole)
    # the weights are trained: what is killed is the evaluation alone
    shutil.copytree(place / "whole" / "checkpoints", place / "results" / "checkpoints")
    killed, rng, done = 0, random.Random(0), {}
    for seconds in moments(rng, 60, 1.0):
        process, locks = Bench(place, RUN, slow=0.003), place / "results" / ".locks"
        hit = alive_after(process, locks, seconds)
        process.send(signal.SIGKILL)
        process.ended()
        now = kept(place, "results/runs/**/parts/*.parquet")
        # nothing that was finished is lost or done again
        assert done.items() <= now.items()
        done = now
        killed += hit
        if killed == 20 or list(read_all(place / "results")):
            break
        for file in locks.glob("*.json"):
            file.unlink()
    print(f"{killed} kills, {len(done)} of 30 batches were kept")
    assert killed == 20, "the run ended before it was killed twenty times"
    finished(place, RUN)
    assert outcomes(place / "results") == outcomes(place / "whole")
    assert not list((place / "results").rglob("*.tmp")) and not list((place / "results").rglob("parts"))


@pytest.mark.slow
def test_a_training_killed_twenty_times_at_random_moments_ends_with_the_same_weights(place):
    (whole,) = finished(place, [*TRAIN, "--results", "whole"]).split()
    killed, rng, epoch, seen = 0, random.Random(1), -1, {}
    for seconds in moments(rng, 60, 0.5):
        process, locks = Bench(place, TRAIN, slow=0.002), place / "results" / ".locks"
        hit = alive_after(process, locks, seconds, None if killed % 2 else seen)
        process.send(signal.SIGKILL)
        process.ended()
        killed += hit
        for file in (place / "results").rglob("state.pt"):
            raw = file.read_bytes()
            assert hashlib.sha256(raw[64:]).hexdigest().encode() == raw[:64]
            state = torch.load(io.BytesIO(raw[64:]), weights_only=True)
            now = 100 * state["stage"] + state["epoch"]
            assert now >= epoch
            epoch = now
        seen = kept(place, "results/**/state.pt")
        if killed == 20 or list((place / "results").rglob("model.safetensors")):
            break
        for file in locks.glob("*.json"):
            file.unlink()
    print(f"{killed} kills, the last state was of stage {epoch // 100}, epoch {epoch % 100}")
    assert epoch > 0
    assert killed == 20, "the training ended before it was killed twenty times"
    (path,) = finished(place, TRAIN).split()
    from safetensors.torch import load_file

    ours, theirs = load_file(place / path), load_file(place / whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not list((place / "results").rglob("*.tmp")) and not list((place / "results").rglob("state.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("words", [RUN, TRAIN], ids=["evaluation", "training"])
def test_a_grace_period_is_enough_wherever_sigterm_comes(place, words):
    rng = random.Random(2)
    for seconds in (0.0, 0.1, 0.3, rng.uniform(0, 1), rng.uniform(0, 1)):
        process = Bench(place, words, slow=0.003)
        alive_after(process, place / "results" / ".locks", seconds)
        process.send(signal.SIGTERM)
        # a batch's step is milliseconds here; schedulers give thirty seconds
        code, _, said = process.ended(30)
        if code == 0:
            break
        assert code == 130, said
        assert "the same command goes on from there" in said.splitlines()[-1]
    finished(place, words)
    finished(place, [*words, "--results", "whole"])
    if words is RUN:
        assert outcomes(place / "results") == outcomes(place / "whole")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    made = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"no small file system can be mounted here: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=False)


def filled(disk, left):
    """A file that leaves so many bytes of a disk."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
        file.truncate(max(0, file.tell() - left))
    return ballast


def test_a_file_that_finds_no_room_leaves_the_old_one_and_nothing_else(small_disk):
    atomic(small_disk / "file", b"old")
    ballast = filled(small_disk, 8192)
    with pytest.raises(
        UsageError, match="No space left on device; choose another folder with --results or free some room"
    ):
        atomic(small_disk / "file", bytes(100_000))
    assert (small_disk / "file").read_bytes() == b"old"
    assert sorted(path.name for path in small_disk.iterdir()) == ["ballast", "file"]
    ballast.unlink()
    atomic(small_disk / "file", b"new")
    assert (small_disk / "file").read_bytes() == b"new"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "left"), [(RUN, 0), (RUN, 16_384), (RUN, 65_536), (TRAIN, 0), (TRAIN, 16_384)]
)
def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(place, small_disk, words, left):
    results = small_disk / "results"
    whole = place / "whole"
    finished(place, [*words, "--results", whole])
    results.mkdir()
    if words is RUN:
        shutil.copytree(whole / "checkpoints", results / "checkpoints")
    ballast = filled(small_disk, left)
    code, out, err = Bench(place, [*words, "--results", results]).ended()
    assert (code, out) == (2, ""), err
    assert err.startswith("bench: ") and err.count("\n") == 1 and "No space left" in err, err
    assert not list(results.rglob("*.tmp")) and not list(results.rglob("record.json"))
    ballast.unlink()
    finished(place, [*words, "--results", results])
    if words is RUN:
        assert outcomes(results) == outcomes(whole)


def test_output_that_finds_no_room_is_one_line():
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with Path("/dev/full").open("w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "bench", "list", "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
    assert process.returncode == 2
    assert (
        process.stderr
        == "bench: no room: No space left on device; free some, the same command goes on from what is kept\n"
    )


def test_sigterm_outside_of_any_batch_is_an_interruption_too(monkeypatch, capsys):
    from bench import cli

    def asked(*words, **more):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr("bench.data.names", asked)
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["bench", "list", "datasets"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130 and "interrupted; what was finished is kept" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
