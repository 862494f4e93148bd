"""Which expert of a mixture does the work: gate weights and single experts' answers, image by image.

A run looks once at each clean image and at the adversarial image that it ended with (`bench.experts`), and keeps one row per
image, occasion and expert. What they come to is derived.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

#: the occasions: an image as it is, and the one that the run's attacks made of it
CLEAN, ATTACKED = "clean", "attacked"

SCHEMA = pa.schema(
    [
        ("index", pa.int32()),
        ("label", pa.int32()),
        ("at", pa.string()),
        ("expert", pa.int16()),
        ("weight", pa.float32()),
        ("right", pa.bool_()),
    ]
)


def in_order(tables: Sequence[pa.Table]) -> pa.Table:
    """The rows of all batches by image, occasion (clean first) and expert."""
    table = pa.concat_tables(tables)
    attacked = np.array([at == ATTACKED for at in table["at"].to_pylist()])
    order = np.lexsort((table["expert"].to_numpy(), attacked, table["index"].to_numpy()))
    return table.take(pa.array(order)).combine_chunks()


@dataclass(frozen=True)
class Usage:
    """What a mixture's rows of one occasion come to.

    Args:
        weights: the experts' weights of each image, `(n, e)`.
        right: whether each expert alone is right, `(n, e)`.
        labels: `(n,)`.
    """

    weights: NDArray[np.float64]
    right: NDArray[np.bool_]
    labels: NDArray[np.int64]

    @property
    def load(self) -> NDArray[np.float64]:
        """Each expert's mean weight, `(e,)`; they sum to 1."""
        mean: NDArray[np.float64] = self.weights.mean(0)
        return mean

    @property
    def entropy(self) -> NDArray[np.float64]:
        """Of each image's weights, `(n,)`, as a share of the largest there can be: 0 one expert answers, 1 all weigh the same."""
        return entropy(self.weights)

    @property
    def load_entropy(self) -> float:
        """Of the load, likewise: 0 one expert answers every image, 1 all do as much."""
        return float(entropy(self.load[None])[0])

    @property
    def alone(self) -> NDArray[np.float64]:
        """The share of images that each expert alone has right, `(e,)`."""
        mean: NDArray[np.float64] = self.right.mean(0)
        return mean

    def of_class(self, label: int) -> Usage:
        """The rows of one class."""
        own = self.labels == label
        return Usage(self.weights[own], self.right[own], self.labels[own])


def entropy(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """-Σ w ln w / ln e of each row of weights `(n, e)`, `(n,)`; 0 for one expert."""
    e = weights.shape[1]
    if e == 1:
        return np.zeros(len(weights))
    logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    # of one expert -0 would be printed
    found: NDArray[np.float64] = np.abs(-(weights * logs).sum(1) / np.log(e))
    return found


def usage(rows: pd.DataFrame, at: str) -> Usage:
    """The rows of one occasion as arrays.

    Args:
        rows: as `Record.experts` gives them.
        at: `clean` or `attacked`.
    """
    own = rows[rows["at"] == at]
    e = int(rows["expert"].max()) + 1
    return Usage(
        weights=own["weight"].to_numpy(np.float64).reshape(-1, e),
        right=own["right"].to_numpy(bool).reshape(-1, e),
        labels=own["label"].to_numpy(np.int64)[::e],
    )
