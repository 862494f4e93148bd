"""What an ADVMoE forward pass costs beside the dense ResNet-18's, of which its arithmetic is 0.35.

    python tests/perf/advmoe_speed.py [--batch 128] [--rounds 7] [--threads 2] [--device cpu]

Half of the images take each route. Both networks are in eval mode, channels-last, fp32, without gradients, and are
timed in turn, round by round; the fastest round of each counts, since a busy machine only ever adds to it. A share
above 0.55 is an exit code of 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from bench import registry
from bench.data import Dataset

LIMIT = 0.55


def cifar_shape() -> Dataset:
    """A dataset that has the shape of CIFAR-10 and no images."""

    def no_images(split: str) -> object:
        raise AssertionError("a speed comparison needs no images")

    return Dataset(
        name="cifar10",
        classes=tuple(map(str, range(10))),
        shape=(3, 32, 32),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        eps=8 / 255,
        crop=4,
        flip=True,
        read=no_images,  # type: ignore[arg-type]
    )


def network(name: str, device: torch.device) -> nn.Module:
    kind = registry.get(name)
    model = kind(kind.recipes["paper"]).build(cifar_shape())
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def halved(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """The model with its router's bias moved so that each of two experts gets half of the images."""
    scores = model.gate(x)
    with torch.no_grad():
        model.router.linear.bias[0] -= (scores[:, 0] - scores[:, 1]).median() + 1e-4
    return model


def seconds(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    """Prints the times and their ratio; 1 where it is above the limit."""
    parser = argparse.ArgumentParser(description="forward cost of ADVMoE beside the dense ResNet-18")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    x = torch.rand(given.batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    routed, dense = halved(network("advmoe", device), x), network("resnet18", device)
    parts: dict[str, Callable[[], object]] = {
        "dense": lambda: dense(x),
        "advmoe": lambda: routed(x),
        "its router": lambda: routed.gate(x),
    }
    best = dict.fromkeys(parts, float("inf"))
    for number in range(given.rounds + 1):
        for name, work in parts.items():
            took = seconds(work, device)
            # the first round fills caches
            best[name] = min(best[name], took) if number else best[name]
    load = torch.bincount(routed.selected(x), minlength=routed.experts_count).tolist()
    print(f"{given.batch} images, routed {load}, {given.threads} thread(s), {device}")
    for name, took in best.items():
        print(f"{name:12}{1000 * took:9.1f} ms   {took / best['dense']:.3f} of dense")
    ratio = best["advmoe"] / best["dense"]
    print(f"ratio {ratio:.3f}, limit {LIMIT}")
    return 1 if ratio > LIMIT else 0


if __name__ == "__main__":
    sys.exit(main())
