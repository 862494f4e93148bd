"""Somebody else's random numbers, addressed.

A library that draws from the global generator, for a whole batch at once, gives an image other numbers in another batch.
While it runs under `addressed`, the name `torch` in its modules is a stand-in that draws from `Draws` and does nothing
when told to seed; in everything else it is torch. The global generator is not touched.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.errors import UsageError
from bench.rng import Rng
from bench.types import Images

#: what also draws from the global generator, and has no address here
OTHERS = ("bernoulli", "multinomial", "normal", "poisson", "rand_like", "randint", "randint_like", "randn_like", "randperm")  # fmt: skip


class Draws:
    """What an attack draws for the images of one batch, no two of them alike.

    An attack is a series of runs, one a restart or a target class, each on the images that still stand. In a run there is a
    stream for every image and one that all share. An array `(b, c, h, w)` with a row for each image takes the rows from
    their images' streams; any other array is taken from the shared stream. An image is in every run, and in every draw
    of a run, until it falls: what it is given does not depend on the others.

    Args:
        rng: the address; its `images` are the dataset positions of the rows.
        x: the batch. Which of its images a run is on is known by their content.
    """

    def __init__(self, rng: Rng, x: Images) -> None:
        assert rng.images is not None and len(rng.images) == len(x)
        self.rng = rng
        self.position = dict(zip(_contents(x), rng.images, strict=True))
        self.runs = 0
        self.shared, self.own = _stream(rng), list[np.random.Generator]()

    def begin(self, x: Images) -> None:
        """Opens the streams of the next run, on these images of the batch."""
        run = self.rng.at("run", self.runs)
        self.runs += 1
        self.shared = _stream(run)
        self.own = [_stream(run.at("image", self.position[content])) for content in _contents(x)]

    def keep(self, standing: Tensor) -> None:
        """Goes on with some of the run's images, bool `(b,)`."""
        self.own = [stream for stream, stands in zip(self.own, standing.tolist(), strict=True) if stands]

    def uniform(self, *size: Any) -> Tensor:
        """U[0,1) of that size, float32 on the CPU, as `torch.rand(size)` would be."""
        return self._draw(size, lambda stream, shape: stream.random(shape, dtype=np.float32))

    def normal(self, *size: Any) -> Tensor:
        """N(0,1) of that size, as `torch.randn(size)` would be."""
        return self._draw(size, lambda stream, shape: stream.standard_normal(shape, dtype=np.float32))

    def _draw(
        self, size: tuple[Any, ...], draw: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
    ) -> Tensor:
        shape = tuple(size if isinstance(size[0], int) else size[0])
        if len(shape) != 4 or shape[0] != len(self.own):
            return torch.from_numpy(draw(self.shared, shape))
        values = np.empty(shape, dtype=np.float32)
        for row, stream in enumerate(self.own):
            values[row] = draw(stream, shape[1:])
        return torch.from_numpy(values)


@contextmanager
def addressed(modules: Sequence[ModuleType], draws: Draws) -> Iterator[None]:
    """These modules draw from `draws`; afterwards, whatever happened, they use torch again.

    Raises:
        UsageError: one of them draws in a way that has no address.
    """
    stand_in = _StandIn(
        torch,
        rand=draws.uniform,
        randn=draws.normal,
        manual_seed=_ignored,
        random=_StandIn(torch.random, manual_seed=_ignored),
        cuda=_StandIn(
            torch.cuda, manual_seed=_ignored, random=_StandIn(torch.cuda.random, manual_seed=_ignored)
        ),
        **{name: _refused(name) for name in OTHERS},
    )
    originals = [vars(module)["torch"] for module in modules]
    try:
        for module in modules:
            vars(module)["torch"] = stand_in
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            vars(module)["torch"] = original


def distinct(x: Images) -> list[Tensor]:
    """The rows of a batch in groups in which no image stands twice: one group, where none does."""
    groups: dict[int, list[int]] = defaultdict(list)
    times: dict[bytes, int] = defaultdict(int)
    for row, content in enumerate(_contents(x)):
        groups[times[content]].append(row)
        times[content] += 1
    return [torch.tensor(rows, device=x.device) for rows in groups.values()]


class _StandIn:
    """A module with some of its names replaced."""

    def __init__(self, module: ModuleType, **replaced: object) -> None:
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _ignored(seed: object) -> None:
    """Nothing that a library draws depends on a seed any more, and a model's own draws are not the library's to seed."""


def _refused(name: str) -> Callable[..., Tensor]:
    def draw(*arguments: object, **settings: object) -> Tensor:
        raise UsageError(
            f"this version of the attack's library draws by torch.{name}, which cannot be addressed image by image; "
            "install pyautoattack 0.2.0"
        )

    return draw


def _stream(rng: Rng) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=rng.seed()))


def _contents(x: Images) -> list[bytes]:
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in x.detach().cpu().numpy()]
