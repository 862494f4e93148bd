"""Validated settings: frozen keyword-only dataclasses whose every field can be set from the command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

import pydantic
import pydantic.dataclasses
from typing_extensions import dataclass_transform

from bench.errors import UsageError, meant

T = TypeVar("T")


def number(text: object) -> object:
    """The float that `8/255`, `0.03` or `1e-3` stands for; anything that is not text comes back as it is.

    Raises:
        ValueError: the text is not a number, or it is a truth value.
    """
    if isinstance(text, bool):
        # Python counts True as 1, and a radius of True would be the whole box
        raise ValueError(f"{text!r} is not a number; write 0.03 or 8/255")
    if not isinstance(text, str):
        return text
    try:
        above, slash, below = text.partition("/")
        return float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{text!r} is not a number; write 0.03 or 8/255") from None


#: a float that may be written as a fraction, such as 8/255
Number = Annotated[float, pydantic.BeforeValidator(number)]
#: a radius in pixel units of [0,1]: more than 0, at most 1
Radius = Annotated[Number, pydantic.Field(gt=0, le=1)]
#: a learning rate: finite and more than 0
Rate = Annotated[Number, pydantic.Field(gt=0, allow_inf_nan=False)]
#: a finite number of at least 0, such as a weight decay
NotNegative = Annotated[Number, pydantic.Field(ge=0, allow_inf_nan=False)]
#: a whole number of at least 1, such as a batch size
AtLeastOne = Annotated[int, pydantic.Field(ge=1, strict=True)]
#: a whole number of at least 0, such as the epochs of a stage that may be left out
Whole = Annotated[int, pydantic.Field(ge=0, strict=True)]


@dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field, pydantic.Field)
)
def config(cls: type[T]) -> type[T]:
    """A frozen keyword-only dataclass that checks its values and refuses unknown fields."""
    return pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config={"extra": "forbid"})(cls)  # type: ignore[return-value]


def complaint(error: pydantic.ValidationError, known: Iterable[str] = ()) -> str:
    """The first fault of a validation, in one line: field, what was given, what was expected; `known` are fields there are."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "value"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{field}: no such setting{meant(str(first['loc'][-1]), known)}"
    given = repr(first.get("input"))
    given = given if len(given) <= 80 else f"{given[:77]}…"
    said = first["type"] == "value_error" and given in message
    return f"{field}: {message}" if said else f"{field}: {message}, got {given}"


def replaced(settings: T, overrides: Mapping[str, object]) -> T:
    """`settings` with some fields replaced; text is read as JSON where it is JSON, else taken as it is.

    Raises:
        UsageError: an unknown field or a value of the wrong kind.
    """
    known = [field.name for field in dataclasses.fields(settings)]  # type: ignore[arg-type]
    values = {name: getattr(settings, name) for name in known}
    for name, value in overrides.items():
        if name not in known:
            raise UsageError(f"no setting named {name!r}; there are: {', '.join(known)}{meant(name, known)}")
        values[name] = _read(value) if isinstance(value, str) else value
    try:
        return type(settings)(**values)
    except pydantic.ValidationError as error:
        raise UsageError(f"bad setting: {complaint(error)}") from None


def as_json(settings: object) -> dict[str, Any]:
    """The settings as plain JSON values, ready to be hashed and stored."""
    dumped: dict[str, Any] = json.loads(pydantic.TypeAdapter(type(settings)).dump_json(settings))
    return dumped


def from_json(cls: type[T], stored: Mapping[str, Any]) -> T:
    """The settings that `as_json` wrote.

    Raises:
        UsageError: an unknown field or a value of the wrong kind.
    """
    try:
        restored: T = pydantic.TypeAdapter(cls).validate_python(dict(stored))
    except pydantic.ValidationError as error:
        raise UsageError(f"bad setting: {complaint(error)}") from None
    return restored


def _read(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        # no JSON, or JSON beyond what Python reads; the field's own type says what is wrong with it
        return text
