"""Crafting: the gradients are the network's own, folded or not, and nothing is left behind."""

import copy

import pytest
import torch
from learnable import dataset
from torch import nn
from torch.nn import functional as F

from bench import registry
from bench.attacks.gradient import input_gradient
from bench.attacks.losses import cross_entropy
from bench.config import replaced
from bench.crafting import crafting, find_folds
from bench.model import evaluating
from bench.moe import grouped


class Block(nn.Module):
    """A convolution with a bias and a BatchNorm; `use` says what is done with them."""

    def __init__(self, use=lambda conv, bn, x: bn(conv(x)), **settings) -> None:
        super().__init__()
        self.conv, self.bn, self.use = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4, **settings), use
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(F.relu(self.use(self.conv, self.bn, x)).mean((2, 3)))


class Twice(Block):
    """One convolution under two BatchNorms."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.linear(F.relu(self.bn(self.conv(x)) + self.other(self.conv(x))).mean((2, 3)))


class Behind(nn.Module):
    """Cannot be traced as a whole; its part can, but is gone past."""

    def __init__(self, past: bool) -> None:
        super().__init__()
        self.part, self.past = Block(), past

    def forward(self, x):
        if x.sum() > -1:
            return self.part(x) + (self.part.conv(x).mean((2, 3))[:, :3] if self.past else 0)
        return x


class Stubborn(Block):
    """Takes float32 and nothing else."""

    def forward(self, x):
        assert not isinstance(x, torch.Tensor) or x.dtype == torch.float32
        return super().forward(x)


def stirred(model: nn.Module) -> nn.Module:
    """The model in float64, with other statistics in its BatchNorms."""
    torch.manual_seed(1)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            for value in part.state_dict().values():
                value.copy_(0.5 + torch.rand(value.shape)) if value.is_floating_point() else None
    return model.double().train()


def built(name, side):
    kind = registry.get(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = replaced(kind.recipes["tiny"], {"width": 4})
        return kind(config).build(dataset(side=side, channels=3)), torch.rand(2, 3, side, side)


def toy(made):
    torch.manual_seed(0)
    return made, torch.rand(2, 1, 8, 8)


def folding(model) -> list[nn.Module]:
    return [part for part in model.modules() if "forward" in vars(part)]


@pytest.mark.parametrize(
    ("name", "side", "folds"),
    [
        ("pgd_at", 8, 20),
        ("dwf", 8, 20),
        ("dwf", 17, 20),
        ("soe", 17, 20),
        ("advmoe", 8, None),
        ("sparse_moe", 8, 35),
    ],
)
def test_gradients_are_those_of_the_network_in_eval_mode(name, side, folds):
    model, x = built(name, side)
    found = find_folds(model, x)
    assert found == folds if folds is not None else found > 0
    model, x, y = stirred(model), x.double(), torch.tensor([0, 1])
    with evaluating(model):
        expected = input_gradient(model, x, y, cross_entropy)
    with crafting(model):
        assert len(folding(model)) == found
        for one, other in zip(input_gradient(model, x, y, cross_entropy), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10 * float(other.abs().max()))


@pytest.mark.parametrize("side", [8, 17])
def test_experts_on_images_of_their_own_are_folded_alike(side):
    model, x = built("dwf", side)
    assert grouped(x) == (side == 8) and find_folds(model, x) == 20
    model, own = stirred(model), torch.rand(2, 9, side, side, dtype=torch.float64)
    with evaluating(model):
        expected = model.own_outputs(own, 1, 4)
    with crafting(model):
        torch.testing.assert_close(model.own_outputs(own, 1, 4), expected, rtol=1e-10, atol=1e-10)
    model.eval()
    torch.testing.assert_close(model.own_outputs(own, 1, 4), expected, rtol=0, atol=0)


@pytest.mark.parametrize("settings", [{}, {"affine": False}, {"eps": 0.1}])
def test_every_kind_of_batchnorm_is_folded(settings):
    model, x = toy(Block(**settings))
    assert find_folds(model, x) == 1
    stirred(model).eval()
    expected = model(x.double())
    with crafting(model):
        torch.testing.assert_close(model(x.double()), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "made",
    [
        Block(lambda conv, bn, x: bn(F.relu(conv(x)))),
        Block(lambda conv, bn, x: (h := conv(x)) + bn(h)),
        Block(lambda conv, bn, x: bn(conv(conv(x).mean(1, keepdim=True)))),
        Block(lambda conv, bn, x: bn(bn(conv(x)))),
        Block(track_running_stats=False),
        Twice(),
        Behind(past=True),
        Stubborn(),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 3)),
    ],
    ids=["relu between", "used twice", "conv twice", "bn twice", "batch statistics", "two", "past", "float32", "none"],
)  # fmt: skip
def test_what_is_not_one_map_is_left_alone(made):
    model, x = toy(made)
    assert find_folds(model, x) == 0
    with crafting(model):
        assert folding(model) == []


@pytest.mark.parametrize(
    "use", [lambda conv, bn, x: (h := conv(x)) + bn(h), lambda conv, bn, x: bn(conv(conv(x).mean(1, keepdim=True)))]
)  # fmt: skip
def test_a_pair_that_is_not_one_map_keeps_no_other_from_being_folded(use):
    class Two(Block):
        def __init__(self) -> None:
            super().__init__(use)
            self.good = Block()

        def forward(self, x):
            return super().forward(x) + self.good(x)

    model, x = toy(Two())
    assert find_folds(model, x) == 1
    with crafting(model):
        assert folding(model) == [model.good.bn]


def test_parts_are_folded_where_the_whole_cannot_be_followed():
    model, x = toy(Behind(past=False))
    assert find_folds(model, x) == 1


def test_a_fold_has_the_weights_and_statistics_of_the_moment():
    model, x = toy(Block())
    find_folds(model, x)
    for _ in range(2):
        model.train()(x)
        with torch.no_grad():
            model.conv.weight.mul_(1.5)
        expected = model.eval()(x)
        with crafting(model):
            torch.testing.assert_close(model(x), expected)


def test_looking_for_folds_changes_neither_network_nor_generator():
    model, x = toy(Block())
    model.train()
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    find_folds(model, x)
    assert model.training and model.bn.training and torch.equal(torch.get_rng_state(), generator)
    assert list(model.state_dict()) == list(before) and len(list(model.modules())) == 4
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("crash", [False, True])
def test_all_is_put_back(crash):
    model, x = toy(Block())
    find_folds(model, x)
    model.train()
    model.linear.bias.requires_grad_(False)
    own, values = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    try:
        with crafting(model):
            assert not any(parameter.requires_grad for parameter in model.parameters())
            assert not model.bn.training and folding(model) == [model.bn]
            model(x)
            if crash:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert crash
    assert model.training and model.bn.training and folding(model) == []
    assert dict(model.named_parameters()).keys() == own.keys()
    for name, parameter in model.named_parameters():
        assert parameter is own[name] and parameter.requires_grad == (name != "linear.bias")
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())


def test_crafting_within_crafting_folds_once():
    model, x = toy(Block())
    find_folds(model, x)
    stirred(model).eval()
    expected = model(x.double())
    with crafting(model):
        with crafting(model):
            torch.testing.assert_close(model(x.double()), expected)
        torch.testing.assert_close(model(x.double()), expected)
    assert folding(model) == []


def test_a_copy_of_the_network_folds_its_own_weights():
    model, x = toy(Block())
    find_folds(model, x)
    other = copy.deepcopy(model).eval()
    with torch.no_grad():
        other.conv.weight.zero_()
        other.conv.bias.fill_(2)
    expected = other(x)
    with crafting(other):
        assert folding(model) == [] and folding(other) == [other.bn]
        torch.testing.assert_close(other(x), expected)


def test_gradients_of_before_survive():
    model, x = toy(Block())
    find_folds(model, x)
    loss = model(x).sum()
    with crafting(model):
        input_gradient(model, x, torch.tensor([0, 1]), cross_entropy)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
