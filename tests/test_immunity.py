"""Immunity: what dealing out weights changes and what it cannot, and what its losses say of heatmaps."""

import copy
import itertools
import math

import pytest
import torch
from learnable import dataset
from torch import nn
from torch.nn import functional as F

from baselines.resnet import resnet18
from bench.attacks.pgd import pgd
from bench.audit.contract import is_random
from bench.config import replaced
from bench.errors import UsageError
from bench.gradcam import gradcam, heatmaps, of_labels
from bench.model import Normalized
from bench.moe import as_mixture
from bench.rng import Rng
from bench.threat import Linf
from bench.train import initial, train
from defenses.immunity import (
    Config,
    Enumerable,
    Immunity,
    Mixture,
    Switched,
    centroids,
    information,
    instability,
    mixed,
    mutual_information,
    objective,
    observe,
    views,
)

DATA = dataset()
SMALL = {
    "experts": 3,
    "width": 4,
    "gate_width": 8,
    "steps": 2,
    "epochs": 1,
    "batch_size": 18,
    "heat_stage": 2,
    "expert_loss": 0,
}
E = 3
THREAT = Linf(0.06)
PERMUTATIONS = list(itertools.permutations(range(E)))
each_reading = pytest.mark.parametrize("switches", [(), (2,)], ids=["A", "B"])
each_variant = pytest.mark.parametrize("variant", ["at", "clean"])


def immunity(**settings) -> Immunity:
    return Immunity(Config(**SMALL | settings))


def mixture(seed=0, **settings):
    """One in float64 whose BatchNorm statistics are not the initial ones and whose experts and weights differ."""
    made = initial(immunity(**settings), DATA, seed).double()
    made.train()(batch(30)[0])
    with torch.no_grad():
        made.gating[-1].weight.mul_(30)
        made.parts[3].net.linear.weight.mul_(20)
    return made.eval()


def batch(n=6):
    x, y = DATA.train.batch(slice(0, n))
    return x.double(), y


def alone(model: Switched, i: int) -> Normalized:
    """The `i`-th expert of reading A as a plain ResNet-18."""
    net, state = resnet18(channels=1, classes=3, width=4).double(), {}
    for stage, part in enumerate(model.parts, 1):
        for name, value in part.state_of(i, i + 1).items():
            if name.startswith("linear"):
                state[name] = value.clone()
                continue
            _, place, rest = name.split(".", 2) if name.count(".") > 1 else (*name.split("."), "")
            block = int(place) - (3 if stage == 1 else 0)
            if block >= 0:
                state[f"layer{stage}.{block}.{rest}"] = value.clone()
            else:
                state[f"{'conv1' if place == '0' else 'bn1'}.{rest}"] = value.clone()
    net.load_state_dict(state)
    return Normalized(net, DATA.mean, DATA.std).double().train(model.training)


def alike(model: Switched, source: int = 0) -> Switched:
    """The model with every expert made the same."""
    with torch.no_grad():
        for part in model.parts:
            one = {name: value.clone() for name, value in part.state_of(source, source + 1).items()}
            for i in range(E):
                for name, value in part.state_of(i, i + 1).items():
                    value.copy_(one[name])
    return model


# ---------------------------------------------------------------------------------------------------------------------
# the mixture


def test_the_paper_recipe_has_four_resnet18_and_a_small_gate():
    made = Immunity(Immunity.recipes["paper"]).build(dataset(channels=3, classes=10))
    assert sum(p.numel() for p in made.parts.parameters()) == 4 * 11_173_962
    assert [tuple(p.shape) for p in made.gating.parameters()] == [(64, 192), (64,), (4, 64), (4,)]


def test_the_output_is_the_log_of_the_weighted_sum_of_the_experts_probabilities():
    model, (x, _) = mixture(), batch()
    p = torch.stack([alone(model, i)(x).softmax(1) for i in range(E)], 1)
    g = model.gate(x).softmax(1)
    torch.testing.assert_close(model.as_trained(x), torch.einsum("be,bek->bk", g, p).log())
    torch.testing.assert_close(model.all_outputs(x).softmax(2), p)
    assert (g.amax(1) > 0.5).any() and as_mixture(model) is model


