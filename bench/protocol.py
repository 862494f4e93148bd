"""What is asked of a model: a list of columns, read from a TOML file.

    name = "mine"
    success = "any"            # or "last": which iterate decides
    eps = "8/255"              # or "dataset": the radius that each dataset names
    [[column]]
    attack = "pgd"
    steps = [10, 50]           # one column for each
    step_size = "eps/4"
    restarts = 5
    loss = "margin"            # or "ce"

A clean column stands first in every protocol and need not be written.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from bench.config import Number, Radius, complaint, number
from bench.errors import ProtocolError, UnknownName
from bench.record import ColumnRecord

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: what `attack = "…"` may say, with a line about each; a trailing colon stands for a family of names
ATTACKS = {
    "clean": "the images as they are",
    "fgsm": "one step along the sign of the gradient (Goodfellow et al. 2015)",
    "pgd": "projected gradient ascent from a random start (Madry et al. 2018)",
    "ms-pgd": "pgd from several random starts; an image must survive them all",
    "a-pgd": "pgd whose gradient is averaged over `eot` passes through the full model",
    "adaptive": "everything that the harness knows against a mixture; nothing on other models",
    "autoattack": "APGD-CE, APGD-T, FAB-T and Square in turn (Croce and Hein 2020), by their authors' code",
    "torchattacks:": "any attack of the torchattacks library, by its class name",
}

#: attacks that are PGD with other words
PGD_FAMILY = ("pgd", "ms-pgd", "a-pgd")
#: what `adaptive` stands for on a mixture with a hard gate, and on one with a soft gate
HARD = ("frozen-gate", "soft-gate", "per-route", "all-experts", "sticky", "per-expert")
SOFT = ("frozen-gate", "all-experts", "per-expert")
#: the column that says which images every expert holds under its own attack
BOUND = "every-expert"
#: what `adaptive` may ask of a mixture and of nothing else
ADAPTIVE = frozenset({*HARD, *SOFT, "legacy", BOUND})

Mixture = Literal["hard", "soft"]

Steps = Annotated[int, Field(ge=1)]


def _step_size(value: object) -> object:
    if isinstance(value, str) and value.replace(" ", "").startswith("eps/"):
        divisor = number(value.replace(" ", "")[4:])
        if not isinstance(divisor, float) or divisor <= 0:
            raise ValueError(f"{value!r} is not a step size; write eps/4 or a number")
        return f"eps/{divisor:g}"
    return number(value)


class ColumnSpec(BaseModel):
    """One `[[column]]` of a protocol file; a list of radii or steps makes a column of each."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    attack: str
    eps: Radius | list[Radius] | None = None
    steps: Steps | list[Steps] | None = None
    step_size: Annotated[str | float, pydantic.BeforeValidator(_step_size)] | None = None
    restarts: Annotated[int, Field(ge=1)] = 1
    eot: Annotated[int, Field(ge=1)] = 1
    loss: Literal["ce", "margin"] = "ce"
    random_start: bool = True
    settings: dict[str, Any] = {}

    @pydantic.field_validator("attack")
    @classmethod
    def _known(cls, attack: str) -> str:
        if attack in ATTACKS or any(name.endswith(":") and attack.startswith(name) for name in ATTACKS):
            return attack
        known = [name + "NAME" if name.endswith(":") else name for name in ATTACKS]
        raise ValueError(str(UnknownName("attack", attack, known)))

    @pydantic.model_validator(mode="after")
    def _fits(self) -> ColumnSpec:
        iterated = self.attack in (*PGD_FAMILY, "adaptive")
        if iterated and self.steps is None:
            raise ValueError(f"{self.attack} needs steps, such as steps = 10")
        if not iterated:
            for name in ("steps", "step_size"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{self.attack} has no {name}; settings = {{…}} passes arguments to a library's attack"
                    )
            for name in ("restarts", "eot") if self.attack != "fgsm" else ("restarts",):
                if getattr(self, name) != 1:
                    raise ValueError(f"{self.attack} has no {name}")
        if self.restarts > 1 and not self.random_start:
            raise ValueError("restarts without random_start are one run repeated")
        if self.settings and self.attack != "autoattack" and ":" not in self.attack:
            raise ValueError(f"{self.attack} takes no settings")
        return self


