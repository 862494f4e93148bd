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
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bench.errors import DuplicateName, PluginError, UnknownName, UsageError, meant

if TYPE_CHECKING:
    from bench.defense import Defense

T = TypeVar("T")

PACKAGES = ("defenses", "baselines")
#: what is in a package, where a file does not say of which kind it is
KINDS = {"baselines": "plain network"}
ENTRY_POINTS = "bench.defenses"

#: what a name may be: it is typed in lists that commas separate, and a colon ends a family
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*:?")
#: a paper as docstrings name it
_PAPER = re.compile(r"arXiv[ :]\d{4}\.\d{4,5}|openreview\.net[ /](?:forum\?id=)?[\w-]+")
#: facts that have a line of their own in docstrings
_FACT = {name: re.compile(rf"^{name.title()}: (.+?)\.?$", re.MULTILINE) for name in ("kind", "cost")}


@dataclass(frozen=True)
class _Registered:
    """A class or a function, and the module whose line registered it."""

    thing: Any
    owner: str


_registered: dict[str, _Registered] = {}
#: the plugins that were run: by module, the hash of what was run
_plugins: dict[str, str] = {}


@dataclass(frozen=True)
class Entry:
    """A name that can be asked for: where it comes from and what it is in one line."""

    name: str
    summary: str
    module: str
    kind: str = ""
    """what its docstring, or that of its file, says after `Kind:`"""
    paper: str = ""
    """the first paper that they name"""
    cost: str = ""
    """what training by the recipe `fast` takes: after `Cost:`"""


def register(name: str) -> Callable[[T], T]:
    """Registers a Defense subclass, or a function `f(data) -> nn.Module`, under a name.

    A name that ends in a colon is a family: the function is then given the rest of the name and returns a Defense
    subclass.

    Raises:
        DuplicateName: the name is taken.
        UsageError: it is none, or one that could not be asked for.
    """
    if not isinstance(name, str):
        raise UsageError('`register` wants a name: write @bench.register("mine")')
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be a name; use letters, digits and . _ + -, and a colon at the end for a family"
        )

    module = str(sys._getframe(1).f_globals.get("__name__", ""))

    def add(thing: T) -> T:
        owner = _registered[name].owner if name in _registered else _claimed_elsewhere(name, module)
        # whoever runs a cell of a notebook again means the new one
        again = owner == module == "__main__" and hasattr(sys, "ps1")
        if owner is not None and not again:
            raise DuplicateName(f"{name!r} is registered by {_shown(owner)} already; choose another name")
        _registered[name] = _Registered(thing, module)
        return thing

    return add


def entries() -> dict[str, Entry]:
    """Everything that can be asked for by name: our packages' files in order, then installed ones, then plugins.

    Raises:
        DuplicateName: two files claim one name.
        PluginError: a file in the packages is not Python.
    """
    found: dict[str, Entry] = {}
    for package in PACKAGES:
        for file in _files(package):
            for name, told in _scan(file):
                module = f"{package}.{file.stem}"
                if name in found:
                    raise DuplicateName(
                        f"{name!r} is registered by {found[name].module} and by {module}; rename one"
                    )
                kind = told.pop("kind") or KINDS.get(package, "")
                found[name] = Entry(name, module=module, kind=kind, **told)
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if point.name in found:
            raise DuplicateName(
                f"{point.name!r} is registered by {found[point.name].module} and by the installed {point.value}"
            )
        found[point.name] = Entry(point.name, f"from {point.value}", point.value)
    for name, one in _registered.items():
        if name not in found:
            whole = getattr(sys.modules.get(one.owner), "__doc__", None)
            found[name] = Entry(name, module=one.owner, **_told(inspect.getdoc(one.thing), whole))
    return found


def get(name: str) -> type[Defense[Any]]:
    """The defense of that name.

    `MODULE:FUNCTION` is a function of yours that takes the dataset and returns a model.

    Raises:
        UnknownName: there is none; the message names the nearest.
        PluginError: it is there, but its file fails.
        UsageError: it is there, but is not what a defense must be.
    """
    known = entries()
    if name.endswith(":") and name in known:
        raise UsageError(f"{name!r} stands for many; add which one: {name}NAME")
    if name in known and name not in _registered:
        _import(known[name])
    if name in _registered:
        return _as_defense(name, _registered[name].thing)
    prefix, colon, rest = name.partition(":")
    family = prefix + colon
    if colon and family in known:
        if family not in _registered:
            _import(known[family])
        return _as_defense(name, _registered[family].thing(rest))
    if colon:
        return _as_defense(name, _callable(prefix, rest, name))
    raise UnknownName(
        "defense", name, [n for n in known if not n.endswith(":")], "; `bench list defenses` shows all"
    )


def kinds() -> dict[str, type[Defense[Any]]]:
    """Every defense that has a name of its own; a family is not one.

    Raises:
        PluginError: a file fails.
        UsageError: what a file registers is not what a defense must be.
    """
    found = {}
    for name, entry in entries().items():
        if not name.endswith(":"):
            if name not in _registered:
                _import(entry)
            found[name] = _as_defense(name, _registered[name].thing)
    return found