@pytest.mark.parametrize("side", [8, 32])
def test_experts_are_the_same_together_and_one_after_another(side):
    model = initial(immunity(), dataset(side=side), 0).double().eval()
    x = torch.rand(2, 1, side, side).double()
    torch.testing.assert_close(model.all_outputs(x), torch.stack([alone(model, i)(x) for i in range(E)], 1))


@each_reading
def test_a_mixture_of_identical_experts_is_the_expert_whatever_is_drawn(switches):
    model, (x, _) = alike(mixture(switches=switches)), batch()
    expected = alone(model, 0)(x).log_softmax(1)
    for _ in range(3):
        torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.as_trained(x), expected)
    torch.testing.assert_close(model.expected_log_probabilities(x), expected)


def test_one_expert_is_a_plain_network():
    model, (x, _) = mixture(experts=1), batch()
    torch.testing.assert_close(model(x), alone(model, 0)(x).log_softmax(1))
    assert float(information(torch.rand(4, 1, 4, 4))) == 0


# ---------------------------------------------------------------------------------------------------------------------
# what is drawn


def test_dealt_weights_are_a_reordering_of_the_gates():
    model, (x, _) = mixture(), batch(30)
    dealt, weights = model.dealt(x).exp(), model.gate(x).softmax(1)
    torch.testing.assert_close(dealt.sort(1).values, weights.sort(1).values)
    torch.testing.assert_close(dealt.sum(1), torch.ones(30).double())
    assert not torch.allclose(dealt, weights)


def test_permuting_the_gate_is_permuting_the_rows_of_its_last_layer():
    model, (x, _) = mixture(), batch()
    for answer, permutation in zip(model.draws(x), PERMUTATIONS, strict=True):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.gating[-1].parameters():
                parameter.copy_(parameter[list(permutation)].clone())
        torch.testing.assert_close(other.as_trained(x), answer)


def test_every_permutation_is_drawn_about_as_often_image_by_image():
    model, n = mixture(), 6000
    order = model.order(torch.zeros(n, 1, 8, 8))
    assert torch.equal(order.sort(1).values, torch.arange(E).expand(n, E))
    counts = [int((order == torch.tensor(p)).all(1).sum()) for p in PERMUTATIONS]
    assert sum(counts) == n and all(abs(count - n / 6) < 5 * math.sqrt(n * 5 / 36) for count in counts)


@each_reading
def test_while_training_nothing_is_permuted(switches):
    model, (x, _) = mixture(switches=switches), batch()
    identity = next(model.draws(x))
    torch.testing.assert_close(model.as_trained(x), identity)
    frozen = copy.deepcopy(model)
    frozen.training = True
    assert torch.equal(frozen(x), frozen(x))
    torch.testing.assert_close(frozen(x), identity)


def test_training_may_permute_too():
    model, (x, _) = mixture(permute_training=True), batch(30)
    model.training = True
    assert not torch.allclose(model(x), model(x))


@each_reading
def test_a_deployed_model_draws_from_the_global_generator_alone(switches):
    model, (x, _) = mixture(switches=switches), batch(30)
    said = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        said.append(model(x))
    assert torch.equal(said[0], said[1]) and not torch.allclose(said[0], said[2])
    assert is_random(model, x, torch.zeros(len(x), dtype=torch.int64), said[0].shape[1])


def test_images_of_a_batch_are_dealt_to_apart():
    model, (x, _) = mixture(), batch(1)
    assert len(model(x.expand(30, -1, -1, -1)).unique(dim=0)) > 1


@each_reading
def test_answering_leaves_the_weights_as_they_were(switches):
    model, (x, _) = mixture(switches=switches), batch()
    before = copy.deepcopy(model.state_dict())
    model(x), list(model.draws(x)), model.expected_log_probabilities(x), observe(model, *batch())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# the expectation


