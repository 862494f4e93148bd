"""Random search: guesses, keeps what helps, and never asks for a gradient.

What is put on the image is a square of random place, and in each channel of random sign, at the edge of the ball; squares
shrink as the search goes on. The idea is that of Square (Andriushchenko et al., ECCV 2020, arXiv 1912.00049), §3; the
schedule here is a shorter one of our own, so its results are not Square's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.attacks.losses import AttackLoss, margin
from bench.rng import Rng
from bench.threat import ThreatModel
from bench.types import Images, Labels, Model


def random_search(
    model: Model,
    x: Images,
    y: Labels,
    threat: ThreatModel,
    *,
    rng: Rng,
    loss: AttackLoss = margin,
    queries: int = 100,
) -> Images:
    """The best images `(b, c, h, w)` of `queries` guesses; each guess is one forward pass of the images still classified rightly."""
    best = threat.project(x + threat.eps * _signs(x, rng.at("stripes"), stripes=True), x)
    with torch.no_grad():
        logits = model(best)
    highest, right = loss(logits, y), logits.argmax(1) == y
    for query in range(1, queries):
        rows = right.nonzero().flatten()
        if len(rows) == 0:
            break
        here, draw = x[rows], rng.take(rows).at("query", query)
        changed = torch.where(
            _square(here, draw, 1 - query / queries), here + threat.eps * _signs(here, draw), best[rows]
        )
        guess = threat.project(changed, here)
        with torch.no_grad():
            logits = model(guess)
        found = loss(logits, y[rows])
        better = found > highest[rows]
        best[rows[better]], highest[rows[better]] = guess[better], found[better]
        right[rows[better]] = (logits.argmax(1) == y[rows])[better]
    return best


def _signs(x: Images, rng: Rng, stripes: bool = False) -> Tensor:
    """±1 for each channel, `(b, c, 1, 1)`; of each column apart, `(b, c, 1, w)`, for stripes."""
    like = x[:, :, :1, :] if stripes else x[:, :, :1, :1]
    return torch.where(rng.at("sign").uniform(like) < 0.5, -1.0, 1.0)


def _square(x: Images, rng: Rng, left: float) -> Tensor:
    """Where a square lies whose side shrinks from 0.9 of the image's to one pixel, bool `(b, 1, h, w)`."""
    h, w = x.shape[-2:]
    side = max(1, round(0.9 * left * min(h, w)))
    corner = rng.at("place").uniform(x[:, :1, :2, :1] if h > 1 else x[:, :1, :1, :1].expand(-1, -1, 2, -1))
    top, start = (corner[:, :, :1] * (h - side + 1)).floor(), (corner[:, :, 1:] * (w - side + 1)).floor()
    down = torch.arange(h, device=x.device).view(1, 1, h, 1)
    across = torch.arange(w, device=x.device).view(1, 1, 1, w)
    inside: Tensor = (down >= top) & (down < top + side) & (across >= start) & (across < start + side)
    return inside
