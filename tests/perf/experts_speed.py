"""Nine ResNet-18 experts: one grouped program against one after another, and both against nine single networks.

    python tests/perf/experts_speed.py [--device cpu] [--rounds 3] [--crossover 1 2 4 8 16 32 64] [--crossover-only]

Input gradients in eval mode, folded and channels-last as attacks take them; one network alone is the yardstick. The
three are timed in turn, so that a busy machine slows all of them; the best of several rounds is shown. Target of the
way that `Experts` takes: at least 0.95 of nine times a single network's throughput.

Then the crossover on this device: of 32×32 images, the largest batch for which one grouped program is the quicker, beside the one
that `bench.moe.GROUPED_BATCH` reckons with.
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
from bench.moe import Experts, most_grouped

EXPERTS, TARGET = 9, 0.95
#: seconds of a batch after which no larger one is tried
LONG = 2.0


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


def main() -> int:
    """Prints the tables; 1 where the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--crossover", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], metavar="N")
    parser.add_argument("--crossover-only", action="store_true")
    args = parser.parse_args()
    device = torch.device(args.device)
    missed = False if args.crossover_only else shares(device, args.rounds)
    crossover(device, sorted(args.crossover), args.rounds)
    return int(missed)


def shares(device: torch.device, rounds: int) -> bool:
    """Prints throughput against nine times a single network's; whether the way that is taken misses the target."""
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
        best = seconds(models, x, y, rounds)
        share = {name: EXPERTS * best["single"] / seconds for name, seconds in best.items()}
        missed |= share["taken"] < TARGET
        print(
            f"{width:6} {size:4}×{size:<2} {1e3 * best['single']:10.1f} {share['taken']:7.2f} {share['grouped']:9.2f} {share['one by one']:11.2f}"
        )
    return missed


def seconds(models: dict[str, nn.Module], x: torch.Tensor, y: torch.Tensor, rounds: int) -> dict[str, float]:
    """Of the fastest gradient of each model; they take turns, and the first round counts for nothing."""
    best = dict.fromkeys(models, float("inf"))
    for turn in range(rounds + 1):
        for name, model in models.items():
            started = time.perf_counter()
            input_gradient(model, x, y, cross_entropy)
            if x.device.type == "cuda":
                torch.cuda.synchronize(x.device)
            best[name] = min(best[name], time.perf_counter() - started) if turn else best[name]
    return best


def crossover(device: torch.device, batches: list[int], rounds: int) -> None:
    """Prints both ways' times by the number of images, and up to how many the grouped program is the quicker."""
    size = 32
    for width in (16, 64):
        make = partial(resnet18, channels=3, classes=10, width=width)
        experts = Experts(make, EXPERTS).to(device).eval().requires_grad_(False)
        x = torch.rand(max(batches), 3, size, size, device=device)
        y = torch.randint(0, 10, (len(x),), device=device)
        apart = Mean(experts.apart().requires_grad_(False))
        models = {"grouped": fast(Grouped(experts), x, y).model, "one by one": fast(apart, x, y).model}
        print(f"\nwidth {width}, {size}×{size}: {'images':>7} {'grouped ms':>11} {'one by one ms':>14}")
        quicker = 0
        for batch in batches:
            took = seconds(models, x[:batch], y[:batch], rounds)
            print(f"{batch:22} {1e3 * took['grouped']:11.1f} {1e3 * took['one by one']:14.1f}", flush=True)
            if took["grouped"] < took["one by one"]:
                quicker = batch
            if sum(took.values()) > LONG:
                break
        print(f"grouped is the quicker for up to {quicker} of these; the rule says {most_grouped(x)}")


if __name__ == "__main__":
    sys.exit(main())
