"""One torch thread: the suite's models are small, and threads cost more than they bring."""

import sys

import matplotlib
import pytest
import torch

from bench import registry

torch.set_num_threads(1)
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def global_generator_starts_alike():
    """Every test finds the global generator in one state, whichever tests ran before it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def registry_is_put_back():
    """What a test registers, runs as a plugin or makes importable is forgotten after it; our own files stay imported."""
    path = list(sys.path)
    yield
    for name, one in list(registry._registered.items()):
        if one.owner.split(".")[0] not in registry.PACKAGES:
            del registry._registered[name]
    registry._plugins.clear()
    for module in [module for module in sys.modules if module.startswith(("bench_plugin_", "made_up_"))]:
        del sys.modules[module]
    sys.path[:] = path
