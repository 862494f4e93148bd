"""RT-ER: how it routes, what it minimises, the limits in which it is something known, and how far its routes hold."""

import contextlib
import copy
import os
import signal

import pytest
import torch
from learnable import dataset
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import defenses.rter
from bench.attacks.gradient import input_gradient
from bench.attacks.losses import cross_entropy
from bench.attacks.mixture import runs
from bench.attacks.pgd import pgd
from bench.config import replaced
from bench.defense import Stage
from bench.divergence import kl
from bench.errors import CheckpointError, Interrupted, NonFinite, UsageError
from bench.fast import fast
from bench.moe import Experts
from bench.rng import Rng
from bench.threat import Linf
from bench.train import initial, train
from defenses import pgd_at
from defenses.jtdmoe import JTDMoE
from defenses.pgd_at import PGDAT
from defenses.rter import (
    RTER,
    Config,
    MoE,
    Separate,
    as_adam,
    crafted,
    cyclic,
    dropped,
    objective,
    pick,
    resnet_slope,
)

DATA = dataset()
LARGE = dataset(side=17)
HERE = Rng(0)
THREAT = Linf(0.1)
SMALL = Config(width=4, steps=2, epochs=1, batch_size=18)
each_router = pytest.mark.parametrize("router", ["released", "st", "soft"])
#: images small enough for one grouped program, and larger ones
each_size = pytest.mark.parametrize("data", [DATA, LARGE], ids=["grouped", "separate"])


def config(**settings) -> Config:
    return replaced(SMALL, settings)


def mixture(data=DATA, seed=0, **settings) -> MoE:
    """In float64 and eval mode, with statistics of its own and all routes taken."""
    model = initial(RTER(config(**settings)), data, seed).double()
    x, _ = batch(30, data)
    with torch.no_grad():
        model.train()(x)
        model.eval().router.weight *= 3
        model.router.bias -= model.gate(x).mean(0)
    return model


def batch(n=6, data=DATA):
    x, y = data.train.batch(slice(0, n))
    return x.double(), y


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)


# ---------------------------------------------------------------------------------------------------------------------
# routing


@each_size
@pytest.mark.parametrize("router", ["released", "st"])
def test_the_answer_is_that_of_the_expert_with_the_largest_score_and_of_no_other(router, data):
    model, (x, _) = mixture(data, router=router), batch(30, data)
    route = model.gate(x).argmax(1)
    assert len(route.unique()) > 2
    torch.testing.assert_close(model(x), model.all_outputs(x)[torch.arange(30), route])
    assert torch.equal(model.selected(x), route)


def test_a_grouped_answer_is_the_chosen_experts_to_the_last_bit():
    model, (x, _) = mixture(), batch(30)
    assert torch.equal(model(x), pick(model.all_outputs(x), model.selected(x)))


@each_size
def test_images_shown_together_are_answered_as_they_would_be_alone(data):
    model, (x, _) = mixture(data), batch(12, data)
    torch.testing.assert_close(model(x), torch.cat([model(one[None]) for one in x]))
    chosen = torch.tensor([3, 0, 0, 1, 3, 2, 1, 0, 2, 2, 1, 3])
    torch.testing.assert_close(model.of(x, chosen), pick(model.all_outputs(x), chosen))
    assert model(x[:0]).shape == (0, 3)


def test_small_images_go_through_one_program_and_a_larger_one_to_its_own_expert_alone():
    assert isinstance(mixture().experts, Experts)
    model, (x, _) = mixture(LARGE), batch(12, LARGE)
    assert isinstance(model.experts, Separate)
    shown = []
    for network in model.experts.networks:
        network.register_forward_hook(lambda _, given, __: shown.append(len(given[0])))
    model(x)
    assert sum(shown) == 12 and len(shown) == len(model.selected(x).unique())


