"""How long the small commands take: help, list, and a table over 200 records.

    python tests/perf/startup.py

Targets on two cores: 0.4 s, 1.5 s, 2 s; the best of several runs, since a shared machine only ever adds.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

RECORDS = 200


def best_of(words: list[str], rounds: int = 5) -> float:
    def once() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "bench", *words], check=True, capture_output=True)
        return time.perf_counter() - started

    return min(once() for _ in range(rounds))


def main() -> None:
    from made_up import run as made_up

    missed = False
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(RECORDS // 20):
            for defense in range(20):
                made_up(Path(folder), defense=f"d{defense}", seed=seed, n=1000)
        found = len(list(Path(folder).glob("runs/*/*/*/record.json")))
        commands = [
            ("bench --help", ["--help"], 0.4),
            ("bench list", ["list"], 1.5),
            (f"bench table, {found} records", ["table", "--results", folder], 2.0),
        ]
        for name, words, target in commands:
            seconds = best_of(words)
            missed |= seconds > target
            print(f"{name:40} {seconds:8.2f} s   target {target} s")
    sys.exit(missed)


if __name__ == "__main__":
    main()
