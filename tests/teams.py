"""Several processes at one piece of work, as torchrun would start them; forked, so that none imports torch anew."""

import importlib
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.cli import main

# what commands import late is imported here, once for all children
for late in (
    "bench.pipeline",
    "bench.plot",
    "bench.table",
    "sklearn.datasets",
    "sklearn.model_selection",
    "statsmodels.stats.contingency_tables",
    "torch._dynamo",
    "torchvision",
):
    importlib.import_module(late)

#: seconds after which a team is taken to hang
HANGS = 300.0


class Said(NamedTuple):
    """How a command ended in one process."""

    code: int
    out: str
    err: str


def together(count: int, work: Callable[[], Any], folder: Path) -> list[Any]:
    """What the work returns in each of so many processes."""
    codes = _fork(count, lambda rank: (folder / f"{rank}.pickle").write_bytes(pickle.dumps(work())), folder)
    for rank, code in enumerate(codes):
        assert code == 0, (folder / f"{rank}.err").read_text()
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(count)]


def command(count: int, arguments: list[str], folder: Path) -> list[Said]:
    """What `bench` with these arguments says in each of so many processes, and its exit codes."""

    def work(rank: int) -> None:
        sys.argv = ["bench", *arguments]
        main()

    codes = _fork(count, work, folder)
    texts = [[(folder / f"{rank}.{kind}").read_text() for kind in ("out", "err")] for rank in range(count)]
    return [Said(code, *text) for code, text in zip(codes, texts, strict=True)]


def _fork(count: int, work: Callable[[int], Any], folder: Path) -> list[int]:
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    children = []
    for rank in range(count):
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _child(rank, count, port, work, folder)
        children.append(child)
    return [_ended(child, children) for child in children]


def _child(rank: int, count: int, port: int, work: Callable[[int], Any], folder: Path) -> None:
    code = 1
    try:
        for kind, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(folder / f"{rank}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        torch.set_num_threads(1)
        work(rank)
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # nothing of pytest's is to run here
        os._exit(code)


def _ended(child: int, children: list[int]) -> int:
    """The exit code of a child; all are killed where it hangs."""
    until = time.monotonic() + HANGS
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for one in children[children.index(child) :]:
        os.kill(one, signal.SIGKILL)
        os.waitpid(one, 0)
    raise AssertionError(f"the processes hang after {HANGS} s")
