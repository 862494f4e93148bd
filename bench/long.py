"""Records to groups, and groups to the long table: every accuracy with its interval, from the outcomes.

A group is the runs that answer one question: they differ in nothing but the seed. Tables and figures are made
of groups, so that each statistic has one origin.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bench.errors import UsageError
from bench.record import ColumnRecord, Record, read_all
from bench.stats import mean_std, wilson

if TYPE_CHECKING:
    import pandas as pd

#: the columns of the long table
HEADER = (
    *("dataset", "defense", "protocol", "attack", "epsilon", "step_size", "steps", "restarts", "eot"),
    *("accuracy", "ci_low", "ci_high", "n", "seeds", "std"),
)
WORST_CASE = "worst-case"
#: of a random model: the share of images right in every single draw under every attack; no headline, it falls with the draws
WORST_DRAW = "worst-draw"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One column of a group: what was asked, and the share of images on which the defense held.

    `epsilon` and `step_size` are in pixel units of [0,1]; what does not apply is None. `accuracy`, `ci_low`,
    `ci_high` (95 %, Wilson) and `std` (over seeds, NaN for one) are in percent; all are NaN where a run is void.
    """

    name: str
    attack: str
    norm: str | None = None
    epsilon: float | None = None
    step_size: float | None = None
    steps: int | None = None
    restarts: int | None = None
    eot: int | None = None
    accuracy: float
    ci_low: float
    ci_high: float
    n: int
    seeds: int
    std: float
    survivors: bool = False
    """whether it attacked only what the columns before it left standing"""
    part_of: str | None = None
    """the ensemble whose component it is"""


@dataclass(frozen=True, eq=False)
class Group:
    """The runs that differ in nothing but the seed, and what they measured.

    Args:
        label: the defense, with a suffix in brackets where another group has its name, dataset and protocol.
        records: by seed.
        columns: in the protocol's order, then `worst-case`, and of a random model `worst-draw`.
        images: positions in the dataset, int64 `(n,)`, rising.
        shares: per record, for each column and image the share of draws in which the answer was right, `(columns, n)`;
            1 or 0 where the model is deterministic.
    """

    label: str
    records: tuple[Record, ...]
    columns: tuple[Measured, ...]
    images: NDArray[np.int64]
    shares: tuple[NDArray[np.float64], ...]

    @property
    def void(self) -> bool:
        """Whether one of the runs must not become a number."""
        return any(record.verdict == "void" for record in self.records)

    @property
    def dataset(self) -> str:
        """The dataset's name."""
        return self.records[0].asked.dataset

    @property
    def protocol(self) -> str:
        """The protocol's name."""
        return str(self.records[0].asked.protocol["name"])

    @property
    def seeds(self) -> int:
        """How many distinct seeds there are."""
        return len({record.asked.seed for record in self.records})

    def column(self, name: str) -> Measured | None:
        """The column of that name, if the group has it."""
        return next((column for column in self.columns if column.name == name), None)

    def outcomes(self, name: str) -> NDArray[np.bool_]:
        """Whether each image held in a column, of the first record, bool `(n,)`; of a random model, more often than not."""
        names = [column.name for column in self.columns]
        outcome: NDArray[np.bool_] = self.shares[0][names.index(name)] > 0.5
        return outcome


def load_results(results: str | Path = "results") -> pd.DataFrame:
    """The long table: one row per group of runs and column of its protocol, and one for their worst case.

    Its columns are those of `HEADER`. Accuracy, interval and std are in percent, epsilon and step_size in
    pixel units of [0,1]; `worst-case` is the per-image minimum over all attacks of a run.

    Raises:
        UsageError: there is no such folder, or something in it is damaged.
    """
    return frame(groups(read_all(Path(results))))


def frame(found: Sequence[Group]) -> pd.DataFrame:
    """The long table of these groups."""
    import pandas as pd

    numbers = dict.fromkeys(("epsilon", "step_size", "accuracy", "ci_low", "ci_high", "std"), "float64")
    counts = dict.fromkeys(("steps", "restarts", "eot", "n", "seeds"), "Int64")
    rows = [
        [group.dataset, group.label, group.protocol, *(getattr(column, name) for name in HEADER[3:])]
        for group in found
        for column in group.columns
    ]
    return pd.DataFrame(rows, columns=list(HEADER)).astype(numbers | counts)


