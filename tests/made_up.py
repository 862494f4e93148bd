"""Finished runs with made-up outcomes, for tests of what is derived from them."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from bench.finding import Finding, verdict
from bench.record import Asked, ColumnRecord, Record, Training, Where, finish, folder, read

EPS = 8 / 255


def found(evidence: str, severity: str = "warns", code: str = "zero-gradient") -> Finding:
    """A finding that says this."""
    return Finding(code=code, severity=severity, evidence=evidence, advice="look again")


def paper_columns(eps: float = EPS) -> list[ColumnRecord]:
    """The seventeen columns of dwf-paper."""
    pgd = {"norm": "Linf", "epsilon": eps, "step_size": eps / 4, "eot": 1, "loss": "ce"}
    return [
        ColumnRecord(name="clean", attack="clean"),
        *(
            ColumnRecord(name=f"fgsm-0.0{i}", attack="fgsm", norm="Linf", epsilon=i / 100, eot=1, loss="ce")
            for i in range(1, 10)
        ),
        *(
            ColumnRecord(name=f"pgd-{k}", attack="pgd", steps=k, restarts=1, **pgd)
            for k in (10, 20, 30, 40, 50)
        ),
        ColumnRecord(name="ms-pgd-100", attack="ms-pgd", steps=100, restarts=3, **pgd),
        ColumnRecord(name="a-pgd-100", attack="a-pgd", steps=100, restarts=1, **pgd),
    ]


def run(
    results: Path,
    held: Mapping[str, Sequence[bool] | int] | None = None,
    *,
    n: int = 200,
    columns: Sequence[ColumnRecord] | None = None,
    dataset: str = "digits",
    defense: str = "dwf",
    protocol: Mapping[str, object] | str = "dwf-paper",
    seed: int = 0,
    config: Mapping[str, object] | None = None,
    recipe: str | None = "tiny",
    source: str = "trained",
    model_hash: str | None = None,
    data_hash: str = "d" * 64,
    precision: str = "fp32",
    shuffle: bool = False,
    damage=lambda table: table,
    findings: Sequence[Finding] = (),
    experts: pd.DataFrame | None = None,
    step: int | Sequence[int] = 1,
    restart: int | Sequence[int] = 0,
    read_as: Sequence[int] | None = None,
    **said,
) -> Record:
    """A finished run; `held` says per column which images held, or how many of the first; all by default.

    Its verdict is what its findings come to. What fell did so at this step of this start, and was read as the next class, if
    nothing else is said, image by image; `experts` is what it tells of a mixture's gate.
    """
    columns = paper_columns() if columns is None else list(columns)
    held = held or {}
    parts = []
    for column in columns:
        value = held.get(column.name, n)
        robust = np.arange(n) < value if isinstance(value, int) else np.array(value, dtype=bool)
        labels = np.arange(len(robust)) % 10
        parts.append(
            pd.DataFrame(
                {
                    "index": np.arange(len(robust)) * 3,
                    "label": labels,
                    "column": column.name,
                    "prediction": np.where(robust, labels, (labels + 1) % 10 if read_as is None else read_as),
                    "robust": robust,
                    "restart": np.where(robust, -1, restart).astype("int16"),
                    "step": np.where(robust, -1, step).astype("int16"),
                    "share": robust.astype("float32"),
                    "selected": robust.astype("float32"),
                }
            )
        )
    table = pd.concat(parts, ignore_index=True)
    n = len(parts[0])
    if shuffle:
        table = table.sample(frac=1, random_state=1)
    file = io.BytesIO()
    damage(table).to_parquet(file, index=False)
    told = None if experts is None else experts.to_parquet(index=False)
    asked = Asked(
        dataset=dataset,
        data_hash=data_hash,
        defense=defense,
        config=dict(config or {}),
        recipe=recipe,
        model_hash=model_hash or f"{seed}{source}",
        protocol={"name": protocol} if isinstance(protocol, str) else dict(protocol),
        seed=seed,
        samples=n,
        precision=precision,
    )
    record = Record(
        asked=asked,
        columns=columns,
        programs=[],
        training=Training(source=source, seed=seed, parameters=1),
        where=Where(
            bench="0", commit=None, dirty=None, versions={}, device="cpu", threads=1, started="", seconds=1
        ),
        findings=list(findings),
        verdict=verdict(findings),
        outcomes_sha256=hashlib.sha256(file.getvalue()).hexdigest(),
        experts_sha256=None if told is None else hashlib.sha256(told).hexdigest(),
        **said,
    )
    path = folder(results, asked)
    finish(path, record, file.getvalue(), told)
    record = read(path)
    assert record is not None
    return record


def gate(weights: Mapping[str, np.ndarray], right: np.ndarray | bool = True) -> pd.DataFrame:
    """What a record tells of its gate: by kind of image the weights `(n, e)` of images whose classes count up from 0 to 9."""
    parts = []
    for at, given in weights.items():
        n, e = given.shape
        index = np.repeat(np.arange(n), e)
        own = {"index": index * 3, "label": index % 10, "at": at, "expert": np.tile(np.arange(e), n)}
        answers = np.broadcast_to(right, given.shape).flatten()
        parts.append(pd.DataFrame({**own, "weight": given.ravel(), "right": answers}))
    return pd.concat(parts, ignore_index=True)
