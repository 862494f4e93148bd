"""A recorded pass is the pass, for batches of any size and in any order; where it is no quicker it is not used.

What a GPU records is stood in for by `Overwriting`, which like a CUDA graph answers in the same place each time and may be
followed back once.
"""

import itertools

import numpy as np
import pytest
import torch
from oracles import Hyperplane, dataset, small_net

from bench import graphs
from bench.arithmetic import ON_GPUS
from bench.attacks.gradient import input_gradient
from bench.attacks.losses import cross_entropy
from bench.errors import VoidRun
from bench.evaluate import Evaluator
from bench.fast import TF32, Fast
from bench.graphs import Graphed, filled, graphed, pays, serving
from bench.plan import plan
from bench.protocol import Protocol


class Overwriting:
    """A network on a fixed number of images that answers in its own buffers."""

    factor = 1.0

    def __init__(self, model, x):
        self.model, self.x = model, x.clone().requires_grad_()
        with torch.enable_grad():
            self.made = model(self.x)
        self.logits, self.gradient = self.made.detach().clone(), torch.empty_like(x)
        self.multiplied = ON_GPUS[0].fp32_precision

    def forward(self, x):
        assert x.shape == self.x.shape
        with torch.no_grad():
            self.x.copy_(x)
        with torch.enable_grad():
            self.made = self.model(self.x)
        return self.logits.copy_(self.made.detach())

    def backward(self, upstream):
        (gradient,) = torch.autograd.grad(self.made, self.x, upstream)
        return self.gradient.copy_(self.factor * gradient)


@pytest.fixture(autouse=True)
def recorder(monkeypatch):
    monkeypatch.setattr(graphs, "RECORD", Overwriting)
    monkeypatch.setattr(graphs, "SIZES", (1, 4, 8))


@pytest.fixture
def quicker(monkeypatch):
    """Whatever is recorded is said to be quicker, whatever its size."""
    monkeypatch.setattr(graphs, "seconds", lambda model, x, y: 1.0 if isinstance(model, Graphed) else 2.0)


def net():
    return small_net().eval().requires_grad_(False)


def images(n=8, seed=0):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)), torch.arange(n) % 4


def made(model, precision="fp32", most=8):
    return graphed(Fast(model, "as it is"), *images(5), precision, most)


def test_recorded_passes_are_the_networks_for_batches_of_any_size(quicker):
    model = net()
    graph = made(model)
    assert graph.about == "as it is, CUDA graphs of 1, 4, 8 images"
    answers = []
    for n in (8, 1, 3, 5, 8, 9, 4):
        x, y = images(n, seed=n)
        answers.append((input_gradient(graph.model, x, y, cross_entropy), (x, y)))
    # asked again since, and yet what was answered stands
    for (gradient, logits), (x, y) in answers:
        expected, expected_logits = input_gradient(model, x, y, cross_entropy)
        torch.testing.assert_close(gradient, expected)
        torch.testing.assert_close(logits, expected_logits)
    x, _ = images()
    assert torch.equal(graph.model(x), model(x))


def test_passes_may_be_followed_back_late_and_more_than_once(quicker):
    model = net()
    graph = made(model).model
    (a, _), (b, _) = images(3, seed=1), images(4, seed=2)
    a.requires_grad_(), b.requires_grad_()
    first, second = graph(a), graph(b)
    for k in range(4):
        for x, logits in ((a, first), (a, first), (b, second)):
            (found,) = torch.autograd.grad(logits[:, k].sum(), x, retain_graph=True)
            (expected,) = torch.autograd.grad(model(x)[:, k].sum(), x)
            torch.testing.assert_close(found, expected)