def test_the_mean_over_all_permutations_is_the_plain_mean_of_the_experts():
    model, (x, _) = mixture(), batch()
    draws = torch.stack(list(model.draws(x))).exp()
    assert len(draws) == 6 and draws.std(0).max() > 0.01
    torch.testing.assert_close(draws.mean(0), model.all_outputs(x).softmax(2).mean(1))
    torch.testing.assert_close(model.expected_log_probabilities(x).exp(), draws.mean(0))


def test_with_an_inner_gate_the_expectation_is_the_mean_over_all_wirings():
    model, (x, _) = mixture(switches=(2,)), batch()
    draws = torch.stack(list(model.draws(x))).exp()
    assert len(draws) == 36 and draws.flatten(1).unique(dim=0).shape[0] > 6
    torch.testing.assert_close(model.expected_log_probabilities(x).exp(), draws.mean(0))


@each_reading
def test_what_is_deployed_is_one_of_the_draws_and_its_mean_tends_to_the_expectation(switches):
    model, (x, _) = mixture(switches=switches), batch(2)
    draws, n = torch.stack(list(model.draws(x))), 600
    many = model(x.repeat_interleave(n, 0)).unflatten(0, (2, n))
    for i in range(2):
        apart = (many[i][:, None] - draws[None, :, i]).abs().amax(2)
        assert apart.amin(1).max() < 1e-9 and len(apart.argmin(1).unique()) == len(draws)
        mean, spread = many[i].exp().mean(0), many[i].exp().std(0) / n**0.5
        expected = model.expected_log_probabilities(x)[i].exp()
        assert ((mean - expected).abs() < 5 * spread + 1e-9).all()


@each_reading
def test_the_expectation_is_deterministic_and_has_the_numerical_gradient(switches):
    model, (x, _) = mixture(switches=switches), batch(2)
    assert torch.equal(model.expected_log_probabilities(x), model.expected_log_probabilities(x))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model.expected_log_probabilities(x)[:, 0].sum(), x)
    way = torch.rand_like(x) * 1e-6
    with torch.no_grad():
        ahead, behind = (model.expected_log_probabilities(x + sign * way)[:, 0].sum() for sign in (1, -1))
    assert float(ahead - behind) == pytest.approx(2 * (gradient * way).sum().item(), rel=1e-4)


def test_probabilities_that_round_to_zero_leave_the_answer_finite():
    logits = torch.tensor([[[500.0, 0, 0], [0, 500, 0]]])
    said = mixed(torch.tensor([[-300.0, 0]]), logits)
    assert said.isfinite().all() and float(said[0, 0]) == pytest.approx(-300)


def test_an_expectation_is_offered_only_where_it_is_exact():
    assert type(immunity().build(DATA)) is Mixture
    assert type(immunity(switches=(3,), experts=4).build(DATA)) is Enumerable
    many = immunity(switches=(1, 2, 3), experts=4).build(DATA).eval()
    assert type(many) is Switched and not hasattr(many, "expected_log_probabilities")
    assert as_mixture(many) is None, "branches that are joined on the way are no networks of their own"
    assert many(batch()[0].float()).shape == (6, 3)


@pytest.mark.parametrize("attacked", [False, True], ids=["clean", "attacked"])
def test_the_worst_draw_is_no_better_than_the_mean_and_the_best_no_worse(attacked):
    model, (x, y) = mixture(), batch(30)
    if attacked:
        x = pgd(model.expected_log_probabilities, x, y, Linf(0.05), rng=Rng(0), steps=5)
    seen = observe(model, x, y)
    right = torch.stack([answer.argmax(1) == y for answer in model.draws(x)]).float()
    assert seen.mean_accuracy == pytest.approx(float(right.mean()))
    assert seen.every_accuracy == float(right.amin(0).mean())
    assert seen.every_accuracy < seen.mean_accuracy < float(right.amax(0).mean())


def test_an_image_that_falls_in_expectation_falls_in_some_draw():
    model, (x, y) = mixture(), batch(30)
    x_adv = pgd(model.expected_log_probabilities, x, y, Linf(0.1), rng=Rng(0), steps=5)
    fell = model.expected_log_probabilities(x_adv).argmax(1) != y
    some = torch.stack([answer.argmax(1) != y for answer in model.draws(x_adv)]).any(0)
    assert fell.sum() > 0 and some[fell].all()


