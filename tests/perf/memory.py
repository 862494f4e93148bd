"""Peak memory of evaluating ResNet-18 (width 64) on 32×32 images at batch 128. Target: under 1.5 GB.

python tests/perf/memory.py
"""

import resource
import sys

import numpy as np

from baselines.resnet import resnet18
from bench import protocol as protocols
from bench.data import Split
from bench.evaluate import Evaluator
from bench.model import Normalized
from bench.plan import plan

TARGET = 1.5


def main() -> None:
    generator = np.random.default_rng(0)
    split = Split(
        generator.integers(0, 256, (128, 32, 32, 3), dtype=np.uint8), generator.integers(0, 10, 128)
    )
    model = Normalized(resnet18(channels=3, classes=10), (0.5,) * 3, (0.25,) * 3)
    # every image counts as right, or an untrained network would leave nothing to attack
    x, _ = split.batch(slice(None))
    split = Split(split.images, model.eval()(x).argmax(1).numpy())
    evaluator = Evaluator(model, classes=10, split=split, seed=0, success="last")
    protocol = protocols.load("dwf-paper").columns(1e-4)
    evaluator.run(plan([c for c in protocol if c.steps <= 10]), np.arange(128))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{'ResNet-18, batch 128: peak memory':40} {peak:8.2f} GB   target {TARGET} GB")
    sys.exit(peak > TARGET)


if __name__ == "__main__":
    main()