def test_a_gradient_of_a_gradient_is_refused_and_not_wrong(quicker):
    graph, x = made(net()).model, images(4)[0].requires_grad_()
    (gradient,) = torch.autograd.grad(graph(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="not have been used|twice"):
        torch.autograd.grad(gradient.sum(), x)


# ---------------------------------------------------------------------------------------------------------------------
# where it is used

#: seconds of the network and of its graph, by images: a graph of many takes as long as the network
TOOK = {1: (5.0, 1.0), 4: (5.0, 2.0), 8: (6.0, 5.5), 16: (9.0, 9.5)}


@pytest.mark.parametrize(
    ("n", "served"),
    [(1, 1), (2, 4), (3, 4), (4, 4), (5, None), (7, None), (8, 8), (9, None), (16, None), (17, None)],
)
def test_a_batch_is_served_where_the_network_takes_longer_for_as_many_images_or_fewer(n, served):
    assert serving(n, TOOK) == served


def test_no_batch_is_served_more_slowly_if_more_images_never_take_less():
    times = (1.0, 2.0, 3.0)
    for plain, graph in itertools.product(itertools.product(times, repeat=3), repeat=2):
        if list(plain) != sorted(plain):
            continue
        took = dict(zip((1, 4, 8), zip(plain, graph, strict=True), strict=True))
        for n in range(1, 10):
            size = serving(n, took)
            least = plain[0] if n < 4 else plain[1] if n < 8 else plain[2]
            assert size is None or (size >= n and took[size][1] < least)


def test_only_sizes_that_are_quicker_are_kept(monkeypatch):
    monkeypatch.setattr(
        graphs,
        "seconds",
        lambda model, x, y: 3.0 if len(x) == 8 else 1.0 if isinstance(model, Graphed) else 2.0,
    )
    graph = made(net())
    assert graph.about == "as it is, CUDA graphs of 1, 4 images" and list(graph.model.held) == [1, 4]


def test_no_more_images_are_recorded_than_are_ever_passed_at_once(quicker):
    assert made(net(), most=5).about == "as it is, CUDA graphs of 1, 4 images"


def test_what_is_no_quicker_is_not_used(monkeypatch):
    monkeypatch.setattr(graphs, "seconds", lambda model, x, y: 1.0)
    model = net()
    graph = made(model)
    assert graph.model is model and graph.about == "as it is, no CUDA graphs (they were no quicker)"


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted\nwhen capturing"), VoidRun("odd")])
def test_what_cannot_be_recorded_is_used_as_it_was_and_why_is_said(error, monkeypatch, quicker):
    def refuses(model, x):
        raise error

    monkeypatch.setattr(graphs, "RECORD", refuses)
    model = net()
    graph = made(model)
    assert graph.model is model
    assert graph.about.startswith("as it is, no CUDA graphs (") and "capturing" not in graph.about
    assert ("operation not permitted" if isinstance(error, RuntimeError) else "odd") in graph.about


def test_a_recording_that_changes_gradients_is_not_believed(monkeypatch, quicker):
    monkeypatch.setattr(Overwriting, "factor", 1.5)
    model = net()
    graph = made(model)
    assert graph.model is model and "they differ by 0.5" in graph.about


def test_without_a_gpu_nothing_is_recorded_and_on_one_where_a_run_is_long():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert pays(cpu, 1e9) == (False, "no CUDA graphs (there is no GPU)")
    assert pays(cuda, 3600)[0] and pays(cuda, 3600)[1].startswith("CUDA graphs (recording takes about")
    assert not pays(cuda, 60)[0] and pays(cuda, 60)[1].startswith("no CUDA graphs (recording takes about")


def test_what_is_recorded_multiplies_as_was_asked(quicker):
    graph = made(TF32(net()), "tf32").model
    assert {held.recording.multiplied for held in graph.held.values()} == {"tf32"}
    with graph.arithmetic():
        assert ON_GPUS[0].fp32_precision == "tf32"


def test_rows_are_filled_up_with_themselves():
    rows = torch.arange(3)
    assert filled(rows, 5).tolist() == [0, 1, 2, 0, 1] and filled(rows, 3) is rows


@pytest.mark.parametrize("success", ["last", "any"])
def test_an_evaluation_records_where_that_pays_back_and_finds_the_same(success, quicker, monkeypatch):
    monkeypatch.setattr("bench.evaluate.may_compile", lambda device: True)
    monkeypatch.setattr(graphs, "SIZES", (1, 4, 16))
    data, outcomes = dataset(), []
    specs = [
        {"attack": "pgd", "steps": 10, "restarts": 2},
        {"attack": "autoattack", "settings": {"steps": 3}},
    ]
    specs[1]["settings"]["attacks"] = ["apgd-ce", "fab-t"]
    columns = Protocol.model_validate({"name": "t", "column": specs}).columns(0.02, classes=10)
    for worth in (False, True):
        monkeypatch.setattr(graphs, "pays", lambda device, gradients, worth=worth: (worth, ""))
        evaluator = Evaluator(Hyperplane(), classes=10, split=data.test, seed=0, success=success)
        evaluator.prepare(plan(columns), 24, 24)
        assert isinstance(evaluator.gradient_model, Graphed) is worth
        assert ("CUDA graphs of 1, 4, 16 images" in evaluator.about) is worth
        outcomes.append(evaluator.run(plan(columns), np.arange(24)).outcomes)
    for name, outcome in outcomes[0].items():
        assert torch.equal(outcome.robust, outcomes[1][name].robust), name
    assert all(0 < int(outcome.robust.sum()) < 24 for name, outcome in outcomes[0].items() if name != "clean")
