"""What is asked of a model: a list of columns, read from a TOML file.

    name = "mine"
    success = "any"            # or "last": which iterate decides
    eps = "8/255"              # or "dataset": the radius that each dataset names
    survivors = true           # each attack is shown only what those before it left standing; false by default
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
    "8-bit": "what every other attack at the radius found, rounded to whole pixel levels inside the ball, and asked again",
    "transfer:": "pgd crafted on another trained defense, by its name",
    "images:": "adversarial images from a file (.npz or .pt), in the dataset's order",
    "torchattacks:": "any attack of the torchattacks library, by its class name",
}

#: bytes of a protocol's file, and characters of one of its lines, beyond which it is none
LARGEST, LONGEST = 2**16, 2**12
#: attacks that are PGD with other words
PGD_FAMILY = ("pgd", "ms-pgd", "a-pgd")
#: what `adaptive` stands for on a mixture with a hard gate, and on one with a soft gate
HARD = ("frozen-gate", "soft-gate", "per-route", "all-experts", "sticky", "per-expert")
SOFT = ("frozen-gate", "all-experts", "per-expert")
#: the column that says which images every expert holds under its own attack
BOUND = "every-expert"
#: what is told of a hard mixture besides: the clean image's expert under its own attack, and the expert that an attack on
#: the gate alone chooses, asked for the clean image (RA-E and RA-R of RT-ER's paper, arXiv 2502.06832)
EXPERT_ATTACKED, ROUTER_ATTACKED = "expert-attacked", "router-attacked"
#: the images that a mixture's own certificate covers
CERTIFIED = "certified"
#: none of these says how robust the deployed model is
DIAGNOSTIC = (BOUND, EXPERT_ATTACKED, ROUTER_ATTACKED, CERTIFIED)
#: AutoAttack's components as its authors compose them
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
#: what its authors run against random models
RAND = ("apgd-ce", "apgd-dlr")
#: what its authors start five times over in the version `plus`
PLUS_RESTARTED = ("apgd-ce", "apgd-dlr", "fab")
#: the column that rounds what the others found
EIGHT_BIT = "8-bit"
#: what `adaptive` may ask of a mixture and of nothing else
ADAPTIVE = frozenset({*HARD, *SOFT, "legacy", *DIAGNOSTIC})

Mixture = Literal["hard", "soft"]

#: more than these would never end
MOST_STEPS, MOST_STARTS = 10**6, 10**4
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Starts = Annotated[int, Field(ge=1, le=MOST_STARTS)]


def _step_size(value: object) -> object:
    if isinstance(value, str) and value.replace(" ", "").startswith("eps/"):
        divisor = number(value.replace(" ", "")[4:])
        if not isinstance(divisor, float) or divisor <= 0:
            raise ValueError(f"{value!r} is not a step size; write eps/4 or a number")
        return f"eps/{divisor:g}"
    return number(value)


def _composition(settings: dict[str, Any]) -> tuple[str, ...]:
    """The components that AutoAttack's settings ask for, in turn."""
    known = {
        "standard": STANDARD,
        "rand": RAND,
        "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    }
    version = settings.get("version", "standard")
    if version not in known:
        raise ValueError(f"AutoAttack has no version {version!r}; choose from {', '.join(known)}")
    attacks = tuple(settings.get("attacks") or known[version])
    for name in attacks:
        if name not in known["plus"]:
            raise ValueError(f"no AutoAttack component named {name!r}; known: {', '.join(known['plus'])}")
    others = set(settings) - {"version", "attacks", "steps", "targets", "queries", "eot"}
    if others:
        raise ValueError(
            f"AutoAttack has no setting {min(others)!r}; known: version, attacks, steps, targets, queries, eot"
        )
    return attacks


class ColumnSpec(BaseModel):
    """One `[[column]]` of a protocol file; a list of radii or steps makes a column of each."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    attack: str
    eps: Radius | list[Radius] | None = None
    steps: Steps | list[Steps] | None = None
    step_size: Annotated[str | float, pydantic.BeforeValidator(_step_size)] | None = None
    restarts: Starts = 1
    eot: Starts = 1
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
        iterated = self.attack in (*PGD_FAMILY, "adaptive") or self.attack.startswith("transfer:")
        if iterated and self.steps is None and ":" not in self.attack:
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
        if self.settings and self.attack != "autoattack" and not self.attack.startswith("torchattacks:"):
            raise ValueError(f"{self.attack} takes no settings")
        if self.attack == "autoattack":
            _composition(self.settings)
        if self.attack == EIGHT_BIT and self.eps is not None:
            raise ValueError("8-bit rounds what was found at the protocol's radius; leave eps out")
        return self


@dataclass(frozen=True, kw_only=True)
class Column:
    """One question: an attack with everything it needs; `eps` and `step_size` in pixel units."""

    name: str
    """unique in the protocol"""
    attack: str
    """as tables print it"""
    family: str
    """what runs it: `clean`, `fgsm`, `pgd`, `mixture`, `autoattack`, `8-bit`, `transfer:NAME` or `torchattacks:NAME`"""
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
    survivors: bool = False
    part_of: str | None = None

    def record(self) -> ColumnRecord:
        """The column as records store it: what does not apply is left out."""
        if self.family == "clean":
            return ColumnRecord(name=self.name, attack=self.attack)
        iterated = self.family in ("pgd", "mixture") or self.family.startswith("transfer:")
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
            survivors=self.survivors,
            part_of=self.part_of,
        )


class Protocol(BaseModel):
    """A protocol as its file says it."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._+:-]*$")]
    about: str = ""
    norm: Literal["Linf", "L2"] = "Linf"
    success: Literal["last", "any"] = "any"
    eps: Number | Literal["dataset"] = "dataset"
    survivors: bool = False
    random_eot: Starts = 20
    """samples per step against a random model, where a column does not ask for several itself"""
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

    def columns(
        self,
        radius: float,
        mixture: Mixture | None = None,
        legacy: bool = False,
        *,
        certified: bool = False,
        random: bool = False,
        classes: int = 10,
    ) -> list[Column]:
        """Every column, `clean` first, at this radius.

        Args:
            radius: in pixel units.
            mixture: how the model routes, if it is a mixture; `adaptive` asks nothing of any other model.
            legacy: whether its authors' own loss is known.
            certified: whether it tells a radius that it certifies.
            random: whether the model's answers differ from call to call; gradients are then means over several.
            classes: how many there are; targeted attacks need four.

        Raises:
            ProtocolError: two columns are the same question.
        """
        columns = [Column(name="clean", attack="clean", family="clean")]
        for spec in self.specs:
            if spec.attack == "clean":
                continue
            if spec.attack == "adaptive":
                columns += self._adaptive(spec, radius, mixture, legacy, certified)
                continue
            if spec.attack == "autoattack":
                taken = {column.name for column in columns}
                for column in self._ensemble(spec, radius, random, classes):
                    clash = column.part_of and column.name in taken
                    name = f"{column.part_of}/{column.name}" if clash else column.name
                    columns.append(dataclasses.replace(column, name=name))
                continue
            for eps in spec.eps if isinstance(spec.eps, list) else [spec.eps]:
                for steps in spec.steps if isinstance(spec.steps, list) else [spec.steps]:
                    columns.append(self._column(spec, eps, steps, radius))
        names = [column.name for column in columns]
        for name in names:
            if names.count(name) > 1:
                raise ProtocolError(f"protocol {self.name!r} asks for {name!r} twice; leave one out")
        if random:
            columns = [
                dataclasses.replace(column, eot=self.random_eot)
                if column.eot == 1 and column.family in ("fgsm", "pgd", "mixture")
                else column
                for column in columns
            ]
        shown_all = ("clean", EIGHT_BIT)
        # of a random model no image ever counts as fallen for good
        survivors = self.survivors and not random
        return [
            dataclasses.replace(
                column, survivors=survivors and column.family not in shown_all and not column.diagnostic
            )
            for column in columns
        ]

    def _adaptive(
        self, spec: ColumnSpec, radius: float, mixture: Mixture | None, legacy: bool, certified: bool
    ) -> list[Column]:
        if mixture is None:
            return []
        known = {"hard": HARD, "soft": SOFT}[mixture] + (("legacy",) if legacy else ())
        one = self._column(
            spec, None, spec.steps if isinstance(spec.steps, int) else max(spec.steps or [1]), radius
        )
        told: tuple[str, ...] = (BOUND,)
        if mixture == "hard":
            told += (EXPERT_ATTACKED, ROUTER_ATTACKED)
        told += (CERTIFIED,) if certified and mixture == "soft" else ()
        return [
            dataclasses.replace(one, name=name, attack=name, family="mixture", diagnostic=name in DIAGNOSTIC)
            for name in (*known, *told)
        ]

    def _ensemble(self, spec: ColumnSpec, radius: float, random: bool, classes: int) -> list[Column]:
        """AutoAttack's components, each on what the one before left standing, and what all of them left.

        Only its authors' composition at full strength, against a deterministic model, is called AutoAttack.
        """
        settings = dict(spec.settings)
        whole = _composition(settings) == STANDARD and not set(settings) - {"version", "attacks"}
        if random and "attacks" not in settings:
            settings, whole = {**settings, "version": "rand"}, False
        attacks = _composition(settings)
        if classes < 4:
            # the targeted attacks need four classes, and the loss DLR three
            fewer = {
                "apgd-t": "apgd-dlr" if classes == 3 else "apgd-ce",
                "apgd-dlr": "apgd-dlr" if classes == 3 else "apgd-ce",
                "fab-t": "fab",
            }
            attacks, whole = tuple(dict.fromkeys(fewer.get(name, name) for name in attacks)), False
        eps = spec.eps if not isinstance(spec.eps, list) else max(spec.eps)
        one = self._column(spec, eps, None, radius)
        shown = "rand" if settings.get("version") == "rand" else "+".join(attacks)
        name = "autoattack" if whole else f"aa-like:{shown}"
        reduced = {key: value for key, value in settings.items() if key not in ("version", "attacks")}
        if settings.get("version") == "rand":
            reduced.setdefault("eot", 20)
        plus = settings.get("version") == "plus"
        parts = [
            dataclasses.replace(
                one,
                name=attack,
                attack=attack,
                settings={**reduced, **({"restarts": 5} if plus and attack in PLUS_RESTARTED else {})},
                part_of=name,
            )
            for attack in attacks
        ]
        return [*parts, dataclasses.replace(one, name=name, attack=name, settings=reduced)]

    def _column(self, spec: ColumnSpec, eps: float | None, steps: int | None, radius: float) -> Column:
        at = radius if eps is None else eps
        name = spec.attack
        attack = name if spec.loss == "ce" else f"{name}-{spec.loss}"
        if eps is not None:
            name += f"-{eps:.4g}"
        if steps is None and spec.attack.startswith("transfer:"):
            steps = 100
        elif steps is not None:
            name += f"-{steps}"
        if spec.attack == "pgd" and spec.restarts > 1:
            name += f"x{spec.restarts}"
        if spec.attack == "pgd" and spec.eot > 1:
            name += f"-eot{spec.eot}"
        if spec.loss != "ce":
            name += f"-{spec.loss}"
        if spec.settings and spec.attack.startswith("torchattacks:"):
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


