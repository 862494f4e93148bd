"""Settings: what may be written for a field, what comes back, and the line that answers a mistake."""

import dataclasses
import json

import pytest

from bench.config import (
    AtLeastOne,
    NotNegative,
    Number,
    Radius,
    Rate,
    Whole,
    as_json,
    config,
    from_json,
    number,
    replaced,
)
from bench.errors import UsageError


@config
class Settings:
    """One field of every kind."""

    radius: Radius = 0.1
    perhaps: Radius | None = None
    factor: Number = 1.0
    rate: Rate = 0.1
    decay: NotNegative = 0.0
    count: AtLeastOne = 3
    epochs: Whole = 2
    radii: tuple[Radius, ...] = (0.1, 0.2)
    flag: bool = False
    name: str | None = None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8/255", 8 / 255),
        (" 8 / 255 ", 8 / 255),
        ("1.5/3", 0.5),
        ("0.03", 0.03),
        ("1e-3", 0.001),
        ("-2", -2.0),
        (0.5, 0.5),
        (3, 3),
        (None, None),
    ],
)
def test_a_number_is_written_as_a_decimal_or_a_fraction(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    "text", ["", "abc", "8/", "/255", "8/255/2", "1/0", "8:255", "0,03", "eps", True, False]
)
def test_what_is_no_number_is_answered_with_how_to_write_one(text):
    with pytest.raises(ValueError, match="is not a number; write 0.03 or 8/255"):
        number(text)


@pytest.mark.parametrize(
    ("field", "given", "value"),
    [
        ("radius", "8/255", 8 / 255),
        ("radius", "1", 1.0),
        ("radius", 0.25, 0.25),
        ("perhaps", "2/255", 2 / 255),
        ("perhaps", "null", None),
        ("factor", "-1/4", -0.25),
        ("rate", "1/10", 0.1),
        ("decay", "5e-4", 5e-4),
        ("decay", "0", 0.0),
        ("count", "7", 7),
        ("epochs", "0", 0),
        ("radii", '[0.01, "8/255"]', (0.01, 8 / 255)),
        ("radii", [0.5], (0.5,)),
        ("radii", "[]", ()),
        ("flag", "true", True),
        ("name", "a/b", "a/b"),
        ("name", '"7"', "7"),
    ],
)
def test_text_is_read_as_json_where_it_is_json_and_else_as_it_stands(field, given, value):
    changed = replaced(Settings(), {field: given})
    assert getattr(changed, field) == value
    assert type(getattr(changed, field)) is type(value)
    others = {f.name for f in dataclasses.fields(Settings)} - {field}
    assert all(getattr(changed, name) == getattr(Settings(), name) for name in others)


@pytest.mark.parametrize(
    ("field", "given", "said"),
    [
        ("radius", "abc", "radius: 'abc' is not a number; write 0.03 or 8/255"),
        ("radius", "0", "radius: Input should be greater than 0, got 0"),
        ("radius", "-0.1", "radius: Input should be greater than 0, got -0.1"),
        ("radius", "1.01", "radius: Input should be less than or equal to 1, got 1.01"),
        ("radius", "8", "radius: Input should be less than or equal to 1, got 8"),
        ("radius", "nan", "radius: Input should be greater than 0, got 'nan'"),
        ("radius", "Infinity", "radius: Input should be less than or equal to 1, got inf"),
        ("radius", "true", "radius: True is not a number; write 0.03 or 8/255"),
        ("radius", "null", "radius: Input should be a valid number, got None"),
        ("perhaps", "x", "perhaps: 'x' is not a number; write 0.03 or 8/255"),
        ("rate", "0", "rate: Input should be greater than 0, got 0"),
        ("rate", "inf", "rate: Input should be a finite number, got 'inf'"),
        ("decay", "-1e-9", "decay: Input should be greater than or equal to 0, got -1e-09"),
        ("count", "0", "count: Input should be greater than or equal to 1, got 0"),
        ("count", "2.5", "count: Input should be a valid integer, got 2.5"),
        ("count", "true", "count: Input should be a valid integer, got True"),
        ("count", "three", "count: Input should be a valid integer, got 'three'"),
        ("epochs", "-1", "epochs: Input should be greater than or equal to 0, got -1"),
        ("radii", "8/255", "radii: Input should be a valid tuple, got '8/255'"),
        ("radii", "[0.1, 2]", "radii.1: Input should be less than or equal to 1, got 2"),
        ("name", "7", "name: Input should be a valid string, got 7"),
        ("nope", "1", "no setting named 'nope'; there are: radius, perhaps, factor, rate"),
    ],
)
def test_a_wrong_value_is_answered_in_one_line_with_field_and_value(field, given, said):
    with pytest.raises(UsageError) as caught:
        replaced(Settings(), {field: given})
    line = str(caught.value)
    assert said in line
    assert "\n" not in line and "pydantic" not in line


@pytest.mark.parametrize(
    "text", ["1" * 5000, "[" * 100_000, "9" * 400 + "/1"], ids=["digits", "depth", "fraction"]
)
def test_text_beyond_what_python_reads_is_a_wrong_value_like_any_other(text):
    with pytest.raises(UsageError, match="bad setting: radius"):
        replaced(Settings(), {"radius": text})


def test_settings_are_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().radius = 0.2
    with pytest.raises(Exception, match="Unexpected positional argument"):
        Settings(0.1)


def test_settings_come_back_from_json_text_as_they_were():
    settings = Settings(radius="8/255", perhaps=0.3, radii=(0.5,), flag=True, name="x", epochs=0)
    assert from_json(Settings, json.loads(json.dumps(as_json(settings)))) == settings


@pytest.mark.parametrize(
    ("stored", "said"),
    [({"nope": 1}, "nope: no such setting"), ({"radius": 7}, "less than or equal to 1, got 7")],
)
def test_stored_settings_of_another_form_are_refused(stored, said):
    with pytest.raises(UsageError, match=said):
        from_json(Settings, {**as_json(Settings()), **stored})


def test_replacing_checks_what_it_leaves_alone_too():
    settings = Settings()
    object.__setattr__(settings, "count", 0)
    with pytest.raises(UsageError, match="count"):
        replaced(settings, {"flag": True})