@dataclass(frozen=True, kw_only=True)
class Column:
    """One question: an attack with everything it needs; `eps` and `step_size` in pixel units."""

    name: str
    """unique in the protocol"""
    attack: str
    """as tables print it"""
    family: str
    """what runs it: `clean`, `fgsm`, `pgd`, `mixture`, `autoattack` or `torchattacks:NAME`"""
    norm: str = "Linf"
    eps: float = 0.0
    steps: int = 0
    step_size: float = 0.0
    restarts: int = 1
    eot: int = 1
    loss: str = "ce"
    random_start: bool = True
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    diagnostic: bool = False

    def record(self) -> ColumnRecord:
        """The column as records store it: what does not apply is left out."""
        if self.family == "clean":
            return ColumnRecord(name=self.name, attack=self.attack)
        iterated = self.family in ("pgd", "mixture")
        return ColumnRecord(
            name=self.name,
            attack=self.attack,
            norm=self.norm,
            epsilon=self.eps,
            step_size=self.step_size if iterated else None,
            steps=self.steps if iterated else None,
            restarts=self.restarts if iterated else None,
            eot=self.eot if iterated or self.family == "fgsm" else None,
            loss=self.loss if iterated or self.family == "fgsm" else None,
            settings=self.settings,
            diagnostic=self.diagnostic,
        )


