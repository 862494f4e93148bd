"""dwf-bench: adversarial robustness of image classifiers, trained, attacked and compared in one command.

import bench

frame = bench.run(defense="dwf", dataset="cifar10")     # the long table of these runs
frame = bench.load_results("results")                   # of every run there is

@bench.register("mine")
def mine(data): ...                                     # a defense of one's own
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.defense import Defense as Defense
    from bench.defense import Stage as Stage
    from bench.long import load_results as load_results
    from bench.pipeline import run as run
    from bench.registry import register as register

__version__ = "0.1.0"

__all__ = ["Defense", "Stage", "__version__", "load_results", "register", "run"]

_WHERE = {
    "Defense": "bench.defense",
    "Stage": "bench.defense",
    "load_results": "bench.long",
    "register": "bench.registry",
    "run": "bench.pipeline",
}


def __getattr__(name: str) -> object:
    # torch takes seconds to import, and `bench --help` must not wait for it
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
