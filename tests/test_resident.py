"""Images that lie on the device are those of the split: the same batches, the same outcomes, the same weights.

A CPU stands in for a device with memory of its own.
"""

import numpy as np
import pytest
import torch
from learnable import dataset as learnable
from oracles import Hyperplane, dataset
from torch import nn
from torch.nn import functional as F

from bench.data import Split
from bench.data import resident as places
from bench.data.resident import Resident, resident
from bench.defense import Defense, Stage
from bench.evaluate import Evaluator
from bench.plan import plan
from bench.protocol import Protocol
from bench.train import train

N = 40


@pytest.fixture
def split():
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (N, 6, 5, 3), dtype=np.uint8), rng.integers(0, 10, N))


@pytest.fixture
def roomy(monkeypatch):
    monkeypatch.setattr(places, "free", lambda device: 10**9)


INDEX = [slice(0, 7), slice(35, 60), slice(None, None, 3), np.array([3, 3, 0, 39]), np.array([], dtype=int)]


@pytest.mark.parametrize("index", INDEX, ids=str)
def test_a_batch_is_the_same_and_nobody_elses(index, split, roomy):
    there = resident(split, "cpu")
    assert isinstance(there, Resident) and len(there) == N and there.hash == split.hash
    for _ in range(2):
        (x, y), (expected, labels) = there.batch(index), split.batch(index)
        assert torch.equal(x, expected) and torch.equal(y, labels)
        assert (x.dtype, x.shape) == (expected.dtype, expected.shape) and x.is_contiguous()
        # what is done to a batch reaches neither
        x.zero_(), y.zero_()


def test_on_another_device_it_is_what_a_split_is(split, roomy):
    x, y = resident(split, "cpu").batch(slice(0, 3), "meta")
    assert x.device.type == y.device.type == "meta" and x.shape == (3, 3, 6, 5)
    assert type(resident(split, "cpu").take(np.arange(3))) is Split


@pytest.mark.parametrize(("spare", "lies_there"), [(0, True), (-1, False)])
def test_it_takes_a_quarter_of_what_is_free_and_no_more(spare, lies_there, split, monkeypatch):
    monkeypatch.setattr(places, "free", lambda device: 4 * split.images.nbytes + 4 * spare)
    assert isinstance(resident(split, "cpu"), Resident) is lies_there


def test_a_cpu_has_no_memory_of_its_own_and_nothing_is_put_there_twice(split, monkeypatch):
    assert resident(split, "cpu") is split
    monkeypatch.setattr(places, "free", lambda device: 10**9)
    there = resident(split, "cpu")
    assert resident(there, "cpu") is there


class Tiny(Defense[None]):
    recipes = {}

    def __init__(self):
        super().__init__(None)

    def build(self, data):
        return nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(data.shape)), len(data.classes)))

    def stages(self, data):
        def loss(model, x, y, rng):
            return F.cross_entropy(model(x), y)

        return [Stage(name="only", loss=loss, epochs=2, batch_size=18, lr=0.1, select="robust")]


def test_outcomes_and_weights_are_the_same(tmp_path, monkeypatch):
    outcomes, weights, used = [], [], []
    batch = Resident.batch
    monkeypatch.setattr(Resident, "batch", lambda self, *where: used.append(where) or batch(self, *where))
    columns = Protocol.model_validate({"name": "t", "column": [{"attack": "pgd", "steps": 5}]}).columns(0.02)
    for memory in (0, 10**9):
        monkeypatch.setattr(places, "free", lambda device, memory=memory: memory)
        evaluator = Evaluator(Hyperplane(), classes=10, split=dataset().test, seed=0, success="last")
        outcomes.append(evaluator.run(plan(columns), np.arange(24)).outcomes["pgd-5"].prediction)
        made = train(Tiny(), learnable(), seed=0, folder=tmp_path / str(memory), quiet=True)
        weights.append(made.model.state_dict())
        assert bool(used) is (memory > 0)
    assert torch.equal(*outcomes)
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name])