#: what a protocol's file may say, of itself and of a column
FIELDS = [
    field.alias or name for model in (Protocol, ColumnSpec) for name, field in model.model_fields.items()
]


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
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
        text = raw.decode("utf-8")
    except (OSError, ValueError) as error:
        raise ProtocolError(
            f"cannot read the protocol {name!r}: {getattr(error, 'strerror', None) or error}"
        ) from None
    # Python's reader takes the square of the time for a key of many dots, and no more brackets than it can nest calls
    if len(raw) > LARGEST or any(len(line) > LONGEST for line in text.split("\n")):
        raise ProtocolError(
            f"{path.name} is no protocol: it has more than {LARGEST} bytes, or a line of more than {LONGEST} characters"
        )
    try:
        return Protocol.model_validate(tomllib.loads(text))
    except RecursionError:
        raise ProtocolError(f"{path.name} is no protocol: its values are nested too deeply") from None
    except ValueError as error:
        if isinstance(error, pydantic.ValidationError):
            raise ProtocolError(
                f"{path.name}{_line(text, error.errors()[0]['loc'])}: {complaint(error, FIELDS)}"
            ) from None
        # TOMLDecodeError, or an integer of more digits than Python reads
        raise ProtocolError(f"{path.name} is not TOML: {error}") from None


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
