"""The schema of a result, and how it lies on disk.

    results/runs/<dataset>/<defense>/<protocol>-<key>/
        record.json        what was asked, what was run, where; written last: without it there is no result
        outcomes.parquet   one row per image and column, as `Record.outcomes` says
        void.json          in place of both: why this run must not become a number
        parts/             finished batches of a run that is under way

`key` is a hash of what was asked, so a finished run is found again and a changed one lies beside it. Every file is
written under another name and then renamed; a reader sees all of it or nothing. Statistics are derived, never stored.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict

from bench.errors import UsageError, meant
from bench.finding import Finding, Verdict, verdict

if TYPE_CHECKING:
    import pandas as pd

SCHEMA: Literal[2] = 2
#: raised whenever an attack or the evaluation changes so that an outcome can move: older runs are then run again
OUTCOMES = 2
#: how the name of a file ends that is not complete yet
UNDER_WAY = ".tmp"


class Asked(BaseModel):
    """What determines the outcomes; its hash is the key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    data_hash: str
    defense: str
    config: dict[str, Any]
    recipe: str | None
    model_hash: str
    """sha256 of the weights that were attacked"""
    protocol: dict[str, Any]
    """the protocol in full, radius filled in"""
    seed: int
    samples: int
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    weights: Literal["best", "last"] = "best"
    """which network of its training"""
    harness: int = OUTCOMES
    """which generation of the harness's attacks was asked"""
    code: str = ""
    """hash of the file that defines the defense, blind to comments; empty where there is no file"""

    @pydantic.field_validator("protocol")
    @classmethod
    def _named(cls, protocol: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(protocol.get("name"), str):
            raise ValueError("a protocol has a name")
        return protocol

    @property
    def key(self) -> str:
        """Twelve hex digits of the hash of all of it."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class ColumnRecord(BaseModel):
    """One column of the protocol as it was run; `epsilon` and `step_size` in pixel units."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """unique in the protocol, the `column` of outcomes.parquet"""
    attack: str
    """`clean`, `fgsm`, `pgd`, `ms-pgd`, `a-pgd`, …: the `attack` of the long table"""
    norm: str | None = None
    epsilon: float | None = None
    step_size: float | None = None
    steps: int | None = None
    restarts: int | None = None
    eot: int | None = None
    loss: str | None = None
    settings: dict[str, Any] = {}
    """whatever else the attack was given"""
    diagnostic: bool = False
    """whether it tells something other than the deployed model's robustness, and so counts for no worst case"""
    survivors: bool = False
    """whether it was shown only what the columns before it had left standing; its accuracy counts those that fell
    before as fallen"""
    part_of: str | None = None
    """the column of an ensemble whose component this is"""


class ProgramRecord(BaseModel):
    """One attack program: the columns it answered and what they cost together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    columns: list[str]
    gradients: int
    """images times forward-backward passes"""
    forwards: int
    """images times forward passes alone"""
    seconds: float


class Where(BaseModel):
    """Provenance."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bench: str
    commit: str | None
    dirty: bool | None
    versions: dict[str, str]
    device: str
    threads: int
    started: str
    seconds: float


class Training(BaseModel):
    """What the weights are and what they cost."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    """`trained` or the checkpoint as it was given"""
    seed: int | None = None
    seconds: float | None = None
    parameters: int
    stages: list[dict[str, Any]] = []
    """a row an epoch: `stage`, `epoch`, `loss`, `held_out` (the accuracy that selects), and what the stage observes"""
    weights: Literal["best", "last"] | None = None
    """which of a training's two networks this is: of the epoch selected on held-out images, or of the last epoch"""
    epoch: int | None = None
    """of the last stage, whose weights these are"""
    passes: float | None = None
    """forward-backward passes of the whole training per image learnt from, crafting included, held-out images not

    One is a pass through all that the network computes for an image; a step on half of a mixture's experts is half a
    pass. A graph that is recorded counts as differentiated.
    """
    forwards: float | None = None
    """forward passes with no backward pass, likewise"""
    checks: float | None = None
    """forward-backward passes of attacking held-out images after each epoch, likewise"""
    multiply_adds: int | None = None
    """of one image's forward pass: what a pass of this network costs, to compare networks of different sizes"""


class Facts(BaseModel):
    """What the model was found to be before it was attacked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mixture: Literal["hard", "soft"] | None = None
    """how it routes, where it is a mixture of experts"""
    randomness: Literal["deterministic", "noisy", "stochastic", "re-seeded"] = "deterministic"
    output: Literal["logits", "probabilities", "log-probabilities"] = "logits"
    passes: int = 1
    """the most often that a layer with parameters is called in one forward pass"""
    draws: int = 1
    """answers asked of a random model for each image that is scored"""
    classes: int = 10
    stated_clean: float | None = None
    """the accuracy on clean images that its checkpoint states, in percent"""
    zero_loss: float = 0.0
    """the share of correctly classified images on which float32 cross-entropy is exactly 0"""


class Audited(BaseModel):
    """What looking for doubts cost."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    images: int
    """how many the probes looked at"""
    gradients: int
    forwards: int
    seconds: float
    share: float
    """of the passes that the run's outcomes stand for: those taken, and those of steps whose result PGD knew"""


class Record(BaseModel):
    """All of a result but the outcomes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[2] = SCHEMA
    asked: Asked
    columns: list[ColumnRecord]
    programs: list[ProgramRecord]
    training: Training
    where: Where
    published_as: str | None = None
    """the row of the paper's tables that this defense reproduces"""
    footnotes: list[str] = []
    """what a reader of any table must know, from the protocol"""
    model: Facts = Facts()
    findings: list[Finding] = []
    """what speaks against believing the numbers"""
    verdict: Verdict = "credible"
    """what the findings come to"""
    audited: Audited | None = None
    outcomes_sha256: str
    experts_sha256: str | None = None
    """of experts.parquet, which a mixture's run has beside its outcomes"""

    _folder: Path | None = pydantic.PrivateAttr(default=None)

    @pydantic.model_validator(mode="after")
    def _agree(self) -> Record:
        if self.verdict != verdict(self.findings):
            raise ValueError(f"verdict {self.verdict} does not follow from the findings")
        return self

    def outcomes(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """One row per image and column.

        - `index`, `label`, `column`: which image, and which question.
        - `prediction`: of the image that the attack ended with.
        - `robust`: whether the answer was right; of a random model, in every one of the draws.
        - `restart`, `step`: the start, and the step after it, that broke the image; -1 where this column broke none, or
          where a library does not tell the step.
        - `share`: of the draws that were right; 1 or 0 for a deterministic model.
        - `selected`: the same share over the draws that the attack chose its image by. `share` is over fresh ones, so
          what a column is worth is read off `share`, and which column is worst for an image off `selected`.

        Args:
            columns: which of these nine to read; all of them by default.

        Raises:
            UsageError: the file is missing, or not the one this record was written with.
        """
        return self._rows("outcomes.parquet", self.outcomes_sha256, _KINDS, columns)

    def experts(self) -> pd.DataFrame | None:
        """What each expert of a mixture did, one row per image, occasion and expert; None of a run that did not keep it.

        - `index`, `label`: which image.
        - `at`: `clean`, or `attacked`: the image that the run's attacks at the radius of its last column ended with, one that
          broke the mixture if any did. What was misclassified as it stood was not attacked.
        - `expert`, `weight`: what it weighs in the answer; of a hard gate 1 for the one that answers.
        - `right`: whether that expert alone gives the label.

        Raises:
            UsageError: the file is missing, or not the one this record was written with.
        """
        if self.experts_sha256 is None:
            return None
        return self._rows("experts.parquet", self.experts_sha256, _EXPERT_KINDS)

    def _rows(
        self, name: str, sha256: str, kinds: Mapping[str, str], columns: Sequence[str] | None = None
    ) -> pd.DataFrame:
        """The rows of a parquet file beside the record, which vouches for it."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        assert self._folder is not None, "a record that was not read from disk"
        path = self._folder / name
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise UsageError(f"{path} is missing; delete the folder and run again") from None
        if hashlib.sha256(content).hexdigest() != sha256:
            raise UsageError(
                f"{path} is not what its record was written with; delete the folder and run again"
            )
        # from memory and without reader threads: those may outlive a short process and abort it
        try:
            file = pq.ParquetFile(pa.BufferReader(content), pre_buffer=False)
            _fits(file.schema_arrow, file.metadata.num_rows, kinds)
            table = file.read(columns=None if columns is None else list(columns), use_threads=False)
            table.validate(full=True)
            frame: pd.DataFrame = table.to_pandas(use_threads=False, ignore_metadata=True)
        except (
            pa.ArrowException,
            OSError,
            ValueError,
            KeyError,
            TypeError,
            OverflowError,
            MemoryError,
        ) as error:
            # Arrow raises any of these on a file that was made by hand
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UsageError(
                f"{path} holds no {path.stem} that can be read ({reason}); delete the folder and run again"
            ) from None
        return frame


#: the columns of outcomes.parquet, and the kinds of numbers in them as numpy names them
_KINDS = {
    **dict.fromkeys(("index", "label", "prediction", "restart", "step"), "iu"),
    **{"column": "O", "robust": "b", "share": "f", "selected": "f"},
}
#: those of experts.parquet
_EXPERT_KINDS = {**dict.fromkeys(("index", "label", "expert"), "iu"), "at": "O", "weight": "f", "right": "b"}
#: rows beyond this are no run of ours: a hundred million images under a hundred columns
_MOST_ROWS = 10**10


def _fits(schema: Any, rows: int, wanted: Mapping[str, str]) -> None:
    """Sees that a parquet file may have these columns, of these kinds of numbers, before any of it is decoded.

    Raises:
        ValueError: a column is missing or holds something else.
    """
    if rows > _MOST_ROWS:
        raise ValueError(f"it claims {rows} rows")
    for name, kinds in wanted.items():
        if name not in schema.names:
            raise ValueError(f"it has no column {name!r}")
        if _kind(schema.field(name).type) not in kinds:
            raise ValueError(f"its column {name!r} is {schema.field(name).type}")


def _kind(type_: Any) -> str:
    """The letter of a type of Arrow's: i, u, b, f, O for text, and nothing for all others."""
    import pyarrow as pa

    value = type_.value_type if pa.types.is_dictionary(type_) else type_
    if pa.types.is_string(value) or pa.types.is_large_string(value):
        return "O"
    if value is not type_:
        return "-"
    letters = {
        "i": pa.types.is_signed_integer,
        "u": pa.types.is_unsigned_integer,
        "f": pa.types.is_floating,
        "b": pa.types.is_boolean,
    }
    return next((letter for letter, fits in letters.items() if fits(value)), "-")


def folder(results: Path, asked: Asked) -> Path:
    """Where the run that was asked lies or will lie."""
    return (
        results
        / "runs"
        / safe(asked.dataset)
        / safe(asked.defense)
        / f"{safe(asked.protocol['name'])}-{asked.key}"
    )


def read(path: Path) -> Record | None:
    """The record in a run's folder; None where no run has finished.

    Raises:
        UsageError: the record is damaged or of a schema this version does not know.
    """
    file = path / "record.json"
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    try:
        record = Record.model_validate_json(content)
    except pydantic.ValidationError as error:
        from bench.config import complaint

        raise UsageError(
            f"{file} is no record of schema {SCHEMA} ({complaint(error)}); delete its folder and run again"
        ) from None
    record._folder = path
    return record


def find(results: Path, run: str) -> Path:
    """The folder of the run that a user means: its path, or any part of `dataset/defense/protocol-key` that only it has.

    Where whole names fit, those that merely hold the text do not: `dwf` is the defense and not its protocol `dwf-paper`.

    Raises:
        UsageError: none or several fit.
    """
    folders = sorted(
        path.parent for name in ("record", "void") for path in (results / "runs").glob(f"*/*/*/{name}.json")
    )
    given = Path(run)
    if given.name in ("record.json", "void.json"):
        given = given.parent
    if any((given / name).is_file() for name in ("record.json", "void.json")):
        return given
    fits = list(
        dict.fromkeys(path for path in folders if run in path.relative_to(results / "runs").as_posix())
    )
    fits = [path for path in fits if _called(path, run)] or fits
    if len(fits) == 1:
        return fits[0]
    shown = ", ".join(path.relative_to(results / "runs").as_posix() for path in (fits or folders)[:5])
    known = (
        f"; there are {shown}" + ("…" if len(fits or folders) > 5 else "")
        if shown
        else "; `bench run` makes some"
    )
    near = (
        ""
        if fits
        else meant(run, {part for path in folders for part in path.relative_to(results / "runs").parts})
    )
    raise UsageError(
        f"{'several runs fit' if fits else 'no run fits'} {run!r} in {str(results)!r}{known}{near}"
    )


def _called(folder: Path, run: str) -> bool:
    """Whether a text is one or more whole names in a run's path; the key may be left out."""
    dataset, defense, protocol = folder.parts[-3:]
    given = f"/{run.strip('/')}/"
    return any(
        given in f"/{dataset}/{defense}/{last}/"
        for last in (protocol, re.sub(r"-[0-9a-f]{12}$", "", protocol))
    )


def read_void(path: Path) -> Void | None:
    """Why the run in this folder is void; None where it is not.

    Raises:
        UsageError: the file is damaged.
    """
    file = path / "void.json"
    try:
        return Void.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except pydantic.ValidationError:
        raise UsageError(f"{file} is damaged; delete it and run again") from None


def read_all(results: Path) -> Iterator[Record]:
    """Every finished run of a results folder, in the order of their paths.

    Raises:
        UsageError: there is no such folder, or a record in it is damaged.
    """
    if not results.is_dir():
        raise UsageError(f"no results folder {str(results)!r}; `bench run` makes one")
    for file in sorted((results / "runs").glob("*/*/*/record.json")):
        record = read(file.parent)
        if record is not None:
            yield record


def atomic(path: Path, content: bytes) -> None:
    """Writes a file so that a reader sees the old content or all of the new, never a part, even after a loss of power.

    Raises:
        UsageError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=UNDER_WAY)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _settle(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from None


def _settle(folder: Path) -> None:
    """Makes a renaming in this folder last: without it, a loss of power may bring back the name of before."""
    with suppress(OSError):
        # some file systems, and Windows, cannot open a folder; there the renaming lasts when they see fit
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def cannot_write(path: Path, error: OSError) -> UsageError:
    """What to say where a file cannot be written."""
    return UsageError(
        f"cannot write {path}: {error.strerror or error}; choose another folder with --results or free some room, then the same "
        "command goes on from what is kept"
    )


def finish(path: Path, record: Record, outcomes: bytes, experts: bytes | None = None) -> None:
    """Writes a finished run: the outcomes first, the record that vouches for them last."""
    if experts is not None:
        atomic(path / "experts.parquet", experts)
    atomic(path / "outcomes.parquet", outcomes)
    atomic(path / "record.json", (record.model_dump_json(indent=2) + "\n").encode())
    (path / "void.json").unlink(missing_ok=True)


def forget(parts: Path) -> None:
    """Deletes the finished batches of a run; their rows are in its record."""
    shutil.rmtree(parts, ignore_errors=True)


class Void(BaseModel):
    """A run that must not become a number, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    asked: Asked
    findings: list[Finding]
    verdict: Literal["void"] = "void"


def void(path: Path, asked: Asked, findings: list[Finding]) -> None:
    """Writes why a run is void; the same command tries again."""
    atomic(
        path / "void.json", (Void(asked=asked, findings=findings).model_dump_json(indent=2) + "\n").encode()
    )


def writable(results: Path) -> None:
    """Makes the results folder.

    Raises:
        UsageError: it cannot be made or written.
    """
    try:
        results.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=results):
            pass
    except OSError as error:
        raise UsageError(
            f"cannot write the results folder {str(results)!r}: {error.strerror}; choose another with --results"
        ) from None


def safe(name: str) -> str:
    """A name as one folder name: `npz:my/dir` must not climb, and file systems take no more than 255 bytes."""
    kept = "".join(c if c.isalnum() or c in "-_.+" else "_" for c in name).strip(".")
    if len(kept.encode()) > LONGEST:
        kept = kept.encode()[:LONGEST].decode(errors="ignore")
    return (
        kept
        if kept == name
        else f"{kept}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:6]}"
    )


#: bytes of a name; a hash, a key and what marks a file as under way come on top
LONGEST = 150