@each_size
def test_every_expert_answers_for_images_of_its_own(data):
    model, (x, _) = mixture(data), batch(12, data)
    own = x.roll(1, 0), x, x.flip(3), 1 - x
    found = model.own_outputs(torch.cat(own, 1))
    for k, images in enumerate(own):
        torch.testing.assert_close(found[:, k], model.all_outputs(images)[:, k])


def test_the_second_best_expert_is_never_the_best():
    model, (x, _) = mixture(), batch(30)
    best, second = model.gate(x).topk(2, 1).indices.T
    assert torch.equal(model.second(x), second) and (model.second(x) != best).all()
    with torch.no_grad():
        model.router.weight.zero_()
        model.router.bias.zero_()
    assert (model.second(x) != model.selected(x)).all()


def test_a_soft_mixture_answers_with_the_logarithm_of_the_mean_of_probabilities():
    model, (x, _) = mixture(router="soft"), batch(12)
    weights = model.gate(x).softmax(1)
    expected = (weights[:, :, None] * model.all_outputs(x).softmax(2)).sum(1)
    torch.testing.assert_close(model(x).exp(), expected)


@each_size
def test_straight_through_answers_as_a_released_mixture_bit_by_bit(data):
    st, (x, _) = mixture(data), batch(30, data)
    released = mixture(data, router="released")
    released.load_state_dict(st.state_dict())
    for _ in range(2):
        assert torch.equal(st(x), released(x))
        st.train(), released.train()


@each_router
def test_only_a_router_that_learns_gets_a_gradient(router):
    model, (x, y) = mixture(router=router).train(), batch(18)
    objective(model, x, y, config(router=router), THREAT, HERE).backward()
    gradient = model.router.weight.grad
    assert (gradient is None) if router == "released" else bool(gradient.abs().sum() > 0)
    assert model.experts.net.conv1.weight.grad.abs().sum() > 0


def test_the_straight_through_gradient_is_that_of_the_chosen_probability_with_the_answer_as_it_is():
    model, (x, y) = mixture(), batch(12)
    F.cross_entropy(model(x), y).backward()
    found, model.router.weight.grad = model.router.weight.grad, None
    route, answer = model.selected(x), model(x).detach().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(answer, y), answer)
    louder = (slope * answer.detach()).sum(1)
    (louder * model.gate(x).log_softmax(1)[torch.arange(12), route]).sum().backward()
    torch.testing.assert_close(found, model.router.weight.grad)


def test_a_router_that_is_nan_is_an_error_that_names_its_images():
    model, (x, _) = mixture(), batch(6)
    x[2, 0, 0, 0] = torch.nan
    with pytest.raises(NonFinite, match="the router's scores are NaN or infinite for 1") as raised:
        model(x)
    assert raised.value.rows == [2]


def test_the_fast_copy_of_separate_networks_has_their_batchnorm_folded():
    model = initial(RTER(config()), LARGE, 0).eval().requires_grad_(False)
    x, y = LARGE.train.batch(slice(0, 8))
    made = fast(model, x, y)
    assert made.about.startswith("folded BatchNorm")
    torch.testing.assert_close(made.model(x), model(x), rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# what it minimises


@each_size
@each_router
def test_without_beta_it_is_pgd_at_of_the_mixture_step_for_step(router, data):
    c = config(router=router, beta=0)
    mine, theirs = mixture(data, router=router).train(), mixture(data, router=router).train()
    (stage,) = RTER(c).stages(data)
    (known,) = PGDAT(pgd_at.Config(steps=2)).stages(data)
    optimisers = [sgd(*stage.groups(mine))], [sgd(theirs.parameters())]
    for step in range(2):
        x, y = (part[6 * step : 6 * step + 6] for part in batch(12, data))
        loss = stage.step(mine, x, y, Rng(step), optimisers[0])
        expected = known.step(theirs, x, y, Rng(step).at("mixture"), optimisers[1])
        torch.testing.assert_close(loss, expected.detach())
    for (name, one), two in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, msg=name)


