"""Looking at a model without leaving a trace: what it holds, and what the global generators hold, is put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class State:
    """All that a module holds: attributes, the contents of its lists and dictionaries, tensors and their flags."""

    model: nn.Module
    attributes: list[tuple[nn.Module, dict[str, object]]]
    containers: list[tuple[Any, Any]]
    tensors: list[tuple[Tensor, Tensor, Tensor | None]]
    """tensor, copy, gradient"""
    named: dict[str, Tensor]
    """copies of parameters and buffers by name"""

    @classmethod
    def of(cls, model: nn.Module) -> State:
        """The state at this moment."""
        attributes = [(part, dict(vars(part))) for part in model.modules()]
        values = [value for _, found in attributes for value in found.values()]
        containers = [(value, value.copy()) for value in values if isinstance(value, (dict, list, set))]
        weights = dict([*model.named_parameters(), *model.named_buffers()])
        held = [*weights.values(), *(value for value in values if isinstance(value, Tensor))]
        copies = {id(tensor): tensor.detach().clone() for tensor in held}
        return cls(
            model,
            attributes,
            containers,
            [(tensor, copies[id(tensor)], tensor.grad if tensor.is_leaf else None) for tensor in held],
            {name: copies[id(tensor)] for name, tensor in weights.items()},
        )

    def changed(self) -> list[str]:
        """The parameters and buffers that are not what they were."""
        now = dict([*self.model.named_parameters(), *self.model.named_buffers()])
        kept = {name for name, copy in self.named.items() if name in now and equal(now[name], copy)}
        return sorted((now.keys() | self.named.keys()) - kept)

    def restore(self) -> None:
        """Puts it back."""
        for part, found in self.attributes:
            vars(part).clear()
            vars(part).update(found)
        for container, content in self.containers:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)
        for tensor, copy, gradient in self.tensors:
            if not equal(tensor, copy):
                tensor.data = tensor.data.copy_(copy) if tensor.shape == copy.shape else copy.clone()
            if tensor.is_leaf:
                tensor.grad = gradient


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model with parameters that need no gradient; those that did need it again afterwards."""
    needed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in needed:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in needed:
            parameter.requires_grad_(True)


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Puts back, afterwards, the global generators of torch, numpy and Python."""
    of_numpy, of_python = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        np.random.set_state(of_numpy)
        random.setstate(of_python)


def generator_states(device: torch.device) -> dict[str, object]:
    """The global generators by name, each as something that can be compared."""
    kind, keys, *rest = np.random.get_state()
    states: dict[str, object] = {
        "torch": bytes(torch.random.get_rng_state().numpy()),
        "numpy": (kind, np.asarray(keys).tobytes(), *rest),
        "random": random.getstate(),
    }
    if device.type == "cuda":
        states["torch.cuda"] = bytes(torch.cuda.get_rng_state(device).numpy())
    return states


def seed_all(seed: int) -> None:
    """Seeds every global generator."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def seeded_states(device: torch.device, seed: int) -> dict[str, object]:
    """What the global generators are right after they are seeded."""
    with generators_kept(device):
        seed_all(seed)
        return generator_states(device)


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values, NaN being equal to NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or (
        a.is_floating_point()
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(), b.nan_to_num())
    )
