"""Where a number comes from: hashes of weights and code, the commit, the versions, the machine."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import platform
import subprocess
import sysconfig
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

import bench
from bench import registry
from bench.defense import Defense
from bench.record import Where

if TYPE_CHECKING:
    pass


def weights_hash(model: nn.Module) -> str:
    """sha256 of everything a model computes with: parameters and buffers, those outside its checkpoint too."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda pair: pair[0]):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def code_hash(kind: type[Defense[Any]], model: nn.Module) -> str:
    """A hash of the files that define a defense and the parts of its network; libraries and the harness have versions."""
    written: Any = getattr(kind, "function", kind)
    parts = {*kind.__mro__, *(type(part) for part in model.modules())}
    sources = {_source(written), *(_source(part) for part in parts if _is_local(part))}
    return _sha256("\n".join(sorted(sources)))[:16]


def _is_local(thing: type) -> bool:
    """Whether a class is of a defense or a baseline, or of the user's own files."""
    root = thing.__module__.split(".")[0]
    if root in ("bench", "builtins"):
        return False
    if root in registry.PACKAGES:
        return True
    try:
        file = Path(inspect.getfile(thing)).resolve()
    except (TypeError, OSError):
        return True
    paths = sysconfig.get_paths()
    return not any(
        file.is_relative_to(Path(paths[name]).resolve()) for name in ("stdlib", "purelib", "platlib")
    )


@functools.cache
def _source(thing: Callable[..., Any]) -> str:
    """A hash of the file that defines a class or a function, blind to comments, docstrings, taxonomy and layout.

    It is read once, near the import: what is edited while a training runs is not what runs.
    """
    try:
        source = Path(inspect.getfile(thing)).read_bytes()
        tree = ast.parse(source)
    except (TypeError, OSError, SyntaxError):
        # defined in a console or a notebook: there is no file, but there is what it was compiled to
        return _sha256(repr([_compiled(code) for code in _codes(thing)]))
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:]
        if isinstance(node, ast.ClassDef):
            # what only describes, like a docstring: no outcome depends on it
            node.body = [part for part in node.body if not _describes(part)]
    return _sha256(ast.dump(tree))


def _describes(node: ast.stmt) -> bool:
    """Whether a statement of a class says where a method stands in the taxonomy."""
    match node:
        case ast.Assign(targets=[ast.Name(id="taxonomy")]) | ast.AnnAssign(target=ast.Name(id="taxonomy")):
            return True
    return False


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _codes(thing: Any) -> list[CodeType]:
    members = (
        [thing] if inspect.isfunction(thing) else [value for _, value in sorted(vars(thing).items(), key=str)]
    )
    return [member.__code__ for member in members if inspect.isfunction(member)]


def _compiled(code: CodeType) -> str:
    """What a function does, without where it stands."""
    constants = [
        _compiled(value)
        if isinstance(value, CodeType)
        else repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)
        for value in code.co_consts
    ]
    return repr((code.co_code.hex(), code.co_names, code.co_varnames, constants))


def where(
    device: torch.device, started: datetime, seconds: float, libraries: Mapping[str, str] | None = None
) -> Where:
    """Commit, versions and device of a run that is ending; `libraries` are those whose attacks it used."""
    import torchvision

    commit, dirty = _commit()
    return Where(
        bench=bench.__version__,
        commit=commit,
        dirty=dirty,
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "numpy": np.__version__,
            **(libraries or {}),
        },
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        threads=torch.get_num_threads(),
        started=started.isoformat(timespec="seconds"),
        seconds=round(seconds, 2),
    )


def _commit() -> tuple[str | None, bool | None]:
    """The commit of the harness and whether its files differ from it; nothing outside a checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD") if (root / ".git").exists() else None
    changes = git("status", "--porcelain", "--", "bench", "defenses", "baselines") if commit else None
    return commit, None if changes is None else bool(changes)


def size(model: nn.Module) -> int:
    """How many parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