def groups(records: Iterable[Record]) -> list[Group]:
    """The records as groups, by dataset, label and protocol.

    Raises:
        UsageError: outcomes are missing, damaged or incomplete.
    """
    together: dict[str, list[Record]] = {}
    for record in records:
        together.setdefault(_question(record), []).append(record)
    namesakes: dict[tuple[str, str, str], list[list[Record]]] = {}
    for runs in together.values():
        runs.sort(key=lambda record: record.asked.seed)
        asked = runs[0].asked
        namesakes.setdefault((asked.dataset, asked.defense, str(asked.protocol["name"])), []).append(runs)
    found = [
        _group(label, runs)
        for alike in namesakes.values()
        for label, runs in zip(_labels([runs[0] for runs in alike]), alike, strict=True)
    ]
    return sorted(found, key=lambda group: (group.dataset, group.label, group.protocol))


def radius(eps: float) -> str:
    """A radius or step size in pixel units as people write it: `8/255` where that is the shorter text."""
    decimals, level = f"{eps:.12g}", round(eps * 255)
    exact = math.isclose(eps * 255, level, rel_tol=1e-6)
    return f"{level}/255" if exact and level and len(f"{level}/255") < len(decimals) else decimals


def _question(record: Record) -> str:
    """What the runs of a group share, as text; the weights of a training belong to its seed."""
    own = {"seed", "model_hash"} if record.training.source == "trained" else {"seed"}
    asked = record.asked.model_dump(mode="json", exclude=own)
    columns = [column.model_dump(mode="json") for column in record.columns]
    return json.dumps([asked, record.training.source, columns, record.model.draws], sort_keys=True)


def _group(label: str, records: list[Record]) -> Group:
    asked = records[0].columns
    read = [_outcomes(record) for record in records]
    images = read[0][0]
    for record, (others, _) in zip(records, read, strict=True):
        if not np.array_equal(others, images):
            raise UsageError(f"{record._folder} has other images than another seed's run; delete both")
    measured = tuple(matrix for _, matrix in read)
    void = any(record.verdict == "void" for record in records)
    radii = [column.epsilon for column in asked if column.epsilon is not None]
    worst = [ColumnRecord(name=WORST_CASE, attack=WORST_CASE, epsilon=max(radii, default=None))]
    if records[0].model.draws > 1:
        worst.append(ColumnRecord(name=WORST_DRAW, attack=WORST_DRAW, epsilon=max(radii, default=None)))
    # Two trainings of one seed are one seed: they are averaged before seeds are.
    seeds = np.array([record.asked.seed for record in records])
    shares = np.array([matrix.mean(1) for matrix in measured])
    by_seed = np.array([shares[seeds == seed].mean(0) for seed in np.unique(seeds)])
    columns = []
    for column, values in zip([*asked, *worst], by_seed.T, strict=True):
        mean, std = mean_std(values)
        # of a random model each image counts by its share: the interval is then wide enough for images and draws together,
        # a mean of values in [0,1] varying no more than that of coins of the same mean
        low, high = (float(end) for end in wilson(mean * len(images), len(images)))
        if void:
            mean = low = high = std = math.nan
        columns.append(
            Measured(
                name=column.name,
                attack=column.attack,
                norm=column.norm,
                epsilon=column.epsilon,
                step_size=column.step_size,
                steps=column.steps,
                restarts=column.restarts,
                eot=column.eot,
                accuracy=100 * mean,
                ci_low=100 * low,
                ci_high=100 * high,
                n=len(images),
                seeds=len(values),
                std=100 * std,
                survivors=column.survivors,
                part_of=column.part_of,
            )
        )
    return Group(label, tuple(records), tuple(columns), images, measured)


