"""What mixtures of experts share.

`RoutedModel` is what an adaptive attack on a mixture may ask of it. `Experts` holds several networks of one
architecture and runs them as one grouped program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from bench.crafting import mirror
from bench.types import Images, Labels

#: the largest images, in pixels, on which nine networks are quicker as one; measured on CPUs at 8×8 and at 32×32
GROUPED_PIXELS = 256
#: the largest batch, in pixels of all its images, on which they are on a device that waits for calls rather than for numbers:
#: sixteen images of 32×32; reckoned from 5 µs a call, not measured (`tests/perf/experts_speed.py` finds the crossover)
GROUPED_BATCH = {"cuda": 16_384}


class RoutedModel(Protocol):
    """A mixture: `e` experts, a gate, and what it makes of them; `k` classes.

    A soft one answers with the mean of its experts' logits, weighed by the softmax of the scores; a hard one with the
    logits of the selected expert alone. A soft one that has an attribute `mixes_probabilities`, and it is true, answers
    with the logarithm of the mean of its experts' probabilities instead. One that can ask an expert alone has a method
    `one_output(x, expert)`, which gives what `all_outputs(x)[:, expert]` does for the cost of one expert.
    """

    soft: bool
    experts_count: int

    def gate(self, x: Images) -> Tensor:
        """Scores `(b, e)`, before any softmax."""
        ...

    def all_outputs(self, x: Images) -> Tensor:
        """Every expert's logits, `(b, e, k)`."""
        ...

    def selected(self, x: Images) -> Tensor:
        """The expert that weighs most, int64 `(b,)`."""
        ...


def as_mixture(model: object) -> RoutedModel | None:
    """The model as a mixture; None if it is none."""
    names = ("gate", "all_outputs", "selected", "soft", "experts_count")
    return cast(RoutedModel, model) if all(hasattr(model, name) for name in names) else None


def output_of(model: RoutedModel, x: Images, expert: int) -> Tensor:
    """One expert's logits `(b, k)`; the others are not asked where the mixture can do without."""
    alone: Callable[[Images, int], Tensor] | None = getattr(model, "one_output", None)
    return model.all_outputs(x)[:, expert] if alone is None else alone(x, expert)


class Expert(nn.Module):
    """One expert of a mixture as a model of its own."""

    def __init__(self, mixture: RoutedModel, expert: int) -> None:
        super().__init__()
        self.mixture, self.expert = mixture, expert

    def forward(self, x: Images) -> Tensor:
        """Pixels `(b, c, h, w)` to that expert's logits `(b, k)`."""
        return output_of(self.mixture, x, self.expert)


