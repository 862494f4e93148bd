"""The copy that gradients are taken from: it is the model, or it is not used."""

import copy
import dataclasses
from functools import partial

import pytest
import torch
from learnable import dataset
from oracles import small_net
from routed_toys import RouteToy
from torch import nn
from torch.nn import functional as F

from baselines.resnet import resnet18
from bench.attacks.gradient import input_gradient
from bench.attacks.losses import cross_entropy, margin
from bench.config import replaced
from bench.errors import VoidRun
from bench.fast import (
    Autocast,
    ChannelsLast,
    _add,
    _folded,
    _in_place,
    fast,
    fast_expectation,
    fast_mixture,
    projection,
)
from bench.model import Normalized
from bench.moe import Experts, output_of
from bench.registry import get
from bench.train import initial

FOLDED, PLAIN = "folded BatchNorm, channels_last", "channels_last"
AS_IT_IS = "as it is (a faster copy differs)"


def images(n=6, channels=3, side=8):
    return torch.rand(n, channels, side, side), torch.arange(n) % 3


def settled(model, x):
    """The model with BatchNorm statistics and weights that are not the initial ones, in eval mode, frozen."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d) and layer.affine:
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(x + 0.1 * torch.randn_like(x))
    return model.eval().requires_grad_(False)


def batch_norms(model):
    return sum(isinstance(part, nn.BatchNorm2d) for part in model.modules())


def assert_same(model, other, x, y):
    """Logits and gradients in float64, where a right copy differs by rounding alone."""
    model, other, x = copy.deepcopy(model).double(), copy.deepcopy(other).double(), x.double()
    for loss in (cross_entropy, margin):
        gradient, logits = input_gradient(model, x, y, loss)
        found, found_logits = input_gradient(other, x, y, loss)
        torch.testing.assert_close(found_logits, logits, rtol=1e-5, atol=1e-6)
        assert (found - gradient).abs().max() <= 1e-4 * gradient.abs().max()


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, bias=False)
        self.first_bn = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4)
        self.grouped_bn = nn.BatchNorm2d(8, affine=False)
        self.linear = nn.Linear(8, 3)

    def forward(self, x):
        h = F.relu(self.first_bn(self.first(x)))
        return self.linear(F.relu(self.grouped_bn(self.grouped(h))).mean((2, 3)))


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts(partial(resnet18, channels=3, classes=3, width=4), 3)

    def forward(self, x):
        return self.experts(x).mean(1)


class Branching(nn.Module):
    """Its control flow depends on the images, so it cannot be traced; its parts can."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.linear = nn.Linear(8, 3)

    def forward(self, x):
        h = self.body(x)
        if h.mean() > -1e9:
            h = 2 * h
        return self.linear(h.mean((2, 3)))


def built(name):
    kind = get(name)
    return initial(kind(kind.recipes["tiny"]), dataset(channels=3), 0)


FOLDABLE = {
    "sequential": lambda: small_net(3),
    "grouped convolutions": Grouped,
    "experts": Mixed,
    "data-dependent control flow": Branching,
    "resnet20": lambda: built("resnet20"),
    "resnet18": lambda: built("resnet18"),
    "mobilenet_v2": lambda: built("mobilenet_v2"),
    "dwf": lambda: built("dwf"),
}


@pytest.mark.parametrize("kind", FOLDABLE)
def test_a_folded_copy_is_the_model_with_fewer_layers_and_the_model_is_untouched(kind):
    x, y = images()
    model = settled(FOLDABLE[kind](), x)
    before = copy.deepcopy(model)
    logits = model(x)
    made = fast(model, x, y)
    assert made.about == FOLDED
    assert batch_norms(made.model) < batch_norms(model)
    assert_same(model, made.model, x, y)
    assert next(made.model.parameters()).dtype == torch.float32 and made.model(x).dtype == torch.float32
    assert torch.equal(model(x), logits)
    assert [type(part) for part in model.modules()] == [type(part) for part in before.modules()]
    for (name, one), two in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(one, two) and one.stride() == two.stride(), name


