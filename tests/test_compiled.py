"""Compiling is tried where it pays back, compared before any attack, and left alone where anything is amiss."""

from functools import partial

import numpy as np
import pytest
import torch
from oracles import Hyperplane, dataset, small_net
from torch import nn

from baselines.resnet import resnet18
from bench import compiled as compiling
from bench import moe
from bench.attacks.gradient import input_gradient
from bench.attacks.losses import cross_entropy
from bench.compiled import Compiled, compiled, pays
from bench.evaluate import Evaluator
from bench.fast import Fast, fast
from bench.plan import plan
from bench.protocol import Protocol

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def a_compiler_that_takes_no_time(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def quicker(monkeypatch):
    """Whatever is compiled is said to be quicker."""
    monkeypatch.setattr(compiling, "seconds", lambda model, x, y: float(not isinstance(model, Compiled)))


def images(n=6):
    return torch.rand(n, 3, 8, 8), torch.arange(n) % 4


def net():
    return small_net().eval().requires_grad_(False)


def test_it_pays_where_a_gpu_saves_more_than_it_takes_and_never_on_a_cpu():
    assert pays(CUDA, 3600)[0] and "compiled (compiling takes about" in pays(CUDA, 3600)[1]
    assert not pays(CUDA, 60)[0] and pays(CUDA, 60)[1].startswith("not compiled")
    assert not pays(CPU, 1e6)[0] and "bit for bit" in pays(CPU, 1e6)[1]


def test_what_is_compiled_says_the_same_of_batches_of_any_size_in_one_program(quicker, monkeypatch):
    built = []

    def backend(graph, given):
        built.append(graph)
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", backend)
    model, (x, y) = net(), images()
    made = compiled(Fast(model, "as it is"), x, y, "fp32")
    assert made.about == "as it is, compiled" and isinstance(made.model, Compiled)
    for n in (1, 2, 3, 6):
        for found, expected in zip(
            input_gradient(made.model, x[:n], y[:n], cross_entropy),
            input_gradient(model, x[:n], y[:n], cross_entropy),
            strict=True,
        ):
            torch.testing.assert_close(found, expected)
    assert len(built) == 1
    with torch.no_grad():
        assert torch.equal(made.model(x), model(x))
    assert len(built) == 1


def test_experts_that_answer_small_batches_otherwise_are_compiled_for_the_others(quicker, monkeypatch):
    monkeypatch.setitem(moe.GROUPED_BATCH, "cpu", 3 * 17 * 17)
    make = partial(resnet18, channels=3, classes=4, width=4)
    model = nn.Sequential(moe.Experts(make, 2), nn.Flatten()).eval().requires_grad_(False)
    x, y = torch.rand(6, 3, 17, 17), torch.arange(6) % 4
    quick = fast(model, x, y)
    made = compiled(quick, x, y, "fp32")
    assert made.about.endswith(", compiled")
    for n in (1, 3, 4, 6):
        found, _ = input_gradient(made.model, x[:n], y[:n], cross_entropy)
        expected, _ = input_gradient(quick.model, x[:n], y[:n], cross_entropy)
        torch.testing.assert_close(found, expected)


class Unfollowable(nn.Module):
    def forward(self, x):
        print(end="")
        torch._dynamo.graph_break()
        return x.flatten(1)[:, :4]


def test_what_cannot_be_compiled_is_used_as_it_was_and_why_is_said(quicker):
    model = Unfollowable().eval()
    made = compiled(Fast(model, "as it is"), *images(), "fp32")
    assert made.model is model
    assert made.about.startswith("as it is, not compiled (") and len(made.about) > 30


def test_a_compiler_that_changes_the_network_is_not_believed(quicker, monkeypatch):
    def wrong(graph, given):
        return lambda *args: [1.5 * one for one in graph(*args)]

    monkeypatch.setattr(compiling, "BACKEND", wrong)
    model = net()
    made = compiled(Fast(model, "as it is"), *images(), "fp32")
    assert made.model is model and "it then differs by" in made.about


def test_what_is_no_quicker_is_not_used(monkeypatch):
    monkeypatch.setattr(compiling, "seconds", lambda model, x, y: 1.0)
    model = net()
    made = compiled(Fast(model, "as it is"), *images(), "fp32")
    assert made.model is model and made.about == "as it is, not compiled (it was no quicker)"


@pytest.mark.parametrize("worth", [True, False])
def test_an_evaluation_compiles_only_where_that_pays_back_and_finds_the_same(worth, quicker, monkeypatch):
    monkeypatch.setattr("bench.evaluate.may_compile", lambda device: True)
    monkeypatch.setattr("bench.evaluate.pays", lambda device, seconds: (worth, ""))
    data = dataset()
    specs = [{"attack": "pgd", "steps": 10}]
    columns = Protocol.model_validate({"name": "t", "column": specs}).columns(0.02)
    outcomes = []
    for prepared in (False, True):
        evaluator = Evaluator(Hyperplane(), classes=10, split=data.test, seed=0, success="any")
        if prepared:
            evaluator.prepare(plan(columns), 24, 24)
            assert isinstance(evaluator.gradient_model, Compiled) is worth
            assert evaluator.about.endswith("compiled") is worth
        outcomes.append(evaluator.run(plan(columns), np.arange(24)).outcomes["pgd-10"])
    assert torch.equal(outcomes[0].robust, outcomes[1].robust)
    assert 0 < int(outcomes[0].robust.sum()) < 24


def test_nothing_is_compiled_on_a_cpu():
    evaluator = Evaluator(Hyperplane(), classes=10, split=dataset().test, seed=0, success="any")
    before = evaluator.gradient_model
    evaluator.prepare([], 10**9, 256)
    assert evaluator.gradient_model is before


@pytest.mark.slow
def test_the_real_compiler_agrees(quicker, monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    made = compiled(Fast(net(), "as it is"), *images(), "fp32")
    assert made.about == "as it is, compiled"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_compiles_what_an_evaluation_asks_for(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    x, y = (tensor.cuda() for tensor in images(64))
    made = compiled(Fast(net().cuda(), "as it is"), x, y, "fp32")
    assert made.about.startswith("as it is, ") and "differs" not in made.about
