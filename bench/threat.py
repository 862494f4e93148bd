"""What an adversary may do to an image: the ball around it, cut by the box [0,1].

A threat model owns everything that depends on its norm, so that an attack is written once for all norms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from bench.errors import UsageError
from bench.rng import Rng
from bench.types import Images

#: how far outside its ball a perturbation may lie and still be called legal: float32 rounding, not more
TOLERANCE = 1e-6


class ThreatModel(Protocol):
    """A ball of radius `eps` (pixel units of [0,1]) in some norm, intersected with the box."""

    @property
    def eps(self) -> float:
        """The radius, in pixel units."""
        ...

    @property
    def norm(self) -> str:
        """`Linf` or `L2`."""
        ...

    def project(self, x_adv: Images, x: Images) -> Images:
        """The nearest allowed images."""
        ...

    def projection(self, x: Images) -> Callable[[Images], Images]:
        """`project` onto the balls around `x`, for many calls; it may overwrite the images that it is given."""
        ...

    def random_start(self, x: Images, rng: Rng) -> Images:
        """Images drawn from the ball around `x`, inside the box."""
        ...

    def ascent(self, gradient: Tensor) -> Tensor:
        """The direction of length one in this norm along which a linear function grows fastest."""
        ...

    def contains(self, x_adv: Images, x: Images) -> Tensor:
        """Which images are allowed, bool `(b,)`; a NaN never is."""
        ...


@dataclass(frozen=True)
class Linf:
    """Every pixel of every channel moves by at most `eps`."""

    eps: float
    norm: str = "Linf"

    def project(self, x_adv: Images, x: Images) -> Images:
        """`x_adv` clamped to `x ± eps` and to [0,1]."""
        return torch.clamp(x_adv, *self.bounds(x))

    def projection(self, x: Images) -> Callable[[Images], Images]:
        """The same with bounds that are computed once; it overwrites the images."""
        low, high = self.bounds(x)
        return lambda x_adv: x_adv.clamp_(low, high)

    def bounds(self, x: Images) -> tuple[Images, Images]:
        """The least and the greatest value that each pixel of `x` may take."""
        return (x - self.eps).clamp_min_(0), (x + self.eps).clamp_max_(1)

    def random_start(self, x: Images, rng: Rng) -> Images:
        """`x + U(-eps, eps)`, clamped to [0,1]."""
        return self.project(x + self.eps * (2 * rng.uniform(x) - 1), x)

    def ascent(self, gradient: Tensor) -> Tensor:
        """The sign of the gradient; 0 where the gradient is 0."""
        return gradient.sign()

    def contains(self, x_adv: Images, x: Images) -> Tensor:
        """Largest change at most `eps`, pixels in [0,1], both up to 1e-6."""
        within = (x_adv - x).abs_().flatten(1).amax(1) <= self.eps + TOLERANCE
        return within & _in_box(x_adv)


@dataclass(frozen=True)
class L2:
    """The change of an image has Euclidean length at most `eps`."""

    eps: float
    norm: str = "L2"

    def project(self, x_adv: Images, x: Images) -> Images:
        """Into the box, then along the ray to `x` into the ball; the ray stays in the box, which is convex."""
        change = torch.clamp(x_adv, 0, 1) - x
        return x + change * (self.eps / _length(change).clamp_min(1e-12)).clamp_max(1)

    def projection(self, x: Images) -> Callable[[Images], Images]:
        """`project` onto the balls around `x`."""
        return partial(self.project, x=x)

    def random_start(self, x: Images, rng: Rng) -> Images:
        """Uniform in the ball: a normal direction, and the radius `eps * U^(1/d)`."""
        direction = rng.at("direction").normal(x)
        radius = rng.at("radius").uniform(x[:, :1, :1, :1]) ** (1 / x[0].numel())
        return self.project(x + self.eps * radius * direction / _length(direction), x)

    def ascent(self, gradient: Tensor) -> Tensor:
        """The gradient at length one; 0 where the gradient is 0."""
        return gradient / _length(gradient).clamp_min(1e-12)

    def contains(self, x_adv: Images, x: Images) -> Tensor:
        """Length at most `eps` (up to 1e-5 of it, and 1e-6), computed in float64; pixels in [0,1]."""
        length = _length(x_adv.double() - x.double()).flatten()
        return (length <= self.eps * (1 + 1e-5) + TOLERANCE) & _in_box(x_adv)


NORMS: dict[str, type[Linf] | type[L2]] = {"Linf": Linf, "L2": L2}


def threat_model(norm: str, eps: float) -> Linf | L2:
    """The threat model of that norm and radius.

    Raises:
        UsageError: the norm is unknown or the radius is not in (0, 1] (`Linf`) or not positive (`L2`).
    """
    if norm not in NORMS:
        raise UsageError(f"no norm named {norm!r}; known: {', '.join(NORMS)}")
    if not eps > 0 or (norm == "Linf" and eps > 1):
        raise UsageError(
            f"eps must be more than 0 and at most 1, in pixel units of [0,1]; got {eps:g} (8/255 is accepted)"
        )
    return NORMS[norm](eps)


def _length(change: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(change, dim=tuple(range(1, change.dim())), keepdim=True)
    return length


def _in_box(x_adv: Images) -> Tensor:
    flat = x_adv.flatten(1)
    return (flat.amin(1) >= -TOLERANCE) & (flat.amax(1) <= 1 + TOLERANCE)
