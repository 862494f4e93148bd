"""What work costs, counted where it is done: the multiply-adds of a network's layers.

A pass is counted by what it computes, not by how often the network is called: half of a mixture's experts are about
half a pass, whoever calls them. Counted are layers with a `weight` of two dimensions or more, which are convolutions and
linear layers; in them nearly all of the work is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from bench.model import evaluating
from bench.sharing import in_all
from bench.types import Images


@dataclass
class Work:
    """Multiply-adds of forward passes: of those that can be differentiated, and of those that cannot.

    The first are taken to be followed by a backward pass each.
    """

    graph: int = 0
    plain: int = 0


@contextmanager
def counting(work: Work) -> Iterator[Work]:
    """Adds to `work` what every layer that is called computes."""

    def count(layer: nn.Module, given: Any, output: Any) -> None:
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() > 1 and isinstance(output, Tensor):
            amount = in_all(output.numel() * (weight.numel() // weight.shape[0]))
            if output.requires_grad:
                work.graph += amount
            else:
                work.plain += amount

    handle = register_module_forward_hook(count)
    try:
        yield work
    finally:
        handle.remove()


def one_pass(model: nn.Module, x: Images) -> float:
    """Multiply-adds of the forward pass of one image, the mean over a batch; 0 where there is no such layer."""
    with evaluating(model), torch.no_grad(), counting(Work()) as work:
        model(x)
    return work.plain / len(x)
