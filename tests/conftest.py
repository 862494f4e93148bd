"""One torch thread: the suite's models are small, and threads cost more than they bring."""

import matplotlib
import pytest
import torch

torch.set_num_threads(1)
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def global_generator_starts_alike():
    """Every test finds the global generator in one state, whichever tests ran before it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
