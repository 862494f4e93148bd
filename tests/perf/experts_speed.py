"""Nine ResNet-18 experts: one grouped program against one after another, and both against nine single networks.

    python tests/perf/experts_speed.py [--device cpu] [--rounds 3]

Input gradients in eval mode, folded and channels-last as attacks take them; one network alone is the yardstick. The
three are timed in turn, so that a busy machine slows all of them; the best of several rounds is shown. Target of the
way that `Experts` takes: at least 0.95 of nine times a single network's throughput.
"""

import argparse
import sys
import time
from functools import partial

import torch
from torch import nn

from baselines.resnet import resnet18
from bench.attacks.gradient import input_gradient
from bench.attacks.losses import cross_entropy
from bench.evaluate import PIXELS_AT_ONCE
from bench.fast import fast
from bench.moe import Experts

EXPERTS, TARGET = 9, 0.95


class Mean(nn.Module):
    """The experts' mean logits, in the way that `Experts` takes."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x):
        return self.experts(x).mean(1)


class Grouped(nn.Module):
    """The same as one grouped program, whatever the images' size."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.net = experts.net

    def forward(self, x):
        return self.net(x.repeat(1, EXPERTS, 1, 1)).mean(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    device = torch.device(args.device)
    missed = False
    print(
        f"{'width':>6} {'image':>7} {'single ms':>10} {'taken':>7} {'grouped':>9} {'one by one':>11}   (throughput against nine times a single one)"
    )
    for width, size, batch in ((8, 8, 128), (16, 8, 128), (16, 32, 128), (64, 32, 64)):
        make = partial(resnet18, channels=3, classes=10, width=width)
        experts = Experts(make, EXPERTS).to(device).eval().requires_grad_(False)
        apart = experts.apart().requires_grad_(False)
        x, y = torch.rand(batch, 3, size, size, device=device), torch.randint(0, 10, (batch,), device=device)
        models = {
            "single": fast(apart.networks[0], x, y).model,
            "taken": fast(Mean(experts), x, y).model,
            "grouped": fast(Grouped(experts), x, y).model,
            "one by one": fast(Mean(apart), x, y).model,
        }
        for model in models.values():
            model.at_once = max(1, PIXELS_AT_ONCE // size**2) if device.type == "cpu" else None
        best = dict.fromkeys(models, float("inf"))
        for _ in range(args.rounds + 1):
            for name, model in models.items():
                started = time.perf_counter()
                input_gradient(model, x, y, cross_entropy)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                best[name] = min(best[name], time.perf_counter() - started)
        share = {name: EXPERTS * best["single"] / seconds for name, seconds in best.items()}
        missed |= share["taken"] < TARGET
        print(
            f"{width:6} {size:4}×{size:<2} {1e3 * best['single']:10.1f} {share['taken']:7.2f} {share['grouped']:9.2f} {share['one by one']:11.2f}"
        )
    sys.exit(missed)


if __name__ == "__main__":
    main()