@pytest.mark.parametrize("name", ["resnet18", "dwf"])
def test_every_batch_norm_that_follows_a_convolution_is_folded(name):
    x, y = images()
    assert batch_norms(fast(settled(built(name), x), x, y).model) == 0


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "dwf", "fgsm_at"])
@pytest.mark.parametrize("seed", range(3))
def test_an_untrained_network_of_tiny_gradients_is_folded_too(name, seed):
    kind, data = get(name), dataset()
    model = initial(kind(kind.recipes["tiny"]), data, seed).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(1e-7)
    x, y = data.test.batch(slice(0, 8))
    gradient, _ = input_gradient(model, x, y, cross_entropy)
    assert gradient.abs().max() < 1e-4
    assert fast(model, x, y).about == FOLDED


class Joined(nn.Module):
    """Sums and ReLUs that may be overwritten (two each), and others that may not: somebody reads what they are of."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, 4, 3, padding=1) for c in (3, 4, 4, 4))
        self.relu = nn.ReLU()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        h = self.relu(self.convs[0](x))
        h = self.relu(h + self.convs[1](h))
        read = self.convs[2](h)
        h = read + F.relu(read) + torch.relu(h - 0.5)
        h = self.convs[3](h) + 0.25
        return self.linear(h.mean((2, 3)))


def test_sums_and_relus_overwrite_what_nobody_else_reads_and_change_no_bit():
    (x, y), model = images(), Joined().eval().requires_grad_(False)
    lean = _in_place(_folded(copy.deepcopy(model)))
    written = [node for node in lean.graph.nodes if node.target in (torch.relu_, _add)]
    assert [node.target for node in written].count(torch.relu_) == 2
    x = x.requires_grad_(True)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            found, expected = (input_gradient(one, x, y, cross_entropy) for one in (lean, model))
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
    assert fast(model, x.detach(), y).about == FOLDED


def test_confident_networks_are_folded_though_their_loss_has_no_gradient():
    x, y = images()
    model = settled(Grouped(), x)
    model.linear.weight.mul_(1e5)
    y = model(x).argmax(1)
    assert not input_gradient(model, x, y, cross_entropy)[0].any()
    assert fast(model, x, y).about == FOLDED


def test_images_with_flat_regions_are_no_ties_for_a_max_pool():
    x, y = images(side=12)
    x[:] = 0.5
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 25, 3)
    )
    assert fast(settled(net, torch.rand_like(x)), x, y).about == FOLDED


# ---------------------------------------------------------------------------------------------------------------------
# models that tracing gets wrong


class Block(nn.Module):
    """Convolution, BatchNorm, and what a test puts between them and the logits."""

    def __init__(self, twist):
        super().__init__()
        self.conv, self.bn, self.linear = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 3)
        self.twist = twist

    def forward(self, x):
        return self.linear(F.relu(self.bn(self.conv(self.twist(x)))).mean((2, 3)))


class StraightThrough(torch.autograd.Function):
    """Rounds, and passes gradients as if it had not: tracing would follow the rounding."""

    @staticmethod
    def forward(ctx, x):
        return (x * 16).round() / 16

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def partly_without_gradient(x):
    with torch.no_grad():
        hidden = x.flip(3) * 0.5
    return x + hidden


@pytest.mark.parametrize(
    "twist", [partly_without_gradient, StraightThrough.apply], ids=["no_grad", "function"]
)
def test_where_tracing_loses_what_the_backward_pass_does_the_folded_copy_is_not_used(twist):
    x, y = images()
    model = settled(Block(twist), x)
    made = fast(model, x, y)
    assert made.about == PLAIN
    assert batch_norms(made.model) == 1
    assert_same(model, made.model, x, y)


def test_a_model_that_draws_numbers_is_used_as_it_is():
    x, y = images()
    model = settled(Block(lambda x: x + 0.1 * torch.rand(1)), x)
    made = fast(model, x, y)
    assert made.about == AS_IT_IS and made.model is model


def test_a_model_that_knows_its_convolution_is_not_given_another():
    class Peeking(Block):
        def forward(self, x):
            return super().forward(x) + self.conv.weight.mean() * x.mean((1, 2, 3))[:, None]

    x, y = images()
    model = settled(Peeking(lambda x: x), x)
    made = fast(model, x, y)
    assert made.about == PLAIN
    assert_same(model, made.model, x, y)


class Shared(nn.Module):
    """One convolution under two BatchNorms: folding either would change the other."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)
        self.one, self.two = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x):
        h = F.relu(self.one(self.conv(x))) + F.relu(self.two(self.conv(x.flip(2))))
        return self.linear(h.mean((2, 3)))


