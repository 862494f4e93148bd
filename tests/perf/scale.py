"""The constants of docs/scale.md: what outcomes weigh, what it costs to put them away, to hand out a batch and to read a table.

    python tests/perf/scale.py [--images 50000] [--columns 17] [--batch-size 512] [--records 4]

Outcomes are made up: labels of a thousand classes, half of the images broken, at random. Times are those of one thread's CPU,
so that others on a busy machine count for little; only the store's is on the clock, for it waits.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from made_up import paper_columns, run

from bench.judge import Cost
from bench.outcome import Batch, Outcome
from bench.parts import Parts
from bench.record import find
from bench.table import render


def made_up(rng: np.random.Generator, index: np.ndarray, columns: list[str]) -> Batch:
    """A finished batch of a thousand classes, half of its images broken."""
    labels = torch.from_numpy(rng.integers(0, 1000, len(index)))
    batch = Batch(index, labels.numpy())
    for name in columns:
        wrong = torch.from_numpy(rng.integers(0, 1000, len(index)))
        robust = torch.from_numpy(rng.random(len(index)) < 0.5)
        step = torch.from_numpy(rng.integers(0, 100, len(index)))
        batch.outcomes[name] = Outcome(
            torch.where(robust, labels, wrong),
            robust,
            torch.where(robust, -1, 0),
            torch.where(robust, -1, step),
        )
        batch.costs[name] = Cost(1, 1, 1.0)
    return batch


def hand_out(times: int) -> float:
    """Seconds to hand out one batch: a look for failures, and a number from the store."""
    from bench import processes

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", port, 1, True)
    processes._team = processes.Team(0, 1, store)
    started = time.perf_counter()
    done = sum(1 for _ in processes.share(range(times)))
    assert done == times
    processes._team = None
    return (time.perf_counter() - started) / times


def main() -> None:
    """Prints the constants."""
    parser = argparse.ArgumentParser(description="the constants of docs/scale.md")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--columns", type=int, default=17)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--records", type=int, default=4)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    n, size = given.images, given.batch_size
    columns = [f"c{i}" for i in range(given.columns)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = Parts(folder / "parts")
        batches = [made_up(rng, np.arange(i, min(i + size, n)), columns) for i in range(0, n, size)]
        began = time.process_time()
        for batch in batches:
            parts.add(batch)
        added = time.process_time() - began
        weight = sum(file.stat().st_size for file in (folder / "parts").iterdir())
        began = time.process_time()
        outcomes = Parts(folder / "parts").outcomes(columns)
        assembled = time.process_time() - began
        rows = n * len(columns)
        print(
            f"outcomes.parquet      {len(outcomes) / rows:8.2f} bytes per image and column, {len(outcomes) / 1e6:.2f} MB"
        )
        print(f"parts under way       {weight / rows:8.2f} bytes per image and column, {len(batches)} files")
        print(f"a batch put away      {1e3 * added / len(batches):8.2f} ms")
        print(f"outcomes put together {assembled:8.2f} s")
        print(f"a batch handed out    {1e6 * hand_out(2000):8.1f} µs")
        for i in range(given.records):
            record = run(
                folder / "many", {c.name: rng.random(n) < 0.5 for c in paper_columns()}, defense=f"d{i}", n=n
            )
        began = time.process_time()
        render(folder / "many")
        print(f"a row of bench table  {(time.process_time() - began) / given.records:8.2f} s")
        file = find(folder / "many", record.asked.key) / "record.json"
        print(
            f"record.json           {file.stat().st_size:8} bytes ({os.cpu_count()} CPUs, torch {torch.__version__})"
        )
        few = 1000
        for i in range(20):
            run(
                folder / "few",
                {c.name: rng.random(few) < 0.5 for c in paper_columns()},
                defense=f"d{i}",
                n=few,
            )
        render(folder / "few")
        began = time.process_time()
        render(folder / "few")
        print(f"… of {few} images     {(time.process_time() - began) / 20:8.3f} s")


if __name__ == "__main__":
    main()
