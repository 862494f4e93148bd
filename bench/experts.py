"""The experts of a deployed mixture asked one by one: what each weighs in an answer, and whether it alone would be right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.attacks.mixture import deployed_weights
from bench.moe import RoutedModel
from bench.types import Images, Labels
from bench.usage import SCHEMA


@torch.no_grad()
def used(
    mixture: RoutedModel, x: Images, y: Labels, index: NDArray[np.int64], at: str, at_once: int | None
) -> pa.Table:
    """What each expert weighs in the answer to these images, and whether it alone would be right.

    Args:
        mixture: a deployed one; of a gate that is dealt anew for each answer, the weights before that.
        x, y, index: images `(b, c, h, w)`, labels `(b,)`, dataset positions `(b,)`.
        at: `clean` or `attacked`.
        at_once: how many images are looked at in one pass; all of them by default.
    """
    weights, right = [], []
    many = at_once or max(1, len(x))
    # no network need bear an empty batch
    for some, labels in zip(torch.split(x, many), torch.split(y, many), strict=True) if len(x) else ():
        weights.append(deployed_weights(mixture, some).float().cpu())
        right.append((mixture.all_outputs(some).argmax(2) == labels[:, None]).cpu())
    experts = mixture.experts_count
    weight, alone = _joined(weights, experts), _joined(right, experts).bool()
    rows = {
        "index": np.repeat(index, experts),
        "label": np.repeat(y.cpu().numpy(), experts),
        "at": [at] * weight.numel(),
        "expert": np.tile(np.arange(experts), len(index)),
        "weight": weight.flatten().numpy(),
        "right": alone.flatten().numpy(),
    }
    return pa.Table.from_arrays([pa.array(rows[f.name]).cast(f.type) for f in SCHEMA], schema=SCHEMA)


def _joined(parts: Sequence[Tensor], experts: int) -> Tensor:
    return torch.cat([part.reshape(-1, experts) for part in parts]) if parts else torch.zeros(0, experts)
