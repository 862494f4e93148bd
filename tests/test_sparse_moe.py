"""Sparse MoE: who is asked, what comes of it, and that a route is a network of its own."""

import copy
import math

import pytest
import torch
from learnable import dataset
from torch import nn
from torch.nn import functional as F

from baselines.resnet import resnet18
from bench.attacks.mixture import runs
from bench.attacks.pgd import pgd
from bench.config import replaced
from bench.errors import NonFinite, UsageError
from bench.fast import fast
from bench.moe import as_mixture
from bench.rng import Rng
from bench.threat import Linf
from bench.train import initial, train
from defenses.sparse_moe import (
    Config,
    Journey,
    RoutedNet,
    SparseLayer,
    SparseMoE,
    SparseNet,
    balancing,
    column_loss,
    entropy_loss,
    observe,
    of_chosen,
    switch_loss,
    within_capacity,
)

DATA = dataset(channels=3, side=16)
SMALL = {"width": 4, "experts": 3, "steps": 2, "epochs": 1, "batch_size": 18}
E = 3
each_kind = pytest.mark.parametrize("layer", ["block", "conv"])
each_place = pytest.mark.parametrize("where", ["layer4", "layer4.1"])
each_router = pytest.mark.parametrize("router", ["linear", "conv"])
each_balance = pytest.mark.parametrize("balance", ["switch", "entropy", "column"])


def sparse(**settings) -> SparseMoE:
    return SparseMoE(Config(**SMALL | settings))


def batch(n=12):
    x, y = DATA.train.batch(slice(0, n))
    return x.double(), y


def network(seed=0, **settings) -> SparseNet:
    """One in float64 with statistics of its own whose routers send images to all experts."""
    made = initial(sparse(**settings), DATA, seed).double()
    x, _ = batch(30)
    made.train()(x)
    made.eval()
    with torch.no_grad():
        for i, layer in enumerate(made.sparse_layers()):
            layer.router.weight.mul_(50)
            layer.router.bias -= made.travelled(x)[1].scores[i].mean(0)
        made.linear.weight *= 20
    assert all(len(chosen.unique()) > 1 for chosen in made.travelled(x)[1].chosen)
    return made