@pytest.mark.parametrize("switches", ["[3, 3]", "[4]", '["two"]'])
def test_gates_at_impossible_places_are_a_users_error(switches):
    with pytest.raises(UsageError, match="switches"):
        Immunity(replaced(Config(), {"switches": switches})).build(DATA)


# ---------------------------------------------------------------------------------------------------------------------
# heatmaps


def test_grad_cam_of_a_linear_head_is_its_weighted_sum_cut_at_zero():
    maps = torch.randn(2, 3, 5, 4, 4, requires_grad=True)
    head = torch.randn(5)
    score = torch.einsum("bechw,c->be", maps, head) / 16
    expected = torch.einsum("bechw,c->behw", maps, head).clamp_min(0) / 16
    torch.testing.assert_close(gradcam(maps, score), expected)


@each_reading
def test_heatmaps_are_of_each_expert_and_at_least_zero(switches):
    model, (x, y) = mixture(switches=switches).train(), batch()
    model.parts[0].eval()
    heat = heatmaps(model.requires_grad_(False), x, y)
    assert heat.shape == (6, E, 4, 4) and not heat.requires_grad
    assert (heat >= 0).all() and heat.any() and not torch.allclose(heat[:, 0], heat[:, 1])
    assert model.training and not model.parts[0].training, "modes stay as they are"


def test_an_experts_heatmap_is_that_of_the_expert_alone():
    model, (x, y) = mixture(), batch()
    net = alone(model, 1).net
    h = F.relu(net.bn1(net.conv1(model.normalize(x))))
    maps = net.layer2(net.layer1(h)).detach().requires_grad_()
    score = net.linear(net.layer4(net.layer3(maps)).mean((2, 3))).gather(1, y[:, None])
    torch.testing.assert_close(heatmaps(model, x, y)[:, 1], gradcam(maps, score))


def test_a_model_that_shows_no_activations_has_no_heatmaps():
    with pytest.raises(UsageError, match="with_activations"):
        heatmaps(nn.Linear(2, 2), *batch())


# ---------------------------------------------------------------------------------------------------------------------
# mutual information


def gaussian(rho, n=4000):
    """Two maps of `n` positions with that correlation, `(1, 2, n, 1)`."""
    torch.manual_seed(1)
    a, b = torch.randn(2, n)
    return torch.stack([a, rho * a + (1 - rho**2) ** 0.5 * b])[None, :, :, None]


def test_information_is_symmetric_at_least_zero_and_largest_with_itself():
    found = mutual_information(torch.rand(20, 3, 4, 4).double() ** 3)
    torch.testing.assert_close(found, found.T)
    assert (found > -1e-12).all()
    assert (found.diagonal() > (found - found.diag().diag()).amax(1)).all()


def test_independent_maps_share_next_to_nothing_and_a_map_with_its_shuffle_less_than_with_itself():
    heat = torch.rand(200, 1, 4, 4).double()
    shuffled = heat.flatten()[torch.randperm(heat.numel())].view_as(heat)
    (own, other), _ = mutual_information(torch.cat([heat, shuffled], 1))
    assert float(other) < 0.01 < 0.5 < float(own)


def test_information_follows_the_closed_form_for_gaussians_and_stays_below_it():
    found = [float(mutual_information(gaussian(rho))[0, 1]) for rho in (0.0, 0.5, 0.8, 0.95)]
    exact = [-0.5 * math.log(1 - rho**2) for rho in (0.0, 0.5, 0.8, 0.95)]
    assert found == sorted(found) and found[0] < 0.01
    # binning can only lose information
    assert all(0.1 * right < value < right for value, right in zip(found[1:], exact[1:], strict=True))


def test_information_knows_no_size_of_a_map():
    heat = torch.rand(20, 2, 4, 4).double()
    scaled = heat * torch.tensor([1.0, 300.0])[:, None, None]
    torch.testing.assert_close(mutual_information(scaled), mutual_information(heat), rtol=1e-4, atol=1e-7)