def load_plugin(path: str | Path) -> None:
    """Runs a user's file, so that what it registers can be asked for: once, and anew when it was edited.

    Raises:
        PluginError: there is no such file, or it fails; nothing that it registered is kept then.
        DuplicateName: it registers a name that is taken.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise PluginError(
            f"no plugin file {str(path)!r}; give the path of a Python file that uses @bench.register"
            + meant(file.name, [other.name for other in file.parent.glob("*.py")])
        )
    try:
        source = file.read_bytes()
    except OSError as error:
        raise PluginError(f"cannot read the plugin {str(path)!r}: {error.strerror}") from None
    name = f"bench_plugin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    content = hashlib.sha256(source).hexdigest()
    if _plugins.get(name) == content:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None:
        raise PluginError(f"{file} is not a Python file; plugins end in .py")
    _unload(name)
    _let_import(file.parent)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        with _blaming(f"plugin {file.name}", name):
            # not by the loader: its cache takes an edit within the clock's grain for none
            exec(compile(source, str(file), "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        _unload(name)
        raise
    _plugins[name] = content


def line_of(error: BaseException, module: str) -> int | None:
    """The innermost line of a module that an error came through; None where it came through none."""
    trace, line = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == module:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


@contextmanager
def _blaming(what: str, module: str) -> Iterator[None]:
    """Charges whatever a file raises while it is imported to that file and its line, and keeps nothing of it."""
    try:
        yield
    except BaseException as error:
        _forget(module)
        if isinstance(error, (DuplicateName, PluginError, KeyboardInterrupt)):
            raise
        line = line_of(error, module)
        where = f", line {line}," if line is not None else ""
        said = " ".join(str(error).split())
        raise PluginError(f"{what}{where} raises {type(error).__name__}: {said}") from error


def _unload(module: str) -> None:
    sys.modules.pop(module, None)
    _plugins.pop(module, None)
    _forget(module)


def _forget(module: str) -> None:
    for name in [name for name, one in _registered.items() if one.owner == module]:
        del _registered[name]


def _claimed_elsewhere(name: str, module: str) -> str | None:
    """Where a file or an installed package claims this name, if that is not where `module` is."""
    entry = entries().get(name)
    if entry is None:
        return None
    if entry.module.split(".")[0] in PACKAGES:
        ours = module == entry.module
    else:
        # a package that names its defense as an entry point may decorate it too
        ours = module.split(".")[0] == entry.module.split(":")[0].split(".")[0]
    return None if ours else entry.module


def _shown(owner: str) -> str:
    """A module as its author knows it: a plugin by its file."""
    if not owner.startswith("bench_plugin_"):
        return owner
    return str(getattr(sys.modules[owner], "__file__", owner))


def _as_defense(name: str, thing: Any) -> type[Defense[Any]]:
    from bench.defense import Defense, FunctionDefense

    if inspect.isclass(thing) and issubclass(thing, Defense):
        return thing
    # a network is called with images; the function that is wanted takes the dataset
    if callable(thing) and not (_is_module(thing) and not inspect.isclass(thing)):
        return FunctionDefense.of(name, thing)
    raise UsageError(
        f"{name!r} is a {type(thing).__name__}; register a Defense subclass or a function data -> nn.Module"
    )


def _is_module(thing: Any) -> bool:
    from torch import nn

    return isinstance(thing, nn.Module)


def _callable(module: str, attribute: str, name: str) -> Any:
    if not attribute or not all(part.isidentifier() for part in module.split(".")):
        raise UsageError(f"{name!r} is not MODULE:FUNCTION, such as my_models:make")
    _let_import(Path.cwd())
    try:
        with _blaming(f"{name!r}: module {module}", module):
            found = importlib.import_module(module)
    except PluginError as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and f"{module}.".startswith(f"{missing.name}."):
            families = [n for n in entries() if n.endswith(":")]
            raise UsageError(
                f"no module named {module!r} for the defense {name!r}; MODULE:FUNCTION must be importable "
                f"({', '.join(n + 'NAME' for n in families)} also exist){meant(f'{module}:', families)}"
            ) from None
        raise
    if not hasattr(found, attribute):
        public = [name for name in vars(found) if not name.startswith("_")]
        raise UsageError(f"module {module!r} has no {attribute!r}{meant(attribute, public)}")
    return getattr(found, attribute)


def _import(entry: Entry) -> None:
    module = entry.module.split(":")[0]
    with _blaming(f"{entry.name!r}: module {module}", module):
        if module.split(".")[0] in PACKAGES:
            importlib.import_module(module)
        else:
            loaded = importlib.metadata.EntryPoint(entry.name, entry.module, ENTRY_POINTS).load()
            if not inspect.ismodule(loaded) and entry.name not in _registered:
                _registered[entry.name] = _Registered(loaded, module)
    if entry.name not in _registered:
        raise PluginError(f"{entry.module} does not register {entry.name!r} when it is imported")


def _let_import(folder: Path) -> None:
    """Makes a folder's modules importable, after everything else: a neighbour's name must not hide a library."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _files(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return []
    return sorted(file for place in spec.submodule_search_locations for file in Path(place).glob("[!_]*.py"))


def _scan(file: Path) -> list[tuple[str, dict[str, str]]]:
    """The literal names that a file registers at its top level, each with what docstrings tell of it."""
    with _blaming(str(file), str(file)):
        tree = ast.parse(file.read_bytes(), filename=str(file))
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
                    found.append((name, _told(ast.get_docstring(node), ast.get_docstring(tree))))
    return found


def _told(own: str | None, file: str | None) -> dict[str, str]:
    """Summary, kind, paper and cost, from a defense's docstring where it tells, else from that of its file."""
    told = {"summary": _first_line(own) or _first_line(file)}
    for name, pattern in {"paper": _PAPER, **_FACT}.items():
        found = pattern.search(own or "") or pattern.search(file or "")
        told[name] = found[found.re.groups] if found else ""
    return told


def _first_line(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]
