"""What the recipe `fast` costs, measured, for the line `Cost:` of a defense's docstring: `python tests/costs.py [NAME …]`."""

from __future__ import annotations

import dataclasses
import sys

import torch

from bench import registry
from bench.config import replaced
from bench.data import Dataset, load
from bench.passes import Work, counting, one_pass
from bench.rng import Rng
from bench.speed import noise
from bench.train import initial

#: steps that are taken of each stage: some draw how many passes they take
STEPS = 12
#: what makes a network small and its passes as many as before
NARROW = {"width": 4, "router_width": 4, "gate_width": 4}


def cost(name: str) -> tuple[float, float]:
    """Passes through the network for each training image, and multiply-adds of one pass on CIFAR-10, in billions."""
    kind = registry.get(name)
    config = kind.recipes["fast"]
    cifar = noise(load("cifar10"), 50_000, 10)
    big = initial(kind(config), cifar, 0).eval()
    multiply_adds = one_pass(big, cifar.test.batch(slice(0, 2))[0]) / 1e9
    known = {field.name for field in dataclasses.fields(config)}
    narrow = {key: value for key, value in NARROW.items() if key in known}
    return passes(
        kind(replaced(config, narrow)), load("digits") if "width" in narrow else cifar
    ), multiply_adds


def passes(defense, data: Dataset) -> float:
    """Forward-backward passes of the whole training for each image learnt from."""
    model = initial(defense, data, 0)
    x, y = data.train.batch(slice(0, 8))
    unit = one_pass(model, x) * len(x)
    total = 0.0
    for number, stage in enumerate(defense.stages(data)):
        groups = stage.groups(model) if stage.groups else [list(model.parameters())]
        optimisers = [torch.optim.SGD(group, lr=1e-6) for group in groups]
        model.train()
        steps = STEPS if "width" in vars(defense.config) else 1
        with counting(Work()) as work:
            for step in range(steps):
                stage.step(model, x, y, Rng(0, "cost", number, step), optimisers)
        total += stage.epochs * work.graph / steps / unit
    return total


def said(passes: float, multiply_adds: float) -> str:
    """As docstrings say it."""
    return f"{float(f'{passes:.2g}'):,.0f} passes of {float(f'{multiply_adds:.2g}'):g} G"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or [name for name in registry.entries() if not name.endswith(":")]:
        print(name, said(*cost(name)), flush=True)