def test_constant_and_empty_maps_share_nothing_and_have_finite_gradients():
    heat = torch.zeros(8, 2, 4, 4, requires_grad=True)
    loss = information(heat) + instability(heat, heat.roll(1, 2))
    (gradient,) = torch.autograd.grad(loss, heat)
    assert abs(loss.item()) < 1e-6 and gradient.isfinite().all()


def test_the_information_loss_is_the_mean_over_pairs():
    heat = torch.rand(20, 3, 4, 4).double()
    found = mutual_information(heat)
    torch.testing.assert_close(information(heat), (found[0, 1] + found[0, 2] + found[1, 2]) / 3)


def test_climbing_down_the_information_loss_makes_maps_share_less():
    first = torch.rand(64, 4, 4).double()
    heat = torch.stack([first, first + 0.3 * torch.rand_like(first)], 1).requires_grad_()
    before = information(heat)
    for _ in range(5):
        (gradient,) = torch.autograd.grad(information(heat), heat)
        heat = (heat - 20 * gradient).detach().requires_grad_()
    assert information(heat).item() < 0.9 * before.item()


# ---------------------------------------------------------------------------------------------------------------------
# position stability


@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (0, 2), (-2, 1)])
def test_instability_is_the_squared_shift_of_a_single_point(shift):
    here, there = torch.zeros(2, 1, 1, 5, 5, dtype=torch.float64)
    here[..., 2, 2] = 1
    there[..., 2 + shift[0], 2 + shift[1]] = 1
    expected = (shift[0] / 4) ** 2 + (shift[1] / 4) ** 2
    assert float(instability(here, there)) == pytest.approx(expected, abs=1e-4)


def test_centroids_are_down_then_across_and_of_flat_maps_in_the_middle():
    heat = torch.zeros(1, 2, 3, 5)
    heat[0, 0, 2, 0] = 1
    torch.testing.assert_close(centroids(heat)[0], torch.tensor([[1, 0], [0.5, 0.5]]), atol=1e-4, rtol=0)


def test_instability_is_zero_between_equal_views_and_averages_over_experts():
    heat = torch.rand(3, 2, 4, 4)
    assert float(instability(heat, heat)) == 0
    moved = heat.clone()
    moved[:, 1] = heat[:, 1].roll(1, 2)
    apart = (centroids(heat) - centroids(moved)).square().sum(2)
    assert float(instability(heat, moved)) == pytest.approx(float(apart[:, 1].mean()) / 2)


# ---------------------------------------------------------------------------------------------------------------------
# training


def loss_of(model, n=6, rng=None, **settings):
    return objective(model, *batch(n), Config(**SMALL | settings), THREAT, rng or Rng(0))


@each_variant
def test_without_its_two_losses_it_is_training_of_the_plain_mixture(variant):
    model, (x, y) = mixture(), batch()
    c = Config(**SMALL | {"variant": variant})
    learnt, _ = views(model, x, y, c, THREAT, Rng(0))
    expected = F.nll_loss(model.as_trained(learnt), y)
    torch.testing.assert_close(loss_of(model, variant=variant, mi=0, ps=0), expected)


def test_of_one_expert_without_stability_it_is_pgd_at():
    model, (x, y) = mixture(experts=1).train(), batch()
    one = alone(model, 0)
    x_adv = pgd(one.eval(), x, y, THREAT, rng=Rng(0), steps=2)
    torch.testing.assert_close(loss_of(model, experts=1, ps=0), F.cross_entropy(one.train()(x_adv), y))


def test_the_adversary_is_shown_what_is_trained_and_the_other_view_is_the_clean_image():
    model, (x, y) = mixture(), batch()
    learnt, view = views(model, x, y, Config(**SMALL), THREAT, Rng(0))
    torch.testing.assert_close(learnt, pgd(model.as_trained, x, y, THREAT, rng=Rng(0), steps=2))
    assert torch.equal(view, x) and THREAT.contains(learnt, x).all()


def test_clean_training_views_each_image_again_under_noise():
    model, (x, y) = mixture(), batch()
    learnt, view = views(model, x, y, Config(**SMALL | {"variant": "clean"}), THREAT, Rng(0))
    assert torch.equal(learnt, x) and THREAT.contains(view, x).all() and not torch.equal(view, x)


