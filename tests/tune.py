"""Compares one or two settings of the `tiny` recipes on held-out training images, every defense with four tries.

    python tests/tune.py [DEFENSE…] > results/measured/tuning.csv

Each line is one training on digits: its settings, and PGD-10 accuracy on the 142 training images that are held out, at the
epoch that was best there. Test images are not looked at. What comes out best is written into the recipe by hand.
"""

import csv
import json
import sys
import tempfile
from itertools import product

from bench.session import prepare
from bench.weights import weigh

#: four tries for each
TRIES = {
    "dwf": {"joint_lr": [0.03, 0.1], "step_size": [0.025, 0.05]},
    "pgd_at": {"lr": [0.05, 0.1], "steps": [4, 7]},
    "fgsm_at": {"lr": [0.03, 0.05, 0.1, 0.2]},
    "advmoe": {"lr": [0.03, 0.1], "batch_size": [32, 64]},
    "soe": {"lr": [0.03, 0.05, 0.1, 0.2]},
}


def main() -> None:
    """Trains and prints."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["defense", "settings", "held_out_pgd10", "seconds"])
    for defense in sys.argv[1:] or TRIES:
        grid = TRIES[defense]
        for values in product(*grid.values()):
            settings = dict(zip(grid, values, strict=True))
            with tempfile.TemporaryDirectory() as folder:
                session = prepare(defense, "digits", settings=settings, results=folder, quiet=True)
                made = weigh(session, session.jobs[0], 0).training
            best = max(row["held_out"] for row in made.stages if row.get("held_out") is not None)
            writer.writerow([defense, json.dumps(settings), f"{100 * best:.2f}", made.seconds])
            sys.stdout.flush()


if __name__ == "__main__":
    main()
