"""One process works on a run or a training; the others wait and say for whom; and nobody's files are lost or mixed."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from bench import claim as claims
from bench import processes
from bench.claim import claim
from bench.errors import UsageError
from bench.record import atomic, read_all

ROOT = Path(__file__).parent.parent
HOLD = """
import sys, time
from pathlib import Path
from bench.claim import claim
results = Path(sys.argv[1])
with claim(results, results / "runs" / "one", print):
    print("has it", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def one(tmp_path):
    return tmp_path / "runs" / "one"


@pytest.fixture
def elsewhere(tmp_path):
    """Another process that has claimed `runs/one`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "has it\n"
    yield process
    process.kill()
    process.communicate()


def test_whoever_waits_says_for_whom_and_goes_on_when_they_are_done(tmp_path, one, elsewhere):
    said = []

    def hear(line):
        said.append(line)
        elsewhere.send_signal(signal.SIGKILL)

    with claim(tmp_path, one, hear):
        pass
    (line,) = said
    assert (
        line.startswith(f"process {elsewhere.pid} on ") and f"works on {one}; this one waits for it" in line
    )


def test_a_lock_ends_with_the_process_that_had_it(tmp_path, one, elsewhere):
    elsewhere.send_signal(signal.SIGKILL)
    elsewhere.wait()
    assert list((tmp_path / ".locks").glob("*.lock"))
    said = []
    with claim(tmp_path, one, said.append):
        assert said == []


def test_other_folders_are_free(tmp_path, one, elsewhere):
    said = []
    with claim(tmp_path, one.with_name("two"), said.append):
        assert said == []


def test_waiting_can_be_given_up(tmp_path, one, elsewhere):
    def hear(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), claim(tmp_path, one, hear):
        raise AssertionError("two have it")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": 1}', b"[" * 5000])
def test_a_holder_that_has_not_said_who_it_is_is_another_process(tmp_path, content):
    (tmp_path / "who.json").write_bytes(content)
    assert claims.holder(tmp_path / "who.json") == "another process"
    assert claims.holder(tmp_path / "none.json") == "another process"


def test_a_file_system_without_locks_is_said_and_the_work_is_done(tmp_path, one, monkeypatch):
    def refuse(self, **how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    said = []
    with claim(tmp_path, one, said.append):
        atomic(one / "file", b"done")
    assert "without locks" in said[0] and (one / "file").read_bytes() == b"done"


def test_workers_of_one_launch_are_one_asker(tmp_path, one, elsewhere, monkeypatch):
    monkeypatch.setattr(processes, "rank", lambda: 3)
    with claim(tmp_path, one, print, together=True):
        pass


def test_what_a_killed_process_left_half_written_is_removed(tmp_path, one):
    (one / "parts").mkdir(parents=True)
    for left in (one / ".record.json.a1.tmp", one / "parts" / ".0-1-2.parquet.b2.tmp"):
        left.write_bytes(b"half")
    (one / "notes.tmp").write_bytes(b"mine")
    with claim(tmp_path, one, print):
        assert sorted(file.name for file in one.rglob("*") if file.is_file()) == ["notes.tmp"]


@pytest.mark.parametrize("link", ["runs", "runs/one", "runs/one/parts"])
def test_nothing_is_written_through_a_link_out_of_the_results_folder(tmp_path, link):
    outside, results = tmp_path / "outside", tmp_path / "results"
    (outside / "parts").mkdir(parents=True)
    (outside / "parts" / "theirs.parquet").write_bytes(b"theirs")
    (results / link).parent.mkdir(parents=True)
    (results / link).symlink_to(outside)
    with (
        pytest.raises(UsageError, match="leads out of the results folder"),
        claim(results, results / "runs/one", print),
    ):
        raise AssertionError("it was written")
    assert [file.name for file in outside.rglob("*") if file.is_file()] == ["theirs.parquet"]


def test_a_link_in_a_circle_is_a_line(tmp_path):
    (tmp_path / "runs").symlink_to("runs")
    with pytest.raises(UsageError, match="circle"), claim(tmp_path, tmp_path / "runs/one", print):
        raise AssertionError("it was written")


def test_the_results_folder_itself_may_be_a_link(tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "results").symlink_to(tmp_path / "large")
    with claim(tmp_path / "results", tmp_path / "results" / "runs/one", print):
        pass


def test_a_file_that_is_a_link_is_replaced_and_its_target_left_alone(tmp_path):
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / "record.json").symlink_to(tmp_path / "theirs")
    atomic(tmp_path / "record.json", b"ours")
    assert (tmp_path / "theirs").read_bytes() == b"theirs" and not (tmp_path / "record.json").is_symlink()


def _write(results, number):
    import made_up

    for seed in range(6):
        # half of the runs are the same for all processes, half are their own
        made_up.run(results, {"clean": 150}, seed=seed if seed % 2 else 100 * number + seed)


@pytest.mark.slow
def test_eight_processes_that_write_to_one_folder_lose_and_corrupt_nothing(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_write, args=(tmp_path, number)) for number in range(8)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        if (tmp_path / "runs").is_dir():
            # whatever a reader sees meanwhile is whole
            for record in read_all(tmp_path):
                assert len(record.outcomes()) == 17 * 200
        time.sleep(0.05)
    assert [process.exitcode for process in processes] == [0] * 8
    seeds = sorted(record.asked.seed for record in read_all(tmp_path))
    assert seeds == sorted({*(1, 3, 5), *(100 * number + seed for number in range(8) for seed in (0, 2, 4))})
    assert not list(tmp_path.rglob("*.tmp"))


PLUGIN = """
import os, time
from pathlib import Path
import torch.nn.functional as F
from torch import nn
import bench
from bench.config import config

@config
class Config:
    epochs: int = 8

@bench.register("mine")
class Mine(bench.Defense[Config]):
    recipes = {"tiny": Config()}

    def build(self, data):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def stages(self, data):
        def loss(model, x, y, rng):
            with open("steps.txt", "a") as file:
                file.write(f"{os.getpid()}\\n")
            return F.cross_entropy(model(x), y)
        return [bench.Stage(name="s", loss=loss, epochs=8, batch_size=128, lr=0.5)]
"""


@pytest.mark.slow
def test_eight_processes_that_are_asked_the_same_do_it_once(tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    words = [
        "run",
        "--plugin",
        "mine.py",
        "--defense",
        "mine",
        "--protocol",
        "quick",
        "--samples",
        "40",
        "--quiet",
        "--json",
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "bench", *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, said
    assert len({out for out, _ in said}) == 1 and json.loads(said[0][0])
    steps = (tmp_path / "steps.txt").read_text().split()
    # eight epochs of ten batches of 128, and a few steps before them that tell how long it will take
    assert len(set(steps)) == 1 and 80 <= len(steps) < 160
    assert sum("works on" in err for _, err in said) >= 1
    (record,) = read_all(tmp_path / "results")
    assert not (record._folder / "parts").exists()
