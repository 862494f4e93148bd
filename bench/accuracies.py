"""Anybody's table of accuracies, read from CSV: which attack each number stands for, as far as the headings say it.

Two forms are understood, in percent or as fractions, separated by commas, semicolons or tabs:

- one number per line: `defense`, `attack` and `accuracy`, with `dataset`, `epsilon`, `steps`, … where there are any; the
  long table of `bench table` is one, and so are files with a single `setting` (FGSM's radius, or the steps of PGD);
- one defense per line: `Method, Clean, FGSM 0.01, PGD-20 (8/255), PGD-100 MS, A-PGD, AutoAttack, …`, whose cells may be
  `37.07 ± 0.12` or `37.07 (0.12)`.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.config import number
from bench.errors import UsageError
from bench.long import WORST_CASE, radius

EXPECTED = (
    "expected columns defense, attack, accuracy (and dataset, epsilon, steps, …), or a defense per line under headings "
    "such as Method, Clean, FGSM 0.01, PGD-20, AutoAttack"
)

#: how attacks are printed; any other is printed as it was read
_PRINTED = {"fgsm": "FGSM", "pgd": "PGD", "ms-pgd": "PGD", "a-pgd": "PGD", "autoattack": "AutoAttack"}
_SUFFIX = {"ms-pgd": " MS", "a-pgd": " A"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One accuracy in percent, and the attack it was measured under; None is what the table does not say.

    `eps` and `step_size` are in pixel units of [0,1]; `low` and `high` are the ends of its interval.
    """

    attack: str
    norm: str | None = None
    eps: float | None = None
    step_size: float | None = None
    steps: int | None = None
    restarts: int | None = None
    accuracy: float = math.nan
    std: float | None = None
    low: float | None = None
    high: float | None = None
    n: float | None = None

    @property
    def asked(self) -> tuple[object, ...]:
        """The question: equal for cells that may be compared between rows."""
        return self.attack, self.norm, self.eps, self.step_size, self.steps, self.restarts

    @property
    def several_starts(self) -> bool:
        """Whether it is PGD from several starts."""
        return self.attack == "ms-pgd" or (self.attack == "pgd" and (self.restarts or 1) > 1)

    def __str__(self) -> str:
        name = _PRINTED.get(self.attack, self.attack)
        if self.attack == "fgsm":
            return name if self.eps is None else f"{name} {radius(self.eps)}"
        times = f"×{self.restarts}" if self.attack == "pgd" and self.several_starts else ""
        name += f"-{self.steps}{times}" if self.steps is not None else ""
        return (
            name + _SUFFIX.get(self.attack, "") + (f" at {radius(self.eps)}" if self.eps is not None else "")
        )


@dataclass(frozen=True)
class Row:
    """A defense on a dataset under a protocol, the latter two empty where the table does not say them."""

    dataset: str
    defense: str
    protocol: str
    cells: tuple[Cell, ...]

    def __str__(self) -> str:
        where = ", ".join(filter(None, (self.dataset, self.protocol)))
        return f"{self.defense} ({where})" if where else self.defense

    def of(self, *attacks: str) -> list[Cell]:
        """Its cells under these attacks."""
        return [cell for cell in self.cells if cell.attack in attacks]


