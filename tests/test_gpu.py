"""What only a GPU can show: that what is quicker there is the same there. None of it runs where there is none.

tox run -e gpu
"""

from functools import partial

import numpy as np
import pytest
import torch
from learnable import dataset
from torch import nn

from baselines.resnet import resnet18
from bench import graphs, moe
from bench.arithmetic import exact_arithmetic, multiplies_in_tf32, tf32
from bench.attacks.gradient import input_gradient
from bench.attacks.losses import cross_entropy
from bench.data.resident import Resident, resident
from bench.evaluate import Evaluator
from bench.fast import Fast, fast
from bench.graphs import CudaGraphs, Graphed, graphed
from bench.judge import Cost, Judge
from bench.plan import plan
from bench.protocol import Protocol
from bench.session import prepare
from bench.speed import this_machine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]


@pytest.fixture
def quicker(monkeypatch):
    """Whatever is recorded is said to be quicker, whatever its size."""
    monkeypatch.setattr(graphs, "seconds", lambda model, x, y: 1.0 if isinstance(model, Graphed) else 2.0)


def net(width=8, classes=3):
    torch.manual_seed(0)
    made = resnet18(channels=1, classes=classes, width=width)
    return made.cuda().eval().requires_grad_(False)


def images(n=32, side=8):
    return torch.rand(n, 1, side, side).cuda(), (torch.arange(n) % 3).cuda()


def outcomes(evaluator, n=24):
    specs = [{"attack": "fgsm"}, {"attack": "pgd", "steps": [5, 20], "restarts": 2}]
    columns = Protocol.model_validate({"name": "t", "column": specs}).columns(0.02)
    return evaluator.run(plan(columns), np.arange(n)).outcomes


def evaluator(precision="fp32"):
    data = dataset()
    return Evaluator(
        net(classes=len(data.classes)),
        classes=len(data.classes),
        split=data.test,
        seed=0,
        success="any",
        precision=precision,
        device="cuda",
    )


def share_that_differs(one, other):
    differ = [(one[name].robust != other[name].robust).float().mean().item() for name in one]
    return max(differ)


def test_a_product_in_tf32_is_not_exact_and_judging_is():
    if not multiplies_in_tf32(torch.device("cuda")):
        pytest.skip("this GPU has no TF32")
    a = torch.randn(512, 512).cuda()
    right = a.double() @ a.double()
    off = []
    for arithmetic in (exact_arithmetic, tf32):
        with arithmetic():
            off.append(float((a @ a - right).abs().max() / right.abs().max()))
    assert off[0] < 1e-5 < 1e-4 < off[1]
    model, (x, _) = net(64), images()
    alone = Judge(model, 3, Cost()).logits(x, x, None)
    with tf32():
        assert torch.equal(Judge(model, 3, Cost()).logits(x, x, None), alone)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_gradients_of_each_precision_are_nearly_the_same(precision):
    model, (x, y) = net(64), images()
    with exact_arithmetic():
        expected, _ = input_gradient(model, x, y, cross_entropy)
        found, _ = input_gradient(fast(model, x, y, precision).model, x, y, cross_entropy)
    off = float((found - expected).norm() / expected.norm())
    assert off < {"fp32": 1e-3, "tf32": 0.1, "bf16": 0.3}[precision]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recorded_passes_are_the_networks(precision, quicker):
    model, (x, y) = net(), images()
    quick = fast(model, x, y, precision)
    made = graphed(quick, x, y, precision, 32)
    assert made.about.endswith("CUDA graphs of 1, 4, 8, 16, 32 images")
    for n in (1, 2, 5, 32, 33 - 1, 7):
        found = input_gradient(made.model, x[:n], y[:n], cross_entropy)
        expected = input_gradient(quick.model, x[:n], y[:n], cross_entropy)
        for a, b in zip(found, expected, strict=True):
            assert float((a - b).norm() / b.norm()) < (1e-3 if precision == "fp32" else 0.1)


def test_what_cannot_be_captured_is_used_as_it_was(quicker):
    class Waits(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return self.net(x) * (1.0 if x.sum().item() > -1 else 2.0)

    model, (x, y) = Waits().eval(), images()
    made = graphed(Fast(model, "as it is"), x, y, "fp32", 32)
    assert made.model is model and "no CUDA graphs (" in made.about
    # and the device is none the worse for it
    assert input_gradient(model, x, y, cross_entropy)[0].isfinite().all()


def test_an_evaluation_with_graphs_finds_what_one_without_finds(quicker, monkeypatch):
    monkeypatch.setattr(graphs, "pays", lambda device, gradients: (True, ""))
    plain, recorded = evaluator(), evaluator()
    columns = Protocol.model_validate({"name": "t", "column": [{"attack": "pgd", "steps": 20}]}).columns(0.02)
    recorded.prepare(plan(columns), 24, 24)
    assert isinstance(recorded.gradient_model, Graphed)
    assert isinstance(next(iter(recorded.gradient_model.held.values())).recording, CudaGraphs)
    assert share_that_differs(outcomes(plain), outcomes(recorded)) <= 0.05


def test_images_lie_on_the_device_and_are_the_same():
    split = dataset().test
    there = resident(split, "cuda")
    assert isinstance(there, Resident) and isinstance(evaluator().split, Resident)
    for index in (slice(3, 9), np.array([5, 0, 5])):
        for a, b in zip(there.batch(index, "cuda"), split.batch(index, "cuda"), strict=True):
            assert a.device == b.device and torch.equal(a, b)


@pytest.mark.parametrize("n", [1, 16, 17, 40])
def test_experts_say_the_same_side_by_side_and_one_after_another(n):
    torch.manual_seed(0)
    make = partial(resnet18, channels=1, classes=3, width=8)
    experts = moe.Experts(make, 3).cuda().double().eval().requires_grad_(False)
    (x, y), answers = images(n, 32), []
    assert moe.grouped(x) is (n <= 16)
    model = nn.Sequential(experts, nn.Flatten())
    for batch in (0, 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(moe.GROUPED_BATCH, "cuda", batch)
            answers.append(input_gradient(model, x.double(), y, cross_entropy))
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)
    made = fast(nn.Sequential(experts.float(), nn.Flatten()), x, y)
    assert any(isinstance(part, moe.ByBatch) for part in made.model.modules())


def test_the_machine_is_told_of_in_every_precision_it_multiplies_in():
    flops = this_machine(torch.device("cuda")).flops
    if "tf32" in flops:
        assert flops["fp32"] < flops["tf32"] < flops["bf16"]
        assert prepare(device="cuda", precision="tf32").precision == "tf32"
