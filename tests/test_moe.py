"""Experts side by side: each of them is what it would be alone."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from baselines.resnet import resnet18
from bench import moe
from bench.attacks.gradient import input_gradient
from bench.attacks.losses import cross_entropy
from bench.fast import FOLDED, fast
from bench.model import evaluating
from bench.moe import ByBatch, Experts, grouped

EXPERTS, CHANNELS, CLASSES = 3, 2, 4
make = partial(resnet18, channels=CHANNELS, classes=CLASSES, width=4)
SOME = [(first, last) for first in range(EXPERTS) for last in range(first + 1, EXPERTS + 1)]


def experts(count: int = EXPERTS, double: bool = True) -> Experts:
    """Experts whose BatchNorm statistics and affine weights are not the initial ones."""
    torch.manual_seed(0)
    made = Experts(make, count)
    with torch.no_grad():
        for layer in made.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.uniform_(-0.3, 0.3)
        made(torch.rand(8, CHANNELS, 8, 8))
    return made.double() if double else made


def alone(side_by_side: Experts, i: int) -> nn.Module:
    """The `i`-th expert as a network of its own."""
    one = make().to(next(side_by_side.parameters()).dtype)
    one.load_state_dict({name: value.clone() for name, value in side_by_side.state_of(i, i + 1).items()})
    return one.train(side_by_side.training)


def images(count: int = EXPERTS, n: int = 5) -> torch.Tensor:
    return torch.rand(n, count * CHANNELS, 8, 8, dtype=torch.float64)


def of(x, i):
    """What the `i`-th expert is shown."""
    return x[:, i * CHANNELS : (i + 1) * CHANNELS]


@pytest.mark.parametrize("training", [False, True])
def test_the_same_images_go_to_every_expert(training):
    many, x = experts().train(training), images(1)
    each = [alone(many, i)(x) for i in range(EXPERTS)]
    torch.testing.assert_close(many(x), torch.stack(each, 1))
    assert many(x).shape == (5, EXPERTS, CLASSES)


@pytest.mark.parametrize(("first", "last"), SOME)
@pytest.mark.parametrize("training", [False, True])
def test_some_experts_on_images_of_their_own_are_each_expert_alone(training, first, last):
    many, x = experts().train(training), images(last - first)
    singles = [alone(many, i) for i in range(first, last)]
    logits = many.some(x, first, last)
    assert logits.shape == (5, last - first, CLASSES)
    torch.testing.assert_close(logits, torch.stack([one(of(x, i)) for i, one in enumerate(singles)], 1))


@pytest.mark.parametrize(("first", "last"), SOME)
@pytest.mark.parametrize("training", [False, True])
def test_gradients_and_batch_statistics_of_some_experts_are_those_of_each_alone(training, first, last):
    many, x, y = experts().train(training), images(last - first), torch.tensor([0, 1, 2, 3, 0])
    singles = [alone(many, i) for i in range(EXPERTS)]
    logits = many.some(x, first, last)
    sum(F.cross_entropy(logits[:, i], y) for i in range(last - first)).backward()
    for i in range(first, last):
        F.cross_entropy(singles[i](of(x, i - first)), y).backward()
    for name, parameter in many.net.named_parameters():
        for i, found in enumerate(parameter.grad.chunk(EXPERTS)):
            expected = singles[i].get_parameter(name).grad if first <= i < last else torch.zeros_like(found)
            torch.testing.assert_close(found, expected, msg=name)
    for name, buffer in many.net.named_buffers():
        for i, found in enumerate(buffer.chunk(EXPERTS) if buffer.dim() else [buffer] * EXPERTS):
            if buffer.dim() or first <= i < last:
                torch.testing.assert_close(found, singles[i].get_buffer(name), msg=name)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("first", "last"), [(0, 3), (1, 2)])
def test_the_gradient_with_respect_to_the_images_is_the_numerical_one(training, first, last):
    many, x = experts().train(training), images(last - first, n=6)
    weights = torch.randn(6, last - first, CLASSES, dtype=torch.float64)

    def total(x):
        return (weights * many.some(x, first, last)).sum()

    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(point), point)
    step = 1e-7
    for _ in range(4):
        direction = torch.randn_like(x)
        with torch.no_grad():
            numerical = (total(x + step * direction) - total(x - step * direction)) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(float(numerical), rel=1e-4, abs=1e-4)


def test_an_experts_images_reach_no_other_expert():
    many, x = experts().eval(), images().requires_grad_()
    (gradient,) = torch.autograd.grad(many.some(x, 0, EXPERTS)[:, 1].sum(), x)
    assert of(gradient, 1).abs().sum() > 0
    assert not of(gradient, 0).any() and not of(gradient, 2).any()


def test_a_single_expert_is_the_network_itself():
    many, x = experts(1).eval(), images(1)
    torch.testing.assert_close(many(x), alone(many, 0)(x)[:, None])
    torch.testing.assert_close(many.some(x, 0, 1), many(x))


def test_the_mode_of_some_experts_follows_that_of_all():
    many, x = experts(), images(1)
    in_eval = many.eval().some(x, 0, 1)
    in_train = many.train().some(x, 0, 1)
    assert not torch.allclose(in_eval, in_train)
    before = many.net.bn1.running_mean.clone()
    with evaluating(many):
        many.some(x, 0, 1)
    assert torch.equal(many.net.bn1.running_mean, before)


def test_a_state_is_a_view_into_that_of_all():
    many = experts()
    with torch.no_grad():
        for tensor in many.state_of(1, 2).values():
            tensor.zero_()
    weight = many.net.conv1.weight
    assert not weight[4:8].any() and weight[:4].any() and weight[8:].any()
    assert not many.net.bn1.running_var[4:8].any() and many.net.bn1.running_var[:4].all()


def test_loading_the_same_state_everywhere_makes_experts_alike():
    many, one = experts().eval(), make().double()
    for i in range(EXPERTS):
        with torch.no_grad():
            for name, tensor in many.state_of(i, i + 1).items():
                tensor.copy_(one.state_dict()[name])
    logits = many(images(1))
    torch.testing.assert_close(logits, logits[:, :1].expand_as(logits))


@pytest.mark.parametrize("used_before", [False, True])
def test_a_deep_copy_is_independent_and_equal(used_before):
    many, x = experts().eval(), images(2)
    if used_before:
        many.some(x, 0, 2)
    other = copy.deepcopy(many)
    torch.testing.assert_close(other.some(x, 1, 3), many.some(x, 1, 3))
    with torch.no_grad():
        other.net.conv1.weight.zero_()
    assert many.net.conv1.weight.any()
    assert not torch.allclose(other.some(x, 1, 3), many.some(x, 1, 3))


def test_state_and_parameters_are_those_of_the_network_alone():
    many = experts()
    before = set(many.state_dict())
    many.some(images(2), 0, 2)
    assert set(many.state_dict()) == before == {f"net.{name}" for name in make(copies=EXPERTS).state_dict()}


def test_channels_last_changes_nothing_but_the_layout():
    many, x = experts().eval(), images(2)
    before = many.some(x, 1, 3)
    many = many.to(memory_format=torch.channels_last)
    torch.testing.assert_close(many.some(x.contiguous(memory_format=torch.channels_last), 1, 3), before)


LARGE = 20


@pytest.fixture
def a_gpu_that_is_small(monkeypatch):
    """On this device up to three of the larger images are a small batch."""
    monkeypatch.setitem(moe.GROUPED_BATCH, "cpu", 3 * LARGE * LARGE)


def test_on_a_gpu_small_batches_run_as_one_program_and_on_a_cpu_small_images_alone():
    def on(device, n, side):
        return grouped(torch.empty(n, 3, side, side, device=device))

    assert on("cpu", 4096, 16) and not on("cpu", 1, 17)
    assert moe.GROUPED_BATCH == {"cuda": 16_384}
    moe.GROUPED_BATCH["meta"] = moe.GROUPED_BATCH["cuda"]
    try:
        assert on("meta", 4096, 16)
        assert on("meta", 16, 32) and not on("meta", 17, 32)
        assert on("meta", 4, 64) and not on("meta", 5, 64) and not on("meta", 1, 224)
    finally:
        del moe.GROUPED_BATCH["meta"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("first", "last"), [(0, 3), (1, 3), (1, 2)])
def test_every_route_gives_the_same_logits_gradients_and_statistics(training, first, last, monkeypatch):
    answers = []
    for batch in (0, 10**9):
        monkeypatch.setitem(moe.GROUPED_BATCH, "cpu", batch)
        many = experts().train(training)
        torch.manual_seed(1)
        x = torch.rand(3, (last - first) * CHANNELS, LARGE, LARGE, dtype=torch.float64).requires_grad_()
        assert grouped(x) is (batch > 0)
        logits = many.some(x, first, last)
        weights = torch.randn(logits.shape, dtype=torch.float64)
        gradients = torch.autograd.grad((weights * logits).sum(), [x, *many.parameters()])
        # of calls nobody reads the number
        answers.append([logits, *gradients, *(buffer for buffer in many.buffers() if buffer.dim())])
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch", [0, 10**9])
def test_every_route_is_what_stacked_weights_under_vmap_say(batch, monkeypatch):
    monkeypatch.setitem(moe.GROUPED_BATCH, "cpu", batch)
    many, one = experts().eval(), make().double().eval()
    torch.manual_seed(1)
    x = torch.rand(3, CHANNELS, LARGE, LARGE, dtype=torch.float64).requires_grad_()
    states = [many.state_of(i, i + 1) for i in range(EXPERTS)]
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    expected = torch.func.vmap(lambda state: torch.func.functional_call(one, state, (x,)), out_dims=1)(
        stacked
    )
    logits = many(x)
    weights = torch.randn(logits.shape, dtype=torch.float64)
    found, gradient = (torch.autograd.grad((weights * z).sum(), x)[0] for z in (logits, expected))
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12)


def test_the_copy_for_gradients_goes_the_way_of_its_batch_and_is_compared_on_both(a_gpu_that_is_small):
    torch.manual_seed(0)
    many = Experts(partial(resnet18, channels=1, classes=3, width=4), 3).eval().requires_grad_(False)
    model, x, y = nn.Sequential(many, nn.Flatten()), torch.rand(5, 1, LARGE, LARGE), torch.zeros(5).long()
    made = fast(model, x, y)
    assert made.about == FOLDED
    (way,) = (part for part in made.model.modules() if isinstance(part, ByBatch))
    asked = []
    for name in ("together", "apart"):
        getattr(way, name).register_forward_hook(lambda *_, name=name: asked.append(name))
    for n, name in ((1, "together"), (3, "together"), (4, "apart"), (5, "apart")):
        asked.clear()
        for found, expected in zip(
            input_gradient(made.model, x[:n], y[:n], cross_entropy),
            input_gradient(model, x[:n], y[:n], cross_entropy),
            strict=True,
        ):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
        assert asked == [name]


@pytest.mark.parametrize("way", ["together", "apart"])
def test_a_copy_that_is_wrong_on_either_way_is_not_used(way, a_gpu_that_is_small, monkeypatch):
    def wrong(self, experts):
        inner(self, experts)
        with torch.no_grad():
            next(getattr(self, way).parameters()).mul_(1.1)

    inner = ByBatch.__init__
    monkeypatch.setattr(ByBatch, "__init__", wrong)
    torch.manual_seed(0)
    many = Experts(partial(resnet18, channels=1, classes=3, width=4), 3).eval().requires_grad_(False)
    x, y = torch.rand(5, 1, LARGE, LARGE), torch.zeros(5).long()
    assert fast(nn.Sequential(many, nn.Flatten()), x, y).about == "as it is (a faster copy differs)"


@pytest.mark.parametrize("side", [8, 20])
def test_grouped_or_one_by_one_the_experts_say_the_same(side):
    torch.manual_seed(0)
    experts = Experts(partial(resnet18, channels=1, classes=3, width=4), 3).eval()
    x = torch.rand(5, 1, side, side)
    assert grouped(x) == (side == 8)
    as_one = experts.net(x.repeat(1, 3, 1, 1))
    torch.testing.assert_close(experts(x), as_one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(experts.apart()(x), as_one, rtol=1e-4, atol=1e-5)
    own = torch.rand(5, 3, side, side)
    torch.testing.assert_close(experts.some(own, 0, 3), experts.net(own), rtol=1e-4, atol=1e-5)


def test_one_by_one_training_moves_every_experts_weights_and_statistics():
    torch.manual_seed(0)
    experts = Experts(partial(resnet18, channels=1, classes=3, width=4), 3).train()
    means = [name for name, _ in experts.net.named_buffers() if name.endswith("running_mean")]
    before = {name: value.clone() for name, value in experts.net.named_buffers()}
    experts(torch.rand(5, 1, 20, 20)).sum().backward()
    after = dict(experts.net.named_buffers())
    for name in means:
        moved = (after[name] != before[name]).view(3, -1)
        assert moved.any(1).all(), name
    assert all(
        p.grad is not None and (p.grad.reshape(3, -1) != 0).any(1).all()
        for p in experts.net.conv1.parameters()
    )