@each_size
@each_router
def test_the_loss_is_the_equation(router, data):
    c = config(router=router, beta=2.5)
    model, (x, y) = mixture(data, router=router), batch(12, data)
    x_adv = pgd(model, x, y, THREAT, rng=HERE.at("mixture"), steps=2)
    second = model.gate(x).topk(2, 1).indices[:, 1]
    x_second = pgd(lambda z: model.of(z, second), x, y, THREAT, rng=HERE.at("second"), steps=2)
    model.train()
    other = copy.deepcopy(model)
    found = objective(other, x, y, c, THREAT, HERE)
    together = model.all_outputs(torch.cat([x_adv, x, x_second]))
    of_adv, of_clean, of_second = together.split(12)
    p, q = (outputs[torch.arange(12), second].softmax(1) for outputs in (of_clean, of_second))
    stability = (p * (p.log() - q.log())).sum(1)
    assert (stability > 0).all()
    expected = F.cross_entropy(model.answer(model.gate(x_adv), of_adv), y) + 2.5 * stability.mean()
    torch.testing.assert_close(found, expected)
    found.backward(), expected.backward()
    for one, two in zip(other.experts.parameters(), model.experts.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_images_that_were_not_moved_cost_no_stability(monkeypatch):
    model, (x, y) = mixture().train(), batch(12)
    monkeypatch.setattr(defenses.rter, "crafted", lambda model, target, x, *rest: x)
    loss = objective(model, x, y, config(), THREAT, HERE)
    torch.testing.assert_close(loss, F.cross_entropy(model(x.repeat(3, 1, 1, 1))[:12], y))
    assert (kl(model(x), model(1 - x)) > 0).all()


def test_the_second_attack_is_against_the_second_expert_alone():
    model, (x, y) = mixture(), batch(12)
    second = model.second(x)
    found = crafted(model, lambda z: model.of(z, second), x, y, config(), THREAT, HERE)
    for k in range(4):
        rows = second == k
        start = THREAT.random_start(x, HERE.at("start"))[rows]
        alone = pgd(
            lambda z, k=k: model.all_outputs(z)[:, k],
            x[rows],
            y[rows],
            THREAT,
            rng=HERE,
            steps=2,
            start=start,
        )
        torch.testing.assert_close(found[rows], alone)


def test_attacks_stay_in_ball_and_box_start_anywhere_and_leave_the_model_as_it_was():
    model, (x, y) = mixture().train(), batch(12)
    model.experts.net.bn1.eval()
    state, modes = copy.deepcopy(model.state_dict()), [part.training for part in model.modules()]
    found = crafted(model, model, x, y, config(), THREAT, HERE)
    assert THREAT.contains(found, x).all() and not torch.equal(found, x)
    assert [part.training for part in model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    middle = torch.full((40, 1, 8, 8), 0.5)
    offset = THREAT.random_start(middle, HERE) - middle
    assert offset.mean().abs() < 0.1 * THREAT.eps and offset.abs().max() <= THREAT.eps + 1e-6


@each_router
def test_almost_no_pixel_of_an_image_is_without_a_gradient(router):
    model, (x, y) = mixture(router=router).float(), batch(12)
    gradient, _ = input_gradient(model, x.float(), y, cross_entropy)
    assert ((gradient == 0).flatten(1).double().mean(1) < 0.01).all()


@each_router
def test_training_moves_the_experts_and_a_router_that_learns(router, tmp_path):
    defense = RTER(config(router=router))
    before, after = initial(defense, DATA, 0), train(defense, DATA, seed=0, folder=tmp_path, quiet=True).model
    assert torch.equal(before.router.weight, after.router.weight) == (router == "released")
    assert not torch.equal(before.experts.net.conv1.weight, after.experts.net.conv1.weight)


# ---------------------------------------------------------------------------------------------------------------------
# Adam, as published


def test_adam_with_its_cyclic_rate_is_torchs_step_for_step():
    c = config(optimiser="adam", lr=0.01, low_lr=0.002, half_cycle=3, weight_decay=0.1)
    mine, theirs = (nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    host = torch.optim.SGD([mine], lr=7.0)
    adam = torch.optim.Adam([theirs], weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CyclicLR(
        adam, base_lr=0.002, max_lr=0.01, step_size_up=3, cycle_momentum=False
    )
    for step in range(10):
        for parameter in (mine, theirs):
            parameter.grad = torch.tensor([0.5 * step - 2, 1.0 / (step + 1)])
        as_adam(host, c).step()
        assert adam.param_groups[0]["lr"] == pytest.approx(cyclic(step, c))
        adam.step()
        schedule.step()
        torch.testing.assert_close(mine, theirs)


def test_adams_memory_survives_the_trainers_checkpoints(tmp_path):
    c = config(optimiser="adam", lr=0.01)
    model = initial(RTER(c), DATA, 0)
    host = torch.optim.SGD(model.parameters(), lr=0.1)
    (stage,) = RTER(c).stages(DATA)
    x, y = DATA.train.batch(slice(0, 6))
    stage.step(model.train(), x, y, HERE, [host])
    other, again = copy.deepcopy(model), None
    again = torch.optim.SGD(other.parameters(), lr=0.1)
    torch.save(host.state_dict(), tmp_path / "state.pt")
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for network, optimiser in ((model, host), (other, again)):
        stage.step(network, x, y, Rng(1), [optimiser])
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_published_recipe_is_adams_and_the_others_are_sgds():
    assert {name: recipe.optimiser for name, recipe in RTER.recipes.items()} == {
        "tiny": "sgd",
        "fast": "sgd",
        "sgd": "sgd",
        "paper": "adam",
    }
    paper = RTER.recipes["paper"]
    assert (cyclic(0, paper), cyclic(500, paper), cyclic(1000, paper)) == pytest.approx((5e-5, 1e-4, 5e-5))


# ---------------------------------------------------------------------------------------------------------------------
# SGD, at full length


@pytest.mark.parametrize("kind", [RTER, JTDMoE])
def test_the_recipe_sgd_is_full_length_and_its_rate_falls_near_the_end(kind):
    c = kind.recipes["sgd"]
    (stage,) = kind(c).stages(DATA)
    assert (stage.epochs, stage.batch_size, stage.lr) == (110, 128, 0.1)
    assert (stage.momentum, stage.weight_decay, c.optimiser) == (0.9, 5e-4, "sgd")
    rates = {epochs: dropped(epochs, c) for epochs in (0, 99, 100, 104, 105, 109)}
    assert rates == pytest.approx({0: 0.1, 99: 0.1, 100: 0.01, 104: 0.01, 105: 0.001, 109: 0.001})


@pytest.mark.parametrize("kind", [RTER, JTDMoE])
def test_each_epoch_is_trained_at_its_rate_even_if_every_step_is_interrupted(kind, tmp_path, monkeypatch):
    settings = {"width": 4, "steps": 1, "beta": 0, "batch_size": 18, "epochs": 3, "drops": (1, 2), "lr": 0.1}
    defense = kind(replaced(kind.recipes["tiny"], settings))
    rates, whole, real = [], Stage.step, torch.optim.SGD.step

    def interrupted(*given):
        os.kill(os.getpid(), signal.SIGINT)
        return whole(*given)

    def step(self):
        rates.append(self.param_groups[0]["lr"])
        real(self)

    monkeypatch.setattr(Stage, "step", interrupted)
    monkeypatch.setattr(torch.optim.SGD, "step", step)
    for _ in range(20):
        with contextlib.suppress(Interrupted):
            train(defense, DATA, seed=0, folder=tmp_path, quiet=True)
    each = len(rates) // 3
    assert each > 1 and rates == pytest.approx([0.1] * each + [0.01] * each + [0.001] * each)


# ---------------------------------------------------------------------------------------------------------------------
# attacks along routes


def test_along_the_routes_a_weak_expert_is_found_exactly_where_the_route_can_be_turned_to_it():
    model, (x, _) = mixture(experts=2, router="released").requires_grad_(False), batch(30)
    # one expert is always right and the other always wrong, so the only way to break an image is to turn its route
    model.experts.state_of(0, 2)["linear.weight"].zero_()
    for k, bias in enumerate(([5.0, 0, 0], [0, 5.0, 0])):
        model.experts.state_of(k, k + 1)["linear.bias"].copy_(torch.tensor(bias))
    y = torch.zeros(30, dtype=torch.int64)
    x, y = x[model.selected(x) == 0], y[model.selected(x) == 0]
    radius = model.route_radius(x)
    threat = Linf(radius.median().item())

    plain = pgd(model, x, y, threat, rng=HERE, steps=10, random_start=False)
    assert (model(plain).argmax(1) == y).all()
    (run,) = (run for run in runs("per-route", model) if run.name == "route1-weight1")
    here = x
    for aim in run.aims:
        here = pgd(aim.output, x, y, threat, rng=HERE, loss=aim.loss, steps=10, start=here)
    broken = model(here).argmax(1) != y
    assert torch.equal(broken[radius != threat.eps], (radius < threat.eps)[radius != threat.eps])
    assert 5 < broken.sum() < len(x)


# ---------------------------------------------------------------------------------------------------------------------
# what is proved


@each_size
def test_the_route_turns_at_its_radius_and_not_before(data):
    model, (x, _) = mixture(data), batch(12, data)
    radius, route = model.route_radius(x), model.selected(x)
    rows = model.router.weight / model.normalize.std[:, :, 0, 0].repeat_interleave(data.shape[1] ** 2, 1)
    scores, turned = model.gate(x), torch.zeros(12, dtype=torch.bool)
    for k in range(4):
        step = (rows[k] - rows[route]).sign().view_as(x) * radius[:, None, None, None]
        assert (model.selected(x + 0.999 * step) == route).all()
        turned |= model.selected(x + 1.001 * step) != route
    assert turned.all() and scores.shape == (12, 4)
    for seed in range(20):
        corner = Rng(seed).normal(x).sign() * radius[:, None, None, None]
        assert (model.selected(x + 0.999 * corner) == route).all()


def test_a_soft_mixture_has_the_certificate_of_the_equation_and_a_hard_one_has_none():
    model, (x, _) = mixture(router="soft"), batch(12)
    certificate = model.certificate(x)
    assert certificate.about.startswith("own re-derivation")
    best = model(x).softmax(1).topk(2, 1).values
    rows = model.router.weight / model.normalize.std[0, 0, 0, 0]
    r = torch.stack([(rows - row).abs().sum(1).max() / 4 for row in rows])
    d = (r + model.gate(x).softmax(1) * model.slopes()).sum(1)
    torch.testing.assert_close(certificate.radius, (best[:, 0] - best[:, 1]) / d)
    for router in ("released", "st"):
        none = mixture(router=router).certificate(x)
        assert none.radius is None and none.about.startswith("NOT APPLICABLE: the answer jumps")


def test_no_two_images_move_an_experts_probabilities_by_more_than_its_slope():
    model = mixture(router="soft")
    slopes = model.slopes()
    assert slopes.shape == (4,)
    for seed in range(10):
        x, step = Rng(seed).uniform(torch.empty(8, 1, 8, 8).double()), 10.0 ** -(seed % 4)
        other = x + step * Rng(seed).at("step").normal(x).tanh()
        p, q = (model.all_outputs(images).softmax(2) for images in (x, other))
        change = ((p[..., 0] - p[..., 1]) - (q[..., 0] - q[..., 1])).abs()
        assert (change <= slopes * (other - x).abs().flatten(1).amax(1, keepdim=True)).all()


def test_a_resnets_slope_grows_with_any_of_its_layers():
    network = mixture(LARGE).experts.networks[0]
    slope = resnet_slope(network)
    for name, parameter in network.named_parameters():
        with torch.no_grad():
            parameter.mul_(2)
            # what is added changes no difference
            assert (resnet_slope(network) > slope) != name.endswith("bias"), name
            parameter.div_(2)


# ---------------------------------------------------------------------------------------------------------------------
# experts of timm's


VIT = "test_vit"


def test_a_vision_transformer_is_shown_images_of_its_own_size_and_its_router_too():
    data = dataset(channels=3, side=8)
    model = initial(RTER(config(backbone=VIT, experts=2)), data, 0).eval()
    assert model.side == (160, 160) and model.router.weight.shape == (2, 3 * 160 * 160)
    x, _ = data.train.batch(slice(0, 3))
    assert model(x).shape == (3, 3)
    z = F.interpolate((x - 0.5) / 0.25, (160, 160), mode="bilinear")
    alone = model.experts.networks[int(model.selected(x)[0])](z[:1])
    torch.testing.assert_close(model(x)[:1], alone, rtol=1e-4, atol=1e-5)
    # resizing is linear, and so is the router behind it
    assert model.route_radius(x).isfinite().all()


def test_vision_transformers_take_a_step():
    data = dataset(channels=3)
    defense = RTER(config(backbone=VIT, experts=2, steps=1))
    model, (stage,) = initial(defense, data, 0).train(), defense.stages(data)
    before = [parameter.detach().clone() for parameter in model.experts.parameters()]
    x, y = data.train.batch(slice(0, 2))
    stage.step(model, x, y, HERE, [sgd(*stage.groups(model))])
    moved = [not torch.equal(one, two) for one, two in zip(before, model.experts.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2


def test_no_constant_is_known_of_attention():
    data = dataset(channels=3)
    model = initial(RTER(config(backbone=VIT, experts=2, router="soft")), data, 0).eval()
    none = model.certificate(data.train.batch(slice(0, 2))[0])
    assert none.radius is None and "no Lipschitz constant is known" in none.about


def test_experts_start_from_weights_that_are_given_but_for_the_classifier(tmp_path):
    import timm

    data, path = dataset(channels=3), tmp_path / "vit.safetensors"
    published = timm.create_model(VIT, num_classes=7)
    save_file(published.state_dict(), path)
    model = initial(RTER(config(backbone=VIT, experts=2, weights=str(path))), data, 0)
    for network in model.experts.networks:
        for key, value in published.state_dict().items():
            if not key.startswith("head."):
                assert torch.equal(network.state_dict()[key], value), key
        assert network.head.weight.shape == (3, 64)
    # with weights comes the normalisation that they were trained with
    assert model.normalize.std.flatten().tolist() == [0.5] * 3 and data.std == (0.25,) * 3


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (None, "cannot read weights=.*it must be a safetensors file"),
        (
            {"cls_token": torch.zeros(1, 1, 3)},
            r"another model: cls_token is \(1, 1, 64\) here and \(1, 1, 3\)",
        ),
        ({}, "another model: cls_token is .* here and nothing there"),
    ],
)
def test_weights_that_do_not_fit_are_refused(state, says, tmp_path):
    path = tmp_path / "vit.safetensors"
    if state is None:
        path.write_bytes(b"no such thing")
    else:
        save_file(state, path)
    with pytest.raises(CheckpointError, match=says):
        initial(RTER(config(backbone=VIT, weights=str(path))), dataset(channels=3), 0)
    with pytest.raises(CheckpointError, match="cannot read weights='nowhere'"):
        initial(RTER(config(backbone=VIT, weights="nowhere")), dataset(channels=3), 0)


@pytest.mark.parametrize(
    ("backbone", "says"),
    [
        ("vit_smal_patch16_224", "did you mean 'vit_small_patch16_224'"),
        ("?", "take resnet18 or a model of timm's"),
    ],
)
def test_an_unknown_backbone_is_refused_with_a_suggestion(backbone, says):
    with pytest.raises(UsageError, match=says):
        initial(RTER(config(backbone=backbone)), DATA, 0)


def test_a_mixture_needs_a_second_expert():
    with pytest.raises(UsageError, match="experts: Input should be greater than or equal to 2"):
        config(experts=1)