@dataclass(frozen=True)
class Table:
    """Rows in the order read; `notes` say what was not understood."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


@dataclass
class _Reading:
    """What has been read so far: cells by dataset, defense and protocol, and remarks."""

    cells: dict[tuple[str, str, str], dict[tuple[object, ...], Cell]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, key: tuple[str, str, str], cell: Cell) -> None:
        known = self.cells.setdefault(key, {}).setdefault(cell.asked, cell)
        if known.accuracy != cell.accuracy:
            self.notes.append(
                f"{key[1]} has two values under {cell}, {known.accuracy:g} and {cell.accuracy:g}; the first is used"
            )


def read(files: Sequence[Path]) -> Table:
    """The tables in these files as one: rows of one dataset, defense and protocol are joined.

    Raises:
        UsageError: a file cannot be read, or nothing in any of them is understood.
    """
    reading = _Reading()
    for file in files:
        cells, notes = _file(file)
        reading.notes += [f"{file.name}: {note}" for note in notes]
        for key, cell in _in_percent(cells, reading.notes, file.name):
            reading.add(key, cell)
    if not reading.cells:
        raise UsageError(f"no accuracies in {', '.join(file.name for file in files)}; {EXPECTED}")
    rows = (Row(*key, tuple(cells.values())) for key, cells in reading.cells.items())
    return Table(tuple(rows), tuple(dict.fromkeys(reading.notes)))


_Keyed = tuple[tuple[str, str, str], Cell]


def _file(path: Path) -> tuple[list[_Keyed], list[str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"cannot read {str(path)!r}: {why}; give a CSV file") from None
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    try:
        lines = [
            line for line in csv.reader(io.StringIO(text), delimiter=delimiter) if any(map(str.strip, line))
        ]
    except csv.Error as error:
        raise UsageError(f"cannot read {str(path)!r}: {error}; give a CSV file") from None
    if len(lines) < 2:
        return [], ["no line below a header"]
    header, body = lines[0], lines[1:]
    named = {_name(text): place for place, text in enumerate(header)}
    tidy = "attack" in named and any(name in named for name in _ACCURACY)
    cells, notes = _tidy(named, body) if tidy else _wide(header, body)
    return cells, notes if cells else ["no accuracies found"]


def _in_percent(cells: list[_Keyed], notes: list[str], name: str) -> Iterable[_Keyed]:
    """The cells, times a hundred where none of the file is above 1."""
    if not cells or max(cell.accuracy for _, cell in cells) > 1:
        return cells
    notes.append(f"{name}: no accuracy above 1, read as fractions")

    def times(value: float | None) -> float | None:
        return None if value is None else 100 * value

    return [
        (
            key,
            replace(
                cell,
                accuracy=100 * cell.accuracy,
                std=times(cell.std),
                low=times(cell.low),
                high=times(cell.high),
            ),
        )
        for key, cell in cells
    ]


def _name(text: str) -> str:
    """A heading as names are compared: lower case, one blank between words."""
    return " ".join(re.sub(r"[_#%().:]+", " ", text.lower()).split())


# one number per line

_LABEL = (
    "defense",
    "defence",
    "model",
    "method",
    "name",
    "network",
    "architecture",
    "arch",
    "approach",
    "training",
)
_ACCURACY = ("accuracy", "accuracy mean", "acc", "robust accuracy", "ra")
_STD = ("std", "accuracy std", "sd")
_IMAGES = ("n", "samples", "images", "n samples", "n images", "test images")
_ITERATED = ("pgd", "ms-pgd", "a-pgd")
#: what other files call attacks whose headings alone would not tell
_ALIASES = {"pgd_multirestart": "ms-pgd", "pgd_adaptive_eot": "a-pgd"}


def _tidy(named: Mapping[str, int], body: Sequence[Sequence[str]]) -> tuple[list[_Keyed], list[str]]:
    found: list[_Keyed] = []
    notes: list[str] = []

    for line in body:

        def text(*names: str, line: Sequence[str] = line) -> str:
            places = [named[name] for name in names if name in named]
            return next((line[p].strip() for p in places if p < len(line) and line[p].strip()), "")

        value = _value(text(*_ACCURACY))
        if value is None:
            if _is_odd(text(*_ACCURACY)):
                notes.append(f"the accuracy {text(*_ACCURACY)!r} is not understood")
            continue
        given = text("attack")
        # a colon sets parts of an ensemble, or whose images these are, behind a name: not the attack of that name
        known = question(_ALIASES.get(given, given)) if ":" not in given else None
        asked = known or Cell(attack=given)
        setting = _number(text("setting"))
        steps = _number(text("steps")) or (setting if asked.attack in _ITERATED else None)
        eps = _number(text("epsilon", "eps")) or (setting if asked.attack == "fgsm" else None)
        restarts = _number(text("restarts"))
        cell = replace(
            asked,
            norm=text("norm") or asked.norm,
            eps=eps if eps is not None else asked.eps,
            step_size=_number(text("step size")),
            steps=int(steps) if steps else asked.steps,
            restarts=int(restarts) if restarts else asked.restarts,
            accuracy=value[0],
            std=value[1] if value[1] is not None else _number(text(*_STD)),
            low=_number(text("ci low")),
            high=_number(text("ci high")),
            n=_number(text(*_IMAGES)),
        )
        found.append(((text("dataset"), text(*_LABEL), text("protocol")), cell))
    return found, notes


# one defense per line


def _wide(header: Sequence[str], body: Sequence[Sequence[str]]) -> tuple[list[_Keyed], list[str]]:
    names = [_name(text) for text in header]
    labels = [place for place, name in enumerate(names) if name in _LABEL]
    own = {
        name: names.index(name)
        for name in ("dataset", "data", "protocol", "source", *_IMAGES)
        if name in names
    }
    asked = {
        place: cell
        for place, text in enumerate(header)
        if place not in (*labels, *own.values()) and (cell := question(text)) is not None
    }
    if not labels and 0 not in (*asked, *own.values()):
        labels = [0]
    strange = [
        header[p]
        for p in range(len(header))
        if p not in (*labels, *own.values(), *asked) and header[p].strip()
    ]
    notes = [f"headings not understood: {', '.join(map(repr, strange))}"] if strange else []
    found: list[_Keyed] = []
    for position, line in enumerate(body, 1):

        def text(place: int | None, line: Sequence[str] = line) -> str:
            return line[place].strip() if place is not None and place < len(line) else ""

        label = " ".join(filter(None, map(text, labels))).strip("*") or f"line {position}"
        key = text(own.get("dataset", own.get("data"))), label, text(own.get("protocol"))
        n = next((_number(text(own[name])) for name in _IMAGES if name in own), None)
        for place, cell in asked.items():
            value = _value(text(place))
            if value is not None:
                found.append((key, replace(cell, accuracy=value[0], std=value[1], n=n)))
            elif _is_odd(text(place)):
                notes.append(f"{label}, {header[place]}: {text(place)!r} is not understood")
    return found, notes


def _number(text: str) -> float | None:
    """The number that the text is, such as `8/255`; None where it is none."""
    try:
        value = number(text)
    except ValueError:
        return None
    return value if isinstance(value, float) and math.isfinite(value) else None


_VALUE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(?:(?:±|\+/-|\\pm)\s*(\d*\.?\d+)|\(±?\s*(\d*\.?\d+)\))?")


def _value(text: str) -> tuple[float, float | None] | None:
    """Accuracy and std of a cell such as `**37.07 ± 0.12**`; None where it holds no percentage."""
    match = _VALUE.fullmatch(re.sub(r"\\textbf|[*†‡%${}]", "", text).strip())
    if match is None or float(match[1]) > 100:
        return None
    std = match[2] or match[3]
    return float(match[1]), float(std) if std else None


def _is_odd(text: str) -> bool:
    """Whether a cell without a number says something other than that there is none."""
    return text.lower() not in ("", "-", "–", "—", "--", "n/a", "na", "nan", "void", "x", "?")


# headings

_CLEAN = frozenset({"clean", "sa", "standard", "natural", "nat", "benign"})
#: words that a heading may have besides the name of its attack
_FILLING = re.compile(
    "ra|acc|accuracy|robust|test|under|attacks?|steps?|iters?|iterations?|it|at|with|of|the|eps|epsilon|radius|white|box|"
    "whitebox|untargeted|like|ce|dlr|t|norm|multi|multistart|multirestart|(?:re)?starts?"
)
#: the words that name an attack, the telling ones first: these words are there, then it is this one
_ATTACKS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"worst", "case"}), WORST_CASE),
    (frozenset({"autoattack"}), "autoattack"),
    (frozenset({"auto", "attack"}), "autoattack"),
    (frozenset({"aa"}), "autoattack"),
    (frozenset({"apgd"}), "apgd"),
    (frozenset({"auto", "pgd"}), "apgd"),
    (frozenset({"adaptive"}), "a-pgd"),
    (frozenset({"a", "pgd"}), "a-pgd"),
    (frozenset({"eot", "pgd"}), "a-pgd"),
    (frozenset({"ms"}), "ms-pgd"),
    (frozenset({"pgd"}), "pgd"),
    (frozenset({"i", "fgsm"}), "bim"),
    (frozenset({"bim"}), "bim"),
    (frozenset({"fgsm"}), "fgsm"),
    (frozenset({"cw"}), "cw"),
    (frozenset({"c&w"}), "cw"),
    (frozenset({"carlini", "wagner"}), "cw"),
    (frozenset({"square"}), "square"),
    (frozenset({"fab"}), "fab"),
    (frozenset({"deepfool"}), "deepfool"),
    *((frozenset({word}), "clean") for word in sorted(_CLEAN)),
)
_NAMING = frozenset().union(*(words for words, _ in _ATTACKS))

_NORM = re.compile(r"\bl[ -]?(inf|2)(?![a-z0-9])")
_EPS = re.compile(
    r"(?:\b(?:eps(?:ilon)?|radius)\s*[=:]?\s*(\d*\.?\d+)(?:\s*/\s*255)?|(\d*\.?\d+)\s*/\s*255|(\d*\.\d+))"
)
_TIMES = re.compile(r"(\d{1,12})\s*x\s*(\d{1,12})")
_RESTARTS = re.compile(r"(\d{1,12})[ -]*(?:re)?starts?\b|\b(?:re)?starts?\s*[=:]?\s*(\d{1,12})")
_EOT = re.compile(r"\beot[ =:-]*(\d+)")


def question(heading: str) -> Cell | None:
    """The attack that a heading names, a cell without a value; None where it is not understood."""
    if len(heading) > 200:
        # no heading is that long, and the expressions below take the square of its length
        return None
    text = heading.lower().translate(str.maketrans("_×εℓ", " xel")).replace("∞", "inf")
    text = re.sub(r"\be\s*=", "eps=", text)
    norm = eps = steps = restarts = None
    if match := _NORM.search(text):
        norm, text = "Linf" if match[1] == "inf" else "L2", _without(text, match)
    if match := _EPS.search(text):
        eps = float(next(filter(None, match.groups())))
        # pixels of 0..255, said or meant: no radius in [0,1] is above 1, but for L2
        eps = eps / 255 if "/" in match[0] or (eps > 1 and norm != "L2") else eps
        text = _without(text, match, "eps")
    if match := _TIMES.search(text):
        steps, restarts, text = int(match[1]), int(match[2]), _without(text, match)
    if match := _RESTARTS.search(text):
        restarts, text = int(match[1] or match[2]), _without(text, match, "restarts")
    if match := _EOT.search(text):
        text = _without(text, match, "eot")
    words = set(re.findall(r"[^\W\d_]+(?:&[^\W\d_]+)?", text))
    attack = next((attack for named, attack in _ATTACKS if named <= words), None)
    said = re.findall(r"\d+", text)
    if any(len(digits) > 9 for digits in (*said, str(steps or ""), str(restarts or ""))):
        # nobody takes a milliard steps
        return None
    numbers = [int(digits) for digits in said]
    strange = [word for word in words - _NAMING if not _FILLING.fullmatch(word)]
    if attack is None or strange or len(numbers) > (attack != "clean" and steps is None):
        return None
    if attack == "pgd" and restarts is None and any("start" in word or word == "multi" for word in words):
        attack = "ms-pgd"
    if attack == "apgd":
        attack = "-".join([attack, *sorted(words & {"ce", "dlr", "t"})])
    if numbers and attack == "fgsm":
        eps = numbers[0] / 255
    elif numbers:
        steps = numbers[0]
    return Cell(attack=attack, norm=norm, eps=eps, steps=steps, restarts=restarts)


def _without(text: str, match: re.Match[str], word: str = "") -> str:
    """The text with what was matched replaced by a word."""
    return f"{text[: match.start()]} {word} {text[match.end() :]}"
