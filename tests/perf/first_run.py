"""A newcomer's first command, timed: `bench run` in an empty folder, nothing trained. Target: under 120 s on two cores.

python tests/perf/first_run.py
"""

import subprocess
import sys
import tempfile
import time

TARGET = 120


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "bench", "run", "--quiet"], cwd=folder, capture_output=True, text=True
        )
        seconds = time.perf_counter() - started
    if done.returncode != 0:
        sys.exit(done.stderr)
    print(done.stdout)
    print(f"{'bench run, nothing trained':40} {seconds:8.1f} s   target {TARGET} s")
    sys.exit(seconds > TARGET)


if __name__ == "__main__":
    main()