class Protocol(BaseModel):
    """A protocol as its file says it."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._+:-]*$")]
    about: str = ""
    norm: Literal["Linf", "L2"] = "Linf"
    success: Literal["last", "any"] = "any"
    eps: Number | Literal["dataset"] = "dataset"
    footnotes: list[str] = []
    provenance: dict[str, Literal["paper", "unrecovered", "ours"]] = {}
    specs: Annotated[list[ColumnSpec], Field(alias="column", min_length=1)]

    @pydantic.field_validator("eps")
    @classmethod
    def _positive(cls, eps: float | str) -> float | str:
        if not isinstance(eps, str) and not eps > 0:
            raise ValueError("eps must be more than 0")
        return eps

    def radius(self, dataset_eps: float, override: float | None = None) -> float:
        """The radius of the columns that name none: the override, the protocol's own, or the dataset's."""
        if override is not None:
            return override
        return dataset_eps if isinstance(self.eps, str) else self.eps

    def columns(self, radius: float, mixture: Mixture | None = None, legacy: bool = False) -> list[Column]:
        """Every column, `clean` first, at this radius.

        Args:
            radius: in pixel units.
            mixture: how the model routes, if it is a mixture; `adaptive` asks nothing of any other model.
            legacy: whether its authors' own loss is known.

        Raises:
            ProtocolError: two columns are the same question.
        """
        columns = [Column(name="clean", attack="clean", family="clean")]
        for spec in self.specs:
            if spec.attack == "clean":
                continue
            if spec.attack == "adaptive":
                columns += self._adaptive(spec, radius, mixture, legacy)
                continue
            for eps in spec.eps if isinstance(spec.eps, list) else [spec.eps]:
                for steps in spec.steps if isinstance(spec.steps, list) else [spec.steps]:
                    columns.append(self._column(spec, eps, steps, radius))
        names = [column.name for column in columns]
        for name in names:
            if names.count(name) > 1:
                raise ProtocolError(f"protocol {self.name!r} asks for {name!r} twice; leave one out")
        return columns

    def _adaptive(
        self, spec: ColumnSpec, radius: float, mixture: Mixture | None, legacy: bool
    ) -> list[Column]:
        if mixture is None:
            return []
        known = {"hard": HARD, "soft": SOFT}[mixture] + (("legacy",) if legacy else ())
        one = self._column(
            spec, None, spec.steps if isinstance(spec.steps, int) else max(spec.steps or [1]), radius
        )
        return [
            dataclasses.replace(one, name=name, attack=name, family="mixture", diagnostic=name == BOUND)
            for name in (*known, BOUND)
        ]

    def _column(self, spec: ColumnSpec, eps: float | None, steps: int | None, radius: float) -> Column:
        at = radius if eps is None else eps
        name = spec.attack
        if spec.attack == "autoattack" and spec.settings:
            # the name AutoAttack is kept for the standard ensemble
            parts = spec.settings.get("attacks") or [spec.settings.get("version", "standard")]
            name = "aa:" + "+".join(str(part) for part in parts) if parts != ["standard"] else "autoattack"
        attack = name if spec.loss == "ce" else f"{name}-{spec.loss}"
        if eps is not None:
            name += f"-{eps:.4g}"
        if steps is not None:
            name += f"-{steps}"
        if spec.attack == "pgd" and spec.restarts > 1:
            name += f"x{spec.restarts}"
        if spec.attack == "pgd" and spec.eot > 1:
            name += f"-eot{spec.eot}"
        if spec.loss != "ce":
            name += f"-{spec.loss}"
        if spec.settings and ":" in spec.attack:
            name += "-" + "-".join(f"{key}={value}" for key, value in sorted(spec.settings.items()))
        size = spec.step_size
        return Column(
            name=name,
            attack=attack,
            family="pgd" if spec.attack in PGD_FAMILY else spec.attack,
            norm=self.norm,
            eps=at,
            steps=steps or 0,
            step_size=at / (4.0 if size is None else float(size[4:]))
            if size is None or isinstance(size, str)
            else size,
            restarts=spec.restarts,
            eot=spec.eot,
            loss=spec.loss,
            random_start=spec.random_start,
            settings=spec.settings,
        )


def load(name: str) -> Protocol:
    """The protocol of that name, or of that TOML file.

    Raises:
        UnknownName: no such protocol.
        ProtocolError: the file cannot be read or does not say what to do; names line and field.
    """
    path = Path(name)
    if path.suffix != ".toml":
        known = names()
        if name not in known:
            raise UnknownName("protocol", name, known, "; a protocol of your own is a .toml file")
        path = _folder() / f"{name}.toml"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProtocolError(
            f"cannot read the protocol {name!r}: {getattr(error, 'strerror', None) or error}"
        ) from None
    try:
        return Protocol.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ProtocolError(f"{path.name} is not TOML: {error}") from None
    except pydantic.ValidationError as error:
        raise ProtocolError(
            f"{path.name}{_line(text, error.errors()[0]['loc'])}: {complaint(error)}"
        ) from None


def with_attacks(protocol: Protocol, attacks: Sequence[str]) -> Protocol:
    """The protocol with further columns, named after them.

    Raises:
        ProtocolError: an unknown attack, or one that needs more than its name.
    """
    if not attacks:
        return protocol
    try:
        added = [ColumnSpec(attack=attack) for attack in attacks]
    except pydantic.ValidationError as error:
        raise ProtocolError(
            f"--attack {complaint(error)}; what needs more than a name goes into a protocol file"
        ) from None
    name = "+".join([protocol.name, *(attack.split(":")[-1] for attack in attacks)])
    return protocol.model_copy(update={"name": name, "specs": [*protocol.specs, *added]})


def names() -> dict[str, str]:
    """The protocols that come with the harness, with a line about each."""
    return {
        file.stem: str(tomllib.loads(file.read_text(encoding="utf-8"))["about"])
        for file in sorted(_folder().glob("*.toml"))
    }


def _folder() -> Path:
    return Path(__file__).parent / "protocols"


def _line(text: str, location: Sequence[int | str]) -> str:
    """Where in the file a fault lies, as far as TOML tells: `, line 7`."""
    lines = text.split("\n")
    start = 0
    keys = [part for part in location if isinstance(part, str)]
    if location[:1] == ("column",) and len(location) > 1 and isinstance(location[1], int):
        heads = [i for i, line in enumerate(lines) if line.replace(" ", "").startswith("[[column]]")]
        if location[1] < len(heads):
            start = heads[location[1]]
            keys = keys[1:]
    for key in keys[:1]:
        for i in range(start, len(lines)):
            if lines[i].replace(" ", "").startswith((f"{key}=", f"[{key}]", f"[[{key}]]")):
                return f", line {i + 1}"
    return f", line {start + 1}" if start else ""