class Experts(nn.Module):
    """Several networks of one architecture, side by side.

    Every tensor is the experts' tensors joined along the first dimension, so an expert is a slice of each. On small
    images, and on a GPU in small batches, all of them run as one network with grouped convolutions, which saves the cost
    of many small calls; else they run one after another, since a grouped convolution is slower than its parts
    (`tests/perf/experts_speed.py` measures both). `torch.func.vmap` over stacked weights would be no third way: torch makes
    grouped convolutions of it.

    Args:
        make: `make(copies=e)` builds `e` such networks in one, as `baselines.resnet` does.
        experts: how many.
    """

    def __init__(self, make: Callable[..., nn.Module], experts: int) -> None:
        super().__init__()
        self.make = make
        self.experts = experts
        self.net = make(copies=experts)
        self._smaller: dict[int, nn.Module] = {}

    def forward(self, x: Tensor) -> Tensor:
        """The same normalised images `(b, c, h, w)` for every expert to logits `(b, e, k)`."""
        if grouped(x):
            return self.some(x.repeat(1, self.experts, 1, 1), 0, self.experts)
        return self._one_by_one([x] * self.experts, 0)

    def some(self, x: Tensor, first: int, last: int) -> Tensor:
        """Each expert's own images, `(b, m·c, h, w)` for the `m` experts `first … last-1`, to logits `(b, m, k)`."""
        count = last - first
        if count > 1 and not grouped(x):
            return self._one_by_one(x.chunk(count, 1), first)
        logits: Tensor
        if count == self.experts:
            logits = self.net(x)
        else:
            logits = functional_call(self._network(count), self.state_of(first, last), (x,))
        return logits if count > 1 else logits.unsqueeze(1)

    def one(self, x: Tensor, expert: int) -> Tensor:
        """One expert's logits of normalised images `(b, c, h, w)`, `(b, k)`; the others are not run."""
        return self.some(x, expert, expert + 1)[:, 0]

    def apart(self) -> Apart:
        """The experts as networks of their own, with copies of their weights, in the same mode."""
        networks = []
        for k in range(self.experts):
            network = self.make(copies=1)
            state = self.state_of(k, k + 1)
            network.to(next(iter(state.values())))
            network.load_state_dict(state)
            networks.append(network.train(self.training))
        return Apart(networks)

    def state_of(self, first: int, last: int) -> dict[str, Tensor]:
        """The parameters and buffers of some experts, as views into those of all."""
        return {
            name: tensor
            if tensor.dim() == 0
            else tensor.reshape(self.experts, -1, *tensor.shape[1:])[first:last].flatten(0, 1)
            for name, tensor in self._tensors().items()
        }

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.net.named_parameters()), **dict(self.net.named_buffers())}

    def _one_by_one(self, own: Sequence[Tensor], first: int) -> Tensor:
        """The logits of the experts from `first` on, each on its own images, `(b, m, k)`."""
        # split once for all of them: the gradient of a slice on its own is as large as the weights of all experts
        split = {
            name: [tensor] * self.experts if tensor.dim() == 0 else tensor.chunk(self.experts)
            for name, tensor in self._tensors().items()
        }
        network = self._network(1)
        states = ({name: parts[k] for name, parts in split.items()} for k in range(first, self.experts))
        return torch.stack(
            [functional_call(network, state, (images,)) for images, state in zip(own, states, strict=False)],
            1,
        )

    def _network(self, count: int) -> nn.Module:
        if count not in self._smaller:
            with torch.device("meta"):
                self._smaller[count] = self.make(copies=count)
        network = self._smaller[count].train(self.training)
        mirror(self.net, network)
        return network


class Apart(nn.Module):
    """Networks that answer one after another; what `Experts` is where it is only evaluated, on larger images."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        """The same normalised images `(b, c, h, w)` for every network to logits `(b, e, k)`."""
        return torch.stack([network(x) for network in self.networks], 1)

    def some(self, x: Tensor, first: int, last: int) -> Tensor:
        """Each network's own images, `(b, m·c, h, w)` for the `m` networks `first … last-1`, to logits `(b, m, k)`."""
        own = zip(self.networks[first:last], x.chunk(last - first, 1), strict=True)
        return torch.stack([network(images) for network, images in own], 1)

    def one(self, x: Tensor, expert: int) -> Tensor:
        """One network's logits of normalised images `(b, c, h, w)`, `(b, k)`."""
        logits: Tensor = self.networks[expert](x)
        return logits


class ByBatch(nn.Module):
    """Experts that answer side by side in small batches and one after another in others; both hold the weights."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.together, self.apart = experts, experts.apart()
        self.splits = True
        """whether small batches go a way of their own"""

    def forward(self, x: Tensor) -> Tensor:
        """The same normalised images `(b, c, h, w)` for every expert to logits `(b, e, k)`."""
        logits: Tensor = self._way(x)(x)
        return logits

    def some(self, x: Tensor, first: int, last: int) -> Tensor:
        """As that of `Experts`."""
        return self._way(x).some(x, first, last)

    def one(self, x: Tensor, expert: int) -> Tensor:
        """As that of `Experts`: one expert has nobody to stand beside."""
        return self.apart.one(x, expert)

    def _way(self, x: Tensor) -> Experts | Apart:
        return self.together if self.splits and grouped(x) else self.apart


def grouped(x: Tensor) -> bool:
    """Whether several networks on these images, `(b, …, h, w)`, run quicker as one grouped program."""
    return small(x) or len(x) <= most_grouped(x)


def small(x: Tensor) -> bool:
    """Whether images of this size, `(…, h, w)`, are so small that they do in batches of any size."""
    return x.shape[-2] * x.shape[-1] <= GROUPED_PIXELS


def most_grouped(x: Tensor) -> int:
    """The largest batch of larger images, `(…, h, w)`, on which they do; 0 for none."""
    return GROUPED_BATCH.get(x.device.type, 0) // (x.shape[-2] * x.shape[-1])


def each_loss(logits: Tensor, y: Labels) -> Tensor:
    """Every expert's cross-entropy: logits `(b, e, k)` and labels `(b,)` to `(b, e)`."""
    labels = y[:, None].expand(-1, logits.shape[1])
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
