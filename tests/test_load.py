"""The numbers do not depend on how busy the machine is, on threads, or on how images are put into batches."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import bench
from bench.data import load
from bench.record import read_all

PROTOCOL = """
name = "busy"
[[column]]
attack = "fgsm"
eps = 0.1
[[column]]
attack = "pgd"
steps = [5, 10]
restarts = 2
[[column]]
attack = "pgd"
steps = 5
loss = "margin"
"""


@pytest.fixture(scope="module")
def net():
    """A convolutional network whose last layer was fitted to digits by least squares."""
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
    x, y = load("digits").train.batch(slice(None))
    head = nn.Linear(256, 10, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.linalg.lstsq(features(x), torch.eye(10)[y]).solution.T)
    return nn.Sequential(features, head)


@pytest.fixture
def busy(tmp_path, net):
    """Runs that network; its record."""

    @bench.register("busy")
    def build(data):
        return copy.deepcopy(net)

    (tmp_path / "busy.toml").write_text(PROTOCOL)

    def run(name, **how):
        asked = {"samples": 40, "batch_size": 16, **how}
        bench.run("busy", protocol=str(tmp_path / "busy.toml"), results=tmp_path / name, quiet=True, **asked)
        (record,) = read_all(tmp_path / name)
        return record

    return run


@pytest.mark.parametrize("batch_size", [1, 7, 128])
def test_outcomes_do_not_depend_on_the_size_of_batches(busy, batch_size):
    assert (
        busy("one", batch_size=batch_size, samples=20).outcomes_sha256
        == busy("other", samples=20).outcomes_sha256
    )


def test_outcomes_do_not_depend_on_threads_and_the_record_says_how_many(busy):
    one = busy("one")
    torch.set_num_threads(2)
    try:
        two = busy("two")
    finally:
        torch.set_num_threads(1)
    assert (one.where.threads, two.where.threads) == (1, 2)
    # to rounding: sums are cut otherwise, and an image on the edge may fall to the other side
    same = [np.mean(one.outcomes()[name] == two.outcomes()[name]) for name in ("prediction", "robust")]
    assert min(same) >= 0.99


@pytest.mark.slow
def test_outcomes_do_not_depend_on_two_processes_that_eat_the_processor(busy):
    alone = busy("alone", samples=360)
    eaters = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        crowded = busy("crowded", samples=360)
    finally:
        for eater in eaters:
            eater.kill()
            eater.wait()
    assert crowded.outcomes_sha256 == alone.outcomes_sha256