class Times(nn.Module):
    """An expert that multiplies."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, h):
        return self.factor * h


def layer_of(*factors, **settings) -> SparseLayer:
    """A sparse layer of experts that multiply, on feature maps of four channels."""
    factor = iter(factors)
    made = SparseLayer(lambda: Times(next(factor)), 4, Config(**SMALL | {"experts": len(factors)} | settings))
    with torch.no_grad():
        made.router.weight.mul_(30)
        made.router.bias.sub_(made.scores(torch.rand(64, 4, 3, 3)).mean(0))
    return made.double().eval()


# ---------------------------------------------------------------------------------------------------------------------
# one layer


@each_router
def test_with_one_expert_asked_the_output_is_exactly_what_that_expert_says_image_by_image(router):
    layer, h = layer_of(1.0, 10.0, 100.0, router=router), torch.rand(30, 4, 3, 3).double()
    journey = Journey()
    out = layer(h, journey)
    (chosen,), (scores,) = journey.chosen, journey.scores
    assert torch.equal(chosen[:, 0], scores.argmax(1)) and len(chosen.unique()) > 1
    assert torch.equal(out, 10.0 ** chosen[:, 0, None, None, None] * h)


def test_with_more_experts_asked_their_shares_are_renormalised():
    layer, h = layer_of(1.0, 10.0, 100.0, top=2), torch.rand(30, 4, 3, 3).double()
    p = layer.scores(h).softmax(1)
    best = p.topk(2)
    share = best.values / best.values.sum(1, keepdim=True)
    factor = (share * 10.0**best.indices).sum(1)
    torch.testing.assert_close(layer(h, Journey()), factor[:, None, None, None] * h)


def test_with_all_experts_asked_it_is_the_soft_mixture():
    layer, h = layer_of(1.0, 10.0, 100.0, top=3), torch.rand(30, 4, 3, 3).double()
    factor = layer.scores(h).softmax(1) @ torch.tensor([1.0, 10, 100]).double()
    torch.testing.assert_close(layer(h, Journey()), factor[:, None, None, None] * h)


def test_a_single_choice_weighs_one_and_passes_on_the_gradient_of_its_probability():
    scores = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    chosen = scores.argmax(1, keepdim=True)
    weights = of_chosen(scores, chosen)
    assert torch.equal(weights, torch.ones(5, 1).double())
    (found,) = torch.autograd.grad(weights.sum(), scores)
    (expected,) = torch.autograd.grad(scores.softmax(1).gather(1, chosen).sum(), scores)
    assert torch.equal(found, expected) and found.any()


def test_a_tie_goes_to_the_lowest_index_as_in_argmax():
    layer = layer_of(1.0, 2.0, 3.0)
    assert layer.choose(torch.tensor([[1.0, 1, 1], [0, 2, 2]])).tolist() == [[0], [1]]


def test_routers_read_means_of_channels_or_convolve_first():
    h = torch.rand(5, 4, 6, 6).double()
    linear, conv = layer_of(1.0, 1.0, router="linear"), layer_of(1.0, 1.0, router="conv")
    torch.testing.assert_close(linear.scores(h), linear.scores(h.flip(2, 3)))
    expected = F.conv2d(h, conv.router.weight, conv.router.bias, padding=1).mean((2, 3))
    torch.testing.assert_close(conv.scores(h), expected)
    assert not torch.allclose(conv.scores(h), conv.scores(h.flip(2, 3)))


def test_an_expert_that_gets_no_image_does_no_harm():
    model, (x, y) = network().train(), batch()
    with torch.no_grad():
        for layer in model.sparse_layers():
            layer.router.bias[1] += 1e4
    F.cross_entropy(model(x), y).backward()
    for layer in model.sparse_layers():
        idle, busy = layer.experts[0], layer.experts[1]
        assert all(p.grad is None for p in idle.parameters())
        assert all(p.grad.isfinite().all() for p in busy.parameters())
        assert all(torch.isfinite(value).all() for value in layer.state_dict().values())


def test_an_expert_that_gets_one_image_in_training_uses_its_running_statistics():
    layer = SparseLayer(lambda: nn.BatchNorm2d(4), 4, Config(**SMALL)).train()
    layer.router.weight.data.zero_()
    layer.router.bias.data.copy_(torch.tensor([0.0, 1, 0]))
    h = torch.rand(1, 4, 1, 1)
    torch.testing.assert_close(layer(h, Journey()), h, rtol=1e-4, atol=0)
    assert layer.experts[1].training and not layer.experts[1].num_batches_tracked


def test_scores_that_are_not_finite_are_no_choice():
    layer, h = layer_of(1.0, 2.0), torch.rand(3, 4, 2, 2).double()
    h[1] = float("nan")
    with pytest.raises(NonFinite, match="router"):
        layer(h, Journey())


# ---------------------------------------------------------------------------------------------------------------------
# capacity and noise


def load(chosen, experts):
    return F.one_hot(chosen, experts).sum((0, 1))


@pytest.mark.parametrize("top", [1, 2])
def test_no_expert_takes_more_than_its_capacity_and_every_image_is_served(top):
    torch.manual_seed(0)
    scores = torch.randn(40, 4) + torch.tensor([5.0, 0, 0, 0])
    chosen = within_capacity(scores, top, 1.5)
    assert chosen.shape == (40, top) and int(load(chosen, 4).sum()) == 40 * top
    assert int(load(chosen, 4).max()) == math.ceil(1.5 * 40 * top / 4)
    assert all(len(set(row)) == top for row in chosen.tolist())


def test_who_is_turned_away_goes_to_its_next_choice_in_the_order_of_the_batch():
    scores = torch.tensor([[3.0, 2, 1], [3, 1, 2], [3, 2, 1], [1, 2, 3]])
    assert within_capacity(scores, 1, 1.0).flatten().tolist() == [0, 0, 1, 2]
    assert within_capacity(scores[:3], 1, 1.0).flatten().tolist() == [0, 2, 1]
    # the last one's second choice was taken by another's first
    taken = torch.tensor([[1.0, 3, 2], [3, 2, 1], [3, 2, 1]])
    assert within_capacity(taken, 1, 1.0).flatten().tolist() == [1, 0, 2]


def test_where_there_is_room_for_all_everyone_has_its_first_choices():
    scores = torch.randn(40, 4)
    for top in (1, 2, 4):
        expected = scores.topk(top, dim=1).indices
        assert torch.equal(within_capacity(scores, top, 4.0).sort(1).values, expected.sort(1).values)


def test_an_image_that_no_room_is_left_for_goes_where_it_wants():
    chosen = within_capacity(torch.randn(8, 4), 3, 0.1)
    assert chosen.shape == (8, 3) and all(len(set(row)) == 3 for row in chosen.tolist())


@each_balance
def test_noise_and_capacity_belong_to_training_with_the_switch_loss(balance):
    layer, h = layer_of(1.0, 2.0, 3.0, balance=balance).train(), torch.rand(30, 4, 2, 2).double()
    with torch.no_grad():
        layer.router.bias[0] += 10
    seen = Journey()
    layer(h, seen)
    assert int(load(seen.chosen[0], 3)[0]) == (15 if balance == "switch" else 30)
    quiet = Journey()
    layer.eval()(h, quiet)
    assert int(load(quiet.chosen[0], 3)[0]) == 30


@each_balance
def test_deployed_an_image_is_answered_whatever_comes_with_it(balance):
    model, (x, _) = network(balance=balance, capacity=0.4), batch()
    together, order = model(x), torch.randperm(len(x))
    torch.testing.assert_close(model(x[order]), together[order])
    torch.testing.assert_close(torch.cat([model(one[None]) for one in x]), together)


# ---------------------------------------------------------------------------------------------------------------------
# the network


@each_kind
@each_place
def test_identical_experts_are_the_dense_network(layer, where):
    model, (x, _) = network(layer=layer, where=where), batch()
    dense = resnet18(channels=3, classes=3, width=4).double().eval()
    state, places = {}, {"linear": "linear"}
    places |= {f"body.{i}": name for i, name in enumerate(("conv1", "bn1", "", "layer1", "layer2", "layer3"))}
    places |= {"body.6": "layer4.0", "tail.0": "layer4.1"}
    if where == "layer4":
        places |= {"tail.0": "layer4.0", "tail.1": "layer4.1"}
    for part in model.sparse_layers():
        for expert in part.experts:
            expert.load_state_dict(part.experts[0].state_dict())
    for key, value in model.state_dict().items():
        if ".router." in key or ".experts.1." in key or ".experts.2." in key:
            continue
        (place,) = (place for place in places if key.startswith(f"{place}."))
        state[places[place] + key.removeprefix(place).replace(".experts.0", "")] = value
    dense.load_state_dict(state)
    torch.testing.assert_close(model(x), dense(model.normalize(x)))


@each_kind
@each_place
def test_the_route_that_is_taken_is_the_one_that_lags_behind_none(layer, where):
    model, (x, _) = network(layer=layer, where=where, experts=2), batch(30)
    lags, outputs, selected = model.gate(x), model.all_outputs(x), model.selected(x)
    assert as_mixture(model) is model and lags.shape[1] == 2 ** len(model.sparse_layers())
    assert torch.equal(selected, lags.argmax(1)) and len(selected.unique()) > 1
    assert (lags.amax(1) == 0).all() and ((lags == 0).sum(1) == 1).all()
    torch.testing.assert_close(model(x), outputs[torch.arange(30), selected])
    assert outputs.std(1).max() > 1e-3


def test_a_route_asks_its_experts_of_every_image():
    model, (x, _) = network(), batch()
    h = model.body(model.normalize(x))
    for r, (first, second) in enumerate(model.routes):
        expected = model.tail[1].experts[second](model.tail[0].experts[first](h))
        torch.testing.assert_close(model.all_outputs(x)[:, r], model.linear(expected.mean((2, 3))))


def test_a_routes_score_is_how_far_its_experts_lag_behind():
    model, (x, _) = network(where="layer4.1"), batch()
    (scores,) = model.travelled(x)[1].scores
    torch.testing.assert_close(model.gate(x), scores - scores.amax(1, keepdim=True))


@pytest.mark.parametrize(
    ("settings", "routes"),
    [
        ({"experts": 4}, 16),
        ({"experts": 4, "where": "layer4.1"}, 4),
        ({"experts": 4, "where": "layer4.1", "layer": "conv"}, 16),
        ({"experts": 4, "layer": "conv"}, None),
        ({"experts": 9}, None),
        ({"top": 2}, None),
    ],
)
def test_it_poses_as_a_mixture_where_its_routes_can_be_asked_one_by_one(settings, routes):
    model = initial(sparse(**settings), DATA, 0).eval()
    mixture = as_mixture(model)
    assert (mixture is None) == (routes is None) == (not isinstance(model, RoutedNet))
    assert mixture is None or mixture.experts_count == routes
    assert model(batch()[0].float()).shape == (12, 3)


def test_following_the_gradient_through_the_soft_gate_reaches_the_routers():
    model, (x, y) = network(), batch()
    (first, *_) = runs("soft-gate", model)
    x.requires_grad_()
    (aim,) = first.aims
    (gradient,) = torch.autograd.grad(aim.loss(aim.output(x), y).sum(), x)
    assert gradient.isfinite().all() and gradient.any()


def test_no_image_is_no_logits():
    model, (x, _) = network(), batch()
    assert model(x[:0]).shape == (0, 3) and model.all_outputs(x[:0]).shape == (0, 9, 3)


def test_the_fast_copy_takes_the_same_routes():
    model, (x, y) = network().float().requires_grad_(False), batch()
    copied = fast(model, x.float(), y)
    assert copied.about.startswith("folded")
    torch.testing.assert_close(copied.model(x.float()), model(x.float()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("settings", [{"top": 4}, {"experts": 1, "top": 2}])
def test_asking_more_experts_than_there_are_is_a_users_error(settings):
    with pytest.raises(UsageError, match="asks for more than"):
        sparse(**settings).build(DATA)


@pytest.mark.parametrize(
    "wrong", ["experts=0", "top=0", "layer=stage", "router=mlp", "capacity=0", "balance=none"]
)
def test_a_setting_out_of_range_is_a_users_error(wrong):
    name, value = wrong.split("=")
    with pytest.raises(UsageError, match=name):
        replaced(Config(), {name: value})


# ---------------------------------------------------------------------------------------------------------------------
# balance


def test_even_use_has_no_switch_loss_and_one_expert_for_all_the_most():
    even = 50 * torch.eye(4, dtype=torch.float64).repeat(3, 1)
    assert float(switch_loss(even)) == pytest.approx(0, abs=1e-9)
    assert float(switch_loss(50 * F.one_hot(torch.zeros(8, dtype=torch.long), 4).double())) == pytest.approx(
        3
    )
    assert float(switch_loss(torch.zeros(8, 4), top=4)) == pytest.approx(0, abs=1e-6)


def test_the_switch_loss_is_the_textbook_form():
    torch.manual_seed(0)
    scores = torch.randn(20, 3)
    p, best = scores.softmax(1), scores.topk(2).indices.flatten().tolist()
    expected = 3 * sum(best.count(e) / 40 * float(p[:, e].mean()) for e in range(3)) - 1
    assert float(switch_loss(scores, 2)) == pytest.approx(expected, abs=1e-6)


def test_the_entropy_losses_are_least_where_each_image_is_sure_and_all_experts_are_used():
    sure_and_even = 200 * torch.eye(4, dtype=torch.float64)
    sure_of_one = sure_and_even[:1].expand(4, -1)
    unsure = torch.zeros(4, 4).double()
    for loss, values in (
        (entropy_loss, (-math.log(4), 0, 0)),
        (column_loss, (-math.log(4), 0, -math.log(4))),
    ):
        found = [float(loss(scores)) for scores in (sure_and_even, sure_of_one, unsure)]
        assert found == pytest.approx(values, abs=1e-9)


@each_balance
def test_following_the_balancing_loss_spreads_the_images(balance):
    torch.manual_seed(0)
    c = Config(**SMALL, balance=balance)
    scores = torch.randn(60, 3) + torch.tensor([1.5, 0, 0])
    before = load(scores.argmax(1, keepdim=True), 3)
    for _ in range(200):
        scores.requires_grad_()
        (gradient,) = torch.autograd.grad(balancing(Journey(scores=[scores]), c), scores)
        scores = (scores - 5 * gradient).detach()
    after = load(scores.argmax(1, keepdim=True), 3)
    assert int(after.max()) < 0.8 * int(before.max())


# ---------------------------------------------------------------------------------------------------------------------
# training


def stage_loss(model, **settings):
    (stage,) = sparse(**settings).stages(DATA)
    return stage.loss(model, *batch(), Rng(0))


@each_balance
def test_the_loss_is_cross_entropy_on_what_pgd_finds_and_the_weighed_balance(balance):
    model, (x, y) = network(balance=balance), batch()
    x_adv = pgd(model, x, y, Linf(DATA.eps), rng=Rng(0), steps=2)
    scores = model.travelled(x_adv)[1].scores
    of = {"switch": switch_loss, "entropy": entropy_loss, "column": column_loss}[balance]
    expected = F.cross_entropy(model(x_adv), y) + 0.3 * (of(scores[0]) + of(scores[1])) / 2
    torch.testing.assert_close(
        stage_loss(model, balance=balance, balance_weight=0.3), expected, check_dtype=False
    )


def test_of_one_expert_without_balance_it_is_pgd_at():
    model, (x, y) = initial(sparse(experts=1), DATA, 0).double().train(), batch()
    other = copy.deepcopy(model)
    x_adv = pgd(other.eval(), x, y, Linf(DATA.eps), rng=Rng(0), steps=2)
    expected = F.cross_entropy(other.train()(x_adv), y)
    torch.testing.assert_close(stage_loss(model, experts=1, balance_weight=0), expected)


def test_routers_learn_from_the_cross_entropy_alone():
    model = network()
    loss = stage_loss(model, balance_weight=0)
    for layer in model.sparse_layers():
        (gradient,) = torch.autograd.grad(loss, layer.router.weight, retain_graph=True)
        assert gradient.any()


@pytest.mark.parametrize(
    "settings",
    [
        {"layer": "conv", "router": "conv", "balance": "switch"},
        {"where": "layer4.1", "top": 2, "balance": "column"},
    ],
)
def test_every_option_trains(settings, tmp_path):
    result = train(sparse(**settings), dataset(), seed=0, folder=tmp_path, quiet=True)
    assert len(result.history) == 1 and result.model(dataset().train.batch(slice(0, 3))[0]).isfinite().all()


def test_what_is_observed_is_the_load_and_each_route_for_all_images():
    model, (x, y) = network(), batch(30)
    seen = observe(model, x, y)
    assert seen.accuracy == pytest.approx(float((model(x).argmax(1) == y).double().mean()))
    assert [sum(layer) for layer in seen.load] == pytest.approx([1, 1])
    right = (model.all_outputs(x)[:, 5].argmax(1) == y).double().mean()
    assert seen.fixed_accuracy[(1, 2)] == pytest.approx(float(right)) and len(seen.fixed_accuracy) == 9
    assert observe(network(top=2), x, y).fixed_accuracy == {}