@pytest.mark.parametrize("weight", ["mi", "ps", "expert_loss"])
def test_each_weighed_loss_is_added_and_moves_the_weights(weight):
    model, off = mixture(), {"mi": 0, "ps": 0, "expert_loss": 0}
    plain, one, two = (loss_of(model, **off | {weight: w}) for w in (0, 1, 2))
    assert (one - plain).item() > 0
    torch.testing.assert_close(two - plain, 2 * (one - plain), rtol=1e-5, atol=1e-9)
    gradients = torch.autograd.grad(one - plain, list(model.parts.parameters()), allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)
    assert sum(g is not None and bool(g.any()) for g in gradients) > 20


@pytest.mark.parametrize("variant", ["at", "clean"])
def test_the_whole_loss_is_what_the_equations_say_of_what_is_learnt_and_of_its_other_view(variant):
    model, (x, y) = mixture(), batch()
    learnt, view = views(model, x, y, Config(**SMALL | {"variant": variant}), THREAT, Rng(0))
    heat, other = heatmaps(model, learnt, y), heatmaps(model, view, y)
    expected = F.nll_loss(model.as_trained(learnt), y) + 3 * information(heat) + 5 * instability(heat, other)
    torch.testing.assert_close(loss_of(model, variant=variant, mi=3, ps=5), expected)


@pytest.mark.parametrize("weight", ["mi", "ps"])
def test_losses_on_heatmaps_reach_the_head_through_the_slopes(weight):
    model = mixture()
    head = model.parts[3].net.linear.weight
    with_it, plain = (
        torch.autograd.grad(loss_of(model, **{"mi": 0, "ps": 0, weight: w}), head)[0] for w in (1, 0)
    )
    assert (with_it - plain).abs().max() > 1e-6


def test_the_information_loss_differentiates_through_the_heatmaps_weights():
    """First-order Grad-CAM would give the head no gradient: it enters through the slopes alone."""
    model, (x, y) = mixture(), batch()
    activations, logits = model.with_activations(x)
    heat = gradcam(activations, of_labels(logits, y), differentiable=True)
    (gradient,) = torch.autograd.grad(information(heat), model.parts[3].net.linear.weight)
    assert gradient.isfinite().all() and gradient.any()


def test_anchored_experts_are_drawn_to_their_running_mean():
    model = mixture(anchored=True).train()
    torch.testing.assert_close(model.anchors, torch.full((E, 2), 0.5).double())
    heat = heatmaps(copy.deepcopy(model.eval()), *batch())
    plain = loss_of(model, variant="clean", mi=0, ps=0)
    found = loss_of(model, variant="clean", mi=0, ps=1, anchored=True)
    apart = (centroids(heat) - 0.5).square().sum(2).mean()
    torch.testing.assert_close(found - plain, apart)
    torch.testing.assert_close(model.anchors, 0.5 + 0.1 * (centroids(heat).mean(0) - 0.5))


def test_an_own_loss_of_the_experts_trains_the_one_that_the_gate_ignores():
    model = mixture()
    with torch.no_grad():
        model.gating[-1].weight.zero_()
        model.gating[-1].bias.copy_(torch.tensor([0.0, 0.0, -200.0]))
    for weight in (0, 1):
        loss = loss_of(model, mi=0, ps=0, expert_loss=weight)
        (gradient,) = torch.autograd.grad(loss, model.parts[3].net.linear.weight)
        assert bool(gradient[6:].abs().max() > 1e-6) == bool(weight)


@pytest.mark.parametrize(
    "settings",
    [
        {"variant": "clean"},
        {"switches": (1, 2, 3)},
        {"permute_training": True, "expert_loss": 1.0},
        {"anchored": True},
    ],
)
def test_every_option_trains_and_the_history_tells_of_empty_heatmaps(settings, tmp_path):
    result = train(immunity(**settings), DATA, seed=0, folder=tmp_path, quiet=True)
    (row,) = result.history
    assert 0 <= row["zero_heatmaps"] <= 1 and row["information"] >= 0
    assert result.model(batch()[0].float()).isfinite().all()