def _outcomes(record: Record) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The images, `(n,)`, and the share of right answers in each column and in the worst of them, `(columns + 1, n)`.

    Of a random model a last row says whether every draw in every column was right.

    Which column is worst for an image is read off the draws that the attack chose by, and its share off fresh ones: the
    least of several noisy shares would be too low.

    Raises:
        UsageError: an image lacks a column, has one twice or has one that the record does not know.
    """
    images, shares, selected = _shares(record)
    # what a diagnostic tells is not the deployed model's robustness
    counts = [place for place, column in enumerate(record.columns) if not column.diagnostic]
    rows = [*shares, _least(shares, selected, counts)]
    if record.model.draws > 1:
        rows.append((shares[counts] == 1).all(0))
    return images, np.array(rows, dtype=np.float64)


def worst_of(record: Record, names: Sequence[str]) -> NDArray[np.float64]:
    """The share of draws in which each image held in the worst of these columns, `(n,)`; chosen as for the worst case."""
    _, shares, selected = _shares(record)
    return _least(shares, selected, [place for place, c in enumerate(record.columns) if c.name in names])


def _least(
    shares: NDArray[np.float64], selected: NDArray[np.float64], places: Sequence[int]
) -> NDArray[np.float64]:
    chosen = np.array(places)[selected[list(places)].argmin(0)]
    least: NDArray[np.float64] = shares[chosen, np.arange(shares.shape[1])]
    return least


def _shares(record: Record) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """The images of a record; and for each column and image the share of fresh draws that were right, and of those chosen by."""
    import pandas as pd

    table = record.outcomes(["index", "column", "share", "selected"])
    places, images = pd.factorize(table["index"].to_numpy(), sort=True)
    codes, found = pd.factorize(table["column"])
    names = [column.name for column in record.columns]
    order = pd.Index(names).get_indexer(pd.Index(found))
    whole = len(table) > 0 and len(table) == len(names) * len(images) and (order >= 0).all()
    shares = np.full((len(names), len(images)), np.nan)
    selected = shares.copy()
    if whole:
        shares[order[codes], places] = table["share"].to_numpy()
        selected[order[codes], places] = table["selected"].to_numpy()
    if not whole or np.isnan(shares).any():
        raise UsageError(f"{record._folder} lacks outcomes of some images; delete it and run again")
    return np.asarray(images, dtype=np.int64), shares, selected


def _labels(alike: Sequence[Record]) -> list[str]:
    """One name for each of several groups of one defense: the fewest facts that tell them apart."""
    name = alike[0].asked.defense
    if len(alike) == 1:
        return [name]
    facets = list(dict.fromkeys(texts for texts in _facets(alike) if len(set(texts)) > 1))
    for size in (1, 2, 3):
        for chosen in combinations(facets, size):
            suffixes = [", ".join(texts) for texts in zip(*chosen, strict=True)]
            if len(set(suffixes)) == len(alike):
                return [f"{name} [{suffix}]" for suffix in suffixes]
    keys = [record.asked.key for record in alike]
    digits = next((d for d in range(4, 12) if len({key[:d] for key in keys}) == len(keys)), 12)
    return [f"{name} [{key[:digits]}…]" for key in keys]


def _facets(alike: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    """What may tell groups apart, one text for each of them, the most readable first."""
    asked = [record.asked for record in alike]
    sources = [record.training.source for record in alike]
    files = [source.replace("\\", "/").rsplit("/", 1)[-1] for source in sources]
    for names in (files, sources):
        pairs = zip(names, sources, strict=True)
        yield tuple(source if source == "trained" else f"checkpoint {name}" for name, source in pairs)
    yield tuple(a.recipe or "no recipe" for a in asked)
    yield tuple(f"{a.weights} epoch" for a in asked)
    yield tuple(_eps(record) for record in alike)
    yield tuple(f"n={a.samples}" for a in asked)
    yield tuple(a.precision for a in asked)
    yield from _differing([a.config for a in asked])
    yield from _differing([a.protocol for a in asked])
    yield tuple(f"data {a.data_hash[:8]}" for a in asked)
    hashes = zip(sources, asked, strict=True)
    yield tuple(s if s == "trained" else f"weights {a.model_hash[:8]}" for s, a in hashes)


def _eps(record: Record) -> str:
    """The radius at which a run iterates, the largest if there are several."""
    radii = [c.epsilon for c in record.columns if c.epsilon is not None and c.steps is not None]
    radii = radii or [c.epsilon for c in record.columns if c.epsilon is not None]
    return f"eps={radius(max(radii))}" if radii else "no eps"


def _differing(settings: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Each setting on which some of these differ, as `name=value`."""
    flat = [dict(_leaves(mapping, "")) for mapping in settings]
    for path in dict.fromkeys(path for leaves in flat for path in leaves):
        values = [leaves.get(path, "unset") for leaves in flat]
        if len(set(values)) > 1:
            yield tuple(f"{path.rsplit('.', 1)[-1]}={value}" for value in values)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list) and any(isinstance(inner, (Mapping, list)) for inner in value):
        for position, inner in enumerate(value):
            yield from _leaves(inner, f"{path}.{position}")
    elif isinstance(value, str):
        yield path, value
    else:
        yield path, json.dumps(value)