def test_a_convolution_used_twice_is_not_folded_into_something_else():
    x, y = images()
    model = settled(Shared(), x)
    made = fast(model, x, y)
    assert made.about == PLAIN
    assert_same(model, made.model, x, y)


class Skipping(nn.Module):
    """The first convolution is needed with and without its BatchNorm; the second only with."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.first_bn, self.second_bn = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 3)

    def forward(self, x):
        h = self.first(x)
        return self.linear((h + F.relu(self.second_bn(self.second(F.relu(self.first_bn(h)))))).mean((2, 3)))


def test_a_convolution_that_somebody_else_needs_is_left_and_the_others_are_folded():
    x, y = images()
    model = settled(Skipping(), x)
    made = fast(model, x, y)
    assert made.about == FOLDED and batch_norms(made.model) == 1
    assert_same(model, made.model, x, y)


class Viewing(nn.Module):
    """Relies on the usual layout: `view` refuses a channels-last tensor."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8 * 36, 3)

    def forward(self, x):
        h = F.relu(self.bn(self.conv(x)))
        return self.linear(h.view(len(h), -1) if len(h) else h)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_that_cannot_have_channels_last_is_used_as_it_is(precision):
    x, y = images()
    model = settled(Viewing(), x)
    made = fast(model, x, y, precision)
    assert made.about.startswith(AS_IT_IS)
    gradient, _ = input_gradient(made.model, x, y, cross_entropy)
    assert gradient.shape == x.shape


class OnlyFloat32(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small_net(3)

    def forward(self, x):
        return self.net(x.float())


class Uncopyable(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small_net(3)
        self.cached = self.net[0].weight.requires_grad_() * 2

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("kind", [OnlyFloat32, Uncopyable])
def test_a_model_that_cannot_be_compared_is_used_as_it_is(kind):
    x, y = images(side=4)
    model = kind().eval()
    made = fast(model, x, y)
    assert made.model is model and made.about == "as it is (it does not run in float64)"


def test_a_model_without_a_gradient_is_refused():
    class Blind(Block):
        def forward(self, x):
            with torch.no_grad():
                return super().forward(x)

    x, y = images()
    with pytest.raises(VoidRun, match="carry no gradient"):
        fast(settled(Blind(lambda x: x), x), x, y)


def test_a_model_without_batch_norm_is_given_another_layout_alone():
    x, y = images()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3)).eval()
    assert_same(model, fast(model, x, y).model, x, y)


# ---------------------------------------------------------------------------------------------------------------------
# layouts and precisions


