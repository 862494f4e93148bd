"""Finished batches of a run that is under way, one file each, so that a stopped run goes on where it stopped."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.errors import UsageError
from bench.judge import Cost
from bench.outcome import Batch, Outcome
from bench.record import atomic, forget
from bench.usage import SCHEMA as EXPERTS
from bench.usage import in_order

SCHEMA = pa.schema(
    [
        ("index", pa.int32()),
        ("label", pa.int32()),
        ("column", pa.dictionary(pa.int16(), pa.string())),
        ("prediction", pa.int32()),
        ("robust", pa.bool_()),
        ("restart", pa.int16()),
        ("step", pa.int16()),
        ("share", pa.float32()),
        ("selected", pa.float32()),
    ]
)


class Parts:
    """The batches in a folder; a file that cannot be read is one that was never finished, and is dropped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tables: list[pa.Table] = []
        self._done: set[int] = set()
        for file in sorted(folder.glob("*.parquet")):
            table = _read(file)
            if table is None:
                file.unlink(missing_ok=True)
            else:
                self._take(table)

    def done(self) -> np.ndarray:
        """The dataset positions that are finished, rising."""
        return np.array(sorted(self._done), dtype=int)

    def add(self, batch: Batch) -> None:
        """Puts a finished batch away."""
        columns = list(batch.outcomes)
        rows = {
            "index": np.tile(batch.index, len(columns)),
            "label": np.tile(batch.labels, len(columns)),
            "column": np.repeat(columns, len(batch.index)),
        }
        for name in ("prediction", "robust", "restart", "step", "share", "selected"):
            rows[name] = np.concatenate([_values(batch.outcomes[column], name) for column in columns])
        arrays = [pa.array(rows[field.name]).cast(field.type) for field in SCHEMA]
        also: dict[str, str | bytes] = {
            "costs": json.dumps({name: asdict(cost) for name, cost in batch.costs.items()})
        }
        if batch.experts is not None:
            also["experts"] = _bytes(batch.experts)
        table = pa.Table.from_arrays(arrays, schema=SCHEMA.with_metadata(also))
        content = _bytes(table)
        atomic(
            self.folder
            / f"{batch.index[0]:07d}-{batch.index[-1]:07d}-{len(batch.index)}-{_seal(content)}.parquet",
            content,
        )
        self._take(table)

    def outcomes(self, columns: Sequence[str]) -> bytes:
        """All rows as one parquet file: by image, then by column in the protocol's order; the same bytes for the same rows.

        Raises:
            UsageError: the batches are of other columns.
        """
        table = pa.concat_tables(
            [table.replace_schema_metadata(None) for table in self._tables]
        ).unify_dictionaries()
        place = {name: i for i, name in enumerate(columns)}
        if not place.keys() >= set(table["column"].to_pylist()) or len(table) != len(columns) * len(
            self._done
        ):
            raise UsageError(f"{self.folder} holds batches of other columns; delete it and run again")
        column = np.array([place[name] for name in table["column"].to_pylist()])
        order = np.lexsort((column, table["index"].to_numpy()))
        table = table.take(pa.array(order))
        names = pa.DictionaryArray.from_arrays(pa.array(column[order], pa.int16()), pa.array(list(columns)))
        table = table.set_column(table.schema.get_field_index("column"), "column", names)
        return _bytes(table.combine_chunks())

    def experts(self) -> bytes | None:
        """What each expert of a mixture did, all images as one parquet file; None where a batch does not tell."""
        found, seen = [], np.array([], dtype=int)
        for table in self._tables:
            raw = (table.schema.metadata or {}).get(b"experts")
            if raw is None:
                return None
            rows = _table(raw)
            # as of outcomes, one copy of what two processes finished is enough
            found.append(rows.filter(pa.array(~np.isin(rows["index"].to_numpy(), seen))))
            seen = np.union1d(seen, table["index"].to_numpy())
        return _bytes(in_order(found)) if found else None

    def costs(self) -> dict[str, Cost]:
        """What every program cost over all batches."""
        total: dict[str, Cost] = {}
        for table in self._tables:
            for name, cost in json.loads(table.schema.metadata[b"costs"]).items():
                so_far = total.setdefault(name, Cost())
                so_far.gradients += cost["gradients"]
                so_far.forwards += cost["forwards"]
                so_far.seconds += cost["seconds"]
        return total

    def remove(self) -> None:
        """Deletes the batches; their rows are in the finished record."""
        forget(self.folder)

    def _take(self, table: pa.Table) -> None:
        # where two processes finished the same images their rows are equal, and one copy is enough
        new = ~np.isin(table["index"].to_numpy(), self.done())
        if new.any():
            self._tables.append(table if new.all() else table.filter(pa.array(new)))
            self._done.update(table["index"].to_pylist())


def _values(outcome: Outcome, name: str) -> np.ndarray:
    values = getattr(outcome, name)
    # a deterministic model is right in all draws or in none
    values = outcome.robust if values is None else values
    array: np.ndarray = values.cpu().numpy()
    return array


def _read(file: Path) -> pa.Table | None:
    """The batch in a file; None where it was cut short, went away meanwhile or is of another version's form."""
    try:
        # from memory and in this thread: a reader thread that outlives a quick process aborts it at exit (Arrow #34314)
        raw = file.read_bytes()
        if file.stem.rpartition("-")[2] != _seal(raw):
            return None
        table = _table(raw)
        costs = json.loads((table.schema.metadata or {})[b"costs"])
        for cost in costs.values():
            Cost(**cost)
        told = table.schema.metadata.get(b"experts")
        if told is not None and not _table(told).schema.equals(EXPERTS):
            return None
    except (pa.ArrowException, OSError, LookupError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    return table if table.schema.equals(SCHEMA) and len(table) and not _gaps(table) else None


def _seal(content: bytes) -> str:
    """What a file's name ends in: a flipped bit must not become an outcome."""
    return hashlib.sha256(content).hexdigest()[:16]


def _gaps(table: pa.Table) -> bool:
    """Whether a value is missing: none ever is in a batch of ours."""
    return any(column.null_count for column in table.columns)


def _table(raw: bytes) -> pa.Table:
    """A parquet file's rows, without its reader's threads."""
    table = pq.ParquetFile(pa.BufferReader(raw), pre_buffer=False).read(use_threads=False)
    table.validate(full=True)
    return table


def _bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
