"""Names to defenses.

Files in `defenses/` and `baselines/` are found by listing and read as syntax trees, so that naming what there is costs
no import; a file is imported when one of its names is asked for. Third parties add names through the entry-point group
`bench.defenses`, or with `--plugin FILE.py`. `timm:` in place of a name stands for all names with that prefix.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bench.errors import DuplicateName, PluginError, UnknownName, UsageError

if TYPE_CHECKING:
    from bench.defense import Defense

T = TypeVar("T")

PACKAGES = ("defenses", "baselines")
ENTRY_POINTS = "bench.defenses"

_registered: dict[str, Any] = {}


@dataclass(frozen=True)
class Entry:
    """A name that can be asked for: where it comes from and what it is in one line."""

    name: str
    summary: str
    module: str


def register(name: str) -> Callable[[T], T]:
    """Registers a Defense subclass, or a function `f(data) -> nn.Module`, under a name.

    A name that ends in a colon is a family: the function is then given the rest of the name and returns a Defense
    subclass.

    Raises:
        DuplicateName: the name is taken.
    """

    def add(thing: T) -> T:
        if name in _registered:
            raise DuplicateName(
                f"{name!r} is registered by {_origin(_registered[name])} already; choose another name"
            )
        if name not in _names_in(getattr(thing, "__module__", "")) and name in entries():
            raise DuplicateName(
                f"{name!r} is registered by {entries()[name].module} already; choose another name"
            )
        _registered[name] = thing
        return thing

    return add


def entries() -> dict[str, Entry]:
    """Everything that can be asked for by name, in the order of the packages and then of the names.

    Raises:
        DuplicateName: two files claim one name.
    """
    found: dict[str, Entry] = {}
    for package in PACKAGES:
        for file in _files(package):
            for name, summary in _scan(file):
                module = f"{package}.{file.stem}"
                if name in found:
                    raise DuplicateName(
                        f"{name!r} is registered by {found[name].module} and by {module}; rename one"
                    )
                found[name] = Entry(name, summary, module)
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if point.name in found:
            raise DuplicateName(
                f"{point.name!r} is registered by {found[point.name].module} and by the installed {point.value}"
            )
        found[point.name] = Entry(point.name, f"from {point.value}", point.value)
    for name, thing in _registered.items():
        if name not in found:
            found[name] = Entry(name, _first_line(inspect.getdoc(thing)), _origin(thing))
    return found


def get(name: str) -> type[Defense[Any]]:
    """The defense of that name.

    `MODULE:FUNCTION` is a function of yours that takes the dataset and returns a model.

    Raises:
        UnknownName: there is none; the message names the nearest.
        UsageError: it is there but cannot be imported.
    """
    known = entries()
    if name in known and name not in _registered:
        _import(known[name])
    if name in _registered:
        return _as_defense(name, _registered[name])
    if ":" in name:
        prefix, rest = name.split(":", 1)
        family = f"{prefix}:"
        if family in known and family not in _registered:
            _import(known[family])
        if family in _registered:
            made: type[Defense[Any]] = _registered[family](rest)
            return made
        return _as_defense(name, _callable(prefix, rest, name))
    raise UnknownName(
        "defense", name, [n for n in known if not n.endswith(":")], "; `bench list defenses` shows all"
    )


def load_plugin(path: str | Path) -> None:
    """Runs a user's file, so that what it registers can be asked for; once per file.

    Raises:
        PluginError: there is no such file, or it fails.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise PluginError(
            f"no plugin file {str(path)!r}; give the path of a Python file that uses @bench.register"
        )
    name = f"bench_plugin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise PluginError(f"{file} is not a Python file; plugins end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    before = set(_registered)
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        for added in set(_registered) - before:
            del _registered[added]
        if isinstance(error, (DuplicateName, KeyboardInterrupt)):
            raise
        line = _line_in(error, file)
        raise PluginError(f"plugin {file.name}{line} raises {type(error).__name__}: {error}") from error


def _as_defense(name: str, thing: Any) -> type[Defense[Any]]:
    from bench.defense import Defense, FunctionDefense

    if inspect.isclass(thing) and issubclass(thing, Defense):
        return thing
    if callable(thing):
        return FunctionDefense.of(name, thing)
    raise UsageError(
        f"{name!r} is a {type(thing).__name__}; register a Defense subclass or a function data -> nn.Module"
    )


def _callable(module: str, attribute: str, name: str) -> Any:
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
            families = ", ".join(n + "NAME" for n in entries() if n.endswith(":"))
            raise UsageError(
                f"no module named {module!r} for the defense {name!r}; MODULE:FUNCTION must be importable ({families} also exist)"
            ) from None
        raise UsageError(f"{name!r} cannot be imported: {error}") from error
    if not hasattr(found, attribute):
        raise UsageError(f"module {module!r} has no {attribute!r}")
    return getattr(found, attribute)


def _import(entry: Entry) -> None:
    if ":" in entry.module:
        loaded = importlib.metadata.EntryPoint(entry.name, entry.module, ENTRY_POINTS).load()
        _registered.setdefault(entry.name, loaded)
    else:
        importlib.import_module(entry.module)


def _files(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return []
    return sorted(file for place in spec.submodule_search_locations for file in Path(place).glob("[!_]*.py"))


def _scan(file: Path) -> list[tuple[str, str]]:
    """The literal names that a file registers at its top level, with the first line of each one's docstring."""
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    about_file = _first_line(ast.get_docstring(tree))
    found = []
    for node in tree.body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            continue
        for decorator in node.decorator_list:
            match decorator:
                case ast.Call(
                    func=ast.Name(id="register") | ast.Attribute(attr="register"),
                    args=[ast.Constant(value=str(name))],
                ):
                    found.append((name, _first_line(ast.get_docstring(node)) or about_file))
    return found


def _names_in(module: str) -> set[str]:
    package, _, stem = module.partition(".")
    if package not in PACKAGES or not stem:
        return set()
    return {name for file in _files(package) if file.stem == stem for name, _ in _scan(file)}


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]


def _origin(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', thing)}"


def _line_in(error: BaseException, file: Path) -> str:
    trace = error.__traceback__
    line = None
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename) == file:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f", line {line}," if line is not None else ""