class Noting(nn.Module):
    """Notes layout and type of what reaches its convolution."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)
        self.seen = []

    def forward(self, x):
        h = self.conv(x)
        self.seen.append((x.is_contiguous(memory_format=torch.channels_last), h.dtype))
        return self.linear(h.mean((2, 3)))


def test_images_reach_the_model_channels_last():
    model, (x, _) = Noting(), images()
    ChannelsLast(model)(x)
    assert model.seen == [(True, torch.float32)]


def test_autocast_runs_in_bf16_and_answers_in_float32():
    model, (x, _) = Noting(), images()
    logits = Autocast(model, "cpu")(x)
    assert model.seen == [(False, torch.bfloat16)]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model(x), rtol=0.05, atol=0.05)


def test_bf16_says_so_and_has_gradients_near_those_of_the_model():
    x, y = images()
    model = settled(FOLDABLE["resnet18"](), x)
    made = fast(model, x, y, "bf16")
    assert made.about == f"{FOLDED}, bf16"
    found, _ = input_gradient(made.model, x, y, cross_entropy)
    expected, _ = input_gradient(model, x, y, cross_entropy)
    assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.95


def test_normalisation_is_part_of_the_copy():
    x, y = images(side=4)
    model = Normalized(small_net(3), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)).eval().requires_grad_(False)
    made = fast(model, x, y)
    assert made.about == FOLDED
    assert_same(model, made.model, x, y)


# ---------------------------------------------------------------------------------------------------------------------
# mixtures


def a_mixture(name, side=20):
    """One of the registry's, trained by chance, on images so large that its experts run one after another."""
    data, kind = dataset(side=side), get(name)
    config = kind.recipes["tiny"]
    known = {field.name for field in dataclasses.fields(config)}
    narrow = {n: 4 for n in ("width", "gate_width", "router_width") if n in known}
    model, x = initial(kind(replaced(config, narrow)), data, 0), torch.rand(4, *data.shape)
    return settled(model, x), x, torch.arange(4) % 3


@pytest.mark.parametrize("name", ["advmoe", "dwf", "immunity", "jtdmoe", "more", "rter", "soe"])
def test_gate_and_experts_of_a_folded_mixture_are_the_mixtures(name):
    model, x, y = a_mixture(name)
    quick = fast_mixture(model, x, y)
    assert quick is not model and batch_norms(quick) < batch_norms(model)
    asked = [lambda m: m.gate, lambda m: lambda x: m.all_outputs(x).flatten(1)]
    asked += [lambda m, k=k: partial(output_of, m, expert=k) for k in range(model.experts_count)]
    exact, other = copy.deepcopy(model).double(), copy.deepcopy(quick).double()
    for of in asked:
        gradient, logits = input_gradient(of(exact), x.double(), y, projection)
        found, found_logits = input_gradient(of(other), x.double(), y, projection)
        torch.testing.assert_close(found_logits, logits, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))
    assert torch.equal(quick.selected(x), model.selected(x))


class Changing(RouteToy, nn.Module):
    """A mixture whose copies have another gate."""

    def __init__(self):
        nn.Module.__init__(self)
        RouteToy.__init__(self)

    def __deepcopy__(self, memo):
        other = Changing()
        other.guard = 2 * self.guard
        return other


def test_a_copy_of_a_mixture_with_another_gate_is_not_used():
    model, x = Changing(), RouteToy.images(6)
    assert fast_mixture(model, x, model.labels(x)) is model


def test_in_bf16_a_mixtures_experts_are_rounded_and_its_gate_is_not():
    model, x, y = a_mixture("dwf")
    exact, quick = fast_mixture(model, x, y), fast_mixture(model, x, y, "bf16")
    assert torch.equal(quick.gate(x), exact.gate(x)) and quick.soft and quick.experts_count == 9
    with torch.no_grad():
        outputs, rounded, one = exact.all_outputs(x), quick.all_outputs(x), output_of(quick, x, 2)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, outputs)
    torch.testing.assert_close(rounded, outputs, rtol=0.1, atol=0.05 * float(outputs.abs().max()))
    torch.testing.assert_close(one, rounded[:, 2])


def test_an_exact_expectation_is_folded_too():
    model, x, y = a_mixture("immunity")
    made = fast_expectation(model, x, y)
    assert made.about == f"exact expectation, {FOLDED}" and batch_norms(made.model) == 0
    torch.testing.assert_close(made.model(x), model.expected_log_probabilities(x), rtol=1e-4, atol=1e-5)


def test_a_random_model_without_one_is_used_as_it_is():
    x, y = images()
    model = settled(small_net(3), x)
    made = fast_expectation(model, x, y)
    assert made.model is model and made.about == "as it is (random)"
